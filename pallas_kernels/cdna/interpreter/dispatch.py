"""A launch of a kernel, and what it may use: what its descriptor allocates, and what the machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pallas_kernels.cdna.interpreter.assembly import Assembly, InterpreterError
from pallas_kernels.cdna.program import (
    LDS_BYTES,
    MAX_THREADS,
    NAMED_VGPRS,
    SCRATCH_BYTES,
    SGPR_GRANULE,
    SGPRS,
    VGPR_GRANULE,
    VGPRS,
)

_FILES = {"v": "vector", "a": "accumulation", "s": "scalar"}


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How a kernel is launched.

    Attributes:
      arguments: address of the argument block.
      grid: workgroups per axis.
      threads: threads per workgroup.
      lds_bytes: bytes of LDS per workgroup; the kernel's own size applies if it is larger.
    """

    arguments: int
    grid: Sequence[int]
    threads: int
    lds_bytes: int = 0


def _rounded(number: int, granule: int) -> int:
    return max(granule, -(-number // granule) * granule)


def registers(assembly: Assembly) -> dict[str, int]:
    """How many registers of each file the hardware grants: what the directives ask for, in whole groups.

    Vector and accumulation registers share one space; accumulation registers begin at the directive `accum_offset`.
    Without directives, all that an instruction can name are granted.
    """
    d = assembly.directives
    vgprs = _rounded(d.get("next_free_vgpr", VGPRS), VGPR_GRANULE)
    first = d.get("accum_offset", NAMED_VGPRS)
    return {
        "v": min(vgprs, first, NAMED_VGPRS),
        "a": max(0, min(vgprs - first, NAMED_VGPRS)) if "accum_offset" in d else min(vgprs, NAMED_VGPRS),
        "s": min(_rounded(d.get("next_free_sgpr", SGPRS), SGPR_GRANULE), SGPRS),
    }


def check(assembly: Assembly, dispatch: Dispatch) -> None:
    """Checks a kernel and its launch against the descriptor and the machine, before any instruction runs.

    Raises:
      ValueError: the grid is empty, or a workgroup has no threads or too many.
      InterpreterError: the architecture is unknown, the kernel asks for more than the machine has, or it names a
        register that it was not granted.
    """
    name, d = assembly.name, assembly.directives
    if len(dispatch.grid) != 3 or min(dispatch.grid) < 1:
        raise ValueError(f"grid is {list(dispatch.grid)}; expected three numbers of workgroups, each at least 1")
    if not 1 <= dispatch.threads <= MAX_THREADS:
        raise ValueError(f"threads is {dispatch.threads}; a workgroup has 1 to {MAX_THREADS}")
    if assembly.arch not in LDS_BYTES:
        raise InterpreterError(f"kernel {name} is for {assembly.arch}; expected one of {', '.join(LDS_BYTES)}")
    lds, scratch = lds_bytes(assembly, dispatch), d.get("private_segment_fixed_size", 0)
    for what, asked, most in (
        ("vector registers a lane", d.get("next_free_vgpr", 0), VGPRS),
        ("bytes of LDS", lds, LDS_BYTES[assembly.arch]),
        ("bytes of scratch memory a lane", scratch, SCRATCH_BYTES),
    ):
        if asked > most:
            raise InterpreterError(f"kernel {name} asks for {asked} {what}; {assembly.arch} has {most}")
    granted = registers(assembly)
    for file, (number, i) in assembly.highest.items():
        if number > granted[file]:
            raise i.error(
                f"kernel {name} has {granted[file]} {_FILES[file]} registers, so there is no {file}{number - 1}"
            )


def lds_bytes(assembly: Assembly, dispatch: Dispatch) -> int:
    """Bytes of LDS of a workgroup."""
    return max(dispatch.lds_bytes, assembly.directives.get("group_segment_fixed_size", 0))
