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
from jax import Array

from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops import hyper_connections
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages
from sparse_mla_jax.ops.indexer import indexer_scores, paged_indexer_scores
from sparse_mla_jax.ops.norm_rope import Part, norm_rope
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.rope import rope_frequencies
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
      kinds: cache types that it takes; empty when none matters.
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
def attention_answer(
    q: Any, keys: np.ndarray, rows: np.ndarray, scale: float, value_dim: int, sinks: np.ndarray | None = None
) -> np.ndarray:
    """Softmax attention in float64: q[T, H, D], keys[N, D], rows[T, W] -> [T, H, value_dim]; -1 is no key."""
    q, keys = np.asarray(q).astype(np.float64), keys.astype(np.float64)
    out = np.zeros((*q.shape[:2], value_dim))
    sink = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    for t, row in enumerate(rows):
        chosen = keys[row[row >= 0]]
        logits = scale * q[t] @ chosen.T
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        out[t] = weights @ chosen[:, :value_dim] / (weights.sum(axis=1) + np.exp(sink - top[:, 0]))[:, None]
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


def _two_sources(kind: str, heads: int | None, *, window: int, selected: int) -> Problem:
    """A sliding window and chosen entries, in caches of their own, under one softmax with sinks."""
    rng = np.random.default_rng(0)
    heads, latent, dim = 16 if heads is None else heads, 448, 512
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    near, far = (_random_cache(rng, kind, latent, 64, jnp.float8_e8m0fnu) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((2, heads, dim)), jnp.bfloat16)
    rows = [np.stack([rng.permutation(512)[:n] for _ in range(2)]).astype(np.int32) for n in (window, selected)]
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    keys = [np.asarray(cache_ops.gather(cache, jnp.arange(512), dtype=jnp.float32)) for cache in (near, far)]

    def fn(q, near, far, near_rows, far_rows, sinks):
        return sparse_mla(
            q,
            near,
            near_rows,
            sm_scale=dim**-0.5,
            value_dim=dim,
            sinks=sinks,
            extra=(far, far_rows),
            implementation="triton",
        )

    both = np.concatenate([rows[0], rows[1] + 512], axis=1)
    want = attention_answer(q, np.concatenate(keys), both, dim**-0.5, dim, np.asarray(sinks))
    return Problem(
        fn,
        (q, near, far, *map(jnp.asarray, rows), sinks),
        lambda out: _relative(out, want),
        2e-3,  # as above
        _nbytes(q, *rows) + 2 * (window + selected) * near.bytes_per_token + want.size * q.dtype.itemsize,
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


# --- compressor ------------------------------------------------------------------------------------------------------
# Half a unit in the last place, relative to the value, of what a cache rounds to.
_ROUNDING = dict(zip(KINDS, (2.0**-4, 2.0**-4, 2.0**-8, 2.0**-24)))


def _entries_error(got: Any, want: np.ndarray, kind: str) -> float:
    """Largest error of entries [N, D] over what a cache of this type explains; entries are of the order of 1."""
    allowed = _ROUNDING[kind] * np.abs(want) + 5e-6
    if kind in FP8:
        # Half a subnormal code; a scale that is a power of two is up to twice as large as need be.
        allowed += 2.0**-10 / 224 * np.abs(want).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(got).astype(np.float64) - want) / allowed
    return float(error.max()) if np.isfinite(error).all() else math.inf


def _compressor_cache(kind: str, indexer: bool, pages: int, entries: int) -> Any:
    if indexer:
        return PagedIndexCache.create(pages, entries, dim=128, dtype=jnp.dtype(kind))
    sizes: Any = dict(latent_dim=448, rope_dim=64, group_size=64, scale_dtype=jnp.float8_e8m0fnu)
    return PagedKVCache.create(pages, entries, dtype=jnp.dtype(kind), **sizes)


def _compress_step(cache, state, kv, gate, bias, norm, table, seq_lens, query_lens, *, page_size, implementation):
    m = build_metadata(seq_lens, query_lens, table, num_tokens=kv.shape[0], page_size=page_size)
    names = ("positions", "request_ids", "query_indptr", "seq_lens", "page_table", "page_size")
    owners = {name: getattr(m, name) for name in names}
    frequencies = jnp.asarray(_COMPRESSOR_FREQUENCIES)
    how: Any = dict(ratio=bias.shape[0], implementation=implementation)
    return compress(cache, state, kv, gate, bias, norm, frequencies, **owners, **how)


