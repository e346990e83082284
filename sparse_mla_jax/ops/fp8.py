"""FP8 values with one scale per group: quantise, dequantise, and move between the two e4m3 flavours.

All arithmetic is on bit patterns, so that every backend gives the same bytes whether or not it has the type. Kernels
use the decoder of `pallas_kernels.fp8_bits` instead, which needs only operations that Pallas supports.

The two flavours are e4m3fn (OCP: exponent bias 7, largest 448, NaN 0x7F and 0xFF, has -0) and e4m3fnuz (gfx942: bias
8, largest 240, NaN 0x80 only). One byte serves both, because amax is mapped to 448 or 224 and neither -0 nor NaN is
ever written: read as fnuz, a byte is exactly half of what it is as fn. Sources: the OCP 8-bit floating point
specification (OFP8); for fnuz, Noune et al., "8-bit numerical formats for deep neural networks" (arXiv:2206.02915).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sparse_mla_jax import _check
from sparse_mla_jax._check import require

E4M3FN = jnp.dtype(jnp.float8_e4m3fn)
E4M3FNUZ = jnp.dtype(jnp.float8_e4m3fnuz)
E8M0 = jnp.dtype(jnp.float8_e8m0fnu)
FLOAT32 = jnp.dtype(jnp.float32)

# (exponent bias, largest value that quantize writes)
_FLAVOURS = {E4M3FN: (7, 448), E4M3FNUZ: (8, 224)}

# Types of scales.
_SCALES = (FLOAT32, E8M0)

# Bits of a float32: the sign, and infinity.
SIGN, INFINITY = -(2**31), 0x7F800000
AMAX_FLOOR = 1e-4
# Larger magnitudes saturate here, so that every written value dequantises to a finite bfloat16 with either scale type.
SATURATION = 1.75 * 2.0**127


def is_fp8(dtype: Any) -> bool:
    """Whether `dtype` is one of the two FP8 flavours of a cache: float8_e4m3fn or float8_e4m3fnuz."""
    return jnp.dtype(dtype) in _FLAVOURS


def fp8_max(dtype: Any) -> float:
    """The number that a group's amax is mapped to: 448.0 for float8_e4m3fn, 224.0 for float8_e4m3fnuz (largest: 240).

    Raises:
      ValueError: another dtype.
    """
    return float(_flavour(dtype)[1])


def quantize(
    x: Array, *, group_size: int, dtype: Any = jnp.float8_e4m3fnuz, scale_dtype: Any = jnp.float32
) -> tuple[Array, Array]:
    """Rounds x to FP8 with one scale per `group_size` consecutive entries of the last axis.

    scale = max(amax, 1e-4) / fp8_max(dtype); with scale_dtype float8_e8m0fnu, the smallest power of two not below that.
    values = x / scale, rounded to nearest, ties to even. A value that rounds to zero is +0: neither -0 (0x80) nor a NaN
    code is ever written. NaN counts as 0. Magnitudes above 1.75 * 2**127, infinity included, count as that number (and
    dominate their group's scale).

    Args:
      x: [..., D], any floating type; computed in float32.
      group_size: divides D.
      dtype: float8_e4m3fnuz or float8_e4m3fn.
      scale_dtype: float32 or float8_e8m0fnu.

    Returns:
      (values dtype[..., D], scales scale_dtype[..., D // group_size]).

    Raises:
      ValueError: x is not floating or has no axis, group_size does not divide D, or another dtype or scale_dtype.
    """
    codes, scales = quantize_codes(x, group_size=group_size, dtype=dtype, scale_dtype=scale_dtype)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype)), scales


def quantize_codes(x: Array, *, group_size: int, dtype: Any, scale_dtype: Any = jnp.float32) -> tuple[Array, Array]:
    """`quantize` with the values as bytes, uint8[..., D].

    Use it before a scatter: XLA:CPU converts a whole FP8 array to float16 to move one row, but moves bytes in place.
    """
    bias, largest = _flavour(dtype)
    x = _check.array("x", x, jnp.floating, ..., "D", hint="Cast or reshape it first.")
    groups = check_groups(x.shape[-1], group_size, "x's last axis")
    check_scale_dtype(scale_dtype)
    x = x.astype(jnp.float32)
    x = jnp.clip(jnp.where(jnp.isnan(x), 0.0, x), -SATURATION, SATURATION)
    x = x.reshape(*x.shape[:-1], groups, group_size)
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), AMAX_FLOOR)
    if jnp.dtype(scale_dtype) == E8M0:
        # 448 and 224 are 1.75 * 2**8 and 1.75 * 2**7: round the exponent up where the significand exceeds 1.75.
        bits = lax.bitcast_convert_type(amax, jnp.int32)
        exponent = ((bits + 0x1FFFFF) >> 23) - (8 if largest == 448 else 7)
        scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
        scales = lax.bitcast_convert_type(exponent.astype(jnp.uint8), E8M0)
    else:
        # Hide the constant divisor behind an always-true condition: XLA would multiply by its rounded reciprocal.
        scales = scale = _divide(amax, jnp.where(amax > 0, np.float32(largest), np.float32(1)))
    codes = _encode(_divide(x, scale[..., None]), bias, largest)
    return codes.reshape(*codes.shape[:-2], groups * group_size), scales


def dequantize(values: Array, scales: Array, *, group_size: int, dtype: Any = jnp.bfloat16) -> Array:
    """values times the scale of their group, computed in float32 and rounded once to `dtype`.

    All 256 codes are decoded exactly; NaN codes (0x7F and 0xFF of e4m3fn, 0x80 of e4m3fnuz) give NaN.

    Args:
      values: float8_e4m3fn or float8_e4m3fnuz [..., D].
      scales: float32 or float8_e8m0fnu [..., D // group_size].
      group_size: entries of a group.
      dtype: floating type of the result.

    Returns:
      dtype[..., D].

    Raises:
      ValueError: types or shapes other than these.
    """
    values = _values(values)
    return dequantize_codes(
        lax.bitcast_convert_type(values, jnp.uint8), scales, values.dtype, group_size=group_size, dtype=dtype
    )


def dequantize_codes(codes: Array, scales: Array, flavour: Any, *, group_size: int, dtype: Any) -> Array:
    """`dequantize` of uint8[..., D], the bytes of values of type `flavour`."""
    codes = _check.array("codes", codes, (jnp.uint8,), ..., "D", hint="The bytes of FP8 values.")
    dtype = _check.dtype("dtype", dtype, jnp.floating)
    groups = check_groups(codes.shape[-1], group_size, "values' last axis")
    expected = (*codes.shape[:-1], groups)
    scales = _check.array("scales", scales, _SCALES, *expected, hint=f"One per group of {group_size} values.")
    decoded = decode(codes, flavour).reshape(*expected, group_size)
    return (decoded * scales_to_float32(scales)[..., None]).reshape(codes.shape).astype(dtype)


def reinterpret(values: Array, scales: Array, dtype: Any) -> tuple[Array, Array]:
    """The same numbers in the other flavour: the bytes stay, the scales are doubled (fn to fnuz) or halved.

    Exact for every code that `quantize` writes. The other codes change their meaning: -0 of e4m3fn (0x80) becomes NaN
    in e4m3fnuz, NaN (0x7F, 0xFF) becomes 240 and -240, and vice versa. E8M0 scales saturate at 2**-127 and 2**127.

    Args:
      values: float8_e4m3fn or float8_e4m3fnuz [..., D].
      scales: float32 or float8_e8m0fnu [..., D // group_size].
      dtype: the flavour to change to; the type of `values` returns both arguments unchanged.

    Returns:
      (values dtype[..., D], scales).

    Raises:
      ValueError: a type other than these.
    """
    values = _values(values)
    scales = reinterpret_scales(scales, values.dtype, dtype)
    if values.dtype == jnp.dtype(dtype):
        return values, scales
    codes = lax.bitcast_convert_type(values, jnp.uint8)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype)), scales


def reinterpret_scales(scales: Array, source: Any, target: Any) -> Array:
    """Scales for the same bytes read as `target`, given their scales as `source`: the numbers stay the same."""
    shift = _flavour(target)[0] - _flavour(source)[0]
    scales = _check.array("scales", scales, _SCALES, ...)
    if shift == 0:
        return scales
    if scales.dtype == E8M0:
        byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
        moved = jnp.where(byte == 255, 255, jnp.clip(byte + shift, 0, 254))
        return lax.bitcast_convert_type(moved.astype(jnp.uint8), E8M0)
    return scales * np.float32(2.0**shift)


def pack_words(values: Array) -> Array:
    """Packs four FP8 values (or bytes) into a word, little endian: values[..., D] -> uint32[..., D // 4].

    Raises:
      ValueError: values are neither FP8 nor uint8, or D is not a multiple of 4.
    """
    values = _check.array("values", values, (*_FLAVOURS, jnp.uint8), ..., "D")
    if values.dtype != jnp.uint8:
        values = lax.bitcast_convert_type(values, jnp.uint8)
    require(
        values.shape[-1] % 4 == 0,
        f"values have shape {list(values.shape)}; words hold four values, so the last axis must be a multiple of 4."
        " Use an unquantised cache for such a width.",
    )
    return lax.bitcast_convert_type(values.reshape(*values.shape[:-1], values.shape[-1] // 4, 4), jnp.uint32)


def unpack_words(words: Array, dtype: Any) -> Array:
    """The inverse of pack_words: uint32[..., D // 4] -> dtype[..., D], dtype an FP8 flavour or uint8.

    Raises:
      ValueError: words are not uint32, or another dtype.
    """
    words = _check.array("words", words, (jnp.uint32,), ..., "words", hint="See pack_words.")
    codes = lax.bitcast_convert_type(words, jnp.uint8).reshape(*words.shape[:-1], words.shape[-1] * 4)
    if jnp.dtype(dtype) == jnp.uint8:
        return codes
    _flavour(dtype)
    return lax.bitcast_convert_type(codes, jnp.dtype(dtype))


def decode(codes: Array, flavour: Any) -> Array:
    """Decodes bytes uint8[...] of type `flavour` to float32, exactly; NaN codes give NaN."""
    bias, _ = _flavour(flavour)
    code = _check.array("codes", codes, (jnp.uint8,), ...).astype(jnp.int32)
    magnitude = code & 0x7F
    normal = lax.bitcast_convert_type((magnitude << 20) + ((127 - bias) << 23), jnp.float32)
    # Convert small codes as integers: a float32 subnormal as an intermediate result would be flushed to zero.
    small = magnitude.astype(jnp.float32) * np.float32(2.0 ** (-bias - 2))
    value = jnp.where(magnitude < 8, small, normal)
    signed = jnp.where(code >= 128, -value, value)
    nan = (magnitude == 0x7F) if jnp.dtype(flavour) == E4M3FN else (code == 0x80)
    return jnp.where(nan, np.float32(np.nan), signed)


def scales_to_float32(scales: Array) -> Array:
    """Scales as float32: float32 is returned unchanged, E8M0 converts exactly (2**-127 may flush to zero)."""
    scales = _check.array("scales", scales, _SCALES, ...)
    if scales.dtype != E8M0:
        return scales
    byte = lax.bitcast_convert_type(scales, jnp.uint8).astype(jnp.int32)
    bits = jnp.where(byte == 0, 0x400000, jnp.where(byte == 255, 0x7FC00000, byte << 23))
    return lax.bitcast_convert_type(bits, jnp.float32)


def check_scale_dtype(scale_dtype: Any) -> None:
    """Raises ValueError unless `scale_dtype` is float32 or float8_e8m0fnu (powers of two)."""
    _check.dtype("scale_dtype", scale_dtype, (FLOAT32, E8M0))


def check_groups(width: int, group_size: int, what: str) -> int:
    """Number of groups in `width` entries.

    Raises:
      ValueError: group_size is not an integer, below 1, or does not divide width.
    """
    size = _check.size("group_size", group_size, hint=f"It must divide {what} ({width} entries).")
    require(width % size == 0, f"group_size is {size}; expected a divisor of {what} ({width} entries).")
    return width // size


def _flavour(dtype: Any) -> tuple[int, int]:
    """(exponent bias, largest value written) of an FP8 flavour; ValueError for any other type."""
    return _FLAVOURS[_check.dtype("dtype", dtype, tuple(_FLAVOURS))]


def _values(values: Any) -> Array:
    return _check.array("values", values, tuple(_FLAVOURS), ..., "D")


def _divide(a: Array, b: Array) -> Array:
    """a / b rounded once, for finite a and normal positive b. XLA's own division on NVIDIA GPUs errs by up to 2 ulp."""
    a, b = jnp.broadcast_arrays(a, b)
    return lax.platform_dependent(a, b, cuda=lambda a, b: divide_bits(a, b, lax.div), default=lax.div)


def divide_bits(a: Array, b: Array, divide: Callable[[Array, Array], Array]) -> Array:
    """a / b rounded once, from a division of significands that errs by at most 2 units in the last place.

    Args:
      a: finite float32.
      b: normal positive float32 of a's shape.
      divide: float32 division of integers whose quotient is in [1, 2).

    Returns:
      float32; quotients below the normal range are 0.
    """
    x, y = (lax.bitcast_convert_type(v, jnp.int32) for v in (a, b))
    m, n = ((v & 0x7FFFFF) | 0x800000 for v in (x, y))
    less = (m < n).astype(jnp.int32)
    near = divide((m << less).astype(jnp.float32), n.astype(jnp.float32))
    near = (near * np.float32(2.0**23)).astype(jnp.int32)
    # The remainder fits int32 exactly, although the two products wrap around.
    twice = 2 * ((m << (23 + less)) - near * n)
    for odd in (1, 3, 5, 7):
        near += (twice > odd * n).astype(jnp.int32) - (twice < -odd * n).astype(jnp.int32)
    exponent = ((x >> 23) & 0xFF) - (y >> 23) - less + 127
    bits = jnp.where(((x & INFINITY) > 0) & (exponent > 0), (exponent << 23) + (near - (1 << 23)), 0)
    return lax.bitcast_convert_type(bits | (x & SIGN), jnp.float32)


def _encode(x: Array, bias: int, largest: int) -> Array:
    """FP8 bytes of finite float32 x, clipped to +-largest, rounded to nearest even; zero results are +0."""
    magnitude = jnp.minimum(jnp.abs(x), np.float32(largest))
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - bias) << 3)
    # Below the normal range: the code is the multiple of the smallest subnormal, rounded. The product is exact, and
    # code 8 is the smallest normal number.
    small = lax.round(magnitude * np.float32(2.0 ** (bias + 2)), lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
    code = jnp.where(magnitude < np.float32(2.0 ** (1 - bias)), small, normal)
    return jnp.where((x < 0) & (code > 0), code | 0x80, code).astype(jnp.uint8)
