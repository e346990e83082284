"""Reads operands as arrays of a type and writes results, with every input and output modifier.

One letter names a type: u, i (uint32, int32), w, s (uint16, int16), U, I (uint64, int64), f, h, b, d (float32, float16,
bfloat16, float64). Arrays are [w, 64] for vector registers, [w, 1] for scalar registers, [] for constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction, Operand
from pallas_kernels.cdna.interpreter.dpp import dpp_sources
from pallas_kernels.cdna.interpreter.machine import LANES, LOW, Waves

TYPES: dict[str, Any] = {
    "u": np.uint32,
    "i": np.int32,
    "f": np.float32,
    "w": np.uint16,
    "s": np.int16,
    "h": np.float16,
    "b": ml_dtypes.bfloat16,
    "U": np.uint64,
    "I": np.int64,
    "d": np.float64,
}
FLOATS = "fhbd"
INV_2PI = 0.15915494309189535
_SELECTORS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}
Step = Callable[[Waves], None]
Reader = Callable[[Waves], np.ndarray]


def constant(operand: Operand, type_: str) -> np.ndarray:
    """Encodes a constant as an instruction of `type_` reads it: an array [] of that type."""
    dtype = np.dtype(TYPES[type_])
    if operand.kind == "float":
        value = INV_2PI if abs(operand.value - INV_2PI) < 1e-6 else operand.value
        if type_ in FLOATS:
            return np.array(value, dtype)
        bits = np.array(value, np.float32).view(np.uint32).astype(np.uint64)
    else:
        value = int(operand.value)
        # A float64 instruction reads a literal as the upper half of its bits, and an inline integer as 64 plain bits.
        bits = np.array((value << 32 if type_ == "d" and not -16 <= value <= 64 else value) & (2**64 - 1), np.uint64)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return (bits & np.uint64(2 ** (8 * dtype.itemsize) - 1)).astype(unsigned).view(dtype)


def raw_reader(operand: Operand, instruction: Instruction, offset: int = 0) -> Reader:
    """Reads 32 bits: uint32 [w, 64], [w, 1] or []. `offset` counts registers; 1 reads a constant's upper half."""
    if operand.kind in ("v", "a"):
        file, index = ("V" if operand.kind == "v" else "A"), operand.register(offset)
        return lambda m: getattr(m, file)[index][m.sel]
    if operand.kind == "s":
        index = operand.register(offset)
        return lambda m: m.scalar(index)[:, None]
    if operand.kind in ("int", "float"):
        value = constant(operand, "u" if offset == 0 else "U")
        value = value if offset == 0 else (value >> np.uint64(32 * offset)).astype(np.uint32)
        return lambda m: value
    raise instruction.error(f"`{operand.text}` can not be read by a vector instruction")


def scalar_registers(operand: Operand, instruction: Instruction, count: int) -> int:
    """Number of the first of `count` scalar registers that an operand names."""
    if operand.kind != "s":
        raise instruction.error(f"`{operand.text}` is not a scalar register")
    if operand.count < count:
        raise instruction.error(f"`{operand.text}` has {operand.count} registers, and the instruction needs {count}")
    return operand.index


def _sub_dword(bits: np.ndarray, selector: str, sign_extend: bool) -> np.ndarray:
    shift, width = _SELECTORS[selector]
    if width == 32:
        return bits
    bits = bits << np.uint32(32 - width - shift)
    if sign_extend:
        return (bits.view(np.int32) >> np.int32(32 - width)).view(np.uint32)
    return bits >> np.uint32(32 - width)


def reader(instruction: Instruction, number: int, type_: str, source: int | None = None) -> Reader:
    """Reads operand `number` as `type_` with its modifiers; `source` is its index among the sources (from 0)."""
    operand = instruction.operands[number]
    source = number - 1 if source is None else source
    dtype = TYPES[type_]
    if type_ in "UId":
        read = _wide_reader(operand, instruction, type_)
    elif operand.kind == "float" and type_ in "hb":
        value = constant(operand, type_)
        read = lambda m: value  # noqa: E731
    else:
        read = _narrow_reader(operand, instruction, source, type_)
    if not (operand.negate or operand.absolute):
        return read

    def modified(m):
        value = read(m)
        value = np.abs(value) if operand.absolute else value
        return (-value if operand.negate else value).astype(dtype, copy=False)

    return modified


def _wide_reader(operand: Operand, instruction: Instruction, type_: str) -> Reader:
    dtype = TYPES[type_]
    if operand.kind in ("int", "float"):
        # A float constant is encoded as float64, even for an integer instruction.
        value = constant(operand, "d" if operand.kind == "float" else type_).view(dtype)
        return lambda m: value
    if operand.kind == "s":
        index = scalar_registers(operand, instruction, 2)
        return lambda m: m.scalar64(index).view(dtype)[:, None]
    low, high = raw_reader(operand, instruction), raw_reader(operand, instruction, 1)
    return lambda m: (low(m).astype(np.uint64) | high(m).astype(np.uint64) << np.uint64(32)).view(dtype)


