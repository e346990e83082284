"""Binds vector instructions: those of `vector_table`, and the ones in SPECIAL that need more than a table entry."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import VCC, Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import LANES, Waves, lanes_of, masks_of
from pallas_kernels.cdna.interpreter.operands import TYPES, Step, raw_reader, reader, scalar_registers, writer
from pallas_kernels.cdna.interpreter.packed_alu import (
    PACKED16,
    bind_dot2,
    bind_from_fp8,
    bind_packed16,
    bind_packed_f32,
    bind_packed_move,
    bind_scaled_from_fp8,
    bind_scaled_to_fp8,
    bind_to_fp8,
)
from pallas_kernels.cdna.interpreter.vector_arithmetic import (
    F32,
    I64,
    U32,
    U64,
    divide_fma,
    divide_scale,
    fma,
    low32,
    product,
)
from pallas_kernels.cdna.interpreter.vector_table import COMPARISONS, SATURATING, TABLE

# --- the table


_COMPARE = re.compile(r"v_cmp(x?)_(\w+)_([fiu])(16|32|64)")
_LETTER = {"f16": "h", "f32": "f", "f64": "d", "i16": "s", "i32": "i", "i64": "I", "u16": "w", "u32": "u", "u64": "U"}


# --- binding
def bind_table(i: Instruction) -> Step:
    """Binds an instruction of TABLE: read the sources, compute, write the result."""
    types, result, meaning = TABLE[i.opcode]
    if len(i.operands) != 1 + len(types):
        raise i.error(f"{len(i.operands)} operands, {1 + len(types)} expected")
    reads = [reader(i, 1 + k, t) for k, t in enumerate(types)]
    if i.modifiers.get("clamp") and result not in "fhbd":
        meaning = _saturating(i, result)
    write = writer(i, result)
    if len(reads) == 1:
        (a,) = reads
        return lambda m: write(m, meaning(a(m)))
    if len(reads) == 2:
        a, b = reads
        return lambda m: write(m, meaning(a(m), b(m)))
    a, b, c = reads
    return lambda m: write(m, meaning(a(m), b(m), c(m)))


def _saturating(i: Instruction, result: str):
    if i.opcode not in SATURATING:
        raise i.error("clamp of this integer instruction is not implemented")
    wide, dtype = SATURATING[i.opcode], TYPES[result]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return lambda a, b: np.clip(wide(a, b), low, high).astype(dtype)


def write_lanes(m: Waves, operand: Operand, flags: Any) -> None:
    """Writes a lane mask to a scalar register pair; bits of inactive lanes are 0."""
    m.set_scalar64(operand, masks_of(np.broadcast_to(flags, m.lanes.shape) & m.lanes))


def _bind_compare(i: Instruction) -> Step:
    exclusive, name, kind, width = _COMPARE.fullmatch(i.opcode).groups()  # type: ignore[union-attr]
    letter, meaning = _LETTER[kind + width], COMPARISONS[name]
    to = i.operands[0]
    a, b = reader(i, 1, letter), reader(i, 2, letter)

    def step(m):
        write_lanes(m, to, meaning(a(m), b(m)))
        if exclusive:
            m.set_exec(m.scalar64(to.index))

    return step


def _bind_class(i: Instruction) -> Step:
    """v_cmp_class_f32: whether the value belongs to one of the wanted classes, out of ten."""
    to = i.operands[0]
    value, wanted = reader(i, 1, "f"), raw_reader(i.operands[2], i)

    def step(m):
        a = np.broadcast_to(value(m), (m.count, LANES))
        bits = np.ascontiguousarray(a).view(U32)
        negative, exponent, fraction = bits >> U32(31) == 1, bits >> U32(23) & U32(255), bits & U32(0x7FFFFF)
        # Classes: 0 signalling NaN, 1 quiet NaN, 2 -inf, 3 -normal, 4 -subnormal, 5 -0, 6 +0, 7 to 9 mirrored.
        size = np.where(exponent == 255, 0, np.where(exponent > 0, 1, np.where(fraction > 0, 2, 3)))
        kind = np.where(negative, 2 + size, 9 - size)
        nan = (exponent == 255) & (fraction > 0)
        kind = np.where(nan, fraction >> U32(22), kind)
        write_lanes(m, to, (wanted(m) >> kind.astype(U32)) & U32(1) == 1)
        if i.opcode.startswith("v_cmpx"):
            m.set_exec(m.scalar64(to.index))

    return step


def _bind_select(i: Instruction) -> Step:
    """v_cndmask: selects the second source in lanes whose mask bit is set, else the first."""
    mask = scalar_registers(i.operands[3], i, 2) if len(i.operands) > 3 else VCC
    letter = "f" if any(o.negate or o.absolute for o in i.operands[1:3]) else "u"
    a, b, write = reader(i, 1, letter), reader(i, 2, letter), writer(i, letter)
    return lambda m: write(m, np.where(lanes_of(m.scalar64(mask)), b(m), a(m)))


def _bind_carry(i: Instruction) -> Step:
    """v_add_co, v_addc_co, v_sub_co, v_subb_co and their reversed variants: result and carry mask."""
    carry_out, carry_in = i.operands[1], scalar_registers(i.operands[4], i, 2) if len(i.operands) > 4 else None
    a, b, write = reader(i, 2, "u", 0), reader(i, 3, "u", 1), writer(i, "u")
    subtract, reverse = "sub" in i.opcode, "rev" in i.opcode

    def step(m):
        x, y = a(m).astype(I64), b(m).astype(I64)
        x, y = (y, x) if reverse else (x, y)
        carry = lanes_of(m.scalar64(carry_in)).astype(I64) if carry_in is not None else I64(0)
        total = x - y - carry if subtract else x + y + carry
        total = np.broadcast_to(total, m.lanes.shape)
        # Flags of inactive lanes may hold anything: `write_lanes` clears them.
        flags = (total < 0) | (total > 0xFFFFFFFF)
        write(m, low32(total))
        write_lanes(m, carry_out, flags)

    return step


def _bind_accumulate(i: Instruction) -> Step:
    """v_fmac: D = S0 * S1 + D."""
    letter = _LETTER[i.opcode.rsplit("_", 1)[1]]
    a, b, c, write = reader(i, 1, letter), reader(i, 2, letter), reader(i, 0, letter, 9), writer(i, letter)
    return lambda m: write(m, fma(a(m), b(m), c(m)))


def _bind_literal_fma(i: Instruction) -> Step:
    """v_fmamk (S0 * K + S1) and v_fmaak (S0 * S1 + K): the text lists operands in the order of the formula."""
    letter = _LETTER[i.opcode.rsplit("_", 1)[1]]
    a, b, c, write = (*(reader(i, k, letter) for k in (1, 2, 3)), writer(i, letter))
    return lambda m: write(m, fma(a(m), b(m), c(m)))


def _bind_wide_multiply(i: Instruction) -> Step:
    """v_mad_u64_u32 and v_mad_i64_i32: 32-bit x 32-bit + 64-bit, with carry."""
    small, wide = ("i", "I") if "i64" in i.opcode else ("u", "U")
    carry = i.operands[1]
    a, b, c, write = reader(i, 2, small), reader(i, 3, small), reader(i, 4, wide), writer(i, wide)

    def step(m):
        first = product(a(m), b(m))
        total = np.broadcast_to(first + c(m), m.lanes.shape)
        write(m, total)
        write_lanes(m, carry, total.view(U64) < first.view(U64))

    return step


def _bind_truth_table(i: Instruction) -> Step:
    """v_bitop3: any bitwise function of three sources, given as its truth table."""
    letter = "w" if i.opcode.endswith("b16") else "u"
    table = i.int_modifier("bitop3")
    reads, write = [reader(i, k, letter) for k in (1, 2, 3)], writer(i, letter)

    def step(m):
        sources = [r(m) for r in reads]
        out = np.zeros((), TYPES[letter])
        for row in range(8):
            if table >> row & 1:
                a, b, c = (s if row >> (2 - k) & 1 else ~s for k, s in enumerate(sources))
                out = out | (a & b & c)
        write(m, out)

    return step


def _bind_divide_scale(i: Instruction) -> Step:
    """v_div_scale: D = S0, scaled in lanes whose quotient S2 / S1 needs it, and the mask of lanes to scale back."""
    to, mask = i.operands[0], i.operands[1]
    reads = [reader(i, k, "f", k - 2) for k in (2, 3, 4)]

    def step(m):
        scaled, flags = divide_scale(*(np.broadcast_to(r(m), m.lanes.shape) for r in reads))
        m.set_vector(to, scaled.astype(F32).view(U32))
        write_lanes(m, mask, flags)

    return step


def _bind_divide_fma(i: Instruction) -> Step:
    """v_div_fmas: a fused multiply-add, scaled back in the lanes of VCC."""
    a, b, c, write = (*(reader(i, k, "f") for k in (1, 2, 3)), writer(i, "f"))
    return lambda m: write(m, divide_fma(a(m), b(m), c(m), lanes_of(m.scalar64(VCC))))


def _bind_swap(i: Instruction) -> Step:
    first, second = i.operands

    def step(m):
        a, b = m.vector(first).copy(), m.vector(second).copy()
        m.set_vector(first, b)
        m.set_vector(second, a)

    return step


# Opcode, or pattern of opcodes -> (meaning, binder).
SPECIAL: dict[str, tuple[str, Callable[[Instruction], Step]]] = {
    r"v_cmpx?_class_f32": ("mask of lanes whose value is of the wanted classes", _bind_class),
    r"v_cmpx?_\w+_[fiu](16|32|64)": ("mask of lanes where the comparison holds", _bind_compare),
    r"v_cndmask_b32": ("D = mask ? S1 : S0", _bind_select),
    r"v_(add|addc|sub|subb|subrev|subbrev)_co_u32": ("D and carry mask", _bind_carry),
    r"v_fmac_f(16|32|64)": ("D = S0 * S1 + D", _bind_accumulate),
    r"v_fma[am]k_f(16|32)": ("fused multiply-add with a literal", _bind_literal_fma),
    r"v_mad_(u64_u32|i64_i32)": ("D = S0 * S1 + S2 in 64 bits", _bind_wide_multiply),
    r"v_bitop3_b(16|32)": ("truth table of three bits", _bind_truth_table),
    r"v_div_scale_f32": ("D = S0, scaled where a quotient would leave the range", _bind_divide_scale),
    r"v_div_fmas_f32": ("D = S0 * S1 + S2, with the scaling undone", _bind_divide_fma),
    r"v_swap_b32": ("exchange", _bind_swap),
    r"v_pk_(add|mul|fma)_f32": ("two float32 operations", bind_packed_f32),
    r"v_pk_mov_b32": ("D = {S0, S1}", bind_packed_move),
    r"v_cvt_(pk_)?f32_(fp8|bf8)": ("FP8 codes to float32", bind_from_fp8),
    r"v_cvt_pk_(fp8|bf8)_f32": ("float32 to FP8 codes", bind_to_fp8),
    r"v_cvt_scalef32_pk_(f32|f16|bf16)_(fp8|bf8)": ("FP8 codes times a power of two", bind_scaled_from_fp8),
    r"v_cvt_scalef32_pk_(fp8|bf8)_(f32|f16|bf16)": ("values over a power of two to FP8 codes", bind_scaled_to_fp8),
    r"v_dot2c?_f32_(f16|bf16)": ("D = S0 . S1 + S2", bind_dot2),
    **{name: ("two 16-bit operations", bind_packed16) for name in PACKED16},
}


def bind(i: Instruction) -> Step | None:
    """Binds a vector instruction; returns None for an opcode that neither TABLE nor SPECIAL has."""
    if i.opcode in TABLE:
        return bind_table(i)
    for pattern, (_, binder) in SPECIAL.items():
        if re.fullmatch(pattern, i.opcode):
            return binder(i)
    return None
