"""One problem per kernel at published sizes, small enough for an interpreter: inputs, the call, the float64 answer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.config import require
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.indexer import indexer_scores, paged_indexer_scores
from sparse_mla_jax.ops.topk import top_k

FP8 = ("float8_e4m3fnuz", "float8_e4m3fn")
KINDS = (*FP8, "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of one kernel with its answer.

    Attributes:
      fn: jittable; takes `args`, launches the kernel once.
      args: arrays and caches.
      error: of the outputs: relative for scores and attention, wrong indices for top-k, wrong bytes for cache writes.
      bound: largest error that passes.
      bytes: what the kernel must read and write once, for the floor that memory bandwidth sets.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    error: Callable[[Any], float]
    bound: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Case:
    """A named problem.

    Attributes:
      name: what `inspect --kernel` calls it.
      what: sizes, for people.
      build: (kind of cache, query heads or None) -> Problem.
      kinds: cache types that it takes; empty when it has no cache.
    """

    name: str
    what: str
    build: Callable[[str, int | None], Problem]
    kinds: tuple[str, ...] = KINDS


def _nbytes(*trees: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(trees))


def _relative(got: Any, want: np.ndarray) -> float:
    got = np.asarray(got).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if np.isfinite(got).all() else math.inf


# --- sparse attention ------------------------------------------------------------------------------------------------
def attention_answer(q: Any, keys: np.ndarray, rows: np.ndarray, scale: float, value_dim: int) -> np.ndarray:
    """Softmax attention in float64: q[T, H, D], keys[N, D], rows[T, W] -> [T, H, value_dim]; -1 is no key."""
    q, keys = np.asarray(q).astype(np.float64), keys.astype(np.float64)
    out = np.zeros((*q.shape[:2], value_dim))
    for t, row in enumerate(rows):
        chosen = keys[row[row >= 0]]
        logits = scale * q[t] @ chosen.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[t] = weights @ chosen[:, :value_dim] / weights.sum(axis=1, keepdims=True)
    return out


def _random_cache(rng: np.random.Generator, kind: str, latent: int, group: int, scale_dtype: Any) -> PagedKVCache:
    """8 pages of 64 slots, written through the library's own quantiser."""
    cache = PagedKVCache.create(
        8,
        64,
        latent_dim=latent,
        rope_dim=64,
        group_size=group,
        dtype=jnp.dtype(kind),
        scale_dtype=scale_dtype,
    )
    rows, rope = (jnp.asarray(rng.standard_normal((512, n)), jnp.float32) for n in (latent, 64))
    return cache_ops.write(cache, rows, rope, jnp.arange(512))


def _attention(
    kind: str, heads: int | None, *, latent: int, group: int, value_dim: int, selected: int, scale_dtype: Any
) -> Problem:
    rng = np.random.default_rng(0)
    heads = 16 if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    cache = _random_cache(rng, kind, latent, group, scale_dtype)
    q_dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    q = jnp.asarray(rng.standard_normal((2, heads, latent + 64)), q_dtype)
    rows = np.stack([rng.permutation(512)[:selected] for _ in range(2)]).astype(np.int32)
    scale = (latent + 64) ** -0.5
    keys = np.asarray(cache_ops.gather(cache, jnp.arange(512), dtype=jnp.float32))

    def fn(q, cache, rows):
        return sparse_mla(q, cache, rows, sm_scale=scale, value_dim=value_dim, implementation="triton")

    want = attention_answer(q, keys, rows, scale, value_dim)
    return Problem(
        fn,
        (q, cache, jnp.asarray(rows)),
        lambda out: _relative(out, want),
        # float32: rounding of sums. bfloat16: rounding the result alone costs 1.65e-3.
        1e-5 if kind == "float32" else 2e-3,
        _nbytes(q, rows) + 2 * selected * cache.bytes_per_token + want.size * q.dtype.itemsize,
    )


