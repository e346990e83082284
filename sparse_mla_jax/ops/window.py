"""The sliding window of a request: a ring of slots that holds its newest tokens, however long it gets.

Position p of the request with state s is stored in slot s * ring + p % ring of a `PagedKVCache` with one page (ring)
per running request. A step writes its n tokens of a request before they attend, so the ring needs
`ring_size(window, n)` slots: the step's first token still sees the window - 1 positions before it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.ragged import DenseRows


@serializable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class WindowCache:
    """The newest tokens of every running request, in the sliding layers of models with latent attention.

    Attributes:
      keys: latents and rotary keys; a page is the ring of one running request (see above).
    """

    keys: PagedKVCache


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


# --- in a step
def check_states(name: str, state_ids: Any, keys: PagedKVCache, metadata: StepMetadata) -> None:
    """Raises ValueError unless every request of the step has a ring of `keys`; messages call these `name`."""
    rings, requests = keys.num_pages, metadata.num_requests
    if state_ids is None:
        require(
            rings >= requests,
            f"{name} has {rings} rings for {requests} requests; create the caches with"
            f" num_requests={requests} or more, or pass state_ids.",
        )
        return
    _check.int32("state_ids", state_ids, requests, hint="The ring of each request of the metadata.")


def token_states(metadata: StepMetadata, state_ids: Array | None, *, rings: int, capacity: int) -> Array:
    """The ring of every token's request: int32[T].

    -1 for padding, for a request's tokens after the first `capacity` of the step, and for requests whose state id is
    not in 0..rings - 1.

    Raises:
      ValueError: sizes below 1, or state_ids other than int32 [B].
    """
    meta, requests = metadata, metadata.num_requests
    rings, capacity = _check.size("rings", rings), _check.size("capacity", capacity)
    if requests == 0:
        return jnp.full(meta.positions.shape, -1, jnp.int32)
    ids = jnp.arange(requests, dtype=jnp.int32) if state_ids is None else _check.int32("state_ids", state_ids, requests)
    ids = jnp.where((ids >= 0) & (ids < rings), ids, -1)
    within = jnp.arange(meta.num_tokens, dtype=jnp.int32) - meta.query_indptr[meta.request_ids]
    return jnp.where(meta.valid & (within < capacity), ids[meta.request_ids], -1)


def window_rows(metadata: StepMetadata, states: Array, *, window: int, ring: int) -> DenseRows:
    """Slots of the last `window` tokens up to each token's own; an empty row for a token without a ring.

    Args:
      metadata: of the step.
      states: int32[T], from `token_states`.
      window: keys that a token sees, its own included.
      ring: slots of a ring.

    Raises:
      ValueError: as `window_slots`.
    """
    window = _check.size("window", window)
    slots = window_slots(metadata.positions, states, window=window, ring=ring)
    return DenseRows(slots, jnp.where(states >= 0, jnp.minimum(metadata.lengths, window), 0))
