"""Writes tokens into paged caches in place: quantise to FP8 by groups, or round to bfloat16, and store at a slot.

One program per token, all parts of a token (latent, rotary key, indexer's key) in one launch. Everything but the two
divisions is integer arithmetic on float32 bits, so that no cast, no flush of subnormals and no NaN differs between
machines, and the divisions are rounded once: the bytes are those of `sparse_mla_jax.ops.fp8` everywhere. A token whose
slot a later token names writes nothing, so that no two programs write one row.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store
from pallas_kernels._primitives import assembly
from pallas_kernels.plans.cache_write import CacheWritePlan, cache_write_plan
from pallas_kernels.targets import dispatch_division
from pallas_kernels.tiles import power_of_two

# exponent bias, largest value written
_FLAVOURS = {"float8_e4m3fn": (7, 448.0), "float8_e4m3fnuz": (8, 224.0)}
_INFINITY = 0x7F800000
_SOURCES = ("bfloat16", "float16", "float32")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "pages", "scales"], meta_fields=["flavour", "group_size"]
)
@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a cache and what is written to it.

    Attributes:
      rows: bfloat16, float16 or float32 [T, W]; None where a kernel makes them itself.
      pages: [N, W] bfloat16, float32 or bytes of FP8, or uint32 [N, W // 4], four FP8 values a word.
      scales: float32 [N, W // group_size], or E8M0 as uint8; None where pages are not FP8.
      flavour: static; name of the FP8 type, or None.
      group_size: static; values that share a scale.
    """

    rows: Any
    pages: Array
    scales: Array | None = None
    flavour: str | None = None
    group_size: int = 0

    @property
    def arrays(self) -> list[Array]:
        """What is written in place."""
        return [self.pages] if self.scales is None else [self.pages, self.scales]


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _constant(x: float) -> int:
    """Bits of a positive float32."""
    return int(np.float32(x).view(np.int32))


# Magnitudes saturate here, and a group's largest counts as at least the other (`ops.fp8`).
_SATURATION, _AMAX_FLOOR = _constant(1.75 * 2.0**127), _constant(1e-4)


