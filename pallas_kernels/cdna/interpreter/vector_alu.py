"""Vector arithmetic: one table from opcode to types and meaning, and the few instructions that need more than that."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.cdna.interpreter.assembly import VCC, Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import LANES, Waves, lanes_of, masks_of
from pallas_kernels.cdna.interpreter.operands import TYPES, Step, raw_reader, reader, writer

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
F16, F32, F64, BF16 = np.float16, np.float32, np.float64, ml_dtypes.bfloat16
# The FP8 and BF8 flavours of each machine's instructions.
FP8 = {
    "gfx942": (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz),
    "gfx950": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
}


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def fma(a, b, c):
    """a * b + c rounded once."""
    return _fma64(a, b, c) if a.dtype == F64 else fma_to_odd(a, b, c).astype(a.dtype)


def fma_to_odd(a, b, c):
    """a * b + c of float32 or narrower as float64, such that rounding it to less than 52 bits rounds the exact sum."""
    # float64 holds a product of two float32 exactly, and its sum well enough to tell.
    exact, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = exact + addend
    # Round the float64 sum to odd, so that the second rounding can not land on a tie that was none.
    back = total - exact
    error = (exact - (total - back)) + (addend - back)
    bits = total.view(I64) if total.ndim else np.array(total).view(I64)
    nudge = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & (total != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + nudge, bits).view(F64)


@np.vectorize(otypes=[F64])
def _fma64(a, b, c):
    """The same for float64, in rational numbers: slow, and rare."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    try:
        return float(exact) if exact else a * b + c
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def low24(a):
    """Low 24 bits, unsigned."""
    return a & U32(0xFFFFFF)


def signed24(a):
    """Low 24 bits with sign, int64."""
    return (a << U32(8)).view(I32).astype(I64) >> 8


def low32(a):
    """The low half of 64-bit integers."""
    return (np.asarray(a).astype(I64) & 0xFFFFFFFF).astype(U32)


def product(a, b):
    """64-bit product of 32-bit integers, of their signedness."""
    wide = I64 if a.dtype == I32 else U64
    return a.astype(wide) * b.astype(wide)


def median(a, b, c):
    """The middle one of three."""
    return np.maximum(np.minimum(np.maximum(a, b), c), np.minimum(a, b))


def float_median(a, b, c):
    """The middle one of three; the smallest number when one is NaN."""
    middle = np.fmax(np.fmin(np.fmax(a, b), c), np.fmin(a, b))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.fmin(np.fmin(a, b), c), middle)


def bits_extracted(value, offset, width, signed: bool):
    """v_bfe: `width` bits from bit `offset` on, 0 for width 0."""
    offset, width = (np.asarray(x).astype(U64) & U64(31) for x in (offset, width))
    field = (np.asarray(value).astype(I64) if signed else np.asarray(value).astype(U64)) >> offset.astype(
        I64 if signed else U64
    )
    field = field.astype(I64) & ((I64(1) << width.astype(I64)) - 1)
    if signed:
        sign = np.where(width > 0, I64(1) << np.maximum(width.astype(I64) - 1, 0), 0)
        field = (field ^ sign) - sign
    return low32(field)


def byte_permuted(a, b, selector):
    """v_perm: four bytes out of {a, b}; codes 8 to 11 give signs, 12 zero, above 12 ones."""
    both = a.astype(U64) << U64(32) | b.astype(U64)
    shape = np.broadcast_shapes(a.shape, b.shape, selector.shape)
    out = np.zeros(shape, U32)
    for place in range(4):
        code = (selector >> U32(8 * place)) & U32(0xFF)
        if code.ndim == 0 or (code.size and (code == code.flat[0]).all()):
            byte = _one_byte(both, int(code.flat[0] if code.ndim else code))
        else:
            byte = np.zeros(shape, U64)
            for c in np.unique(code):
                byte = np.where(code == c, _one_byte(both, int(c)), byte)
        out |= byte.astype(U32) << U32(8 * place)
    return out


