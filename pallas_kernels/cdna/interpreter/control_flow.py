"""Runs the waves of a grid: branches, barriers, and the choice of the waves that execute next.

Waves that are at the same basic block execute it together. The scheduler picks the first such block in textual order,
so that waves that diverge at a branch reconverge behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pallas_kernels.cdna.interpreter import cross_lane, dispatch, lds, matrix, memory_access, scalar_alu, vector_alu
from pallas_kernels.cdna.interpreter.assembly import (
    NO_EFFECT,
    VCC,
    Assembly,
    Instruction,
    InterpreterError,
)
from pallas_kernels.cdna.interpreter.dispatch import Dispatch
from pallas_kernels.cdna.interpreter.machine import ALL, LANE, LANES, Memory, Waves
from pallas_kernels.cdna.interpreter.operands import Step

# Order in which the ready waves of a workgroup run: all together, or one after the other up to the next barrier. A
# program without races gives the same result in all three orders.
ORDERS = ("together", "forward", "reverse")
# Waves that execute together. With more, their registers no longer fit into the CPU's caches.
MAX_WAVES = 256
# Bytes of scratch memory that waves which execute together may take in all.
MAX_SCRATCH = 256 << 20
# Instructions that one wave may execute: ten times what a whole grid executes in benchmarks/cdna_counts.json. The
# shortest endless loop gets there in half a minute.
BUDGET = 2_000_000
_READY, _WAITING, _DONE = 0, 1, 2

_BRANCHES: dict[str, Callable[[Waves], np.ndarray]] = {
    "s_branch": lambda m: np.ones(m.count, bool),
    "s_cbranch_scc0": lambda m: ~m.scc[m.sel],
    "s_cbranch_scc1": lambda m: m.scc[m.sel].copy(),
    "s_cbranch_vccz": lambda m: m.scalar64(VCC) == 0,
    "s_cbranch_vccnz": lambda m: m.scalar64(VCC) != 0,
    "s_cbranch_execz": lambda m: m.exec[m.sel] == 0,
    "s_cbranch_execnz": lambda m: m.exec[m.sel] != 0,
}


def bind(i: Instruction, arch: str) -> Step | None:
    """Binds an instruction to a function that executes it.

    Returns:
      The function; None for an instruction that has no effect on results or that ends a block.

    Raises:
      InterpreterError: the instruction is unknown.
    """
    if i.opcode in NO_EFFECT or i.opcode in _BRANCHES or i.opcode in ("s_barrier", "s_endpgm"):
        return None
    if i.opcode in cross_lane.TABLE:
        return cross_lane.TABLE[i.opcode][1](i)
    if i.opcode.startswith("v_mfma"):
        return matrix.bind(i, arch)
    for module in (vector_alu, scalar_alu, memory_access, lds):
        step = module.bind(i)
        if step is not None:
            return step
    raise i.error("unknown instruction: it has no entry in the interpreter's tables")


@dataclasses.dataclass(frozen=True)
class _Code:
    """A basic block: its bound instructions, and how it ends."""

    steps: tuple[tuple[Instruction, Step], ...]
    size: int
    end: str  # "fall", "branch", "barrier" or "stop"
    taken: Callable[[Waves], np.ndarray] | None = None
    target: int = -1


def bind_blocks(assembly: Assembly) -> list[_Code]:
    """Binds every block; unknown instructions raise here, before any block runs."""
    out = []
    for block in assembly.blocks:
        steps = []
        for i in block.instructions:
            try:
                step = bind(i, assembly.arch)
            except InterpreterError:
                raise
            except Exception as e:
                raise i.error(f"operands not understood ({type(e).__name__}: {e})") from e
            if step is not None:
                steps.append((i, step))
        last = block.instructions[-1] if block.instructions else None
        code = _Code(tuple(steps), len(block.instructions), "fall")
        if last is not None and last.opcode in _BRANCHES:
            target = assembly.labels[last.operands[0].text]
            code = dataclasses.replace(code, end="branch", taken=_BRANCHES[last.opcode], target=target)
        elif last is not None and last.opcode == "s_barrier":
            code = dataclasses.replace(code, end="barrier")
        elif last is not None and last.opcode == "s_endpgm":
            code = dataclasses.replace(code, end="stop")
        out.append(code)
    return out


def _batches(grid: Sequence[int], per_batch: int) -> Iterator[np.ndarray]:
    """Yields batches of workgroups that execute together, as workgroup ids [n, 3]."""
    total = grid[0] * grid[1] * grid[2]
    for first in range(0, total, per_batch):
        flat = np.arange(first, min(total, first + per_batch))
        yield np.stack([flat % grid[0], flat // grid[0] % grid[1], flat // (grid[0] * grid[1])], axis=1)


def _scratch_bytes(assembly: Assembly) -> int:
    """Bytes of a lane's scratch memory, in whole words."""
    return -(-assembly.directives.get("private_segment_fixed_size", 0) // 4) * 4


def _start(assembly: Assembly, memory: Memory, launch: Dispatch, ids: np.ndarray) -> Waves:
    """Creates the waves of the workgroups `ids`, with registers initialized like the hardware's."""
    per_group = -(-launch.threads // LANES)
    count = len(ids) * per_group
    vectors, accumulators = (assembly.highest[file][0] if file in assembly.highest else 1 for file in ("v", "a"))
    m = Waves(count, (vectors, accumulators), memory, assembly.arch)
    number = np.tile(np.arange(per_group), len(ids))
    m.group = np.repeat(np.arange(len(ids)), per_group)
    m.set_lds(dispatch.lds_bytes(assembly, launch), len(ids))
    m.scratch = np.zeros((count, LANES, _scratch_bytes(assembly)), np.uint8)
    thread = number[:, None] * LANES + LANE
    m.V[0] = thread
    m.exec[:] = np.where(number == per_group - 1, ALL >> np.uint64(-launch.threads % LANES), ALL)
    pointer = sum(
        assembly.directives.get(name, 0) * size
        for name, size in (
            ("user_sgpr_private_segment_buffer", 4),
            ("user_sgpr_dispatch_ptr", 2),
            ("user_sgpr_queue_ptr", 2),
        )
    )
    m.S[pointer], m.S[pointer + 1] = launch.arguments & 0xFFFFFFFF, launch.arguments >> 32
    at = assembly.directives.get("user_sgpr_count", 2)
    for axis, name in enumerate("xyz"):
        if assembly.directives.get(f"system_sgpr_workgroup_id_{name}", int(name == "x")):
            m.S[at] = ids[m.group, axis]
            at += 1
    m.select(slice(None))
    return m


@dataclasses.dataclass
class _Batch:
    """Waves that execute together, and what they share.

    Attributes:
      m: the waves.
      ids: workgroup ids [n, 3].
      assembly, blocks: the kernel, parsed and bound.
      budget: instructions that a wave may execute.
      executed: instructions that each wave has executed, int64 [W].
    """

    m: Waves
    ids: np.ndarray
    assembly: Assembly
    blocks: list[_Code]
    budget: int
    executed: np.ndarray

    def check_budget(self, waves: np.ndarray, block: int) -> None:
        """Raises InterpreterError if one of `waves`, which executed `block`, is over the budget."""
        over = waves[self.executed[waves] > self.budget]
        if not over.size:
            return
        wave = int(over[0])
        group = self.m.group[wave]
        program, number = tuple(int(x) for x in self.ids[group]), wave - int(np.searchsorted(self.m.group, group))
        last = self.assembly.blocks[block].instructions[-1]
        raise last.error(
            f"kernel {self.assembly.name}, program {program}, wave {number} executed more than {self.budget}"
            " instructions, its budget: the loop has no end, or the budget must be larger"
        )


def run(
    assembly: Assembly,
    memory: Memory,
    launch: Dispatch,
    *,
    order: str = "together",
    budget: int | None = None,
) -> np.ndarray:
    """Executes a grid; returns the number of executions of each block by a wave, int64 [blocks].

    Barriers behave like the hardware's: a wave at s_barrier continues when every wave of its workgroup that has not
    ended is at an s_barrier, not necessarily the same one. Therefore no barrier waits forever.

    Args:
      assembly: the kernel.
      memory: the kernel's buffers, changed in place.
      launch: grid, threads, LDS and the address of the arguments.
      order: one of ORDERS.
      budget: instructions that one wave may execute; None means BUDGET.

    Raises:
      ValueError: `order` is unknown, `budget` is less than 1, or the launch has no workgroups or too many threads.
      InterpreterError: an instruction is unknown, an access is outside every buffer, a write goes to a read-only
        buffer, the kernel uses registers, LDS or scratch memory that it was not granted or that the machine lacks, or a
        wave exceeds the budget.
    """
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
    budget = BUDGET if budget is None else budget
    if budget < 1:
        raise ValueError(f"budget is {budget}; expected at least 1 instruction, or None for {BUDGET}")
    dispatch.check(assembly, launch)
    blocks = bind_blocks(assembly)
    counts = np.zeros(len(blocks), np.int64)
    waves = -(-launch.threads // LANES)
    most = min(MAX_WAVES, MAX_SCRATCH // (LANES * max(1, _scratch_bytes(assembly))))
    with np.errstate(all="ignore"):
        for ids in _batches(launch.grid, max(1, most // waves)):
            m = _start(assembly, memory, launch, ids)
            batch = _Batch(m, ids, assembly, blocks, budget, np.zeros(len(m.exec), np.int64))
            _run_batch(batch, counts, order)
    return counts


def _next_waves(at: np.ndarray, state: np.ndarray, rank: np.ndarray | None) -> np.ndarray:
    """Indices of the ready waves that execute next, all at one block; empty if none is ready."""
    ready = np.flatnonzero(state == _READY)
    if ready.size and rank is not None:
        ready = ready[rank[ready] == rank[ready].min()]
    return ready[at[ready] == at[ready].min()] if ready.size else ready


def _run_batch(batch: _Batch, counts: np.ndarray, order: str) -> None:
    m, blocks = batch.m, batch.blocks
    count = len(m.exec)
    at, state = np.full(count, batch.assembly.entry), np.full(count, _READY)
    number = np.arange(count) - np.searchsorted(m.group, m.group)
    rank = {"together": None, "forward": number, "reverse": -number}[order]
    # No wave has executed more than the waves of the batch one after the other.
    in_all = 0
    while True:
        waves = _next_waves(at, state, rank)
        if not waves.size:
            if (state == _DONE).all():
                return
            # No wave is ready, so all waves that have not ended wait at a barrier: release them.
            state[state == _WAITING] = _READY
            continue
        block = int(at[waves[0]])
        if waves.size < count:
            m.select(waves)
        elif not isinstance(m.sel, slice):
            m.select(slice(None))
        code = blocks[block]
        counts[block] += waves.size
        for i, step in code.steps:
            try:
                step(m)
            except InterpreterError:
                raise
            except Exception as e:
                raise i.error(f"{type(e).__name__}: {e}") from e
        batch.executed[waves] += code.size
        in_all += code.size
        if in_all > batch.budget:
            batch.check_budget(waves, block)
        at[waves] = block + 1
        if code.end == "branch":
            taken = code.taken(m)  # type: ignore[misc]
            at[waves[taken]] = code.target
        elif code.end == "barrier":
            state[waves] = _WAITING
        elif code.end == "stop":
            state[waves] = _DONE
        if code.end != "stop" and (at[waves] >= len(blocks)).any():
            raise InterpreterError(f"a wave ran past the end of the kernel, behind block {block}")
