"""The first half of DeepSeek-V4's output projection: rotates attention's result back, multiplies per group of heads.

Each value was rotated by its own position, so their weighted sum is rotated back by the query's position. The kernel
does it inside the product: one launch on a GPU. T tokens, H heads of d values, g groups, O outputs of a group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import output_projection as kernel
from pallas_kernels.plans.output_projection import ProjectionPlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops.rope import rotate


def rotated_projection(
    out: Array,
    weight: Array,
    positions: Array,
    frequencies: Any,
    *,
    implementation: str | None = None,
    plan: ProjectionPlan | None = None,
    config: ProjectionPlan | None = None,
) -> Array:
    """Rotates every head of `out` back, then multiplies the concatenated heads of group i by weight[i].

    The last r values of every head are rotated by -position * frequency in interleaved pairs, in float32, and rounded
    to out.dtype. bfloat16 products are summed in float32; float32 products use the platform's highest precision.

    Args:
      out: floating [T, H, d], attention's result; padding may hold anything.
      weight: floating [g, H // g * d, O]; group i has H // g consecutive heads.
      positions: integer [T].
      frequencies: [r / 2] radians per position, from `rope_frequencies`; r at most d.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      [T, g, O] in out.dtype.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, ProjectionPlan)
    out = _check.array("out", out, jnp.floating, "T", "H", "d")
    weight = _check.array("weight", weight, jnp.floating, "g", "H // g * d", "O")
    positions = _check.int32("positions", positions, out.shape[0], hint="One per row of out.")
    frequencies = _check.floats("frequencies", frequencies, "r / 2")
    _check_widths(out, weight, frequencies)
    if 0 in (out.shape[0], weight.shape[0], weight.shape[2]):
        check_implementation(implementation)
        return jnp.zeros((out.shape[0], weight.shape[0], weight.shape[2]), out.dtype)
    return dispatch(
        "rotated_projection",
        implementation,
        {
            "triton": lambda: with_derivative_of(
                _xla, partial(_triton, plan=plan), out, weight, positions, frequencies
            ),
            "xla": lambda: _xla(out, weight, positions, frequencies),
            "reference": lambda: reference.rotated_projection(
                out, weight, positions.astype(jnp.float32)[:, None] * frequencies
            ).astype(out.dtype),
        },
    )


def _check_widths(out: Array, weight: Array, frequencies: Array) -> None:
    _, heads, width = out.shape
    groups = max(1, weight.shape[0])
    require(
        heads % groups == 0 and weight.shape[1] == heads // groups * width,
        f"weight has shape {list(weight.shape)}; {heads} heads of {width} values in {weight.shape[0]} groups need"
        f" [{weight.shape[0]}, {heads} // {weight.shape[0]} * {width}, O]: g must divide H.",
    )
    require(
        2 * frequencies.shape[0] <= width,
        f"frequencies has shape {list(frequencies.shape)}; expected [r / 2], r at most {width}, the width of a head.",
    )


def _triton(out: Array, weight: Array, positions: Array, frequencies: Array, plan: ProjectionPlan | None) -> Array:
    # Under one jit, XLA computes the angles once for all layers of a step that have the same frequencies.
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return kernel.rotated_projection(out, weight, jnp.cos(angles), jnp.sin(angles), plan=plan)


def _xla(out: Array, weight: Array, positions: Array, frequencies: Array) -> Array:
    kept = out.shape[2] - 2 * frequencies.shape[0]
    rotated = rotate(out[..., kept:], positions, frequencies, interleaved=True, inverse=True)
    rows = jnp.concatenate([out[..., :kept], rotated], axis=-1).reshape(out.shape[0], *weight.shape[:2])
    return _by_group(rows, weight).astype(out.dtype)


def _by_group(x: Array, weight: Array) -> Array:
    """x[T, g, I] times weight[g, I, O] per group, accumulated and returned in float32."""
    product = partial(jnp.einsum, "tgi,gio->tgo", preferred_element_type=jnp.float32)

    def widen(x: Array, weight: Array) -> Array:
        # XLA:CPU does not support a batched bfloat16 product with a float32 result.
        return product(x.astype(jnp.float32), weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    if jnp.float32 in (x.dtype, weight.dtype):
        return widen(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=widen, default=product)
