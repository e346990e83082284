"""What a compiler made of a jitted function: kernels in launch order, their code objects, assembly and resources."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.targets import CDNA

# By architecture, from `targets`.
ARCHITECTURES = tuple(t.name for t in CDNA)
LDS_BYTES = {t.name: t.lds_bytes for t in CDNA}
COMPUTE_UNITS = {t.name: t.units for t in CDNA}
BANDWIDTH = {t.name: t.bandwidth for t in CDNA}
CLOCK = {t.name: t.clock for t in CDNA}
PRODUCT = {t.name: t.product for t in CDNA}
COMPILERS = ("xla", "triton")
MAX_THREADS = 1024


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a wave of the kernel occupies.

    Attributes:
      vgprs: vector registers of a lane in all, accumulation registers included (512 at most).
      agprs: those of them that are accumulation registers.
      sgprs: scalar registers.
      vgpr_spills, sgpr_spills: registers that the compiler moved out of the register file.
      scratch: bytes of scratch memory a lane.
      lds: bytes of LDS a workgroup, dynamic part included.
      occupancy: waves that fit on one SIMD, by registers and LDS; 0 when a workgroup has more LDS than there is.
    """

    vgprs: int
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int
    lds: int
    occupancy: int


@dataclasses.dataclass(frozen=True)
class Argument:
    """One 64-bit pointer of a kernel's argument block, in order.

    Attributes:
      shape, dtype: of the array behind it.
      role: "input" or "output".
      in_place_of: for an output that is written over an input: number of that argument.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    role: str
    in_place_of: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch.

    Attributes:
      name: the symbol in the code object.
      arch: "gfx942" or "gfx950".
      compiler: what made it, with version: "Triton 3.6.0" or "XLA:ROCm 0.12.0".
      origin: "pallas" for a kernel of ours, "xla" for one that XLA added.
      grid: workgroups per axis.
      block: threads per axis.
      code_object: the ELF file that the driver would load.
      assembly: its text with `.amdhsa_` directives, as the interpreter reads it.
      resources: registers, spills, LDS, occupancy.
      arguments: pointers in the order of the argument block; empty for a kernel whose buffers are not known.
    """

    name: str
    arch: str
    compiler: str
    origin: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    code_object: bytes
    assembly: str
    resources: Resources
    arguments: tuple[Argument, ...] = ()

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return self.block[0] * self.block[1] * self.block[2]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function for one architecture.

    Attributes:
      arch, compiler: as in `Kernel`.
      kernels: in launch order; the same code object may be launched more than once.
      temporary_bytes: memory that XLA allocates beside inputs and outputs, None for the Triton wheel.
      in_place: numbers of the (flattened) inputs whose buffer an output takes over, None for the Triton wheel.
      copies: buffers that XLA copies as a step of their own: (bytes, what), None for the Triton wheel.
      library_calls: names of steps that are not kernels of this program (matrix products of hipBLASLt, for example).
      hlo: text of the optimised program, empty for the Triton wheel.
    """

    arch: str
    compiler: str
    kernels: tuple[Kernel, ...]
    temporary_bytes: int | None = None
    in_place: tuple[int, ...] | None = None
    copies: tuple[tuple[int, str], ...] | None = None
    library_calls: tuple[str, ...] = ()
    hlo: str = ""

    @property
    def pallas_kernels(self) -> tuple[Kernel, ...]:
        """Launches that are kernels of ours."""
        return tuple(k for k in self.kernels if k.origin == "pallas")
