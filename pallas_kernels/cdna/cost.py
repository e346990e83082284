"""Cost of executed instructions by LLVM's scheduling model: cycles per pipe, and lower bounds by throughput.

All results are estimates of throughput. They ignore latency, dependencies, waits, issue conflicts between waves, cache
misses, bank conflicts and occupancy. A kernel therefore takes longer than any bound below, often many times as long.

**Cycles.** A cycle of LLVM's model for CDNA is one turn of a SIMD, which is four engine clocks. SISchedule.td defines
latencies as "1 / (operations / cycle) / 4". A vector instruction of 64 lanes on a SIMD of 16 takes one cycle, and the
passes of a matrix instruction are counted in these cycles. Functions here return LLVM's cycles; only `lower_bound` and
`transfer_time` convert clocks to microseconds.

**Pipes.** Each resource of LLVM's model is one pipe, with one exception: LDS accesses and scalar loads share the
counter HWLGKM. Here an instruction that occupies HWLGKM belongs to "scalar" if its name begins with `s_`, else to
"LDS". ROCm Compute Profiler's documentation says that scalar loads issue with the scalar unit.

The table compares the model of LLVM 22.1 with AMD's data sheets at the peak clock. Flops per clock and SIMD are
peak / (4 compute units clock):

    instruction                          LLVM cycles   flops a clock and SIMD   data sheet
    v_fma_f32                            1             32                       gfx942 32, gfx950 32 (half of packed)
    v_pk_fma_f32                         1             64                       gfx942 64, gfx950 64
    v_mfma_f32_16x16x4_f32               8             64                       gfx942 64, gfx950 64
    v_mfma_f32_16x16x16_bf16             4             512                      gfx942 512
    v_mfma_f32_32x32x8_f16               8             512                      gfx942 512
    v_mfma_f32_16x16x32_fp8_fp8          4             1024                     gfx942 1024
    v_mfma_f32_16x16x32_bf16   (gfx950)  4             1024                     gfx950 1024
    v_mfma_f32_16x16x128_f8f6f4 (fp8)    4             4096                     gfx950 2048: LLVM is wrong by 2
    v_mfma_f64_16x16x4_f64               8, gfx950 16  64, 32                   gfx942 64, gfx950 32

The model is wrong or incomplete in these cases, and this module does not correct them:
  * Transcendental functions (v_exp_f32, v_rcp_f32, ...) run at quarter rate by LLVM's own comment. The model charges
    them one cycle of the vector pipe like any other instruction; only their latency is 4. The same holds for
    conversions (v_cvt_f32_f16, ...). The vector bound is too low by up to 4 on code made of them.
  * f8f6f4 products of two FP8 matrices run at half the rate that LLVM gives them. LLVM's rate is that of FP6 and FP4.
  * gfx950 has its own model. Among instructions that both GPUs have, only the cost of v_mfma_f64_16x16x4_f64 differs.
  * Every LDS and vector memory instruction costs one cycle regardless of its width. `transfer_time` counts bytes
    instead.
  * Waits, s_nop and s_endpgm are charged to the scalar unit, though the hardware issues them to no unit at all. Vector
    instructions that write a carry to scalar registers are charged to it too. The scalar bound may be too high.
  * s_barrier costs one cycle of the branch unit; waiting at the barrier is latency, which is ignored.
  * Matrix instructions issue through the vector unit; the model does not charge the turn that they take from it.
  * Matrix products in double precision are charged to the vector pipe.
"""

from __future__ import annotations

import dataclasses
import json
import re

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.execution import Counts
from pallas_kernels.cdna.interpreter.assembly import Assembly, Instruction
from pallas_kernels.cdna.program import ARCHITECTURES, BANDWIDTH, CLOCK, COMPUTE_UNITS

