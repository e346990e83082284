"""Rows of a cache inside a kernel: their arrays (`CachePart`), their tiles (`Grid`), and how they are encoded."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._call import load, store_masked
from pallas_kernels.rounding import convert, float32_bits, quantize
from pallas_kernels.targets import Target
from pallas_kernels.tiles import power_of_two


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows", "pages", "scales"], meta_fields=["flavour", "group_size"]
)
@dataclasses.dataclass(frozen=True)
class CachePart:
    """One array of a cache, its scales, and the rows to write to it.

    Attributes:
      rows: bfloat16, float16 or float32 [T, W]; None if the kernel computes them.
      pages: [N, W] bfloat16, float32 or bytes of FP8; or uint32 [N, W // 4], four FP8 values per word.
      scales: float32 [N, W // group_size], or E8M0 as uint8; None if pages are not FP8.
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
        """The arrays that a kernel updates in place: pages, and scales if there are any."""
        return [self.pages] if self.scales is None else [self.pages, self.scales]


def _pack(codes: Array) -> Array:
    """Packs four codes into a word, little endian: int32 [G, W] -> uint32 [G, W // 4]."""
    for shift in (8, 16):
        low, high = jnp.unstack(codes.reshape(codes.shape[0], -1, 2), axis=-1)
        codes = low | (high << shift)
    return lax.bitcast_convert_type(codes, jnp.uint32)


class Grid:
    """A row as a tile [groups, each]. Both axes are padded to powers of two, the first to at least `height`."""

    def __init__(self, groups: int, each: int, target: Target, height: int = 1):
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
        """The same tile, restricted to `width` columns from `first` on; refs hold them as columns 0..width-1."""
        part = copy.copy(self)
        part.at, part.width = self.at - first if first else self.at, width
        if first or width != self.width:
            inside = (self.at >= first) & (self.at < first + width)
            part.exists = inside if self.exists is None else self.exists & inside
        return part

    def load(self, ref, *row: Array) -> Array:
        """Loads ref[*row]; padding is 0."""
        view = ref.at[*[jnp.full_like(self.at, i) for i in row], self.at]
        return load(view) if self.exists is None else load(view, mask=self.exists, other=0)

    def store(self, ref, row: Array, value: Array) -> None:
        """Stores `value` as one row of `ref`, without padding."""
        store_masked(ref, (jnp.full_like(self.at, row), self.at), value, self.exists, self.target)


def encode(part: CachePart, row: Array, grid: Grid, target: Target) -> list[tuple[Grid, Array]]:
    """Encodes a row [groups, each] of `grid`: for each of `CachePart.arrays` the grid and the tile to store."""
    if part.scales is None or part.flavour is None:
        return [(grid, convert(row, part.pages.dtype))]
    groups, height = part.scales.shape[1], row.shape[0]
    codes, scales = quantize(float32_bits(row), part.flavour, part.scales.dtype == jnp.uint8, target)
    scale = Grid(groups, 1, target, height), scales[:, None].astype(part.scales.dtype)
    if part.pages.dtype != jnp.uint32:
        return [(grid, codes.astype(jnp.uint8)), scale]
    return [(Grid(groups, part.group_size // 4, target, height), _pack(codes)), scale]
