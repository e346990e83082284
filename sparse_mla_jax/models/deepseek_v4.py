"""DeepSeek-V4 as pure functions of (params, tokens, caches, metadata), with prefill and decode steps on top.

There are n residual streams (`layers.hyper_connections`). Every layer attends to a sliding window, and most layers also
attend to compressed entries (`layers.compressed_attention`). Parameters: see `models.params_v4`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require, size
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers import compressed_attention
from sparse_mla_jax.layers.compressed_attention import LayerCaches, compressed_attention_step
from sparse_mla_jax.layers.hyper_connections import join_streams, merge_streams, split_streams
from sparse_mla_jax.layers.moe import clamped_moe
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.models.common import Family, check_step, embed, logits
from sparse_mla_jax.models.params_v4 import Params, init_params, param_specs
from sparse_mla_jax.models.steps import decode, prefill
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, entry_pages
from sparse_mla_jax.ops.window import ring_size
from sparse_mla_jax.parallel.axes import Parallel

__all__ = [
    "FAMILY",
    "Caches",
    "Params",
    "bytes_per_request",
    "bytes_per_token",
    "create_caches",
    "decode",
    "decoder_layer",
    "default_page_size",
    "embed",
    "forward",
    "fuse_projections",
    "init_params",
    "logits",
    "param_specs",
    "prefill",
    "tokens_per_page",
]

Caches = tuple[LayerCaches, ...]


def fuse_projections(params: Params) -> Params:
    """Fuses the projections of every layer (`layers.compressed_attention.fuse_projections`): faster steps on a GPU.

    Call it once, when weights are loaded (`jax.jit(fuse_projections, donate_argnums=0)`). Every step of this module
    accepts the result; `save_checkpoint` does not.
    """
    fuse = compressed_attention.fuse_projections
    layers = [{**layer, "self_attn": fuse(layer["self_attn"])} for layer in params["layers"]]
    return {**params, "layers": layers}


def default_page_size(config: DeepseekV4Config) -> int:
    """Tokens per page that suit the model: a multiple of 256 and of every compress ratio."""
    return math.lcm(256, *(config.compress_ratio(layer) or 1 for layer in range(config.num_hidden_layers)))


def create_caches(
    config: DeepseekV4Config,
    num_pages: int,
    page_size: int,
    *,
    num_requests: int,
    max_query_len: int = 1,
    dtype: Any = jnp.float8_e4m3fnuz,
) -> Caches:
    """Empty caches: compressed entries in pages of tokens; windows and compressor states per running request.

    Memory: `bytes_per_token` per token of context, and a fixed `bytes_per_request` per request.

    Args:
      config: the model's shapes.
      num_pages: pages for the compressed entries of all requests.
      page_size: tokens per page, a multiple (256 for published models) or a divisor of every compress ratio. If a page
        is smaller than a ratio, it has memory for one entry even when it holds none.
      num_requests: most requests that run at a time, the number of rings and states.
      max_query_len: most tokens of one request in a step. Rings have window - 1 + max_query_len slots.
      dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32, of keys and index keys; states are float32.

    Returns:
      A tuple over layers.

    Raises:
      ValueError: sizes or a type that the caches do not support.
    """
    ring, page_size = ring_size(config.sliding_window, max_query_len), size("page_size", page_size)

    def keys(pages: int, length: int) -> PagedKVCache:
        return PagedKVCache.create(
            pages,
            length,
            latent_dim=config.nope_dim,
            rope_dim=config.qk_rope_head_dim,
            group_size=config.kv_group_size,
            dtype=dtype,
            scale_dtype=jnp.float8_e8m0fnu,
        )

    def create(layer: int) -> LayerCaches:
        ratio, window = config.compress_ratio(layer), keys(num_requests, ring)
        if not ratio:
            return LayerCaches(window, page_size=page_size)
        overlap = config.compressor_overlap(ratio)
        _, entries = entry_pages(jnp.zeros((0, 0), jnp.int32), page_size=page_size, ratio=ratio)
        state = CompressorState.create(num_requests, ratio=ratio, dim=config.head_dim, overlap=overlap)
        if not config.has_indexer(layer):
            return LayerCaches(window, keys(num_pages, entries), state, page_size=page_size)
        dim = config.index_head_dim
        return LayerCaches(
            window,
            keys(num_pages, entries),
            state,
            PagedIndexCache.create(num_pages, entries, dim=dim, dtype=dtype),
            CompressorState.create(num_requests, ratio=ratio, dim=dim, overlap=overlap),
            page_size,
        )

    return tuple(create(layer) for layer in range(config.num_hidden_layers))


def tokens_per_page(caches: Caches) -> int | None:
    """Tokens per page; None if the caches do not know it."""
    require(len(caches) > 0, "caches is empty; make one per layer with create_caches.")
    return caches[0].page_size


def bytes_per_token(caches: Caches, page_size: int) -> float:
    """Cache bytes that one more token of context costs over all layers, in pages of `page_size` tokens."""
    paged = (cache for layer in caches for cache in (layer.compressed, layer.index) if cache is not None)
    return sum(cache.bytes_per_token * cache.page_size for cache in paged) / page_size


def bytes_per_request(caches: Caches) -> int:
    """Bytes of windows and compressor states that a running request holds over all layers, whatever its length."""
    states = (state for layer in caches for state in (layer.state, layer.index_state) if state is not None)
    windows = sum(layer.window.bytes_per_token * layer.window.page_size for layer in caches)
    return windows + sum(state.bytes_per_request for state in states)


def forward(
    params: Params,
    token_ids: Array,
    caches: Caches,
    metadata: StepMetadata,
    *,
    config: DeepseekV4Config,
    state_ids: Array | None = None,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Array, Caches]:
    """One step through all layers, for decode tokens and prefill chunks in any mix.

    Args:
      params: see `models.params_v4`.
      token_ids: int[T]; ids outside the vocabulary, and those of padding, are clamped into it.
      caches: from `create_caches`; donate them to update in place.
      metadata: of this step.
      config: the model's shapes (static).
      state_ids: int32[B], the ring and state of each request; None means b for request b.
      implementation: None, "triton", "xla" or "reference", for every operator.
      parallel: the axes over which the step is spread (static), inside `jax.shard_map`; None on one device. Weights and
        caches are then the device's own, see docs/howto/many-gpus.md.

    Returns:
      (hidden [T, D] after the final norm, caches).

    Raises:
      ValueError: token_ids, caches or metadata of other shapes than expected (at trace time).
    """
    check_step(token_ids, caches, metadata, config)
    streams = jnp.repeat(embed(params, token_ids, config, parallel)[:, None, :], config.hc_mult, axis=1)
    updated = []
    for number, cache in enumerate(caches):
        streams, cache = decoder_layer(
            params["layers"][number],
            streams,
            token_ids,
            cache,
            metadata,
            config=config,
            layer=number,
            state_ids=state_ids,
            implementation=implementation,
            parallel=parallel,
        )
        updated.append(cache)
    hidden = merge_streams(
        params["hc_head"], streams, config=config, norm=params["norm"], implementation=implementation
    )
    return hidden, tuple(updated)


def decoder_layer(
    params: Params,
    streams: Array,
    token_ids: Array,
    caches: LayerCaches,
    metadata: StepMetadata,
    *,
    config: DeepseekV4Config,
    layer: int,
    state_ids: Array | None = None,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Array, LayerCaches]:
    """Layer number `layer` on streams [T, n, D]: attention, then experts, each with its hyper-connections."""
    split = functools.partial(split_streams, config=config, implementation=implementation)
    normed, weights = split(params["attn_hc"], streams, norm=params["input_layernorm"])
    out, caches = compressed_attention_step(
        params["self_attn"],
        normed,
        caches,
        metadata,
        config=config,
        layer=layer,
        state_ids=state_ids,
        implementation=implementation,
        parallel=parallel,
    )
    streams = join_streams(streams, out, weights)
    normed, weights = split(params["ffn_hc"], streams, norm=params["post_attention_layernorm"])
    out = clamped_moe(params["mlp"], normed, token_ids, config=config, parallel=parallel)
    return join_streams(streams, out, weights), caches


FAMILY = Family(
    forward=forward,
    prefill=prefill,
    decode=decode,
    logits=logits,
    param_specs=param_specs,
    init_params=init_params,
    fuse_projections=fuse_projections,
    create_caches=create_caches,
    default_page_size=default_page_size,
    tokens_per_page=tokens_per_page,
    bytes_per_token=bytes_per_token,
    bytes_per_request=bytes_per_request,
)
