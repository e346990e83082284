"""The part of every request's pages that a device has: page column p lies on device p % context of the axis.

A `PagePart` maps what a whole step says to what the device has, and does nothing without the axis "context". Positions
count the tokens of a request, or its compressed entries if `page_size` counts those of a page.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.ops import context_pages
from sparse_mla_jax.parallel.axes import Parallel


@dataclasses.dataclass(frozen=True)
class PagePart:
    """A device's part of the pages of a step, inside `jax.shard_map`.

    Attributes:
      axis: name of the axis "context" in the mesh; None if it has one device.
      devices: of that axis.
      page_size: positions of a page.
    """

    axis: str | None
    devices: int
    page_size: int

    @classmethod
    def create(cls, parallel: Parallel | None, page_size: int) -> PagePart:
        """The part of the device on which the program runs."""
        if parallel is None:
            return cls(None, 1, page_size)
        return cls(parallel.axis("context"), parallel.context, page_size)

    def pages(self, page_table: Array) -> Array:
        """The device's own columns of page_table[B, P]: int32[B, ceil(P / devices)]."""
        if self.axis is None:
            return page_table
        return context_pages.own_pages(page_table, self._index(), self.devices)

    def masked(self, page_table: Array) -> Array:
        """page_table[B, P] with -1 in the columns of other devices."""
        if self.axis is None:
            return page_table
        column = jnp.arange(page_table.shape[1], dtype=jnp.int32)
        return jnp.where(column % self.devices == self._index(), page_table, -1)

    def lengths(self, lengths: Array) -> Array:
        """How many of the first lengths[T] positions the device has."""
        if self.axis is None:
            return lengths
        return context_pages.own_lengths(lengths, self._index(), self.devices, page_size=self.page_size)

    def slots(self, positions: Array, slots: Array) -> Array:
        """slots[T] of positions[T]; -1 for those on other devices."""
        if self.axis is None:
            return slots
        return context_pages.own_slots(positions, slots, self._index(), self.devices, page_size=self.page_size)

    def to_local(self, positions: Array) -> Array:
        """The device's own numbers of positions, whose pages `pages` gives; -1 for those on other devices."""
        if self.axis is None:
            return positions
        return context_pages.to_local(positions, self._index(), self.devices, page_size=self.page_size)

    def to_global(self, positions: Array) -> Array:
        """Positions of a request from the device's own numbers; -1 stays."""
        if self.axis is None:
            return positions
        return context_pages.to_global(positions, self._index(), self.devices, page_size=self.page_size)

    def is_first(self) -> Array | bool:
        """Whether the device is the first of the axis, which does what only one of them may do."""
        return True if self.axis is None else self._index() == 0

    def _index(self) -> Array:
        assert self.axis is not None
        return jax.lax.axis_index(self.axis)


def check_windows(page_size: int, ratio: int, context: int) -> None:
    """Refuses pages smaller than a window of V4's compressor, whose entries would lie on other devices than its tokens.

    Args:
      page_size: tokens of a page.
      ratio: tokens of a window; 0 in layers that do not compress.
      context: devices that share the pages of a request.

    Raises:
      ValueError: several devices, and pages that do not hold whole windows.
    """
    require(
        context == 1 or not ratio or page_size % ratio == 0,
        f"page_size is {page_size} in a layer with compress_ratio {ratio}; over the axis context a page must hold whole"
        f" windows. Use a page_size that is a multiple of {ratio}.",
    )
