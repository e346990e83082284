"""Finishes a projection in one launch: norm, rotation, scale and cast of its sections, or FP8 with a scale per head.

One program handles one token and some heads of one section, as one tile. It loads each value a second time as the
partner of its rotary pair. Both pairings then use the same arithmetic, and no value moves between lanes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store_masked
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.norm_rope import NormRopePlan, norm_rope_plan
from pallas_kernels.rounding import convert, float32_bits, quantize
from pallas_kernels.targets import Target, by_target
from pallas_kernels.tiles import power_of_two

_TYPES = ("bfloat16", "float32", "float8_e4m3fn", "float8_e4m3fnuz")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias", "factor", "gain"],
    meta_fields=["start", "heads", "width", "dtype", "rotated", "interleaved", "scale", "eps"],
)
@dataclasses.dataclass(frozen=True)
class Section:
    """Columns of a projection with the same treatment: `heads` heads of `width` columns, one after the other.

    Attributes:
      start: first column.
      heads, width: how many heads of how many columns.
      dtype: type of the result; FP8 is quantised with one scale per token and head.
      weight: float [width], weight of a norm over each head; None: no norm.
      bias: float [width], bias of a layer norm; None with a weight: an RMS norm.
      rotated: first column of a head that is rotated; None: no rotation.
      interleaved: True pairs neighbouring columns, False pairs the two halves of the rotated columns.
      scale: multiplies the result.
      factor: float32 [T, heads], multiplies the scales of an FP8 result; None for 1.
      gain: float32 [T, heads] of any sign, multiplies all values of a head after the rotation and `scale`, before they
        are quantised to FP8; None for 1.
      eps: of this section's norm; None for that of the call.
    """

    start: int
    heads: int
    width: int
    dtype: str
    weight: Array | None = None
    bias: Array | None = None
    rotated: int | None = None
    interleaved: bool = False
    scale: float = 1.0
    factor: Array | None = None
    gain: Array | None = None
    eps: float | None = None

    @property
    def quantized(self) -> bool:
        """Whether the result is FP8."""
        return self.dtype.startswith("float8")

    @property
    def columns(self) -> int:
        """Columns of all heads."""
        return self.heads * self.width


# --- kernel
class _Tile:
    """Some heads of one section of a token, [heads, columns], both axes padded to powers of two."""

    def __init__(self, part: Section, token: Array, block: Array, size: int, target: Target):
        shape = (size, power_of_two(part.width))
        row, column = (jnp.arange(n, dtype=jnp.int32) for n in shape)
        self.part, self.target, self.row = part, target, token
        self.heads = block * size + row
        self.token = jnp.full(shape, token)
        self.head = jnp.broadcast_to(self.heads[:, None], shape)
        self.column = jnp.broadcast_to(column[None, :], shape)
        # Padding comes last: after the heads of the section, and after the columns of each head.
        inside = [self.head < part.heads] if part.heads % size else []
        inside += [self.column < part.width] if part.width != shape[1] else []
        self.exists = functools.reduce(jnp.logical_and, inside) if inside else None

    def load(self, ref, *at: Array) -> Array:
        """Loads ref[*at] as float32; padding is 0."""
        view = ref.at[at]
        return (load(view) if self.exists is None else load(view, mask=self.exists, other=0)).astype(jnp.float32)

    def read(self, ref, column: Array) -> Array:
        """Loads columns `column` of the tile's heads from the projection `ref`, as float32."""
        return self.load(ref, self.token, self.part.start + self.head * self.part.width + column)

    def store(self, ref, values: Array) -> None:
        """Stores the tile's values without padding."""
        at = self.head * self.part.width + self.column
        store_masked(ref, (self.token, at), values, self.exists, self.target)

    def load_per_head(self, ref) -> Array:
        """Loads ref[token, head] of the tile's heads, [heads]. Padded heads load the last head's; it is not stored."""
        return load(ref.at[jnp.full_like(self.heads, self.row), jnp.minimum(self.heads, self.part.heads - 1)]).astype(
            jnp.float32
        )


def _norm(tile: _Tile, x: Array, weight_ref: Any, bias_ref: Any, eps: float):
    """Returns a function (values, columns) -> normalised values; mean and variance are those of x[heads, columns]."""
    part = tile.part
    mean = jnp.zeros((x.shape[0], 1), jnp.float32)
    if bias_ref is not None:
        mean = jnp.sum(x, axis=1)[:, None] / part.width
    centred = x - mean if tile.exists is None else jnp.where(tile.exists, x - mean, 0.0)
    scale = lax.rsqrt(jnp.sum(centred * centred, axis=1)[:, None] / part.width + eps)

    def apply(values: Array, columns: Array) -> Array:
        out = (values - mean) * scale * tile.load(weight_ref, columns)
        return out if bias_ref is None else out + tile.load(bias_ref, columns)

    return apply


def _partners(tile: _Tile, first: int, pairs: int) -> tuple[Array, Array, Array, Array]:
    """Per column: is it rotated, its partner column, the number of its pair, is it the second of its pair."""
    at = tile.column - first
    inside = (at >= 0) & (at < 2 * pairs)
    if tile.part.interleaved:
        second, partner, pair = (at & 1) == 1, at ^ 1, at >> 1
    else:
        second = at >= pairs
        partner = jnp.where(second, at - pairs, at + pairs)
        pair = jnp.where(second, partner, at)
    return inside, jnp.where(inside, first + partner, tile.column), jnp.where(inside, pair, 0), second


