"""Binds instructions that move values between lanes: readlane, permutations through the LDS crossbar, swaps."""

from __future__ import annotations

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction
from pallas_kernels.cdna.interpreter.machine import LANE, LANES, Waves


def _first_lane(m: Waves) -> np.ndarray:
    """Lowest active lane of each wave; 0 if no lane is active."""
    return np.argmax(m.lanes, axis=1)


def _bind_read_first(i: Instruction):
    to, of = i.operands
    if of.kind == "s":
        return lambda m: m.set_scalar(to, m.scalar(of.index))
    return lambda m: m.set_scalar(to, m.vector(of)[np.arange(m.count), _first_lane(m)])


def _scalar_or_constant(i: Instruction, number: int):
    operand = i.operands[number]
    if operand.kind == "int":
        value = np.uint32(int(operand.value) & 0xFFFFFFFF)
        return lambda m: value
    if operand.kind == "s":
        return lambda m: m.scalar(operand.index)
    raise i.error(f"`{operand.text}` must be a scalar register or a constant")


def _bind_read_lane(i: Instruction):
    to, of = i.operands[:2]
    lane = _scalar_or_constant(i, 2)
    return lambda m: m.set_scalar(to, m.vector(of)[np.arange(m.count), lane(m) & np.uint32(63)])


def _bind_write_lane(i: Instruction):
    to = i.operands[0]
    value, lane = _scalar_or_constant(i, 1), _scalar_or_constant(i, 2)

    def step(m):
        register = m.vector(to).copy()
        register[np.arange(m.count), lane(m) & np.uint32(63)] = value(m)
        m.set_vector(to, register, everywhere=True)

    return step


def _bind_count_below(i: Instruction):
    """v_mbcnt: counts the mask bits below this lane in one half of the wave, and adds a base."""
    from pallas_kernels.cdna.interpreter.operands import raw_reader

    mask, base = raw_reader(i.operands[1], i), raw_reader(i.operands[2], i)
    width = np.clip(LANE - (32 if "_hi_" in i.opcode else 0), 0, 32).astype(np.uint64)
    below = ((np.uint64(1) << width) - np.uint64(1)).astype(np.uint32)
    to = i.operands[0]
    return lambda m: m.set_vector(to, np.bitwise_count(mask(m) & below).astype(np.uint32) + base(m))


def _bind_permute(i: Instruction):
    """ds_bpermute reads from lane address / 4; ds_permute writes to that lane, and the highest sender wins."""
    to, address, data = i.operands
    offset = np.uint32(i.int_modifier("offset"))
    pull = i.opcode == "ds_bpermute_b32"

    def step(m):
        rows = np.arange(m.count)[:, None]
        lane = ((m.vector(address) + offset) >> np.uint32(2)) & np.uint32(63)
        values = m.vector(data)
        if pull:
            m.set_vector(to, np.where(m.lanes[rows, lane], values[rows, lane], np.uint32(0)))
        else:
            out = np.zeros((m.count, LANES), np.uint32)
            wave, source = np.nonzero(m.lanes)
            out[wave, lane[wave, source]] = values[wave, source]
            m.set_vector(to, out)

    return step


def swizzle_lanes(i: Instruction) -> np.ndarray:
    """Source lanes [64] of ds_swizzle_b32."""
    text = str(i.modifiers.get("offset", ""))
    if not text.startswith("swizzle("):
        return _swizzle_number(i, int(text, 0))
    name, *parts = [p.strip() for p in text[8:-1].split(",")]
    if name == "SWAP":
        return LANE ^ int(parts[0])
    if name == "REVERSE":
        return LANE ^ (int(parts[0]) - 1)
    if name == "BROADCAST":
        return (LANE & ~(int(parts[0]) - 1)) + int(parts[1])
    if name == "QUAD_PERM":
        return (LANE & ~3) + np.array([int(p) for p in parts])[LANE & 3]
    if name == "BITMASK_PERM":
        bits = list(enumerate(reversed(parts[0].strip('"'))))
        keep = sum(1 << b for b, c in bits if c in "pi")
        return _masked(keep, sum(1 << b for b, c in bits if c == "1"), sum(1 << b for b, c in bits if c == "i"))
    raise i.error(f"unknown swizzle {name}")


def _masked(keep: int, ones: int, flip: int) -> np.ndarray:
    return (LANE & 32) | ((LANE & keep | ones) ^ flip)


def _swizzle_number(i: Instruction, offset: int) -> np.ndarray:
    if offset >= 0xC000:
        raise i.error("rotate and FFT swizzles are not implemented")
    if offset & 0x8000:
        return (LANE & ~3) + np.array([offset >> 2 * k & 3 for k in range(4)])[LANE & 3]
    return _masked(offset & 31, offset >> 5 & 31, offset >> 10 & 31)


def _bind_swizzle(i: Instruction):
    lane = swizzle_lanes(i)
    to, data = i.operands
    return lambda m: m.set_vector(to, np.where(m.lanes[:, lane], m.vector(data)[:, lane], np.uint32(0)))


def _bind_permlane_swap(i: Instruction):
    """v_permlane{16,32}_swap: swaps the odd rows (halves) of the first register with the even ones of the second."""
    half = 32 if "permlane32" in i.opcode else 16
    odd = (LANE & half) != 0
    other = LANE ^ half
    first, second = i.operands

    def step(m):
        a, b = m.vector(first).copy(), m.vector(second).copy()
        m.set_vector(first, np.where(odd, b[:, other], a))
        m.set_vector(second, np.where(odd, b, a[:, other]))

    return step


# Opcode -> (meaning, binder).
TABLE = {
    "v_readfirstlane_b32": ("D = S[first active lane]", _bind_read_first),
    "v_readlane_b32": ("D = S0[lane S1]", _bind_read_lane),
    "v_writelane_b32": ("D[lane S1] = S0, whatever EXEC says", _bind_write_lane),
    "v_mbcnt_lo_u32_b32": ("D = popcount(S0 & lanes below, lower half) + S1", _bind_count_below),
    "v_mbcnt_hi_u32_b32": ("D = popcount(S0 & lanes below, upper half) + S1", _bind_count_below),
    "v_permlane16_swap_b32": ("swap odd rows of D0 with even rows of D1", _bind_permlane_swap),
    "v_permlane32_swap_b32": ("swap the upper half of D0 with the lower half of D1", _bind_permlane_swap),
    "ds_bpermute_b32": ("D = S1[lane S0 / 4], 0 from inactive lanes", _bind_permute),
    "ds_permute_b32": ("D[lane S0 / 4] = S1", _bind_permute),
    "ds_swizzle_b32": ("D = S[pattern of the lane], 0 from inactive lanes", _bind_swizzle),
}
