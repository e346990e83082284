"""The caches of a model with latent attention: which layer has which, and what they cost."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.window import WindowCache, ring_size

# Per layer: latents and rotary keys, and the indexer's keys. None for what the layer does not make.
Caches = tuple[tuple[PagedKVCache | WindowCache | None, PagedIndexCache | None], ...]


def create_caches(
    config: MlaConfig,
    num_pages: int,
    page_size: int,
    *,
    num_requests: int = 1,
    max_query_len: int = 1,
    dtype: Any = jnp.float8_e4m3fnuz,
) -> Caches:
    """Empty paged caches, all addressed by the same slots, and rings for sliding layers.

    Args:
      config: the model's shapes.
      num_pages: pages of each cache.
      page_size: tokens per page.
      num_requests: most requests that run at a time, the number of rings in sliding layers.
      max_query_len: most tokens of one request in a step. Rings have window - 1 + max_query_len slots.
      dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32, of latents and index keys.

    Returns:
      A tuple over layers of (latents, index keys), with None for what a layer does not make.

    Raises:
      ValueError: sizes or a type that the caches do not support.
    """

    rings = (num_requests, ring_size(config.sliding_window, max_query_len) if config.sliding_window else 0)

    def latents(layer: MlaLayer) -> PagedKVCache | WindowCache | None:
        if not layer.has_latents:
            return None
        keys = PagedKVCache.create(
            *(rings if layer.is_sliding else (num_pages, page_size)),
            latent_dim=layer.sizes.kv_lora_rank,
            rope_dim=layer.sizes.qk_rope_head_dim,
            group_size=layer.sizes.kv_group_size,
            dtype=dtype,
        )
        return WindowCache(keys) if layer.is_sliding else keys

    def index(layer: MlaLayer) -> PagedIndexCache | None:
        if not layer.has_indexer:
            return None
        return PagedIndexCache.create(num_pages, page_size, dim=config.index_head_dim, dtype=dtype)

    return tuple((latents(layer), index(layer)) for layer in config.layers)


def tokens_per_page(caches: Caches) -> int | None:
    """Tokens per page; None if no layer has pages."""
    require(len(caches) > 0, "caches is empty; make one pair per layer with create_caches.")
    return next((cache.page_size for cache in _paged(caches)), None)


def _paged(caches: Caches) -> list[PagedKVCache | PagedIndexCache]:
    """All caches whose size grows with the context."""
    return [one for pair in caches for one in pair if isinstance(one, PagedKVCache | PagedIndexCache)]


def bytes_per_token(caches: Caches, page_size: int) -> float:
    """Cache bytes that one more token of context costs over all layers, whatever the page size."""
    return sum(cache.bytes_per_token for cache in _paged(caches))


def bytes_per_request(caches: Caches) -> int:
    """Cache bytes per running request besides its tokens: those of its rings."""
    rings = [latent.keys for latent, _ in caches if isinstance(latent, WindowCache)]
    return sum(keys.bytes_per_token * keys.page_size for keys in rings)
