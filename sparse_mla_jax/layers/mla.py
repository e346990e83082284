"""One attention layer of DeepSeek-V3.2: latent attention over the keys that the lightning indexer selects.

Call `attention_step` from your own step function, inside its `jax.jit`. Decode tokens, prefill chunks and mixes of both
use the same call and differ only in the metadata.

T tokens, D hidden size, H heads, r_q width of the query latent (the query's low-rank form), R latent width, dn / dr
nope and rope dimensions of a head, dv value width, Hi indexer heads of Di dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.norm import INNER_EPS
from sparse_mla_jax.layers.projections import Path, fuse, place, project
from sparse_mla_jax.layers.selection import IndexInputs, Queries, select_visible
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write_token
from sparse_mla_jax.ops.fp8 import is_fp8
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.ragged import slots_from_positions
from sparse_mla_jax.ops.rope import rope_frequencies


def _check_call(
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


# --- projections
# Weights with the same input, in the order of their columns in the fused matrix.
_GROUPS: dict[str, list[Path]] = {
    "hidden_proj": [("q_a_proj",), ("kv_a_proj_with_mqa",), ("indexer", "wk"), ("indexer", "weights_proj")],
    "q_latent_proj": [("indexer", "wq_b"), ("q_b_proj",)],
}


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """Concatenates the weights of one layer that multiply the same input: fewer matrix products and launches.

    Call it once, when the weights are loaded; `attention_step` accepts fused and separate weights. Replaced are:

    * q_a_proj, kv_a_proj_with_mqa, indexer.wk and indexer.weights_proj by hidden_proj [D, r_q + R + dr + Di + Hi];
    * indexer.wq_b and q_b_proj by q_latent_proj [r_q, Hi * Di + H * (dn + dr)];
    * kv_b_k by q_absorb [H, dn + dr, R + dr], which maps the first dn values of a query to the latent space and passes
      the dr rotated ones through.
    """
    if "hidden_proj" in params:
        return params
    key = params["kv_b_k"]
    heads, nope, rank = key.shape
    rope = params["q_b_proj"].shape[2] - nope
    absorb = jnp.zeros((heads, nope + rope, rank + rope), key.dtype).at[:, :nope, :rank].set(key)
    fused = fuse({name: weight for name, weight in params.items() if name != "kv_b_k"}, _GROUPS)
    return fused | {"q_absorb": absorb.at[:, nope:, rank:].set(jnp.eye(rope, dtype=key.dtype))}


class _LatentProjections(NamedTuple):
    """Products of the hidden state: float32, except q_latent, which has hidden's type.

    Attributes:
      q_latent: [T, r_q], the query latent, which heads and indexer share.
      latent: [T, R], normed.
      rope: [T, dr], the rotated shared key.
      index_key: [T, Di].
      index_weights: [T, Hi], the indexer's head weights, scales folded in.
    """

    q_latent: Array
    latent: Array
    rope: Array
    index_key: Array
    index_weights: Array


def _project_hidden(
    params: dict[str, Any], hidden: Array, meta: StepMetadata, c: DeepseekV32Config, implementation: str | None
) -> _LatentProjections:
    (weight, bias), part = _index_norm(params, c), functools.partial(Section, 0, 1, dtype="float32")
    parts = place(
        [
            part(c.q_lora_rank, weight=params["q_a_layernorm"], dtype=hidden.dtype.name),
            part(c.kv_lora_rank, weight=params["kv_a_layernorm"]),
            part(c.qk_rope_head_dim, rotated=0, interleaved=c.rope_interleave, scale=_amplitude(c)),
            part(c.index_head_dim, weight=weight, bias=bias, rotated=0, interleaved=c.indexer_rope_interleave),
            part(c.index_n_heads, scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5),
        ]
    )
    finish = functools.partial(
        norm_rope,
        positions=meta.positions,
        frequencies=_frequencies(c),
        eps=INNER_EPS,
        implementation=implementation,
    )
    done = project(params, "hidden_proj", hidden, _GROUPS["hidden_proj"], parts, finish)
    return _LatentProjections(*(heads[:, 0] for heads in done))


def _project_q_latent(
    params: dict[str, Any],
    q_latent: Array,
    meta: StepMetadata,
    c: DeepseekV32Config,
    implementation: str | None,
    *,
    index_dtype: Any = None,
    index_weights: Array | None = None,
) -> Queries:
    """The queries [T, H, dn + dr], last dr values rotated; and the indexer's inputs if its head weights are given.

    `index_dtype`: type of the indexer's queries; None without head weights.
    """
    parts = [_query_part(c, q_latent.dtype)]
    if index_weights is not None:
        parts.append(_index_part(c, jnp.dtype(index_dtype), index_weights))

    def finish(product: Array, parts: Sequence[Section]) -> list[Any]:
        product = product.astype(q_latent.dtype)
        return norm_rope(product, parts, meta.positions, _frequencies(c), implementation=implementation)

    done = project(params, "q_latent_proj", q_latent, _GROUPS["q_latent_proj"], parts, finish)
    if index_weights is None:
        return Queries(done[0], None)
    return Queries(done[0], IndexInputs(*(done[1] if parts[1].quantized else (done[1], index_weights))))


def _query_part(c: DeepseekV32Config, dtype: np.dtype) -> Section:
    start, rotated = c.index_n_heads * c.index_head_dim, c.qk_nope_head_dim
    return Section(
        start, c.num_attention_heads, c.qk_head_dim, dtype.name, rotated=rotated, interleaved=c.rope_interleave
    )


def _index_part(c: DeepseekV32Config, dtype: np.dtype, weights: Array) -> Section:
    """The indexer's queries: rotation of the first dimensions, the others unchanged."""
    factor = weights if is_fp8(dtype) else None
    interleaved = c.indexer_rope_interleave
    return Section(0, c.index_n_heads, c.index_head_dim, dtype.name, rotated=0, interleaved=interleaved, factor=factor)


