"""The sliding window of an attention layer: which ring a token belongs to, and the slots that it attends to there.

See `ops.window` for the rings.
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
from sparse_mla_jax.ops.window import window_slots


@serializable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class WindowCache:
    """The newest tokens of every running request, in the sliding layers of models with latent attention.

    Attributes:
      keys: latents and rotary keys; a page is the ring of one running request (`ops.window`).
    """

    keys: PagedKVCache


def check_states(name: str, state_ids: Any, rings: int, requests: int) -> None:
    """Raises ValueError unless every request of the step has a ring; `name` is that of the cache in messages."""
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
    """
    meta, requests = metadata, metadata.num_requests
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
    """
    slots = window_slots(metadata.positions, states, window=window, ring=ring)
    return DenseRows(slots, jnp.where(states >= 0, jnp.minimum(metadata.lengths, window), 0))
