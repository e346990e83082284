"""Runs a few lines of CDNA assembly on registers that a test fills, and random and special inputs for them."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np

from pallas_kernels.cdna.interpreter import control_flow
from pallas_kernels.cdna.interpreter.assembly import VCC, parse
from pallas_kernels.cdna.interpreter.machine import Memory, Waves, masks_of

LANES = 64
UNTOUCHED = 0xC0FFEE11
DTYPES = {
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


def kernel(lines, arch):
    """A kernel of these lines, parsed."""
    return parse(f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\nkernel:\n{lines}\ns_endpgm\n')


def words_of(values):
    """Values [n] -> registers uint32 [k, n / 64, 64]: two for 64 bits; above 16 bits stands rubbish."""
    values = np.ascontiguousarray(values)
    if values.dtype.itemsize == 8:
        pair = values.view(np.uint64)
        words = np.stack([(pair & np.uint64(0xFFFFFFFF)).astype(np.uint32), (pair >> np.uint64(32)).astype(np.uint32)])
    elif values.dtype.itemsize == 2:
        words = (values.view(np.uint16).astype(np.uint32) | np.uint32(0xABCD0000))[None]
    else:
        words = values.view(np.uint32)[None]
    return words.reshape(len(words), -1, LANES)


def execute(lines, arch="gfx942", *, v=None, a=None, s=None, masks=None, active=None, waves=None):
    """Executes lines on waves whose registers hold the given values; everything else holds UNTOUCHED.

    Args:
      lines: assembly text.
      arch: target.
      v, a: first register -> values [waves * 64] of lanes.
      s: scalar register -> a number for all waves.
      masks: scalar register (or VCC) -> bool [waves * 64].
      active: bool [waves * 64] of EXEC; all when None.
      waves: indices of the waves that execute; all when None.

    Returns:
      The waves afterwards.
    """
    files = [{k: words_of(x) for k, x in (file or {}).items()} for file in (v, a)]
    count = next(words.shape[1] for file in files for words in file.values())
    machine = Waves(count, (64, 64), Memory([]), arch)
    machine.V[:], machine.A[:], machine.S[:] = UNTOUCHED, UNTOUCHED, UNTOUCHED
    for file, register in zip(files, (machine.V, machine.A)):
        for first, words in file.items():
            register[first : first + len(words)] = words
    for index, value in (s or {}).items():
        machine.S[index] = value
    for index, mask in (masks or {}).items():
        bits = masks_of(np.reshape(mask, (-1, LANES)))
        machine.S[index], machine.S[index + 1] = bits & np.uint64(0xFFFFFFFF), bits >> np.uint64(32)
    if active is not None:
        machine.exec[:] = masks_of(np.reshape(active, (-1, LANES)))
    machine.select(slice(None) if waves is None else np.asarray(waves))
    parsed = kernel(lines, arch)
    with np.errstate(all="ignore"):
        for instruction in parsed.instructions[:-1]:
            step = control_flow.bind(instruction, arch)
            if step is not None:
                step(machine)
    return machine


def lanes(machine, register, dtype=np.uint32, file="v"):
    """The values [waves * 64] that lanes hold from a register on; the low half for 16-bit types."""
    registers = machine.V if file == "v" else machine.A
    low = registers[register].reshape(-1)
    if np.dtype(dtype).itemsize == 8:
        high = registers[register + 1].reshape(-1)
        return (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)).view(dtype)
    return (low & np.uint32(0xFFFF)).astype(np.uint16).view(dtype) if np.dtype(dtype).itemsize == 2 else low.view(dtype)


def mask(machine, register=VCC):
    """The bits [waves * 64] of a pair of scalar registers."""
    pair = machine.S[register].astype(np.uint64) | machine.S[register + 1].astype(np.uint64) << np.uint64(32)
    return ((pair[:, None] >> np.arange(LANES, dtype=np.uint64)) & np.uint64(1)).astype(bool).reshape(-1)


def nearest(exact: Fraction, dtype):
    """A rational number rounded to the nearest number of a float type, ties to even."""
    info = ml_dtypes.finfo(dtype)
    fraction = info.nmant + 1
    if exact == 0:
        return dtype(0)
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, int(info.minexp)) - fraction + 1)
    rounded = round(size / unit) * unit  # round() of a Fraction goes to even
    value = float("inf") if rounded > Fraction(float(info.max)) else float(rounded)
    return dtype(-value if exact < 0 else value)


# --- inputs ----------------------------------------------------------------------------------------------------------
def special_integers(bits):
    """Limits of small and large fields, and their neighbours."""
    top = 1 << bits
    edges = [0, 1, 2, 3, 7, 15, 16, 31, 32, 33, 63, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000]
    edges += [0x7F_FFFF, 0x80_0000, 0xFF_FFFF, 0x100_0000, top // 2 - 1, top // 2, top // 2 + 1, top - 2, top - 1]
    return sorted({e % top for e in edges})


def special_floats(dtype):
    """Zeros, subnormals, limits, halves (ties of rounding), infinities and a quiet NaN."""
    info = ml_dtypes.finfo(dtype)
    tiny, least, most, step = (float(x) for x in (info.smallest_normal, info.smallest_subnormal, info.max, info.eps))
    sizes = [0.0, least, tiny - least, tiny, 1 - step / 2, 1, 1 + step, 0.5, 1.5, 2.5, 3, most, most / 2, np.inf]
    return np.array([sign * x for x in sizes for sign in (1, -1)] + [np.nan], dtype)


def inputs(types, count=2048, seed=0):
    """One array [count] per type letter: all pairs of special values that fit, then random bits and numbers."""
    rng = np.random.default_rng([seed, *map(ord, types)])
    out = []
    for letter in types:
        dtype = np.dtype(DTYPES[letter])
        raw = rng.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
        if letter in "fhbd":
            special = special_floats(dtype.type)
            # Numbers of everyday size beside random bits, whose exponents are mostly extreme.
            raw = np.where(rng.random(count) < 0.5, rng.normal(0, 4, count).astype(dtype), raw)
            # Signalling NaNs are left out: what happens to them depends on the IEEE bit of the mode register.
            raw = np.where(np.isnan(raw), dtype.type(2), raw)
        else:
            special = np.array(special_integers(8 * dtype.itemsize), np.dtype(f"u{dtype.itemsize}")).view(dtype)
            small = rng.integers(0, 64, count).astype(dtype)
            raw = np.where(rng.random(count) < 0.25, small, raw)
        out.append([special, raw])
    for place, (special, raw) in enumerate(out):
        if len(types) <= 2:
            other = len(out[1 - place][0]) if len(types) == 2 else 1
            grid = np.tile(special, other) if place else np.repeat(special, other)
        else:
            grid = rng.choice(special, count // 2)
        grid = grid[: count * 3 // 4]
        raw[: len(grid)] = grid
    return [raw for _, raw in out]
