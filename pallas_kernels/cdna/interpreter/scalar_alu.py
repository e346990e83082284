"""Scalar arithmetic, one value per wave: a table from opcode to types, meaning and the new value of SCC."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import Waves
from pallas_kernels.cdna.interpreter.operands import Step, constant, scalar_registers
from pallas_kernels.cdna.interpreter.vector_arithmetic import (
    bits_extracted,
    leading_zeros,
    low32,
    product,
    reverse_bits,
    trailing_zeros,
)

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
_DTYPES: dict[str, Any] = {"u": U32, "i": I32, "U": U64, "I": I64}


def read(operand: Operand, i: Instruction, letter: str) -> Callable[[Waves], np.ndarray]:
    """Reads a scalar operand as u, i (32-bit), U or I (64-bit), see `operands`: [w], or [] for a constant."""
    if operand.kind in ("int", "float"):
        # A 64-bit operand encodes a float constant as float64.
        value = constant(operand, letter if operand.kind == "int" else "d" if letter in "UI" else "f")
        value = value.view(_DTYPES[letter]) if value.dtype != _DTYPES[letter] else value
        return lambda m: value
    if operand.kind != "s":
        raise i.error(f"`{operand.text}` can not be read by a scalar instruction")
    if letter in "UI":
        index = scalar_registers(operand, i, 2)
        return lambda m: np.ascontiguousarray(m.scalar64(index)).view(_DTYPES[letter])
    return lambda m: np.ascontiguousarray(m.scalar(operand.index)).view(_DTYPES[letter])


def _write(m: Waves, operand: Operand, value: Any, wide: bool) -> None:
    value = np.broadcast_to(np.asarray(value), (m.count,))
    if wide:
        m.set_scalar64(operand, np.ascontiguousarray(value).view(U64))
    else:
        m.set_scalar(operand, np.ascontiguousarray(value).view(U32))


def _carry(wide):
    return lambda a, b: (wide(a.astype(I64), b.astype(I64)) < 0) | (wide(a.astype(I64), b.astype(I64)) > 0xFFFFFFFF)


def _overflow(wide):
    return lambda a, b: np.abs(2 * wide(a.astype(I64), b.astype(I64)) + 1) > 2**32


def _s5(b):
    return b & U32(31)


def _s6(b):
    return (b & U32(63)).astype(U64)


# Opcode -> (types of the sources, type of the result, meaning, SCC). SCC is a function of the sources, "nonzero" (set
# if the result is not 0) or None (unchanged). Type "d" is the old destination.
TABLE: dict[str, tuple[str, str, Callable[..., Any], Any]] = {
    "s_mov_b32": ("u", "u", lambda a: a, None),
    "s_mov_b64": ("U", "U", lambda a: a, None),
    "s_not_b32": ("u", "u", lambda a: ~a, "nonzero"),
    "s_not_b64": ("U", "U", lambda a: ~a, "nonzero"),
    "s_abs_i32": ("i", "i", np.abs, "nonzero"),
    "s_brev_b32": ("u", "u", reverse_bits, None),
    "s_sext_i32_i8": ("u", "i", lambda a: (a << U32(24)).view(I32) >> I32(24), None),
    "s_sext_i32_i16": ("u", "i", lambda a: (a << U32(16)).view(I32) >> I32(16), None),
    "s_ff1_i32_b32": ("u", "u", trailing_zeros, None),
    "s_flbit_i32_b32": ("u", "u", leading_zeros, None),
    "s_bcnt1_i32_b32": ("u", "u", lambda a: np.bitwise_count(a).astype(U32), "nonzero"),
    "s_bcnt1_i32_b64": ("U", "u", lambda a: np.bitwise_count(a).astype(U32), "nonzero"),
    "s_add_u32": ("uu", "u", lambda a, b: a + b, _carry(lambda a, b: a + b)),
    "s_sub_u32": ("uu", "u", lambda a, b: a - b, _carry(lambda a, b: a - b)),
    "s_add_i32": ("ii", "i", lambda a, b: a + b, _overflow(lambda a, b: a + b)),
    "s_sub_i32": ("ii", "i", lambda a, b: a - b, _overflow(lambda a, b: a - b)),
    "s_mul_i32": ("uu", "u", lambda a, b: a * b, None),
    "s_mul_hi_u32": ("uu", "u", lambda a, b: (product(a, b) >> U64(32)).astype(U32), None),
    "s_mul_hi_i32": ("ii", "u", lambda a, b: low32(product(a, b) >> I64(32)), None),
    "s_min_i32": ("ii", "i", np.minimum, lambda a, b: a < b),
    "s_max_i32": ("ii", "i", np.maximum, lambda a, b: a >= b),
    "s_min_u32": ("uu", "u", np.minimum, lambda a, b: a < b),
    "s_max_u32": ("uu", "u", np.maximum, lambda a, b: a >= b),
    "s_lshl1_add_u32": ("uu", "u", lambda a, b: (a << U32(1)) + b, _carry(lambda a, b: a * 2 + b)),
    "s_lshl2_add_u32": ("uu", "u", lambda a, b: (a << U32(2)) + b, _carry(lambda a, b: a * 4 + b)),
    "s_lshl3_add_u32": ("uu", "u", lambda a, b: (a << U32(3)) + b, _carry(lambda a, b: a * 8 + b)),
    "s_lshl4_add_u32": ("uu", "u", lambda a, b: (a << U32(4)) + b, _carry(lambda a, b: a * 16 + b)),
    "s_lshl_b32": ("uu", "u", lambda a, b: a << _s5(b), "nonzero"),
    "s_lshr_b32": ("uu", "u", lambda a, b: a >> _s5(b), "nonzero"),
    "s_ashr_i32": ("iu", "i", lambda a, b: a >> _s5(b).astype(I32), "nonzero"),
    "s_lshl_b64": ("Uu", "U", lambda a, b: a << _s6(b), "nonzero"),
    "s_lshr_b64": ("Uu", "U", lambda a, b: a >> _s6(b), "nonzero"),
    "s_ashr_i64": ("Iu", "I", lambda a, b: a >> _s6(b).astype(I64), "nonzero"),
    "s_bfe_u32": ("uu", "u", lambda a, b: _field(a, b, False), "nonzero"),
    "s_bfe_i32": ("iu", "u", lambda a, b: _field(a, b, True), "nonzero"),
    "s_bfm_b32": ("uu", "u", lambda a, b: ((U32(1) << _s5(a)) - U32(1)) << _s5(b), None),
    "s_bfm_b64": ("uu", "U", lambda a, b: ((U64(1) << _s6(a)) - U64(1)) << _s6(b), None),
    "s_pack_ll_b32_b16": ("uu", "u", lambda a, b: a & U32(0xFFFF) | b << U32(16), None),
    "s_pack_lh_b32_b16": ("uu", "u", lambda a, b: a & U32(0xFFFF) | b & U32(0xFFFF0000), None),
    "s_pack_hh_b32_b16": ("uu", "u", lambda a, b: a >> U32(16) | b & U32(0xFFFF0000), None),
    "s_bitset0_b32": ("ud", "u", lambda a, d: d & ~(U32(1) << _s5(a)), None),
    "s_bitset1_b32": ("ud", "u", lambda a, d: d | (U32(1) << _s5(a)), None),
}
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
for _name, _meaning in _LOGIC.items():
    TABLE[f"s_{_name}_b32"] = ("uu", "u", _meaning, "nonzero")
    TABLE[f"s_{_name}_b64"] = ("UU", "U", _meaning, "nonzero")


def _field(value, control, signed: bool):
    """s_bfe: the control word holds the offset in its low bits and the width from bit 16 on."""
    return bits_extracted(value, control & U32(31), control >> U32(16) & U32(127), signed)


_COMPARE = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


def _bind_table(i: Instruction) -> Step:
    types, result, meaning, condition = TABLE[i.opcode]
    to = i.operands[0]
    reads = [read(to, i, "u") if t == "d" else read(i.operands[k], i, t) for k, t in enumerate(types, 1)]
    wide = result in "UI"

    def step(m):
        values = [r(m) for r in reads]
        out = meaning(*values)
        if condition == "nonzero":
            m.scc[m.sel] = out != 0
        elif condition is not None:
            m.scc[m.sel] = condition(*values)
        _write(m, to, out, wide)

    return step


def _bind_with_carry(i: Instruction) -> Step:
    """s_addc_u32 and s_subb_u32."""
    to, a, b = i.operands[0], read(i.operands[1], i, "u"), read(i.operands[2], i, "u")
    sign = 1 if "addc" in i.opcode else -1

    def step(m):
        total = a(m).astype(I64) + sign * (b(m).astype(I64) + m.scc[m.sel])
        m.scc[m.sel] = (total < 0) | (total > 0xFFFFFFFF)
        _write(m, to, low32(total), False)

    return step


def _bind_select(i: Instruction) -> Step:
    """s_cselect: the first source if SCC is set, else the second."""
    letter = "U" if i.opcode.endswith("b64") else "u"
    to, a, b = i.operands[0], read(i.operands[1], i, letter), read(i.operands[2], i, letter)
    return lambda m: _write(m, to, np.where(m.scc[m.sel], a(m), b(m)), letter == "U")


def _bind_move_if(i: Instruction) -> Step:
    """s_cmov: moves only if SCC is set."""
    letter = "U" if i.opcode.endswith("b64") else "u"
    to, a, old = i.operands[0], read(i.operands[1], i, letter), read(i.operands[0], i, letter)
    return lambda m: _write(m, to, np.where(m.scc[m.sel], a(m), old(m)), letter == "U")


def _bind_compare(i: Instruction) -> Step:
    name, kind = i.opcode.split("_")[-2:]
    short = i.opcode.startswith("s_cmpk_")
    letter = {"i32": "i", "u32": "u", "u64": "U"}[kind]
    a, meaning = read(i.operands[0], i, letter), _COMPARE[name]
    b = _short_constant(i, 1, signed=kind == "i32") if short else read(i.operands[1], i, letter)

    def step(m):
        m.scc[m.sel] = meaning(a(m), b(m))

    return step


def _bind_test_bit(i: Instruction) -> Step:
    """s_bitcmp0_b32, s_bitcmp1_b32: SCC = bit S1 of S0 is 0 (1)."""
    a, b = read(i.operands[0], i, "u"), read(i.operands[1], i, "u")
    wanted = U32(int(i.opcode[len("s_bitcmp")]))

    def step(m):
        m.scc[m.sel] = (a(m) >> _s5(b(m))) & U32(1) == wanted

    return step


def _short_constant(i: Instruction, number: int, signed: bool = True):
    """Reads a 16-bit constant, sign-extended if `signed`, else zero-extended."""
    raw = int(i.operands[number].value) & 0xFFFF
    value = np.array(raw - 65536 if signed and raw & 0x8000 else raw, I32 if signed else U32)
    return lambda m: value


def _bind_short(i: Instruction) -> Step:
    """s_movk, s_addk, s_mulk: combines the destination with a 16-bit constant."""
    to, value, old = i.operands[0], _short_constant(i, 1), read(i.operands[0], i, "i")
    if i.opcode == "s_movk_i32":
        return lambda m: _write(m, to, value(m), False)
    if i.opcode == "s_mulk_i32":
        return lambda m: _write(m, to, old(m) * value(m), False)

    def add(m):
        before = old(m)
        m.scc[m.sel] = _overflow(lambda a, b: a + b)(before, value(m))
        _write(m, to, before + value(m), False)

    return add


def _bind_save_exec(i: Instruction) -> Step:
    """s_<op>_saveexec_b64: D = EXEC, EXEC = S op EXEC, SCC = EXEC is not zero."""
    to, source = i.operands[0], read(i.operands[1], i, "U")
    name = i.opcode[2 : -len("_saveexec_b64")]
    swapped = name.endswith("n1")
    meaning = _LOGIC[name.replace("n1", "n2")]

    def step(m):
        value, before = np.broadcast_to(source(m), (m.count,)).copy(), m.exec[m.sel].copy()
        after = meaning(before, value) if swapped else meaning(value, before)
        m.set_scalar64(to, before)
        m.set_exec(after)
        m.scc[m.sel] = after != 0

    return step


# Pattern of opcodes -> (meaning, binder).
SPECIAL: dict[str, tuple[str, Callable[[Instruction], Step]]] = {
    r"s_(addc|subb)_u32": ("D = S0 + S1 + SCC, S0 - S1 - SCC", _bind_with_carry),
    r"s_cselect_b(32|64)": ("D = SCC ? S0 : S1", _bind_select),
    r"s_cmov_b(32|64)": ("D = S0 where SCC", _bind_move_if),
    r"s_cmpk?_(eq|lg|gt|ge|lt|le)_(i32|u32|u64)": ("SCC = comparison", _bind_compare),
    r"s_bitcmp[01]_b32": ("SCC = bit of S0", _bind_test_bit),
    r"s_(mov|add|mul)k_i32": ("16-bit constants", _bind_short),
    r"s_(and|or|xor|nand|nor|xnor|andn[12]|orn[12])_saveexec_b64": ("EXEC = S op EXEC", _bind_save_exec),
}


def bind(i: Instruction) -> Step | None:
    """Binds a scalar instruction; returns None for an opcode that neither TABLE nor SPECIAL has."""
    if i.opcode in TABLE:
        return _bind_table(i)
    for pattern, (_, binder) in SPECIAL.items():
        if re.fullmatch(pattern, i.opcode):
            return binder(i)
    return None
