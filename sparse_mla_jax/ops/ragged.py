"""Ragged rows of slots: a flat array of fixed capacity, and the offsets at which its rows start.

Array sizes depend on shapes only, so a jitted step never asks the host for the number of entries: `indptr` says where
the valid ones end. Invalid entries are dropped, not kept as holes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.ops._chunks import rows_from

INT32_MAX = 2**31 - 1


class FlatRows(NamedTuple):
    """Rows as intervals of one array: row r is values[starts[r] : starts[r] + lengths[r]]."""

    values: Array
    starts: Array
    lengths: Array


@serializable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indptr"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row r is values[indptr[r] : indptr[r + 1]].

    Attributes:
      values: int32[capacity]; entries from indptr[-1] on have no meaning and are not read.
      indptr: int32[rows + 1], from 0, ascending, at most capacity.
    """

    values: Array
    indptr: Array

    @property
    def rows(self) -> int:
        """Number of rows."""
        return np.shape(self.indptr)[0] - 1

    @property
    def capacity(self) -> int:
        """Entries that `values` has room for."""
        return np.shape(self.values)[0]

    @property
    def longest(self) -> int:
        """Static: no row has more entries."""
        return self.capacity

    @property
    def width(self) -> int:
        """Static: capacity divided by the number of rows, rounded up."""
        return -(-self.capacity // max(1, self.rows))

    def check(self, name: str, rows: int) -> Ragged:
        """The same rows in int32.

        Raises:
          ValueError: another type or number of rows; `name` is the argument's name in the message.
        """
        require(self.rows == rows, f"{name} holds {self.rows} rows; q has {rows} tokens: one row for each.")
        values = _check.int32(f"{name}, values", self.values, "capacity")
        return Ragged(values, _check.int32(f"{name}, indptr", self.indptr, rows + 1))

    def take(self, first: Array, count: int) -> Ragged:
        """Rows first..first+count-1, for use inside `map_row_chunks`."""
        return Ragged(self.values, rows_from(self.indptr, first, count + 1))

    def flatten(self) -> FlatRows:
        """The rows as intervals of `values`, indptr clamped to capacity."""
        own = self.check("self", self.rows)
        bounds = jnp.clip(own.indptr, 0, self.capacity)
        return FlatRows(own.values, bounds[:-1], bounds[1:] - bounds[:-1])

    def masked(self) -> Array:
        """Dense rows int32[rows, capacity] (at least one column), -1 after the end of each."""
        return self.to_dense(max(1, self.capacity))

    def kernel_arguments(self) -> dict[str, Any]:
        """The row fields of a kernel's `Source`."""
        return {"values": self.values, "indptr": self.indptr, "lengths": None}

    def to_dense(self, width: int, fill: int = -1) -> Array:
        """Dense rows int32[rows, width]: each row, then `fill`. Longer rows are cut; indptr is clamped to capacity.

        Raises:
          ValueError: width is negative, or fill does not fit int32.
        """
        width, fill = _check.size("width", width, 0), _check.size("fill", fill, -INT32_MAX - 1, INT32_MAX)
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        if self.capacity == 0:
            return jnp.full((self.rows, width), fill, jnp.int32)
        values, starts, lengths = self.flatten()
        inside = column < lengths[:, None]
        at = jnp.where(inside, starts[:, None] + column, 0)
        return jnp.where(inside, values.at[at].get(mode="promise_in_bounds"), jnp.int32(fill))


@serializable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseRows:
    """Rows of one width with a length each: row r is values[r, : lengths[r]].

    If the valid entries already come first, this is cheaper to make than `Ragged`. Attention costs by length for both.

    Attributes:
      values: int32[rows, width]; entries from lengths[r] on have no meaning and are not read.
      lengths: int32[rows], clamped to 0..width; None means that all entries count.
    """

    values: Array
    lengths: Array | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return np.shape(self.values)[0]

    @property
    def width(self) -> int:
        """Entries of a row."""
        return np.shape(self.values)[1]

    @property
    def longest(self) -> int:
        """Static: no row has more entries than the width."""
        return self.width

    def check(self, name: str, rows: int) -> DenseRows:
        """The same rows in int32.

        Raises:
          ValueError: other types or shapes; `name` is the argument's name in the message.
        """
        values = _check.int32(name, self.values, rows, "W", hint="One row of slots per token of q, or a Ragged.")
        if self.lengths is None:
            return DenseRows(values)
        # Clamps 64-bit lengths only (a cast would wrap). Others are clamped in the kernels, which saves a launch.
        return DenseRows(values, _check.int32(f"lengths of {name}", self.lengths, rows))

    def take(self, first: Array, count: int) -> DenseRows:
        """Rows first..first+count-1, for use inside `map_row_chunks`."""
        return jax.tree.map(lambda x: rows_from(x, first, count), self)

    def flatten(self) -> FlatRows:
        """The rows as intervals of the flattened values, lengths clamped."""
        starts = jnp.arange(self.rows, dtype=jnp.int32) * self.width
        whole = jnp.full((self.rows,), self.width, jnp.int32)
        lengths = whole if self.lengths is None else jnp.clip(self.lengths, 0, self.width)
        return FlatRows(self.values.reshape(-1), starts, lengths)

    def masked(self) -> Array:
        """int32[rows, width] with -1 after the end of each row."""
        if self.lengths is None:
            return self.values
        column = jnp.arange(self.width, dtype=jnp.int32)[None, :]
        return jnp.where(column < self.lengths[:, None], self.values, -1)

    def kernel_arguments(self) -> dict[str, Any]:
        """The row fields of a kernel's `Source`."""
        return {"values": self.values, "indptr": None, "lengths": self.lengths}


def indptr_from_lengths(lengths: Array) -> Array:
    """Start of each row and end of the last: int32[R + 1] from integer lengths[R]. Negative lengths count as 0.

    Raises:
      ValueError: lengths is not an integer array of one axis.
    """
    lengths = _check.int32("lengths", lengths, "R")
    ends = jnp.cumsum(jnp.maximum(lengths, 0), dtype=jnp.int32)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])


