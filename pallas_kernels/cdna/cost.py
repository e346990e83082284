"""What executed instructions cost by LLVM's scheduling model: cycles per pipe, and bounds by throughput.

Everything here is an estimate of throughput. Latency, dependencies, waits, issue conflicts between waves, cache
misses, bank conflicts and occupancy are ignored, so a kernel takes longer than any bound below, often many times.

**Unit.** A cycle of LLVM's model for CDNA is one turn of a SIMD, four clocks of the engine: its file says that
latencies are "1 / (operations / cycle) / 4" (SISchedule.td), a vector instruction of 64 lanes on a SIMD of 16 takes
one, and the passes of a matrix instruction are such cycles. Functions here return LLVM's cycles; only `lower_bound`
and `transfer_time` make microseconds of clocks.

**Pipes.** LLVM's resource is the pipe, with one exception: HWLGKM, the counter that LDS and scalar loads share, is
"LDS" for all instructions but those that begin with `s_`. These are "scalar": ROCm Compute Profiler's documentation
has scalar loads issue with the scalar unit.

What the model says, held against AMD's data sheets at the peak clock (flops a clock and SIMD = peak / (4 compute units
clock)); LLVM 22.1:

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

Where the model is wrong or silent; nothing of this is corrected here:
  * Transcendental functions (v_exp_f32, v_rcp_f32, ...) are quarter rate by LLVM's own comment, but occupy the vector
    pipe for one cycle as all others do; only their latency is 4. The same holds for conversions (v_cvt_f32_f16, ...).
    The vector bound is too low by up to 4 on code made of them.
  * f8f6f4 products of two FP8 matrices run at half the rate that LLVM gives them, which is that of FP6 and FP4.
  * gfx950 has a model of its own, but of what both machines have only v_mfma_f64_16x16x4_f64 costs another number.
  * All LDS and all vector memory instructions cost one cycle, whatever they move: `transfer_time` counts bytes instead.
  * Waits, s_nop and s_endpgm are charged to the scalar unit, though the hardware issues them to no unit at all, and
    vector instructions that write a carry to scalar registers are charged to it too. The scalar bound may be too high.
  * s_barrier is one cycle of the branch unit; the wait at it is latency.
  * Matrix instructions issue through the vector unit, and so take one of its turns that the model does not charge.
  * Matrix products in double precision are charged to the vector pipe.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess

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
SIMDS = 4  # of a compute unit
LANES = 64
CLOCKS = 4  # of the engine in one cycle of LLVM's model
# Bytes a clock and compute unit between registers and LDS: 32 banks of 4 bytes (ROCm Compute Profiler, "pipeline
# descriptions"), twice that since CDNA 4 (AMD's white paper, reads only); and between registers and the vector L1
# cache (ROCm Compute Profiler's peak of "vL1D Cache BW").
LDS_RATE = {"gfx942": 128, "gfx950": 256}
L1_RATE = {"gfx942": 128, "gfx950": 128}
_known: dict[tuple[str, str], dict[str, float]] = {}


@dataclasses.dataclass(frozen=True)
class Bound:
    """Least time of a launch, were nothing but the throughput of its pipes to limit it.

    Attributes:
      arch: "gfx942" or "gfx950".
      simds: SIMDs that the work was spread over.
      microseconds: of each pipe of PIPES, all running side by side.
    """

    arch: str
    simds: int
    microseconds: dict[str, float]

    @property
    def pipe(self) -> str:
        """The pipe that is busy for longest."""
        return max(self.microseconds, key=self.microseconds.__getitem__)

    @property
    def total(self) -> float:
        """Microseconds of that pipe."""
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
    """Runs llvm-mca once over instructions of different text and remembers what each costs."""
    command = [toolchain.find_llvm("llvm-mca"), "-mtriple=amdgcn", f"-mcpu={arch}", "-instruction-tables", "-json", "-"]
    text = "".join(i.text + "\n" for i in instructions)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        wrong = re.search(r"<stdin>:(\d+):\d+: error: (.*)", done.stderr)
        if wrong and int(wrong[1]) <= len(instructions):
            raise instructions[int(wrong[1]) - 1].error(f"llvm-mca for {arch} says: {wrong[2]}")
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
    report = json.loads(done.stdout)
    (region,) = report["CodeRegions"]
    if len(region["Instructions"]) != len(instructions):
        raise RuntimeError(f"llvm-mca reported {len(region['Instructions'])} of {len(instructions)} instructions")
    costs: list[dict[str, float]] = [{} for _ in instructions]
    names = report["TargetInfo"]["Resources"]
    for use in region["ResourcePressureView"]["ResourcePressureInfo"]:
        # The row after the last instruction holds sums.
        if use["InstructionIndex"] < len(instructions):
            cost = costs[use["InstructionIndex"]]
            pipe = _pipe(names[use["ResourceIndex"]], instructions[use["InstructionIndex"]].text)
            cost[pipe] = cost.get(pipe, 0) + use["ResourceUsage"]
    for instruction, cost in zip(instructions, costs):
        _known[arch, instruction.text] = cost


def instruction_cycles(assembly: Assembly) -> list[dict[str, float]]:
    """Cycles for which one execution of each instruction by one wave occupies each pipe, by LLVM's model.

    The time between the start of the instruction and that of the next one on the same pipe ("release at"), not the
    latency of its result. A dependent instruction waits longer. Asks llvm-mca once for all texts not seen before.

    Args:
      assembly: of Triton or of llvm-objdump; comments and labels are left out.

    Returns:
      For every instruction in textual order: pipe to cycles. Mostly one pipe; a load from memory to LDS takes two.

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
    """Cycles for which what was executed occupies each pipe: wave-instructions times cycles, over the whole grid.

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

    Latency, dependencies, waits, barriers, the order of issue, caches, bank conflicts, the launch itself: none counts.
    Nor does the clock fall under load. Expect a kernel to take longer, several times so where few waves are in flight.

    Assumptions, from ROCm Compute Profiler's "pipeline descriptions":
      * A compute unit has four SIMDs; vector and matrix instructions occupy one of them, each SIMD has both pipes.
      * LDS, vector memory, scalar and branch unit: one of each per compute unit. The scheduler turns to the next SIMD
        every clock and then issues at most one instruction per unit, so that a cycle of LLVM's model (a SIMD's turn
        of four clocks) takes one clock of a unit that the four share. For LDS and memory this is the issue alone, see
        `transfer_time` for the bytes.
      * All pipes run side by side, and the work spreads evenly over all SIMDs, or, if `workgroups` says so, over those
        that can have a wave: a workgroup stays on one compute unit, a wave on one SIMD.
      * The clock is the peak engine clock (`program.CLOCK`).

    Args:
      counts: what was executed, over the whole grid.
      arch: must be that of the kernel; it may be left out.
      workgroups: of the grid; None for a grid that fills the machine.
      threads: of a workgroup; None for at least four waves.
    """
    arch = counts.assembly.arch if arch is None else arch
    _check_arch(arch)
    if arch != counts.assembly.arch:
        raise ValueError(f"arch is {arch!r}, but counts is of a kernel for {counts.assembly.arch}; leave arch out")
    for name, value in (("workgroups", workgroups), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1, or None")
    waves = SIMDS if threads is None else min(SIMDS, -(-threads // LANES))
    # More workgroups than compute units fill all SIMDs, several to a compute unit where they are small.
    simds = SIMDS * COMPUTE_UNITS[arch]
    if workgroups is not None:
        simds = min(simds, workgroups * waves)
    per_cycle = CLOCKS / CLOCK[arch] * 1e6 / simds
    return Bound(arch, simds, {pipe: cycles * per_cycle for pipe, cycles in busy_cycles(counts).items()})


def hbm_floor(nbytes: float, arch: str) -> float:
    """Microseconds to move `nbytes` at the peak bandwidth of memory (`program.BANDWIDTH`).

    An estimate that ignores latency, caches, and that no kernel reaches the peak; bytes that stay in a cache take less.
    """
    _check_arch(arch)
    if nbytes < 0:
        raise ValueError(f"nbytes is {nbytes}; expected a number of bytes, 0 or more")
    return nbytes / BANDWIDTH[arch] * 1e6


_WIDTHS = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}


def lane_bytes(opcode: str) -> dict[str, int]:
    """Bytes that an instruction moves between the registers of one lane and LDS or memory (the vector L1 cache).

    Args:
      opcode: without encoding, as in `Instruction.opcode`.

    Returns:
      "LDS" and "memory" to bytes; empty for instructions that move none, scalar loads among them.
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
    """Microseconds for the bytes that vector instructions move: what LLVM's model of LDS and memory leaves out.

    All 64 lanes of every executed instruction are taken to move their data at LDS_RATE and L1_RATE on all compute units
    at once. Masked lanes, and lanes that read the same address, make it less; bank conflicts, scattered addresses and
    cache misses make it more.

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
