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
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.moe import matmul
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages, num_entries
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.norm_rope import Part, norm_rope
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.ragged import DenseRows, slots_from_positions
from sparse_mla_jax.ops.rope import rope_frequencies
from sparse_mla_jax.ops.window import ring_slots, window_slots


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["window", "compressed", "state", "index", "index_state"],
    meta_fields=["page_size"],
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
      page_size: static; tokens of a page, as `models.deepseek_v4.create_caches` got it, or None.
    """

    window: PagedKVCache
    compressed: PagedKVCache | None = None
    state: CompressorState | None = None
    index: PagedIndexCache | None = None
    index_state: CompressorState | None = None
    page_size: int | None = None


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
    for name in ("state", "index_state"):
        state = getattr(caches, name)
        require(
            state is None or state.kv.shape[0] == window.num_pages,
            f"caches.{name} has {state and state.kv.shape[0]} rows and caches.window {window.num_pages} rings; a"
            " request has one of each. Make the caches with models.deepseek_v4.create_caches.",
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
    ids = jnp.arange(requests, dtype=jnp.int32) if state_ids is None else jnp.asarray(state_ids)
    # In the type that came: a wide one may wrap into somebody's ring.
    ids = jnp.where((ids >= 0) & (ids < rings), ids, -1).astype(jnp.int32)
    within = jnp.arange(meta.num_tokens, dtype=jnp.int32) - meta.query_indptr[meta.request_ids]
    return jnp.where(meta.valid & (within < capacity), ids[meta.request_ids], -1)


# --- projections -----------------------------------------------------------------------------------------------------
def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """One layer's weights with those that multiply the same input side by side: one product of each input.

    Call it once, when the weights are loaded; `compressed_attention_step` takes either form. Of what that lists it
    replaces q_a_proj, kv_proj, kv_proj and gate_proj of both compressors, and indexer.weights_proj, as many as the
    layer has, by hidden_proj [D, columns], their columns in this order; q_b_proj and indexer.wq_b by q_latent_proj
    [r_q, H * d + Hi * Di]; and it adds head_norm [d], ones, the weight of the queries' norm.
    """
    if "hidden_proj" in params:
        return params
    hidden, q_latent = (jnp.concatenate([_flat(w) for w in weights], axis=1) for weights in _side_by_side(params))
    return _without_projections(params) | {
        "hidden_proj": hidden,
        "q_latent_proj": q_latent,
        # Made in a step, a constant is a launch.
        "head_norm": jnp.ones(params["q_b_proj"].shape[2], jnp.float32),
    }


def _without_projections(params: dict[str, Any]) -> dict[str, Any]:
    """What `_side_by_side` leaves."""
    taken = {"q_a_proj", "q_b_proj", "kv_proj", "gate_proj", "wq_b", "weights_proj"}
    kept = {name: weight for name, weight in params.items() if name not in taken}
    return {name: _without_projections(weight) if isinstance(weight, dict) else weight for name, weight in kept.items()}


def _side_by_side(params: dict[str, Any]) -> tuple[list[Array], list[Array]]:
    """Weights of the products of the hidden state, and of those of the query's low-rank form, in order of columns."""
    hidden, q_latent = [params["q_a_proj"], params["kv_proj"]], [params["q_b_proj"]]
    if "compressor" in params:
        hidden += [params["compressor"][name] for name in ("kv_proj", "gate_proj")]
    if "indexer" in params:
        indexer = params["indexer"]
        hidden += [*(indexer["compressor"][name] for name in ("kv_proj", "gate_proj")), indexer["weights_proj"]]
        q_latent.append(indexer["wq_b"])
    return hidden, q_latent


def _flat(weight: Array) -> Array:
    """Matrix [D, columns] of a weight [D, ...]."""
    return weight.reshape(weight.shape[0], -1)


