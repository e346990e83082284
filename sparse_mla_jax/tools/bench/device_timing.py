"""Times compiled functions by the device's own counters, and measures the two ceilings of a machine.

On an NVIDIA GPU, CUPTI gives the time of each kernel, and the time of a call is the sum over its kernels. It excludes
gaps between kernels, and copies and fills by copy engines; `wall_microseconds` includes them. On other devices, every
time is wall clock.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require

CUPTI, WALL_CLOCK = "CUPTI", "wall clock"
# Last-level cache of an H200. Inputs of more than twice this size in total are read from device memory.
L2_BYTES = 50 << 20
# Most bytes of all argument sets together.
MEMORY_BYTES = 20 << 30


@dataclasses.dataclass(frozen=True)
class TimedKernel:
    """All launches of one kernel name within a call: their number and total time in microseconds."""

    name: str
    launches: int
    microseconds: float


@dataclasses.dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
      microseconds: median over the calls.
      low, high: the fastest and the slowest call.
      calls: number of timed calls.
      method: CUPTI or WALL_CLOCK.
      kernels: the kernels of a call, slowest first; empty for wall clock.
      wall_microseconds: wall-clock time per call, of many calls enqueued without waiting.
    """

    microseconds: float
    low: float
    high: float
    calls: int
    method: str
    kernels: tuple[TimedKernel, ...]
    wall_microseconds: float

    @property
    def launches(self) -> int:
        """Kernels that a call launches."""
        return sum(k.launches for k in self.kernels)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured limits of the machine: reading device memory in GB/s, bfloat16 matrix product in TFLOPS."""

    read_gbps: float
    matmul_tflops: float

    def percent(self, gbps: float, tflops: float) -> float:
        """The larger of both rates, in percent of its ceiling."""
        return 100 * max(gbps / self.read_gbps, tflops / self.matmul_tflops)


def method() -> str:
    """The timing method of the default device."""
    return CUPTI if "NVIDIA" in jax.devices()[0].device_kind else WALL_CLOCK


def number_of_sets(touched: int, held: int, calls: int) -> int:
    """Number of argument sets to rotate.

    Either more than twice the last-level cache is touched between two uses of a set, or no set is used twice.

    Args:
      touched: bytes that a call reads and writes.
      held: bytes of one set, without shared arguments.
      calls: timed calls; one more warms up.
    """
    wanted = 1 + -(-2 * L2_BYTES // max(touched, 1))
    return max(1, min(calls + 1, wanted, MEMORY_BYTES // max(held, 1)))


@functools.lru_cache(maxsize=1)
def _twice_the_cache() -> Array:
    return jax.block_until_ready(jnp.ones((2 * L2_BYTES // 4,), jnp.float32))


class Rotation:
    """Calls a compiled function on the next argument set each time, waits for the result and drops it.

    `trace` and `lower` make the profiler take it for a jitted function and call it directly.
    """

    def __init__(self, fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], state: tuple[Any, ...] = ()):
        self.fn, self.sets, self.state, self.calls = fn, sets, state, 0
        self.waits = True

    def __call__(self) -> None:
        """One call: fn(*state, *set); the first outputs are the state of the next call."""
        out = self.fn(*self.state, *self.sets[self.calls % len(self.sets)])
        self.calls += 1
        self.state = tuple(out[: len(self.state)]) if self.state else ()
        if self.waits:
            jax.block_until_ready(out)
        self.last = out

    def finish(self) -> None:
        """Waits for the last call and drops its result."""
        jax.block_until_ready(self.last)
        self.last = None

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """Never called; see the class."""
        raise NotImplementedError

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Never called; see the class."""
        raise NotImplementedError


class _AfterFlush(Rotation):
    """A Rotation whose first, untimed call also evicts the newly made arguments from the last-level cache."""

    def __call__(self) -> None:
        first = self.calls == 0
        super().__call__()
        if first:
            jax.block_until_ready(jnp.sum(_twice_the_cache()))


