"""Norm, rotation, scale and cast of sections of a projection: the work between the matrix products of a layer.

One matrix product gives several sections side by side: say queries, latents and index keys. Each head of a section is
normalised, rotated, scaled and cast, or quantised to FP8 with one scale per token and head. The kernel does this in
one launch for all sections; XLA makes one or two launches per section.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from pallas_kernels import norm_rope as kernel
from pallas_kernels.mesh_axes import explicit_axes, on_shards
from pallas_kernels.norm_rope import Section
from pallas_kernels.plans.norm_rope import NormRopePlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import describe, require
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops.rope import rotate

__all__ = ["Section", "norm_rope"]

# The sizes of a section, and the smallest value of each.
_SIZES = {"start": 0, "heads": 1, "width": 1}
_TYPES = (jnp.dtype(jnp.bfloat16), fp8.FLOAT32, fp8.E4M3FN, fp8.E4M3FNUZ)

# The name of an earlier release.
Part = Section


def norm_rope(
    x: Array,
    parts: Sequence[Section],
    positions: Array,
    frequencies: Any,
    *,
    eps: float = 1e-6,
    implementation: str | None = None,
    plan: NormRopePlan | None = None,
    config: NormRopePlan | None = None,
) -> list[Any]:
    """Finishes sections of a projection: norm over each head, rotation, scale, cast.

    Args:
      x: bfloat16 or float32 [T, W]. The arithmetic is float32, rounded once at the end.
      parts: the sections: columns of x and how they are finished. In any order; not all columns need to be in one.
      positions: integer [T].
      frequencies: [pairs] radians per position of the rotated pairs, from `rope_frequencies`.
      eps: of the norms, added to the mean square; a section's own `eps` replaces it.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      A list with one result per section: [T, heads, width] in its dtype. For an FP8 section, a pair of it and its
      scales float32 [T, heads], which are those of `fp8.quantize` times the section's factor.

    Raises:
      ValueError: types, shapes or columns that do not fit.
    """
    implementation, plan = with_plan(implementation, plan, config, NormRopePlan)
    x = _check.array("x", x, (jnp.bfloat16, jnp.float32), "T", "W")
    positions = _check.int32("positions", positions, x.shape[0], hint="One per row of x.")
    frequencies = _check.floats("frequencies", frequencies, "pairs")
    parts = [_check_part(f"parts[{i}]", part, x, frequencies.shape[0]) for i, part in enumerate(parts)]
    if x.shape[0] == 0 or not parts:
        check_implementation(implementation)
        return [_shaped(part, [jnp.zeros((0, part.columns), jnp.uint8), jnp.zeros((0, 1))]) for part in parts]
    run = partial(_dispatch, eps=eps, implementation=implementation, plan=plan)
    if explicit_axes() and _splits_by_head(x, parts):
        return _on_shards(run, x, parts[0], positions, frequencies)
    return run(x, parts, positions, frequencies)


# --- validation
def _check_part(name: str, part: Section, x: Array, pairs: int) -> Section:
    """`part` with its sizes as ints."""
    sizes: dict[str, Any] = {key: _check.size(f"{name}.{key}", getattr(part, key), low) for key, low in _SIZES.items()}
    if part.rotated is not None:
        sizes["rotated"] = _check.size(f"{name}.rotated", part.rotated, 0)
    part = dataclasses.replace(part, **sizes)
    require(
        part.start + part.columns <= x.shape[1],
        f"{name} takes {part.heads} heads of {part.width} columns from {part.start} on; x has {x.shape[1]} columns.",
    )
    require(
        jnp.dtype(part.dtype) in _TYPES,
        f"{name} is to be {part.dtype}; expected one of {', '.join(t.name for t in _TYPES)}.",
    )
    require(
        part.rotated is None or part.rotated <= part.width - 2 * pairs,
        f"{name} is rotated from column {part.rotated} on; {pairs} frequencies turn {2 * pairs} of {part.width}.",
    )
    require(part.bias is None or part.weight is not None, f"{name} has a bias and no weight; a layer norm has both.")
    require(
        part.factor is None or part.quantized,
        f"{name} is {part.dtype} with a factor {describe(part.factor)}; a factor belongs to the scales of an FP8 part.",
    )
    number = isinstance(part.eps, int | float) and 0 <= part.eps < math.inf
    require(
        part.eps is None or (number and part.weight is not None),
        f"{name} has eps {part.eps!r} and {'no' if part.weight is None else 'a'} weight; expected a number of at least"
        " 0 for a section with a norm, or None for the call's eps.",
    )
    per_head = x.shape[0], part.heads
    axes = {"weight": (part.width,), "bias": (part.width,), "factor": per_head, "gain": per_head}
    given = {what: getattr(part, what) for what in axes}
    arrays: dict[str, Any] = {
        what: _check.array(f"{name}.{what}", array, jnp.floating, *axes[what])
        for what, array in given.items()
        if array is not None
    }
    return dataclasses.replace(part, **arrays)


# --- choice of a body
def _dispatch(
    x: Array,
    parts: Sequence[Section],
    positions: Array,
    frequencies: Array,
    *,
    eps: float,
    implementation: str | None,
    plan: NormRopePlan | None,
) -> list[Any]:
    args = x, parts, positions, frequencies
    return dispatch(
        "norm_rope",
        implementation,
        {
            "triton": lambda: with_derivative_of(
                partial(_xla_all, eps=eps), partial(_triton, eps=eps, plan=plan), *args
            ),
            "xla": lambda: _xla_all(*args, eps),
            "reference": lambda: [_reference(x, part, positions, frequencies, eps) for part in parts],
        },
    )


def _devices(axes: Any) -> int:
    """Number of devices over which an array's axis is split that lies over these axes of the mesh."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in names)