def _finished(
    params: dict[str, Any],
    fused: str,
    x: Array,
    parts: list[Part],
    positions: Array,
    frequencies: Array,
    eps: float,
    implementation: str | None,
) -> list[Array]:
    """[T, heads, width] of each part: the products of x in order, finished as their parts say; the last may lack one.

    `fused`: name of the weights side by side, "hidden_proj" or "q_latent_proj"; `start` of the parts is set here.
    """
    finish = functools.partial(
        norm_rope, positions=positions, frequencies=frequencies, eps=eps, implementation=implementation
    )
    if fused in params:
        starts = np.cumsum([0, *(part.columns for part in parts)])
        placed = [dataclasses.replace(part, start=int(start)) for part, start in zip(parts, starts)]
        return finish(matmul(x, params[fused]), placed)
    # Each by itself: bringing them together would be a copy of all.
    weights = _side_by_side(params)[fused == "q_latent_proj"]
    products = [(matmul(x, _flat(weight)), part) for weight, part in zip(weights, parts)]
    return [finish(x, [part])[0] if _changes(part) else x[:, None] for x, part in products]


def _as_is(width: int) -> Part:
    """Columns that stay what the product gives."""
    return Part(0, 1, width, "float32")


def _changes(part: Part) -> bool:
    """Whether it is another than those of `_as_is`."""
    return part.weight is not None or part.rotated is not None or part.scale != 1.0


def _from_hidden(
    params: dict[str, Any],
    hidden: Array,
    positions: Array,
    frequencies: Array,
    c: DeepseekV4Config,
    layer: int,
    implementation: str | None,
) -> list[Array]:
    """All that a layer makes of its input, float32 but the first, which has hidden's type.

    The query's low-rank form [T, r_q], which heads and indexer share; the token's own key [T, d], normed and rotated;
    with a ratio kv and gate [T, c * d] of the compressor; with an indexer those of its compressor [T, c * Di] and its
    head weights [T, Hi], scales folded in.
    """
    ratio = c.compress_ratio(layer)
    key = Part(0, 1, c.head_dim, "float32", params["kv_layernorm"], rotated=c.nope_dim, interleaved=True)
    parts = [Part(0, 1, c.q_lora_rank, hidden.dtype.name, params["q_a_layernorm"]), key]
    spans = 2 if c.compressor_overlap(ratio) else 1
    if ratio:
        parts += [_as_is(spans * c.head_dim)] * 2
    if c.has_indexer(layer):
        parts += [_as_is(spans * c.index_head_dim)] * 2
        parts.append(Part(0, 1, c.index_n_heads, "float32", scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5))
    how = positions, frequencies, c.rms_norm_eps, implementation
    return [heads[:, 0] for heads in _finished(params, "hidden_proj", hidden, parts, *how)]


def _from_q_latent(
    params: dict[str, Any],
    q_latent: Array,
    positions: Array,
    frequencies: Array,
    c: DeepseekV4Config,
    implementation: str | None,
    *,
    indexer: bool,
) -> list[Array]:
    """The queries [T, H, d], every head divided by its root mean square, and the indexer's [T, Hi, Di] if it is asked.

    Both rotated, in q_latent.dtype.
    """
    part = functools.partial(Part, dtype=q_latent.dtype.name, interleaved=True)
    one = params.get("head_norm", jnp.ones(c.head_dim, jnp.float32))
    parts = [part(0, c.num_attention_heads, c.head_dim, weight=one, rotated=c.nope_dim)]
    if indexer:
        rotated = c.index_head_dim - c.qk_rope_head_dim
        parts.append(part(0, c.index_n_heads, c.index_head_dim, rotated=rotated))
    how = positions, frequencies, c.rms_norm_eps, implementation
    return _finished(params, "q_latent_proj", q_latent, parts, *how)


def _layer_frequencies(c: DeepseekV4Config, layer: int) -> Array:
    return jnp.asarray(rope_frequencies(c.layer_rope(layer), c.qk_rope_head_dim))


# --- selection -------------------------------------------------------------------------------------------------------
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
    require(
        (index is not None) == config.has_indexer(layer),
        f"index is {'absent' if index is None else 'there'} in a layer with compress_ratio"
        f" {config.compress_ratio(layer)}; give the layer's caches.index.",
    )
    asked = None
    if _asks(metadata, config, layer):
        how = metadata.positions, _layer_frequencies(config, layer), config
        known, *_, weights = _from_hidden(params, hidden, *how, layer, implementation)
        q_latent = known if q_latent is None else q_latent
        query = _from_q_latent(params, q_latent, *how, implementation, indexer=True)[1]
        asked = query.astype(hidden.dtype), weights
    return _select(asked, index, metadata, config, layer, implementation)


