"""Cases of the operators of attention: top-k, indexer scores, sparse attention of decode and prefill."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.bench_work import (
    DIM,
    LAYOUTS,
    PAGE,
    QUERIES,
    ROPE,
    VALUE_DIM,
    Case,
    Work,
    dense,
    distinct,
    gather,
    gather_index,
    index_cache,
    kv_cache,
    nbytes,
    permutation,
    random_slots,
    relative,
    sample,
    seed,
    take,
)
from sparse_mla_jax.kernel_cases import FP8, attention_answer
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.indexer import indexer_scores, lightning_indexer, paged_indexer_scores
from sparse_mla_jax.ops.ragged import DenseRows, pack_rows
from sparse_mla_jax.ops.topk import top_k
from sparse_mla_jax.ops.window import ring_size, window_slots

# --- top-k -----------------------------------------------------------------------------------------------------------
# Scores of a row: independent normals, or what is hard for a radix selection.
ROWS = ("random", "equal", "narrow", "up", "down", "plateau")


def _scores(kind: str, key: Array, rows: int, columns: int, k: int) -> Array:
    """float32 [rows, columns]."""
    shape = (rows, columns)
    if kind == "random":
        return jax.random.normal(key, shape)
    if kind == "equal":
        return jnp.full(shape, 1.5)
    if kind == "narrow":
        # Equal in all but the last ten bits.
        return 1 + jax.random.randint(key, shape, 0, 1 << 10).astype(jnp.float32) * 2.0**-23
    if kind in ("up", "down"):
        column = jnp.arange(columns, dtype=jnp.float32)
        return jnp.broadcast_to(column if kind == "up" else columns - column, shape)
    require(kind == "plateau", f"scores are {kind!r}; expected one of {', '.join(ROWS)}.")
    winners = distinct(key, rows, min(100, k // 2), columns)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.zeros(shape).at[row, winners].set(1 + jax.random.uniform(key, winners.shape))


def selected(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest of one row, ascending; ties to the lower column. Without NaN; all columns if k is more.

    Counts only, unlike every implementation: what is above the k-th largest, and the first of its equals.
    """
    if scores.size <= k:
        return np.arange(scores.size)
    least = np.partition(scores, scores.size - k)[scores.size - k]
    above, equal = scores > least, scores == least
    return np.flatnonzero(above | (equal & (np.cumsum(equal) <= k - above.sum())))


def _topk(sizes: Mapping[str, int], flavour: str, query: str, *, kind: str = "random") -> Work:
    del flavour, query
    rows, columns, k = sizes["rows"], sizes["columns"], sizes["k"]
    length = min(sizes.get("length", columns), columns)

    def each(number):
        scores = _scores(kind, seed(2, number), rows, columns, k)
        return (scores, jnp.full((rows,), length, jnp.int32)) if "length" in sizes else (scores,)

    def fn(scores, lengths=None, *, implementation=None):
        return top_k(scores, k, lengths, implementation=implementation)

    def error(arguments, got):
        # All rows, as long as that is quick.
        checked = np.arange(rows) if rows * length <= 1 << 24 else sample(rows)
        wrong = 0
        for row, mine in zip(take(arguments[0], checked), take(got, checked)):
            want = np.full(k, -1, np.int32)
            chosen_columns = selected(row[:length], k)
            want[: chosen_columns.size] = chosen_columns
            wrong += int((mine != want).sum())
        return float(wrong)

    return Work(fn, each, 4 * rows * (length + k), 0, error, 0.0)


# --- indexer ---------------------------------------------------------------------------------------------------------
def _queries(number: int, tokens: int, heads: int, query: str) -> tuple[Array, Array]:
    q = jax.random.normal(seed(3, number), (tokens, heads, DIM)).astype(jnp.dtype(query or "bfloat16"))
    return q, jax.random.normal(seed(4, number), (tokens, heads))


def _score_bound(query: str) -> float:
    """Of float32 sums, relative to the row's largest score; FP8 matrix units keep fewer bits of a sum."""
    return 5e-4 if query in FP8 else 1e-5


def _exact_scores(q: Any, weights: Any, keys: Any) -> np.ndarray:
    """float64 [N] of one query q[H, D], weights[H], dequantised keys[N, D]."""
    q, weights, keys = (np.asarray(x).astype(np.float64) for x in (q, weights, keys))
    return weights @ np.maximum(q @ keys.T, 0)