def _frequencies(c: DeepseekV32Config) -> np.ndarray:
    return rope_frequencies(c.rope, c.qk_rope_head_dim)


def _amplitude(c: DeepseekV32Config) -> float:
    """The factor of rotated keys. Only products with a query matter, so keys take the factors of both."""
    return c.rope.attention_factor**2


def _index_norm(params: dict[str, Any], c: DeepseekV32Config) -> tuple[Array, Array]:
    """Weight and bias [Di] of the index keys' norm, times the amplitude in the dimensions that will be rotated."""
    norm = params["indexer"]["k_norm"]
    if _amplitude(c) == 1.0:
        return norm["weight"], norm["bias"]
    factor = np.ones(c.index_head_dim, np.float32)
    factor[: c.qk_rope_head_dim] = _amplitude(c)
    return norm["weight"] * factor, norm["bias"] * factor


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
    known = _project_hidden(params, hidden, metadata, config, implementation)
    inputs = _project_q_latent(
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
) -> Array:
    """Positions that each token attends to: ascending int32[T, min(k, max_length)], then -1.

    Arguments as for `attention_step`; `index_cache` must hold this step's keys already.
    """
    inputs = None
    if _needs_indexer(metadata, config):
        inputs = index_query(
            params,
            hidden,
            metadata,
            config=config,
            implementation=implementation,
            q_latent=q_latent,
            dtype=_index_dtype(index_cache, hidden, config),
        )
    return _select(inputs, index_cache, metadata, config, implementation)


def _needs_indexer(meta: StepMetadata, c: DeepseekV32Config) -> bool:
    """Whether a token may see more than index_topk keys, so that the indexer has to choose."""
    return meta.max_length > c.index_topk


def _select(
    inputs: IndexInputs | None,
    index_cache: PagedIndexCache,
    meta: StepMetadata,
    c: DeepseekV32Config,
    implementation: str | None,
) -> Array:
    """`select_positions` from the result of `index_query`, or from None if the indexer is not needed."""
    if inputs is None:
        return select_visible(meta.lengths, meta.max_length)
    return lightning_indexer(
        *inputs,
        index_cache,
        meta.page_table,
        meta.request_ids,
        meta.lengths,
        k=c.index_topk,
        max_length=meta.max_length,
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
) -> tuple[Array, PagedKVCache, PagedIndexCache]:
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

    Returns:
      (output [T, D] in hidden.dtype, without the residual; cache; index_cache). Padding gives 0.

    Raises:
      ValueError: shapes of hidden, caches, metadata and config that do not fit together (at trace time).
    """
    _check_call(hidden, cache, index_cache, metadata, config)
    known = _project_hidden(params, hidden, metadata, config, implementation)
    keys = known.latent, known.rope, known.index_key
    cache, index_cache = write_token(cache, index_cache, *keys, metadata.slots, implementation=implementation)
    queries = _project_q_latent(
        params,
        known.q_latent,
        metadata,
        config,
        implementation,
        index_dtype=_index_dtype(index_cache, hidden, config),
        index_weights=known.index_weights if _needs_indexer(metadata, config) else None,
    )
    chosen = _select(queries.index_inputs, index_cache, metadata, config, implementation)
    # Pass dense rows: top-k ends them with -1, and packing would take five more kernels. Padding selects nothing.
    rows = slots_from_positions(chosen, metadata.request_ids, metadata.page_table, page_size=metadata.page_size)
    out = _attend(params, queries.heads, cache, rows, config, implementation)
    return out.astype(hidden.dtype), cache, index_cache