def _one_byte(both, code: int):
    if code < 8:
        return both >> U64(8 * code) & U64(0xFF)
    if code < 12:
        return (both >> U64(16 * (code - 8) + 15) & U64(1)) * U64(0xFF)
    return np.zeros_like(both) + U64(0 if code == 12 else 0xFF)


def to_int(value, low: int, high: int, dtype):
    """Towards zero, saturating, NaN to 0."""
    whole = np.nan_to_num(np.trunc(value.astype(F64)), nan=0.0, posinf=high, neginf=low)
    return np.clip(whole, low, high).astype(I64).astype(dtype)


def toward_zero_f16(a):
    """float32 to float16, rounded toward zero."""
    near = a.astype(F16)
    return np.where(np.abs(near.astype(F32)) > np.abs(a), np.nextafter(near, F16(0)), near)


def packed(low, high):
    """Two 16-bit values in one uint32, broadcast."""
    half = [np.asarray(x).view(np.uint16).astype(U32) for x in (low, high)]
    return half[0] | half[1] << U32(16)


def exponent_of_two(a):
    """v_exp: 2 ** a; results below the normal range are zero, as on the hardware."""
    return np.where(a < F32(-126), F32(0), np.exp2(a.astype(F64)).astype(F32))


def normal(a):
    """float32 with subnormals as zeros: v_rcp, v_rsq, v_sqrt, v_exp and v_log know none, whatever the mode."""
    return np.where(np.abs(a) < F32(2**-126), a * F32(0), a)


def log_of_two(a):
    """v_log: base 2; subnormals count as zero, as on the hardware."""
    return np.log2(normal(a).astype(F64)).astype(F32)


def reciprocal(a):
    """v_rcp: subnormals count as zero, also as result."""
    return normal((1 / normal(a).astype(F64)).astype(F32))


def frexp(a):
    """(mantissa, exponent) with |mantissa| in [0.5, 1); exponent 0 for zero, infinity and NaN."""
    return np.frexp(a)


