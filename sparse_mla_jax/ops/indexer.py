"""The lightning indexer: cheap scores of every visible key, from which top-k chooses what attention reads.

    score[t, n] = key_scale[n] * sum_h weights[t, h] * relu(q[t, h] . key[n])

Quantised keys enter at face value and their positive scale multiplies after the sum over heads. Source of the method:
DeepSeek-V3.2-Exp's technical report (arXiv:2512.02556), section 2.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits
from pallas_kernels.plans.indexer import IndexerPlan
from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops import fp8, topk
from sparse_mla_jax.ops._chunks import map_row_chunks, rows_from, varying
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_config
from sparse_mla_jax.ops.cache import PagedIndexCache

HIGHEST = jax.lax.Precision.HIGHEST
# Per-head products of one step of the XLA body: more leaves the CPU's cache and gains nothing (measured).
STEP_BYTES = 512 << 10
# Scores that lightning_indexer holds at a time unless told otherwise.
MEMORY_LIMIT = 512 << 20


# --- public ----------------------------------------------------------------------------------------------------------
def indexer_scores(
    q: Array,
    keys: Array,
    key_scales: Array | None,
    weights: Array,
    *,
    row_starts: Array,
    row_lengths: Array,
    implementation: str | None = None,
    config: IndexerPlan | None = None,
) -> Array:
    """Scores of contiguous keys (prefill): row t scores columns row_starts[t] .. row_starts[t] + row_lengths[t] - 1.

    Args:
      q: [T, H, D] bfloat16, float32 or FP8 (taken at face value, its scale belongs into `weights`; with FP8 keys of
        their flavour, so that NVIDIA's matrix units multiply them as they are; there +-240 of e4m3fnuz, which this
        library never stores, counts as +-224).
      keys: [N, D] FP8, bfloat16 or float32.
      key_scales: float32 [N] or [N, 1], positive; None when keys are not quantised.
      weights: float32 [T, H], any sign.
      row_starts, row_lengths: int32 [T] in columns; clamped to the array, negative lengths are 0.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      float32 [T, N], -inf outside the row's columns. Sums are float32; float32 q is multiplied at highest precision.

    Raises:
      ValueError: shapes or types that do not fit, or an implementation that does not serve the case.
    """
    implementation = with_config(implementation, config, IndexerPlan)
    weights = _check_queries(q, weights, keys.dtype)
    _check_keys("keys", keys, q.shape[2])
    if key_scales is not None:
        require(
            key_scales.size == keys.shape[0],
            f"key_scales has shape {key_scales.shape}; expected [N] with N = {keys.shape[0]}, one scale per key.",
        )
        key_scales = key_scales.reshape(-1).astype(jnp.float32)
    starts = _ints("row_starts", row_starts, q.shape[0])
    ends = jnp.clip(starts + jnp.maximum(_ints("row_lengths", row_lengths, q.shape[0]), 0), 0, keys.shape[0])
    starts = jnp.clip(starts, 0, keys.shape[0])
    if q.shape[0] == 0 or keys.shape[0] == 0:
        check_implementation(implementation)
        return jnp.zeros((q.shape[0], keys.shape[0]), jnp.float32)
    return dispatch(
        "indexer_scores",
        implementation,
        {
            "triton": lambda: _triton_ragged(q, keys, key_scales, weights, starts, ends, config),
            "xla": lambda: _xla_ragged(_wide(q), keys, key_scales, weights, starts, ends, STEP_BYTES),
            "reference": lambda: reference.indexer_scores(
                _wide(q), keys, key_scales, weights, row_starts=starts, row_lengths=ends - starts
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
    config: IndexerPlan | None = None,
) -> Array:
    """Scores of the keys of each token's own request, read through its page table (decode, prefill and mixed steps).

    Args:
      q: [T, H, D] bfloat16, float32 or FP8 (at face value, see indexer_scores).
      weights: float32 [T, H].
      cache: the index cache; its keys are taken at face value, its scales multiply the sums.
      page_table: int32 [B, P], the page of every page_size positions of a request.
      request_ids: int32 [T]; outside [0, B) the token sees nothing.
      lengths: int32 [T], how many positions the token sees (its own included).
      max_length: columns of the result, at most P * page_size.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      float32 [T, max_length]; column = position in the request; -inf at columns >= lengths[t] and where the page table
      names no page of the cache.

    Raises:
      ValueError: shapes or types that do not fit, or an implementation that does not serve the case.
    """
    implementation = with_config(implementation, config, IndexerPlan)
    weights = _check_queries(q, weights, getattr(cache, "dtype", None))
    pages, requests, lengths = _check_paged(q, cache, page_table, request_ids, lengths, max_length)
    if 0 in (q.shape[0], page_table.shape[0], cache.num_slots):
        check_implementation(implementation)
        return jnp.full((q.shape[0], max_length), -jnp.inf)
    return dispatch(
        "paged_indexer_scores",
        implementation,
        {
            "triton": lambda: _triton_paged(q, weights, cache, pages, requests, lengths, max_length, config),
            "xla": lambda: _xla_paged(_wide(q), weights, cache, pages, requests, lengths, max_length, STEP_BYTES),
            "reference": lambda: _reference_paged(_wide(q), weights, cache, pages, requests, lengths, max_length),
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
    implementation: str | None = None,
) -> Array:
    """The k best positions of each token's request: paged_indexer_scores followed by top_k, a chunk of rows at a time.

    Arguments as for `paged_indexer_scores`, and:
      k: how many positions a row selects.
      memory_limit: bytes; the float32 scores [rows, max_length] alive at a time never exceed it.

    Returns:
      int32 [T, k]: positions in ascending order, then -1; min(k, lengths[t]) of them, ties to the lower position. When
      max_length <= k nothing is scored: every visible position is selected.

    Raises:
      ValueError: as above; k below 1; a memory_limit that does not hold one row of scores.
    """
    weights = _check_queries(q, weights, getattr(cache, "dtype", None))
    pages, requests, lengths = _check_paged(q, cache, page_table, request_ids, lengths, max_length)
    require(isinstance(k, int) and k >= 1, f"k is {k!r}; expected an int of at least 1.")
    check_implementation(implementation)
    tokens = q.shape[0]
    if max_length <= k or tokens == 0:
        positions = jnp.arange(k, dtype=jnp.int32)[None, :]
        return jnp.where(positions < lengths[:, None], positions, -1)
    require(
        memory_limit >= 4 * max_length,
        f"memory_limit is {memory_limit} bytes; one row of {max_length} scores needs {4 * max_length}. Raise it.",
    )
    chunk = min(tokens, memory_limit // (4 * max_length))

    def body(first: Array) -> Array:
        mine = [rows_from(x, first, chunk) for x in (q, weights, requests, lengths)]
        scores = paged_indexer_scores(
            mine[0], mine[1], cache, pages, mine[2], mine[3], max_length=max_length, implementation=implementation
        )
        return topk.top_k(scores, k, mine[3], implementation=implementation)

    return map_row_chunks(body, tokens, chunk, like=(q, weights, cache, pages, requests, lengths))


# --- validation ------------------------------------------------------------------------------------------------------
def _check_queries(q: Any, weights: Any, key_dtype: Any) -> Array:
    """Raises ValueError for what does not fit; returns weights as float32."""
    require(
        q.ndim == 3 and (q.dtype in (jnp.bfloat16, jnp.float32) or fp8.is_fp8(q.dtype)) and q.shape[1] * q.shape[2] > 0,
        f"q is {q.dtype}{q.shape}; expected bfloat16, float32 or FP8 [T, H, D].",
    )
    require(
        tuple(weights.shape) == tuple(q.shape[:2]) and jnp.issubdtype(weights.dtype, jnp.floating),
        f"weights is {weights.dtype}{weights.shape}; expected float32 [T, H] = {q.shape[:2]}, one per query head.",
    )
    require(
        not (fp8.is_fp8(q.dtype) and key_dtype is not None and fp8.is_fp8(key_dtype)) or q.dtype == key_dtype,
        f"q is {q.dtype} and the keys are {key_dtype}; FP8 queries of FP8 keys must have their flavour. Quantise q to"
        f" {key_dtype}, or pass it as bfloat16.",
    )
    return weights.astype(jnp.float32)


def _check_keys(name: str, keys: Any, dim: int) -> None:
    require(
        keys.ndim == 2 and (keys.dtype in (jnp.bfloat16, jnp.float32) or fp8.is_fp8(keys.dtype)),
        f"{name} is {keys.dtype}{keys.shape}; expected FP8, bfloat16 or float32 [N, D].",
    )
    require(keys.shape[1] == dim, f"{name} has {keys.shape[1]} dimensions and q {dim}; they must agree.")


def _ints(name: str, x: Any, tokens: int) -> Array:
    require(
        jnp.shape(x) == (tokens,) and jnp.issubdtype(jnp.result_type(x), jnp.integer),
        f"{name} is {jnp.result_type(x)}{jnp.shape(x)}; expected int32 [T] with T = {tokens}.",
    )
    return jnp.asarray(x).astype(jnp.int32)


def _check_paged(q, cache, page_table, request_ids, lengths, max_length) -> tuple[Array, Array, Array]:
    """Raises ValueError for what does not fit; returns page_table, request ids and lengths, cleared of nonsense."""
    require(
        isinstance(cache, PagedIndexCache), f"cache is {type(cache).__name__}; expected a PagedIndexCache (see create)."
    )
    require(
        cache.dim == q.shape[2], f"cache has keys of {cache.dim} dimensions and q of {q.shape[2]}; they must agree."
    )
    require(
        page_table.ndim == 2 and jnp.issubdtype(page_table.dtype, jnp.integer),
        f"page_table is {page_table.dtype}{page_table.shape}; expected int32 [B, P], the pages of every request.",
    )
    room = page_table.shape[1] * cache.page_size
    require(
        isinstance(max_length, int) and 1 <= max_length <= room,
        f"max_length is {max_length!r}; expected an int from 1 to P * page_size = {room}. Widen the page_table.",
    )
    requests, lengths = _ints("request_ids", request_ids, q.shape[0]), _ints("lengths", lengths, q.shape[0])
    known = (requests >= 0) & (requests < page_table.shape[0])
    return page_table.astype(jnp.int32), requests, jnp.where(known, jnp.clip(lengths, 0, max_length), 0)


# --- XLA bodies ------------------------------------------------------------------------------------------------------
def _wide(q: Array) -> Array:
    """FP8 queries as bfloat16, exact."""
    return q.astype(jnp.bfloat16) if fp8.is_fp8(q.dtype) else q


def _stored(keys: Array) -> Array:
    """Keys as caches store them: FP8 as bytes (XLA:CPU moves FP8-typed rows by converting whole arrays)."""
    return jax.lax.bitcast_convert_type(keys, jnp.uint8) if fp8.is_fp8(keys.dtype) else keys


def _float32(data: Array, dtype) -> Array:
    """Stored keys of type `dtype` at face value: FP8 codes decoded (not scaled), the rest cast."""
    return fp8_bits.decode_float32(data, dtype) if fp8.is_fp8(dtype) else data.astype(jnp.float32)


def _score(q: Array, keys: Array, scales: Array | None, weights: Array) -> Array:
    """float32 [T, N] from q[T, H, D] and keys[N, D], or keys[T, N, D] of each token's own."""
    spec = "thd,nd->thn" if keys.ndim == 2 else "thd,tnd->thn"
    dots = jnp.einsum(spec, q.astype(jnp.float32), keys, precision=HIGHEST)
    scores = (jnp.maximum(dots, 0.0) * weights[..., None]).sum(axis=1)
    return scores if scales is None else scores * scales


