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
# Names of element types: letters, bits, and the bits of exponent and mantissa of small floats, as in "f8e4m3fn".
_ELEMENT = re.compile(r"([a-z]+)(\d+)(\w*)")
_LETTERS = {"f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}


class HloArray(NamedTuple):
    """An array of a program.

    Attributes:
      dtype: JAX's name of its element type.
      shape: its shape on one device.
      bits: of an element.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int

    @property
    def nbytes(self) -> int:
        """Its bytes, the last one filled up."""
        return -(-self.bits * math.prod(self.shape) // 8)


class HloInstruction(NamedTuple):
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


class ExecutedInstruction(NamedTuple):
    """An instruction as it is executed.

    Attributes:
      instruction: it.
      operands: the types of its operands, as text.
      times: how often a run of the program executes it; None if that is decided while it runs. The branch that a
        conditional takes is unknown: the instructions of all branches count as executed.
    """

    instruction: HloInstruction
    operands: tuple[str, ...]
    times: int | None


def arrays_in(text: str) -> tuple[HloArray, ...]:
    """The arrays of a type, in order, whatever tuples they are in.

    Raises:
      ValueError: an element type whose name has another form.
    """
    found = []
    for name, sizes in _ARRAY.findall(text):
        element = _ELEMENT.fullmatch(name)
        if name == "pred":
            dtype, bits = "bool", 8
        elif element and element[1] in _LETTERS:
            dtype = f"{_LETTERS[element[1]]}{element[2]}{'_' if element[3] else ''}{element[3]}"
            bits = int(element[2])
        else:
            raise ValueError(f"the program has an array of {name}, which is not known here")
        found.append(HloArray(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), bits))
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


def _instruction(line: str) -> HloInstruction | None:
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
        return HloInstruction(named[1], line[start:end], opcode[1], (), "")
    last = closing(line, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.-]+)", line[opcode.end() : last]))
    return HloInstruction(named[1], line[start:end], opcode[1], operands, line[last + 1 :])


def computations(text: str) -> tuple[str, dict[str, dict[str, HloInstruction]]]:
    """(name of the entry, computation -> instruction's name -> instruction, in order).

    Raises:
      ValueError: the text has no entry, or a line of an unknown form.
    """
    found: dict[str, dict[str, HloInstruction]] = {}
    entry = None
    inside: dict[str, HloInstruction] | None = None
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


def _called(instruction: HloInstruction) -> Iterator[tuple[str, int | None]]:
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


def executed(text: str) -> Iterator[ExecutedInstruction]:
    """All instructions that a run of the program executes, in order; those of a loop's body once, with their number.

    Raises:
      ValueError: the text has a form that is not known here.
    """
    entry, found = computations(text)

    def walk(name: str, times: int | None) -> Iterator[ExecutedInstruction]:
        if name not in found:
            raise ValueError(f"the program calls {name}, which its text does not hold")
        inside = found[name]
        for instruction in inside.values():
            types = tuple(inside[o].type if o in inside else "" for o in instruction.operands)
            yield ExecutedInstruction(instruction, types, times)
            for called, each in _called(instruction):
                yield from walk(called, None if times is None or each is None else times * each)

    yield from walk(entry, 1)
