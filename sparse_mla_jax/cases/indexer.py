"""Cases of the lightning indexer: scores of contiguous and paged keys, and the selection from them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.cases.answers import (
    exact_scores,
    misplaced,
    score_error,
    scores_answer,
)
from sparse_mla_jax.cases.case import FP8, Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    DIM,
    PAGE,
    QUERIES,
    gather_index,
    index_cache,
    nbytes,
    permutation,
    random_index_keys,
    sample,
    seed,
    take,
)
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.indexer import indexer_scores, lightning_indexer, paged_indexer_scores


def _queries(number: int, tokens: int, heads: int, query: str) -> tuple[Array, Array]:
    q = jax.random.normal(seed(3, number), (tokens, heads, DIM), jnp.float32).astype(jnp.dtype(query or "bfloat16"))
    return q, jax.random.normal(seed(4, number), (tokens, heads), jnp.float32)


def _score_bound(query: str) -> float:
    """Bound relative to the row's largest score: float32 sums, or FP8 tensor cores, which keep fewer bits of a sum."""
    return 5e-4 if query in FP8 else 1e-5


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
            want = exact_scores(query, weight, exact)
            if not np.isfinite(mine).all():
                return math.inf
            worst = max(worst, float(np.abs(mine - want).max() / np.abs(want).max()))
        return worst

    inputs = jax.eval_shape(lambda: (shared(), each(0)))
    flops = 2 * tokens * heads * DIM * keys
    return Work(fn, each, nbytes(inputs) + 4 * tokens * keys, flops, error, _score_bound(query), shared)


def _paged(sizes: Mapping[str, int], flavour: str, query: str, *, select: bool = False) -> Work:
    """One query per request over pages in random order; `select`: also top-k of the scores."""
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
            want = exact_scores(query, weight, gather_index(cache, at, dtype=jnp.float32))
            off = misplaced(want, mine, k) if select else np.abs(mine - want).max()
            worst = max(worst, float(off / np.abs(want).max())) if np.isfinite(off) else math.inf
        return worst

    bound = _score_bound(query) * (2 if select else 1)
    token = jax.eval_shape(lambda: index_cache(flavour, PAGE, DIM)).bytes_per_token
    size = nbytes(jax.eval_shape(lambda: each(0))) + batch * length * token + 4 * batch * (k if select else length)
    flops = 2 * batch * heads * DIM * length
    return Work(fn, each, size, flops, error, bound, lambda: (index_cache(flavour, slots, DIM),))


def _indexer_case(name: str, make: Any, reach: float | None = None, floor: float | None = None, **sizes: int) -> Case:
    return Case(f"indexer-{name}", "indexer", {"heads": 64, **sizes}, make, FP8, QUERIES, reach, floor)


def indexer_cases() -> Iterator[Case]:
    """Scores of contiguous and paged keys, and the selection from them."""
    yield _indexer_case("1024x8192", _indexer, 147.0, tokens=1024, keys=8192)
    # Targets of 1000 and 450 TFLOPS.
    work = 2 * 2048 * 32768 * 64 * DIM * 1e-6
    yield _indexer_case("2048x32768", _indexer, work / 1000, work / 450, tokens=2048, keys=32768)
    yield _indexer_case("4096x65536", _indexer, tokens=4096, keys=65536)
    # Enough slots that the keys of other calls evict a call's keys from the last-level cache.
    slots = 1 << 20
    for batch, reach in ((1, 9.0), (8, 14.0), (32, 30.0), (64, 48.0)):
        yield _indexer_case(f"paged-{batch}x16384", _paged, reach, 2 * reach, batch=batch, length=16384, slots=slots)
    yield _indexer_case("paged-64x65536", _paged, 149.0, batch=64, length=65536, slots=slots)
    select = functools.partial(_paged, select=True)
    whole = _indexer_case("select-64x65536", select, batch=64, length=65536, slots=slots, k=2048)
    yield dataclasses.replace(whole, parts=("indexer-paged-64x65536", "topk-64x65536"))


def _kernel_queries(rng: np.random.Generator, tokens: int, heads: int | None, kind: str) -> tuple[jax.Array, jax.Array]:
    heads = 64 if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    q = jnp.asarray(rng.standard_normal((tokens, heads, 128)), jnp.float32 if kind == "float32" else jnp.bfloat16)
    return q, jnp.asarray(rng.standard_normal((tokens, heads)), jnp.float32)


# float32 sums of D * H products. Relative to the largest score, because heads cancel.
_SCORE_BOUND = 3e-6


def _kernel_indexer(kind: str, heads: int | None) -> KernelProblem:
    rng = np.random.default_rng(1)
    q, weights = _kernel_queries(rng, 8, heads, kind)
    stored = random_index_keys(rng, kind, 256)
    keys, scales = stored.key.reshape(256, 128), None if stored.scale is None else stored.scale.reshape(256)
    ends = np.array([256, 255, 130, 64, 63, 1, 0, 200], np.int32)
    exact = np.asarray(cache_ops.gather_index(stored, jnp.arange(256), dtype=jnp.float32))
    want = scores_answer(q, np.broadcast_to(exact, (8, 256, 128)), weights)
    want[np.arange(256) >= ends[:, None]] = -np.inf

    def fn(q, keys, scales, weights, ends, *, implementation="triton", plan=None):
        starts = jnp.zeros_like(ends)
        return indexer_scores(
            q, keys, scales, weights, row_starts=starts, row_lengths=ends, implementation=implementation, plan=plan
        )

    args = (q, keys, scales, weights, jnp.asarray(ends))
    return KernelProblem(fn, args, score_error(want), _SCORE_BOUND, nbytes(args) + 4 * want.size)


def _kernel_paged_indexer(kind: str, heads: int | None) -> KernelProblem:
    rng = np.random.default_rng(2)
    q, weights = _kernel_queries(rng, 4, heads, kind)
    stored = random_index_keys(rng, kind, 1024)
    table = rng.permutation(16)[:16].reshape(4, 4).astype(np.int32)
    lengths = np.array([256, 131, 1, 0], np.int32)
    exact = np.asarray(cache_ops.gather_index(stored, jnp.arange(1024), dtype=jnp.float32))
    slots = (table[:, :, None] * 64 + np.arange(64)).reshape(4, 256)
    want = scores_answer(q, exact[slots], weights)
    want[np.arange(256) >= lengths[:, None]] = -np.inf

    def fn(q, weights, cache, table, requests, lengths, *, implementation="triton", plan=None):
        return paged_indexer_scores(
            q, weights, cache, table, requests, lengths, max_length=256, implementation=implementation, plan=plan
        )

    args = (q, weights, stored, jnp.asarray(table), jnp.arange(4, dtype=jnp.int32), jnp.asarray(lengths))
    size = nbytes(q, weights, table) + int(lengths.sum()) * stored.bytes_per_token + 4 * want.size
    return KernelProblem(fn, args, score_error(want), _SCORE_BOUND, size)


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase("indexer", "8 queries x 256 keys of 128, contiguous", _kernel_indexer),
    KernelCase("paged_indexer", "4 queries over up to 256 keys of 128 each, in pages of 64", _kernel_paged_indexer),
)
