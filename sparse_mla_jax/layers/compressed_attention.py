"""One attention layer of DeepSeek-V4: a sliding window beside compressed entries, under one softmax with sinks.

Layers differ in what they read besides the window: nothing; every entry of their ratio (128 tokens each); or the
entries, of 4 tokens each, that a lightning indexer chooses. One vector per token or entry is key and value of every
head.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import DeepseekV4Config, require
from sparse_mla_jax.layers.moe import matmul
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages, num_entries
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.ragged import DenseRows, slots_from_positions
from sparse_mla_jax.ops.rope import rope_frequencies, rotate
from sparse_mla_jax.ops.window import ring_slots, window_slots


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["window", "compressed", "state", "index", "index_state"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """What one layer remembers.

    Attributes:
      window: newest tokens; a page is the ring of one running request (`ops.window`).
      compressed: entries, by the pages of the request's tokens; None in layers that do not compress.
      state: what the compressor's open windows need, per running request; None likewise.
      index: the indexer's keys of the entries; None in layers without an indexer.
      index_state: of the indexer's own compressor; None likewise.
    """

    window: PagedKVCache
    compressed: PagedKVCache | None = None
    state: CompressorState | None = None
    index: PagedIndexCache | None = None
    index_state: CompressorState | None = None


def _check(
    hidden: Array, caches: LayerCaches, meta: StepMetadata, state_ids: Any, ratio: int, c: DeepseekV4Config
) -> None:
    require(
        hidden.shape == (meta.num_tokens, c.hidden_size),
        f"hidden has shape {hidden.shape}; metadata for {meta.num_tokens} tokens and config.hidden_size"
        f" {c.hidden_size} need {(meta.num_tokens, c.hidden_size)}. Pad hidden to the metadata's num_tokens.",
    )
    window = caches.window
    require(
        (window.latent_dim, window.rope_dim) == (c.nope_dim, c.qk_rope_head_dim),
        f"caches.window holds {window.latent_dim} + {window.rope_dim} values per token; config needs {c.nope_dim} +"
        f" {c.qk_rope_head_dim}. Make it with models.deepseek_v4.create_caches.",
    )
    _check_states(state_ids, window.num_pages, meta.num_requests)
    wanted = {"compressed": ratio > 0, "state": ratio > 0, "index": ratio == 4, "index_state": ratio == 4}
    for name, there in wanted.items():
        require(
            (getattr(caches, name) is not None) == there,
            f"caches.{name} is {'absent' if there else 'there'} in a layer with compress_ratio {ratio}; make the caches"
            " with models.deepseek_v4.create_caches for this config.",
        )
    if ratio:
        _, entries = entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)
        require(
            caches.compressed is not None and caches.compressed.page_size == entries,
            f"caches.compressed has pages of {caches.compressed and caches.compressed.page_size} entries; metadata with"
            f" page_size {meta.page_size} and ratio {ratio} need {entries}. Use one page_size.",
        )


def _check_states(state_ids: Any, rings: int, requests: int) -> None:
    if state_ids is None:
        require(
            rings >= requests,
            f"caches.window has {rings} rings for {requests} requests; create the caches with"
            f" num_requests={requests} or more, or pass state_ids.",
        )
        return
    require(
        state_ids.shape == (requests,) and jnp.issubdtype(state_ids.dtype, jnp.integer),
        f"state_ids has shape {state_ids.shape} and type {state_ids.dtype}; metadata has {requests} requests and needs"
        f" int32[{requests}], the ring of each.",
    )


def token_states(metadata: StepMetadata, state_ids: Array | None, *, rings: int, capacity: int) -> Array:
    """The ring of every token's request: int32[T], -1 for none.

    None have padding, tokens beyond `capacity` of their request, and requests whose ring is not one of `rings`.
    """
    meta, requests = metadata, metadata.num_requests
    if requests == 0:
        return jnp.full(meta.positions.shape, -1, jnp.int32)
    ids = jnp.arange(requests, dtype=jnp.int32) if state_ids is None else jnp.asarray(state_ids).astype(jnp.int32)
    ids = jnp.where((ids >= 0) & (ids < rings), ids, -1)
    within = jnp.arange(meta.num_tokens, dtype=jnp.int32) - meta.query_indptr[meta.request_ids]
    return jnp.where(meta.valid & (within < capacity), ids[meta.request_ids], -1)


def _rotate_last(x: Array, positions: Array, frequencies: Array) -> Array:
    """x[..., d] with its last dimensions rotated in interleaved pairs, float32 arithmetic."""
    kept = x.shape[-1] - 2 * frequencies.shape[0]
    turned = rotate(x[..., kept:], positions, frequencies, interleaved=True)
    return jnp.concatenate([x[..., :kept], turned], axis=-1)


def _unit_heads(x: Array, eps: float) -> Array:
    """Every head divided by its own root mean square, float32."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _queries(
    params: dict[str, Any], q_latent: Array, positions: Array, frequencies: Array, c: DeepseekV4Config
) -> Array:
    """[T, H, d] in q_latent.dtype, normed per head and rotated."""
    query = _unit_heads(matmul(q_latent, params["q_b_proj"]), c.rms_norm_eps)
    return _rotate_last(query, positions, frequencies).astype(q_latent.dtype)


