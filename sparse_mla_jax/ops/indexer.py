"""The lightning indexer: cheap scores of every visible key. Top-k of the scores selects the keys that attention reads.

    score[t, n] = key_scale[n] * sum_h weights[t, h] * relu(q[t, h] . key[n])

T tokens, H indexer heads, D dimensions of a key, N keys (columns). Quantised keys enter the product without their
scale, which is positive and multiplies the sum over heads. Source: arXiv:2512.02556 (DeepSeek-V3.2-Exp), section 2.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import fp8_bits
from pallas_kernels import indexer_logits as kernel
from pallas_kernels.mesh_axes import varying
from pallas_kernels.plans.indexer import IndexerPlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import describe, require
from sparse_mla_jax.ops import fp8, topk
from sparse_mla_jax.ops._chunks import loop_to, map_row_chunks, rows_from
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops._row_bounds import ColumnBounds, clamp_rows
from sparse_mla_jax.ops._visible_keys import VisibleKeys, check_visible_keys, slots_of
from sparse_mla_jax.ops.cache import PagedIndexCache
from sparse_mla_jax.ops.indexer_context import all_visible, spread_keys

HIGHEST = jax.lax.Precision.HIGHEST
# Types of queries and keys.
_TYPES = (jnp.float32, jnp.bfloat16, fp8.E4M3FNUZ, fp8.E4M3FN)
# Per-head products of one step of the XLA body. More do not fit the CPU's cache and gain nothing (measured).
STEP_BYTES = 512 << 10
# Default bound on the scores that lightning_indexer holds at a time, in bytes.
MEMORY_LIMIT = 512 << 20


# --- public
def indexer_scores(
    q: Array,
    keys: Array,
    key_scales: Array | None,
    weights: Array,
    *,
    row_starts: Array,
    row_lengths: Array,
    implementation: str | None = None,
    plan: IndexerPlan | None = None,
    config: IndexerPlan | None = None,
) -> Array:
    """Scores of contiguous keys (prefill): row t scores columns row_starts[t] .. row_starts[t] + row_lengths[t] - 1.

    Args:
      q: [T, H, D] bfloat16, float32 or FP8. FP8 queries have no scale here: multiply it into `weights`. They must have
        the flavour of FP8 keys; NVIDIA's tensor cores then multiply both without decoding. With FP8 queries and keys,
        +-240 of e4m3fnuz (never stored by this library) counts as +-224 on NVIDIA GPUs and in interpret mode.
      keys: [N, D] FP8, bfloat16 or float32.
      key_scales: float32 [N] or [N, 1], positive; None when keys are not quantised.
      weights: float32 [T, H], any sign.
      row_starts, row_lengths: int32 [T] in columns, clamped as in `top_k`: first the start to [0, N], then the length,
        counted from there, to the columns that are left; negative lengths count as 0.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      float32 [T, N], -inf outside the row's columns. Sums are float32; float32 q is multiplied at highest precision.
      On NVIDIA GPUs, sums of FP8 queries with FP8 keys keep about 14 bits.

    Raises:
      ValueError: shapes or types that do not fit, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, IndexerPlan)
    keys = _check.array("keys", keys, _TYPES, "N", "D")
    q, weights = _check_queries(q, weights, keys.dtype)
    require(keys.shape[1] == q.shape[2], f"keys has {keys.shape[1]} dimensions and q {q.shape[2]}; they must agree.")
    if key_scales is not None:
        axes = (keys.shape[0], 1)[: max(1, np.ndim(key_scales))]
        key_scales = _check.floats("key_scales", key_scales, *axes, hint="One scale per key.").reshape(-1)
    bounds = clamp_rows(row_starts, row_lengths, rows=q.shape[0], columns=keys.shape[0])
    if q.shape[0] == 0 or keys.shape[0] == 0:
        check_implementation(implementation)
        return jnp.zeros((q.shape[0], keys.shape[0]), jnp.float32)
    args, definition = (q, keys, key_scales, weights, bounds), partial(_xla_ragged, reversible=True)
    return dispatch(
        "indexer_scores",
        implementation,
        {
            "triton": lambda: with_derivative_of(definition, partial(_triton_ragged, plan=plan), *args),
            "xla": lambda: with_derivative_of(definition, _xla_ragged, *args),
            "reference": lambda: reference.indexer_scores(
                _widen(q), keys, key_scales, weights, row_starts=bounds.starts, row_lengths=bounds.lengths
            ),
        },
    )