def _block(per_column: int, columns: int, budget: int) -> int:
    """Columns per step, so that `per_column` bytes each stay within `budget`; at least 128 of them."""
    return max(1, min(columns, max(128, budget // per_column // 128 * 128)))


def _over_columns(out: Array, last: Array, block: int, score) -> Array:
    """Writes score(start) [T, block] into out[T, N] for the blocks of columns that begin before `last`."""
    columns = out.shape[1]

    def step(i, out):
        start = jnp.minimum(i * block, columns - block)
        return jax.lax.dynamic_update_slice_in_dim(out, score(start, out), start, 1)

    return jax.lax.fori_loop(0, (jnp.minimum(last, columns) + block - 1) // block, step, out)


def _xla_ragged(q, keys, scales, weights, starts, ends, budget: int) -> Array:
    """Chunks of rows times blocks of columns; blocks past a chunk's last visible column are not computed."""
    tokens, heads, _ = q.shape
    dtype, keys = keys.dtype, _stored(keys)
    chunk = min(tokens, 64)
    block = _block(4 * chunk * heads, keys.shape[0], budget)

    def body(first):
        mine, weight, start, end = (rows_from(x, first, chunk) for x in (q, weights, starts, ends))
        out = varying(jnp.full((chunk, keys.shape[0]), -jnp.inf), q, keys, scales, weights, starts, ends)

        def score(at, _):
            some = _float32(jax.lax.dynamic_slice_in_dim(keys, at, block, 0), dtype)
            scale = None if scales is None else jax.lax.dynamic_slice_in_dim(scales, at, block, 0)
            column = at + jnp.arange(block)[None, :]
            inside = (column >= start[:, None]) & (column < end[:, None])
            return jnp.where(inside, _score(mine, some, scale, weight), -jnp.inf)

        return _over_columns(out, jnp.max(jnp.where(end > start, end, 0)), block, score)

    return map_row_chunks(body, tokens, chunk, like=(q, keys, scales, weights, starts, ends))


def _slots(pages: Array, page_size: int, num_pages: int, columns: Array) -> Array:
    """Slots of positions `columns`[n] in page rows `pages`[..., P]: int32 [..., n], -1 where there is no such page."""
    page = jnp.take(pages, columns // page_size, axis=-1, mode="clip")
    return jnp.where((page >= 0) & (page < num_pages), page * page_size + columns % page_size, -1)


def _gather(cache: PagedIndexCache, slots: Array) -> tuple[Array, Array | None, Array]:
    """Keys float32 [..., D], scales [...] and validity of `slots`; invalid ones read slot 0 and are masked later."""
    valid = slots >= 0
    safe = jnp.where(valid, slots, 0)
    keys = _float32(cache.data.reshape(cache.num_slots, -1).at[safe].get(mode="promise_in_bounds"), cache.dtype)
    if cache.scale is None:
        return keys, None, valid
    return keys, cache.scale.reshape(-1).at[safe].get(mode="promise_in_bounds"), valid


def _xla_paged(q, weights, cache, pages, requests, lengths, max_length: int, budget: int) -> Array:
    """Few tokens per request: keys are gathered for every token. Many: once per request and chunk of tokens."""
    tokens, heads, dim = q.shape
    alone = tokens <= 4 * pages.shape[0]
    chunk = min(tokens, 32 if alone else 64)
    block = _block(4 * chunk * (heads + dim if alone else heads), max_length, budget)
    like = (q, weights, cache, pages, requests, lengths)

    def body(first):
        mine, weight, request, length = (rows_from(x, first, chunk) for x in (q, weights, requests, lengths))
        out = varying(jnp.full((chunk, max_length), -jnp.inf), like)

        def score(at, old, one=None):
            columns = at + jnp.arange(block, dtype=jnp.int32)
            own = pages.at[request].get(mode="clip") if one is None else pages.at[one].get(mode="clip")
            keys, scales, valid = _gather(cache, _slots(own, cache.page_size, cache.num_pages, columns))
            inside = valid & (columns[None, :] < length[:, None])
            rest = jnp.full((), -jnp.inf)
            if one is not None:
                inside = inside & (request == one)[:, None]
                rest = jax.lax.dynamic_slice_in_dim(old, at, block, 1)
            return jnp.where(inside, _score(mine, keys, scales, weight), rest)

        if alone:
            return _over_columns(out, jnp.max(length), block, score)

        def one_request(one, out):
            last = jnp.max(jnp.where(request == one, length, 0))
            return _over_columns(out, last, block, lambda at, old: score(at, old, one))

        seen = length > 0
        low = jnp.min(jnp.where(seen, request, pages.shape[0]))
        return jax.lax.fori_loop(low, jnp.max(jnp.where(seen, request, -1)) + 1, one_request, out)

    return map_row_chunks(body, tokens, chunk, like=like)


# --- reference and kernel bodies -------------------------------------------------------------------------------------
def _reference_paged(q, weights, cache, pages, requests, lengths, max_length: int) -> Array:
    columns = jnp.arange(max_length, dtype=jnp.int32)
    slots = _slots(jnp.take(pages, requests, axis=0, mode="clip"), cache.page_size, cache.num_pages, columns)
    slots = jnp.where(columns[None, :] < lengths[:, None], slots, -1)
    keys = cache.key.reshape(cache.num_slots, -1)
    scales = None if cache.scale is None else cache.scale.reshape(-1)
    return reference.paged_indexer_scores(q, keys, scales, weights, slots)


def _triton_ragged(q, keys, scales, weights, starts, ends, plan: IndexerPlan | None) -> Array:
    from pallas_kernels import indexer_logits

    return indexer_logits.ragged(q, _stored(keys), keys.dtype, scales, weights, starts, ends, plan=plan)


def _triton_paged(q, weights, cache, pages, requests, lengths, max_length: int, plan: IndexerPlan | None) -> Array:
    from pallas_kernels import indexer_logits

    return indexer_logits.paged(
        q, cache.data, cache.dtype, cache.scale, weights, pages, requests, lengths, max_length=max_length, plan=plan
    )