def pack_rows(indices: Array, lengths: Array | None = None, *, limit: int | Array | None = None) -> Ragged:
    """Packs dense rows: drops invalid entries and keeps the order of the others.

    An entry is valid when it is not negative, below `limit`, and among the first lengths[r] of its row.

    Args:
      indices: integer [R, W].
      lengths: integer [R], clamped to [0, W]; None means W.
      limit: entries at or above it are invalid (the number of slots, say); an integer or an integer scalar array.

    Returns:
      Ragged of R rows and capacity R * W; -1 beyond the last entry.

    Raises:
      ValueError: other types or shapes, or R * W >= 2**31.
    """
    indices = _check.int32("indices", indices, "R", "W")
    rows, width = indices.shape
    capacity = rows * width
    require(
        capacity <= INT32_MAX,
        f"indices is int32[{rows}, {width}], at least 2**31 entries, which int32 offsets can not address."
        " Work in chunks of rows.",
    )
    valid = indices >= 0
    if limit is not None:
        valid &= indices < _check.int32("limit", limit)
    if lengths is not None:
        lengths = _check.int32("lengths", lengths, rows, hint="One per row of indices.")
        valid &= jnp.arange(width, dtype=jnp.int32)[None, :] < lengths[:, None]
    count = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    indptr = indptr_from_lengths(valid.sum(axis=1, dtype=jnp.int32))
    at = jnp.where(valid, indptr[:-1, None] + count - 1, capacity)
    values = jnp.full((capacity,), -1, jnp.int32)
    values = values.at[at.reshape(-1)].set(indices.reshape(-1), mode="drop", wrap_negative_indices=False)
    return Ragged(values, indptr)


