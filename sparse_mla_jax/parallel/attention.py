"""Selection and attention of a step that is spread over the axes "tensor" and "context".

Over "tensor" every device has all keys and its own heads. The indexer has one selection for all heads, so its tokens
are split: every device scores ceil(T / tensor) of them with all of the indexer's heads, and the selections are joined.
That moves k positions a token; splitting the indexer's heads would move a row of scores a token, and would add them in
another order than one device does.

Over "context" every device has its own keys: see `ops.lightning_indexer` and `ops.merge_across`. Latents are mapped to
values (a quarter of the bytes in DeepSeek-V3.2) before parts are merged: both are linear, one by head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.layers.selection import IndexInputs, select_visible
from sparse_mla_jax.ops.attention import apply_sinks, sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.merge_across import merge_across
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.collectives import join_rows
from sparse_mla_jax.parallel.pages import PagePart


class SeenKeys(NamedTuple):
    """The keys among which a step selects.

    Attributes:
      page_table: int32 [B, P], of keys.
      request_ids: int32 [T].
      lengths: int32 [T], the keys that each token sees.
      max_length: static, the most that one sees.
    """

    page_table: Array
    request_ids: Array
    lengths: Array
    max_length: int


def select_keys(
    inputs: IndexInputs | None,
    cache: PagedIndexCache | None,
    seen: SeenKeys,
    *,
    k: int,
    page_size: int,
    parallel: Parallel | None,
    implementation: str | None,
) -> Array:
    """The positions that each token attends to, of those that the device has: ascending int32 [T, W], then -1.

    Without the indexer's inputs all that the token sees. On one device, and over "tensor", these are all positions.

    Args:
      inputs: of all tokens; the device uses its own ones.
      cache: the device's index keys.
      seen: the keys of the step.
      k: how many are selected.
      page_size: positions of a page.
      parallel: the axes; None on one device.
      implementation: of every operator.
    """
    part = PagePart.create(parallel, page_size)
    if inputs is None or cache is None:
        width = seen.max_length if part.axis is None else -(-seen.page_table.shape[1] // part.devices) * page_size
        return part.to_global(select_visible(part.lengths(seen.lengths), width))
    own: dict[str, Any] = {} if part.axis is None else {"axis_name": part.axis, "own_keys": True}
    options = {"k": k, "max_length": seen.max_length, "implementation": implementation, **own}
    axis = None if parallel is None else parallel.axis("tensor")
    query, weights, request_ids, lengths = (_own_rows(x, axis) for x in (*inputs, seen.request_ids, seen.lengths))
    chosen = lightning_indexer(query, weights, cache, seen.page_table, request_ids, lengths, **options)
    return join_rows(chosen, axis)[: seen.lengths.shape[0]]


def _own_rows(x: Array, axis: str | None) -> Array:
    """The device's part of x[T, ...]: ceil(T / n) rows, with zeros after the last; `x` itself without an axis."""
    if axis is None:
        return x
    devices = jax.lax.axis_size(axis)
    count = -(-x.shape[0] // devices)
    padding = ((0, count * devices - x.shape[0]), *((0, 0),) * (x.ndim - 1))
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, padding), jax.lax.axis_index(axis) * count, count)


def join_selection(chosen: Array, parallel: Parallel | None, width: int | None = None) -> Array:
    """The whole selection from the part that each device of "context" has: ascending int32 [T, width], then -1.

    Sends W positions a token to every other device; a step does not need it.

    Args:
      chosen: int32 [T, W], the device's part.
      parallel: the axes; None on one device.
      width: of the result, enough for what a token selects: min(k, max_length). None: W from every device.
    """
    axis = None if parallel is None else parallel.axis("context")
    if axis is None:
        return chosen
    parts = jax.lax.all_gather(chosen, axis, axis=1, tiled=True, to="invarying")
    none = jnp.iinfo(jnp.int32).max
    joined = jnp.sort(jnp.where(parts >= 0, parts, none), axis=1)[:, :width]
    return jnp.where(joined == none, -1, joined)


def attend(
    q: Array,
    kv: Any,
    rows: Any,
    *,
    sinks: Array | None,
    axis: str | None,
    finish: Callable[[Array], Array] | None = None,
    **options: Any,
) -> Array:
    """`sparse_mla` over the keys of all devices of `axis`, each of which names its own: out [T, H, value_dim].

    Args:
      q, kv, rows, sinks: as for `sparse_mla`.
      axis: over which the keys are spread; None if every device has all.
      finish: a linear map of the values of each head, applied to the result. Devices exchange what it makes, in q's
        type.
      **options: of `sparse_mla`.
    """
    finish = finish or (lambda out: out)
    if axis is None:
        return finish(sparse_mla(q, kv, rows, sinks=sinks, **options))
    own, own_lse = sparse_mla(q, kv, rows, return_lse=True, **options)
    out, lse = merge_across(finish(own).astype(q.dtype), own_lse, axis)
    return out if sinks is None else apply_sinks(out, lse, sinks)
