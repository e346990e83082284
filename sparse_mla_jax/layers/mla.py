"""One attention layer of DeepSeek-V3.2: latent attention over the keys that the lightning indexer selects.

`attention_step` is what a decode step of one's own calls inside its own `jax.jit`: decode tokens, prefill chunks and
mixes of both are the same call, told apart by the metadata only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import DeepseekV32Config, require
from sparse_mla_jax.layers.moe import matmul
from sparse_mla_jax.layers.norm import layer_norm, rms_norm
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write_token
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.ragged import slots_from_positions
from sparse_mla_jax.ops.rope import rope_frequencies, rotate


def _check(
    hidden: Array, cache: PagedKVCache, index: PagedIndexCache, meta: StepMetadata, c: DeepseekV32Config
) -> None:
    require(
        hidden.shape == (meta.num_tokens, c.hidden_size),
        f"hidden has shape {hidden.shape}; metadata for {meta.num_tokens} tokens and config.hidden_size"
        f" {c.hidden_size} need {(meta.num_tokens, c.hidden_size)}. Pad hidden to the metadata's num_tokens.",
    )
    require(
        (cache.latent_dim, cache.rope_dim) == (c.kv_lora_rank, c.qk_rope_head_dim),
        f"cache holds {cache.latent_dim} + {cache.rope_dim} values per token; config needs {c.kv_lora_rank} +"
        f" {c.qk_rope_head_dim}. Make it with models.deepseek_v32.create_caches.",
    )
    require(
        index.dim == c.index_head_dim,
        f"index_cache keys have {index.dim} values; config.index_head_dim is {c.index_head_dim}. Make it with"
        " models.deepseek_v32.create_caches.",
    )
    for name, page_size in (("cache", cache.page_size), ("index_cache", index.page_size)):
        require(
            page_size == meta.page_size,
            f"{name} has pages of {page_size} tokens, metadata was built for {meta.page_size}; use one page_size.",
        )


def _rotate_first(x: Array, positions: Array, frequencies: Array) -> Array:
    """The indexer's convention: half-split rotation of the first dimensions, the others untouched."""
    width = 2 * frequencies.shape[0]
    turned = rotate(x[..., :width], positions, frequencies, interleaved=False)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)


def _latent(params: dict[str, Any], hidden: Array, meta: StepMetadata, frequencies: Array, rank: int) -> tuple:
    """What the cache keeps of each token: the normed latent [T, R] and the rotated shared key [T, dr], float32."""
    joint = matmul(hidden, params["kv_a_proj_with_mqa"])
    latent = rms_norm(joint[:, :rank], params["kv_a_layernorm"])
    return latent, rotate(joint[:, rank:], meta.positions, frequencies, interleaved=True)


def _index_key(params: dict[str, Any], hidden: Array, meta: StepMetadata, frequencies: Array) -> Array:
    """The indexer's key of each token, float32[T, Di]."""
    norm = params["k_norm"]
    key = layer_norm(matmul(hidden, params["wk"]), norm["weight"], norm["bias"])
    return _rotate_first(key, meta.positions, frequencies)


def _q_latent(params: dict[str, Any], hidden: Array) -> Array:
    """The query's low-rank form [T, r_q], shared by the attention heads and the indexer."""
    return rms_norm(matmul(hidden, params["q_a_proj"]), params["q_a_layernorm"]).astype(hidden.dtype)


def index_query(
    params: dict[str, Any],
    hidden: Array,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    q_latent: Array | None = None,
) -> tuple[Array, Array]:
    """What the indexer asks with: (query [T, Hi, Di] in hidden.dtype, head weights float32[T, Hi]), scales folded in.

    Arguments as those of `attention_step`; `q_latent` [T, r_q] spares the projection where it is known already.
    """
    indexer, heads, dim = params["indexer"], config.index_n_heads, config.index_head_dim
    q_latent = _q_latent(params, hidden) if q_latent is None else q_latent
    frequencies = jnp.asarray(rope_frequencies(config.rope, config.qk_rope_head_dim))
    query = matmul(q_latent, indexer["wq_b"]).astype(hidden.dtype)
    weights = matmul(hidden, indexer["weights_proj"]) * (heads**-0.5 * dim**-0.5)
    return _rotate_first(query, metadata.positions, frequencies), weights


def select_positions(
    params: dict[str, Any],
    hidden: Array,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
    q_latent: Array | None = None,
) -> Array:
    """Positions that each token attends to: ascending int32[T, min(k, max_length)], then -1.

    Arguments as those of `attention_step`; `index_cache` must hold this step's keys already.
    """
    if metadata.max_length <= config.index_topk:  # every visible key would be chosen: do not ask
        column = jnp.arange(metadata.max_length, dtype=jnp.int32)[None, :]
        return jnp.where(column < metadata.lengths[:, None], column, -1)
    query, weights = index_query(params, hidden, metadata, config=config, q_latent=q_latent)
    return lightning_indexer(
        query,
        weights,
        index_cache,
        metadata.page_table,
        metadata.request_ids,
        metadata.lengths,
        k=config.index_topk,
        max_length=metadata.max_length,
        implementation=implementation,
    )


