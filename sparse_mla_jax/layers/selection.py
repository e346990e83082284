"""Shared by both kinds of attention layers: queries, and the selection of keys without the indexer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check


class IndexInputs(NamedTuple):
    """The indexer's query and head weights.

    Attributes:
      query: [T, Hi, Di], floating or FP8.
      weights: float32[T, Hi], one per head, scales folded in.
    """

    query: Array
    weights: Array


class Queries(NamedTuple):
    """What a layer asks its keys.

    Attributes:
      heads: [T, H, d] in hidden's type, rotated.
      index_inputs: None if the indexer does not run.
      gate: [T, H] or [T, H, dv] in hidden's type, of the attention output, before the sigmoid; None without a gate.
    """

    heads: Array
    index_inputs: IndexInputs | None
    gate: Array | None = None


def check_selection(selection: Any, seen: Array) -> Array:
    """A selection that the caller passes, int32[T, W]; -1 for what a token does not see (0 to seen[t] - 1).

    Raises:
      ValueError: not integers, or not one row per token.
    """
    hint = "One row per token: what an earlier step or another layer returned."
    selection = _check.int32("selection", selection, seen.shape[0], "W", hint=hint)
    return jnp.where(selection < seen[:, None], jnp.maximum(selection, -1), -1)


def select_visible(lengths: Array, width: int) -> Array:
    """Selects everything that a token sees: int32[T, width], 0 to lengths[t] - 1, then -1."""
    column = jnp.arange(width, dtype=jnp.int32)[None, :]
    return jnp.where(column < lengths[:, None], column, -1)
