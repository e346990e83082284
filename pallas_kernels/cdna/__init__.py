"""Compiles kernels for AMD's CDNA GPUs, inspects them and executes them in an interpreter. No GPU is needed.

`compile` turns any jitted function into a `Program` for gfx942 (MI300X) or gfx950 (MI355X). The compiler is XLA:ROCm
or the public Triton wheel. `execute` runs one kernel of the program on numpy arrays and counts the executed
instructions. Inside the context `device`, a program on a CPU host runs every Pallas kernel as that machine code. The
package needs the extra `cdna` and the tools of LLVM 22.

Describe results as "compiled by XLA:ROCm (or Triton) and executed by our interpreter": nothing here ran on a GPU. The
interpreter does not model time, hazards, waits or denormal modes (see `pallas_kernels.cdna.interpreter`).
"""

from pallas_kernels.cdna.collectives import Collective, collectives_of
from pallas_kernels.cdna.compiler import compile, compile_lowered
from pallas_kernels.cdna.device_context import Device, Launch, device
from pallas_kernels.cdna.execution import Counts, Result, execute
from pallas_kernels.cdna.program import ARCHITECTURES, COMPILERS, Kernel, Program, Resources
from pallas_kernels.cdna.toolchain import ToolMissing, available

__all__ = [
    "ARCHITECTURES",
    "COMPILERS",
    "Collective",
    "Counts",
    "Device",
    "Kernel",
    "Launch",
    "Program",
    "Resources",
    "Result",
    "ToolMissing",
    "available",
    "collectives_of",
    "compile",
    "compile_lowered",
    "device",
    "execute",
]
