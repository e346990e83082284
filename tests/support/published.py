"""Problems that an interpreter executes, as machine code: each is executed once in a process, whoever asserts on it.

Tests of one problem belong in one worker: mark them with `published.group(name)`.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from cdna_support import require_cdna

from pallas_kernels import cdna
from pallas_kernels.cdna.device_context import Launch
from pallas_kernels.cdna.interpreter.machine import LANES
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8, KernelCase, KernelProblem
from sparse_mla_jax.tools.inspect.kernels import NATIVE, Measurement, measure


@dataclasses.dataclass(frozen=True)
class Executed:
    """One execution: what `inspect` says of it, leaves of its results, and launches in order of completion."""

    measurement: Measurement
    outputs: tuple[np.ndarray, ...]
    launches: tuple[Launch, ...]

    @property
    def output_bytes(self) -> bytes:
        return b"".join(leaf.tobytes() for leaf in self.outputs)


def kinds(case: KernelCase) -> list[str]:
    """Types of cache in which the kernel is measured: both FP8 flavours where it has a cache."""
    return [kind for kind in FP8 if kind in case.kinds] or [""]


def native(case: KernelCase, arch: str) -> str:
    """The type of cache whose matrix instructions `arch` has, or "" for a kernel without a cache.

    By default a case runs in this one; `make test-all` has every type on every machine.
    """
    return NATIVE[arch] if NATIVE[arch] in case.kinds else ""


# XLA:ROCm compiles a kernel for up to ten seconds, Triton's wheel for less than one: by default on one machine, and
# without the kernels that take longest.
RARE = ("gfx942", "xla")
LONG = {
    "compress",
    "compress_index",
    "compress_128",
    "cache_write",
    "cache_write_v4",
    "sparse_mla",
    "sparse_mla_narrow",
    "sparse_mla_v4_window",
}
# The same kernels at the sizes of other models: all of their tests are slow. Of attention and of norms, one is not.
OTHER_SIZES = {
    "sparse_mla_sinks",
    "sparse_mla_nope",
    "sparse_mla_wide",
    "split_streams_independent_wide",
    "norm_rope_query_halves",
    "norm_rope_query_pairs",
}


def marks(name: str, kind: str, arch: str, compiler: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that executes this problem: its group, and `slow` where `make test` leaves it out."""
    quick = compiler == "triton" or ((arch, compiler) != RARE and name not in LONG)
    by_default = quick and name not in OTHER_SIZES and kind == native(catalogue.kernel_case(name), arch)
    return [group(name), *([] if by_default else [pytest.mark.slow])]


def group(name: str) -> pytest.MarkDecorator:
    """The mark of tests that use this problem."""
    return pytest.mark.xdist_group(f"published {name}")


@functools.cache
def problem(name: str, kind: str, heads: int | None) -> KernelProblem:
    """The problem, whose inputs and answer are made once for every architecture, compiler and order of waves."""
    return catalogue.kernel_case(name).build(kind, heads)


def measured(
    name: str, kind: str, arch: str, compiler: str = "triton", *, order: str = "together", heads: int | None = None
) -> Executed:
    """Executes the problem on `arch`, once; skips where the compiler is missing.

    order: how waves take turns, see `cdna.device`; workgroups of one wave know only one.
    """
    require_cdna(compiler)
    first = _measured(name, kind, arch, compiler, heads)
    if order == "together" or all(launch.kernel.threads <= LANES for launch in first.launches):
        return first
    return _in_order(name, kind, arch, compiler, order, heads)


@functools.cache
def _measured(name: str, kind: str, arch: str, compiler: str, heads: int | None) -> Executed:
    """Through `measure` of `inspect`, which shows its results to nobody but the problem's own `error`."""
    p, seen = problem(name, kind, heads), []

    def error(out: Any) -> float:
        seen.append(_leaves(out))
        return p.error(out)

    case = dataclasses.replace(catalogue.kernel_case(name), build=lambda *_: dataclasses.replace(p, error=error))
    found = measure(case, kind, arch, compiler, heads)
    (outputs,) = seen
    return Executed(found, outputs, (found.launch,))


@functools.cache
def _in_order(name: str, kind: str, arch: str, compiler: str, order: str, heads: int | None) -> Executed:
    p, first = problem(name, kind, heads), _measured(name, kind, arch, compiler, heads)
    with cdna.device(arch, compiler=compiler, order=order) as device:
        out = jax.block_until_ready(jax.jit(p.fn)(*p.args))
    measurement = dataclasses.replace(first.measurement, launch=device.launches[0], error=p.error(out))
    return Executed(measurement, _leaves(out), tuple(device.launches))


def _leaves(out: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(leaf) for leaf in jax.tree.leaves(out))
