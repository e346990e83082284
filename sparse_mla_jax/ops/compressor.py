"""DeepSeek-V4's compressors: every `ratio` tokens become one entry of a paged cache, in steps of any mix of requests.

Token t of a request has kv_t and gate_t, float32 [C]. Windows of `ratio` tokens may overlap:

* Without overlap, C = dim: a token contributes to its own window only.
* With overlap, C = 2 * dim: the first `dim` channels contribute to the next window, the others to the token's own.

Window w = t // ratio closes with the token t for which (t + 1) % ratio == 0. Its rows are the previous window's tokens
(with overlap, and except for window 0), then its own. A softmax of the gates over the rows, per channel, weighs their
kv. The sum passes an RMSNorm and is rotated by position ratio * w. A query at position t sees the entries
w < (t + 1) // ratio, including the one that it closes.

Source: the model DeepSeek-V4 as published (its inference code of 2026-04-24, class Compressor).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import compress as kernel
from pallas_kernels.plans.compress import CompressPlan
from sparse_mla_jax._check import describe, floats, int32, require, size
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops._compressor_fields import accept_fields
from sparse_mla_jax.ops._compressor_state import (
    Closings,
    CompressorState,
    CompressorWeights,
    find_closings,
    find_spans,
    update_state,
)
from sparse_mla_jax.ops._compressor_xla import PoolInputs, reference_entries, xla_entries
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache

__all__ = ["CompressorState", "CompressorWeights", "compress", "entry_pages", "num_entries"]


def entry_pages(page_table: Array, *, page_size: int, ratio: int) -> tuple[Array, int]:
    """The page table of a cache of entries that shares its page numbers with the cache of tokens.

    An entry lies in the page of the token that closes its window: window w is entry w % E of page table[b, w // E].

    Args:
      page_table: integer [B, P], pages of tokens; -1 for none.
      page_size: tokens of a page.
      ratio: tokens of a window.

    Returns:
      (table [B, P'], E entries per page). If ratio divides page_size: page_table itself and page_size // ratio. If
      page_size divides ratio: every (ratio // page_size)-th column of page_table, and 1.

    Raises:
      ValueError: neither divides the other, a size below 1, or page_table is no integer array of two axes.
    """
    page_table = int32("page_table", page_table, None, None)
    page_size, ratio = size("page_size", page_size), size("ratio", ratio)
    if page_size % ratio == 0:
        return page_table, page_size // ratio
    require(
        ratio % page_size == 0,
        f"page_size is {page_size} and ratio {ratio}; one must divide the other, so that a window ends in one page."
        f" Use a page_size that is a multiple of {ratio}, or divides it.",
    )
    every = ratio // page_size
    return page_table[:, every - 1 :: every], 1


def num_entries(lengths: Array, *, ratio: int) -> Array:
    """Number of entries after `lengths` tokens of a request; the query at position lengths - 1 sees as many."""
    return jnp.maximum(int32("lengths", lengths, ...), 0) // size("ratio", ratio)


@accept_fields
def compress[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache,
    state: CompressorState,
    kv: Array,
    gate: Array,
    weights: CompressorWeights,
    metadata: StepMetadata,
    *,
    state_ids: Array | None = None,
    implementation: str | None = None,
    plan: CompressPlan | None = None,
    config: CompressPlan | None = None,
) -> tuple[Cache, CompressorState]:
    """Compresses a step's tokens: stores the entries of windows that close, keeps the tokens of windows still open.

    Arithmetic is float32; the cache then rounds or quantises as `cache.write` does. Each implementation gives the same
    entries and state, bit for bit, however a sequence is cut into steps. `cache` and `state` are updated in place if
    the caller donates them.

    Args:
      cache: entries before; hd = latent_dim + rope_dim (the rotated values) of a PagedKVCache, dim of a
        PagedIndexCache. Its page_size must be the entries per page that `entry_pages` gives.
      state: open windows before.
      kv: floating [T, C], C = hd, or 2 * hd with overlap.
      gate: floating [T, C], without position bias.
      weights: of the compressor. The windows have m tokens, the rows of its position_bias [m, C].
      metadata: of this step. The position of a request's first row counts; the other rows follow it. Rows outside
        query_indptr and rows of requests of length 0 are padding. An entry whose page is -1 is not stored. slots,
        lengths, valid, last_token and max_length are not read.
      state_ids: int [B], each request's row of `state`; None means row b for request b. A request with an id outside
        the state stores nothing. Two requests must not share a row.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes of the kernel in place of the heuristic ones (static); implies "triton".
      config: the former name of `plan`.

    Until the next release, the call of release 0.1 works too: position_bias, norm and frequencies in place of
    `weights`, and ratio, eps, positions, request_ids, query_indptr, seq_lens, page_table and page_size by keyword.

    Returns:
      (cache, state) after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, CompressPlan)
    check_implementation(implementation)
    weights = _check_weights(weights, cache, state)
    kv = floats("kv", kv, None, weights.channels)
    gate = floats("gate", gate, kv.shape[0], weights.channels)
    metadata = _check_metadata(metadata, kv.shape[0])
    table, entries = entry_pages(metadata.page_table, page_size=metadata.page_size, ratio=weights.ratio)
    _check_pages(cache, entries, metadata.page_size, weights.ratio)
    state_ids = _check_state_ids(state_ids, state, metadata.num_requests)
    if metadata.num_tokens == 0 or metadata.num_requests == 0:
        return cache, state
    spans = find_spans(metadata, state_ids, state.num_rows)
    closings = find_closings(spans, table, entries=entries, tokens=metadata.num_tokens, ratio=weights.ratio)
    inputs, definition = PoolInputs(weights, state, kv, gate, closings), partial(_xla, reversible=True)
    written = dispatch(
        "compress",
        implementation,
        {
            "triton": lambda: with_derivative_of(definition, partial(_triton, plan=plan), cache, inputs),
            "xla": lambda: with_derivative_of(definition, _xla, cache, inputs),
            "reference": lambda: _write_entries(cache, reference_entries(inputs), closings, "reference"),
        },
    )
    # Finish all reads of the old state before it is overwritten: XLA would copy it otherwise.
    written, state = lax.optimization_barrier((written, state))
    return written, update_state(state, kv, gate, weights.position_bias, spans, metadata.request_ids)


# --- bodies ("xla" and "reference" are in _compressor_xla)
def _triton[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache, inputs: PoolInputs, *, plan: CompressPlan | None
) -> Cache:
    weights, state, closings, angles = inputs.weights, inputs.state, inputs.closings, inputs.angles
    rotation = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    lists = closings.row, closings.first, closings.window, closings.state_id, closings.slot
    written = kernel.compress(
        cache_ops.parts_of(cache),
        jnp.stack(lists, axis=1),
        (inputs.kv, inputs.gate),
        (state.kv, state.gate),
        weights.position_bias,
        weights.norm,
        rotation=rotation,
        eps=weights.eps,
        plan=plan,
    )
    return cache_ops.with_parts(cache, written)


def _xla[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache, inputs: PoolInputs, *, reversible: bool = False
) -> Cache:
    return _write_entries(cache, xla_entries(inputs, reversible=reversible), inputs.closings, "xla")


def _write_entries[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache, entries: Array, closings: Closings, implementation: str
) -> Cache:
    if isinstance(cache, PagedIndexCache):
        return cache_ops.write_index(cache, entries, closings.slot, implementation=implementation)
    latent, rope = entries[:, : cache.latent_dim], entries[:, cache.latent_dim :]
    return cache_ops.write(cache, latent, rope, closings.slot, implementation=implementation)


# --- arguments
def _check_weights(
    weights: CompressorWeights, cache: PagedKVCache | PagedIndexCache, state: CompressorState
) -> CompressorWeights:
    """The weights in float32."""
    require(
        isinstance(weights, CompressorWeights),
        f"weights is a {type(weights).__name__}; expected CompressorWeights(position_bias, norm, frequencies).",
    )
    require(
        isinstance(cache, PagedKVCache | PagedIndexCache),
        f"cache is a {type(cache).__name__}; expected a PagedKVCache or a PagedIndexCache.",
    )
    dim = cache.latent_dim + cache.rope_dim if isinstance(cache, PagedKVCache) else cache.dim
    norm = floats("norm", weights.norm, dim)
    frequencies = floats("frequencies", weights.frequencies, None)
    _check_frequencies(frequencies, cache)
    bias = floats("position_bias", weights.position_bias, None, None)
    require(
        bias.shape[1] in (dim, 2 * dim),
        f"position_bias has shape {list(bias.shape)}; expected [ratio, {dim}], or [ratio, {2 * dim}] with overlap,"
        f" for a cache of entries of {dim} values.",
    )
    weights = CompressorWeights(bias, norm, frequencies, float(weights.eps))
    _check_state(state, weights)
    return weights


def _check_frequencies(frequencies: Array, cache: PagedKVCache | PagedIndexCache) -> None:
    got = f"frequencies has shape {list(frequencies.shape)}, one per pair of rotated values; the cache has a"
    rotated = 2 * frequencies.shape[0]
    if isinstance(cache, PagedKVCache):
        rope = cache.rope_dim
        require(rotated == rope, f"{got} rope_dim of {rope}: pass [{rope // 2}].")
    else:
        require(rotated <= cache.dim, f"{got} dim of {cache.dim}.")


def _check_state(state: CompressorState, weights: CompressorWeights) -> None:
    rows, channels = weights.rows, weights.channels
    for name, array in (("kv", state.kv), ("gate", state.gate)):
        require(
            array.ndim == 3 and array.shape[1:] == (rows, channels) and array.dtype == jnp.float32,
            f"state.{name} is {describe(array)}; expected float32[N, {rows}, {channels}]. Create it with"
            f" ratio={weights.ratio}, dim={weights.dim}, overlap={channels == 2 * weights.dim}.",
        )


def _check_metadata(metadata: StepMetadata, tokens: int) -> StepMetadata:
    """`metadata` with the fields that `compress` reads checked and in int32."""
    require(
        isinstance(metadata, StepMetadata),
        f"metadata is a {type(metadata).__name__}; expected a StepMetadata. Make it with metadata.build_metadata.",
    )
    page_table = int32("page_table", metadata.page_table, None, None)
    requests = page_table.shape[0]
    axes = {"positions": tokens, "request_ids": tokens, "query_indptr": requests + 1, "seq_lens": requests}
    found: dict[str, Any] = {name: int32(name, getattr(metadata, name), axis) for name, axis in axes.items()}
    found["page_table"] = page_table
    return dataclasses.replace(metadata, page_size=size("page_size", metadata.page_size), **found)


def _check_pages(cache: PagedKVCache | PagedIndexCache, entries: int, page_size: int, ratio: int) -> None:
    require(
        cache.page_size == entries,
        f"cache has a page_size of {cache.page_size}; pages of {page_size} tokens hold {entries} entries of {ratio}"
        f" tokens. Create the cache with page_size={entries}, or pass the page_size of the tokens' cache.",
    )


def _check_state_ids(state_ids: Array | None, state: CompressorState, requests: int) -> Array:
    """Row of the state of each request, int32[B]; -1 for an id outside the state."""
    if state_ids is not None:
        ids = int32("state_ids", state_ids, requests)
        return jnp.where((ids >= 0) & (ids < state.num_rows), ids, -1)
    require(
        state.num_rows >= requests,
        f"state has {state.num_rows} rows for {requests} requests; create it with num_requests={requests} or more,"
        " or pass state_ids.",
    )
    return jnp.arange(requests, dtype=jnp.int32)