def _per_head(x: Array, weight: Array) -> Array:
    """x[T, H, I] times weight[H, I, O] per head, accumulated and returned in float32."""
    product = functools.partial(jnp.einsum, "thi,hio->tho", preferred_element_type=jnp.float32)
    if x.dtype == weight.dtype == jnp.float32:
        return product(x, weight)

    def widened(x: Array, weight: Array) -> Array:
        # XLA:CPU refuses a batched bfloat16 product with a float32 result, and sums one with a bfloat16 result in bf16.
        return product(x.astype(jnp.float32), weight.astype(jnp.float32))

    return jax.lax.platform_dependent(x, weight, cpu=widened, default=product)


def _attend(
    params: dict[str, Any],
    q_latent: Array,
    cache: PagedKVCache,
    rows: Array,
    meta: StepMetadata,
    frequencies: Array,
    config: DeepseekV32Config,
    implementation: str | None,
) -> Array:
    """Absorbed attention: queries are taken into the latent space, results out of it, keys are never expanded."""
    dtype, nope = q_latent.dtype, config.qk_nope_head_dim
    query = matmul(q_latent, params["q_b_proj"]).astype(dtype)
    rope = rotate(query[..., nope:], meta.positions, frequencies, interleaved=True)
    absorbed = _per_head(query[..., :nope], params["kv_b_k"])
    out = sparse_mla(
        jnp.concatenate([absorbed.astype(dtype), rope], axis=-1),
        cache,
        rows,
        sm_scale=config.sm_scale,
        value_dim=config.kv_lora_rank,
        implementation=implementation,
    )
    values = _per_head(out, params["kv_b_v"])
    return jnp.tensordot(values.astype(dtype), params["o_proj"], axes=2, preferred_element_type=jnp.float32)


def attention_step(
    params: dict[str, Any],
    hidden: Array,
    cache: PagedKVCache,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
) -> tuple[Array, PagedKVCache, PagedIndexCache]:
    """Attention sub-layer of one step: writes this step's keys, selects, attends. Call it inside your own `jax.jit`.

    `hidden` is the RMS-normed input of the sub-layer, and the result is the sub-layer's output without the residual:
    the norm before it and the addition after it are the caller's. New latents, rotary keys and index keys are written
    first, so that a token sees itself and the earlier tokens of its own chunk. Where the page table can not hold more
    than index_topk tokens the indexer is not asked, but its keys are written all the same. Donate the caches: they
    are then updated in place. Method: DeepSeek-V3.2 (arXiv:2512.02556), multi-head latent attention in the absorbed
    form of DeepSeek-V2 (arXiv:2405.04434, appendix C).

    Args:
      params: one layer's weights, with D hidden size, H heads, R latent width, dn/dr/dv head widths, Hi/Di indexer
        heads and width: q_a_proj [D, r_q], q_a_layernorm [r_q], q_b_proj [r_q, H, dn + dr], kv_a_proj_with_mqa
        [D, R + dr], kv_a_layernorm [R], kv_b_k [H, dn, R], kv_b_v [H, R, dv], o_proj [H, dv, D], indexer: wq_b
        [r_q, Hi, Di], wk [D, Di], k_norm {weight [Di], bias [Di]}, weights_proj [D, Hi].
      hidden: [T, D] float32 or bfloat16; rows of padding may hold anything.
      cache: latents and rotary keys of this layer.
      index_cache: the indexer's keys of this layer.
      metadata: of this step, from `build_metadata`.
      config: the model's shapes (static).
      implementation: None, "triton", "xla" or "reference", for every operator of the layer.

    Returns:
      (output [T, D] in hidden.dtype, cache, index_cache). Rows of padding are 0.

    Raises:
      ValueError: shapes of hidden, caches, metadata and config that do not fit together (at trace time).
    """
    _check(hidden, cache, index_cache, metadata, config)
    frequencies = jnp.asarray(rope_frequencies(config.rope, config.qk_rope_head_dim))
    latent, rope = _latent(params, hidden, metadata, frequencies, config.kv_lora_rank)
    index_key = _index_key(params["indexer"], hidden, metadata, frequencies)
    cache, index_cache = write_token(
        cache, index_cache, latent, rope, index_key, metadata.slots, implementation=implementation
    )

    q_latent = _q_latent(params, hidden)
    chosen = select_positions(
        params, hidden, index_cache, metadata, config=config, implementation=implementation, q_latent=q_latent
    )
    # Dense rows: top-k leaves what it does not choose at their ends, and packing them would be five kernels more.
    slots = slots_from_positions(chosen, metadata.request_ids, metadata.page_table, page_size=metadata.page_size)
    rows = jnp.where(metadata.valid[:, None], slots, -1)
    out = _attend(params, q_latent, cache, rows, metadata, frequencies, config, implementation)
    return out.astype(hidden.dtype), cache, index_cache
