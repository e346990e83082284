"""Exact FP8 arithmetic on bit patterns, as plain functions of arrays.

Pallas' Triton backend has no cast from `float8_e4m3fnuz`, and each GPU casts only its own flavour fast. Both flavours
have one sign bit, four exponent bits and three mantissa bits. The seven bits below the sign, shifted left by
seven, are a float16 with another exponent bias. One multiplication by a power of two therefore gives the exact value,
subnormals included. The intermediate type is float16, not bfloat16: a subnormal FP8 value then stays out of the range
that a CPU flushes to zero.

NaN codes decode to finite numbers (+-480 in e4m3fn, -0 in e4m3fnuz). Kernels must mask by index, never by value.
`is_nan` finds the NaN codes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._primitives import assembly
from pallas_kernels.targets import GFX942, HOST, NVIDIA, Target

# Factor from the float16 interpretation of the bits to the value: 2 ** (15 - exponent bias of the flavour).
_POWER = {"float8_e4m3fn": 2.0**8, "float8_e4m3fnuz": 2.0**7}


def power(dtype, target: Target = HOST) -> float:
    """The power of two that raw decoded values must be multiplied by to become values of `dtype`."""
    name = jnp.dtype(dtype).name
    if name not in _POWER:
        raise NotImplementedError(f"FP8 flavour {name}; the bit decoder knows {', '.join(_POWER)}")
    return dict(target.conversions).get(name, _POWER[name])


def decode_words(words: Array, dtype, target: Target) -> list[Array]:
    """Decodes uint32 words of four codes into four float32 planes; multiply by `power(dtype, target)`. Exact.

    A GPU with a conversion instruction uses it: one instruction per value instead of four.
    """
    name = jnp.dtype(dtype).name
    if name not in dict(target.conversions):
        return [decode_raw(plane(words, byte)) for byte in range(4)]
    if target == GFX942 and name == "float8_e4m3fn":
        # gfx942 reads -0 of this flavour as NaN: clear the sign of codes whose other bits are 0.
        words = words & (((words & 0x7F7F7F7F) + 0x7F7F7F7F) | 0x7F7F7F7F)
    return [assembly(_convert("$0", "$1", byte), "=v,v", words, dtype=jnp.float32) for byte in range(4)]


def decode_codes(codes: Array, dtype, target: Target) -> Array:
    """Decodes uint8 codes to float32; multiply by `power(dtype, target)`. Exact."""
    name = jnp.dtype(dtype).name
    if name not in dict(target.conversions):
        return decode_raw(codes)
    if target == GFX942 and name == "float8_e4m3fn":
        codes = jnp.where(codes == 0x80, 0, codes)
    return assembly(_convert("$0", "$1", 0), "=v,v", codes.astype(jnp.uint32), dtype=jnp.float32)


def _convert(to: str, source: str, byte: int) -> str:
    """The AMD instruction that converts one FP8 byte of a register to float32."""
    return f"v_cvt_f32_fp8_{'sdwa' if byte else 'e32'} {to}, {source}" + (f" src0_sel:BYTE_{byte}" if byte else "")


def float16_power(dtype, target: Target) -> float:
    """The power of two that values of `float16_plane` must still be multiplied by."""
    name = jnp.dtype(dtype).name
    return 1.0 if target == NVIDIA and name == "float8_e4m3fn" else power(dtype)


def float16_plane(words: Array, byte: int, factor: Array, rest: Array | None, dtype, target: Target) -> Array:
    """float16 [K, W]: decodes byte number `byte` of uint32 words, without `float16_power`, times factor + rest.

    factor, rest: float16 [K, W]. `rest` is the rounding error of `factor`, None if there is none.
    """
    if target == NVIDIA:
        return _nvidia_plane(words, byte, factor, rest, jnp.dtype(dtype).name)
    values = decode_raw(plane(words, byte))
    exact = factor.astype(jnp.float32) + (0 if rest is None else rest.astype(jnp.float32))
    return (values * exact).astype(jnp.float16)


def _nvidia_plane(words: Array, byte: int, factor: Array, rest: Array | None, name: str) -> Array:
    """`float16_plane` in PTX. One register holds the values of two words as its two halves."""
    if name == "float8_e4m3fn":
        decode = f"prmt.b32 a, $1, $2, 0x00{byte + 4}{byte}; mov.b32 {{x, y}}, a; cvt.rn.f16x2.e4m3x2 a, x;"
    else:
        # Shift bits: the conversion instruction reads e4m3fn, where the largest code is NaN.
        pair = f"0x{byte + 4}{byte + 4}{byte}{byte}"
        decode = (
            f"prmt.b32 a, $1, $2, {pair}; shr.b32 t, a, 1; and.b32 t, t, 0x3F803F80;"
            " lop3.b32 a, a, 0x80008000, t, 0xEA;"
        )
    scale = "mul.rn.f16x2 $0, a, $3;" if rest is None else "mul.rn.f16x2 t, a, $4; fma.rn.f16x2 $0, a, $3, t;"
    text = "{ .reg .b32 a, t; .reg .b16 x, y; " + decode + " " + scale + " }"
    args = (words, factor) if rest is None else (words, factor, rest)
    return assembly(text, "=r,r,r,r" + ("" if rest is None else ",r"), *args, dtype=jnp.float16, pack=2)


def decode_raw(bits: Array) -> Array:
    """Decodes FP8 codes (low 8 bits of any integer dtype) to float32, without the flavour's power of two."""
    code = bits.astype(jnp.uint16)
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32)


def decode_float32(bits: Array, dtype) -> Array:
    """float32 values of FP8 codes of flavour `dtype`; exact for every code that is a number."""
    return decode_raw(bits) * jnp.float32(power(dtype))


def truncate_to_bfloat16(x: Array) -> Array:
    """Keeps the upper half of float32 bits: exact for up to 8 significant bits, and cheaper than a rounding cast."""
    upper = jax.lax.bitcast_convert_type(x, jnp.uint32) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def decode_bfloat16(bits: Array, dtype) -> Array:
    """bfloat16 values of FP8 codes of flavour `dtype`; exact, since they have four significant bits."""
    return truncate_to_bfloat16(decode_float32(bits, dtype))


def plane(words: Array, byte: int) -> Array:
    """Byte number `byte` (0..3, little endian) of every uint32 word: the codes of values 4 * i + byte."""
    return (words >> (8 * byte)) & 0xFF


def is_nan(bits: Array, dtype) -> Array:
    """Whether FP8 codes of flavour `dtype` are NaN."""
    code = bits.astype(jnp.int32) & 0xFF
    return code == 0x80 if jnp.dtype(dtype).name == "float8_e4m3fnuz" else (code & 0x7F) == 0x7F


def e8m0_to_float32(bits: Array) -> Array:
    """float32 2 ** (code - 127) of E8M0 codes 1..254. Codes 0 and 255 give 0 and inf; no cache has them."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 23, jnp.float32)


def exponent(x: Array) -> Array:
    """Biased exponent of float32 x >= 0, clipped so that 2 ** exponent and its inverse are normal numbers."""
    return jnp.clip(jax.lax.bitcast_convert_type(x, jnp.int32) >> 23, 1, 253)


def from_exponent(exponent: Array) -> Array:
    """float32 2 ** (exponent - 127)."""
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