def reverse_bits(a):
    """Bit 31 to bit 0 and so on."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        a = (a >> U32(shift) & U32(mask)) | (a & U32(mask)) << U32(shift)
    return a


def leading_zeros(a):
    """Zeros before the first one, -1 for zero."""
    return np.where(a == 0, U32(0xFFFFFFFF), U32(31) - np.frexp(np.maximum(a, 1).astype(F64))[1].astype(U32) + U32(1))


def trailing_zeros(a):
    """Place of the lowest one, -1 for zero."""
    return np.where(a == 0, U32(0xFFFFFFFF), np.bitwise_count((a & (~a + U32(1))) - U32(1)).astype(U32))


def max_ieee(a, b):
    """The larger number; NaN only when both are, and +0 above -0."""
    return _ordered(a, b, np.fmax, above=True)


def min_ieee(a, b):
    """The smaller number; NaN only when both are, and -0 below +0."""
    return _ordered(a, b, np.fmin, above=False)


def _ordered(a, b, choose, above: bool):
    """Maximum (`above`) or minimum by `choose`, which takes either of two zeros; here +0 is above -0."""
    return np.where(a == b, np.where(np.signbit(a) == above, b, a), choose(a, b))


def maximum(a, b):
    """The larger number, NaN when one of them is, and +0 above -0."""
    return _ordered(a, b, np.maximum, above=True)


def minimum(a, b):
    """The smaller number, NaN when one of them is, and -0 below +0."""
    return _ordered(a, b, np.minimum, above=False)


# --- division: scale, refine, scale back, mend -----------------------------------------------------------------------
# The ISA document's pseudocode, except where it can not be meant: it scales back by 2**32 what was scaled by 2**64, a
# denominator above 2**126 up to infinity, and has no word on a quotient that overflowed to NaN. There the choice is the
# one with which the whole sequence gives the quotient that IEEE 754 asks for.
def exponent_field(a):
    """The biased exponent of float32, int32: 0 for zero and subnormals, 255 for infinity and NaN."""
    return (np.ascontiguousarray(a, F32).view(U32) >> U32(23) & U32(255)).astype(I32)


def divide_scale(value, denominator, numerator):
    """v_div_scale: (value, which is the denominator or the numerator, scaled; whether the quotient is off by 2**64).

    Scaled so that neither an operand nor the remainder nor the quotient of the refinement is subnormal.
    """
    n, d = exponent_field(numerator), exponent_field(denominator)
    size = np.abs(numerator.astype(F64) / denominator)
    # Also what is too small for a subnormal: v_div_fmas rounds it.
    small = (size > 0) & (size < 2.0**-126)
    large = n - d >= 96
    tiny_below, huge_below = d == 0, np.abs(denominator) > F32(2.0**126)
    bottom, top = value == denominator, value == numerator
    power = np.select(
        [large, tiny_below, huge_below & small, huge_below, small, n <= 23],
        [np.where(bottom, 64, 0), 64, np.where(bottom, -64, 0), -64, np.where(top, 64, 0), 64],
        0,
    )
    undefined = (denominator == 0) | (numerator == 0)
    flag = ~undefined & (large | small)
    return np.where(undefined, F32(np.nan), np.ldexp(value, power)), flag


def divide_fma(a, b, c, flag):
    """v_div_fmas: a * b + c, times 2**64 for a large quotient `c` or 2**-64 for a small one if `flag`; rounded once."""
    power = np.where(flag, np.where(exponent_field(c) > 127, F64(2.0**64), F64(2.0**-64)), F64(1))
    return (fma_to_odd(a, b, c) * power).astype(F32)


def divide_fixup(quotient, denominator, numerator):
    """v_div_fixup: the special cases of a quotient that was refined step by step; the sign is not the refinement's."""
    sign = np.where(np.signbit(denominator) != np.signbit(numerator), F32(-1), F32(1))
    infinite, zero = sign * F32(np.inf), sign * F32(0)
    # Of finite operands the refinement makes NaN only by way of an infinity: the quotient is too large.
    out = np.where(np.isnan(quotient), infinite, np.copysign(np.abs(quotient), sign))
    out = np.where(exponent_field(numerator) - exponent_field(denominator) < -150, zero, out)
    out = np.where((denominator == 0) | np.isinf(numerator), infinite, out)
    out = np.where((numerator == 0) | np.isinf(denominator), zero, out)
    bad = (denominator == 0) & (numerator == 0) | np.isinf(denominator) & np.isinf(numerator)
    return np.where(bad | np.isnan(denominator) | np.isnan(numerator), F32(np.nan), out).astype(F32)


# --- conversion ------------------------------------------------------------------------------------------------------
def saturated(value, dtype):
    """To an FP8 type, clamped to its largest number; NaN stays NaN."""
    limit = float(ml_dtypes.finfo(dtype).max)
    value = np.asarray(value, F32)
    return np.where(np.isnan(value), value, np.clip(value, -limit, limit)).astype(dtype)


