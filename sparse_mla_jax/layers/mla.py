"""One layer of latent attention (MLA): attention over the keys that an indexer selects, over all keys, or a window.

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
from sparse_mla_jax.layers.attention_weights import check_weights, mla_shapes
from sparse_mla_jax.layers.latent_projections import (
    LatentProjections,
    LatentStep,
    fuse_projections,
    project_hidden,
    project_queries,
)
from sparse_mla_jax.layers.selection import IndexInputs, Queries, check_selection
from sparse_mla_jax.layers.step import check_hidden, check_static
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.ops.attention import Rows
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write, write_index, write_token
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.ragged import DenseRows, slots_from_positions
from sparse_mla_jax.ops.window import WindowCache, check_states, ring_slots, token_states, window_rows
from sparse_mla_jax.parallel.attention import SeenKeys, attend, select_keys
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.collectives import sum_over
from sparse_mla_jax.parallel.pages import PagePart

_MAKE = "Make it with models.mla.create_caches."


def _check_call(params: Any, hidden: Any, cache: Any, index: Any, state_ids: Any, step: LatentStep) -> Array:
    """`hidden` as an array; raises ValueError for arguments that do not fit together."""
    c, layer, meta, sizes = step.config, step.layer, step.metadata, step.layer.sizes
    _check.instance("cache", cache, WindowCache if layer.is_sliding else PagedKVCache, hint=_MAKE)
    keys = _keys(cache)
    require(
        (index is not None) == layer.has_indexer,
        f"index_cache is {'absent' if index is None else 'there'} in layer {layer.number}, which has"
        f" {'an' if layer.has_indexer else 'no'} indexer of its own. {_MAKE}",
    )
    check_weights(params, mla_shapes, c, layer, fuse_projections)
    hidden = check_hidden(hidden, meta, c)
    require(
        (keys.latent_dim, keys.rope_dim) == (sizes.kv_lora_rank, sizes.qk_rope_head_dim),
        f"cache holds {keys.latent_dim} + {keys.rope_dim} values per token; config needs {sizes.kv_lora_rank} +"
        f" {sizes.qk_rope_head_dim}. {_MAKE}",
    )
    paged = {} if layer.is_sliding else {"cache": keys.page_size}
    if layer.is_sliding:
        check_states("cache", state_ids, keys, meta)
        require(
            keys.page_size >= c.sliding_window,
            f"cache has rings of {keys.page_size} slots; a window of {c.sliding_window} needs as many. {_MAKE}",
        )
    if index is not None:
        _check.instance("index_cache", index, PagedIndexCache, hint=_MAKE)
        require(
            index.dim == c.index_head_dim,
            f"index_cache keys have {index.dim} values; config.index_head_dim is {c.index_head_dim}. {_MAKE}",
        )
        paged["index_cache"] = index.page_size
    for name, page_size in paged.items():
        require(
            page_size == meta.page_size,
            f"{name} has pages of {page_size} tokens, metadata was built for {meta.page_size}; use one page_size.",
        )
    return hidden


def _keys(cache: PagedKVCache | WindowCache) -> PagedKVCache:
    return cache.keys if isinstance(cache, WindowCache) else cache


# --- selection
def _index_dtype(index_cache: PagedIndexCache, hidden: Array, c: MlaConfig) -> np.dtype:
    """Type of the indexer's queries: that of its keys with quantize_index_query and an FP8 cache, else hidden's."""
    return index_cache.dtype if c.quantize_index_query and index_cache.quantized else hidden.dtype


def index_query(
    params: dict[str, Any],
    hidden: Array,
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    layer: int | None = None,
    frequencies: Array | None = None,
    implementation: str | None = None,
    q_latent: Array | None = None,
    dtype: Any = None,
) -> IndexInputs:
    """The indexer's query and head weights: (query [T, Hi, Di], weights float32[T, Hi]), scales folded in.

    Arguments as for `attention_step`, and:
      q_latent: [T, r_q], the query latent if it is known already.
      dtype: of the query. None: hidden's. FP8: quantised per token and head, the scales multiplied into the weights.

    Raises:
      ValueError: a layer without an indexer, or arguments that do not fit together.
    """
    check_static(metadata, config, MlaConfig, implementation)
    step = LatentStep.create(metadata, config, layer, implementation, frequencies)
    return _index_inputs(params, hidden, q_latent, step, hidden.dtype if dtype is None else dtype)


def _index_inputs(
    params: dict[str, Any], hidden: Array, q_latent: Array | None, step: LatentStep, dtype: Any
) -> IndexInputs:
    require(
        step.layer.has_indexer,
        f"layer {step.layer.number} has no indexer; use the selection of layer {step.layer.index_source}.",
    )
    known = project_hidden(params, hidden, step)
    known = known if q_latent is None else known._replace(q_latent=q_latent)
    inputs = project_queries(params, hidden, known, step, dtype).index_inputs
    assert inputs is not None
    return inputs


def select_positions(
    params: dict[str, Any],
    hidden: Array,
    index_cache: PagedIndexCache,
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    layer: int | None = None,
    frequencies: Array | None = None,
    implementation: str | None = None,
    q_latent: Array | None = None,
    return_scores: bool = False,
) -> Any:
    """Positions that each token attends to: ascending int32[T, min(k, max_length)], then -1.

    Arguments as for `attention_step`; `index_cache` must hold this step's keys already. With return_scores (static) a
    pair of them and their scores, float32 of the same shape: -inf for -1.

    Raises:
      ValueError: a layer without an indexer, or arguments that do not fit together.
    """
    check_static(metadata, config, MlaConfig, implementation)
    step = LatentStep.create(metadata, config, layer, implementation, frequencies)
    inputs = None
    if return_scores or step.needs_indexer:
        inputs = _index_inputs(params, hidden, q_latent, step, _index_dtype(index_cache, hidden, config))
    return _select(inputs, index_cache, step, return_scores)


def _select(
    inputs: IndexInputs | None, index_cache: PagedIndexCache | None, step: LatentStep, return_scores: bool = False
) -> Any:
    """`select_positions` from the result of `index_query`, or from None if the indexer is not needed."""
    meta, k = step.metadata, min(step.config.index_topk, step.metadata.max_length)
    seen = SeenKeys(meta.page_table, meta.request_ids, meta.lengths, meta.max_length)
    if return_scores and inputs is not None and index_cache is not None:
        return lightning_indexer(
            *inputs,
            index_cache,
            *seen[:3],
            k=k,
            max_length=seen.max_length,
            return_scores=True,
            implementation=step.implementation,
        )
    return select_keys(
        inputs,
        index_cache,
        seen,
        k=k,
        page_size=meta.page_size,
        parallel=step.parallel,
        implementation=step.implementation,
    )


def _check_passed(selection: Any, step: LatentStep) -> Array | None:
    """The selection that the caller passes, checked; None if the layer makes its own.

    Raises:
      ValueError: none in a layer that shares another's, or one in a layer whose keys are not selected.
    """
    layer = step.layer
    if selection is None:
        require(
            not layer.shares_index,
            f"selection is None; layer {layer.number} has no indexer. Pass the one that layer {layer.index_source}"
            " returned (return_selection=True).",
        )
        return None
    require(
        layer.index_source is not None,
        f"selection is given to layer {layer.number}, a layer of {layer.kind!r}, whose keys are not selected. Leave it"
        " out.",
    )
    return check_selection(selection, step.metadata.lengths)


# --- caches
def _write(
    known: LatentProjections,
    cache: PagedKVCache,
    index_cache: PagedIndexCache | None,
    states: Array | None,
    step: LatentStep,
) -> tuple[PagedKVCache, PagedIndexCache | None]:
    """Writes what the layer makes: its latents and rotary keys, and its index keys."""
    meta, how = step.metadata, step.implementation
    slots = PagePart.create(step.parallel, meta.page_size).slots(meta.positions, meta.slots)
    if states is not None:
        slots = ring_slots(meta.positions, states, ring=cache.page_size)
    if known.latent is None:
        if index_cache is None or known.index_key is None:
            return cache, None
        return cache, write_index(index_cache, known.index_key, slots, implementation=how)
    rope = known.latent[:, :0] if known.rope is None else known.rope
    if index_cache is None or known.index_key is None:
        return write(cache, known.latent, rope, slots, implementation=how), None
    return write_token(cache, index_cache, known.latent, rope, known.index_key, slots, implementation=how)


# --- attention
def _key_rows(chosen: Array, step: LatentStep) -> Rows:
    """Slots of the chosen positions that the device has."""
    meta, part = step.metadata, PagePart.create(step.parallel, step.metadata.page_size)
    pages, local = part.pages(meta.page_table), part.to_local(chosen)
    slots = slots_from_positions(local, meta.request_ids, pages, page_size=meta.page_size)
    # Pass dense rows: top-k ends them with -1, and packing would take five more kernels. Padding selects nothing.
    if part.axis is None:
        return slots
    # The device may have few of them. A selection that the caller passes may have them anywhere in its row.
    last = jnp.max(jnp.where(slots >= 0, jnp.arange(1, slots.shape[1] + 1, dtype=jnp.int32), 0), axis=1, initial=0)
    return DenseRows(slots, last)


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


def _attend(params: dict[str, Any], queries: Queries, cache: PagedKVCache, rows: Rows, step: LatentStep) -> Array:
    """Absorbed attention of queries in the latent space; maps results back, keys are never expanded. float32[T, D]."""
    sizes, query = step.layer.sizes, queries.heads
    values = attend(
        query,
        cache,
        rows,
        sinks=params["sinks"].astype(jnp.float32) if step.config.attention_sinks else None,
        # Rings are whole on every device.
        axis=None if step.layer.is_sliding else step.axis("context"),
        finish=lambda out: _per_head(out, params["kv_b_v"]),
        sm_scale=sizes.sm_scale,
        value_dim=sizes.kv_lora_rank,
        implementation=step.implementation,
    )
    if queries.gate is not None:
        gate = queries.gate if queries.gate.ndim == 3 else queries.gate[..., None]
        values = values * jax.nn.sigmoid(gate.astype(jnp.float32))
    projected = _join_heads(values.astype(query.dtype), params["o_proj"])
    if step.parallel is not None and step.axis("tensor") is not None:
        projected = sum_over(projected.astype(query.dtype), step.parallel.present("tensor")).astype(jnp.float32)
    return projected + params["o_proj_bias"] if step.config.attention_bias else projected


def attention_step(
    params: dict[str, Any],
    hidden: Array,
    cache: PagedKVCache | WindowCache,
    index_cache: PagedIndexCache | None,
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    layer: int | None = None,
    state_ids: Array | None = None,
    frequencies: Array | None = None,
    implementation: str | None = None,
    selection: Array | None = None,
    return_selection: bool = False,
    parallel: Parallel | None = None,
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
        width, dn/dr/dv head widths, Hi/Di indexer heads and width. Other families and layers have more or less of
        them: `layers.attention_weights.mla_shapes(config, config.layer(number))` lists names and shapes.
      hidden: [T, D] float32 or bfloat16, the RMS-normed input of the sub-layer; padding may hold anything.
      cache: latents and rotary keys of this layer, or of the layer whose latents it uses, after that layer's step; a
        WindowCache in sliding layers.
      index_cache: the indexer's keys of this layer; None in layers without an indexer.
      metadata: of this step, from `build_metadata`.
      config: the model's shapes (static). With quantize_index_query and FP8 keys in index_cache, the indexer's queries
        are quantised to the same type, one scale per token and head. Scores are then twice as fast on an H200; queries
        are rounded to three bits of mantissa, as in DeepSeek's own code (which first rotates q and k by a Hadamard
        matrix; this library does not).
      layer: the layer's number (static); may be omitted if all layers of the config are alike.
      state_ids: int32[B], the ring of each request in sliding layers; None means b for request b. A request with an id
        outside the rings writes nothing, and its tokens see nothing there; nor do a request's tokens after the first
        ring - window + 1 of a step.
      frequencies: float32 [dr // 2] where the model learns them, from `layers.latent_projections`.
      implementation: None, "triton", "xla" or "reference", for every operator of the layer.
      selection: int32 [T, W], the positions that each token attends to, in place of those that the indexer would
        choose: of another layer that shares them (required in layers without an indexer of their own), or of an earlier
        run that is replayed. -1, and positions that the token does not see, are none. The indexer does not run; its
        keys are still written.
      return_selection: also return the selection (static).
      parallel: the axes over which the step is spread (static), inside `jax.shard_map`; None on one device. Weights
        are then the device's own, as `parallel.partition_params` splits them, and caches its own pages. The selection
        is the part of it that the device has, see `parallel.attention.join_selection`.

    Returns:
      (output [T, D] in hidden.dtype, without the residual; cache; index_cache). Padding gives 0, or o_proj's bias. With
      return_selection a fourth result: int32 [T, min(k, max_length)] as of `select_positions`, or `selection`; None in
      a sliding layer.

    Raises:
      ValueError: weights, hidden, caches, metadata and config that do not fit together (at trace time).
    """
    check_static(metadata, config, MlaConfig, implementation, parallel)
    step = LatentStep.create(metadata, config, layer, implementation, frequencies, parallel)
    hidden = _check_call(params, hidden, cache, index_cache, state_ids, step)
    chosen = _check_passed(selection, step)
    known, keys = project_hidden(params, hidden, step), _keys(cache)
    states = None
    if step.layer.is_sliding:
        capacity = keys.page_size - config.sliding_window + 1
        states = token_states(metadata, state_ids, rings=keys.num_pages, capacity=capacity)
    keys, index_cache = _write(known, keys, index_cache, states, step)
    index_dtype = None
    if chosen is None and step.needs_indexer and index_cache is not None:
        index_dtype = _index_dtype(index_cache, hidden, config)
    queries = project_queries(params, hidden, known, step, index_dtype)
    queries = queries._replace(heads=_absorb(params, queries.heads))
    if states is not None:
        rows: Rows = window_rows(metadata, states, window=config.sliding_window, ring=keys.page_size)
    else:
        chosen = _select(queries.index_inputs, index_cache, step) if chosen is None else chosen
        if step.axis("tensor") is not None:
            # The product of the queries then runs while devices join their selections.
            chosen, queries = jax.lax.optimization_barrier((chosen, queries))
        rows = _key_rows(chosen, step)
    out = _attend(params, queries, keys, rows, step)
    results = out.astype(hidden.dtype), keys if states is None else WindowCache(keys), index_cache
    return (*results, chosen) if return_selection else results
