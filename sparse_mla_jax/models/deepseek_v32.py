"""DeepSeek-V3.2 as pure functions of (params, tokens, caches, metadata), with prefill and decode steps on top.

Parameters: see `models.params_v32`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers import mla
from sparse_mla_jax.layers.mla import attention_step
from sparse_mla_jax.layers.moe import moe, swiglu
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import StepMetadata, build_metadata, decode_metadata
from sparse_mla_jax.models.common import Family, check_page_size, check_prompt, check_step, embed, logits
from sparse_mla_jax.models.params_v32 import Params, init_params, param_specs
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache

__all__ = [
    "FAMILY",
    "Caches",
    "Params",
    "attention_input",
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
]

Caches = tuple[tuple[PagedKVCache, PagedIndexCache], ...]


def fuse_projections(params: Params) -> Params:
    """Fuses the projections of every layer (`layers.mla.fuse_projections`), which makes steps on a GPU faster.

    Call it once, when weights are loaded (`jax.jit(fuse_projections, donate_argnums=0)`). Every step of this module
    accepts the result; `save_checkpoint` does not.
    """
    layers = [{**layer, "self_attn": mla.fuse_projections(layer["self_attn"])} for layer in params["layers"]]
    return {**params, "layers": layers}


def default_page_size(config: DeepseekV32Config) -> int:
    """Tokens per page that suit the model: 64."""
    return 64


def create_caches(
    config: DeepseekV32Config,
    num_pages: int,
    page_size: int,
    *,
    num_requests: int = 1,
    max_query_len: int = 1,
    dtype: Any = jnp.float8_e4m3fnuz,
) -> Caches:
    """Empty paged caches, one pair per layer, all addressed by the same slots.

    Args:
      config: the model's shapes.
      num_pages: pages of each cache.
      page_size: tokens per page.
      num_requests, max_query_len: no effect; this model keeps no state per request.
      dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32, of latents and index keys.

    Returns:
      A tuple over layers of (PagedKVCache, PagedIndexCache).

    Raises:
      ValueError: sizes or a type that the caches do not support.
    """

    def create() -> tuple[PagedKVCache, PagedIndexCache]:
        latent = PagedKVCache.create(
            num_pages,
            page_size,
            latent_dim=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            group_size=config.kv_group_size,
            dtype=dtype,
        )
        return latent, PagedIndexCache.create(num_pages, page_size, dim=config.index_head_dim, dtype=dtype)

    return tuple(create() for _ in range(config.num_hidden_layers))


def _page_size(caches: Caches) -> int:
    """Tokens per page."""
    require(len(caches) > 0, "caches is empty; make one pair per layer with create_caches.")
    return caches[0][0].page_size


def bytes_per_token(caches: Caches, page_size: int) -> float:
    """Cache bytes that one more token of context costs over all layers, whatever the page size."""
    return sum(cache.bytes_per_token + index.bytes_per_token for cache, index in caches)


def bytes_per_request(caches: Caches) -> int:
    """Cache bytes per running request besides its tokens: 0."""
    return 0


def forward(
    params: Params,
    token_ids: Array,
    caches: Caches,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    state_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Caches]:
    """One step through all layers, for decode tokens and prefill chunks in any mix.

    Args:
      params: see `models.params_v32`.
      token_ids: int[T]; ids outside the vocabulary, and those of padding, are clamped into it.
      caches: from `create_caches`; donate them to update in place.
      metadata: of this step.
      config: the model's shapes (static).
      state_ids: no effect; this model keeps no state per request.
      implementation: None, "triton", "xla" or "reference", for every operator.

    Returns:
      (hidden [T, D] after the final norm, caches).

    Raises:
      ValueError: token_ids, caches or metadata of other shapes than expected (at trace time).
    """
    check_step(token_ids, caches, metadata, config)
    hidden = embed(params, token_ids)
    updated = []
    for number, (cache, index_cache) in enumerate(caches):
        hidden, cache, index_cache = decoder_layer(
            params, number, hidden, cache, index_cache, metadata, config=config, implementation=implementation
        )
        updated.append((cache, index_cache))
    return rms_norm(hidden, params["norm"], eps=config.rms_norm_eps), tuple(updated)


def attention_input(params: Params, number: int, hidden: Array, *, config: DeepseekV32Config) -> Array:
    """The input of `layers.mla.attention_step` in layer `number`: the normed residual stream [T, D]."""
    return rms_norm(hidden, params["layers"][number]["input_layernorm"], eps=config.rms_norm_eps)


def decoder_layer(
    params: Params,
    number: int,
    hidden: Array,
    cache: PagedKVCache,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
) -> tuple[Array, PagedKVCache, PagedIndexCache]:
    """Layer `number` on the residual stream hidden [T, D]: attention, then SwiGLU or the mixture of experts."""
    layer = params["layers"][number]
    normed = attention_input(params, number, hidden, config=config)
    out, cache, index_cache = attention_step(
        layer["self_attn"], normed, cache, index_cache, metadata, config=config, implementation=implementation
    )
    hidden = hidden + out
    normed = rms_norm(hidden, layer["post_attention_layernorm"], eps=config.rms_norm_eps)
    out = moe(layer["mlp"], normed, config=config) if config.is_moe_layer(number) else swiglu(layer["mlp"], normed)
    return hidden + out.astype(hidden.dtype), cache, index_cache


def prefill(
    params: Params,
    token_ids: Array,
    caches: Caches,
    seq_lens: Array,
    query_lens: Array,
    page_table: Array,
    *,
    config: DeepseekV32Config,
    page_size: int | None = None,
    state_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Caches]:
    """One step over prompts, chunks of prompts, or a mix with decode tokens; see `build_metadata` for the layout.

    Args:
      params, token_ids, caches, config, state_ids, implementation: as in `forward`. token_ids: the tokens of all
        requests one after the other, then padding; at least one.
      seq_lens: int[B] tokens of each request, those of this step included.
      query_lens: int[B] tokens of each request in this step.
      page_table: int[B, P].
      page_size: tokens per page (static); may be omitted, because the caches know it.

    Returns:
      (float32[B, V] logits after each request's last token; meaningless for requests without tokens, caches).

    Raises:
      ValueError: arguments that do not fit together (at trace time).
    """
    check_prompt(token_ids)
    page_size = check_page_size(page_size, _page_size(caches))
    metadata = build_metadata(seq_lens, query_lens, page_table, num_tokens=token_ids.shape[0], page_size=page_size)
    hidden, caches = forward(
        params, token_ids, caches, metadata, config=config, state_ids=state_ids, implementation=implementation
    )
    return logits(params, hidden[metadata.last_token], config), caches


def decode(
    params: Params,
    token_ids: Array,
    caches: Caches,
    seq_lens: Array,
    page_table: Array,
    *,
    config: DeepseekV32Config,
    page_size: int | None = None,
    state_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, Caches]:
    """One token of every request; row b belongs to request b, and rows with seq_lens[b] <= 0 are padding.

    Arguments as in `prefill`, except: token_ids int[B] holds the newest token of each request; no query_lens.

    Returns:
      (float32[B, V] logits, caches).
    """
    metadata = decode_metadata(seq_lens, page_table, page_size=check_page_size(page_size, _page_size(caches)))
    hidden, caches = forward(
        params, token_ids, caches, metadata, config=config, state_ids=state_ids, implementation=implementation
    )
    return logits(params, hidden, config), caches


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
    bytes_per_token=bytes_per_token,
    bytes_per_request=bytes_per_request,
)
