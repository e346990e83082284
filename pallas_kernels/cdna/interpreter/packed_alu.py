"""Binds vector instructions that pack several values in a register: 16-bit halves, FP8, dot products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import Waves
from pallas_kernels.cdna.interpreter.operands import TYPES, Step, raw_reader, reader
from pallas_kernels.cdna.interpreter.vector_arithmetic import (
    BF16,
    F16,
    F32,
    F64,
    FP8,
    U32,
    fma,
    max_ieee,
    min_ieee,
    packed,
    saturated,
)


def bind_packed_f32(i: Instruction) -> Step:
    """v_pk_{add,mul,fma}_f32: two float32 operations on register pairs; op_sel selects the halves."""
    meanings: dict[str, Callable[..., Any]] = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "fma": fma}
    meaning = meanings[i.opcode.split("_")[2]]
    sources = i.operands[1:]
    halves = []
    for half, chosen, negated in ((0, "op_sel", "neg_lo"), (1, "op_sel_hi", "neg_hi")):
        which = i.list_modifier(chosen) or [half] * len(sources)
        signs = i.list_modifier(negated) or [0] * len(sources)
        # A constant has the same value for both halves.
        reads = [raw_reader(o, i, w if o.kind in "vas" else 0) for o, w in zip(sources, which)]
        halves.append(list(zip(reads, signs)))
    to = i.operands[0]

    def step(m):
        out = []
        for half in halves:
            values = [-r(m).view(F32) if negative else r(m).view(F32) for r, negative in half]
            out.append(np.asarray(meaning(*values), F32).view(U32))
        # Compute both halves before writing either: the destination may also be a source.
        m.set_vector(to, out[0])
        m.set_vector(to, out[1], 1)

    return step


def bind_packed16(i: Instruction) -> Step:
    """Two 16-bit operations; op_sel and op_sel_hi select the half of each source."""
    if i.modifiers.get("clamp"):
        raise i.error("clamp of packed instructions is not implemented")
    types, meaning = PACKED16[i.opcode]
    sources = list(zip(i.operands[1:], types))
    halves = []
    for half, chosen, negated in ((0, "op_sel", "neg_lo"), (1, "op_sel_hi", "neg_hi")):
        which = i.list_modifier(chosen) or [half] * len(types)
        signs = i.list_modifier(negated) or [0] * len(types)
        halves.append([_half_reader(i, o, t, w, s) for (o, t), w, s in zip(sources, which, signs)])
    to = i.operands[0]

    def step(m):
        low, high = (np.asarray(meaning(*(r(m) for r in half))) for half in halves)
        m.set_vector(to, packed(low, high))

    return step


def _half_reader(i: Instruction, operand: Operand, letter: str, upper: int, negative: int):
    dtype = TYPES[letter]
    if operand.kind == "float":
        # A float constant is a float16 in the low half; the high half is 0.
        bits = np.array(0 if upper else operand.value, F16).view(np.uint16)
        return lambda m: bits.view(dtype)
    whole, shift = raw_reader(operand, i), U32(16 if upper else 0)

    def read(m):
        value = (np.asarray(whole(m)) >> shift).astype(np.uint16).view(dtype)
        return -value if negative else value

    return read


def bind_packed_move(i: Instruction) -> Step:
    """v_pk_mov_b32: copies one register of each source pair."""
    chosen = i.list_modifier("op_sel") or [0, 0]
    a, b = (raw_reader(o, i, which) for o, which in zip(i.operands[1:], chosen))
    to = i.operands[0]

    def step(m):
        first, second = np.array(a(m)), np.array(b(m))
        m.set_vector(to, first)
        m.set_vector(to, second, 1)

    return step


def bind_from_fp8(i: Instruction) -> Step:
    """v_cvt_f32_fp8, v_cvt_pk_f32_fp8 and their bf8 variants, with the FP8 types of the architecture."""
    pair = "_pk_" in i.opcode
    selector = str(i.modifiers.get("src0_sel", "DWORD"))
    chosen = i.list_modifier("op_sel") or [0, 0]
    if pair:
        byte = 2 if selector == "WORD_1" or (not i.encoding and chosen[0]) else 0
    else:
        byte = int(selector[-1]) if selector.startswith("BYTE") else 2 * chosen[0] + chosen[1]
    code, to, which = raw_reader(i.operands[1], i), i.operands[0], 1 if "bf8" in i.opcode else 0

    def step(m):
        flavour, bits = FP8[m.arch][which], np.array(code(m))
        for k in range(2 if pair else 1):
            value = (bits >> U32(8 * (byte + k))).astype(np.uint8).view(flavour).astype(F32)
            m.set_vector(to, value.view(U32), k)

    return step


def bind_to_fp8(i: Instruction) -> Step:
    """v_cvt_pk_fp8_f32 and v_cvt_pk_bf8_f32: write two codes to one half of the destination and keep the other."""
    a, b, to = reader(i, 1, "f"), reader(i, 2, "f"), i.operands[0]
    upper = (i.list_modifier("op_sel") or [0])[-1]
    which = 1 if "bf8" in i.opcode else 0

    def step(m):
        flavour = FP8[m.arch][which]
        low, high = (saturated(r(m), flavour).view(np.uint8).astype(U32) for r in (a, b))
        _store_half(m, to, low | high << U32(8), upper)

    return step


def _store_half(m: Waves, to: Operand, half: np.ndarray, upper: int) -> None:
    old = m.vector(to)
    m.set_vector(to, old & U32(0xFFFF) | half << U32(16) if upper else old & U32(0xFFFF0000) | half)


def _power(bits: np.ndarray) -> np.ndarray:
    """The power of two in the exponent field of float32 bits."""
    return np.exp2((bits >> U32(23) & U32(255)).astype(F64) - 127)


def bind_scaled_from_fp8(i: Instruction) -> Step:
    """v_cvt_scalef32_pk_{f32,f16,bf16}_{fp8,bf8} (gfx950): multiplies two codes of one half by a power of two."""
    code, scale, to = raw_reader(i.operands[1], i), raw_reader(i.operands[2], i), i.operands[0]
    shift = U32(16 if (i.list_modifier("op_sel") or [0])[0] else 0)
    flavour = FP8["gfx950"][1 if i.opcode.endswith("bf8") else 0]
    wide = "_pk_f32_" in i.opcode
    narrow = F16 if "_pk_f16_" in i.opcode else BF16

    def step(m):
        bits, power = np.array(code(m)) >> shift, _power(scale(m))
        pair = [(bits >> U32(8 * k)).astype(np.uint8).view(flavour).astype(F64) * power for k in range(2)]
        if wide:
            for k in range(2):
                m.set_vector(to, pair[k].astype(F32).view(U32), k)
        else:
            m.set_vector(to, packed(*(p.astype(F32).astype(narrow) for p in pair)))

    return step


def bind_scaled_to_fp8(i: Instruction) -> Step:
    """v_cvt_scalef32_pk_{fp8,bf8}_{f32,f16,bf16} (gfx950): divides two values by a power of two, writes their codes."""
    flavour = FP8["gfx950"][1 if "_pk_bf8" in i.opcode else 0]
    source = i.opcode.rsplit("_", 1)[1]
    upper, to = (i.list_modifier("op_sel") or [0])[-1], i.operands[0]
    scale = raw_reader(i.operands[3 if source == "f32" else 2], i)
    first = raw_reader(i.operands[1], i)
    second = raw_reader(i.operands[2], i) if source == "f32" else first
    narrow = F16 if source == "f16" else BF16

    def step(m):
        if source == "f32":
            pair = [first(m).view(F32), second(m).view(F32)]
        else:
            pair = [(np.array(first(m)) >> U32(16 * k)).astype(np.uint16).view(narrow).astype(F32) for k in (0, 1)]
        codes = [saturated(p / _power(scale(m)), flavour).view(np.uint8).astype(U32) for p in pair]
        _store_half(m, to, codes[0] | codes[1] << U32(8), upper)

    return step


def bind_dot2(i: Instruction) -> Step:
    """v_dot2_f32_{f16,bf16} and v_dot2c: sum of two products and a float32 addend."""
    narrow = BF16 if "bf16" in i.opcode else F16
    a, b = raw_reader(i.operands[1], i), raw_reader(i.operands[2], i)
    c = raw_reader(i.operands[3 if len(i.operands) > 3 else 0], i)
    to = i.operands[0]

    def step(m):
        halves = [
            [(np.array(r(m)) >> U32(16 * k)).astype(np.uint16).view(narrow).astype(F64) for k in (0, 1)] for r in (a, b)
        ]
        total = halves[0][0] * halves[1][0] + halves[0][1] * halves[1][1] + np.asarray(c(m)).view(F32)
        m.set_vector(to, total.astype(F32).view(U32))

    return step


PACKED16: dict[str, tuple[str, Callable[..., Any]]] = {
    "v_pk_add_f16": ("hh", lambda a, b: a + b),
    "v_pk_mul_f16": ("hh", lambda a, b: a * b),
    "v_pk_fma_f16": ("hhh", fma),
    "v_pk_max_f16": ("hh", max_ieee),
    "v_pk_min_f16": ("hh", min_ieee),
    "v_pk_add_u16": ("ww", lambda a, b: a + b),
    "v_pk_sub_u16": ("ww", lambda a, b: a - b),
    "v_pk_add_i16": ("ss", lambda a, b: a + b),
    "v_pk_sub_i16": ("ss", lambda a, b: a - b),
    "v_pk_mul_lo_u16": ("ww", lambda a, b: a * b),
    "v_pk_mad_u16": ("www", lambda a, b, c: a * b + c),
    "v_pk_lshlrev_b16": ("ww", lambda a, b: b << (a & np.uint16(15))),
    "v_pk_lshrrev_b16": ("ww", lambda a, b: b >> (a & np.uint16(15))),
    "v_pk_ashrrev_i16": ("ws", lambda a, b: b >> (a & np.uint16(15)).astype(np.int16)),
    "v_pk_max_u16": ("ww", np.maximum),
    "v_pk_min_u16": ("ww", np.minimum),
    "v_pk_max_i16": ("ss", np.maximum),
    "v_pk_min_i16": ("ss", np.minimum),
}