def _compress_step(
    params: dict[str, Any],
    cache: Any,
    state: CompressorState,
    hidden: Array,
    meta: StepMetadata,
    state_ids: Array | None,
    frequencies: Array,
    ratio: int,
    eps: float,
    implementation: str | None,
) -> tuple[Any, CompressorState]:
    """`compress` of this step's tokens into a cache of entries or of index keys."""
    return compress(
        cache,
        state,
        matmul(hidden, params["kv_proj"]),
        matmul(hidden, params["gate_proj"]),
        params["position_bias"],
        params["norm"],
        frequencies,
        positions=meta.positions,
        request_ids=meta.request_ids,
        query_indptr=meta.query_indptr,
        seq_lens=meta.seq_lens,
        page_table=meta.page_table,
        page_size=meta.page_size,
        state_ids=state_ids,
        ratio=ratio,
        eps=eps,
        implementation=implementation,
    )


def _q_latent(params: dict[str, Any], hidden: Array, c: DeepseekV4Config) -> Array:
    """The query's low-rank form [T, r_q], shared by the attention heads and the indexer."""
    latent = rms_norm(matmul(hidden, params["q_a_proj"]), params["q_a_layernorm"], eps=c.rms_norm_eps)
    return latent.astype(hidden.dtype)


def select_entries(
    params: dict[str, Any],
    hidden: Array,
    index: PagedIndexCache | None,
    metadata: StepMetadata,
    *,
    config: DeepseekV4Config,
    layer: int,
    q_latent: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """Compressed entries that each token attends to besides its window: ascending int32[T, W], then -1.

    All that exist for the token, or where the layer has an indexer the index_topk that it scores highest. Arguments as
    those of `compressed_attention_step`; `index` must hold this step's entries already; `q_latent` [T, r_q] spares the
    projection where it is known.

    Raises:
      ValueError: an index in a layer without an indexer, or none in a layer with one (at trace time).
    """
    meta, ratio = metadata, config.compress_ratio(layer)
    require(
        (index is not None) == config.has_indexer(layer),
        f"index is {'absent' if index is None else 'there'} in a layer with compress_ratio {ratio}; give the layer's"
        " caches.index.",
    )
    width, entries = meta.max_length // ratio if ratio else 0, num_entries(meta.lengths, ratio=max(ratio, 1))
    if index is None or width <= config.index_topk:  # all of them: do not ask
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        return jnp.where(column < entries[:, None], column, -1)
    q_latent = _q_latent(params, hidden, config) if q_latent is None else q_latent
    indexer, heads, dim = params["indexer"], config.index_n_heads, config.index_head_dim
    frequencies = jnp.asarray(rope_frequencies(config.layer_rope(layer), config.qk_rope_head_dim))
    query = _rotate_last(matmul(q_latent, indexer["wq_b"]), meta.positions, frequencies).astype(hidden.dtype)
    return lightning_indexer(
        query,
        matmul(hidden, indexer["weights_proj"]) * (heads**-0.5 * dim**-0.5),
        index,
        entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)[0],
        meta.request_ids,
        entries,
        k=config.index_topk,
        max_length=width,
        implementation=implementation,
    )


def _write_window(
    params: dict[str, Any],
    window: PagedKVCache,
    hidden: Array,
    positions: Array,
    states: Array,
    frequencies: Array,
    c: DeepseekV4Config,
    implementation: str | None,
) -> PagedKVCache:
    """Every token's own key, normed and rotated, in its request's ring."""
    key = rms_norm(matmul(hidden, params["kv_proj"]), params["kv_layernorm"], eps=c.rms_norm_eps)
    key = _rotate_last(key, positions, frequencies)
    slots = ring_slots(positions, states, ring=window.page_size)
    return write(window, key[:, : c.nope_dim], key[:, c.nope_dim :], slots, implementation=implementation)


def _write_entries(params: dict[str, Any], caches: LayerCaches, hidden: Array, *options: Any) -> LayerCaches:
    """The entries that this step's tokens close, and the indexer's keys of them; `options` as of `_compress_step`."""
    if caches.compressed is None or caches.state is None:
        return caches
    entries, state = _compress_step(params["compressor"], caches.compressed, caches.state, hidden, *options)
    caches = dataclasses.replace(caches, compressed=entries, state=state)
    if caches.index is None or caches.index_state is None:
        return caches
    inner = params["indexer"]["compressor"]
    keys, state = _compress_step(inner, caches.index, caches.index_state, hidden, *options)
    return dataclasses.replace(caches, index=keys, index_state=state)