# --- indexer ---------------------------------------------------------------------------------------------------------
def _scores_answer(q: Any, keys: np.ndarray, weights: Any) -> np.ndarray:
    """q[T, H, D], keys[T, N, D] -> float64 [T, N]."""
    products = np.einsum("thd,tnd->thn", np.asarray(q).astype(np.float64), keys.astype(np.float64))
    return np.einsum("th,thn->tn", np.asarray(weights, np.float64), np.maximum(products, 0))


def _score_error(want: np.ndarray) -> Callable[[Any], float]:
    def error(got):
        got = np.asarray(got)
        if not (np.isneginf(got) == np.isneginf(want)).all() or np.isnan(got).any():
            return math.inf
        seen = np.isfinite(want)
        return float(np.abs(got[seen] - want[seen]).max() / np.abs(want[seen]).max())

    return error


def _index_keys(rng: np.random.Generator, kind: str, slots: int) -> PagedIndexCache:
    cache = PagedIndexCache.create(slots // 64, 64, dim=128, dtype=jnp.dtype(kind))
    return cache_ops.write_index(cache, jnp.asarray(rng.standard_normal((slots, 128)), jnp.float32), jnp.arange(slots))


def _queries(rng: np.random.Generator, tokens: int, heads: int | None, kind: str) -> tuple[jax.Array, jax.Array]:
    heads = 64 if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    q = jnp.asarray(rng.standard_normal((tokens, heads, 128)), jnp.float32 if kind == "float32" else jnp.bfloat16)
    return q, jnp.asarray(rng.standard_normal((tokens, heads)), jnp.float32)


# float32 sums of D * H products, relative to the largest score since heads cancel.
_SCORE_BOUND = 3e-6


def _indexer(kind: str, heads: int | None) -> Problem:
    rng = np.random.default_rng(1)
    q, weights = _queries(rng, 8, heads, kind)
    stored = _index_keys(rng, kind, 256)
    keys, scales = stored.key.reshape(256, 128), None if stored.scale is None else stored.scale.reshape(256)
    ends = np.array([256, 255, 130, 64, 63, 1, 0, 200], np.int32)
    exact = np.asarray(cache_ops.gather_index(stored, jnp.arange(256), dtype=jnp.float32))
    want = _scores_answer(q, np.broadcast_to(exact, (8, 256, 128)), weights)
    want[np.arange(256) >= ends[:, None]] = -np.inf

    def fn(q, keys, scales, weights, ends):
        starts = jnp.zeros_like(ends)
        return indexer_scores(q, keys, scales, weights, row_starts=starts, row_lengths=ends, implementation="triton")

    args = (q, keys, scales, weights, jnp.asarray(ends))
    return Problem(fn, args, _score_error(want), _SCORE_BOUND, _nbytes(args) + 4 * want.size)


def _paged_indexer(kind: str, heads: int | None) -> Problem:
    rng = np.random.default_rng(2)
    q, weights = _queries(rng, 4, heads, kind)
    stored = _index_keys(rng, kind, 1024)
    table = rng.permutation(16)[:16].reshape(4, 4).astype(np.int32)
    lengths = np.array([256, 131, 1, 0], np.int32)
    exact = np.asarray(cache_ops.gather_index(stored, jnp.arange(1024), dtype=jnp.float32))
    slots = (table[:, :, None] * 64 + np.arange(64)).reshape(4, 256)
    want = _scores_answer(q, exact[slots], weights)
    want[np.arange(256) >= lengths[:, None]] = -np.inf

    def fn(q, weights, cache, table, requests, lengths):
        return paged_indexer_scores(
            q, weights, cache, table, requests, lengths, max_length=256, implementation="triton"
        )

    args = (q, weights, stored, jnp.asarray(table), jnp.arange(4, dtype=jnp.int32), jnp.asarray(lengths))
    size = _nbytes(q, weights, table) + int(lengths.sum()) * stored.bytes_per_token + 4 * want.size
    return Problem(fn, args, _score_error(want), _SCORE_BOUND, size)


# --- top-k -----------------------------------------------------------------------------------------------------------
def _top_k(kind: str, heads: int | None, *, columns: int, k: int) -> Problem:
    del kind, heads
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((2, columns)).astype(np.float32)
    # The second row has ties across the threshold.
    scores[1] = np.round(scores[1], 2)
    want = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)

    def fn(scores):
        return top_k(scores, k, implementation="triton")

    return Problem(
        fn,
        (jnp.asarray(scores),),
        lambda got: float((np.asarray(got) != want).sum()),
        0.0,
        scores.nbytes + want.size * 4,
    )


