"""Reads ELF files of AMD GPUs: header, sections and symbols, each checked against the size of the file.

Formats: the System V ABI (gabi) for ELF, and LLVM's "User Guide for AMDGPU Backend" for what is AMD's.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import NamedTuple

# Little-endian 64-bit ELF, its current version, for the HSA runtime.
_IDENT = b"\x7fELF\x02\x01\x01\x40"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHARED_OBJECT, _AMDGPU = 3, 224
_LOADED = 1
_NO_SECTION, _SYMBOL_TABLE, _STRINGS, _WITHOUT_BYTES, _DYNAMIC_SYMBOLS = 0, 2, 3, 8, 11
# Sections from this number on are special: absolute symbols, common blocks.
_SPECIAL_SECTIONS = 0xFF00
_MACHINES = {0x4C: "gfx942", 0x4F: "gfx950"}
EXECUTABLE = 4
FUNCTION = 2


class SectionHeader(NamedTuple):
    """One entry of the table of sections."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


class Symbol(NamedTuple):
    """A symbol that stands for bytes of a section; `offset` counts from the start of the file."""

    name: str
    kind: int
    section: int
    address: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Elf:
    """A code object.

    Attributes:
      data: the whole file.
      machine: "gfx942", "gfx950", or a number in hexadecimal for another machine.
      sections: all section headers.
      symbols: symbols of all tables by name.
    """

    data: bytes
    machine: str
    sections: tuple[SectionHeader, ...]
    symbols: dict[str, Symbol]

    @classmethod
    def parse(cls, data: bytes) -> Elf:
        """Reads a code object.

        Raises:
          ValueError: `data` is not an ELF file for AMD GPUs, or is damaged; the message says where.
        """
        header = _header(data)
        flags, sections = header[7], tuple(_sections(data, header))
        symbols: dict[str, Symbol] = {}
        for number, section in enumerate(sections):
            if section.kind in (_SYMBOL_TABLE, _DYNAMIC_SYMBOLS):
                for symbol in _symbols(data, sections, number):
                    if symbols.setdefault(symbol.name, symbol) != symbol:
                        raise ValueError(f"an ELF file with two different symbols {symbol.name}")
        return cls(data, _MACHINES.get(flags & 0xFF, f"{flags & 0xFF:#x}"), sections, symbols)


def _header(data: bytes) -> tuple:
    if data[: len(_IDENT)] != _IDENT or len(data) < _HEADER.size:
        raise ValueError(
            f"not a 64-bit ELF file: {len(data)} bytes that start with {data[:8]!r}; expected at least {_HEADER.size}"
            f" that start with {_IDENT!r}, as those for AMD GPUs do"
        )
    header = _HEADER.unpack_from(data)
    if header[1:3] != (_SHARED_OBJECT, _AMDGPU):
        raise ValueError(
            f"an ELF file of type {header[1]} for machine {header[2]};"
            f" type {_SHARED_OBJECT}, a shared object, for machine {_AMDGPU}, AMD GPUs, was expected"
        )
    return header


def _inside(data: bytes, what: str, offset: int, size: int) -> None:
    if offset + size > len(data):
        raise ValueError(f"an ELF file of {len(data)} bytes; its {what} end at byte {offset + size}")


def _sections(data: bytes, header: tuple) -> Iterator[SectionHeader]:
    """SectionHeader headers, after a check that sections and loaded segments lie inside the file."""
    segments_at, sections_at, segment_size, segments, section_size, sections = *header[5:7], *header[9:13]
    if (segment_size, section_size) != (_SEGMENT.size, _SECTION.size):
        raise ValueError(
            f"an ELF file with headers of {segment_size} bytes a segment and {section_size} a section;"
            f" {_SEGMENT.size} and {_SECTION.size} were expected"
        )
    _inside(data, "program headers", segments_at, segment_size * segments)
    _inside(data, "section headers", sections_at, section_size * sections)
    for number in range(segments):
        kind, _, offset, _, _, size, *_ = _SEGMENT.unpack_from(data, segments_at + number * segment_size)
        if kind == _LOADED:
            _inside(data, f"bytes of segment {number}", offset, size)
    for number in range(sections):
        section = SectionHeader(*_SECTION.unpack_from(data, sections_at + number * section_size))
        if section.kind not in (_NO_SECTION, _WITHOUT_BYTES):
            _inside(data, f"bytes of section {number}", section.offset, section.size)
        yield section


def _text_at(table: bytes, at: int) -> str:
    end = table.find(b"\0", at)
    if end < 0:
        raise ValueError(f"an ELF file with a name at byte {at} of a string table of {len(table)} bytes")
    return table[at:end].decode(errors="backslashreplace")


def _symbols(data: bytes, sections: tuple[SectionHeader, ...], number: int) -> Iterator[Symbol]:
    """The symbols of a table that stand for bytes of a section."""
    table = sections[number]
    if table.link >= len(sections) or sections[table.link].kind != _STRINGS:
        raise ValueError(f"an ELF file whose symbol table, section {number}, has no string table")
    if table.entry_size != _SYMBOL.size or table.size % _SYMBOL.size:
        raise ValueError(
            f"an ELF file whose symbol table, section {number}, has {table.size} bytes in entries of"
            f" {table.entry_size}; entries of {_SYMBOL.size} were expected"
        )
    strings = sections[table.link]
    names = data[strings.offset : strings.offset + strings.size]
    for at in range(table.offset, table.offset + table.size, _SYMBOL.size):
        name, info, _, home, address, size = _SYMBOL.unpack_from(data, at)
        text = _text_at(names, name)
        if home == 0 or home >= _SPECIAL_SECTIONS:
            continue
        if home >= len(sections):
            raise ValueError(f"an ELF file whose symbol {text} is in section {home} of {len(sections)}")
        start = address - sections[home].address
        if not 0 <= start <= start + size <= sections[home].size:
            raise ValueError(
                f"an ELF file whose symbol {text} has bytes {start} to {start + size} of a section of"
                f" {sections[home].size}"
            )
        yield Symbol(text, info & 15, home, address, sections[home].offset + start, size)