def _indexer(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    tokens, heads, keys = sizes["tokens"], sizes["heads"], sizes["keys"]

    def shared():
        stored = index_cache(flavour, keys, DIM)
        return stored.key.reshape(keys, DIM), stored.scale.reshape(keys)

    def each(number):
        return (
            *_queries(number, tokens, heads, query),
            jnp.zeros(tokens, jnp.int32),
            jnp.full(tokens, keys, jnp.int32),
        )

    def fn(keys, scales, q, weights, starts, lengths, *, implementation=None):
        return indexer_scores(
            q, keys, scales, weights, row_starts=starts, row_lengths=lengths, implementation=implementation
        )

    def error(arguments, got):
        stored, scales, q, weights = arguments[:4]
        exact = np.asarray(stored).astype(np.float64) * np.asarray(scales, np.float64)[:, None]
        some, worst = sample(tokens), 0.0
        for mine, query, weight in zip(take(got, some), take(q, some), take(weights, some)):
            want = _exact_scores(query, weight, exact)
            if not np.isfinite(mine).all():
                return math.inf
            worst = max(worst, float(np.abs(mine - want).max() / np.abs(want).max()))
        return worst

    inputs = jax.eval_shape(lambda: (shared(), each(0)))
    flops = 2 * tokens * heads * DIM * keys
    return Work(fn, each, nbytes(inputs) + 4 * tokens * keys, flops, error, _score_bound(query), shared)


def _paged(sizes: Mapping[str, int], flavour: str, query: str, *, select: bool = False) -> Work:
    """One query per request over pages in random order; `select` also takes the k best."""
    batch, heads, length, k = sizes["batch"], sizes["heads"], sizes["length"], sizes.get("k", 0)
    slots = max(sizes["slots"], batch * length)

    def each(number):
        pages = permutation(seed(5, number), slots // PAGE)
        table = pages[: batch * (length // PAGE)].reshape(batch, -1)
        requests, lengths = jnp.arange(batch, dtype=jnp.int32), jnp.full(batch, length, jnp.int32)
        return (*_queries(number, batch, heads, query), table, requests, lengths)

    def fn(cache, q, weights, table, requests, lengths, *, implementation=None):
        arguments = (q, weights, cache, table, requests, lengths)
        if select:
            return lightning_indexer(*arguments, k=k, max_length=length, implementation=implementation)
        return paged_indexer_scores(*arguments, max_length=length, implementation=implementation)

    def error(arguments, got):
        cache, q, weights, table = arguments[:4]
        some, worst = sample(batch), 0.0
        for mine, pages, query, weight in zip(*(take(x, some) for x in (got, table, q, weights))):
            at = (pages[:, None] * PAGE + np.arange(PAGE, dtype=np.int32)).reshape(-1)
            want = _exact_scores(query, weight, gather_index(cache, at, dtype=jnp.float32))
            off = _misplaced(want, mine, k) if select else np.abs(mine - want).max()
            worst = max(worst, float(off / np.abs(want).max())) if np.isfinite(off) else math.inf
        return worst

    bound = _score_bound(query) * (2 if select else 1)
    token = jax.eval_shape(lambda: index_cache(flavour, PAGE, DIM)).bytes_per_token
    size = nbytes(jax.eval_shape(lambda: each(0))) + batch * length * token + 4 * batch * (k if select else length)
    flops = 2 * batch * heads * DIM * length
    return Work(fn, each, size, flops, error, bound, lambda: (index_cache(flavour, slots, DIM),))


def _misplaced(scores: np.ndarray, chosen: np.ndarray, k: int) -> float:
    """By how much the best score left out exceeds the worst chosen; infinite unless k ascending columns were chosen."""
    wanted = min(k, scores.size)
    mine, rest = chosen[:wanted], chosen[wanted:]
    if (np.diff(mine) <= 0).any() or mine[0] < 0 or mine[-1] >= scores.size or (rest != -1).any():
        return math.inf
    others = np.delete(scores, mine)
    return max(0.0, float(others.max() - scores[mine].min())) if others.size else 0.0


# --- sparse attention ------------------------------------------------------------------------------------------------
# bfloat16 results, and weights that a kernel may round to bfloat16.
ATTENTION_BOUND = 4e-3


def row_lengths(rows: int, longest: int) -> np.ndarray:
    """Lengths of the ragged case: uniform from 64 (or an eighth of the longest) on."""
    return np.random.default_rng(7).integers(min(64, longest // 8), longest + 1, rows).astype(np.int32)


def _attention(sizes: Mapping[str, int], flavour: str, query: str, *, layout: str, own: bool, ragged: bool) -> Work:
    """`own`: every token reads its own part of the cache (decode); else all share it (prefill)."""
    del query
    tokens, heads, width, slots = sizes["batch" if own else "tokens"], sizes["heads"], sizes["selected"], sizes["slots"]
    dim = LAYOUTS[layout][0] + ROPE
    plain = flavour == "bfloat16"
    lengths = row_lengths(tokens, width) if ragged else np.full(tokens, width, np.int32)

    def shared():
        if plain:
            return (jax.random.normal(seed(8), (slots, dim), jnp.bfloat16),)
        return (kv_cache(layout, flavour, slots),)

    def each(number):
        rows: Any = random_slots(seed(9, number), tokens, width, slots, own=own)
        if ragged:
            rows = pack_rows(rows, jnp.asarray(lengths))
        return jax.random.normal(seed(10, number), (tokens, heads, dim), jnp.bfloat16), rows

    def fn(kv, q, rows, *, implementation=None):
        return sparse_mla(q, kv, rows, sm_scale=dim**-0.5, value_dim=VALUE_DIM, implementation=implementation)

    def error(arguments, got):
        kv, q, rows = arguments
        some = sample(tokens)
        at = take(dense(rows, width=width) if ragged else rows, some)
        keys = take(kv, at) if plain else np.asarray(gather(kv, at, dtype=jnp.float32))
        want = [
            attention_answer(one[None], mine, np.arange(n)[None], dim**-0.5, VALUE_DIM)[0]
            for one, mine, n in zip(take(q, some), keys, lengths[some])
        ]
        return relative(take(got, some), np.stack(want))

    token = 2 * dim if plain else jax.eval_shape(lambda: kv_cache(layout, flavour, PAGE)).bytes_per_token
    keys = int(lengths.sum())
    # A cache that all share is read once, whoever asks.
    size = token * (keys if own else min(keys, slots)) + 4 * keys + 2 * tokens * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


def _two_sources(
    sizes: Mapping[str, int],
    flavour: str,
    *,
    slots: tuple[int, int],
    lengths: tuple[np.ndarray, np.ndarray],
    rows: Callable[[int], tuple[Array, Array]],
    read: int,
) -> Work:
    """DeepSeek-V4: a window in rings and compressed entries, two caches and sinks under one softmax.

    Args:
      sizes: `heads`.
      flavour: type of both caches.
      slots: of the caches of windows and of entries.
      lengths: int32 [T] keys of every token in each.
      rows: number of a set -> slots int32 [T, widths] in each, of which the first `lengths` count.
      read: keys that must be read, however many tokens ask for one.
    """
    heads, tokens, dim = sizes["heads"], lengths[0].size, LAYOUTS["v4"][0] + ROPE

    def shared():
        return tuple(kv_cache("v4", flavour, n) for n in slots)

    def each(number):
        both = (DenseRows(*x) for x in zip(rows(number), (jnp.asarray(n) for n in lengths)))
        q = jax.random.normal(seed(17, number), (tokens, heads, dim), jnp.bfloat16)
        return q, *both, jax.random.normal(seed(18, number), (heads,))

    def fn(near, far, q, near_rows, far_rows, sinks, *, implementation=None):
        return sparse_mla(
            q,
            near,
            near_rows,
            sm_scale=dim**-0.5,
            value_dim=VALUE_DIM,
            sinks=sinks,
            extra=(far, far_rows),
            implementation=implementation,
        )

    def error(arguments, got):
        near, far, q, near_rows, far_rows, sinks = arguments
        some, want = sample(tokens), []
        keys = [
            np.asarray(gather(cache, take(rows.values, some)[:, : n.max()], dtype=jnp.float32))
            for cache, rows, n in ((near, near_rows, lengths[0]), (far, far_rows, lengths[1]))
        ]
        for i, (t, one) in enumerate(zip(some, take(q, some))):
            mine = np.concatenate([source[i, : n[t]] for source, n in zip(keys, lengths)])
            every = np.arange(len(mine))[None]
            want.append(attention_answer(one[None], mine, every, dim**-0.5, VALUE_DIM, np.asarray(sinks))[0])
        return relative(take(got, some), np.stack(want))

    token = jax.eval_shape(lambda: kv_cache("v4", flavour, PAGE)).bytes_per_token
    keys = int(sum(n.sum() for n in lengths))
    size = token * read + 4 * keys + 2 * tokens * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


def _two_sources_decode(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Every request has a window and `selected` entries of its own, the latter in rows `width` wide."""
    del query
    batch, window, selected = (sizes[name] for name in ("batch", "window", "selected"))
    slots = sizes["rings"], sizes["slots"]

    def rows(number):
        near, far = (
            random_slots(seed(key, number), batch, count, room, own=True)
            for key, count, room in zip((15, 16), (window, selected), slots)
        )
        return near, jnp.pad(far, ((0, 0), (0, sizes["width"] - selected)), constant_values=-1)

    lengths = np.full(batch, window, np.int32), np.full(batch, selected, np.int32)
    return _two_sources(sizes, flavour, slots=slots, lengths=lengths, rows=rows, read=batch * (window + selected))


def _two_sources_prefill(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """The last `tokens` of a context of `length`: a window each, and `selected` entries or, where that is 0, all."""
    del query
    tokens, length, window, selected = (sizes[name] for name in ("tokens", "length", "window", "selected"))
    ring, entries = ring_size(window, tokens), length // sizes["ratio"]
    slots = -(-ring // PAGE) * PAGE, -(-entries // PAGE) * PAGE
    positions = np.arange(length - tokens, length, dtype=np.int32)
    far = np.full(tokens, selected, np.int32) if selected else (positions + 1) // sizes["ratio"]

    def rows(number):
        near = window_slots(jnp.asarray(positions), jnp.zeros(tokens, jnp.int32), window=window, ring=ring)
        if selected:
            return near, random_slots(seed(16, number), tokens, selected, slots[1], own=False)
        # Two of ratio 128 lie in a page of 256 tokens.
        pages = permutation(seed(16, number), slots[1] // 2)
        every = (2 * pages[:, None] + jnp.arange(2, dtype=jnp.int32)).reshape(-1)[:entries]
        return near, jnp.broadcast_to(every, (tokens, entries))

    lengths = np.minimum(positions + 1, window), far
    read = ring + min(int(far.sum()), entries)
    return _two_sources(sizes, flavour, slots=slots, lengths=lengths, rows=rows, read=read)


# --- the list --------------------------------------------------------------------------------------------------------
# rows, columns: the best CUDA figure, microseconds; k 2048.
_TOPK_BEST = {
    (1, 8192): 4.7,
    (1, 32768): 9.8,
    (1, 131072): 13.0,
    (32, 8192): 5.2,
    (32, 32768): 17.7,
    (32, 131072): 29.7,
    (64, 131072): 29.9,
    (128, 8192): 5.2,
    (128, 32768): 15.6,
    (128, 131072): 30.8,
    (256, 131072): 59.5,
    (1024, 8192): 30.8,
    (1024, 32768): 102.0,
    (4096, 16384): 202.0,
    (2048, 131072): 664.0,
}
# batch, heads, selected: reach and floor.
_DECODE = {
    (1, 16, 2048): (9.0, 14.0),
    (8, 16, 2048): (12.0, 17.0),
    (32, 16, 2048): (20.0, 36.0),
    (64, 16, 2048): (32.0, 55.0),
    (128, 16, 2048): (50.0, 90.0),
    (256, 16, 2048): (95.0, 175.0),
    (1, 128, 2048): (15.0, 18.8),
    (32, 128, 2048): (65.0, 120.0),
    (128, 128, 2048): (195.0, 400.0),
    (128, 64, 512): (36.0, 60.0),
}


def _topk_case(rows: int, columns: int, k: int = 2048, *, kind: str = "random", suffix: str = "", **given: Any) -> Case:
    sizes = {"rows": rows, "columns": columns, "k": k} | ({"length": given.pop("length")} if "length" in given else {})
    make = functools.partial(_topk, kind=kind)
    return Case(f"topk-{rows}x{columns}{suffix}", "topk", sizes, make, ("",), **given)


def topk_cases() -> Iterator[Case]:
    """Exact top-k of rows of scores."""
    for (rows, columns), best in _TOPK_BEST.items():
        yield _topk_case(rows, columns, reach=best, floor=best * (1.6 if rows <= 256 else 1.0))
    for k in (512, 1024):
        yield _topk_case(32, 32768, k, suffix=f"-k{k}")
    yield _topk_case(64, 131072, suffix="-length4096", length=4096)
    yield _topk_case(64, 65536)
    yield _topk_case(64, 32768)
    for kind in ROWS[1:]:
        yield _topk_case(64, 32768, kind=kind, suffix=f"-{kind}", at_most=(3.0, "topk-64x32768"))


def _indexer_case(name: str, make: Any, reach: float | None = None, floor: float | None = None, **sizes: int) -> Case:
    return Case(f"indexer-{name}", "indexer", {"heads": 64, **sizes}, make, FP8, QUERIES, reach, floor)


def indexer_cases() -> Iterator[Case]:
    """Scores of contiguous and paged keys, and the selection from them."""
    yield _indexer_case("1024x8192", _indexer, 147.0, tokens=1024, keys=8192)
    # Targets of 1000 and 450 TFLOPS.
    work = 2 * 2048 * 32768 * 64 * DIM * 1e-6
    yield _indexer_case("2048x32768", _indexer, work / 1000, work / 450, tokens=2048, keys=32768)
    yield _indexer_case("4096x65536", _indexer, tokens=4096, keys=65536)
    # Enough slots that the keys of other calls fill the last-level cache.
    slots = 1 << 20
    for batch, reach in ((1, 9.0), (8, 14.0), (32, 30.0), (64, 48.0)):
        yield _indexer_case(f"paged-{batch}x16384", _paged, reach, 2 * reach, batch=batch, length=16384, slots=slots)
    yield _indexer_case("paged-64x65536", _paged, 149.0, batch=64, length=65536, slots=slots)
    select = functools.partial(_paged, select=True)
    whole = _indexer_case("select-64x65536", select, batch=64, length=65536, slots=slots, k=2048)
    yield dataclasses.replace(whole, parts=("indexer-paged-64x65536", "topk-64x65536"))


def _decode_case(layout: str, batch: int, heads: int, width: int, *, ragged: bool = False, **given: Any) -> Case:
    # Every request has a context of its own; small batches read from a cache far larger than the last-level one.
    slots = batch * max(4 * width, (1 << 18) // batch)
    sizes = {"batch": batch, "heads": heads, "selected": width, "slots": slots}
    make = functools.partial(_attention, layout=layout, own=True, ragged=ragged)
    return Case(
        f"decode-{layout}-b{batch}-h{heads}-k{width}{'-ragged' if ragged else ''}", "decode", sizes, make, **given
    )


def _two_source_case(batch: int, heads: int, selected: int, *, width: int | None = None, **given: Any) -> Case:
    window, wide = 128, f"-of-{width}" if width else ""
    sizes = {"batch": batch, "heads": heads, "window": window, "selected": selected, "width": width or selected}
    sizes |= {"rings": batch * max(2 * window, (1 << 16) // batch), "slots": 1 << 18}
    name = f"decode-v4-b{batch}-h{heads}-w{window}-k{selected}{wide}"
    return Case(name, "decode", sizes, _two_sources_decode, **given)


def decode_cases() -> Iterator[Case]:
    """Sparse attention with one query per request."""
    for layout in LAYOUTS:
        for (batch, heads, width), (reach, floor) in _DECODE.items():
            yield _decode_case(layout, batch, heads, width, reach=reach, floor=floor)
        yield _decode_case(layout, 128, 8, 2048, at_most=(1.0, f"decode-{layout}-b128-h16-k2048"))
        yield _decode_case(layout, 128, 16, 2048, ragged=True)
    # DeepSeek-V4: two sources against one of as many rows.
    yield _decode_case("v4", 128, 64, 640)
    yield _two_source_case(128, 64, 512, at_most=(1.25, "decode-v4-b128-h64-k640"))
    yield _two_source_case(64, 16, 512, floor=25.0)
    # Every entry of ratio 128 of 32768 tokens, in rows for a million: what is read decides.
    yield _decode_case("v4", 128, 64, 384)
    yield _two_source_case(128, 64, 256, width=8192, at_most=(1.25, "decode-v4-b128-h64-k384"))


def prefill_cases() -> Iterator[Case]:
    """Sparse attention of a chunk of one prompt: V3.2 over bfloat16 and FP8 rows, V4 over two sources."""
    make = functools.partial(_attention, layout="v32", own=False, ragged=False)
    for heads, reach, floor in ((16, 300.0, 650.0), (128, 1157.0, 2600.0)):
        sizes = {"tokens": 1024, "heads": heads, "selected": 2048, "slots": 131072}
        yield Case(
            f"prefill-t1024-h{heads}-k2048", "prefill", sizes, make, (*FP8, "bfloat16"), reach=reach, floor=floor
        )
    # DeepSeek-V4's layers of ratio 4, and of ratio 128 with 240 to 256 entries.
    both = {"tokens": 2048, "heads": 64, "window": 128, "length": 32768}
    for ratio, selected, name in ((4, 512, "k512"), (128, 0, "all-of-256")):
        sizes = both | {"ratio": ratio, "selected": selected}
        yield Case(f"prefill-v4-t2048-h64-w128-{name}", "prefill", sizes, _two_sources_prefill)
