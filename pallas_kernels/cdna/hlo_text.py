"""Reads the text of an optimised HLO program: its computations, their instructions, and how often each one runs.

The format is that of XLA's `HloModule::ToString`. Only what the collectives need is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
# Bits of the element types whose name does not end in them; a predicate takes a byte.
_BITS = {"pred": 8, "token": 0, "opaque": 0}


class Array(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: XLA's name of its element type, such as "bf16" or "s32".
      shape: its shape on one device.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes, those of the last one filled up."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(digits[0]) if digits else None
        if bits is None:
            raise ValueError(f"the program has an array of {self.dtype}, whose size is not known here")
        return -(-bits * math.prod(self.shape) // 8)


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      type: text of the type of its result.
      opcode: such as "all-reduce".
      operands: names of the instructions whose results it reads.
      rest: text after the operands: attributes, metadata, configuration.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str


class Executed(NamedTuple):
    """An instruction as it is executed.

    Attributes:
      instruction: it.
      operands: the types of its operands, as text.
      times: how often a run of the program executes it; None if that is decided while it runs. The branch that a
        conditional takes is unknown: the instructions of all branches count as executed.
    """

    instruction: Instruction
    operands: tuple[str, ...]
    times: int | None


def arrays_in(text: str) -> tuple[Array, ...]:
    """The arrays of a type, in order, whatever tuples they are in."""
    found = []
    for dtype, sizes in _ARRAY.findall(text):
        found.append(Array(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)))
    return tuple(found)


def closing(text: str, start: int) -> int:
    """Offset of the bracket that closes the one at `start`.

    Raises:
      ValueError: none does.
    """
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if not depth:
            return at
    raise ValueError(f"a bracket is not closed in {text[:120]!r}")


def elements(text: str) -> list[str]:
    """The types in the outermost tuple of a type; the type itself if it is no tuple."""
    if not text.startswith("("):
        return [text]
    out, start, depth = [], 1, 0
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (not depth and at > start):
            out.append(text[start:at].strip())
            start = at + 1
    return out


def _instruction(line: str) -> Instruction | None:
    """The instruction of a line; None if the line holds none."""
    named = _NAME.match(line)
    if named is None:
        return None
    start = named.end()
    end = closing(line, start) + 1 if line[start : start + 1] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if end <= start or opcode is None:
        raise ValueError(f"line {line.strip()[:120]!r} of the program has no form that is known here")
    # A constant's operand is its value, which may hold brackets of any kind.
    if opcode[1] == "constant":
        return Instruction(named[1], line[start:end], opcode[1], (), "")
    last = closing(line, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.-]+)", line[opcode.end() : last]))
    return Instruction(named[1], line[start:end], opcode[1], operands, line[last + 1 :])


def computations(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """(name of the entry, computation -> instruction's name -> instruction, in order).

    Raises:
      ValueError: the text has no entry, or a line of an unknown form.
    """
    found: dict[str, dict[str, Instruction]] = {}
    entry = None
    inside: dict[str, Instruction] | None = None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            inside = found[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (instruction := _instruction(line)):
            inside[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text of the program has no computation that it starts with")
    return entry, found


def _called(instruction: Instruction) -> Iterator[tuple[str, int | None]]:
    """The computations that an instruction runs, each with how often; None is not known."""
    plain = _QUOTED.sub('""', instruction.rest)
    times: int | None = 1
    if instruction.opcode == "while":
        known = _TRIPS.search(instruction.rest)
        times = int(known[1]) if known else None
    for _, name in _CALLED.findall(plain):
        yield name, times
    for names in _BRANCHES.findall(plain):
        for name in names.split(","):
            yield name.strip().lstrip("%"), times


def executed(text: str) -> Iterator[Executed]:
    """All instructions that a run of the program executes, in order; those of a loop's body once, with their number.

    Raises:
      ValueError: the text has a form that is not known here.
    """
    entry, found = computations(text)

    def walk(name: str, times: int | None) -> Iterator[Executed]:
        if name not in found:
            raise ValueError(f"the program calls {name}, which its text does not hold")
        inside = found[name]
        for instruction in inside.values():
            types = tuple(inside[o].type if o in inside else "" for o in instruction.operands)
            yield Executed(instruction, types, times)
            for called, each in _called(instruction):
                yield from walk(called, None if times is None or each is None else times * each)

    yield from walk(entry, 1)
