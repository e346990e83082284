"""A context in which the kernels of a jitted program run as gfx942 or gfx950 machine code on a CPU host."""

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
    """One execution of a kernel: the kernel and what was executed."""

    kernel: Kernel
    counts: Counts


@functools.cache
def _interpreter_thread() -> concurrent.futures.Executor:
    """The thread in which kernels are executed.

    XLA's threads flush subnormals, the kernels' waves do not, and a thread inherits the mode of the one that starts it.
    """
    pool = concurrent.futures.ThreadPoolExecutor(1, "cdna-interpreter")
    pool.submit(int).result()
    return pool


class Device:
    """Executes Pallas kernels as machine code; hashed by identity, so that jit keeps one trace per device.

    Attributes:
      arch: "gfx942" or "gfx950".
      compiler: "triton" or "xla".
      order: how waves take turns, see `execute`.
      launches: every kernel executed so far, in order of completion.
    """

    def __init__(self, arch: str, compiler: str, order: str):
        """Checks the choices; nothing is compiled yet."""
        for name, value, known in (
            ("arch", arch, ARCHITECTURES),
            ("compiler", compiler, COMPILERS),
            ("order", order, ORDERS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        self.arch, self.compiler, self.order = arch, compiler, order
        self.launches: list[Launch] = []
        self._lock = threading.Lock()
        # Started here, outside of XLA.
        self._thread = _interpreter_thread()

    def call(self, kernel_call: Callable, arrays: Sequence[jax.Array], out_shape: Any) -> Any:
        """Compiles the one kernel of `kernel_call` and stages its execution; called while a program is traced."""
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        (lowered,) = lowering.pallas_calls(kernel_call, *avals, arch=self.arch)
        kernel = compiler.compile_kernel(lowered, self.arch, self.compiler)
        leaves, tree = jax.tree.flatten(out_shape)

        def run(context, outs, *buffers):
            del context
            arrays = [np.asarray(b) for b in buffers]
            result = self._thread.submit(execute, kernel, arrays, order=self.order).result()
            with self._lock:
                self.launches.append(Launch(kernel, result.counts))
            for out, value in zip(outs, result.outputs):
                np.asarray(out)[...] = value

        outs = buffer_callback(run, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])(*arrays)
        return jax.tree.unflatten(tree, outs)


@contextlib.contextmanager
def device(arch: str, *, compiler: str = "triton", order: str = "together") -> Iterator[Device]:
    """Within it, `implementation="triton"` on a CPU host runs every kernel as code of `arch`, in our interpreter.

    The rest of a program runs on XLA's CPU backend. Functions jitted before are traced anew: the context is part of
    jit's cache keys. Arrays must be computed (`jax.block_until_ready`) before the context ends, if `launches` is read.

    Args:
      arch: "gfx942" (MI300X) or "gfx950" (MI355X).
      compiler: "triton" (the public Triton wheel, quick) or "xla" (XLA:ROCm, what jax would launch).
      order: "together", "forward" or "reverse"; see `pallas_kernels.cdna.execute`.

    Yields:
      The device, whose `launches` lists what was executed.

    Raises:
      ValueError: an unknown choice.
      ToolMissing: the compiler or the disassembler is not installed (while a program is traced).
    """
    chosen = Device(arch, compiler, order)
    with targets.executor(chosen):
        yield chosen