def _narrow_reader(operand: Operand, instruction: Instruction, source: int, type_: str) -> Reader:
    bits = raw_reader(operand, instruction)
    dtype = TYPES[type_]
    if instruction.encoding == "dpp" and source == 0:
        bits = _permuted(bits, instruction)
    selector = instruction.modifiers.get(f"src{source}_sel") if instruction.encoding == "sdwa" else None
    if selector and selector != "DWORD":
        whole, name = bits, str(selector)
        bits = lambda m: _sub_dword(whole(m), name, operand.sign_extend)  # noqa: E731
    if np.dtype(dtype).itemsize == 4:
        return bits if type_ == "u" else lambda m: bits(m).view(dtype)
    chosen = instruction.list_modifier("op_sel") or []
    shift = np.uint32(16 if source < len(chosen) and chosen[source] and not instruction.encoding else 0)
    return lambda m: np.asarray(bits(m) >> shift).astype(np.uint16).view(dtype)


def _permuted(bits: Reader, instruction: Instruction) -> Reader:
    """DPP: reads the value of another lane; gives 0 if that lane is out of range or inactive."""
    lane, in_range, _ = dpp_sources(instruction)

    def read(m):
        value = np.broadcast_to(bits(m), (m.count, LANES))[:, lane]
        return np.where(in_range & m.lanes[:, lane], value, np.uint32(0))

    return read


def writer(instruction: Instruction, type_: str) -> Callable[[Waves, Any], None]:
    """Writes a result of `type_` to the first operand, with clamp, omod, op_sel, SDWA and DPP."""
    operand, modifiers = instruction.operands[0], instruction.modifiers
    if not modifiers or (set(modifiers) <= {"op_sel", "src0_sel", "src1_sel"} and type_ in "uif"):
        if type_ == "u":
            return lambda m, value: m.set_vector(operand, value)
        if type_ in "if":
            return lambda m, value: m.set_vector(operand, np.asarray(value).view(np.uint32))

    def write(m, value):
        value = _adjusted(np.asarray(value), type_, modifiers)
        if type_ in "UId":
            bits = np.ascontiguousarray(value).view(np.uint64)
            m.set_vector(operand, (bits & LOW).astype(np.uint32))
            m.set_vector(operand, (bits >> np.uint64(32)).astype(np.uint32), 1)
            return
        bits = value.view(np.uint32) if value.dtype.itemsize == 4 else value.view(np.uint16).astype(np.uint32)
        chosen = instruction.list_modifier("op_sel")
        # A 16-bit result clears the upper half, unless op_sel directs it to the upper half and keeps the lower.
        if chosen and chosen[-1] and value.dtype.itemsize == 2 and not instruction.encoding:
            bits = (m.vector(operand) & np.uint32(0xFFFF)) | bits << np.uint32(16)
        if instruction.encoding == "sdwa":
            bits = _placed(bits, m.vector(operand), modifiers)
        if instruction.encoding == "dpp":
            lane, in_range, enabled = dpp_sources(instruction)
            there = in_range & m.lanes[:, lane] if "bound_ctrl" not in modifiers else True
            bits = np.where(enabled & there, bits, m.vector(operand))
        m.set_vector(operand, bits)

    return write


def _adjusted(value: np.ndarray, type_: str, modifiers: dict) -> np.ndarray:
    """Applies the output modifiers of floats: omod, then clamp to [0, 1], which turns NaN into 0."""
    dtype = TYPES[type_]
    value = value.astype(dtype, copy=False)
    if type_ in FLOATS:
        if "mul" in modifiers:
            value = (value * dtype(int(modifiers["mul"]))).astype(dtype)
        if "div" in modifiers:
            value = (value / dtype(int(modifiers["div"]))).astype(dtype)
        if modifiers.get("clamp"):
            value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(dtype)
    return value


def _placed(bits: np.ndarray, old: np.ndarray, modifiers: dict) -> np.ndarray:
    """SDWA destination: writes the selected byte or word; the other bits become 0, keep `old` or extend the sign."""
    shift, width = _SELECTORS[str(modifiers.get("dst_sel", "DWORD"))]
    if width == 32:
        return bits
    field = np.uint32(((1 << width) - 1) << shift)
    bits = (bits << np.uint32(shift)) & field
    unused = modifiers.get("dst_unused", "UNUSED_PAD")
    if unused == "UNUSED_PRESERVE":
        return (old & ~field) | bits
    if unused == "UNUSED_SEXT":
        return (
            (bits << np.uint32(32 - width - shift))
            .view(np.int32)
            .__rshift__(np.int32(32 - width - shift))
            .view(np.uint32)
        )
    return bits
