"""One attention layer of DeepSeek-V4: a sliding window and compressed entries, under one softmax with sinks.

A layer is of one of three kinds: window only; window and all compressed entries (of 128 tokens each); window and the
entries (of 4 tokens each) that a lightning indexer chooses. All heads share one vector per token or entry, which is
both key and value.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.attention_weights import check_weights, compressed_shapes
from sparse_mla_jax.layers.compressed_projections import (
    HiddenProjections,
    LayerStep,
    fuse_projections,
    project_hidden,
    project_q_latent,
)
from sparse_mla_jax.layers.projections import matmul
from sparse_mla_jax.layers.selection import IndexInputs, Queries, check_selection, select_visible
from sparse_mla_jax.layers.step import check_hidden, check_static
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write
from sparse_mla_jax.ops.compressor import CompressorState, CompressorWeights, compress, entry_pages, num_entries
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.ragged import DenseRows, slots_from_positions
from sparse_mla_jax.ops.window import check_states, ring_slots, token_states, window_rows
from sparse_mla_jax.parallel.attention import SeenKeys, attend, select_keys
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.collectives import sum_over
from sparse_mla_jax.parallel.pages import PagePart, check_windows

__all__ = [
    "LayerCaches",
    "compressed_attention_step",
    "fuse_projections",
    "grouped_output",
    "select_entries",
    "token_states",
]


@serializable
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["window", "compressed", "state", "index", "index_state"],
    meta_fields=["page_size"],
)
@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """The caches of one layer.

    Attributes:
      window: the newest tokens; a page is the ring of one running request (`ops.window`).
      compressed: compressed entries, in the pages of the request's tokens; None in layers that do not compress.
      state: the compressor's state per running request; None in layers that do not compress.
      index: the indexer's keys of the entries; None in layers without an indexer.
      index_state: state of the indexer's own compressor; None in layers without an indexer.
      page_size: static; tokens of a page, as passed to `models.deepseek_v4.create_caches`, or None.
    """

    window: PagedKVCache
    compressed: PagedKVCache | None = None
    state: CompressorState | None = None
    index: PagedIndexCache | None = None
    index_state: CompressorState | None = None
    page_size: int | None = None


def _check_caches(caches: LayerCaches, meta: StepMetadata, state_ids: Any, ratio: int, c: DeepseekV4Config) -> None:
    window = caches.window
    require(
        (window.latent_dim, window.rope_dim) == (c.nope_dim, c.qk_rope_head_dim),
        f"caches.window holds {window.latent_dim} + {window.rope_dim} values per token; config needs {c.nope_dim} +"
        f" {c.qk_rope_head_dim}. Make it with models.deepseek_v4.create_caches.",
    )
    check_states("caches.window", state_ids, window, meta)
    wanted = {"compressed": ratio > 0, "state": ratio > 0, "index": ratio == 4, "index_state": ratio == 4}
    for name, expected in wanted.items():
        require(
            (getattr(caches, name) is not None) == expected,
            f"caches.{name} is {'absent' if expected else 'there'} in a layer with compress_ratio {ratio}; make the"
            " caches with models.deepseek_v4.create_caches for this config.",
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


# --- selection
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

    With an indexer, the index_topk entries that it scores highest; otherwise all entries that the token sees. Arguments
    as for `compressed_attention_step`, except: `index` must hold this step's entries already, and `q_latent` [T, r_q]
    saves the projection if it is known.

    Raises:
      ValueError: an index in a layer without an indexer, or none in a layer with one (at trace time).
    """
    require(
        (index is not None) == config.has_indexer(layer),
        f"index is {'absent' if index is None else 'there'} in a layer with compress_ratio"
        f" {config.compress_ratio(layer)}; give the layer's caches.index.",
    )
    step = LayerStep.create(metadata, config, layer, implementation)
    inputs = None
    if step.needs_indexer:
        known = project_hidden(params, hidden, step)
        q_latent = known.q_latent if q_latent is None else q_latent
        inputs = project_q_latent(params, q_latent, step, known.index_weights).index_inputs
        assert inputs is not None
        inputs = inputs._replace(query=inputs.query.astype(hidden.dtype))
    return _select(inputs, index, step)


def _entries_seen(step: LayerStep) -> Array:
    """Number of compressed entries that each token sees: int32[T], 0 in layers that do not compress."""
    return num_entries(step.metadata.lengths, ratio=step.ratio) if step.ratio else jnp.zeros_like(step.metadata.lengths)


