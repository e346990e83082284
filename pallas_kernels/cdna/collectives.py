"""What the devices of a compiled program exchange: its collectives, with their bytes and the devices that take part."""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

import numpy as np

from pallas_kernels.cdna import hlo_text
from pallas_kernels.cdna.hlo_text import ExecutedInstruction, HloArray
from pallas_kernels.cdna.program import Program

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_START = "-start"
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}")
_AXIS = re.compile(r"'?([^'=,{}]+?)'?(?:=(\d+)|:\((\d+)\)(\d+))?(?:,|$)")


class Collective(NamedTuple):
    """One collective of a program, as each of its devices takes part.

    Attributes:
      kind: one of `KINDS`; its asynchronous form is the same kind.
      name: of the instruction.
      operands, results: arrays on one device. One collective may move several.
      groups: numbers of the devices that exchange with each other, in order; of a permutation, pairs (from, to).
      times: how often a run of the program executes it; None if a loop decides that while it runs.
      origin: the operation of the JAX program, empty if XLA does not say.
    """

    kind: str
    name: str
    operands: tuple[HloArray, ...]
    results: tuple[HloArray, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int | None
    origin: str

    @property
    def operand_bytes(self) -> int:
        """Bytes that one device gives, once."""
        return sum(a.nbytes for a in self.operands)

    @property
    def result_bytes(self) -> int:
        """Bytes that one device holds afterwards, once."""
        return sum(a.nbytes for a in self.results)

    @property
    def group_size(self) -> int:
        """Devices of the largest group; 2 for a permutation, which has pairs."""
        return max(map(len, self.groups), default=1)

    @property
    def sent_bytes(self) -> int:
        """Bytes that one device sends, once, if the devices of a group form a ring of g.

        all-reduce        2 (g - 1) / g of its operands: it is a reduce-scatter and an all-gather
        all-gather        (g - 1) / g of its results
        reduce-scatter    (g - 1) / g of its operands
        all-to-all        (g - 1) / g of its operands, directly to their devices
        others            all its operands, the most that it can be

        XLA and RCCL may choose another way, as for small arrays.
        """
        g = self.group_size
        whole = self.result_bytes if self.kind == "all-gather" else self.operand_bytes
        if self.kind in ("all-gather", "reduce-scatter", "all-to-all"):
            return whole * (g - 1) // g
        return 2 * whole * (g - 1) // g if self.kind == "all-reduce" else whole


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(sizes: str, reshaped: str, order: str | None) -> np.ndarray:
    """The numbers 0, 1, ... as "[sizes]<=[reshaped]T(order)" arranges them."""
    ids = np.arange(math.prod(_numbers(reshaped))).reshape(_numbers(reshaped))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(sizes))


def _mesh_groups(axes: str, ids: str | None, chosen: str) -> np.ndarray:
    """The groups along the chosen axes of a mesh; 'x':(2)4 is a part of axis x with 2 outside of it and size 4."""
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(axes)}
    iota = _IOTA.search(ids or "")
    count = math.prod(sizes.values())
    devices = _iota(*iota.groups()) if iota else np.array(_numbers(ids) if ids else np.arange(count))
    # Split every axis at the borders of the chosen parts of it.
    parts = [(name, int(before or 1), int(size or sizes[name])) for name, _, before, size in _AXIS.findall(chosen)]
    shape: list[int] = []
    places: dict[tuple[str, int], int] = {}
    for name, whole in sizes.items():
        borders = {1, whole} | {b for part, before, size in parts if part == name for b in (before, before * size)}
        ordered = sorted(borders)
        for low, high in itertools.pairwise(ordered):
            places[name, low] = len(shape)
            shape.append(high // low)
    inner = []
    for name, before, size in parts:
        inner += [place for (axis, low), place in places.items() if axis == name and before <= low < before * size]
    outer = [place for place in range(len(shape)) if place not in inner]
    members = math.prod(shape[place] for place in inner)
    return devices.reshape(shape).transpose(outer + inner).reshape(-1, members)


def replica_groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The groups of an instruction, from its attributes.

    Args:
      text: attributes that hold `replica_groups=` or `source_target_pairs=`, in any form of XLA's: lists in braces,
        an arrangement "[2,4]<=[8]", or axes of a mesh.
      devices: number of devices of the program, which are one group where none is given.

    Raises:
      ValueError: another form.
    """
    found = re.search(r"\b(?:replica_groups|source_target_pairs)=", text)
    if found is None:
        return (tuple(range(devices)),)
    rest = text[found.end() :]
    if rest.startswith("{"):
        listed = rest[: hlo_text.closing(rest, 0) + 1]
        groups = [_numbers(group) for group in re.findall(r"\{([^{}]*)\}", listed)]
        return tuple(tuple(g) for g in groups if g) or (tuple(range(devices)),)
    if iota := _IOTA.match(rest):
        arranged = _iota(*iota.groups())
    elif mesh := _MESH.match(rest):
        arranged = _mesh_groups(*mesh.groups())
    else:
        raise ValueError(f"replica groups {rest[:80]!r} have a form that is not known here")
    return tuple(tuple(int(d) for d in group) for group in arranged)


def _results(kind: str, start: bool, text: str) -> tuple[HloArray, ...]:
    """Arrays of the result; the start of an asynchronous collective has (operands, results, ...) as its type."""
    parts = hlo_text.elements(text)
    # The start of an all-reduce has its results alone.
    if start and kind != "all-reduce":
        text = parts[1]
    return hlo_text.arrays_in(text)


def _collective(step: ExecutedInstruction, devices: int) -> Collective | None:
    """The collective of an executed instruction; None for another one, and for the end of an asynchronous one."""
    instruction = step.instruction
    start = instruction.opcode.endswith(_START)
    kind = instruction.opcode.removesuffix(_START)
    if kind not in KINDS:
        return None
    origin = re.search(r'op_name="([^"]*)"', instruction.rest)
    given = step.operands
    if kind == "ragged-all-to-all":
        # What is sent; then the array that is written, then offsets and sizes.
        given = given[:1]
    return Collective(
        kind=kind,
        name=instruction.name,
        operands=tuple(a for text in given for a in hlo_text.arrays_in(text)),
        results=_results(kind, start, instruction.type),
        groups=replica_groups(instruction.rest, devices),
        times=step.times,
        origin=origin[1] if origin else "",
    )


def collectives_of(program: Program) -> tuple[Collective, ...]:
    """The collectives of a program that XLA:ROCm compiled, in order; those of a loop's body once, with their number.

    Raises:
      ValueError: the text of the program has a form that is not known here.
    """
    if not program.hlo:
        raise ValueError(f"the program of {program.compiler} has kernels alone; compile it with 'xla'")
    found = (_collective(step, program.devices) for step in hlo_text.executed(program.hlo))
    return tuple(one for one in found if one is not None)
