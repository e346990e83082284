"""A case of `bench` and its work: sizes, targets, what a call moves, its check; random inputs that cases share.

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

from sparse_mla_jax.kernel_cases import FP8
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.ragged import Ragged

PAGE = 64
# Latent values, group, type of the scales.
LAYOUTS = {"v32": (512, 128, jnp.float32), "v4": (448, 64, jnp.float8_e8m0fnu)}
# Rotated values of a key, values of an attention result and of a key of the indexer.
ROPE, VALUE_DIM, DIM = 64, 512, 128
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
    "o_rank": 16,
    "index_k": 16,
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
      area: what `bench AREA` finds; its name begins with it.
      sizes: named integers.
      make: (sizes, flavour, query type) -> Work.
      flavours: types of its caches; one empty string where it has none.
      queries: types of the indexer's queries; "cache" for that of the caches, see QUERIES.
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


# --- what several areas share ----------------------------------------------------------------------------------------
def nbytes(*trees: Any) -> int:
    """Bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(trees))


def seed(purpose: int, number: int | Array = 0) -> Array:
    """A random key of its own for every purpose and set of arguments."""
    # The generator that compiles quickest; nothing here asks for more.
    return jax.random.fold_in(jax.random.key(purpose, impl="unsafe_rbg"), number)


def permutation(key: Array, count: int) -> Array:
    """int32 [count], 0..count-1 in random order."""
    return jnp.argsort(jax.random.bits(key, (count,))).astype(jnp.int32)


def sample(rows: int) -> np.ndarray:
    """Rows that are checked: first, last, and evenly between."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE)).round().astype(np.int32))


@jax.jit
def _rows_of(x: Any, rows: Any) -> Any:
    return x[rows]


def take(x: Any, rows: np.ndarray) -> np.ndarray:
    """Some rows of a large array on the host."""
    return np.asarray(_rows_of(x, rows))


# Compiled whole: operation by operation costs a compilation each.
gather = jax.jit(cache_ops.gather, static_argnames="dtype")
gather_index = jax.jit(cache_ops.gather_index, static_argnames="dtype")
dense = jax.jit(Ragged.to_dense, static_argnames="width")


def relative(got: Any, want: Any) -> float:
    """Error in the norm, relative to it; infinite where something is not finite."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if np.isfinite(got).all() else math.inf


def distinct(key: Array, rows: int, wanted: int, room: int) -> Array:
    """int32 [rows, wanted]: ascending, distinct, one from each of `wanted` equal parts of 0..room-1."""
    part = room // wanted
    return jnp.arange(wanted, dtype=jnp.int32) * part + jax.random.randint(key, (rows, wanted), 0, part, jnp.int32)


def random_slots(key: Array, rows: int, selected: int, slots: int, *, own: bool) -> Array:
    """int32 [rows, selected] of slots in random pages; `own`: each row reads its own part of the cache."""
    room = slots // rows if own else slots
    position = distinct(key, rows, selected, room)
    if own:
        position += room * jnp.arange(rows, dtype=jnp.int32)[:, None]
    pages = permutation(jax.random.fold_in(key, 1), slots // PAGE)
    return pages[position // PAGE] * PAGE + position % PAGE


def filled[Cache: (PagedKVCache, PagedIndexCache)](cache: Cache) -> Cache:
    """`cache` with random tokens in all of its slots, written through the library's own quantiser."""
    # Some at a time: what is written is held as float32.
    some = min(cache.num_slots, 1 << 14)

    def fill(i: Array, cache: Any) -> Any:
        key, at = seed(1, i), i * some + jnp.arange(some, dtype=jnp.int32)
        if isinstance(cache, PagedIndexCache):
            return cache_ops.write_index(cache, jax.random.normal(key, (some, cache.dim)), at)
        latent = jax.random.normal(key, (some, cache.latent_dim))
        return cache_ops.write(cache, latent, jax.random.normal(jax.random.fold_in(key, 1), (some, ROPE)), at)

    return jax.lax.fori_loop(0, -(-cache.num_slots // some), fill, cache)


@functools.partial(jax.jit, static_argnames=("layout", "flavour", "slots"))
def kv_cache(layout: str, flavour: str, slots: int) -> PagedKVCache:
    """A cache of `slots` random tokens."""
    latent, group, scale = LAYOUTS[layout]
    empty = PagedKVCache.create(
        slots // PAGE,
        PAGE,
        latent_dim=latent,
        rope_dim=ROPE,
        group_size=group,
        dtype=jnp.dtype(flavour),
        scale_dtype=scale,
    )
    return filled(empty)


@functools.partial(jax.jit, static_argnames=("flavour", "slots", "dim"))
def index_cache(flavour: str, slots: int, dim: int) -> PagedIndexCache:
    """The same of an indexer's keys."""
    return filled(PagedIndexCache.create(slots // PAGE, PAGE, dim=dim, dtype=jnp.dtype(flavour)))