_COMPRESSOR_FREQUENCIES = (1.6e5 ** (-np.arange(32) / 32)).astype(np.float32)


def _compress(kind: str, heads: int | None, *, ratio: int, page_size: int, indexer: bool = False) -> Problem:
    """Four requests: a chunk from position 0, one that continues, a token that closes a window, one that does not."""
    del heads
    rng, (dim, overlap) = np.random.default_rng(5), (128 if indexer else 512, ratio == 4)
    channels = 2 * dim if overlap else dim
    before = np.array([0, ratio + 1, 3 * ratio - 1, 3 * ratio], np.int32)
    after = before + np.array([2 * ratio + 3, 2 * ratio + 3, 1, 1], np.int32)
    length = int(after.max())
    kv, gate = (rng.standard_normal((4, length, channels)).astype(np.float32) for _ in range(2))
    weights = [jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((ratio, channels), (dim,))]
    pages = -(-length // page_size)
    table = jnp.asarray(rng.permutation(4 * pages).reshape(4, pages), jnp.int32)
    entry_table, entries = entry_pages(table, page_size=page_size, ratio=ratio)
    cache = _compressor_cache(kind, indexer, 4 * pages, entries)
    state = CompressorState.create(4, ratio=ratio, dim=dim, overlap=overlap)

    def rows(x, first, last):
        return jnp.concatenate([x[b, i:j] for b, (i, j) in enumerate(zip(first, last))])

    xla, fn = (functools.partial(_compress_step, page_size=page_size, implementation=i) for i in ("xla", "triton"))
    none = np.zeros_like(before)
    earlier = [rows(x, none, before) for x in (kv, gate)]
    cache, state = jax.jit(xla)(cache, state, *earlier, *weights, table, before, before)
    args = (cache, state, *(rows(x, before, after) for x in (kv, gate)), *weights, table)
    args += jnp.asarray(after), jnp.asarray(after - before)
    kept = jax.jit(xla)(*args)[1]
    with jax.enable_x64(True):
        whole: Any = functools.partial(reference.compress, ratio=ratio, dtype=jnp.float64)
        sequences = [whole(kv[b, :n], gate[b, :n], *weights, _COMPRESSOR_FREQUENCIES) for b, n in enumerate(after)]
        want = np.concatenate([np.asarray(entries) for entries in sequences])
    window = np.concatenate([np.arange(n // ratio) for n in after])
    request = np.repeat(np.arange(4), after // ratio)
    slots = np.asarray(entry_table)[request, window // entries] * entries + window % entries

    def error(got):
        cache, state = got
        if any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(kept))):
            return math.inf
        if indexer:
            return _entries_error(cache_ops.gather_index(cache, slots, dtype=jnp.float32), want, kind)
        found, rope = cache_ops.gather(cache, slots, dtype=jnp.float32), cache.rope.dtype.name
        parts = (slice(0, 448), kind), (slice(448, None), rope)
        return max(_entries_error(found[:, part], want[:, part], k) for part, k in parts)

    closed = int((after // ratio - before // ratio).sum())
    read = 8 * channels * ratio * closed + 4 * (ratio * channels + dim)
    return Problem(fn, args, error, 1.0, read + closed * cache.bytes_per_token)


# --- hyper-connections -----------------------------------------------------------------------------------------------
def _split_streams(kind: str, heads: int | None) -> Problem:
    """Two tokens of Flash's four streams of 4096, bfloat16, the product in 32 parts as the layer gives it."""
    del kind, heads
    rng = np.random.default_rng(6)
    shapes = (2, 4, 4096), (32, 2, 24), (24,), (3,), (4096,)
    streams, product, base, scale, norm = (jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes)
    args = (streams.astype(jnp.bfloat16), product / math.sqrt(32), base, scale, norm)
    constants: Any = dict(iterations=20, eps=1e-6, norm_eps=1e-6)
    with jax.enable_x64(True):
        wide, parts, *weights = (jnp.asarray(np.asarray(x, np.float64)) for x in args)
        results = reference.split_streams(wide, parts.sum(0), *weights, **constants, dtype=jnp.float64)
        want = [np.asarray(x) for x in results]

    def fn(streams, product, base, scale, norm):
        return hyper_connections.split(streams, product, base, scale, norm=norm, implementation="triton", **constants)

    def error(got):
        """Of each result over what its type explains."""
        allowed = 2e-3, 1e-6, 1e-6
        return max(_relative(a, b) / most for a, b, most in zip(got, want, allowed))

    return Problem(fn, args, error, 1.0, _nbytes(args) + 2 * (2 * 4096 + 4 * 20))


# --- output projection -----------------------------------------------------------------------------------------------
def _rotated_projection(kind: str, heads: int | None) -> Problem:
    """One group of eight heads of 448 + 64, five tokens, the first 64 of its columns."""
    del kind, heads
    rng = np.random.default_rng(7)
    out, weight = (jnp.asarray(rng.standard_normal(n), jnp.bfloat16) for n in ((5, 8, 512), (1, 4096, 64)))
    positions = jnp.asarray([0, 1, 4095, 70000, 163839], jnp.int32)
    angles = np.asarray(positions.astype(jnp.float32)[:, None] * jnp.asarray(_COMPRESSOR_FREQUENCIES))
    with jax.enable_x64(True):
        want = np.asarray(reference.rotated_projection(out, weight, jnp.asarray(angles), dtype=jnp.float64))

    def fn(out, weight, positions):
        return rotated_projection(out, weight, positions, _COMPRESSOR_FREQUENCIES, implementation="triton")

    args = (out, weight, positions)
    # Rounding the result to bfloat16 alone costs 1.65e-3.
    return Problem(fn, args, lambda got: _relative(got, want), 2e-3, _nbytes(args) + 2 * want.size)


# --- norm_rope -------------------------------------------------------------------------------------------------------
def v32_hidden_parts(vector: Callable[[int], Array], dtype: str) -> tuple[Part, ...]:
    """What DeepSeek-V3.2's layer makes of the product of its input, 2304 columns side by side.

    The query's low-rank form in `dtype`; float32 what the caches keep (the latent, the rotated key that all heads
    share, the indexer's key) and the indexer's head weights. vector: size -> a norm's weight or bias, float32 [size].
    """
    c, part = DeepseekV32Config(), functools.partial(Part, heads=1)
    widths = c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim, c.index_head_dim, c.index_n_heads
    query, latent, key, index, weights = (int(sum(widths[:i])) for i in range(5))
    return (
        part(start=query, width=widths[0], weight=vector(widths[0]), dtype=dtype),
        part(start=latent, width=widths[1], weight=vector(widths[1]), dtype="float32"),
        part(start=key, width=widths[2], rotated=0, interleaved=True, dtype="float32"),
        part(
            start=index, width=widths[3], weight=vector(widths[3]), bias=vector(widths[3]), rotated=0, dtype="float32"
        ),
        part(start=weights, width=widths[4], scale=(widths[3] * widths[4]) ** -0.5, dtype="float32"),
    )


def v32_query_parts(heads: int, dtype: str, index_dtype: str, factor: Array | None) -> tuple[Part, ...]:
    """What it makes of the product of the query's low-rank form: `heads` queries of 128 + 64, and the indexer's.

    index_dtype: of the indexer's 64 queries of 128; FP8 with `factor` float32 [T, 64] in its scales.
    """
    c = DeepseekV32Config()
    index = c.index_n_heads * c.index_head_dim
    rotated = c.qk_nope_head_dim
    return (
        Part(index, heads, c.qk_head_dim, dtype, rotated=rotated, interleaved=True),
        Part(0, c.index_n_heads, c.index_head_dim, index_dtype, rotated=0, factor=factor),
    )


def finished_answer(x: Any, part: Part, angles: Any, eps: float = 1e-6) -> np.ndarray:
    """float64 [T, heads, width]: the part of x[T, W], without cast and `factor`; angles float32 [T, pairs]."""
    mine = np.asarray(x).astype(np.float64)[:, part.start : part.start + part.columns]
    with jax.enable_x64(True):
        wide = jnp.asarray(mine.reshape(-1, part.heads, part.width))
        turned = jnp.asarray(np.asarray(angles).astype(np.float64))
        how: Any = dict(rotated=part.rotated, interleaved=part.interleaved, eps=eps, dtype=jnp.float64)
        return np.asarray(reference.norm_rope(wide, part.weight, part.bias, turned, **how)) * part.scale


def finished_error(part: Part, got: Any, want: np.ndarray) -> float:
    """Largest error of a finished part over what its type explains: above 1 it is wrong.

    got: [T, heads, width], of an FP8 part (codes, scales [T, heads]), from `norm_rope`; want: from `finished_answer`.
    """
    allowed, scales_error = (_ROUNDING[part.dtype] + 1e-6) * np.abs(want) + 4e-6, 0.0
    if part.quantized:
        codes, scales = (np.asarray(a).astype(np.float64) for a in got)
        factor = 1.0 if part.factor is None else np.asarray(part.factor).astype(np.float64)
        largest = 448.0 if part.dtype == "float8_e4m3fn" else 224.0
        scale = np.maximum(np.abs(want).max(axis=-1), 1e-4) / largest
        scales_error = float(np.abs(scales / (scale * factor) - 1).max()) / 5e-6
        # Half of the smallest subnormal code.
        allowed, got = allowed + 2.0**-10 * scale[..., None], codes * scale[..., None]
    error = np.abs(np.asarray(got).astype(np.float64) - want) / allowed
    finite = np.isfinite(error).all() and math.isfinite(scales_error)
    return max(float(error.max()), scales_error) if finite else math.inf


def _finished(x: Array, parts: Sequence[Part]) -> Problem:
    """norm_rope of V3.2 on two tokens, one of them the last of the longest context."""
    c, positions = DeepseekV32Config(), jnp.asarray([7, 163839], jnp.int32)
    frequencies = rope_frequencies(c.rope, c.qk_rope_head_dim)
    angles = np.asarray(positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies))
    want = [finished_answer(x, part, angles) for part in parts]

    def fn(x, parts, positions):
        return norm_rope(x, parts, positions, frequencies, implementation="triton")

    def error(got):
        return max(finished_error(part, mine, exact) for part, mine, exact in zip(parts, got, want))

    args = (x, tuple(parts), positions)
    return Problem(fn, args, error, 1.0, _nbytes(args, jax.eval_shape(fn, *args)))


def _from_hidden(kind: str, heads: int | None) -> Problem:
    del kind, heads
    rng = np.random.default_rng(8)
    parts = v32_hidden_parts(lambda n: jnp.asarray(1 + 0.1 * rng.standard_normal(n), jnp.float32), "bfloat16")
    return _finished(jnp.asarray(rng.standard_normal((2, 2304)), jnp.float32), parts)


def _from_q_latent(kind: str, heads: int | None) -> Problem:
    rng = np.random.default_rng(9)
    heads = 16 if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    dtype = "float32" if kind == "float32" else "bfloat16"
    factor = jnp.asarray(1 + rng.random((2, 64)), jnp.float32) if kind in FP8 else None
    x = jnp.asarray(rng.standard_normal((2, 64 * 128 + heads * 192)), dtype)
    return _finished(x, v32_query_parts(heads, dtype, kind, factor))


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
    Case(
        "sparse_mla_v4_window",
        "DeepSeek-V4: 2 queries, a window of 32 rows and 64 chosen entries, two caches and sinks under one softmax",
        functools.partial(_two_sources, window=32, selected=64),
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
    Case(
        "compress",
        "DeepSeek-V4: 6 entries of 448 + 64 values, of 8 tokens each (ratio 4), groups of 64, E8M0 scales",
        functools.partial(_compress, ratio=4, page_size=16),
    ),
    Case(
        "compress_index",
        "DeepSeek-V4: 6 indexer keys of 128 values, of 8 tokens each (ratio 4)",
        functools.partial(_compress, ratio=4, page_size=16, indexer=True),
    ),
    Case(
        "compress_128",
        "DeepSeek-V4: 5 entries of 448 + 64 values, of 128 tokens each, groups of 64, E8M0 scales",
        functools.partial(_compress, ratio=128, page_size=64),
    ),
    Case(
        "split_streams",
        "DeepSeek-V4: 2 tokens of 4 streams of 4096, product in 32 parts, 20 iterations, norm",
        _split_streams,
        kinds=(),
    ),
    Case(
        "rotated_projection",
        "DeepSeek-V4: 5 tokens, a group of 8 heads of 448 + 64 values turned back, 64 columns",
        _rotated_projection,
        kinds=(),
    ),
    Case(
        "norm_rope",
        "DeepSeek-V3.2: 2 tokens, all of the input's product: query form of 1536, latent of 512, keys of 64 and 128",
        _from_hidden,
        kinds=(),
    ),
    Case(
        "norm_rope_query",
        "DeepSeek-V3.2: 2 tokens, 16 query heads of 128 + 64 values, 64 indexer heads of 128 in the type of the cache",
        _from_q_latent,
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
