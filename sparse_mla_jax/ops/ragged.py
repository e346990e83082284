"""Ragged rows of slots: a flat array of fixed capacity, and where each row starts in it.

Sizes depend on shapes only, so that a jitted step never asks the host how many entries there are: `indptr` alone says
where the valid ones end. Invalid entries are dropped, not kept as holes.
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
from sparse_mla_jax.ops._chunks import rows_from

INT32_MAX = 2**31 - 1


class FlatRows(NamedTuple):
    """Rows as intervals of one array: row r is values[starts[r] : starts[r] + lengths[r]]."""

    values: Array
    starts: Array
    lengths: Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indptr"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths: row r is values[indptr[r] : indptr[r + 1]].

    Attributes:
      values: int32[capacity]; whatever lies from indptr[-1] on has no meaning and is not read.
      indptr: int32[rows + 1], from 0, ascending, at most capacity.
    """

    values: Array
    indptr: Array

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.indptr.shape[0] - 1

    @property
    def capacity(self) -> int:
        """Entries that `values` has room for."""
        return self.values.shape[0]

    @property
    def longest(self) -> int:
        """Static: no row has more entries."""
        return self.capacity

    @property
    def width(self) -> int:
        """Static: a row's even share of the capacity, rounded up."""
        return -(-self.capacity // max(1, self.rows))

    def check(self, name: str, rows: int) -> Ragged:
        """The same rows in int32.

        Raises:
          ValueError: other types, or another number of rows; `name` is the argument's name in the message.
        """
        require(self.rows == rows, f"{name} holds {self.rows} rows; q has {rows} tokens: one row for each.")
        values = _check.int32(f"{name}, values", self.values, "capacity")
        return Ragged(values, _check.int32(f"{name}, indptr", self.indptr, rows + 1))

    def take(self, first: Array, count: int) -> Ragged:
        """Rows first..first+count-1, for use inside `map_row_chunks`."""
        return Ragged(self.values, rows_from(self.indptr, first, count + 1))

    def flatten(self) -> FlatRows:
        """The rows as intervals, indptr clamped to capacity."""
        bounds = jnp.clip(self.indptr, 0, self.capacity)
        return FlatRows(self.values, bounds[:-1], bounds[1:] - bounds[:-1])

    def masked(self) -> Array:
        """int32[rows, capacity] (at least one column) with -1 behind every row."""
        return self.to_dense(max(1, self.capacity))

    def kernel_arguments(self) -> dict[str, Any]:
        """The fields of a kernel's source that say which rows there are."""
        return {"values": self.values, "indptr": self.indptr, "lengths": None}

    def to_dense(self, width: int, fill: int = -1) -> Array:
        """int32[rows, width]: each row from the left, then `fill`; longer rows are cut off, indptr clamped to capacity.

        Raises:
          ValueError: width is negative, or fill does not fit int32.
        """
        width, fill = _check.size("width", width, 0), _check.size("fill", fill, -INT32_MAX - 1, INT32_MAX)
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        if self.capacity == 0:
            return jnp.full((self.rows, width), fill, jnp.int32)
        bounds = jnp.clip(self.indptr, 0, self.capacity)
        start = bounds[:-1, None]
        inside = column < bounds[1:, None] - start
        at = jnp.where(inside, start + column, 0)
        return jnp.where(inside, self.values.at[at].get(mode="promise_in_bounds"), jnp.int32(fill))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseRows:
    """Rows of one width, of which the first entries count: row r is values[r, : lengths[r]].

    Cheaper to make than `Ragged` where entries are in front already, and attention over them costs by length alike.

    Attributes:
      values: int32[rows, width]; whatever lies from lengths[r] on has no meaning and is not read.
      lengths: int32[rows], clamped to 0..width; None means that all entries count.
    """

    values: Array
    lengths: Array | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.values.shape[0]

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.values.shape[1]

    @property
    def longest(self) -> int:
        """As `width`: no row has more entries."""
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
        """The rows as intervals, lengths clamped."""
        starts = jnp.arange(self.rows, dtype=jnp.int32) * self.width
        whole = jnp.full((self.rows,), self.width, jnp.int32)
        lengths = whole if self.lengths is None else jnp.clip(self.lengths, 0, self.width)
        return FlatRows(self.values.reshape(-1), starts, lengths)

    def masked(self) -> Array:
        """int32[rows, width] with -1 behind every row."""
        if self.lengths is None:
            return self.values
        column = jnp.arange(self.width, dtype=jnp.int32)[None, :]
        return jnp.where(column < self.lengths[:, None], self.values, -1)

    def kernel_arguments(self) -> dict[str, Any]:
        """The fields of a kernel's source that say which rows there are."""
        return {"values": self.values, "indptr": None, "lengths": self.lengths}


def indptr_from_lengths(lengths: Array) -> Array:
    """Where each row starts: int32[R + 1] from integer lengths[R], beginning with 0; negative lengths count as 0.

    Raises:
      ValueError: lengths are not integers of one axis.
    """
    lengths = _check.int32("lengths", lengths, "R")
    ends = jnp.cumsum(jnp.maximum(lengths, 0), dtype=jnp.int32)
    return jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])


