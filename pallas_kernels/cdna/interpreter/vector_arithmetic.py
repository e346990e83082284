"""Arithmetic of vector instructions on arrays of lanes, with the hardware's rounding."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
F16, F32, F64, BF16 = np.float16, np.float32, np.float64, ml_dtypes.bfloat16
# FP8 and BF8 types of each architecture's instructions.
FP8 = {
    "gfx942": (ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz),
    "gfx950": (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
}


def fma(a, b, c):
    """a * b + c, rounded once."""
    return _fma64(a, b, c) if a.dtype == F64 else fma_to_odd(a, b, c).astype(a.dtype)


def fma_to_odd(a, b, c):
    """a * b + c of float32 or narrower, as float64 rounded to odd.

    A second rounding, to less than 52 bits, then gives the same number as one rounding of the exact sum.
    """
    # float64 holds the product of two float32 exactly. The error of the sum is computed exactly below.
    exact, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
    total = exact + addend
    # Round the sum to odd: otherwise the second rounding could see a tie that the exact sum is not.
    back = total - exact
    error = (exact - (total - back)) + (addend - back)
    bits = total.view(I64) if total.ndim else np.array(total).view(I64)
    nudge = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(total) & (total != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + nudge, bits).view(F64)


@np.vectorize(otypes=[F64])
def _fma64(a, b, c):
    """`fma` for float64, in rational numbers. It is slow, but rarely used."""
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
    """Low 24 bits, sign-extended to int64."""
    return (a << U32(8)).view(I32).astype(I64) >> 8


def low32(a):
    """The low half of 64-bit integers."""
    return (np.asarray(a).astype(I64) & 0xFFFFFFFF).astype(U32)


def product(a, b):
    """64-bit product of 32-bit integers; signed if they are signed."""
    wide = I64 if a.dtype == I32 else U64
    return a.astype(wide) * b.astype(wide)


def median(a, b, c):
    """The median of three values."""
    return np.maximum(np.minimum(np.maximum(a, b), c), np.minimum(a, b))


def float_median(a, b, c):
    """The median of three values; the smallest number if one is NaN."""
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
    """v_perm: selects four bytes of {a, b}; codes 8 to 11 give copies of a sign bit, 12 gives 0, above 12 give 0xFF."""
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
    """Converts floats to integers: rounds toward zero, saturates, turns NaN into 0."""
    whole = np.nan_to_num(np.trunc(value.astype(F64)), nan=0.0, posinf=high, neginf=low)
    return np.clip(whole, low, high).astype(I64).astype(dtype)


def toward_zero_f16(a):
    """float32 to float16, rounded toward zero."""
    near = a.astype(F16)
    return np.where(np.abs(near.astype(F32)) > np.abs(a), np.nextafter(near, F16(0)), near)


def packed(low, high):
    """Packs two broadcast 16-bit values into one uint32."""
    half = [np.asarray(x).view(np.uint16).astype(U32) for x in (low, high)]
    return half[0] | half[1] << U32(16)


def exponent_of_two(a):
    """v_exp: 2 ** a; subnormal results are 0, as on the hardware."""
    return np.where(a < F32(-126), F32(0), np.exp2(a.astype(F64)).astype(F32))


def normal(a):
    """float32 with subnormals set to 0: v_rcp, v_rsq, v_sqrt, v_exp and v_log flush them in every denormal mode."""
    return np.where(np.abs(a) < F32(2**-126), a * F32(0), a)


def log_of_two(a):
    """v_log: logarithm to base 2; subnormals count as 0, as on the hardware."""
    return np.log2(normal(a).astype(F64)).astype(F32)


def reciprocal(a):
    """v_rcp: reciprocal; a subnormal argument counts as 0, and a subnormal result becomes 0."""
    return normal((1 / normal(a).astype(F64)).astype(F32))


def frexp(a):
    """(mantissa, exponent) with |mantissa| in [0.5, 1); exponent 0 for zero, infinity and NaN."""
    return np.frexp(a)


def reverse_bits(a):
    """Reverses the 32 bits."""
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        a = (a >> U32(shift) & U32(mask)) | (a & U32(mask)) << U32(shift)
    return a


def leading_zeros(a):
    """Number of zeros above the highest set bit; -1 for 0."""
    return np.where(a == 0, U32(0xFFFFFFFF), U32(31) - np.frexp(np.maximum(a, 1).astype(F64))[1].astype(U32) + U32(1))


def trailing_zeros(a):
    """Index of the lowest set bit; -1 for 0."""
    return np.where(a == 0, U32(0xFFFFFFFF), np.bitwise_count((a & (~a + U32(1))) - U32(1)).astype(U32))


def max_ieee(a, b):
    """The larger number; NaN only if both are NaN. +0 counts as larger than -0."""
    return _ordered(a, b, np.fmax, above=True)


def min_ieee(a, b):
    """The smaller number; NaN only if both are NaN. -0 counts as smaller than +0."""
    return _ordered(a, b, np.fmin, above=False)


def _ordered(a, b, choose, above: bool):
    """Maximum (`above`) or minimum by `choose`, except that +0 counts as larger than -0."""
    return np.where(a == b, np.where(np.signbit(a) == above, b, a), choose(a, b))


def maximum(a, b):
    """The larger number; NaN if either is NaN. +0 counts as larger than -0."""
    return _ordered(a, b, np.maximum, above=True)


def minimum(a, b):
    """The smaller number; NaN if either is NaN. -0 counts as smaller than +0."""
    return _ordered(a, b, np.minimum, above=False)


# The division helpers follow the ISA document's pseudocode, with three exceptions. The pseudocode scales by 2**64 but
# scales back by 2**32; it scales a denominator above 2**126 up to infinity; it ignores a quotient that overflowed to
# NaN. In these cases the code makes the whole sequence give the quotient that IEEE 754 requires.
def exponent_field(a):
    """The biased exponent of float32, int32: 0 for zero and subnormals, 255 for infinity and NaN."""
    return (np.ascontiguousarray(a, F32).view(U32) >> U32(23) & U32(255)).astype(I32)


def divide_scale(value, denominator, numerator):
    """v_div_scale: returns (scaled value, whether the quotient is off by 2**64).

    `value` is the denominator or the numerator. The scaling keeps the operands, the remainder and the quotient of the
    refinement out of the subnormal range.
    """
    n, d = exponent_field(numerator), exponent_field(denominator)
    size = np.abs(numerator.astype(F64) / denominator)
    # This includes quotients too small for a subnormal: v_div_fmas rounds them.
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
    """v_div_fmas: a * b + c, rounded once; where `flag`, times 2**64 if the quotient `c` is large, else 2**-64."""
    power = np.where(flag, np.where(exponent_field(c) > 127, F64(2.0**64), F64(2.0**-64)), F64(1))
    return (fma_to_odd(a, b, c) * power).astype(F32)


def divide_fixup(quotient, denominator, numerator):
    """v_div_fixup: handles the special cases of a refined quotient and sets its sign from the operands."""
    sign = np.where(np.signbit(denominator) != np.signbit(numerator), F32(-1), F32(1))
    infinite, zero = sign * F32(np.inf), sign * F32(0)
    # With finite operands the refinement gives NaN only through an infinity: the quotient is too large.
    out = np.where(np.isnan(quotient), infinite, np.copysign(np.abs(quotient), sign))
    out = np.where(exponent_field(numerator) - exponent_field(denominator) < -150, zero, out)
    out = np.where((denominator == 0) | np.isinf(numerator), infinite, out)
    out = np.where((numerator == 0) | np.isinf(denominator), zero, out)
    bad = (denominator == 0) & (numerator == 0) | np.isinf(denominator) & np.isinf(numerator)
    return np.where(bad | np.isnan(denominator) | np.isnan(numerator), F32(np.nan), out).astype(F32)


def saturated(value, dtype):
    """Converts to an FP8 type and clamps to its largest number; NaN stays NaN."""
    limit = float(ml_dtypes.finfo(dtype).max)
    value = np.asarray(value, F32)
    return np.where(np.isnan(value), value, np.clip(value, -limit, limit)).astype(dtype)