# --- the table -------------------------------------------------------------------------------------------------------
# Opcode -> (types of the sources, type of the result, meaning).
TABLE: dict[str, tuple[str, str, Callable[..., Any]]] = {
    # Moves and conversions.
    "v_mov_b32": ("u", "u", lambda a: a),
    "v_mov_b64": ("U", "U", lambda a: a),
    "v_accvgpr_read_b32": ("u", "u", lambda a: a),
    "v_accvgpr_write_b32": ("u", "u", lambda a: a),
    "v_accvgpr_mov_b32": ("u", "u", lambda a: a),
    "v_cvt_f32_i32": ("i", "f", lambda a: a.astype(F32)),
    "v_cvt_f32_u32": ("u", "f", lambda a: a.astype(F32)),
    "v_cvt_i32_f32": ("f", "i", lambda a: to_int(a, -(2**31), 2**31 - 1, I32)),
    "v_cvt_u32_f32": ("f", "u", lambda a: to_int(a, 0, 2**32 - 1, U32)),
    "v_cvt_f32_f16": ("h", "f", lambda a: a.astype(F32)),
    "v_cvt_f16_f32": ("f", "h", lambda a: a.astype(F16)),
    "v_cvt_f32_bf16": ("b", "f", lambda a: a.astype(F32)),
    "v_cvt_f32_f64": ("d", "f", lambda a: a.astype(F32)),
    "v_cvt_f64_f32": ("f", "d", lambda a: a.astype(F64)),
    "v_cvt_f64_i32": ("i", "d", lambda a: a.astype(F64)),
    "v_cvt_f64_u32": ("u", "d", lambda a: a.astype(F64)),
    "v_cvt_i32_f64": ("d", "i", lambda a: to_int(a, -(2**31), 2**31 - 1, I32)),
    "v_cvt_u32_f64": ("d", "u", lambda a: to_int(a, 0, 2**32 - 1, U32)),
    "v_cvt_f32_ubyte0": ("u", "f", lambda a: (a & U32(0xFF)).astype(F32)),
    "v_cvt_f32_ubyte1": ("u", "f", lambda a: (a >> U32(8) & U32(0xFF)).astype(F32)),
    "v_cvt_f32_ubyte2": ("u", "f", lambda a: (a >> U32(16) & U32(0xFF)).astype(F32)),
    "v_cvt_f32_ubyte3": ("u", "f", lambda a: (a >> U32(24)).astype(F32)),
    "v_cvt_pkrtz_f16_f32": ("ff", "u", lambda a, b: packed(toward_zero_f16(a), toward_zero_f16(b))),
    "v_cvt_pk_f16_f32": ("ff", "u", lambda a, b: packed(a.astype(F16), b.astype(F16))),
    "v_cvt_pk_bf16_f32": ("ff", "u", lambda a, b: packed(a.astype(BF16), b.astype(BF16))),
    "v_pack_b32_f16": ("hh", "u", packed),
    # 32-bit integers.
    "v_add_u32": ("uu", "u", lambda a, b: a + b),
    "v_add_i32": ("ii", "i", lambda a, b: a + b),
    "v_sub_u32": ("uu", "u", lambda a, b: a - b),
    "v_sub_i32": ("ii", "i", lambda a, b: a - b),
    "v_subrev_u32": ("uu", "u", lambda a, b: b - a),
    "v_add3_u32": ("uuu", "u", lambda a, b, c: a + b + c),
    "v_add_lshl_u32": ("uuu", "u", lambda a, b, c: (a + b) << (c & U32(31))),
    "v_lshl_add_u32": ("uuu", "u", lambda a, b, c: (a << (b & U32(31))) + c),
    "v_xad_u32": ("uuu", "u", lambda a, b, c: (a ^ b) + c),
    "v_mul_lo_u32": ("uu", "u", lambda a, b: a * b),
    "v_mul_hi_u32": ("uu", "u", lambda a, b: (product(a, b) >> U64(32)).astype(U32)),
    "v_mul_hi_i32": ("ii", "u", lambda a, b: low32(product(a, b) >> I64(32))),
    "v_mul_u32_u24": ("uu", "u", lambda a, b: low24(a) * low24(b)),
    "v_mul_i32_i24": ("uu", "u", lambda a, b: low32(signed24(a) * signed24(b))),
    "v_mul_hi_u32_u24": ("uu", "u", lambda a, b: (product(low24(a), low24(b)) >> U64(32)).astype(U32)),
    "v_mad_u32_u24": ("uuu", "u", lambda a, b, c: low24(a) * low24(b) + c),
    "v_mad_i32_i24": ("uuu", "u", lambda a, b, c: low32(signed24(a) * signed24(b)) + c),
    "v_max_i32": ("ii", "i", np.maximum),
    "v_min_i32": ("ii", "i", np.minimum),
    "v_max_u32": ("uu", "u", np.maximum),
    "v_min_u32": ("uu", "u", np.minimum),
    "v_max3_i32": ("iii", "i", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_i32": ("iii", "i", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_max3_u32": ("uuu", "u", lambda a, b, c: np.maximum(np.maximum(a, b), c)),
    "v_min3_u32": ("uuu", "u", lambda a, b, c: np.minimum(np.minimum(a, b), c)),
    "v_med3_i32": ("iii", "i", median),
    "v_med3_u32": ("uuu", "u", median),
    # Bits.
    "v_not_b32": ("u", "u", lambda a: ~a),
    "v_and_b32": ("uu", "u", lambda a, b: a & b),
    "v_or_b32": ("uu", "u", lambda a, b: a | b),
    "v_xor_b32": ("uu", "u", lambda a, b: a ^ b),
    "v_xnor_b32": ("uu", "u", lambda a, b: ~(a ^ b)),
    "v_and_or_b32": ("uuu", "u", lambda a, b, c: a & b | c),
    "v_or3_b32": ("uuu", "u", lambda a, b, c: a | b | c),
    "v_lshl_or_b32": ("uuu", "u", lambda a, b, c: a << (b & U32(31)) | c),
    "v_lshlrev_b32": ("uu", "u", lambda a, b: b << (a & U32(31))),
    "v_lshrrev_b32": ("uu", "u", lambda a, b: b >> (a & U32(31))),
    "v_ashrrev_i32": ("ui", "i", lambda a, b: b >> (a & U32(31)).astype(I32)),
    "v_lshlrev_b64": ("uU", "U", lambda a, b: b << (a & U32(63)).astype(U64)),
    "v_lshrrev_b64": ("uU", "U", lambda a, b: b >> (a & U32(63)).astype(U64)),
    "v_ashrrev_i64": ("uI", "I", lambda a, b: b >> (a & U32(63)).astype(I64)),
    "v_lshl_add_u64": ("UuU", "U", lambda a, b, c: (a << (b & U32(7)).astype(U64)) + c),
    "v_bfe_u32": ("uuu", "u", lambda a, b, c: bits_extracted(a, b, c, signed=False)),
    "v_bfe_i32": ("iuu", "u", lambda a, b, c: bits_extracted(a, b, c, signed=True)),
    "v_bfi_b32": ("uuu", "u", lambda a, b, c: a & b | ~a & c),
    "v_bfm_b32": ("uu", "u", lambda a, b: ((U32(1) << (a & U32(31))) - U32(1)) << (b & U32(31))),
    "v_bfrev_b32": ("u", "u", reverse_bits),
    "v_ffbh_u32": ("u", "u", leading_zeros),
    "v_ffbl_b32": ("u", "u", trailing_zeros),
    "v_bcnt_u32_b32": ("uu", "u", lambda a, b: np.bitwise_count(a).astype(U32) + b),
    "v_perm_b32": ("uuu", "u", byte_permuted),
    "v_alignbit_b32": (
        "uuu",
        "u",
        lambda a, b, c: ((a.astype(U64) << U64(32) | b.astype(U64)) >> (c & U32(31)).astype(U64)).astype(U32),
    ),
    "v_alignbyte_b32": (
        "uuu",
        "u",
        lambda a, b, c: ((a.astype(U64) << U64(32) | b.astype(U64)) >> ((c & U32(3)).astype(U64) * U64(8))).astype(U32),
    ),
    # 16-bit integers.
    "v_add_u16": ("ww", "w", lambda a, b: a + b),
    "v_sub_u16": ("ww", "w", lambda a, b: a - b),
    "v_subrev_u16": ("ww", "w", lambda a, b: b - a),
    "v_mul_lo_u16": ("ww", "w", lambda a, b: a * b),
    "v_mad_legacy_u16": ("www", "w", lambda a, b, c: a * b + c),
    "v_lshlrev_b16": ("ww", "w", lambda a, b: b << (a & np.uint16(15))),
    "v_lshrrev_b16": ("ww", "w", lambda a, b: b >> (a & np.uint16(15))),
    "v_ashrrev_i16": ("ws", "s", lambda a, b: b >> (a & np.uint16(15)).astype(np.int16)),
    "v_max_u16": ("ww", "w", np.maximum),
    "v_min_u16": ("ww", "w", np.minimum),
    "v_max_i16": ("ss", "s", np.maximum),
    "v_min_i16": ("ss", "s", np.minimum),
    # float32.
    "v_add_f32": ("ff", "f", lambda a, b: a + b),
    "v_sub_f32": ("ff", "f", lambda a, b: a - b),
    "v_subrev_f32": ("ff", "f", lambda a, b: b - a),
    "v_mul_f32": ("ff", "f", lambda a, b: a * b),
    "v_mul_legacy_f32": ("ff", "f", lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b)),
    "v_fma_f32": ("fff", "f", fma),
    "v_max_f32": ("ff", "f", max_ieee),
    "v_min_f32": ("ff", "f", min_ieee),
    "v_max3_f32": ("fff", "f", lambda a, b, c: max_ieee(max_ieee(a, b), c)),
    "v_min3_f32": ("fff", "f", lambda a, b, c: min_ieee(min_ieee(a, b), c)),
    "v_med3_f32": ("fff", "f", float_median),
    "v_maximum3_f32": ("fff", "f", lambda a, b, c: maximum(maximum(a, b), c)),
    "v_minimum3_f32": ("fff", "f", lambda a, b, c: minimum(minimum(a, b), c)),
    "v_rcp_f32": ("f", "f", reciprocal),
    "v_rcp_iflag_f32": ("f", "f", reciprocal),
    "v_rsq_f32": ("f", "f", lambda a: (1 / np.sqrt(normal(a).astype(F64))).astype(F32)),
    "v_sqrt_f32": ("f", "f", lambda a: np.sqrt(normal(a))),
    "v_exp_f32": ("f", "f", exponent_of_two),
    "v_log_f32": ("f", "f", log_of_two),
    "v_floor_f32": ("f", "f", np.floor),
    "v_ceil_f32": ("f", "f", np.ceil),
    "v_trunc_f32": ("f", "f", np.trunc),
    "v_rndne_f32": ("f", "f", np.rint),
    "v_fract_f32": ("f", "f", lambda a: np.minimum(a - np.floor(a), F32(1 - 2**-24))),
    "v_frexp_mant_f32": ("f", "f", lambda a: frexp(a)[0]),
    "v_frexp_exp_i32_f32": ("f", "i", lambda a: frexp(a)[1].astype(I32)),
    "v_ldexp_f32": ("fi", "f", lambda a, b: np.ldexp(a.astype(F64), np.clip(b, -400, 400)).astype(F32)),
    "v_div_fixup_f32": ("fff", "f", divide_fixup),
    # float16.
    "v_add_f16": ("hh", "h", lambda a, b: a + b),
    "v_sub_f16": ("hh", "h", lambda a, b: a - b),
    "v_mul_f16": ("hh", "h", lambda a, b: a * b),
    "v_fma_f16": ("hhh", "h", fma),
    "v_max_f16": ("hh", "h", max_ieee),
    "v_min_f16": ("hh", "h", min_ieee),
    # float64.
    "v_add_f64": ("dd", "d", lambda a, b: a + b),
    "v_mul_f64": ("dd", "d", lambda a, b: a * b),
    "v_fma_f64": ("ddd", "d", fma),
    "v_max_f64": ("dd", "d", max_ieee),
    "v_min_f64": ("dd", "d", min_ieee),
}

