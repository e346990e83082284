"""The named shapes that `bench` times and the tests run shrunk: inputs, the call, what it must move, its check.

Targets are microseconds on an H200: `reach` is the best published or measured CUDA kernel, `floor` what must be held.
"""

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

from sparse_mla_jax.config import DeepseekV32Config, require
from sparse_mla_jax.kernel_cases import FP8, attention_answer
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages
from sparse_mla_jax.ops.indexer import indexer_scores, lightning_indexer, paged_indexer_scores
from sparse_mla_jax.ops.ragged import DenseRows, Ragged, pack_rows
from sparse_mla_jax.ops.topk import top_k

AREAS = ("topk", "indexer", "decode", "prefill", "cache", "step")
PAGE = 64
# Queries of the indexer: bfloat16, or the FP8 flavour of the cache.
QUERIES = ("bfloat16", "cache")
# Largest sizes of a shrunk case, by name.
SMALL = {
    "batch": 3,
    "tokens": 5,
    "rows": 5,
    "columns": 700,
    "k": 96,
    "heads": 8,
    "selected": 48,
    "keys": 320,
    "slots": 1024,
    "rings": 1024,
    "width": 96,
    "length": 256,
    "context": 128,
    "hidden": 64,
    "q_rank": 32,
    "layers": 2,
}
# Rows that are compared with float64; all are timed.
SAMPLE = 8


@dataclasses.dataclass(frozen=True)
class Work:
    """A case made concrete. A call is fn(*state(), *shared(), *each(n)).

    Attributes:
      fn: jittable; takes the arguments and implementation=.
      each: number of a set -> the arguments that differ between calls; random, and traceable as the next two are.
      shared: the large arguments that all calls have in common.
      state: donated arguments; the first outputs of fn are their successors.
      bytes: what must be read and written once.
      flops: of the matrix products.
      error: (arguments, outputs) -> error of the outputs; infinite where something is wrong beyond rounding.
      bound: largest error that passes.
      has_bodies: whether `implementation` makes a difference.
      replays: whether the state may be made anew while the outputs live; else `error` gets the arguments without it.
    """

    fn: Callable[..., Any]
    each: Callable[[int], tuple[Any, ...]]
    bytes: int
    flops: int
    error: Callable[[tuple[Any, ...], Any], float]
    bound: float
    shared: Callable[[], tuple[Any, ...]] = tuple
    state: Callable[[], tuple[Any, ...]] = tuple
    has_bodies: bool = True
    replays: bool = True

    def arguments(self, number: int = 0) -> tuple[Any, ...]:
        """All arguments of a call; under `jax.eval_shape` their shapes alone."""
        return (*self.state(), *self.shared(), *self.each(number))


@dataclasses.dataclass(frozen=True)
class Case:
    """A named shape.

    Attributes:
      name: what `bench --case` finds.
      area: one of AREAS.
      sizes: named integers.
      make: (sizes, flavour, query type) -> Work.
      flavours: types of its caches; one empty string where it has none.
      queries: types of the indexer's queries, see QUERIES.
      reach, floor: targets in microseconds on an H200, None where there is none.
      at_most: (factor, name): takes no longer than `factor` times that case.
      parts: names of cases that together do the same.
    """

    name: str
    area: str
    sizes: Mapping[str, int]
    make: Callable[[Mapping[str, int], str, str], Work]
    flavours: tuple[str, ...] = FP8
    queries: tuple[str, ...] = ("",)
    reach: float | None = None
    floor: float | None = None
    at_most: tuple[float, str] | None = None
    parts: tuple[str, ...] = ()

    def shrunk(self) -> Case:
        """The same with sizes for a CPU, and without targets."""
        sizes = {name: min(size, SMALL.get(name, size)) for name, size in self.sizes.items()}
        return dataclasses.replace(self, sizes=sizes, reach=None, floor=None, at_most=None)

    def variants(self) -> Iterator[tuple[str, str]]:
        """(type of the caches, type of the indexer's queries)."""
        for flavour in self.flavours:
            for query in self.queries:
                yield flavour, flavour if query == "cache" else query