def paged_indexer_scores(
    q: Array,
    weights: Array,
    cache: PagedIndexCache,
    page_table: Array,
    request_ids: Array,
    lengths: Array,
    *,
    max_length: int,
    implementation: str | None = None,
    plan: IndexerPlan | None = None,
    config: IndexerPlan | None = None,
) -> Array:
    """Scores of the keys of each token's own request, read through its page table (decode, prefill and mixed steps).

    Args:
      q: [T, H, D] bfloat16, float32 or FP8 (without its scale, see `indexer_scores`).
      weights: float32 [T, H].
      cache: the index cache; the scales of its keys multiply the sums.
      page_table: int32 [B, P]; column p is the page of the request's positions from p * page_size on.
      request_ids: int32 [T]; a token whose id is outside [0, B) sees nothing.
      lengths: int32 [T], how many positions the token sees (its own included).
      max_length: columns of the result, at most P * page_size.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      float32 [T, max_length]. A column is a position in the request. Columns from lengths[t] on are -inf, and so are
      positions whose page is not one of the cache.

    Raises:
      ValueError: shapes or types that do not fit, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, IndexerPlan)
    q, weights = _check_queries(q, weights, getattr(cache, "dtype", None))
    keys = check_visible_keys(q, cache, page_table, request_ids, lengths, max_length)
    if 0 in (q.shape[0], keys.pages.shape[0], cache.num_slots):
        check_implementation(implementation)
        return jnp.full((q.shape[0], keys.columns), -jnp.inf, jnp.float32)
    args, definition = (q, weights, keys), partial(_xla_paged, reversible=True)
    return dispatch(
        "paged_indexer_scores",
        implementation,
        {
            "triton": lambda: with_derivative_of(definition, partial(_triton_paged, plan=plan), *args),
            "xla": lambda: with_derivative_of(definition, _xla_paged, *args),
            "reference": lambda: _reference_paged(_widen(q), weights, keys),
        },
    )


def lightning_indexer(
    q: Array,
    weights: Array,
    cache: PagedIndexCache,
    page_table: Array,
    request_ids: Array,
    lengths: Array,
    *,
    k: int,
    max_length: int,
    memory_limit: int = MEMORY_LIMIT,
    return_scores: bool = False,
    axis_name: str | None = None,
    own_keys: bool = False,
    implementation: str | None = None,
) -> Any:
    """The k highest-scored positions of each token's request: `paged_indexer_scores`, then `top_k`, by chunks of rows.

    Arguments as for `paged_indexer_scores`, and:
      k: how many positions a row selects.
      memory_limit: most bytes of float32 scores [rows, max_length] alive at a time.
      return_scores: also return the scores of the selected positions (static).
      axis_name: a mesh axis of the enclosing `jax.shard_map` over which the pages of every request are spread (static),
        see `ops.context_pages`: `cache` has the device's own pages, `page_table`, `lengths` and `max_length` are those
        of the whole requests, and positions are global. `ops.indexer_context` says what crosses devices.
      own_keys: with `axis_name`, only the selected positions that lie on this device (static).

    Returns:
      int32 [T, k]: min(k, lengths[t]) positions in ascending order, then -1; ties go to the lower position. If
      max_length <= k, every visible position is selected, and nothing is scored without return_scores. With it, also
      float32 [T, k], the scores of these positions: -inf for NaN and for -1. Neither has a derivative.

    Raises:
      ValueError: as `paged_indexer_scores`; k below 1; a memory_limit below one row of scores; an axis that does not
        exist here; own_keys without axis_name or with return_scores.
    """
    q, weights = _check_queries(q, weights, getattr(cache, "dtype", None))
    keys = check_visible_keys(q, cache, page_table, request_ids, lengths, max_length)
    k, tokens = topk.check_k(k), q.shape[0]
    spread = spread_keys(axis_name, keys.cache.page_size, own_keys=own_keys, return_scores=return_scores)
    check_implementation(implementation)
    # Positions are integers: they have no derivative, whatever q and the keys have.
    q, weights, cache = jax.lax.stop_gradient((q, weights, cache))
    if tokens == 0 or (keys.columns <= k and not return_scores):
        chosen = all_visible(keys.lengths, k, spread)
        return (chosen, jnp.full(chosen.shape, -jnp.inf, jnp.float32)) if return_scores else chosen
    own = keys if spread is None else spread.own(keys)
    columns = own.columns
    hint = f"One row of {columns} scores needs {4 * columns} bytes."
    memory_limit = _check.size("memory_limit", memory_limit, 4 * columns, hint=hint)
    chunk = min(tokens, memory_limit // (4 * columns))

    def body(first: Array) -> Any:
        queries, head_weights, requests, seen = (
            rows_from(x, first, chunk) for x in (q, weights, own.requests, own.lengths)
        )
        where = cache, own.pages, requests, seen
        scores = paged_indexer_scores(queries, head_weights, *where, max_length=columns, implementation=implementation)
        how: Any = dict(return_scores=return_scores, implementation=implementation)
        return topk.top_k(scores, k, seen, **how) if spread is None else spread.select(scores, seen, k, **how)

    operands = q, weights, keys
    return map_row_chunks(body, tokens, chunk, like=operands if spread is None else spread.type_of(operands))


# --- validation
def _check_queries(q: Any, weights: Any, key_dtype: Any) -> tuple[Array, Array]:
    """(q, weights in float32); raises ValueError for shapes and types that do not fit."""
    q = _check.array("q", q, _TYPES, "T", "H", "D")
    require(q.shape[1] * q.shape[2] > 0, f"q is {describe(q)}; expected H and D of at least 1.")
    weights = _check.floats("weights", weights, *q.shape[:2], hint="One per query head.")
    require(
        not (fp8.is_fp8(q.dtype) and key_dtype is not None and fp8.is_fp8(key_dtype)) or q.dtype == key_dtype,
        f"q is {q.dtype} and the keys are {key_dtype}; FP8 queries of FP8 keys must have their flavour. Quantise q to"
        f" {key_dtype}, or pass it as bfloat16.",
    )
    return q, weights


# --- XLA bodies
def _widen(q: Array) -> Array:
    """FP8 queries as bfloat16, exact; others unchanged."""
    return q.astype(jnp.bfloat16) if fp8.is_fp8(q.dtype) else q


def _stored(keys: Array) -> Array:
    """Keys as caches store them, FP8 as bytes: XLA:CPU would convert a whole FP8-typed array to move its rows."""
    return jax.lax.bitcast_convert_type(keys, jnp.uint8) if fp8.is_fp8(keys.dtype) else keys


def _float32(data: Array, dtype) -> Array:
    """Stored keys of type `dtype` as float32: FP8 codes are decoded but not scaled, others are cast."""
    return fp8_bits.decode_float32(data, dtype) if fp8.is_fp8(dtype) else data.astype(jnp.float32)


def _score(q: Array, keys: Array, scales: Array | None, weights: Array) -> Array:
    """Scores float32 [T, N] of q[T, H, D] and shared keys[N, D], or each token's own keys[T, N, D]."""
    spec = "thd,nd->thn" if keys.ndim == 2 else "thd,tnd->thn"
    dots = jnp.einsum(spec, q.astype(jnp.float32), keys, precision=HIGHEST)
    scores = (jnp.maximum(dots, 0.0) * weights[..., None]).sum(axis=1)
    return scores if scales is None else scores * scales