def _by_counters(rotation: Rotation, calls: int) -> list[list[tuple[str, float]]]:
    """(kernel, ms) of every launch of every call."""
    from jax.experimental.mosaic.gpu import profiler

    found: Any
    try:
        _, found = profiler.measure(rotation, aggregate=False, iterations=calls)()
        found = [found] if calls == 1 else found
    except RuntimeError as error:
        if "iterations" not in str(error):
            raise
        # Measure calls one by one: with loops of data-dependent length they launch different kernels.
        found = [profiler.measure(rotation, aggregate=False)()[1] for _ in range(calls)]
    if not found or not all(found):
        raise RuntimeError("the profiler saw no kernel")
    return found


def split(calls: Sequence[Sequence[tuple[str, float]]]) -> tuple[TimedKernel, ...]:
    """Kernels of a call, slowest first, from (name, ms) of each launch: the median over calls for each name."""
    times: dict[str, list[float]] = collections.defaultdict(list)
    launches: dict[str, int] = {}
    for call in calls:
        count = collections.Counter(name for name, _ in call)
        for name, n in count.items():
            times[name].append(1e3 * sum(ms for other, ms in call if other == name))
            launches[name] = max(n, launches.get(name, 0))
    found = [TimedKernel(name, launches[name], statistics.median(each)) for name, each in times.items()]
    return tuple(sorted(found, key=lambda k: -k.microseconds))


def time_calls(
    fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], *, calls: int, state: tuple[Any, ...] = ()
) -> Timing:
    """Times `calls` calls of a compiled function, after one that is not timed.

    Args:
      fn: compiled, (*state, *arguments) -> outputs; the first outputs are the state of the next call.
      sets: argument sets, used in turn.
      calls: at least 1.
      state: donated arguments.

    Raises:
      ValueError: calls below 1, or no arguments.
      RuntimeError: the profiler saw no kernel.
    """
    require(calls >= 1, f"calls is {calls}; at least 1 is expected.")
    require(len(sets) > 0, "sets is empty; one set of arguments at least is expected.")
    how = method()
    rotation = (_AfterFlush if how == CUPTI else Rotation)(fn, sets, state)
    kernels: tuple[TimedKernel, ...] = ()
    if how == CUPTI:
        found = _by_counters(rotation, calls)
        times = [1e3 * sum(ms for _, ms in call) for call in found]
        kernels = split(found)
    else:
        rotation()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            rotation()
            times.append(1e6 * (time.perf_counter() - start))
    wall = _without_waiting(rotation, calls)
    return Timing(statistics.median(times), min(times), max(times), calls, how, kernels, wall)


def _without_waiting(rotation: Rotation, calls: int) -> float:
    """Wall-clock microseconds per call, of many calls enqueued without waiting."""
    rotation.waits = False
    start = time.perf_counter()
    for _ in range(calls):
        rotation()
    rotation.finish()
    return 1e6 * (time.perf_counter() - start) / calls


def wall_time(
    fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int, state: tuple[Any, ...] = ()
) -> float:
    """`Timing.wall_microseconds` alone, after three untimed calls; arguments as for `time_calls`."""
    rotation = Rotation(fn, sets, state)
    del state
    for _ in range(3):
        rotation()
    return _without_waiting(rotation, calls)


def measure_ceilings(*, calls: int = 10, small: bool = False) -> Ceilings:
    """Measures both ceilings: the sum of 2 GiB, and a product of two random bfloat16 8192 x 8192 matrices.

    Args:
      calls: timed calls of each, of which the median is taken.
      small: use 16 MiB and 256 x 256, for a CPU.
    """
    elements, side = (4 << 20, 256) if small else (512 << 20, 8192)
    key = jax.random.key(0)
    numbers = jax.jit(lambda key: jax.random.uniform(key, (elements,)))(key)
    read = time_calls(jax.jit(jnp.sum), [(numbers,)], calls=calls)
    numbers.delete()
    matrices = jax.jit(lambda key: tuple(jax.random.normal(key, (2, side, side), jnp.bfloat16)))(key)
    product = time_calls(jax.jit(jnp.dot), [matrices], calls=calls)
    return Ceilings(4e-3 * elements / read.microseconds, 2e-6 * side**3 / product.microseconds)
