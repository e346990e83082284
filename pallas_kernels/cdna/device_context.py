"""Provides a context in which the kernels of a jitted program run as gfx942 or gfx950 machine code on a CPU host."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from pallas_kernels import targets
from pallas_kernels.cdna import compiler, lowering
from pallas_kernels.cdna.execution import Counts, execute
from pallas_kernels.cdna.interpreter.control_flow import ORDERS
from pallas_kernels.cdna.program import ARCHITECTURES, COMPILERS, Kernel


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: the kernel and its counts of executed instructions."""

    kernel: Kernel
    counts: Counts


@functools.cache
def _interpreter_thread() -> concurrent.futures.Executor:
    """Starts the thread that executes kernels.

    XLA's threads flush subnormals to zero; the interpreter must keep them. A thread inherits this mode from the thread
    that starts it, so an XLA thread must not start this one.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, "cdna-interpreter")
    pool.submit(int).result()
    return pool


class Device:
    """Executes Pallas kernels as machine code. Hashes by identity, so that jit keeps one trace per device.

    Attributes:
      arch: "gfx942" or "gfx950".
      compiler: "triton" or "xla".
      order, budget: how waves take turns, and how many instructions each may execute; see `execute`.
      launches: every kernel executed so far, in order of completion.
    """

    def __init__(self, arch: str, compiler: str, order: str, budget: int | None = None):
        """Checks the arguments; compiles nothing."""
        for name, value, known in (
            ("arch", arch, ARCHITECTURES),
            ("compiler", compiler, COMPILERS),
            ("order", order, ORDERS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if budget is not None and budget < 1:
            raise ValueError(f"budget is {budget}; expected at least 1 instruction, or None for the usual budget")
        self.arch, self.compiler, self.order, self.budget = arch, compiler, order, budget
        self.launches: list[Launch] = []
        self._lock = threading.Lock()
        # Start the thread here, outside of XLA's threads.
        self._thread = _interpreter_thread()

    def call(self, kernel_call: Callable, arrays: Sequence[jax.Array], out_shape: Any) -> Any:
        """Compiles the single kernel of `kernel_call` and stages its execution; runs while a program is traced."""
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        (lowered,) = lowering.pallas_calls(kernel_call, *avals, arch=self.arch)
        kernel = compiler.compile_kernel(lowered, self.arch, self.compiler)
        leaves, tree = jax.tree.flatten(out_shape)

        def run(context, outs, *buffers):
            del context
            arrays = [np.asarray(b) for b in buffers]
            run_kernel = functools.partial(execute, kernel, arrays, order=self.order, budget=self.budget)
            result = self._thread.submit(run_kernel).result()
            with self._lock:
                self.launches.append(Launch(kernel, result.counts))
            for out, value in zip(outs, result.outputs):
                np.asarray(out)[...] = value

        outs = buffer_callback(run, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])(*arrays)
        return jax.tree.unflatten(tree, outs)


@contextlib.contextmanager
def device(
    arch: str, *, compiler: str = "triton", order: str = "together", budget: int | None = None
) -> Iterator[Device]:
    """Makes `implementation="triton"` on a CPU host run every kernel as code of `arch` in our interpreter.

    The rest of a program runs on XLA's CPU backend. The context is part of jit's cache key, so functions that were
    jitted before are traced again. To read `launches`, wait for the arrays (`jax.block_until_ready`) before the
    context ends.

    Args:
      arch: "gfx942" (MI300X) or "gfx950" (MI355X).
      compiler: "triton" (the public Triton wheel, faster) or "xla" (XLA:ROCm, the code that jax would launch).
      order: "together", "forward" or "reverse"; see `pallas_kernels.cdna.execute`.
      budget: instructions that one wave may execute; see `pallas_kernels.cdna.execute`.

    Yields:
      The device, whose `launches` lists the executed kernels.

    Raises:
      ValueError: `arch`, `compiler` or `order` is unknown, or `budget` is less than 1.
      ToolMissing: the compiler or the disassembler is not installed (raised while a program is traced).
    """
    chosen = Device(arch, compiler, order, budget)
    with targets.executor(chosen):
        yield chosen
