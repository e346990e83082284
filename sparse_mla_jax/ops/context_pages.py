"""Where the pages of a request lie when they are spread over the devices of a mesh axis ("context").

Page column p of a request lies on device p % n of the axis. The number in column p of the page table is a page of that
device's cache. Position q of the request is in column q // page_size, so device i has the positions

    q = ((l // page_size) * n + i) * page_size + l % page_size,   l = 0, 1, 2, ...

A position l is local, a position q is global. Both orders are the same, and the positions 0 .. length - 1 that lie on a
device are the first ones of its local positions.

`index` is the device's place on the axis, an integer or a traced scalar (`jax.lax.axis_index(axis_name)`) from 0 to
n - 1; others are clamped. `n` is the number of devices (`jax.lax.axis_size(axis_name)`) and static. page_size * n must
be below 2**31.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import BEYOND, require


# --- public
def own_pages(page_table: Array, index: Array | int, n: int) -> Array:
    """The page table of a device: its own columns of page_table[B, P], in order.

    Args:
      page_table: integer [B, P], all columns of every request.
      index: the device's place on the axis.
      n: devices of the axis.

    Returns:
      int32 [B, ceil(P / n)]; column j is column j * n + index of `page_table`, -1 where that is P or more.

    Raises:
      ValueError: other types or shapes, n below 1.
    """
    page_table = _check.int32("page_table", page_table, "B", "P", hint="The pages of every request.")
    n = _check.size("n", n)
    columns = page_table.shape[1]
    own = -(-columns // n)
    whole = jnp.pad(page_table, ((0, 0), (0, own * n - columns)), constant_values=-1)
    return jnp.take(whole.reshape(page_table.shape[0], own, n), _index(index, n), axis=2, mode="clip")


def own_lengths(lengths: Array, index: Array | int, n: int, page_size: int) -> Array:
    """How many of the positions 0 .. lengths[...] - 1 lie on a device: int32 [...], the first of its local positions.

    Args:
      lengths: integer [...]; below 0 counts as 0.
      index: the device's place on the axis.
      n: devices of the axis.
      page_size: positions of a page.

    Raises:
      ValueError: other types, n or page_size below 1, a product of both of 2**31 or more.
    """
    lengths = jnp.maximum(_check.int32("lengths", lengths, ...), 0)
    share = _share(index, n, page_size)
    rest = lengths % share.cycle - share.first
    return lengths // share.cycle * share.page_size + jnp.clip(rest, 0, share.page_size)


def to_global(positions: Array, index: Array | int, n: int, page_size: int) -> Array:
    """Global positions of local ones: int32 [...]; negative ones give -1, those beyond int32 give 2**31 - 1.

    Args:
      positions: integer [...], local positions of the device.
      index: the device's place on the axis.
      n: devices of the axis.
      page_size: positions of a page.

    Raises:
      ValueError: as `own_lengths`.
    """
    local = _check.int32("positions", positions, ...)
    share = _share(index, n, page_size)
    offset = local % share.page_size + share.first
    page = local // share.page_size
    # Compare before the product, which could wrap. 2**31 - 1 is no position.
    is_position = page <= (BEYOND - 1 - offset) // share.cycle
    found = jnp.where(is_position, jnp.where(is_position, page, 0) * share.cycle + offset, BEYOND)
    return jnp.where(local < 0, -1, found)


def to_local(positions: Array, index: Array | int, n: int, page_size: int) -> Array:
    """Local positions of global ones: int32 [...]; -1 for those that lie on another device, and for negative ones.

    Args:
      positions: integer [...], positions in the request.
      index: the device's place on the axis.
      n: devices of the axis.
      page_size: positions of a page.

    Raises:
      ValueError: as `own_lengths`.
    """
    positions = _check.int32("positions", positions, ...)
    share = _share(index, n, page_size)
    local = positions // share.cycle * share.page_size + positions % share.page_size
    return jnp.where(_is_own(positions, share), local, -1)


def own_slots(positions: Array, slots: Array, index: Array | int, n: int, page_size: int) -> Array:
    """The slots of tokens whose position lies on the device: int32 [...], -1 for the others, which are not written.

    Args:
      positions: integer [...], positions of the tokens in their requests.
      slots: integer of the same shape, page * page_size + offset with the page numbers of `page_table`.
      index: the device's place on the axis.
      n: devices of the axis.
      page_size: positions of a page.

    Raises:
      ValueError: as `own_lengths`; shapes that differ.
    """
    positions = _check.int32("positions", positions, ...)
    slots = _check.int32("slots", slots, *positions.shape, hint="One per position.")
    return jnp.where(_is_own(positions, _share(index, n, page_size)), slots, -1)


# --- arithmetic
class _Share(NamedTuple):
    """A device's share of the positions: page_size of every `cycle` positions, from `first` (int32 scalar) on."""

    page_size: int
    cycle: int
    first: Array


def _share(index: Any, n: Any, page_size: Any) -> _Share:
    n, page_size = _check.size("n", n), _check.size("page_size", page_size)
    require(
        n * page_size <= BEYOND,
        f"page_size is {page_size} and n {n}; their product is expected to be below 2**31. Use smaller pages.",
    )
    return _Share(page_size, n * page_size, _index(index, n) * page_size)


def _index(index: Any, n: int) -> Array:
    return jnp.clip(_check.int32("index", index, hint="A scalar: jax.lax.axis_index(axis_name)."), 0, n - 1)


def _is_own(positions: Array, share: _Share) -> Array:
    """Whether global positions lie on the device."""
    offset = positions % share.cycle - share.first
    return (positions >= 0) & (positions < BEYOND) & (offset >= 0) & (offset < share.page_size)
