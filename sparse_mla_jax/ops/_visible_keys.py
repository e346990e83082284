"""The keys of a paged index cache that each token of a step sees."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.ops.cache import PagedIndexCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisibleKeys:
    """The keys that each token sees: the first `lengths[t]` positions of its request.

    Attributes:
      cache: the index cache.
      pages: int32 [B, P], pages of every request. -1, or any number that is not a page of the cache, means none.
      requests: int32 [T]; may be outside [0, B) only if the length is 0.
      lengths: int32 [T], from 0 to `columns`.
      columns: static, number of positions that are scored.
    """

    cache: PagedIndexCache
    pages: Array
    requests: Array
    lengths: Array
    columns: int = dataclasses.field(metadata={"static": True})


def check_visible_keys(
    q: Any, cache: Any, page_table: Any, request_ids: Any, lengths: Any, max_length: Any
) -> VisibleKeys:
    """The checked arguments as VisibleKeys; raises ValueError for shapes and types that do not fit."""
    _check.instance("cache", cache, PagedIndexCache, hint="Make it with PagedIndexCache.create.")
    width = q.shape[2]
    require(cache.dim == width, f"cache has keys of {cache.dim} dimensions and q of {width}; they must agree.")
    page_table = _check.int32("page_table", page_table, "B", "P", hint="The pages of every request.")
    room = page_table.shape[1] * cache.page_size
    hint = f"The page_table has room for P * page_size = {room} columns: widen it for more."
    max_length = _check.size("max_length", max_length, 1, room, hint=hint)
    requests, lengths = (
        _check.int32(name, x, q.shape[0], hint="One per token.")
        for name, x in (("request_ids", request_ids), ("lengths", lengths))
    )
    is_known = (requests >= 0) & (requests < page_table.shape[0])
    lengths = jnp.where(is_known, jnp.clip(lengths, 0, max_length), 0)
    return VisibleKeys(cache, page_table, requests, lengths, max_length)


def slots_of(pages: Array, cache: PagedIndexCache, columns: Array) -> Array:
    """Slots of positions `columns`[n] in page rows `pages`[..., P]: int32 [..., n], -1 if the page does not exist."""
    page = jnp.take(pages, columns // cache.page_size, axis=-1, mode="clip")
    is_page = (page >= 0) & (page < cache.num_pages)
    return jnp.where(is_page, page * cache.page_size + columns % cache.page_size, -1)
