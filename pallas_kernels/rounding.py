"""Rounding and quantisation on the bits of float32, with the same result on every machine."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels._primitives import assembly
from pallas_kernels.targets import NVIDIA, Target

# (exponent bias, largest value that is written)
_FLAVOURS = {"float8_e4m3fn": (7, 448.0), "float8_e4m3fnuz": (8, 224.0)}
_INFINITY = 0x7F800000


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _constant(x: float) -> int:
    """Bits of a positive float32."""
    return int(np.float32(x).view(np.int32))


# Magnitudes saturate at the first; the amax of a group is at least the second (`ops.fp8`).
_SATURATION, _AMAX_FLOOR = _constant(1.75 * 2.0**127), _constant(1e-4)


def float32_bits(x: Array) -> Array:
    """int32 bits of x as float32. Subnormals keep their bits, and so does NaN of bfloat16 and float32."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    bits = _bits(x.astype(jnp.float32))
    if x.dtype == jnp.float32:
        return bits
    # Set the quiet bit of NaN: machines cast signalling NaN differently.
    return jnp.where((bits & 0x7FFFFFFF) > _INFINITY, bits | 0x400000, bits)


def _round_to_bfloat16(bits: Array) -> Array:
    """Rounds float32 bits to bfloat16, to nearest even; NaN becomes the quiet NaN of its sign."""
    upper = lax.shift_right_logical(bits + 0x7FFF + ((bits >> 16) & 1), jnp.int32(16))
    quiet = (lax.shift_right_logical(bits, jnp.int32(16)) & 0x8000) | 0x7FC0
    upper = jnp.where((bits & 0x7FFFFFFF) > _INFINITY, quiet, upper)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def convert(x: Array, dtype: Any) -> Array:
    """Converts x to bfloat16 or float32, bit for bit the same everywhere. NaN converted to bfloat16 becomes quiet."""
    if x.dtype == dtype:
        return x
    return _round_to_bfloat16(float32_bits(x)) if dtype == jnp.bfloat16 else _float(float32_bits(x))


def divide(a: Array, b: Array, target: Target) -> Array:
    """a / b in float32, rounded once."""
    if target == NVIDIA:
        # Triton's own division is approximate on NVIDIA GPUs.
        return assembly("div.rn.f32 $0, $1, $2;", "=f,f,f", a, jnp.broadcast_to(b, a.shape), dtype=jnp.float32)
    return a / b


def quantize(bits: Array, flavour: str, e8m0: bool, target: Target) -> tuple[Array, Array]:
    """Quantises float32 bits [G, W] as `ops.fp8.quantize`: int32 codes [G, W], scales [G] (E8M0 as int32)."""
    bias, largest = _FLAVOURS[flavour]
    magnitude = bits & 0x7FFFFFFF
    magnitude = jnp.where(magnitude > _INFINITY, jnp.int32(0), jnp.minimum(magnitude, _SATURATION))
    amax = jnp.maximum(jnp.max(magnitude, axis=1), _AMAX_FLOOR)
    if e8m0:
        # Round the exponent up if the significand exceeds 1.75, the significand of the largest FP8 value.
        scales = ((amax + 0x1FFFFF) >> 23) - (15 - bias)
        # Multiply by the reciprocal: for a power of two the quotients are the same.
        quotient = _float(magnitude) * _float((254 - scales) << 23)[:, None]
    else:
        # amax > 0 always holds. The select hides a constant divisor: XLA (interpret mode) multiplies by its reciprocal.
        scales = divide(_float(amax), jnp.where(amax > 0, jnp.float32(largest), jnp.float32(1)), target)
        quotient = divide(_float(magnitude), scales[:, None], target)
    quotient_bits = jnp.minimum(_bits(quotient), _constant(largest))
    normal = ((quotient_bits + 0x7FFFF + ((quotient_bits >> 20) & 1)) >> 20) - ((127 - bias) << 3)
    # Adding 2**(21-bias) aligns the last float32 bit with the smallest FP8 subnormal, so the addition itself rounds.
    unit = 2.0 ** (21 - bias)
    small = _bits(_float(quotient_bits) + jnp.float32(unit)) - _constant(unit)
    codes = jnp.where(quotient_bits < _constant(2.0 ** (1 - bias)), small, normal)
    return jnp.where(codes > 0, codes | ((bits >> 24) & 0x80), jnp.int32(0)), scales