def float32_bits(x: Array) -> Array:
    """int32 bits of x as float32; subnormals as they are, and NaN of bfloat16 and float32 too."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    bits = _bits(x.astype(jnp.float32))
    if x.dtype == jnp.float32:
        return bits
    # Casts disagree about signalling NaN.
    return jnp.where((bits & 0x7FFFFFFF) > _INFINITY, bits | 0x400000, bits)


def _round_to_bfloat16(bits: Array) -> Array:
    """bfloat16 of float32 bits: to nearest even, NaN to the quiet one of its sign."""
    upper = lax.shift_right_logical(bits + 0x7FFF + ((bits >> 16) & 1), 16)
    quiet = (lax.shift_right_logical(bits, 16) & 0x8000) | 0x7FC0
    upper = jnp.where((bits & 0x7FFFFFFF) > _INFINITY, quiet, upper)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def convert(x: Array, dtype: Any) -> Array:
    """x as bfloat16 or float32, the same bits on every machine; a NaN that becomes bfloat16 is the quiet one."""
    if x.dtype == dtype:
        return x
    return _round_to_bfloat16(float32_bits(x)) if dtype == jnp.bfloat16 else _float(float32_bits(x))


def divide(a: Array, b: Array, target: str) -> Array:
    """a / b in float32, rounded once."""
    if target == "cuda":
        # Triton's own division is approximate here.
        return assembly("div.rn.f32 $0, $1, $2;", "=f,f,f", a, jnp.broadcast_to(b, a.shape), dtype=jnp.float32)
    return a / b


def quantize(bits: Array, flavour: str, e8m0: bool, target: str) -> tuple[Array, Array]:
    """Codes int32 [G, W] and scales (float32 or E8M0 as int32 [G]) of float32 bits [G, W], as `ops.fp8.quantize`."""
    bias, largest = _FLAVOURS[flavour]
    magnitude = bits & 0x7FFFFFFF
    magnitude = jnp.where(magnitude > _INFINITY, jnp.int32(0), jnp.minimum(magnitude, _SATURATION))
    amax = jnp.maximum(jnp.max(magnitude, axis=1), _AMAX_FLOOR)
    if e8m0:
        # Up where the significand exceeds 1.75, that of the largest value.
        scales = ((amax + 0x1FFFFF) >> 23) - (15 - bias)
        # The reciprocal of a power of two: the same quotients.
        quotient = _float(magnitude) * _float((254 - scales) << 23)[:, None]
    else:
        # Always true: XLA, in interpret mode, would multiply by the reciprocal of a divisor that it can see.
        scales = divide(_float(amax), jnp.where(amax > 0, jnp.float32(largest), jnp.float32(1)), target)
        quotient = divide(_float(magnitude), scales[:, None], target)
    quotient_bits = jnp.minimum(_bits(quotient), _constant(largest))
    normal = ((quotient_bits + 0x7FFFF + ((quotient_bits >> 20) & 1)) >> 20) - ((127 - bias) << 3)
    # Beside this the last bit of a float32 is the smallest subnormal code: the addition rounds.
    unit = 2.0 ** (21 - bias)
    small = _bits(_float(quotient_bits) + jnp.float32(unit)) - _constant(unit)
    codes = jnp.where(quotient_bits < _constant(2.0 ** (1 - bias)), small, normal)
    return jnp.where(codes > 0, codes | ((bits >> 24) & 0x80), jnp.int32(0)), scales


def _pack(codes: Array) -> Array:
    """Four codes to a word, little endian: int32 [G, W] -> uint32 [G, W // 4]."""
    for shift in (8, 16):
        low, high = jnp.unstack(codes.reshape(codes.shape[0], -1, 2), axis=-1)
        codes = low | (high << shift)
    return lax.bitcast_convert_type(codes, jnp.uint32)


# --- kernel ----------------------------------------------------------------------------------------------------------
def _is_last(slot_ref, slot: Array, token: Array, tokens: int, scan: int) -> Array:
    """Whether no later token names the slot."""

    def last_in(first, last):
        at = first + jnp.arange(scan, dtype=jnp.int32)
        others = load(slot_ref.at[at], mask=at < tokens, other=-1) if tokens % scan else load(slot_ref.at[at])
        same = others == slot
        return jnp.maximum(last, jnp.max(jnp.where(same, at, jnp.int32(-1))))

    if tokens <= scan:
        last = last_in(jnp.int32(0), token)
    else:
        last = lax.fori_loop(token // scan, jnp.int32(-(-tokens // scan)), lambda i, n: last_in(i * scan, n), token)
    return last == token


class Grid:
    """The groups of a row as a tile [groups, each], both padded to powers of two, the groups to `height` at least."""

    def __init__(self, groups: int, each: int, target: str, height: int = 1):
        self.shape = (max(height, power_of_two(groups)), power_of_two(each))
        self.row, self.target, self.width = jnp.arange(self.shape[0], dtype=jnp.int32), target, groups * each
        group = jnp.broadcast_to(self.row[:, None], self.shape)
        column = jnp.broadcast_to(jnp.arange(self.shape[1], dtype=jnp.int32)[None, :], self.shape)
        self.at = group * each + column
        self.exists: Array | None = None
        if self.shape[0] != groups:
            self.exists = group < groups
        if self.shape[1] != each:
            inside = column < each
            self.exists = inside if self.exists is None else self.exists & inside

    def columns(self, first: int, width: int) -> Grid:
        """The same tile as a grid of `width` columns of the row, from `first` on, which are stored as columns 0.."""
        part = copy.copy(self)
        part.at, part.width = self.at - first if first else self.at, width
        if first or width != self.width:
            inside = (self.at >= first) & (self.at < first + width)
            part.exists = inside if self.exists is None else self.exists & inside
        return part

    def load(self, ref, *row: Array) -> Array:
        """Values of a row, zeros where padded."""
        view = ref.at[*[jnp.full_like(self.at, i) for i in row], self.at]
        return load(view) if self.exists is None else load(view, mask=self.exists, other=0)

    def store(self, ref, row: Array, value: Array) -> None:
        """Writes a row."""
        at = self.at
        if self.exists is not None and self.target == "cpu":
            # Interpret mode writes old values back through masked lanes: point them past the array.
            at = jnp.where(self.exists, at, self.width)
        store(ref.at[jnp.full_like(at, row), at], value, mask=self.exists)


def encode(part: Part, row: Array, grid: Grid, target: str) -> list[tuple[Grid, Array]]:
    """What `Part.arrays` hold of a row, values [groups, each] of `grid`: a tile for each array, and its grid."""
    if part.scales is None or part.flavour is None:
        return [(grid, convert(row, part.pages.dtype))]
    groups, height = part.scales.shape[1], row.shape[0]
    codes, scales = quantize(float32_bits(row), part.flavour, part.scales.dtype == jnp.uint8, target)
    scale = Grid(groups, 1, target, height), scales[:, None].astype(part.scales.dtype)
    if part.pages.dtype != jnp.uint32:
        return [(grid, codes.astype(jnp.uint8)), scale]
    return [(Grid(groups, part.group_size // 4, target, height), _pack(codes)), scale]


def _kernel(*refs, parts: Sequence[Part], tokens: int, plan: CacheWritePlan, target: str):
    """Grid (T,); refs: slots, the rows of every part, the arrays of all parts before, and after (the same)."""
    slot_ref, *row_refs = refs[: 1 + len(parts)]
    out_refs = list(refs[-sum(len(p.arrays) for p in parts) :])
    token = pl.program_id(0)
    grids = [Grid(1 if p.scales is None else p.scales.shape[1], p.group_size or p.rows.shape[1], target) for p in parts]
    # All in flight before the first is waited for.
    rows = [grid.load(ref, token) for grid, ref in zip(grids, row_refs)]
    slot = slot_ref[token]
    mine = (slot >= 0) & _is_last(slot_ref, slot, token, tokens, plan.scan)

    for part, grid, row in zip(parts, grids, rows):
        after = [out_refs.pop(0) for _ in part.arrays]
        encoded = encode(part, row, grid, target)

        @pl.when(mine & (slot < part.pages.shape[0]))
        def _(after=after, encoded=encoded):
            for ref, (tile, value) in zip(after, encoded):
                tile.store(ref, slot, value)


# --- launch ----------------------------------------------------------------------------------------------------------


def write(parts: Sequence[Part], slots: Array, *, plan: CacheWritePlan | None = None) -> list[list[Array]]:
    """`Part.arrays` of every part after rows[t] is written at slots[t]; in place where the caller's arrays are donated.

    slots int32 [T], T at least 1; those below 0 or from N on are skipped, and of several tokens with one slot the last
    is written.

    Raises:
      NotImplementedError: types or groups that the kernel does not serve, or arrays of 2**31 elements and more.
    """
    for part in parts:
        if part.rows.dtype.name not in _SOURCES:
            raise NotImplementedError(f"rows are {part.rows.dtype}; the kernel reads {', '.join(_SOURCES)}")
        if part.flavour is not None and part.group_size % 4:
            raise NotImplementedError(f"groups of {part.group_size} values; the kernel writes four at a time")
    if slots.dtype != jnp.int32:
        raise NotImplementedError(f"slots are {slots.dtype}; the kernel reads int32")

    def run(target, parts, slots):
        chosen = plan or cache_write_plan(
            tokens=slots.shape[0], width=max(p.rows.shape[1] for p in parts), target=target
        )
        arrays = [a for p in parts for a in p.arrays]
        shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p) for p in parts]
        return call(
            functools.partial(_kernel, parts=shapes, tokens=slots.shape[0], plan=chosen, target=target),
            slots,
            *[p.rows for p in parts],
            *arrays,
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
            grid=(slots.shape[0],),
            name="cache_write",
            target=target,
            num_warps=chosen.num_warps,
            input_output_aliases={1 + len(parts) + i: i for i in range(len(arrays))},
        )

    # A row without values has no kernel argument.
    real = [p for p in parts if p.rows.shape[1]]
    after = iter(dispatch_division(run, real, slots) if real else ())
    return [[next(after) for _ in p.arrays] if p.rows.shape[1] else p.arrays for p in parts]