# Saturating forms of integer arithmetic (`clamp`): the same in 64 bits, cut to the range of the result.
_SATURATING = {
    "v_add_u32": lambda a, b: a.astype(I64) + b.astype(I64),
    "v_sub_u32": lambda a, b: a.astype(I64) - b.astype(I64),
    "v_add_i32": lambda a, b: a.astype(I64) + b.astype(I64),
    "v_sub_i32": lambda a, b: a.astype(I64) - b.astype(I64),
    "v_add_u16": lambda a, b: a.astype(I64) + b.astype(I64),
    "v_sub_u16": lambda a, b: a.astype(I64) - b.astype(I64),
}

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "f": lambda a, b: np.zeros(np.broadcast_shapes(a.shape, b.shape), bool),
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "lg": lambda a, b: (a < b) | (a > b),
    "ne": lambda a, b: a != b,
    "ge": lambda a, b: a >= b,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
    "tru": lambda a, b: np.ones(np.broadcast_shapes(a.shape, b.shape), bool),
}
_COMPARE = re.compile(r"v_cmp(x?)_(\w+)_([fiu])(16|32|64)")
_LETTER = {"f16": "h", "f32": "f", "f64": "d", "i16": "s", "i32": "i", "i64": "I", "u16": "w", "u32": "u", "u64": "U"}


