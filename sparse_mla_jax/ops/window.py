"""The sliding window of a request: a ring of slots that holds its newest tokens, however long it gets.

Position p of the request with state s is stored in slot s * ring + p % ring of a `PagedKVCache` with one page (ring)
per running request. A step writes its n tokens of a request before they attend, so the ring needs
`ring_size(window, n)` slots: the step's first token still sees the window - 1 positions before it.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check


def ring_size(window: int, max_query_len: int) -> int:
    """Slots of a ring for steps of at most `max_query_len` tokens of one request.

    Raises:
      ValueError: sizes below 1.
    """
    return _check.size("window", window) - 1 + _check.size("max_query_len", max_query_len)


def ring_slots(positions: Array, states: Array, *, ring: int) -> Array:
    """Slots of positions[T] in the rings states[T]: int32[T], -1 if either is negative or the slot is beyond int32.

    Raises:
      ValueError: other types or shapes, or a ring below 1.
    """
    positions, states = _check_tokens(positions, states)
    ring = _check.size("ring", ring)
    is_valid = (positions >= 0) & (positions < _check.BEYOND) & _is_ring(states, ring)
    return jnp.where(is_valid, states * ring + jnp.where(is_valid, positions, 0) % ring, -1)


def window_slots(positions: Array, states: Array, *, window: int, ring: int) -> Array:
    """Slots of the last `window` positions up to each token's own, ascending: int32[T, window], then -1.

    Args:
      positions: integer [T], of the tokens.
      states: integer [T], the ring of each token's request; if negative or beyond int32, the row is empty.
      window: positions that a token sees, its own included.
      ring: slots of a request, at least `window`.

    Raises:
      ValueError: other types or shapes, a window below 1 or above the ring.
    """
    positions, states = _check_tokens(positions, states)
    window = _check.size("window", window)
    ring = _check.size("ring", ring, window, hint=f"A window of {window} positions needs as many slots: use ring_size.")
    seen = jnp.maximum(positions - (window - 1), 0)[:, None] + jnp.arange(window, dtype=jnp.int32)
    is_valid = (seen <= positions[:, None]) & ((positions < _check.BEYOND) & _is_ring(states, ring))[:, None]
    return jnp.where(is_valid, states[:, None] * ring + seen % ring, -1)


def _is_ring(states: Array, ring: int) -> Array:
    """Whether all slots of the rings fit int32."""
    return (states >= 0) & (states <= (_check.BEYOND - ring + 1) // ring)


def _check_tokens(positions: Array, states: Array) -> tuple[Array, Array]:
    """Both as int32 [T]."""
    positions = _check.int32("positions", positions, "T")
    return positions, _check.int32("states", states, positions.shape[0], hint="One per token, as positions.")
