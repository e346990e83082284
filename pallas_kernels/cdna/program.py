"""A compiled function: its kernels in launch order, their code objects, assembly and resources."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.targets import CDNA

# Data from `targets`, by architecture.
ARCHITECTURES = tuple(t.name for t in CDNA)
LDS_BYTES = {t.name: t.lds_bytes for t in CDNA}
COMPUTE_UNITS = {t.name: t.units for t in CDNA}
BANDWIDTH = {t.name: t.bandwidth for t in CDNA}
CLOCK = {t.name: t.clock for t in CDNA}
MEMORY = {t.name: t.memory for t in CDNA}
PRODUCT = {t.name: t.product for t in CDNA}
COMPILERS = ("xla", "triton")
MAX_THREADS = 1024
LANES = 64
# Registers of a lane, vector and accumulation registers together, and how many of each an instruction can name; scalar
# registers of a wave that an instruction can name. The hardware allocates them in groups. Source: LLVM's "User Guide
# for AMDGPU Backend", GFX90A and later.
VGPRS, NAMED_VGPRS, VGPR_GRANULE = 512, 256, 8
SGPRS, SGPR_GRANULE = 102, 16
# Bytes of scratch memory of a lane: a wave's share is a number of 13 bits that counts 1024 bytes each
# (COMPUTE_TMPRING_SIZE).
SCRATCH_BYTES = ((1 << 13) - 1) * 1024 // LANES


@dataclasses.dataclass(frozen=True)
class Resources:
    """Registers and memory that a kernel occupies.

    Attributes:
      vgprs: vector registers per lane, including accumulation registers (512 at most).
      agprs: accumulation registers per lane.
      sgprs: scalar registers per wave.
      vgpr_spills, sgpr_spills: registers that the compiler spilled.
      scratch: bytes of scratch memory per lane.
      lds: bytes of LDS per workgroup, including dynamic LDS.
      occupancy: waves that fit on one SIMD, by registers and LDS; 0 if a workgroup needs more LDS than exists.
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
    """One 64-bit pointer of a kernel's argument block.

    Attributes:
      shape, dtype: shape and dtype of the array at this address.
      role: "input" or "output".
      in_place_of: for an output that overwrites an input, the number of that input's argument; else None.
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
    """One launch of a kernel.

    Attributes:
      name: the symbol in the code object.
      arch: "gfx942" or "gfx950".
      compiler: the compiler and its version, such as "Triton 3.6.0" or "XLA:ROCm 0.12.0".
      origin: "pallas" for a Pallas kernel of the function, "xla" for a kernel that XLA generated.
      grid: workgroups per axis.
      block: threads per axis.
      code_object: the ELF file that the driver would load.
      assembly: assembly text with `.amdhsa_` directives, the input of the interpreter.
      resources: registers, spills, LDS, occupancy.
      arguments: pointers in the order of the argument block; empty for a kernel whose buffers are unknown.
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
        """Threads per workgroup."""
        return self.block[0] * self.block[1] * self.block[2]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function for one architecture.

    Attributes:
      arch, compiler: as in `Kernel`.
      kernels: in launch order; the same code object may be launched more than once.
      temporary_bytes: memory that XLA allocates beside inputs and outputs, on each device as the three below; None for
        the Triton wheel, as they are.
      argument_bytes, output_bytes: memory of the inputs and of the outputs.
      alias_bytes: memory that both count, for outputs that reuse the buffer of an input.
      in_place: numbers of the (flattened) inputs whose buffer an output reuses; None for the Triton wheel.
      copies: (bytes, description) of each copy that XLA runs as a separate step; None for the Triton wheel.
      library_calls: names of steps that are not kernels of this program (matrix products of hipBLASLt, for example).
      hlo: text of the optimised program; empty for the Triton wheel.
      devices: number of devices that run the program; kernels, inputs and memory are those of one of them.
    """

    arch: str
    compiler: str
    kernels: tuple[Kernel, ...]
    temporary_bytes: int | None = None
    in_place: tuple[int, ...] | None = None
    copies: tuple[tuple[int, str], ...] | None = None
    library_calls: tuple[str, ...] = ()
    hlo: str = ""
    devices: int = 1
    argument_bytes: int | None = None
    output_bytes: int | None = None
    alias_bytes: int | None = None

    @property
    def pallas_kernels(self) -> tuple[Kernel, ...]:
        """Launches of the function's Pallas kernels."""
        return tuple(k for k in self.kernels if k.origin == "pallas")

    @property
    def memory_bytes(self) -> int | None:
        """Memory of one device that the program needs: inputs, outputs and temporaries; None for the Triton wheel."""
        parts = self.argument_bytes, self.output_bytes, self.temporary_bytes, self.alias_bytes
        inputs, outputs, temporaries, both = (0 if part is None else part for part in parts)
        return None if None in parts else inputs + outputs + temporaries - both