def grouped_output(
    params: dict[str, Any], out: Array, positions: Array, frequencies: Array, *, implementation: str | None = None
) -> Array:
    """Attention's result back from its rotation and through the grouped low-rank projection: float32[T, D].

    Values carry the rotation of their own positions, so the sum over them is turned back by the query's.

    Args:
      params: o_a_proj [g, H // g * d, r_o], o_b_proj [g * r_o, D].
      out: [T, H, d] attention's result.
      positions: int32[T].
      frequencies: [rope dimensions // 2].
      implementation: None, "triton", "xla" or "reference".
    """
    low = rotated_projection(out, params["o_a_proj"], positions, frequencies, implementation=implementation)
    return matmul(low.reshape(low.shape[0], -1), params["o_b_proj"])


def compressed_attention_step(
    params: dict[str, Any],
    hidden: Array,
    caches: LayerCaches,
    metadata: StepMetadata,
    *,
    config: DeepseekV4Config,
    layer: int,
    state_ids: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, LayerCaches]:
    """Attention sub-layer of one step: writes window and entries, selects, attends. Call it inside your own `jax.jit`.

    `hidden` is the RMS-normed input of the sub-layer. New keys are written first: a token sees itself, the earlier
    tokens of its chunk, and the entry that it closes. Donate the caches: they are then updated in place. A request may
    bring at most window.page_size - config.sliding_window + 1 tokens in a step; what exceeds it gives zeros.

    Args:
      params: one layer's weights, with D hidden size, H heads of d values, g groups, Hi/Di indexer heads and width, m
        the layer's ratio, c 2 with ratio 4, else 1: q_a_proj [D, r_q], q_a_layernorm [r_q], q_b_proj [r_q, H, d],
        kv_proj [D, d], kv_layernorm [d], sinks [H], o_a_proj [g, H // g * d, r_o], o_b_proj [g * r_o, D]; with a ratio
        compressor {kv_proj [D, c * d], gate_proj [D, c * d], position_bias [m, c * d], norm [d]}; with ratio 4 indexer
        {wq_b [r_q, Hi, Di], weights_proj [D, Hi], compressor as above of width Di}.
      hidden: [T, D] float32 or bfloat16; rows of padding may hold anything.
      caches: of this layer.
      metadata: of this step, from `build_metadata` or `decode_metadata`.
      config: the model's shapes (static).
      layer: the layer's number (static): it decides ratio and rotation.
      state_ids: int32[B], where each request's ring and compressor state lie; None: row b's is b. A request whose ring
        is not there writes nothing, and its tokens give zeros.
      implementation: None, "triton", "xla" or "reference", for every operator of the layer.

    Returns:
      (output [T, D] in hidden.dtype, caches). Rows of padding are 0.

    Raises:
      ValueError: shapes of hidden, caches, metadata, state_ids and config that do not fit together (at trace time).
    """
    ratio, meta = config.compress_ratio(layer), metadata
    _check(hidden, caches, meta, state_ids, ratio, config)
    frequencies = jnp.asarray(rope_frequencies(config.layer_rope(layer), config.qk_rope_head_dim))
    ring, rings = caches.window.page_size, caches.window.num_pages
    states = token_states(meta, state_ids, rings=rings, capacity=ring - config.sliding_window + 1)
    window = _write_window(params, caches.window, hidden, meta.positions, states, frequencies, config, implementation)
    caches = dataclasses.replace(caches, window=window)
    caches = _write_entries(
        params, caches, hidden, meta, state_ids, frequencies, ratio, config.rms_norm_eps, implementation
    )

    q_latent, extra = _q_latent(params, hidden, config), None
    if caches.compressed is not None:
        options: dict[str, Any] = {"config": config, "layer": layer, "implementation": implementation}
        chosen = select_entries(params, hidden, caches.index, meta, q_latent=q_latent, **options)
        table, per_page = entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)
        slots = slots_from_positions(chosen, meta.request_ids, table, page_size=per_page)
        lengths = jnp.minimum(num_entries(meta.lengths, ratio=ratio), slots.shape[1])
        extra = (caches.compressed, DenseRows(slots, jnp.where(states >= 0, lengths, 0)))
    near = window_slots(meta.positions, states, window=config.sliding_window, ring=ring)
    lengths = jnp.where(states >= 0, jnp.minimum(meta.lengths, config.sliding_window), 0)
    out = sparse_mla(
        _queries(params, q_latent, meta.positions, frequencies, config),
        window,
        DenseRows(near, lengths),
        sm_scale=config.sm_scale,
        value_dim=config.head_dim,
        sinks=params["sinks"].astype(jnp.float32),
        extra=extra,
        implementation=implementation,
    )
    projected = grouped_output(params, out, meta.positions, frequencies, implementation=implementation)
    return projected.astype(hidden.dtype), caches
