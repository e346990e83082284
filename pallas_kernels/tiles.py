"""Sizes and index arrays of tiles."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def grid2(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Index arrays [R, C] of rows[R] and columns[C] (gathers want an index array on every axis)."""
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