def _asks(meta: StepMetadata, c: DeepseekV4Config, layer: int) -> bool:
    """Whether the layer has an indexer, and there can be entries that it would not choose."""
    return c.has_indexer(layer) and meta.max_length // c.compress_ratio(layer) > c.index_topk


def _select(
    asked: tuple[Array, Array] | None,
    index: PagedIndexCache | None,
    meta: StepMetadata,
    c: DeepseekV4Config,
    layer: int,
    implementation: str | None,
) -> Array:
    """The result of `select_entries`, from the indexer's queries and head weights if it is asked."""
    ratio = c.compress_ratio(layer)
    width, entries = meta.max_length // ratio if ratio else 0, num_entries(meta.lengths, ratio=max(ratio, 1))
    if asked is None or index is None:
        column = jnp.arange(width, dtype=jnp.int32)[None, :]
        return jnp.where(column < entries[:, None], column, -1)
    return lightning_indexer(
        *asked,
        index,
        entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)[0],
        meta.request_ids,
        entries,
        k=c.index_topk,
        max_length=width,
        implementation=implementation,
    )


# --- caches ----------------------------------------------------------------------------------------------------------
def _compress_step(
    params: dict[str, Any],
    cache: Any,
    state: CompressorState,
    kv: Array,
    gate: Array,
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
        kv,
        gate,
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


def _write_window(
    window: PagedKVCache,
    key: Array,
    positions: Array,
    states: Array,
    c: DeepseekV4Config,
    implementation: str | None,
) -> PagedKVCache:
    """Every token's own key in its request's ring."""
    slots = ring_slots(positions, states, ring=window.page_size)
    return write(window, key[:, : c.nope_dim], key[:, c.nope_dim :], slots, implementation=implementation)


def _write_entries(params: dict[str, Any], caches: LayerCaches, inputs: list[Array], *options: Any) -> LayerCaches:
    """The entries that this step's tokens close, and the indexer's keys of them; `options` as of `_compress_step`.

    `inputs`: kv and gate of the layer's compressor and of the indexer's, as many as there are.
    """
    if caches.compressed is None or caches.state is None:
        return caches
    own, inner = params["compressor"], params.get("indexer", {}).get("compressor")
    entries, state = _compress_step(own, caches.compressed, caches.state, inputs[0], inputs[1], *options)
    caches = dataclasses.replace(caches, compressed=entries, state=state)
    if caches.index is None or caches.index_state is None:
        return caches
    keys, state = _compress_step(inner, caches.index, caches.index_state, inputs[2], inputs[3], *options)
    return dataclasses.replace(caches, index=keys, index_state=state)


# --- attention -------------------------------------------------------------------------------------------------------
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
        {wq_b [r_q, Hi, Di], weights_proj [D, Hi], compressor as above of width Di}; or what `fuse_projections` makes
        of them, which is quicker on a GPU.
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
    frequencies = _layer_frequencies(config, layer)
    ring, rings = caches.window.page_size, caches.window.num_pages
    states = token_states(meta, state_ids, rings=rings, capacity=ring - config.sliding_window + 1)
    how = meta.positions, frequencies, config
    q_latent, key, *inputs = _from_hidden(params, hidden, *how, layer, implementation)
    window = _write_window(caches.window, key, meta.positions, states, config, implementation)
    caches = dataclasses.replace(caches, window=window)
    caches = _write_entries(
        params, caches, inputs, meta, state_ids, frequencies, ratio, config.rms_norm_eps, implementation
    )

    query, *asked = _from_q_latent(params, q_latent, *how, implementation, indexer=_asks(meta, config, layer))
    extra = None
    if caches.compressed is not None:
        question = (asked[0], inputs[-1]) if asked else None
        chosen = _select(question, caches.index, meta, config, layer, implementation)
        table, per_page = entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)
        slots = slots_from_positions(chosen, meta.request_ids, table, page_size=per_page)
        lengths = jnp.minimum(num_entries(meta.lengths, ratio=ratio), slots.shape[1])
        extra = (caches.compressed, DenseRows(slots, jnp.where(states >= 0, lengths, 0)))
    near = window_slots(meta.positions, states, window=config.sliding_window, ring=ring)
    lengths = jnp.where(states >= 0, jnp.minimum(meta.lengths, config.sliding_window), 0)
    out = sparse_mla(
        query,
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