def pack_rows(indices: Array, lengths: Array | None = None, *, limit: int | Array | None = None) -> Ragged:
    """Packs dense rows, dropping what is invalid and keeping the order of the rest.

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

    Negative positions, positions past the page table, requests that do not exist, and negative pages (or pages so large
    that the slot would not fit int32) give -1.

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
    # Wide types stay wide up to the end: what int32 does not hold is no position, page or request.
    positions = _check.integers("positions", positions, *(("T",) if np.ndim(positions) == 1 else ("T", "W")))
    hint = "One per row of positions."
    request_ids = _check.integers("request_ids", request_ids, positions.shape[0], hint=hint)
    page_table = _check.integers("page_table", page_table, "B", "P")
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
    valid = (positions >= 0) & (column < pages) & (row >= 0) & (row < requests)
    # Gather along one axis: XLA launches a gather of two coordinates separately.
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
      positions: integer [T, W]: top-k's result, -1 (anywhere) for none.
      request_ids: integer [T].
      page_table: integer [B, P].
      page_size: tokens of a page.
      valid: bool [T]; False empties the row (padding). None means all True.

    Returns:
      Ragged of T rows and capacity T * W.

    Raises:
      ValueError: other types or shapes.
    """
    positions = _check.integers("positions", positions, "T", "W")
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
    """Rows of a gathered array in which chosen compressed entries and the sliding window of a request lie in two runs.

    For prefill that gathers its keys first: row t holds compressed_start + positions[t, :] (what is not negative),
    then window_start + p - first_position for the last `window` positions p up to the token's own, ascending. Attention
    that reads the caches themselves takes them as two sources instead (`sparse_mla`'s extra).

    Args:
      positions: integer [T, W], chosen entries of the token's request, -1 (anywhere) for none; W may be 0.
      query_positions: integer [T], the tokens' own positions; below 0 the window is empty.
      window: positions that a token sees, its own included.
      compressed_start: integer or [T], where entry 0 of the token's request lies.
      window_start: integer or [T], where position `first_position` of the token's request lies.
      first_position: integer or [T], first gathered position of the request; earlier ones are no keys.
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

    first = column("first_position", first_position)
    seen = jnp.maximum(query_positions - (window - 1), 0)[:, None] + jnp.arange(window, dtype=jnp.int32)
    inside = (seen <= query_positions[:, None]) & (seen >= first)
    near = jnp.where(inside, column("window_start", window_start) + seen - first, -1)
    far = jnp.where(positions >= 0, column("compressed_start", compressed_start) + positions, -1)
    rows = jnp.concatenate([far, near], axis=1)
    if valid is not None:
        valid = _check.booleans("valid", valid, tokens, hint="One per row of positions.")
        rows = jnp.where(valid[:, None], rows, -1)
    return pack_rows(rows)