def _splits_by_head(x: Array, parts: Sequence[Section]) -> bool:
    """Whether x, in a mesh with Explicit axes, is split into whole heads of its only section."""
    columns = jax.typeof(x).sharding.spec[1]
    return len(parts) == 1 and parts[0].columns == x.shape[1] and parts[0].heads % _devices(columns) == 0


def _on_shards(run: Callable[..., Any], x: Array, part: Section, positions: Array, frequencies: Array) -> list[Any]:
    """`run` in a mesh with Explicit axes: every device finishes its own tokens and heads of the only section."""
    tokens, heads = jax.typeof(x).sharding.spec
    local = dataclasses.replace(part, heads=part.heads // _devices(heads))
    whole, own = PartitionSpec(), PartitionSpec(tokens, heads)
    lies: dict[str, Any] = {"weight": whole, "bias": whole, "factor": own, "gain": own}
    given = {name: spec for name, spec in lies.items() if getattr(part, name) is not None}
    specs = own, [dataclasses.replace(local, **given)], PartitionSpec(tokens), whole
    return on_shards(run, (x, [local], positions, frequencies), specs, own)


# --- bodies
def _shaped(part: Section, arrays: Sequence[Array]) -> Any:
    """The result of a section from arrays [T, heads * width] (and scales): see `norm_rope`'s Returns."""
    heads = arrays[0].reshape(-1, part.heads, part.width)
    if not part.quantized:
        return heads.astype(part.dtype)
    return lax.bitcast_convert_type(heads, jnp.dtype(part.dtype)), arrays[1].reshape(-1, part.heads)


def _heads(x: Array, part: Section) -> Array:
    """The section's columns of x as float32 [T, heads, width]."""
    columns = x[:, part.start : part.start + part.columns]
    return columns.reshape(-1, part.heads, part.width).astype(jnp.float32)


def _xla(x: Array, part: Section, positions: Array, frequencies: Array, eps: float) -> Any:
    values = _heads(x, part)
    if part.weight is not None:
        if part.bias is not None:
            values = values - jnp.mean(values, axis=-1, keepdims=True)
        eps = eps if part.eps is None else part.eps
        scale = lax.rsqrt(jnp.mean(values * values, axis=-1, keepdims=True) + eps)
        values = values * scale * part.weight.astype(jnp.float32)
        if part.bias is not None:
            values = values + part.bias.astype(jnp.float32)
    if part.rotated is not None:
        first, end = part.rotated, part.rotated + 2 * frequencies.shape[0]
        rotated = rotate(values[..., first:end], positions, frequencies, interleaved=part.interleaved)
        values = jnp.concatenate([values[..., :first], rotated, values[..., end:]], axis=-1)
    if part.scale != 1.0:
        values = values * part.scale
    if part.gain is not None:
        values = values * part.gain.astype(jnp.float32)[..., None]
    if not part.quantized:
        return values.astype(part.dtype)
    codes, scales = fp8.quantize(values, group_size=part.width, dtype=part.dtype)
    scales = scales[..., 0]
    return codes, scales if part.factor is None else scales * part.factor


def _xla_all(x: Array, parts: Sequence[Section], positions: Array, frequencies: Array, eps: float) -> list[Any]:
    return [_xla(x, part, positions, frequencies, eps) for part in parts]


def _reference(x: Array, part: Section, positions: Array, frequencies: Array, eps: float) -> Any:
    values = reference.norm_rope(
        _heads(x, part),
        part.weight,
        part.bias,
        positions.astype(jnp.float32)[:, None] * frequencies,
        rotated=part.rotated,
        interleaved=part.interleaved,
        eps=eps if part.eps is None else part.eps,
    )
    values = values * jnp.float32(part.scale)
    if part.gain is not None:
        values = values * part.gain.astype(jnp.float32)[:, :, None]
    if not part.quantized:
        return values.astype(part.dtype)
    codes, scales = reference.quantize(values, group_size=part.width, dtype=jnp.dtype(part.dtype))
    factor = 1.0 if part.factor is None else part.factor
    return lax.bitcast_convert_type(codes, jnp.dtype(part.dtype)), scales[..., 0] * factor


def _triton(
    x: Array, parts: Sequence[Section], positions: Array, frequencies: Array, eps: float, plan: NormRopePlan | None
) -> list[Any]:
    # Compute the angles once for all sections; under one jit, XLA also shares them between the layers of a step.
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    finished = kernel.norm_rope(x, parts, cos, sin, eps=eps, plan=plan)
    return [_shaped(part, arrays) for part, arrays in zip(parts, finished)]
