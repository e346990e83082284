"""The sliding window of a request: a ring of slots that its newest tokens share, whatever its length.

Position p of the request with state s lies in slot s * ring + p % ring of a `PagedKVCache` whose pages are rings, one
per request that runs. A step that writes n tokens of a request before they attend needs `ring_size(window, n)` slots:
its first token still sees the window - 1 positions before it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require


def ring_size(window: int, max_query_len: int) -> int:
    """Slots of a ring for steps of at most `max_query_len` tokens of one request.

    Raises:
      ValueError: sizes below 1.
    """
    for name, value in (("window", window), ("max_query_len", max_query_len)):
        _check_size(name, value)
    return window - 1 + max_query_len


def ring_slots(positions: Array, states: Array, *, ring: int) -> Array:
    """Slots of positions[T] of the requests with states[T]: int32[T], -1 where either is negative.

    Raises:
      ValueError: other types or shapes, or a ring below 1.
    """
    positions, states = _check(positions, states)
    _check_size("ring", ring)
    there = (positions >= 0) & (states >= 0)
    return jnp.where(there, states * ring + jnp.where(there, positions, 0) % ring, -1)


def window_slots(positions: Array, states: Array, *, window: int, ring: int) -> Array:
    """Slots of the last `window` positions up to each token's own, ascending: int32[T, window], then -1.

    Args:
      positions: integer [T], of the tokens.
      states: integer [T], the ring of each token's request; below 0 the row is empty.
      window: positions that a token sees, its own included.
      ring: slots of a request, at least `window`.

    Raises:
      ValueError: other types or shapes, a window below 1 or above the ring.
    """
    positions, states = _check(positions, states)
    _check_size("window", window)
    require(
        isinstance(ring, int) and ring >= window,
        f"ring is {ring!r}; a window of {window} positions needs at least as many slots. Use ring_size.",
    )
    seen = jnp.maximum(positions - (window - 1), 0)[:, None] + jnp.arange(window, dtype=jnp.int32)
    there = (seen <= positions[:, None]) & (states >= 0)[:, None]
    return jnp.where(there, states[:, None] * ring + seen % ring, -1)


def _check_size(name: str, value: int) -> None:
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name} is {value!r}; a positive int is expected.",
    )


def _check(positions: Array, states: Array) -> tuple[Array, Array]:
    positions, states = jnp.asarray(positions), jnp.asarray(states)
    for name, array in (("positions", positions), ("states", states)):
        require(
            array.ndim == 1 and jnp.issubdtype(array.dtype, jnp.integer),
            f"{name} is {array.dtype}{list(array.shape)}; integers [T], one per token, are expected.",
        )
    require(
        positions.shape == states.shape,
        f"positions has shape {list(positions.shape)} and states {list(states.shape)}; one of each per token.",
    )
    return positions.astype(jnp.int32), states.astype(jnp.int32)