# --- cache writes ----------------------------------------------------------------------------------------------------
def _cache_write(kind: str, heads: int | None, *, latent: int, group: int, scale_dtype: Any) -> Problem:
    """Some of the tokens are skipped, and one is superseded by a later one of its slot."""
    del heads
    rng, tokens = np.random.default_rng(4), 8
    cache = _random_cache(rng, kind, latent, group, scale_dtype)
    index = _index_keys(rng, kind, 512)
    rows = [jnp.asarray(rng.standard_normal((tokens, n)), jnp.float32) for n in (latent, 64, 128)]
    slots = jnp.asarray([5, 511, -1, 70, 512, 5, 0, 300], jnp.int32)
    want = jax.jit(functools.partial(cache_ops.write_token, implementation="reference"))(cache, index, *rows, slots)

    def fn(cache, index, *arguments):
        return cache_ops.write_token(cache, index, *arguments, implementation="triton")

    def error(got):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
        return float(sum((np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).sum() for a, b in pairs))

    token = cache.bytes_per_token + index.bytes_per_token
    return Problem(fn, (cache, index, *rows, slots), error, 0.0, _nbytes(rows, slots) + 5 * token)


# --- the list --------------------------------------------------------------------------------------------------------
CASES = (
    Case(
        "sparse_mla",
        "DeepSeek-V3.2: 2 queries, 96 selected rows of 512 + 64, groups of 128, float32 scales",
        functools.partial(_attention, latent=512, group=128, value_dim=512, selected=96, scale_dtype=jnp.float32),
    ),
    Case(
        "sparse_mla_v4",
        "DeepSeek-V4: 2 queries, 96 selected rows of 448 + 64, groups of 64, E8M0 scales",
        functools.partial(_attention, latent=448, group=64, value_dim=512, selected=96, scale_dtype=jnp.float8_e8m0fnu),
        FP8,
    ),
    Case("indexer", "8 queries x 256 keys of 128, contiguous", _indexer),
    Case("paged_indexer", "4 queries over up to 256 keys of 128 each, in pages of 64", _paged_indexer),
    Case("top_k", "2 rows of 2048 columns, k 512, one block", functools.partial(_top_k, columns=2048, k=512), kinds=()),
    Case(
        "top_k_long",
        "2 rows of 16384 columns, k 2048, several blocks",
        functools.partial(_top_k, columns=16384, k=2048),
        kinds=(),
    ),
    Case(
        "cache_write",
        "DeepSeek-V3.2: 8 tokens of 512 + 64 values and a key of 128, groups of 128, float32 scales",
        functools.partial(_cache_write, latent=512, group=128, scale_dtype=jnp.float32),
    ),
    Case(
        "cache_write_v4",
        "DeepSeek-V4: 8 tokens of 448 + 64 values and a key of 128, groups of 64, E8M0 scales",
        functools.partial(_cache_write, latent=448, group=64, scale_dtype=jnp.float8_e8m0fnu),
        FP8,
    ),
)


def case(name: str) -> Case:
    """The case of that name.

    Raises:
      ValueError: there is none.
    """
    found = next((c for c in CASES if c.name == name), None)
    require(found is not None, f"kernel is {name!r}; expected one of {', '.join(c.name for c in CASES)}.")
    return found  # type: ignore[return-value]


def names() -> Sequence[str]:
    """Names of all cases."""
    return [c.name for c in CASES]
