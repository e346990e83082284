"""The interval of columns that a row of a score matrix has: one rule for the indexer and for top-k."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check


class ColumnBounds(NamedTuple):
    """Row r has the columns starts[r] to starts[r] + lengths[r] - 1, all inside the array. Both int32 [R]."""

    starts: Array
    lengths: Array

    @property
    def ends(self) -> Array:
        """The column after the last one of each row."""
        return self.starts + self.lengths


def clamp_rows(starts: Any, lengths: Any, *, rows: int, columns: int) -> ColumnBounds:
    """Clamps intervals to an array of `columns` columns: first the start, then the length, counted from there.

    Args:
      starts: integer [rows]; below 0 counts as 0, beyond the array as `columns`; None means 0.
      lengths: integer [rows]; below 0 counts as 0, beyond the last column as up to it; None means up to it.
      rows: how many there are.
      columns: how many there are.

    Raises:
      ValueError: other types or shapes.
    """
    starts = jnp.zeros((rows,), jnp.int32) if starts is None else clamp("row_starts", starts, rows, columns)
    room = columns - starts
    if lengths is None:
        return ColumnBounds(starts, room)
    return ColumnBounds(starts, jnp.minimum(clamp("row_lengths", lengths, rows, columns), room))


def clamp(name: str, x: Any, rows: int, high: int) -> Array:
    """The integers x[rows], named `name` in messages, clamped to 0..high: int32 [rows]."""
    return jnp.clip(_check.int32(name, x, rows, hint="One per row of scores."), 0, high)