# --- binding ---------------------------------------------------------------------------------------------------------
def bind_table(i: Instruction) -> Step:
    """An instruction of TABLE: read, compute, write."""
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
    if i.opcode not in _SATURATING:
        raise i.error("clamp of this integer instruction is not implemented")
    wide, dtype = _SATURATING[i.opcode], TYPES[result]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return lambda a, b: np.clip(wide(a, b), low, high).astype(dtype)


def write_lanes(m: Waves, operand: Operand, flags: Any) -> None:
    """A lane mask as scalar result: bits of inactive lanes are 0."""
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
    """v_cmp_class_f32: whether the value is of one of ten classes."""
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
    """v_cndmask: the second source where the mask bit is set."""
    mask = i.operands[3].index if len(i.operands) > 3 else VCC
    letter = "f" if any(o.negate or o.absolute for o in i.operands[1:3]) else "u"
    a, b, write = reader(i, 1, letter), reader(i, 2, letter), writer(i, letter)
    return lambda m: write(m, np.where(lanes_of(m.scalar64(mask)), b(m), a(m)))


def _bind_carry(i: Instruction) -> Step:
    """v_add_co, v_addc_co, v_sub_co, v_subb_co and the reversed ones: result and carry mask."""
    carry_out, carry_in = i.operands[1], i.operands[4].index if len(i.operands) > 4 else None
    a, b, write = reader(i, 2, "u", 0), reader(i, 3, "u", 1), writer(i, "u")
    subtract, reverse = "sub" in i.opcode, "rev" in i.opcode

    def step(m):
        x, y = a(m).astype(I64), b(m).astype(I64)
        x, y = (y, x) if reverse else (x, y)
        carry = lanes_of(m.scalar64(carry_in)).astype(I64) if carry_in is not None else I64(0)
        total = x - y - carry if subtract else x + y + carry
        total = np.broadcast_to(total, m.lanes.shape)
        # The carry of a lane that does not run is 0, so the mask is written before the registers are.
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
    """v_fmamk (S0 * K + S1) and v_fmaak (S0 * S1 + K): the operands stand in the order of the formula."""
    letter = _LETTER[i.opcode.rsplit("_", 1)[1]]
    a, b, c, write = (*(reader(i, k, letter) for k in (1, 2, 3)), writer(i, letter))
    return lambda m: write(m, fma(a(m), b(m), c(m)))


