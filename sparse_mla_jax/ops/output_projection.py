"""The first half of DeepSeek-V4's output projection: attention's result turned back, and a product per group of heads.

Values carry the rotation of their own positions, so the sum over them is turned back by the query's, on its way into
the product: one launch on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import output_projection as kernel
from pallas_kernels.plans.output_projection import ProjectionPlan
from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_config
from sparse_mla_jax.ops.rope import rotate


def rotated_projection(
    out: Array,
    weight: Array,
    positions: Array,
    frequencies: Any,
    *,
    implementation: str | None = None,
    config: ProjectionPlan | None = None,
) -> Array:
    """low[t, g] = turned(out[t])[g-th H // g heads, one after the other] @ weight[g].

    The last r values of every head are rotated by -position * frequency in interleaved pairs, in float32, and rounded
    to out.dtype; products of bfloat16 are summed in float32, those of float32 at the platform's highest precision.

    Args:
      out: floating [T, H, d], attention's result; rows of padding may hold anything.
      weight: floating [g, H // g * d, O].
      positions: integer [T].
      frequencies: [r / 2] radians per position, from `rope_frequencies`; r at most d.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      [T, g, O] in out.dtype.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not serve the case.
    """
    implementation = with_config(implementation, config, ProjectionPlan)
    out, weight, positions = (jnp.asarray(x) for x in (out, weight, positions))
    frequencies = jnp.asarray(frequencies, jnp.float32)
    _check(out, weight, positions, frequencies)
    if 0 in (out.shape[0], weight.shape[0], weight.shape[2]):
        check_implementation(implementation)
        return jnp.zeros((out.shape[0], weight.shape[0], weight.shape[2]), out.dtype)
    return dispatch(
        "rotated_projection",
        implementation,
        {
            "triton": lambda: _triton(out, weight, positions, frequencies, config),
            "xla": lambda: _xla(out, weight, positions, frequencies),
            "reference": lambda: reference.rotated_projection(
                out, weight, positions.astype(jnp.float32)[:, None] * frequencies
            ).astype(out.dtype),
        },
    )


def _check(out: Array, weight: Array, positions: Array, frequencies: Array) -> None:
    require(
        out.ndim == 3 and jnp.issubdtype(out.dtype, jnp.floating),
        f"out is {out.dtype}{list(out.shape)}; expected floating [T, H, d].",
    )
    tokens, heads, width = out.shape
    require(
        weight.ndim == 3 and jnp.issubdtype(weight.dtype, jnp.floating),
        f"weight is {weight.dtype}{list(weight.shape)}; expected floating [g, H // g * d, O].",
    )
    groups = max(1, weight.shape[0])
    require(
        heads % groups == 0 and weight.shape[1] == heads // groups * width,
        f"weight has shape {list(weight.shape)}; {heads} heads of {width} values in {weight.shape[0]} groups need"
        f" [{weight.shape[0]}, {heads} // {weight.shape[0]} * {width}, O]: g must divide H.",
    )
    require(
        positions.shape == (tokens,) and jnp.issubdtype(positions.dtype, jnp.integer),
        f"positions is {positions.dtype}{list(positions.shape)}; expected integers [{tokens}], one per row of out.",
    )
    require(
        frequencies.ndim == 1 and 2 * frequencies.shape[0] <= width,
        f"frequencies has shape {list(frequencies.shape)}; expected [r / 2], r at most {width}, the width of a head.",
    )


def _triton(out: Array, weight: Array, positions: Array, frequencies: Array, plan: ProjectionPlan | None) -> Array:
    # Under one jit once for all layers of a step that turn alike.
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return kernel.rotated_projection(out, weight, jnp.cos(angles), jnp.sin(angles), plan=plan)


def _xla(out: Array, weight: Array, positions: Array, frequencies: Array) -> Array:
    kept = out.shape[2] - 2 * frequencies.shape[0]
    turned = rotate(out[..., kept:], positions, frequencies, interleaved=True, inverse=True)
    rows = jnp.concatenate([out[..., :kept], turned], axis=-1).reshape(out.shape[0], *weight.shape[:2])
    return _by_group(rows, weight).astype(out.dtype)


def _by_group(x: Array, weight: Array) -> Array:
    """x[T, g, I] times weight[g, I, O] per group, accumulated and returned in float32."""
    product = functools.partial(jnp.einsum, "tgi,gio->tgo", preferred_element_type=jnp.float32)

    def widened(x: Array, weight: Array) -> Array:
        # XLA:CPU refuses a batched bfloat16 product with a float32 result.
        return product(x.astype(jnp.float32), weight.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    if jnp.float32 in (x.dtype, weight.dtype):
        return widened(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=widened, default=product)
