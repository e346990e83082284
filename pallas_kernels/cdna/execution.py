"""Executes a compiled kernel on arrays; returns its outputs and the counts of executed instructions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pallas_kernels.cdna.interpreter import control_flow
from pallas_kernels.cdna.interpreter.assembly import (
    CLASSES,
    Assembly,
    Instruction,
    InterpreterError,
    classify,
    parse,
)
from pallas_kernels.cdna.interpreter.dispatch import Dispatch
from pallas_kernels.cdna.interpreter.machine import POISON, Memory
from pallas_kernels.cdna.program import Kernel

# Far above what compilers ask for: a pointer an array.
MAX_ARGUMENT_BYTES = 64 << 10


@dataclasses.dataclass(frozen=True)
class Counts:
    """Wave-instructions that a whole grid executed. One wave that executes one instruction counts as one.

    Attributes:
      assembly: the parsed kernel.
      per_block: executions of each basic block by a wave, int64 [blocks].
    """

    assembly: Assembly
    per_block: np.ndarray

    @property
    def total(self) -> int:
        """Number of all wave-instructions, including waits and branches."""
        return sum(self.by_class.values())

    @functools.cached_property
    def by_class(self) -> dict[str, int]:
        """Wave-instructions per class, see `interpreter.assembly.CLASSES`."""
        out = dict.fromkeys(CLASSES, 0)
        for instruction, times in self.per_instruction():
            out[classify(instruction.opcode)] += times
        return out

    def per_instruction(self) -> list[tuple[Instruction, int]]:
        """(instruction, number of executions) of every instruction of the text."""
        pairs = zip(self.assembly.blocks, self.per_block)
        return [(i, int(times)) for block, times in pairs for i in block.instructions]

    def by_opcode(self) -> dict[str, int]:
        """Wave-instructions per opcode, the most frequent first."""
        out: dict[str, int] = {}
        for instruction, times in self.per_instruction():
            out[instruction.opcode] = out.get(instruction.opcode, 0) + times
        return dict(sorted(out.items(), key=lambda item: -item[1]))

    def annotated(self) -> str:
        """The assembly text with the number of executions before every instruction."""
        times = {i.line: n for i, n in self.per_instruction()}
        return "\n".join(
            f"{times[k]:>10} {line}" if k in times else f"{'':>10} {line}"
            for k, line in enumerate(self.assembly.lines, 1)
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """The return value of `execute`.

    Attributes:
      outputs: arrays of the output arguments, in argument order.
      counts: executed wave-instructions.
    """

    outputs: tuple[np.ndarray, ...]
    counts: Counts


def execute(
    kernel: Kernel, arrays: Sequence[np.ndarray], *, order: str = "together", budget: int | None = None
) -> Result:
    """Executes the machine code of `kernel` on numpy arrays with our interpreter.

    Args:
      kernel: compiled for gfx942 or gfx950; its `arguments` must not be empty.
      arrays: one per input argument, in argument order.
      order: how the waves of a workgroup take turns: "together", "forward" or "reverse". Results differ only if
        the kernel has a race.
      budget: instructions that one wave may execute; None means `interpreter.control_flow.BUDGET`, 2 million.

    Returns:
      Outputs and counts. Output bytes that the kernel does not write are 0xA5.

    Raises:
      ValueError: number, shape or dtype of the arrays differs from the arguments; `order` is unknown; `budget` is less
        than 1; or the launch has no workgroups or too many threads.
      InterpreterError: the interpreter rejects the code, or a wave exceeds the budget (see
        `interpreter.control_flow.run`).
    """
    given = [a for a in kernel.arguments if a.role == "input"]
    if len(given) != len(arrays) or not kernel.arguments:
        raise ValueError(f"arrays holds {len(arrays)} arrays; kernel {kernel.name} reads {len(given)}")
    for number, (argument, array) in enumerate(zip(given, arrays)):
        if tuple(array.shape) != argument.shape or array.dtype != argument.dtype:
            raise ValueError(
                f"arrays[{number}] is {array.dtype}{list(array.shape)}; kernel {kernel.name} expects"
                f" {np.dtype(argument.dtype)}{list(argument.shape)}"
            )
    # Assign a buffer to every argument; an output that is written in place shares the buffer of its input.
    rest = iter(arrays)
    buffers: list[tuple[str, np.ndarray, bool]] = []
    home: list[int] = []
    overwritten = {a.in_place_of for a in kernel.arguments}
    for number, argument in enumerate(kernel.arguments):
        if argument.in_place_of is not None:
            home.append(home[argument.in_place_of])
            continue
        fresh = np.full(argument.nbytes, POISON, np.uint8)
        array = fresh if argument.role == "output" else np.asarray(next(rest))
        writable = argument.role == "output" or number in overwritten
        home.append(len(buffers))
        buffers.append((f"argument {number} ({argument.role})", array, writable))
    assembly = parse(kernel.assembly)
    size = assembly.directives.get("kernarg_size", 0)
    if size > MAX_ARGUMENT_BYTES:
        raise InterpreterError(f"kernel {kernel.name} asks for {size} bytes of arguments; at most {MAX_ARGUMENT_BYTES}")
    block = np.zeros(max(len(home), size // 8) + 1, np.uint64)
    memory = Memory([*buffers, ("argument block", block, False)])
    addresses = np.array([memory.address(k) for k in home], np.uint64)
    start = int(memory.starts[-1])
    memory.bytes[start : start + addresses.nbytes] = addresses.view(np.uint8)
    launch = Dispatch(memory.address(len(buffers)), kernel.grid, kernel.threads, kernel.resources.lds)
    counts = control_flow.run(assembly, memory, launch, order=order, budget=budget)
    outputs = tuple(
        memory.contents(home[k], a.shape, a.dtype) for k, a in enumerate(kernel.arguments) if a.role == "output"
    )
    return Result(outputs, Counts(assembly, counts))