def _bind_wide_multiply(i: Instruction) -> Step:
    """v_mad_u64_u32 and v_mad_i64_i32: 32 x 32 + 64 bits, with carry."""
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
    """v_bitop3: any function of three bits, given as its truth table."""
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
    """v_div_scale: D = S0, scaled where a quotient S2 / S1 asks for it, and the mask of lanes to scale back."""
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


def _bind_packed_f32(i: Instruction) -> Step:
    """v_pk_{add,mul,fma}_f32: two float32 operations on register pairs, halves chosen by op_sel."""
    meanings: dict[str, Callable[..., Any]] = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "fma": fma}
    meaning = meanings[i.opcode.split("_")[2]]
    sources = i.operands[1:]
    halves = []
    for half, chosen, negated in ((0, "op_sel", "neg_lo"), (1, "op_sel_hi", "neg_hi")):
        which = i.list_modifier(chosen) or [half] * len(sources)
        signs = i.list_modifier(negated) or [0] * len(sources)
        # A constant is the same for both halves.
        reads = [raw_reader(o, i, w if o.kind in "vas" else 0) for o, w in zip(sources, which)]
        halves.append(list(zip(reads, signs)))
    to = i.operands[0]

    def step(m):
        out = []
        for half in halves:
            values = [-r(m).view(F32) if negative else r(m).view(F32) for r, negative in half]
            out.append(np.asarray(meaning(*values), F32).view(U32))
        # Both halves are computed before either is written: the destination may be a source.
        m.set_vector(to, out[0])
        m.set_vector(to, out[1], 1)

    return step