def _select(inputs: IndexInputs | None, index: PagedIndexCache | None, step: LayerStep) -> Array:
    """`select_entries` from the indexer's inputs, or from None if the indexer is not needed."""
    meta, ratio = step.metadata, step.ratio
    if not ratio:
        return select_visible(_entries_seen(step), 0)
    table, per_page = entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)
    return select_keys(
        inputs,
        index,
        SeenKeys(table, meta.request_ids, _entries_seen(step), meta.max_length // ratio),
        k=step.config.index_topk,
        page_size=per_page,
        parallel=step.parallel,
        implementation=step.implementation,
    )


# --- caches
def _write_window(window: PagedKVCache, key: Array, states: Array, step: LayerStep) -> PagedKVCache:
    """Writes every token's own key into its request's ring."""
    nope, slots = step.config.nope_dim, ring_slots(step.metadata.positions, states, ring=window.page_size)
    return write(window, key[:, :nope], key[:, nope:], slots, implementation=step.implementation)


def _write_entries(
    params: dict[str, Any], caches: LayerCaches, known: HiddenProjections, step: LayerStep, state_ids: Array | None
) -> LayerCaches:
    """Writes the entries of the windows that close in this step, and their index keys if the layer has an indexer.

    Over "context" every device computes all entries and keeps all states, and stores the entries of its own pages.
    """
    meta = step.metadata
    pages = PagePart.create(step.parallel, meta.page_size).masked(meta.page_table)
    metadata = dataclasses.replace(meta, page_table=pages)
    for name, inputs in (("compressed", known.entry), ("index", known.index_entry)):
        if inputs is None:
            continue
        is_index = name == "index"
        own = params["indexer"]["compressor"] if is_index else params["compressor"]
        weights = CompressorWeights(own["position_bias"], own["norm"], step.frequencies, eps=step.config.rms_norm_eps)
        state = "index_state" if is_index else "state"
        cache, after = compress(
            getattr(caches, name),
            getattr(caches, state),
            *inputs,
            weights,
            metadata,
            state_ids=state_ids,
            implementation=step.implementation,
        )
        caches = dataclasses.replace(caches, **{name: cache, state: after})
    return caches


# --- attention
def grouped_output(
    params: dict[str, Any], out: Array, positions: Array, frequencies: Array, *, implementation: str | None = None
) -> Array:
    """Rotates attention's result back and applies the grouped low-rank output projection: float32[T, D].

    Each value was rotated by its own position, so their weighted sum is rotated back by the query's position.

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
    selection: Array | None = None,
    return_selection: bool = False,
    parallel: Parallel | None = None,
) -> Any:
    """Attention sub-layer of one step: writes window and entries, selects, attends. Call it inside your own `jax.jit`.

    New keys are written first: a token sees itself, the earlier tokens of its chunk, and the entry that it closes.
    Donated caches are updated in place. A request may have at most window.page_size - config.sliding_window + 1 tokens
    in a step; its further tokens give zeros.

    Args:
      params: one layer's weights: q_a_proj [D, r_q], q_a_layernorm [r_q], q_b_proj [r_q, H, d], kv_proj [D, d],
        kv_layernorm [d], sinks [H], o_a_proj [g, H // g * d, r_o], o_b_proj [g * r_o, D]; in layers that compress
        compressor {kv_proj [D, c * d], gate_proj [D, c * d], position_bias [m, c * d], norm [d]}; in layers of ratio 4
        indexer {wq_b [r_q, Hi, Di], weights_proj [D, Hi], compressor as above of width Di}; or the result of
        `fuse_projections`, which is faster on a GPU. With D hidden size, H heads of d values, g groups, Hi/Di indexer
        heads and width, r_q/r_o ranks of query and output, m the layer's ratio, c = 2 for ratio 4, else 1.
      hidden: [T, D] float32 or bfloat16, the RMS-normed input of the sub-layer; padding may hold anything.
      caches: of this layer.
      metadata: of this step, from `build_metadata` or `decode_metadata`.
      config: the model's shapes (static).
      layer: the layer's number (static); it determines ratio and rotation.
      state_ids: int32[B], each request's row of the rings and compressor states; None means row b for request b. A
        request with an id outside the rings writes nothing, and its tokens give zeros.
      implementation: None, "triton", "xla" or "reference", for every operator of the layer.
      selection: int32 [T, W], the compressed entries that each token attends to besides its window, in place of those
        that `select_entries` gives, to replay an earlier run. -1, and entries that the token does not see, are none.
      return_selection: also return the selection (static); int32 [T, 0] in layers that do not compress.
      parallel: the axes over which the step is spread (static), inside `jax.shard_map`; None on one device. Weights
        are then the device's own, as `parallel.partition_params` splits them, and caches its own pages; rings and
        compressor states are the same on all devices of "context". The selection is the part of it that the device
        has, see `parallel.attention.join_selection`.

    Returns:
      (output [T, D] in hidden.dtype, without the residual; caches), and the selection with return_selection. Padding
      gives 0.

    Raises:
      ValueError: weights, hidden, caches, metadata, state_ids, selection and config that do not fit together (at trace
        time).
    """
    check_static(metadata, config, DeepseekV4Config, implementation, parallel)
    _check.instance("caches", caches, LayerCaches, hint="Make them with models.deepseek_v4.create_caches.")
    hidden = check_hidden(hidden, metadata, config)
    _check_caches(caches, metadata, state_ids, config.compress_ratio(layer), config)
    check_windows(metadata.page_size, config.compress_ratio(layer), 1 if parallel is None else parallel.context)
    step = LayerStep.create(metadata, config, layer, implementation, parallel)
    check_weights(params, compressed_shapes, step.config, layer, fuse_projections)
    ring, rings = caches.window.page_size, caches.window.num_pages
    states = token_states(metadata, state_ids, rings=rings, capacity=max(1, ring - config.sliding_window + 1))
    known = project_hidden(params, hidden, step)
    window = _write_window(caches.window, known.key, states, step)
    caches = _write_entries(params, dataclasses.replace(caches, window=window), known, step, state_ids)
    index_weights = known.index_weights if step.needs_indexer and selection is None else None
    queries = project_q_latent(params, known.q_latent, step, index_weights)
    if selection is None:
        chosen = _select(queries.index_inputs, caches.index, step)
    else:
        chosen = check_selection(selection, _entries_seen(step))
    out = _attend(params, queries, caches, chosen, states, step, is_given=selection is not None)
    projected = grouped_output(params, out, metadata.positions, step.frequencies, implementation=implementation)
    projected = sum_over(projected.astype(hidden.dtype), parallel.present("tensor") if parallel else ())
    results = projected, caches
    return (*results, chosen) if return_selection else results


def _attend(
    params: dict[str, Any],
    queries: Queries,
    caches: LayerCaches,
    chosen: Array,
    states: Array,
    step: LayerStep,
    *,
    is_given: bool,
) -> Array:
    """Attention to the window and to the entries `chosen`, which the caller of the layer gives if `is_given`."""
    ring, axis, entries = caches.window.page_size, step.axis("context"), None
    # Entries that the layer selects come first in their row; others may lie anywhere.
    if caches.compressed is not None:
        whole = jnp.full(states.shape, chosen.shape[1], jnp.int32)
        entries = caches.compressed, _entry_rows(chosen, whole if is_given else None, states, step)
    rows = window_rows(step.metadata, states, window=step.config.sliding_window, ring=ring)
    if axis is not None and entries is not None:
        # Every device has the window; one of them attends to it.
        is_first = PagePart.create(step.parallel, step.metadata.page_size).is_first()
        rows = DenseRows(rows.values, jnp.where(is_first, rows.flatten().lengths, 0))
    return attend(
        queries.heads,
        caches.window,
        rows,
        sinks=params["sinks"].astype(jnp.float32),
        axis=None if entries is None else axis,
        sm_scale=step.config.sm_scale,
        value_dim=step.config.head_dim,
        extra=entries,
        implementation=step.implementation,
    )


def _entry_rows(chosen: Array, count: Array | None, states: Array, step: LayerStep) -> DenseRows:
    """Slots of the first count[t] entries of `chosen` [T, W]; an empty row for a token whose request has no ring.

    Without `count` those that the layer itself has selected.
    """
    meta, ratio = step.metadata, step.ratio
    table, per_page = entry_pages(meta.page_table, page_size=meta.page_size, ratio=ratio)
    part = PagePart.create(step.parallel, per_page)
    slots = slots_from_positions(part.to_local(chosen), meta.request_ids, part.pages(table), page_size=per_page)
    if count is None:
        own = jnp.sum(slots >= 0, axis=1, dtype=jnp.int32)
        count = _entries_seen(step) if part.axis is None else own
    return DenseRows(slots, jnp.where(states >= 0, jnp.minimum(count, slots.shape[1]), 0))