def build(case: Case, flavour: str, query: str = "", *, shrink: bool = False) -> Work:
    """The work of a case.

    Args:
      case: one of CASES.
      flavour: type of its caches, one of case.flavours.
      query: type of the indexer's queries; "" for bfloat16.
      shrink: sizes for a CPU.

    Raises:
      ValueError: a flavour that the case does not take.
    """
    require(
        flavour in case.flavours,
        f"flavour is {flavour!r}; {case.name} takes {', '.join(repr(f) for f in case.flavours)}.",
    )
    case = case.shrunk() if shrink else case
    return case.make(case.sizes, flavour, query)


# --- what several areas share ----------------------------------------------------------------------------------------
def nbytes(*trees: Any) -> int:
    """Bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(trees))


def _key(purpose: int, number: int = 0) -> Array:
    # The generator that compiles quickest; nothing here asks for more.
    return jax.random.fold_in(jax.random.key(purpose, impl="unsafe_rbg"), number)


def _permutation(key: Array, count: int) -> Array:
    """int32 [count], 0..count-1 in random order."""
    return jnp.argsort(jax.random.bits(key, (count,))).astype(jnp.int32)


def _sample(rows: int) -> np.ndarray:
    """Rows that are checked: first, last, and evenly between."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE)).round().astype(np.int32))


@jax.jit
def _rows_of(x: Any, rows: Any) -> Any:
    return x[rows]


