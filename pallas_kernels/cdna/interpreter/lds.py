"""LDS instructions: reads, writes and transposing reads of a workgroup's shared memory. `control_flow` has barriers."""

from __future__ import annotations

import re

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import LANES, Waves, load_words, store_words
from pallas_kernels.cdna.interpreter.operands import Step

_SIZES = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
_SINGLE = re.compile(r"ds_(read|write)_(b8|u8|i8|b16|u16|i16|b32|b64|b96|b128)(_d16)?(_hi)?")
_DOUBLE = re.compile(r"ds_(read|write)2(st64)?_b(32|64)")
_TRANSPOSED = re.compile(r"ds_read_b64_tr_b(8|16)")


def _places(m: Waves, addresses: np.ndarray, size: int, i: Instruction) -> np.ndarray:
    """Checks addresses, int64 [w, 64]; returns the offsets of the active lanes' accesses into `m.lds`, [n]."""
    active = addresses[m.lanes]
    if active.size and (int(active.max()) + size > m.lds_size or int(active.min()) < 0):
        raise i.error(f"access of {size} bytes at byte {int(active.max())} of an LDS of {m.lds_size}")
    return (addresses + (m.group[m.sel] * m.lds_stride)[:, None])[m.lanes]


def put(m: Waves, to: Operand, words: np.ndarray, first: int = 0) -> None:
    """Writes words [n, registers] of the active lanes to consecutive registers."""
    for register in range(words.shape[1]):
        if m.full:
            m.set_vector(to, words[:, register].reshape(m.count, LANES), first + register)
        else:
            value = np.zeros((m.count, LANES), np.uint32)
            value[m.lanes] = words[:, register]
            m.set_vector(to, value, first + register)


def take(m: Waves, of: Operand, registers: int) -> np.ndarray:
    """Reads consecutive registers of the active lanes, uint32 [n, registers]."""
    return np.stack([m.vector(of, r)[m.lanes] for r in range(registers)], axis=1)


def sign_extended(words: np.ndarray, bits: int) -> np.ndarray:
    """Sign-extends the low `bits` bits of uint32."""
    shift = np.int32(32 - bits)
    return (words.view(np.int32) << shift >> shift).view(np.uint32)


def put_half(m: Waves, to: Operand, words: np.ndarray, upper: bool) -> None:
    """Writes the 16 bits of a d16 load into one half of the destination; the other half keeps its value."""
    old = m.vector(to)[m.lanes]
    half = words[:, 0] & np.uint32(0xFFFF)
    new = old & np.uint32(0xFFFF) | half << np.uint32(16) if upper else old & np.uint32(0xFFFF0000) | half
    put(m, to, new[:, None])


def _bind_single(i: Instruction, match: re.Match) -> Step:
    direction, kind, half, upper = match.groups()
    size, offset = _SIZES[kind], i.int_modifier("offset")
    registers = max(1, size // 4)
    if direction == "read":
        to, address = i.operands

        def read(m):
            at = _places(m, m.vector(address).astype(np.int64) + offset, size, i)
            words = load_words(m.lds, m.lds_words, at, size)
            if kind in ("i8", "i16"):
                words = sign_extended(words, 8 * size)
            if half:
                put_half(m, to, words, bool(upper))
            else:
                put(m, to, words)

        return read
    address, data = i.operands

    def write(m):
        at = _places(m, m.vector(address).astype(np.int64) + offset, size, i)
        words = take(m, data, registers)
        store_words(m.lds, m.lds_words, at, words >> np.uint32(16) if upper else words, size)

    return write


def _bind_double(i: Instruction, match: re.Match) -> Step:
    """ds_read2, ds_write2: two accesses, each with its own offset in elements (`st64`: in multiples of 64 elements)."""
    direction, strided, bits = match.groups()
    size = int(bits) // 8
    offsets = [i.int_modifier(f"offset{k}") * size * (64 if strided else 1) for k in (0, 1)]
    registers = size // 4

    if direction == "read":
        to, address = i.operands

        def read(m):
            base = m.vector(address).astype(np.int64)
            words = [load_words(m.lds, m.lds_words, _places(m, base + o, size, i), size) for o in offsets]
            put(m, to, np.concatenate(words, axis=1))

        return read
    address, first, second = i.operands

    def write(m):
        base = m.vector(address).astype(np.int64)
        for offset, data in zip(offsets, (first, second)):
            store_words(m.lds, m.lds_words, _places(m, base + offset, size, i), take(m, data, registers), size)

    return write


def _bind_transposed(i: Instruction, match: re.Match) -> Step:
    """ds_read_b64_tr (gfx950): sixteen lanes read rows of sixteen elements and receive columns; EXEC is ignored."""
    bits = int(match[1])
    per_lane, offset = 64 // bits, i.int_modifier("offset")
    to, address = i.operands

    def step(m):
        if not m.full:
            raise i.error("transposing read with inactive lanes")
        at = _places(m, m.vector(address).astype(np.int64) + offset, 8, i)
        raw = np.ascontiguousarray(load_words(m.lds, m.lds_words, at, 8)).view(f"u{bits // 8}")
        rows = raw.reshape(-1, per_lane, 16).transpose(0, 2, 1)
        put(m, to, np.ascontiguousarray(rows).reshape(-1, per_lane).view(np.uint32))

    return step


# Pattern of opcodes -> (meaning, binder).
TABLE = {
    _SINGLE: ("one access of 1 to 16 bytes a lane", _bind_single),
    _DOUBLE: ("two accesses of 4 or 8 bytes a lane", _bind_double),
    _TRANSPOSED: ("8 bytes a lane, transposed within 16 lanes", _bind_transposed),
}


def bind(i: Instruction) -> Step | None:
    """Binds an LDS instruction; returns None for an opcode that TABLE lacks."""
    for pattern, (_, binder) in TABLE.items():
        match = pattern.fullmatch(i.opcode)
        if match:
            return binder(i, match)
    return None
