"""Binds global, buffer, scratch and scalar memory accesses."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import M0, Instruction, Operand
from pallas_kernels.cdna.interpreter.lds import put, put_half, sign_extended, take
from pallas_kernels.cdna.interpreter.machine import LANE, LANES, Waves, load_words, store_words
from pallas_kernels.cdna.interpreter.operands import Step, raw_reader, scalar_registers

SIZES = {
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}
_GLOBAL = re.compile(r"(?:global|flat)_(load|store)_([us]?byte|[us]?short|dword(?:x[234])?)(_d16)?(_hi)?")
_BUFFER = re.compile(r"buffer_(load|store)_([us]?byte|[us]?short|dword(?:x[234])?)(_d16)?(_hi)?")
_SCRATCH = re.compile(r"scratch_(load|store)_([us]?byte|[us]?short|dword(?:x[234])?)(_d16)?(_hi)?")
_TO_LDS = re.compile(r"global_load_lds_(dword(?:x[34])?)")
_SCALAR = re.compile(r"s_load_dword(?:x(2|4|8|16))?")
# Bits of a buffer descriptor that hold the base address.
_BASE_BITS = np.uint64((1 << 48) - 1)


def _give(m: Waves, to: Operand, words: np.ndarray, kind: str, half, upper) -> None:
    """Writes the result of a load to registers, with sign extension or into a d16 half."""
    if kind in ("sbyte", "sshort"):
        words = sign_extended(words, 8 * SIZES[kind])
    if half:
        put_half(m, to, words, bool(upper))
    else:
        put(m, to, words)


def _take(m: Waves, data: Operand, size: int, upper) -> np.ndarray:
    words = take(m, data, max(1, size // 4))
    return words >> np.uint32(16) if upper else words


def _of_lanes(m: Waves, values: np.ndarray) -> np.ndarray:
    """Broadcasts one number per wave [w] to the active lanes, int64 [n, 1]."""
    return np.broadcast_to(values.astype(np.int64)[:, None], m.lanes.shape)[m.lanes][:, None]


def _addresses(i: Instruction, address: Operand, base: Operand):
    """Computes addresses, uint64 [w, 64], from a 64-bit vector address or a scalar base plus 32-bit vector offset."""
    offset = np.uint64(i.int_modifier("offset") & 0xFFFFFFFFFFFFFFFF)
    if base.kind != "off":
        first = scalar_registers(base, i, 2)
        return lambda m: m.scalar64(first)[:, None] + offset + m.vector(address).astype(np.uint64)
    return lambda m: (m.vector(address) | m.vector(address, 1).astype(np.uint64) << np.uint64(32)) + offset


def _bind_global(i: Instruction, match: re.Match) -> Step:
    direction, kind, half, upper = match.groups()
    size = SIZES[kind]
    operands = list(i.operands)
    data = operands.pop(1 if direction == "store" else 0)
    where = _addresses(i, operands[0], operands[1] if len(operands) > 1 else Operand("off", "off"))
    if direction == "load":
        return lambda m: _give(m, data, m.memory.load(where(m)[m.lanes], size, i), kind, half, upper)
    return lambda m: m.memory.store(where(m)[m.lanes], _take(m, data, size, upper), size, i)


def _bind_buffer(i: Instruction, match: re.Match) -> Step:
    """Accesses memory through a buffer descriptor: words beyond its size load as zero and are not stored."""
    direction, kind, half, upper = match.groups()
    if any(x in i.modifiers for x in ("idxen", "lds")):
        raise i.error("indexed buffer accesses and buffer loads to LDS are not implemented")
    size, constant = SIZES[kind], i.int_modifier("offset")
    # The hardware checks the range of each word separately and ignores the scalar offset in this check.
    unit = min(size, 4)
    operands = [o for o in i.operands if o.kind != "off"]
    data = operands.pop(0)
    offset = operands.pop(0) if "offen" in i.modifiers else None
    descriptor, start = operands
    words = scalar_registers(descriptor, i, 4)
    if start.kind == "s":
        first_byte = raw_reader(start, i)
    elif start.kind == "int":
        first_byte = lambda m: np.full((m.count, 1), int(start.value) & 0xFFFFFFFF, np.uint32)  # noqa: E731
    else:
        raise i.error(f"`{start.text}` is not a scalar offset")

    def places(m):
        if (m.scalar(words + 1) >> np.uint32(16) & np.uint32(0x3FFF)).any():
            raise i.error("a descriptor with a stride is not implemented")
        at = (m.vector(offset) if offset is not None else np.zeros((m.count, LANES), np.uint32)).astype(np.int64)
        at = (at + constant)[m.lanes][:, None] + np.arange(0, size, unit)
        inside = at + unit <= _of_lanes(m, m.scalar(words + 2))
        base = (m.scalar64(words) & _BASE_BITS).astype(np.int64) + first_byte(m)[:, 0]
        return at + _of_lanes(m, base), inside

    def load(m):
        at, inside = places(m)
        loaded = np.zeros(at.shape, np.uint32)
        loaded[inside] = m.memory.load(at[inside], unit, i)[:, 0]
        _give(m, data, loaded, kind, half, upper)

    def store(m):
        at, inside = places(m)
        m.memory.store(at[inside], _take(m, data, size, upper)[inside][:, None], unit, i)

    return load if direction == "load" else store


def _bind_scratch(i: Instruction, match: re.Match) -> Step:
    """Accesses the private memory of each lane, which holds spilled registers."""
    direction, kind, half, upper = match.groups()
    size, constant = SIZES[kind], i.int_modifier("offset")
    operands = list(i.operands)
    data = operands.pop(1 if direction == "store" else 0)
    vector, scalar = operands[0], operands[1] if len(operands) > 1 else Operand("off", "off")
    if vector.kind not in ("v", "off") or scalar.kind not in ("s", "off"):
        raise i.error(f"`{vector.text}, {scalar.text}` is not a vector offset and a scalar one, or off")

    def places(m):
        at = np.full((m.count, LANES), constant, np.int64)
        at = at + m.vector(vector).astype(np.int64) if vector.kind == "v" else at
        at = at + m.scalar(scalar.index).astype(np.int64)[:, None] if scalar.kind == "s" else at
        length = m.scratch.shape[2]
        if (at[m.lanes] + size > length).any() or (at[m.lanes] < 0).any():
            raise i.error(f"access outside the {length} bytes of scratch memory a lane")
        waves = np.arange(len(m.exec))[m.sel]
        return (at + (waves[:, None] * LANES + LANE) * length)[m.lanes]

    def step(m):
        raw = m.scratch.reshape(-1)
        if direction == "load":
            _give(m, data, load_words(raw, raw.view(np.uint32), places(m), size), kind, half, upper)
        else:
            store_words(raw, raw.view(np.uint32), places(m), _take(m, data, size, upper), size)

    return step


def _bind_to_lds(i: Instruction, match: re.Match) -> Step:
    """Copies global memory to LDS from M0 on, in lane order. Three-word items have a stride of four words."""
    size, constant = SIZES[match[1]], i.int_modifier("offset")
    stride = 4 if size == 4 else 16
    where = _addresses(i, i.operands[0], i.operands[1] if len(i.operands) > 1 else Operand("off", "off"))

    def step(m):
        words = m.memory.load(where(m)[m.lanes], size, i)
        at = (m.scalar(M0).astype(np.int64)[:, None] + constant + LANE * stride)[m.lanes]
        if at.size and (int(at.max()) + size > m.lds_size or int(at.min()) < 0):
            raise i.error(f"write at byte {int(at.max())} of an LDS of {m.lds_size}")
        group = np.broadcast_to((m.group[m.sel] * m.lds_stride)[:, None], m.lanes.shape)[m.lanes]
        store_words(m.lds, m.lds_words, at + group, words, size)

    return step


def _bind_scalar(i: Instruction, match: re.Match) -> Step:
    """s_load: loads consecutive words from a scalar address."""
    count = int(match[1] or 1)
    to, base, offset = i.operands[:3]
    first = scalar_registers(base, i, 2)
    scalar_registers(to, i, count)
    if offset.kind not in ("int", "s", "off"):
        raise i.error(f"`{offset.text}` is not an offset")
    constant = i.int_modifier("offset") + (int(offset.value) if offset.kind == "int" else 0)

    def step(m):
        address = m.scalar64(first) + np.uint64(constant & 0xFFFFFFFFFFFFFFFF)
        address = address + m.scalar(offset.index).astype(np.uint64) if offset.kind == "s" else address
        words = m.memory.load(address & ~np.uint64(3), 4 * count, i)
        for k in range(count):
            m.set_scalar(dataclasses.replace(to, index=to.index + k), words[:, k])

    return step


# Pattern of opcodes -> (meaning, binder).
TABLE = {
    _GLOBAL: ("1 to 16 bytes a lane at 64-bit addresses", _bind_global),
    _BUFFER: ("1 to 16 bytes a lane within a descriptor's range", _bind_buffer),
    _SCRATCH: ("1 to 16 bytes of a lane's private memory", _bind_scratch),
    _TO_LDS: ("global memory straight to LDS", _bind_to_lds),
    _SCALAR: ("1 to 16 words for the whole wave", _bind_scalar),
}


def bind(i: Instruction) -> Step | None:
    """Binds a memory instruction; returns None for an opcode that TABLE lacks."""
    for pattern, (_, binder) in TABLE.items():
        match = pattern.fullmatch(i.opcode)
        if match:
            return binder(i, match)
    return None