def _take(x: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a large array on the host."""
    return np.asarray(_rows_of(x, rows))


# Compiled whole: operation by operation costs a compilation each.
_gather = jax.jit(cache_ops.gather, static_argnames="dtype")
_gather_index = jax.jit(cache_ops.gather_index, static_argnames="dtype")
_dense = jax.jit(Ragged.to_dense, static_argnames="width")


def _relative(got: Any, want: Any) -> float:
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if np.isfinite(got).all() else math.inf


def _distinct(key: Array, rows: int, wanted: int, room: int) -> Array:
    """int32 [rows, wanted]: ascending, distinct, one from each of `wanted` equal parts of 0..room-1."""
    part = room // wanted
    return jnp.arange(wanted, dtype=jnp.int32) * part + jax.random.randint(key, (rows, wanted), 0, part, jnp.int32)


def _slots(key: Array, rows: int, selected: int, slots: int, *, own: bool) -> Array:
    """int32 [rows, selected] of slots in random pages; `own`: each row reads its own part of the cache."""
    room = slots // rows if own else slots
    position = _distinct(key, rows, selected, room)
    if own:
        position += room * jnp.arange(rows, dtype=jnp.int32)[:, None]
    pages = _permutation(jax.random.fold_in(key, 1), slots // PAGE)
    return pages[position // PAGE] * PAGE + position % PAGE


# latent values, group, type of the scales
LAYOUTS = {"v32": (512, 128, jnp.float32), "v4": (448, 64, jnp.float8_e8m0fnu)}
ROPE = 64


def _empty_kv(layout: str, flavour: str, slots: int) -> PagedKVCache:
    latent, group, scale = LAYOUTS[layout]
    return PagedKVCache.create(
        slots // PAGE,
        PAGE,
        latent_dim=latent,
        rope_dim=ROPE,
        group_size=group,
        dtype=jnp.dtype(flavour),
        scale_dtype=scale,
    )


def _filled(slots: int, step: Callable[[Array, Array, Any], Any], cache: Any) -> Any:
    """`cache` after step(key, slots, cache) for all slots, some at a time: what is written is held as float32."""
    some = min(slots, 1 << 14)

    def fill(i, cache):
        return step(_key(1, i), i * some + jnp.arange(some, dtype=jnp.int32), cache)

    return jax.lax.fori_loop(0, -(-slots // some), fill, cache)


@functools.partial(jax.jit, static_argnames=("layout", "flavour", "slots"))
def kv_cache(layout: str, flavour: str, slots: int) -> PagedKVCache:
    """A cache of `slots` random tokens, written through the library's own quantiser."""

    def step(key, at, cache):
        latent = jax.random.normal(key, (at.shape[0], cache.latent_dim))
        rope = jax.random.normal(jax.random.fold_in(key, 1), (at.shape[0], ROPE))
        return cache_ops.write(cache, latent, rope, at)

    return _filled(slots, step, _empty_kv(layout, flavour, slots))


@functools.partial(jax.jit, static_argnames=("flavour", "slots", "dim"))
def index_cache(flavour: str, slots: int, dim: int) -> PagedIndexCache:
    """The same of an indexer's keys."""

    def step(key, at, cache):
        return cache_ops.write_index(cache, jax.random.normal(key, (at.shape[0], dim)), at)

    empty = PagedIndexCache.create(slots // PAGE, PAGE, dim=dim, dtype=jnp.dtype(flavour))
    return _filled(slots, step, empty)


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
    winners = _distinct(key, rows, min(100, k // 2), columns)
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
        scores = _scores(kind, _key(2, number), rows, columns, k)
        return (scores, jnp.full((rows,), length, jnp.int32)) if "length" in sizes else (scores,)

    def fn(scores, lengths=None, *, implementation=None):
        return top_k(scores, k, lengths, implementation=implementation)

    def error(arguments, got):
        # All rows, as long as that is quick.
        checked = np.arange(rows) if rows * length <= 1 << 24 else _sample(rows)
        wrong = 0
        for row, mine in zip(_take(arguments[0], checked), _take(got, checked)):
            want = np.full(k, -1, np.int32)
            chosen_columns = selected(row[:length], k)
            want[: chosen_columns.size] = chosen_columns
            wrong += int((mine != want).sum())
        return float(wrong)

    return Work(fn, each, 4 * rows * (length + k), 0, error, 0.0)


# --- indexer ---------------------------------------------------------------------------------------------------------
DIM = 128


def _queries(number: int, tokens: int, heads: int, query: str) -> tuple[Array, Array]:
    q = jax.random.normal(_key(3, number), (tokens, heads, DIM)).astype(jnp.dtype(query or "bfloat16"))
    return q, jax.random.normal(_key(4, number), (tokens, heads))


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
        some, worst = _sample(tokens), 0.0
        for mine, query, weight in zip(_take(got, some), _take(q, some), _take(weights, some)):
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
        pages = _permutation(_key(5, number), slots // PAGE)
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
        some, worst = _sample(batch), 0.0
        for mine, pages, query, weight in zip(*(_take(x, some) for x in (got, table, q, weights))):
            at = (pages[:, None] * PAGE + np.arange(PAGE, dtype=np.int32)).reshape(-1)
            want = _exact_scores(query, weight, _gather_index(cache, at, dtype=jnp.float32))
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
VALUE_DIM = 512
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
            return (jax.random.normal(_key(8), (slots, dim), jnp.bfloat16),)
        return (kv_cache(layout, flavour, slots),)

    def each(number):
        rows: Any = _slots(_key(9, number), tokens, width, slots, own=own)
        if ragged:
            rows = pack_rows(rows, jnp.asarray(lengths))
        return jax.random.normal(_key(10, number), (tokens, heads, dim), jnp.bfloat16), rows

    def fn(kv, q, rows, *, implementation=None):
        return sparse_mla(q, kv, rows, sm_scale=dim**-0.5, value_dim=VALUE_DIM, implementation=implementation)

    def error(arguments, got):
        kv, q, rows = arguments
        some = _sample(tokens)
        at = _take(_dense(rows, width=width) if ragged else rows, some)
        keys = _take(kv, at) if plain else np.asarray(_gather(kv, at, dtype=jnp.float32))
        want = [
            attention_answer(one[None], mine, np.arange(n)[None], dim**-0.5, VALUE_DIM)[0]
            for one, mine, n in zip(_take(q, some), keys, lengths[some])
        ]
        return _relative(_take(got, some), np.stack(want))

    token = 2 * dim if plain else jax.eval_shape(lambda: kv_cache(layout, flavour, PAGE)).bytes_per_token
    keys = int(lengths.sum())
    # A cache that all share is read once, whoever asks.
    size = token * (keys if own else min(keys, slots)) + 4 * keys + 2 * tokens * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


def _two_sources(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """DeepSeek-V4's decode: a window in rings and `selected` entries, of rows `width` wide, under one softmax."""
    del query
    batch, heads, window, selected = (sizes[name] for name in ("batch", "heads", "window", "selected"))
    width, dim = sizes["width"], LAYOUTS["v4"][0] + ROPE

    def shared():
        return kv_cache("v4", flavour, sizes["rings"]), kv_cache("v4", flavour, sizes["slots"])

    def each(number):
        near, far = (
            _slots(_key(key, number), batch, count, slots, own=True)
            for key, count, slots in ((15, window, sizes["rings"]), (16, selected, sizes["slots"]))
        )
        far = jnp.pad(far, ((0, 0), (0, width - selected)), constant_values=-1)
        lengths = [jnp.full(batch, n, jnp.int32) for n in (window, selected)]
        q = jax.random.normal(_key(17, number), (batch, heads, dim), jnp.bfloat16)
        sinks = jax.random.normal(_key(18, number), (heads,))
        return q, DenseRows(near, lengths[0]), DenseRows(far, lengths[1]), sinks

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
        some, keys = _sample(batch), []
        for cache, rows, count in ((near, near_rows, window), (far, far_rows, selected)):
            keys.append(np.asarray(_gather(cache, _take(rows.values, some)[:, :count], dtype=jnp.float32)))
        every = np.arange(window + selected)[None]
        want = [
            attention_answer(one[None], mine, every, dim**-0.5, VALUE_DIM, np.asarray(sinks))[0]
            for one, mine in zip(_take(q, some), np.concatenate(keys, axis=1))
        ]
        return _relative(_take(got, some), np.stack(want))

    token = jax.eval_shape(lambda: kv_cache("v4", flavour, PAGE)).bytes_per_token
    keys = batch * (window + selected)
    size = (token + 4) * keys + 2 * batch * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


# --- cache writes ----------------------------------------------------------------------------------------------------
def _write(sizes: Mapping[str, int], flavour: str, query: str, *, layout: str) -> Work:
    """`write_token` of the tokens of one step into donated caches."""
    del query
    tokens, slots = sizes["tokens"], sizes["slots"]
    latent = LAYOUTS[layout][0]

    def state():
        return kv_cache(layout, flavour, slots), index_cache(flavour, slots, DIM)

    def each(number):
        rows = [
            jax.random.normal(_key(11 + i, number), (tokens, n), jnp.bfloat16)
            for i, n in enumerate((latent, ROPE, DIM))
        ]
        return (*rows, _slots(_key(14, number), 1, tokens, slots, own=False)[0])

    def fn(cache, index, latent, rope, key, slots, *, implementation=None):
        return cache_ops.write_token(cache, index, latent, rope, key, slots, implementation=implementation)

    def error(arguments, got):
        cache, index, rows, rope, key, at = arguments
        at = np.asarray(at)
        untouched = np.setdiff1d(np.arange(0, slots, max(1, slots // 4096), dtype=np.int32), at)
        for before, after, read in ((cache, got[0], _gather), (index, got[1], _gather_index)):
            old, new = (np.asarray(read(x, untouched, dtype=jnp.float32)) for x in (before, after))
            if not np.array_equal(old, new):
                return math.inf
        stored = np.asarray(_gather(got[0], at, dtype=jnp.float32))
        if not np.array_equal(stored[:, latent:], np.asarray(rope).astype(np.float32)):
            return math.inf
        index_error = _relative(_gather_index(got[1], at, dtype=jnp.float32), key)
        return max(_relative(stored[:, :latent], rows), index_error)

    caches = jax.eval_shape(lambda: (kv_cache(layout, flavour, PAGE), index_cache(flavour, PAGE, DIM)))
    size = nbytes(jax.eval_shape(lambda: each(0))) + tokens * sum(c.bytes_per_token for c in caches)
    # Rounding to three bits of mantissa is 2.6e-2 of the norm.
    return Work(fn, each, size, 0, error, 4e-2, state=state)


def _compress(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Entries of one decode step: every ratio-th of the requests closes a window."""
    del query
    batch, ratio, page_size = sizes["batch"], sizes["ratio"], sizes["page_size"]
    dim, overlap = VALUE_DIM, ratio == 4
    channels, pages = (2 if overlap else 1) * dim, sizes["pages"]

    def state():
        _, entries = entry_pages(jnp.zeros((0, 0), jnp.int32), page_size=page_size, ratio=ratio)
        latent, group, scale = LAYOUTS["v4"]
        cache = PagedKVCache.create(
            batch * pages,
            entries,
            latent_dim=latent,
            rope_dim=ROPE,
            group_size=group,
            dtype=jnp.dtype(flavour),
            scale_dtype=scale,
        )
        shape = CompressorState.create(batch, ratio=ratio, dim=dim, overlap=overlap).kv.shape
        return cache, CompressorState(*(jax.random.normal(_key(19 + i), shape) for i in range(2)))

    def each(number):
        # Positions one apart, so that every ratio-th request closes, the first among them; far from a first window.
        positions = pages * page_size // 2 - 1 + jnp.arange(batch, dtype=jnp.int32)
        table = _permutation(_key(21, number), batch * pages).reshape(batch, pages)
        kv, gate = (jax.random.normal(_key(22 + i, number), (batch, channels)) for i in range(2))
        bias = jax.random.normal(_key(24, number), (ratio, channels))
        return kv, gate, bias, jnp.ones(dim), positions, table

    def fn(cache, state, kv, gate, bias, norm, positions, table, *, implementation=None):
        rows = jnp.arange(batch, dtype=jnp.int32)
        return compress(
            cache,
            state,
            kv,
            gate,
            bias,
            norm,
            jnp.full((ROPE // 2,), 0.01),
            positions=positions,
            request_ids=rows,
            query_indptr=jnp.arange(batch + 1, dtype=jnp.int32),
            seq_lens=positions + 1,
            page_table=table,
            page_size=page_size,
            ratio=ratio,
            implementation=implementation,
        )

    def error(arguments, got):
        want = jax.jit(functools.partial(fn, implementation="reference"))(*arguments)
        after, wanted = (jax.tree.leaves(x[1]) for x in (got, want))
        if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(after, wanted)):
            return math.inf
        every = jnp.arange(got[0].num_slots)
        return _relative(*(_gather(cache, every, dtype=jnp.float32) for cache in (got[0], want[0])))

    closed = batch // ratio
    read = closed * ratio * channels * 8 + batch * channels * 16
    # A value between two codes may fall to either side: an eighth of it, once in a thousand.
    return Work(fn, each, read + closed * 583, 0, error, 4e-3, state=state)


# --- the attention layers of a decode step ---------------------------------------------------------------------------
def _step_config(sizes: Mapping[str, int], query: str) -> DeepseekV32Config:
    from sparse_mla_jax import step_inspection

    return dataclasses.replace(
        step_inspection.published_config(heads=sizes["heads"], layers=sizes["layers"]),
        hidden_size=sizes["hidden"],
        q_lora_rank=sizes["q_rank"],
        index_topk=sizes["k"],
        quantize_index_query=query not in ("", "bfloat16"),
    )


@functools.partial(jax.jit, static_argnames="config")
def _attention_params(key: Array, config: DeepseekV32Config) -> Any:
    """Weights of one layer as they are used; those of feed-forward layers are never made."""
    from sparse_mla_jax.layers.mla import fuse_projections
    from sparse_mla_jax.models.deepseek_v32 import init_params

    one = dataclasses.replace(config, num_hidden_layers=1, n_routed_experts=0)
    return fuse_projections(init_params(key, one, jnp.bfloat16)["layers"][0]["self_attn"])


def _step(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Attention layers of DeepSeek-V3.2, one token per request, at the end of a full context.

    Several layers are one program, each with weights and caches of its own: too many to be made twice, so that of their
    result only finiteness is checked.
    """
    from sparse_mla_jax import step_inspection

    batch, context, layers = sizes["batch"], sizes["context"], sizes["layers"]
    config, slots, single = _step_config(sizes, query), batch * context, layers == 1
    build_step = step_inspection.layer_step if single else step_inspection.layers_step
    steps = {
        name: build_step(config, batch=batch, context=context, cache_dtype=jnp.dtype(flavour), implementation=name)
        for name in (None, "triton", "xla", "reference")
    }

    def shared():
        params = tuple(_attention_params(_key(15, n), config) for n in range(layers))
        return params if single else (params,)

    def state():
        caches = tuple(
            (kv_cache("v32", flavour, slots), index_cache(flavour, slots, config.index_head_dim)) for _ in range(layers)
        )
        return caches if single else (caches,)

    def each(number):
        pages = _permutation(_key(16, number), slots // PAGE)
        hidden = jax.random.normal(_key(17, number), (batch, config.hidden_size), jnp.bfloat16)
        return hidden, jnp.full(batch, context, jnp.int32), pages.reshape(batch, -1)

    def fn(caches, params, hidden, seq_lens, table, *, implementation=None):
        out, caches = steps[implementation].fn(params, hidden, caches, seq_lens, table)
        return caches, out

    def error(arguments, got):
        if not single:
            return 0.0 if np.isfinite(np.asarray(got[1]).astype(np.float32)).all() else math.inf
        other = "reference" if jax.default_backend() == "cpu" else "xla"
        want = jax.jit(functools.partial(fn, implementation=other))(*arguments)
        return _relative(got[1], want[1])

    weights = jax.eval_shape(shared)
    caches = jax.eval_shape(lambda: (kv_cache("v32", flavour, PAGE), index_cache(flavour, PAGE, config.index_head_dim)))
    latent, index = (c.bytes_per_token for c in caches)
    visible = min(config.index_topk, context)
    read = batch * layers * (visible * latent + context * index)
    size = nbytes(weights, jax.eval_shape(lambda: each(0))) + read + 2 * batch * config.hidden_size
    scored = config.index_n_heads * config.index_head_dim * context
    attended = config.num_attention_heads * visible * (512 + ROPE + VALUE_DIM)
    products = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    flops = 2 * batch * (layers * (scored + attended) + products)
    # A selection that differs in one key of a row moves that row by a few per cent; FP8 queries differ in more keys.
    bound = 4e-2 if config.quantize_index_query else 2e-2
    return Work(fn, each, size, flops, error, bound, shared, state, has_bodies=single, replays=single)


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


def _topk_cases() -> Iterator[Case]:
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


def _indexer_cases() -> Iterator[Case]:
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
    sizes |= {"rings": batch * max(2 * window, (1 << 16) // batch), "slots": batch * (1 << 18) // batch}
    name = f"decode-v4-b{batch}-h{heads}-w{window}-k{selected}{wide}"
    return Case(name, "decode", sizes, _two_sources, **given)


def _decode_cases() -> Iterator[Case]:
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


def _prefill_cases() -> Iterator[Case]:
    make = functools.partial(_attention, layout="v32", own=False, ragged=False)
    for heads, reach, floor in ((16, 300.0, 650.0), (128, 1157.0, 2600.0)):
        sizes = {"tokens": 1024, "heads": heads, "selected": 2048, "slots": 131072}
        yield Case(
            f"prefill-t1024-h{heads}-k2048", "prefill", sizes, make, (*FP8, "bfloat16"), reach=reach, floor=floor
        )


def _cache_cases() -> Iterator[Case]:
    for layout in LAYOUTS:
        make = functools.partial(_write, layout=layout)
        yield Case(f"cache-{layout}-t128", "cache", {"tokens": 128, "slots": 1 << 18}, make, reach=5.0)
    for ratio in (4, 128):
        sizes = {"batch": 128, "ratio": ratio, "page_size": 256, "pages": 16}
        yield Case(f"cache-compress-{ratio}-b128", "cache", sizes, _compress)


def _step_cases() -> Iterator[Case]:
    config = DeepseekV32Config()
    sizes = {
        "batch": 64,
        "heads": 16,
        "context": 32768,
        "k": config.index_topk,
        "hidden": config.hidden_size,
        "q_rank": config.q_lora_rank,
    }
    yield Case("step-v32-attention-b64-h16", "step", sizes | {"layers": 1}, _step, queries=QUERIES)
    # All layers of the published model; 101 GB of caches.
    every = sizes | {"layers": config.num_hidden_layers}
    yield Case("step-v32-attention-b64-h16-61-layers", "step", every, _step, queries=QUERIES)


CASES = (
    *_topk_cases(),
    *_indexer_cases(),
    *_decode_cases(),
    *_prefill_cases(),
    *_cache_cases(),
    *_step_cases(),
)


def case(name: str) -> Case:
    """The case of that name.

    Raises:
      ValueError: there is none.
    """
    found = next((c for c in CASES if c.name == name), None)
    require(found is not None, f"case is {name!r}; expected one of {', '.join(c.name for c in CASES)}.")
    return found  # type: ignore[return-value]


def chosen(area: str | None, text: str | None) -> tuple[Case, ...]:
    """Cases of an area (None: all) whose name contains `text` (None: all).

    Raises:
      ValueError: none is left.
    """
    found = tuple(c for c in CASES if area in (None, c.area))
    matching = tuple(c for c in found if text is None or text in c.name)
    require(
        len(matching) > 0,
        f"--case {text!r} is in no name of {'any area' if area is None else f'area {area}'}; names are"
        f" {', '.join(c.name for c in found)}.",
    )
    return matching