PIPES = ("vector", "matrix", "LDS", "memory", "scalar", "branch")
_PIPE_OF = {
    "HWVALU": "vector",
    "HWXDL": "matrix",
    "HWLGKM": "LDS",
    "HWVMEM": "memory",
    "HWSALU": "scalar",
    "HWBranch": "branch",
}
SIMDS = 4  # per compute unit
LANES = 64
CLOCKS = 4  # engine clocks per cycle of LLVM's model
# Bytes per clock and compute unit. LDS: 32 banks of 4 bytes (ROCm Compute Profiler, "pipeline descriptions"), doubled
# in CDNA 4 (AMD's white paper, reads only). Vector L1 cache: ROCm Compute Profiler's peak of "vL1D Cache BW".
LDS_RATE = {"gfx942": 128, "gfx950": 256}
L1_RATE = {"gfx942": 128, "gfx950": 128}
_known: dict[tuple[str, str], dict[str, float]] = {}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Least time of a launch if only the throughput of its pipes limited it.

    Attributes:
      arch: "gfx942" or "gfx950".
      simds: SIMDs that share the work.
      microseconds: busy time of each pipe of PIPES; all pipes run concurrently.
    """

    arch: str
    simds: int
    microseconds: dict[str, float]

    @property
    def pipe(self) -> str:
        """The pipe with the longest busy time."""
        return max(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def total(self) -> float:
        """Microseconds for which that pipe is busy."""
        return self.microseconds[self.pipe]


def _check_arch(arch: str) -> None:
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")


def _pipe(resource: str, text: str) -> str:
    """Pipe of a resource of LLVM's model."""
    if resource not in _PIPE_OF:
        raise ValueError(f"`{text}` occupies {resource}, which is no pipe of CDNA that is known here")
    return "scalar" if resource == "HWLGKM" and text.startswith("s_") else _PIPE_OF[resource]


def _ask(arch: str, instructions: list[Instruction]) -> None:
    """Runs llvm-mca once over instructions with distinct texts and caches the cost of each."""
    command = [toolchain.find_llvm("llvm-mca"), "-mtriple=amdgcn", f"-mcpu={arch}", "-instruction-tables", "-json", "-"]
    text = "".join(i.text + "\n" for i in instructions)
    done = toolchain.run_program(command, text)
    if done.returncode:
        wrong = re.search(r"<stdin>:(\d+):\d+: error: (.*)", done.stderr)
        if wrong and int(wrong[1]) <= len(instructions):
            raise instructions[int(wrong[1]) - 1].error(f"llvm-mca for {arch} says: {wrong[2]}")
        raise RuntimeError(f"llvm-mca {' '.join(command[1:])} failed: {done.stderr.strip()[:500]}")
    report = json.loads(done.stdout)
    (region,) = report["CodeRegions"]
    if len(region["Instructions"]) != len(instructions):
        raise RuntimeError(f"llvm-mca reported {len(region['Instructions'])} of {len(instructions)} instructions")
    costs: list[dict[str, float]] = [{} for _ in instructions]
    names = report["TargetInfo"]["Resources"]
    for use in region["ResourcePressureView"]["ResourcePressureInfo"]:
        # The row after the last instruction holds totals.
        if use["InstructionIndex"] < len(instructions):
            cost = costs[use["InstructionIndex"]]
            pipe = _pipe(names[use["ResourceIndex"]], instructions[use["InstructionIndex"]].text)
            cost[pipe] = cost.get(pipe, 0) + use["ResourceUsage"]
    for instruction, cost in zip(instructions, costs):
        _known[arch, instruction.text] = cost


def instruction_cycles(assembly: Assembly) -> list[dict[str, float]]:
    """Cycles for which one execution of each instruction by one wave occupies each pipe, by LLVM's model.

    A cost is the time from the start of the instruction to the start of the next one on the same pipe ("release at").
    It is not the latency of the result: a dependent instruction waits longer. One run of llvm-mca covers all texts
    that are not cached.

    Args:
      assembly: parsed from the output of Triton or llvm-objdump; comments and labels are ignored.

    Returns:
      For every instruction in textual order: pipe to cycles. Most occupy one pipe; a load from memory to LDS occupies
      two.

    Raises:
      ToolMissing: llvm-mca of LLVM 22 is not installed.
      InterpreterError: LLVM can not read an instruction; the message names it.
    """
    _check_arch(assembly.arch)
    instructions = assembly.instructions
    new = {i.text: i for i in instructions if (assembly.arch, i.text) not in _known}
    if new:
        _ask(assembly.arch, list(new.values()))
    return [_known[assembly.arch, i.text] for i in instructions]


def busy_cycles(counts: Counts) -> dict[str, float]:
    """Busy cycles of each pipe: executed wave-instructions times their cycles, summed over the whole grid.

    Returns:
      Cycles of LLVM's model (four clocks) for every pipe of PIPES.
    """
    out = dict.fromkeys(PIPES, 0.0)
    for (_, times), cost in zip(counts.per_instruction(), instruction_cycles(counts.assembly)):
        for pipe, cycles in cost.items():
            out[pipe] += times * cycles
    return out


