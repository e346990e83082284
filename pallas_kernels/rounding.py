"""Rounding and quantisation on the bits of float32, the same on every machine."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels._primitives import assembly
from pallas_kernels.targets import NVIDIA, Target

# exponent bias, largest value written
_FLAVOURS = {"float8_e4m3fn": (7, 448.0), "float8_e4m3fnuz": (8, 224.0)}
_INFINITY = 0x7F800000


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _constant(x: float) -> int:
    """Bits of a positive float32."""
    return int(np.float32(x).view(np.int32))


# Magnitudes saturate here, and a group's largest counts as at least the other (`ops.fp8`).
_SATURATION, _AMAX_FLOOR = _constant(1.75 * 2.0**127), _constant(1e-4)


def float32_bits(x: Array) -> Array:
    """int32 bits of x as float32; subnormals as they are, and NaN of bfloat16 and float32 too."""
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    bits = _bits(x.astype(jnp.float32))
    if x.dtype == jnp.float32:
        return bits
    # Casts disagree about signalling NaN.
    return jnp.where((bits & 0x7FFFFFFF) > _INFINITY, bits | 0x400000, bits)


def _round_to_bfloat16(bits: Array) -> Array:
    """bfloat16 of float32 bits: to nearest even, NaN to the quiet one of its sign."""
    upper = lax.shift_right_logical(bits + 0x7FFF + ((bits >> 16) & 1), 16)
    quiet = (lax.shift_right_logical(bits, 16) & 0x8000) | 0x7FC0
    upper = jnp.where((bits & 0x7FFFFFFF) > _INFINITY, quiet, upper)
    return lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def convert(x: Array, dtype: Any) -> Array:
    """x as bfloat16 or float32, the same bits on every machine; a NaN that becomes bfloat16 is the quiet one."""
    if x.dtype == dtype:
        return x
    return _round_to_bfloat16(float32_bits(x)) if dtype == jnp.bfloat16 else _float(float32_bits(x))


def divide(a: Array, b: Array, target: Target) -> Array:
    """a / b in float32, rounded once."""
    if target == NVIDIA:
        # Triton's own division is approximate here.
        return assembly("div.rn.f32 $0, $1, $2;", "=f,f,f", a, jnp.broadcast_to(b, a.shape), dtype=jnp.float32)
    return a / b


def quantize(bits: Array, flavour: str, e8m0: bool, target: Target) -> tuple[Array, Array]:
    """Codes int32 [G, W] and scales (float32 or E8M0 as int32 [G]) of float32 bits [G, W], as `ops.fp8.quantize`."""
    bias, largest = _FLAVOURS[flavour]
    magnitude = bits & 0x7FFFFFFF
    magnitude = jnp.where(magnitude > _INFINITY, jnp.int32(0), jnp.minimum(magnitude, _SATURATION))
    amax = jnp.maximum(jnp.max(magnitude, axis=1), _AMAX_FLOOR)
    if e8m0:
        # Up where the significand exceeds 1.75, that of the largest value.
        scales = ((amax + 0x1FFFFF) >> 23) - (15 - bias)
        # The reciprocal of a power of two: the same quotients.
        quotient = _float(magnitude) * _float((254 - scales) << 23)[:, None]
    else:
        # Always true: XLA, in interpret mode, would multiply by the reciprocal of a divisor that it can see.
        scales = divide(_float(amax), jnp.where(amax > 0, jnp.float32(largest), jnp.float32(1)), target)
        quotient = divide(_float(magnitude), scales[:, None], target)
    quotient_bits = jnp.minimum(_bits(quotient), _constant(largest))
    normal = ((quotient_bits + 0x7FFFF + ((quotient_bits >> 20) & 1)) >> 20) - ((127 - bias) << 3)
    # Beside this the last bit of a float32 is the smallest subnormal code: the addition rounds.
    unit = 2.0 ** (21 - bias)
    small = _bits(_float(quotient_bits) + jnp.float32(unit)) - _constant(unit)
    codes = jnp.where(quotient_bits < _constant(2.0 ** (1 - bias)), small, normal)
    return jnp.where(codes > 0, codes | ((bits >> 24) & 0x80), jnp.int32(0)), scales
