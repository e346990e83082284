"""The types of cases: a case is a named problem, timed at full size or executed by an interpreter at a small size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

FP8 = ("float8_e4m3fnuz", "float8_e4m3fn")


KINDS = (*FP8, "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class KernelProblem:
    """A call of one kernel with its answer.

    Attributes:
      fn: jittable; takes `args` and the options implementation="triton" and plan=None, launches the kernel once.
      args: arrays and caches.
      error: error of the outputs: relative for scores and attention, number of wrong indices for top-k, of wrong bytes
        for cache writes.
      bound: largest error that passes.
      bytes: bytes that the kernel must read and write once; memory bandwidth sets a lower bound of its time.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    error: Callable[[Any], float]
    bound: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A named problem.

    Attributes:
      name: its name in `inspect --kernel`.
      what: description of its sizes.
      build: (kind of cache, query heads or None) -> KernelProblem.
      kinds: cache types that it supports; empty if it has no cache type.
    """

    name: str
    what: str
    build: Callable[[str, int | None], KernelProblem]
    kinds: tuple[str, ...] = KINDS


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


@dataclasses.dataclass(frozen=True)
class Work:
    """A case with its function and inputs. A call is fn(*state(), *shared(), *each(n)).

    Attributes:
      fn: jittable; takes the arguments and implementation=.
      each: number of an argument set -> the arguments that differ between calls, random. Traceable, like `shared` and
        `state`.
      shared: () -> the large arguments that all calls share.
      state: () -> donated arguments; the first outputs of fn replace them.
      bytes: bytes that must be read and written once.
      flops: of the matrix products.
      error: (arguments, outputs) -> error of the outputs; infinite if they are wrong beyond rounding.
      bound: largest error that passes.
      has_bodies: whether `implementation` makes a difference.
      replays: whether memory allows to make the state again beside the outputs. If not, `error` gets no state.
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
        """All arguments of a call; under `jax.eval_shape` their shapes only."""
        return (*self.state(), *self.shared(), *self.each(number))


@dataclasses.dataclass(frozen=True)
class Case:
    """A named problem size.

    Attributes:
      name: its name for `bench --case`.
      area: its group for `bench AREA`; the name begins with it.
      sizes: named integers.
      make: (sizes, flavour, query type) -> Work.
      flavours: types of its caches; one empty string if it has no cache.
      queries: types of the indexer's queries; "cache" means the type of the cache, see QUERIES.
      reach, floor: targets in microseconds on an H200, None for no target.
      at_most: (factor, name): target of at most `factor` times the time of that case.
      parts: names of cases that together do the same work.
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
        """The same case with sizes for a CPU and without targets."""
        sizes = {name: min(size, SMALL.get(name, size)) for name, size in self.sizes.items()}
        return dataclasses.replace(self, sizes=sizes, reach=None, floor=None, at_most=None)

    def variants(self) -> Iterator[tuple[str, str]]:
        """Yields every (type of the caches, type of the indexer's queries)."""
        for flavour in self.flavours:
            for query in self.queries:
                yield flavour, flavour if query == "cache" else query