def _block(per_column: int, columns: int) -> int:
    """Columns per step, `per_column` bytes each: a multiple of 128 within STEP_BYTES; from 128 to `columns`."""
    return max(1, min(columns, max(128, STEP_BYTES // per_column // 128 * 128)))


def _over_columns(out: Array, last: Array, block: int, score, *, reversible: bool) -> Array:
    """Writes score(start, out) [T, block] into out[T, N] for each block of columns that begins before `last`."""
    columns = out.shape[1]

    def step(i, out):
        start = jnp.minimum(i * block, columns - block)
        return jax.lax.dynamic_update_slice_in_dim(out, score(start, out), start, 1)

    return loop_to((last + block - 1) // block, -(-columns // block), step, out, reversible=reversible)


def _xla_ragged(
    q: Array,
    keys: Array,
    scales: Array | None,
    weights: Array,
    bounds: ColumnBounds,
    *,
    reversible: bool = False,
) -> Array:
    """Scores chunks of rows by blocks of columns. Blocks past a chunk's last visible column are not computed.

    See `loop_to` for `reversible`.
    """
    q, (tokens, heads, _) = _widen(q), q.shape
    dtype, keys = keys.dtype, _stored(keys)
    chunk = min(tokens, 64)
    block = _block(4 * chunk * heads, keys.shape[0])

    def body(first: Array) -> Array:
        queries, head_weights, start, end = (
            rows_from(x, first, chunk) for x in (q, weights, bounds.starts, bounds.ends)
        )
        out = varying(jnp.full((chunk, keys.shape[0]), -jnp.inf, jnp.float32), q, keys, scales, weights, bounds)

        def score(at: Array, _: Array) -> Array:
            columns = _float32(jax.lax.dynamic_slice_in_dim(keys, at, block, 0), dtype)
            scale = None if scales is None else jax.lax.dynamic_slice_in_dim(scales, at, block, 0)
            column = at + jnp.arange(block)[None, :]
            is_visible = (column >= start[:, None]) & (column < end[:, None])
            return jnp.where(is_visible, _score(queries, columns, scale, head_weights), -jnp.inf)

        last = jnp.max(jnp.where(end > start, end, 0))
        return _over_columns(out, last, block, score, reversible=reversible)

    return map_row_chunks(body, tokens, chunk, like=(q, keys, scales, weights, bounds))


def _gather(cache: PagedIndexCache, slots: Array) -> tuple[Array, Array | None]:
    """Keys float32 [..., D] and scales [...] of `slots`. Slot -1 gives the key of slot 0; the caller masks it."""
    safe = jnp.maximum(slots, 0)
    keys = _float32(cache.data.reshape(cache.num_slots, -1).at[safe].get(mode="promise_in_bounds"), cache.dtype)
    if cache.scale is None:
        return keys, None
    return keys, cache.scale.reshape(-1).at[safe].get(mode="promise_in_bounds")


def _xla_paged(q: Array, weights: Array, keys: VisibleKeys, *, reversible: bool = False) -> Array:
    """Gathers keys once per token (few tokens per request), or once per request and chunk of tokens (many).

    See `loop_to` for `reversible`.
    """
    q, (tokens, heads, dim) = _widen(q), q.shape
    by_token = tokens <= 4 * keys.pages.shape[0]
    chunk = min(tokens, 32 if by_token else 64)
    block = _block(4 * chunk * (heads + dim if by_token else heads), keys.columns)

    def body(first: Array) -> Array:
        queries, head_weights, requests, lengths = (
            rows_from(x, first, chunk) for x in (q, weights, keys.requests, keys.lengths)
        )
        out = varying(jnp.full((chunk, keys.columns), -jnp.inf, jnp.float32), q, weights, keys)

        def score(start: Array, request: Array) -> tuple[Array, Array]:
            """Scores of `block` columns, and which are visible. `request`: int32 scalar, or one per token [chunk]."""
            columns = start + jnp.arange(block, dtype=jnp.int32)
            slots = slots_of(keys.pages.at[request].get(mode="clip"), keys.cache, columns)
            is_visible = (slots >= 0) & (columns[None, :] < lengths[:, None])
            return _score(queries, *_gather(keys.cache, slots), head_weights), is_visible

        def score_own(start: Array, _: Array) -> Array:
            scores, is_visible = score(start, requests)
            return jnp.where(is_visible, scores, -jnp.inf)

        def score_request(request: Array, out: Array) -> Array:
            def replace(start: Array, out: Array) -> Array:
                scores, is_visible = score(start, request)
                is_visible &= (requests == request)[:, None]
                return jnp.where(is_visible, scores, jax.lax.dynamic_slice_in_dim(out, start, block, 1))

            last = jnp.max(jnp.where(requests == request, lengths, 0))
            return _over_columns(out, last, block, replace, reversible=reversible)

        if by_token:
            return _over_columns(out, jnp.max(lengths), block, score_own, reversible=reversible)
        is_scored, count = lengths > 0, keys.pages.shape[0]
        low = jnp.min(jnp.where(is_scored, requests, count))
        high = jnp.max(jnp.where(is_scored, requests, -1)) + 1

        def score_next(i: Array, out: Array) -> Array:
            return score_request(low + i, out)

        return loop_to(high - low, count, score_next, out, reversible=reversible)

    return map_row_chunks(body, tokens, chunk, like=(q, weights, keys))


# --- reference and kernel bodies
def _reference_paged(q: Array, weights: Array, keys: VisibleKeys) -> Array:
    cache, columns = keys.cache, jnp.arange(keys.columns, dtype=jnp.int32)
    slots = slots_of(jnp.take(keys.pages, keys.requests, axis=0, mode="clip"), cache, columns)
    slots = jnp.where(columns[None, :] < keys.lengths[:, None], slots, -1)
    values = cache.key.reshape(cache.num_slots, -1)
    scales = None if cache.scale is None else cache.scale.reshape(-1)
    return reference.paged_indexer_scores(q, values, scales, weights, slots)


def _triton_ragged(
    q: Array,
    keys: Array,
    scales: Array | None,
    weights: Array,
    bounds: ColumnBounds,
    *,
    plan: IndexerPlan | None,
) -> Array:
    return kernel.ragged(q, _stored(keys), keys.dtype, scales, weights, bounds.starts, bounds.ends, plan=plan)


def _triton_paged(q: Array, weights: Array, keys: VisibleKeys, *, plan: IndexerPlan | None) -> Array:
    stored = keys.cache.data, keys.cache.dtype, keys.cache.scale
    where = keys.pages, keys.requests, keys.lengths
    return kernel.paged(q, *stored, weights, *where, max_length=keys.columns, plan=plan)