def _finish(tile: _Tile, x_ref, cos_ref, sin_ref, given: Sequence[Any], eps: float) -> Array:
    """Loads a tile and normalises, rotates and scales it, float32. given: weight, bias and gain, or None for each."""
    part, (weight_ref, bias_ref, gain_ref) = tile.part, given
    values = tile.read(x_ref, tile.column)
    norm = None if weight_ref is None else _norm(tile, values, weight_ref, bias_ref, eps)
    if norm is not None:
        values = norm(values, tile.column)
    if part.rotated is not None:
        inside, partner, pair, second = _partners(tile, part.rotated, cos_ref.shape[1])
        others = tile.read(x_ref, partner)
        others = others if norm is None else norm(others, partner)
        cos, sin = (tile.load(ref, tile.token, pair) for ref in (cos_ref, sin_ref))
        values = jnp.where(inside, values * cos + jnp.where(second, others, -others) * sin, values)
    values = values if part.scale == 1.0 else values * jnp.float32(part.scale)
    return values if gain_ref is None else values * tile.load_per_head(gain_ref)[:, None]


def _store(tile: _Tile, values: Array, out_refs: Sequence[Any], factor_ref: Any) -> None:
    part = tile.part
    if not part.quantized:
        tile.store(out_refs[0], convert(values, out_refs[0].dtype))
        return
    if tile.exists is not None:
        values = jnp.where(tile.exists, values, 0.0)
    codes, scales = quantize(float32_bits(values), part.dtype, False, tile.target)
    tile.store(out_refs[0], codes.astype(jnp.uint8))
    head, exists = tile.heads, tile.heads < part.heads
    token, mask = jnp.full_like(head, tile.row), exists if part.heads % head.shape[0] else None
    if factor_ref is not None:
        scales = scales * tile.load_per_head(factor_ref)
    store_masked(out_refs[1], (token, head), scales, mask, tile.target)


def _kernel(*refs, parts: Sequence[Section], eps: float, plan: NormRopePlan, target: Target):
    """Grid (T, programs of all sections). refs: x, cos and sin if any rotates, arrays of each section, results."""
    token, program = pl.program_id(0), pl.program_id(1)
    x_ref, *left = refs
    rotates = any(p.rotated is not None for p in parts)
    cos_ref, sin_ref = (left.pop(0), left.pop(0)) if rotates else (None, None)
    given = [[None if a is None else left.pop(0) for a in (p.weight, p.bias, p.gain, p.factor)] for p in parts]
    first = 0
    for part, (*norm, factor) in zip(parts, given):
        outs = [left.pop(0) for _ in range(1 + part.quantized)]
        size = plan.heads(part.heads, part.width)
        count = -(-part.heads // size)

        @pl.when((program >= first) & (program < first + count))
        def _(part=part, norm=norm, factor=factor, outs=outs, size=size, first=first):
            tile = _Tile(part, token, program - first, size, target)
            own = eps if part.eps is None else part.eps
            _store(tile, _finish(tile, x_ref, cos_ref, sin_ref, norm, own), outs, factor)

        first += count


# --- launch
def _shapes(part: Section, tokens: int) -> list[jax.ShapeDtypeStruct]:
    dtype = jnp.uint8 if part.quantized else jnp.dtype(part.dtype)
    out = [jax.ShapeDtypeStruct((tokens, part.columns), dtype)]
    return out + ([jax.ShapeDtypeStruct((tokens, part.heads), jnp.float32)] if part.quantized else [])


def norm_rope(
    x: Array, parts: Sequence[Section], cos: Array, sin: Array, *, eps: float, plan: NormRopePlan | None = None
) -> list[list[Array]]:
    """Finishes each section of x[T, W]: norm, rotation, scale, gain and cast.

    x is bfloat16 or float32; cos and sin are float32 [T, pairs]. T is at least 1, and there is at least one section.

    Returns:
      A list per section: [values [T, heads * width]], for FP8 [bytes, float32 scales [T, heads]].

    Raises:
      NotImplementedError: types that the kernel does not support.
    """
    for dtype in (x.dtype.name, *(p.dtype for p in parts)):
        if dtype not in _TYPES:
            raise NotImplementedError(
                f"a projection or a part of it is {dtype}; the kernel supports {', '.join(_TYPES)}"
            )
    rotated = [cos, sin] if any(p.rotated is not None for p in parts) else []

    def run(target: Target, x, rotated, parts):
        chosen = choose_plan("norm_rope", plan, norm_rope_plan, widest=max(p.width for p in parts), target=target)
        static = [jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p) for p in parts]
        arrays = [a for p in parts for a in (p.weight, p.bias, p.gain, p.factor) if a is not None]
        programs = sum(-(-p.heads // chosen.heads(p.heads, p.width)) for p in parts)
        return call(
            functools.partial(_kernel, parts=static, eps=eps, plan=chosen, target=target),
            x,
            *rotated,
            *arrays,
            out_shape=[shape for p in parts for shape in _shapes(p, x.shape[0])],
            grid=(x.shape[0], programs),
            name="norm_rope",
            target=target,
            num_warps=chosen.num_warps,
        )

    after = iter(by_target(run, x, rotated, list(parts)))
    return [[next(after) for _ in range(1 + p.quantized)] for p in parts]