_PACKED16: dict[str, tuple[str, Callable[..., Any]]] = {
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


def _bind_packed16(i: Instruction) -> Step:
    """Two 16-bit operations on the halves of each source, chosen by op_sel and op_sel_hi."""
    if i.modifiers.get("clamp"):
        raise i.error("clamp of packed instructions is not implemented")
    types, meaning = _PACKED16[i.opcode]
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
        # A float constant stands in the low half, of the width of the instruction.
        bits = np.array(0 if upper else operand.value, F16).view(np.uint16)
        return lambda m: bits.view(dtype)
    whole, shift = raw_reader(operand, i), U32(16 if upper else 0)

    def read(m):
        value = (np.asarray(whole(m)) >> shift).astype(np.uint16).view(dtype)
        return -value if negative else value

    return read


def _bind_packed_move(i: Instruction) -> Step:
    """v_pk_mov_b32: one register of each source pair."""
    chosen = i.list_modifier("op_sel") or [0, 0]
    a, b = (raw_reader(o, i, which) for o, which in zip(i.operands[1:], chosen))
    to = i.operands[0]

    def step(m):
        first, second = np.array(a(m)), np.array(b(m))
        m.set_vector(to, first)
        m.set_vector(to, second, 1)

    return step


def _bind_from_fp8(i: Instruction) -> Step:
    """v_cvt_f32_fp8, v_cvt_pk_f32_fp8 and the bf8 forms, in the flavour of the machine."""
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


def _bind_to_fp8(i: Instruction) -> Step:
    """v_cvt_pk_fp8_f32 and v_cvt_pk_bf8_f32: two codes into one half of the destination, the other half kept."""
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


def _bind_scaled_from_fp8(i: Instruction) -> Step:
    """v_cvt_scalef32_pk_{f32,f16,bf16}_{fp8,bf8}: two codes of one half times a power of two (gfx950)."""
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


def _bind_scaled_to_fp8(i: Instruction) -> Step:
    """v_cvt_scalef32_pk_{fp8,bf8}_{f32,f16,bf16}: two values over a power of two, as codes in one half (gfx950)."""
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


def _bind_dot2(i: Instruction) -> Step:
    """v_dot2_f32_{f16,bf16} and v_dot2c: two products and an addend, in float32."""
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
    r"v_pk_(add|mul|fma)_f32": ("two float32 operations", _bind_packed_f32),
    r"v_pk_mov_b32": ("D = {S0, S1}", _bind_packed_move),
    r"v_cvt_(pk_)?f32_(fp8|bf8)": ("FP8 codes to float32", _bind_from_fp8),
    r"v_cvt_pk_(fp8|bf8)_f32": ("float32 to FP8 codes", _bind_to_fp8),
    r"v_cvt_scalef32_pk_(f32|f16|bf16)_(fp8|bf8)": ("FP8 codes times a power of two", _bind_scaled_from_fp8),
    r"v_cvt_scalef32_pk_(fp8|bf8)_(f32|f16|bf16)": ("values over a power of two to FP8 codes", _bind_scaled_to_fp8),
    r"v_dot2c?_f32_(f16|bf16)": ("D = S0 . S1 + S2", _bind_dot2),
    **{name: ("two 16-bit operations", _bind_packed16) for name in _PACKED16},
}


def bind(i: Instruction) -> Step | None:
    """What a vector instruction does, or None for one that is not here."""
    if i.opcode in TABLE:
        return bind_table(i)
    for pattern, (_, binder) in SPECIAL.items():
        if re.fullmatch(pattern, i.opcode):
            return binder(i)
    return None
