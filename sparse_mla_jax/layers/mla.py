"""One attention layer of DeepSeek-V3.2: latent attention over the keys that the lightning indexer selects.

Call `attention_step` from your own step function, inside its `jax.jit`. Decode tokens, prefill chunks and mixes of both
use the same call and differ only in the metadata.

T tokens, D hidden size, H heads, r_q width of the query latent (the query's low-rank form), R latent width, dn / dr
nope and rope dimensions of a head, dv value width, Hi indexer heads of Di dimensions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.attention_weights import check_weights, mla_shapes
from sparse_mla_jax.layers.latent_projections import fuse_projections, project_hidden, project_q_latent
from sparse_mla_jax.layers.selection import IndexInputs, check_selection, select_visible
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops._dispatch import check_implementation
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write_token
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.ragged import slots_from_positions


def _check_call(
    params: Any, hidden: Any, cache: PagedKVCache, index: PagedIndexCache, meta: StepMetadata, c: DeepseekV32Config
) -> Array:
    """`hidden` as an array; raises ValueError for arguments that do not fit together."""
    _check.instance("config", c, DeepseekV32Config)
    _check.instance("metadata", meta, StepMetadata, hint="Make it with build_metadata or decode_metadata.")
    for name, value, kind in (("cache", cache, PagedKVCache), ("index_cache", index, PagedIndexCache)):
        _check.instance(name, value, kind, hint="Make both with models.deepseek_v32.create_caches.")
    check_weights(params, mla_shapes(c), fuse_projections)
    hint = "Pad it to the metadata's num_tokens; its width is config.hidden_size."
    hidden = _check.array("hidden", hidden, (jnp.float32, jnp.bfloat16), meta.num_tokens, c.hidden_size, hint=hint)
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
    return hidden


# --- selection
def _index_dtype(index_cache: PagedIndexCache, hidden: Array, c: DeepseekV32Config) -> np.dtype:
    """Type of the indexer's queries: that of its keys with quantize_index_query and an FP8 cache, else hidden's."""
    return index_cache.dtype if c.quantize_index_query and index_cache.quantized else hidden.dtype


def index_query(
    params: dict[str, Any],
    hidden: Array,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
    q_latent: Array | None = None,
    dtype: Any = None,
) -> IndexInputs:
    """The indexer's query and head weights: (query [T, Hi, Di], weights float32[T, Hi]), scales folded in.

    Arguments as for `attention_step`, and:
      q_latent: [T, r_q], the query latent if it is known already.
      dtype: of the query. None: hidden's. FP8: quantised per token and head, the scales multiplied into the weights.
    """
    known = project_hidden(params, hidden, metadata, config, implementation)
    inputs = project_q_latent(
        params,
        known.q_latent if q_latent is None else q_latent,
        metadata,
        config,
        implementation,
        index_dtype=hidden.dtype if dtype is None else dtype,
        index_weights=known.index_weights,
    ).index_inputs
    assert inputs is not None
    return inputs


def select_positions(
    params: dict[str, Any],
    hidden: Array,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
    q_latent: Array | None = None,
    return_scores: bool = False,
) -> Any:
    """Positions that each token attends to: ascending int32[T, min(k, max_length)], then -1.

    Arguments as for `attention_step`; `index_cache` must hold this step's keys already. With return_scores (static) a
    pair of them and their scores, float32 of the same shape: -inf for -1.

    Raises:
      ValueError: arguments that do not fit together.
    """
    check_implementation(implementation)
    inputs = None
    if return_scores or _needs_indexer(metadata, config):
        inputs = index_query(
            params,
            hidden,
            metadata,
            config=config,
            implementation=implementation,
            q_latent=q_latent,
            dtype=_index_dtype(index_cache, hidden, config),
        )
    return _select(inputs, index_cache, metadata, config, implementation, return_scores)


def _needs_indexer(meta: StepMetadata, c: DeepseekV32Config) -> bool:
    """Whether a token may see more than index_topk keys, so that the indexer has to choose."""
    return meta.max_length > c.index_topk


def _select(
    inputs: IndexInputs | None,
    index_cache: PagedIndexCache,
    meta: StepMetadata,
    c: DeepseekV32Config,
    implementation: str | None,
    return_scores: bool = False,
) -> Any:
    """`select_positions` from the result of `index_query`, or from None if the indexer is not needed."""
    if inputs is None:
        return select_visible(meta.lengths, meta.max_length)
    return lightning_indexer(
        *inputs,
        index_cache,
        meta.page_table,
        meta.request_ids,
        meta.lengths,
        k=min(c.index_topk, meta.max_length),
        max_length=meta.max_length,
        return_scores=return_scores,
        implementation=implementation,
    )


# --- attention
def _per_head(x: Array, weight: Array) -> Array:
    """x[T, H, I] times weight[H, I, O] per head, accumulated and returned in float32."""
    product = functools.partial(jnp.einsum, "thi,hio->tho", preferred_element_type=jnp.float32)
    if x.dtype == weight.dtype == jnp.float32:
        return product(x, weight)

    def widen(x: Array, weight: Array) -> Array:
        # XLA:CPU has no batched bfloat16 product with a float32 result; with a bfloat16 result it sums in bfloat16.
        return product(x.astype(jnp.float32), weight.astype(jnp.float32))

    return jax.lax.platform_dependent(x, weight, cpu=widen, default=product)


def _join_heads(values: Array, weight: Array) -> Array:
    """values[T, H, dv] times weight[H, dv, D], summed over the heads: float32[T, D].

    In a mesh with Explicit axes the sum goes over the devices that hold the heads: the result says where it lies.
    """
    mesh = jax.typeof(values).sharding.mesh
    specs = jax.typeof(values).sharding.spec, jax.typeof(weight).sharding.spec
    out = NamedSharding(mesh, PartitionSpec(specs[0][0], specs[1][2])) if mesh.explicit_axes else None
    return jnp.tensordot(values, weight, axes=2, preferred_element_type=jnp.float32, out_sharding=out)


def _absorb(params: dict[str, Any], query: Array) -> Array:
    """Maps rotated queries [T, H, dn + dr] to the space of the cache's keys: [T, H, R + dr] in query's type."""
    if "q_absorb" in params:
        return _per_head(query, params["q_absorb"]).astype(query.dtype)
    nope = params["kv_b_k"].shape[1]
    latent = _per_head(query[..., :nope], params["kv_b_k"]).astype(query.dtype)
    return jnp.concatenate([latent, query[..., nope:]], axis=-1)


def _attend(
    params: dict[str, Any],
    query: Array,
    cache: PagedKVCache,
    rows: Array,
    config: DeepseekV32Config,
    implementation: str | None,
) -> Array:
    """Absorbed attention: maps queries to the latent space and results back; keys are never expanded. float32[T, D]."""
    out = sparse_mla(
        _absorb(params, query),
        cache,
        rows,
        sm_scale=config.sm_scale,
        value_dim=config.kv_lora_rank,
        implementation=implementation,
    )
    values = _per_head(out, params["kv_b_v"])
    return _join_heads(values.astype(query.dtype), params["o_proj"])


def attention_step(
    params: dict[str, Any],
    hidden: Array,
    cache: PagedKVCache,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: DeepseekV32Config,
    implementation: str | None = None,
    selection: Array | None = None,
    return_selection: bool = False,
) -> Any:
    """Attention sub-layer of one step: writes this step's keys, selects, attends. Call it inside your own `jax.jit`.

    The caller applies the norm before the sub-layer and adds the residual after it. New latents, rotary keys and index
    keys are written first, so that a token sees itself and the earlier tokens of its chunk. If the page table can not
    hold more than index_topk tokens, the indexer does not run, but its keys are still written. Donated caches are
    updated in place. Method: DeepSeek-V3.2 (arXiv:2512.02556); multi-head latent attention in the absorbed form of
    DeepSeek-V2 (arXiv:2405.04434, appendix C).

    Args:
      params: one layer's weights: q_a_proj [D, r_q], q_a_layernorm [r_q], q_b_proj [r_q, H, dn + dr],
        kv_a_proj_with_mqa [D, R + dr], kv_a_layernorm [R], kv_b_k [H, dn, R], kv_b_v [H, R, dv], o_proj [H, dv, D],
        indexer: wq_b [r_q, Hi, Di], wk [D, Di], k_norm {weight [Di], bias [Di]}, weights_proj [D, Hi]; or the result
        of `fuse_projections`, which is faster on a GPU. With D hidden size, H heads, r_q query latent width, R latent
        width, dn/dr/dv head widths, Hi/Di indexer heads and width.
      hidden: [T, D] float32 or bfloat16, the RMS-normed input of the sub-layer; padding may hold anything.
      cache: latents and rotary keys of this layer.
      index_cache: the indexer's keys of this layer.
      metadata: of this step, from `build_metadata`.
      config: the model's shapes (static). With quantize_index_query and FP8 keys in index_cache, the indexer's queries
        are quantised to the same type, one scale per token and head. Scores are then twice as fast on an H200; queries
        are rounded to three bits of mantissa, as in DeepSeek's own code (which first rotates q and k by a Hadamard
        matrix; this library does not).
      implementation: None, "triton", "xla" or "reference", for every operator of the layer.
      selection: int32 [T, W], the positions that each token attends to, in place of those that the indexer would
        choose: of another layer that shares them, or of an earlier run that is replayed. -1, and positions that the
        token does not see, are none. The indexer does not run; its keys are still written.
      return_selection: also return the selection (static).

    Returns:
      (output [T, D] in hidden.dtype, without the residual; cache; index_cache). Padding gives 0. With
      return_selection a fourth result: int32 [T, min(k, max_length)] as of `select_positions`, or `selection`.

    Raises:
      ValueError: weights, hidden, caches, metadata and config that do not fit together (at trace time).
    """
    hidden = _check_call(params, hidden, cache, index_cache, metadata, config)
    check_implementation(implementation)
    selects = selection is None and _needs_indexer(metadata, config)
    known = project_hidden(params, hidden, metadata, config, implementation)
    keys = known.latent, known.rope, known.index_key
    cache, index_cache = write_token(cache, index_cache, *keys, metadata.slots, implementation=implementation)
    queries = project_q_latent(
        params,
        known.q_latent,
        metadata,
        config,
        implementation,
        index_dtype=_index_dtype(index_cache, hidden, config),
        index_weights=known.index_weights if selects else None,
    )
    if selection is None:
        chosen = _select(queries.index_inputs, index_cache, metadata, config, implementation)
    else:
        chosen = check_selection(selection, metadata.lengths)
    # Pass dense rows: top-k ends them with -1, and packing would take five more kernels. Padding selects nothing.
    rows = slots_from_positions(chosen, metadata.request_ids, metadata.page_table, page_size=metadata.page_size)
    out = _attend(params, queries.heads, cache, rows, config, implementation)
    results = out.astype(hidden.dtype), cache, index_cache
    return (*results, chosen) if return_selection else results
