"""Kernels for AMD's CDNA GPUs without one: compiled, inspected, and executed by our interpreter.

`compile` makes a `Program` of any jitted function for gfx942 (MI300X) or gfx950 (MI355X), by XLA:ROCm itself or by the
public Triton wheel. `execute` runs one of its kernels on numpy arrays and counts what it executed. Within `device`,
every kernel of a program on a CPU host runs as that machine code. Needs the extra `cdna`, and LLVM 22's tools.

Say "compiled by XLA:ROCm (or Triton) and executed by our interpreter": nothing here ran on a GPU. Not modelled are
time, hazards, waits and denormal modes (see `pallas_kernels.cdna.interpreter`).
"""

from pallas_kernels.cdna.compiler import compile
from pallas_kernels.cdna.device_context import Device, Launch, device
from pallas_kernels.cdna.execution import Counts, Result, execute
from pallas_kernels.cdna.program import ARCHITECTURES, COMPILERS, Kernel, Program, Resources
from pallas_kernels.cdna.toolchain import ToolMissing, available

__all__ = [
    "ARCHITECTURES",
    "COMPILERS",
    "Counts",
    "Device",
    "Kernel",
    "Launch",
    "Program",
    "Resources",
    "Result",
    "ToolMissing",
    "available",
    "compile",
    "device",
    "execute",
]