def lower_bound(
    counts: Counts, arch: str | None = None, *, workgroups: int | None = None, threads: int | None = None
) -> Bound:
    """Least time of a launch by the throughput of each pipe: an estimate that ignores everything else.

    The bound ignores latency, dependencies, waits, barriers, the order of issue, caches, bank conflicts and the launch
    itself. It assumes that the clock does not fall under load. A kernel takes longer: several times as long if few
    waves are in flight.

    Assumptions, from ROCm Compute Profiler's "pipeline descriptions":
      * A compute unit has four SIMDs. Each SIMD has a vector and a matrix pipe; an instruction occupies one SIMD.
      * A compute unit has one LDS, one vector memory, one scalar and one branch unit, which its four SIMDs share. The
        scheduler turns to the next SIMD every clock and issues at most one instruction per unit. A cycle of LLVM's
        model (a SIMD's turn of four clocks) therefore takes one clock of a shared unit. For LDS and memory the bound
        covers the issue alone; `transfer_time` counts the bytes.
      * All pipes run concurrently. The work spreads evenly over all SIMDs or, if `workgroups` is given, over the SIMDs
        that can receive a wave: a workgroup stays on one compute unit, a wave on one SIMD.
      * The clock is the peak engine clock (`program.CLOCK`).

    Args:
      counts: executed instructions of the whole grid.
      arch: architecture of the kernel; None takes it from `counts`.
      workgroups: number of workgroups in the grid; None for a grid that fills the GPU.
      threads: threads per workgroup; None for at least four waves.
    """
    arch = counts.assembly.arch if arch is None else arch
    _check_arch(arch)
    if arch != counts.assembly.arch:
        raise ValueError(f"arch is {arch!r}, but counts is of a kernel for {counts.assembly.arch}; leave arch out")
    for name, value in (("workgroups", workgroups), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1, or None")
    waves = SIMDS if threads is None else min(SIMDS, -(-threads // LANES))
    # More workgroups than compute units fill all SIMDs: small workgroups share a compute unit.
    simds = SIMDS * COMPUTE_UNITS[arch]
    if workgroups is not None:
        simds = min(simds, workgroups * waves)
    per_cycle = CLOCKS / CLOCK[arch] * 1e6 / simds
    return Bound(arch, simds, {pipe: cycles * per_cycle for pipe, cycles in busy_cycles(counts).items()})


def hbm_floor(nbytes: float, arch: str) -> float:
    """Microseconds to move `nbytes` at the peak bandwidth of memory (`program.BANDWIDTH`).

    The estimate ignores latency, and no kernel reaches the peak. Bytes that stay in a cache take less time.
    """
    _check_arch(arch)
    if nbytes < 0:
        raise ValueError(f"nbytes is {nbytes}; expected a number of bytes, 0 or more")
    return nbytes / BANDWIDTH[arch] * 1e6


_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def lane_bytes(opcode: str) -> dict[str, int]:
    """Bytes that an instruction moves between the registers of one lane and LDS or memory (the vector L1 cache).

    Args:
      opcode: name without its encoding suffix, as in `Instruction.opcode`.

    Returns:
      "LDS" and "memory" to bytes; empty for instructions without such a transfer, including scalar loads.
    """
    if opcode.startswith("ds_"):
        width = re.search(r"_[buif](\d+)", opcode)
        twice = 2 if re.match(r"ds_(read|write)2", opcode) else 1
        return {"LDS": int(width[1]) // 8 * twice} if width else {}
    if not opcode.startswith(("global_", "flat_", "buffer_", "scratch_")):
        return {}
    data = re.search(r"_(?:load|store)(?:_lds)?_(byte|ubyte|sbyte|short|ushort|sshort|dword)(?:x(\d))?", opcode)
    if data:
        size = _WIDTHS[data[1]] * int(data[2] or 1)
    elif "_atomic_" in opcode:
        size = 8 if opcode.endswith(("_x2", "_f64")) else 4
    else:
        return {}
    return {"memory": size, "LDS": size} if "_lds_" in opcode else {"memory": size}


def transfer_time(counts: Counts) -> dict[str, float]:
    """Microseconds for the bytes that vector instructions move, which LLVM's model of LDS and memory ignores.

    The estimate assumes that all 64 lanes of every executed instruction move their data, at LDS_RATE and L1_RATE on all
    compute units at once. Masked lanes, and lanes that read the same address, take less time. Bank conflicts,
    scattered addresses and cache misses take more.

    Returns:
      Microseconds of "LDS" and of "memory".
    """
    arch = counts.assembly.arch
    _check_arch(arch)
    moved = {"LDS": 0, "memory": 0}
    for opcode, times in counts.by_opcode().items():
        for path, size in lane_bytes(opcode).items():
            moved[path] += size * LANES * times
    rate = {"LDS": LDS_RATE[arch], "memory": L1_RATE[arch]}
    return {path: n / (rate[path] * COMPUTE_UNITS[arch] * CLOCK[arch]) * 1e6 for path, n in moved.items()}