def slots_from_positions(positions: Array, request_ids: Array, page_table: Array, *, page_size: int) -> Array:
    """Slots of positions through their request's page table: page_table[b, p // page_size] * page_size + p % page_size.

    The slot is -1 for a position that is negative or past the page table, for a request outside [0, B), and for a page
    that is negative or so large that the slot would not fit int32.

    Args:
      positions: integer [T, W] (or [T]): positions in the request, -1 for none.
      request_ids: integer [T]: row of the page table.
      page_table: integer [B, P]: physical pages, -1 for none.
      page_size: tokens of a page, at least 1.

    Returns:
      int32 of the shape of positions.

    Raises:
      ValueError: other types or shapes.
    """
    positions = _check.int32("positions", positions, *(("T",) if np.ndim(positions) == 1 else ("T", "W")))
    hint = "One per row of positions."
    request_ids = _check.int32("request_ids", request_ids, positions.shape[0], hint=hint)
    page_table = _check.int32("page_table", page_table, "B", "P")
    page_size = _check.size("page_size", page_size)
    requests, pages = page_table.shape
    require(
        page_table.size <= INT32_MAX,
        f"page_table is int32[{requests}, {pages}], at least 2**31 entries; use larger pages or fewer requests.",
    )
    if page_table.size == 0:
        return jnp.full(positions.shape, -1, jnp.int32)
    row = request_ids.reshape(-1, *[1] * (positions.ndim - 1))
    column = positions // page_size
    valid = (positions >= 0) & (positions < _check.BEYOND) & (column < pages) & (row >= 0) & (row < requests)
    # Gather along one flat axis: XLA makes a gather with two coordinates a launch of its own.
    at = jnp.where(valid, row * pages + column, 0)
    page = page_table.reshape(-1).at[at].get(mode="promise_in_bounds")
    valid &= (page >= 0) & (page <= (INT32_MAX - page_size + 1) // page_size)
    slot = jnp.where(valid, page, 0) * page_size + jnp.where(valid, positions % page_size, 0)
    return jnp.where(valid, slot, -1).astype(jnp.int32)


def select_to_ragged(
    positions: Array, request_ids: Array, page_table: Array, *, page_size: int, valid: Array | None = None
) -> Ragged:
    """Selected positions as ragged rows of slots: `slots_from_positions`, then `pack_rows`.

    Args:
      positions: integer [T, W]: the result of top-k; -1 (anywhere in a row) for none.
      request_ids: integer [T].
      page_table: integer [B, P].
      page_size: tokens of a page.
      valid: bool [T]; False empties the row (padding). None means all True.

    Returns:
      Ragged of T rows and capacity T * W.

    Raises:
      ValueError: other types or shapes.
    """
    positions = _check.int32("positions", positions, "T", "W")
    slots = slots_from_positions(positions, request_ids, page_table, page_size=page_size)
    if valid is not None:
        valid = _check.booleans("valid", valid, positions.shape[0], hint="One per row of positions.")
        slots = jnp.where(valid[:, None], slots, -1)
    return pack_rows(slots)


def combine_with_window(
    positions: Array,
    query_positions: Array,
    *,
    window: int,
    compressed_start: Array | int = 0,
    window_start: Array | int,
    first_position: Array | int = 0,
    valid: Array | None = None,
) -> Ragged:
    """Rows for prefill that first gathers its keys: the chosen compressed entries, then the sliding window.

    The gathered array holds the entries of a request in one run and the tokens of its window in another. Row t indexes
    compressed_start + e for each chosen entry e, then window_start + p - first_position for the last `window` positions
    p up to the token's own, ascending. To read the caches without gathering, pass two sources to `sparse_mla` (extra).

    Args:
      positions: integer [T, W], chosen entries of the token's request; -1 (anywhere in a row) for none; W may be 0.
      query_positions: integer [T], the tokens' own positions; if negative, the window is empty.
      window: positions that a token sees, its own included.
      compressed_start: integer or [T], index in the gathered array of entry 0 of the token's request.
      window_start: integer or [T], index in the gathered array of position `first_position` of the token's request.
      first_position: integer or [T], first gathered position of the request; earlier positions are not attended to.
      valid: bool[T]; False empties the row (padding). None means all True.

    Returns:
      Ragged of T rows and capacity T * (W + window).

    Raises:
      ValueError: other types or shapes, or a window below 1.
    """
    query_positions = _check.int32("query_positions", query_positions, "T")
    tokens, window = query_positions.shape[0], _check.size("window", window)
    positions = _check.int32("positions", positions, tokens, "W", hint="One row per query position.")

    def column(name: str, value: Array | int) -> Array:
        axes = (tokens,) if np.ndim(value) else ()
        value = _check.int32(name, value, *axes, hint="Pass one integer, or one per token.")
        return jnp.broadcast_to(value, (tokens,))[:, None]

    def shifted(start: Array, by: Array) -> Array:
        """start + by, negative (no index) if either is beyond int32."""
        return jnp.where((start < _check.BEYOND) & (by < _check.BEYOND), start + by, -1)

    first = column("first_position", first_position)
    seen = jnp.maximum(query_positions - (window - 1), 0)[:, None] + jnp.arange(window, dtype=jnp.int32)
    inside = (seen <= query_positions[:, None]) & (seen >= first) & (query_positions < _check.BEYOND)[:, None]
    near = jnp.where(inside, shifted(column("window_start", window_start), seen - first), -1)
    far = jnp.where(positions >= 0, shifted(column("compressed_start", compressed_start), positions), -1)
    rows = jnp.concatenate([far, near], axis=1)
    if valid is not None:
        valid = _check.booleans("valid", valid, tokens, hint="One per row of positions.")
        rows = jnp.where(valid[:, None], rows, -1)
    return pack_rows(rows)
