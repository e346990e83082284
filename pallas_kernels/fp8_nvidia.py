"""FP8 operands of NVIDIA's tensor cores: PTX on the four codes of a register.

Tensor cores multiply e4m3fn. They read a code of e4m3fnuz as exactly twice its value, except +-240: they read NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._primitives import assembly
from pallas_kernels.targets import HOST, Target

NATIVE = jnp.dtype(jnp.float8_e4m3fn)


def saturate(codes: Array, target: Target = HOST) -> Array:
    """Replaces the NaN codes of e4m3fn [...] by the largest number of the same sign."""
    if target == HOST:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        return jax.lax.bitcast_convert_type(codes - ((codes & 0x7F) == 0x7F).astype(jnp.uint8), NATIVE)
    # 0x7F + 1 carries into the sign bit of the same byte, which then marks a NaN.
    text = (
        "{ .reg .b32 t; and.b32 t, $1, 0x7F7F7F7F; add.u32 t, t, 0x01010101; shr.u32 t, t, 7;"
        " and.b32 t, t, 0x01010101; sub.u32 $0, $1, t; }"
    )
    return assembly(text, "=r,r", codes, dtype=NATIVE, pack=4)


def decode_bfloat16(codes: Array, dtype) -> Array:
    """Decodes uint8 codes [...] of flavour `dtype` to bfloat16; exact, subnormals included.

    Sign, exponent and mantissa move to their places in a bfloat16; a power of two then gives the value.
    """
    # Use fma with -0 instead of mul.bf16x2: Ampere has the fma only.
    power = "0x7B807B80" if jnp.dtype(dtype) == NATIVE else "0x7B007B00"
    pairs = "".join(
        f" prmt.b32 t, 0, $2, {order}; and.b32 s, t, 0x7F007F00; shr.u32 s, s, 4;"
        f" lop3.b32 t, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 {to}, t, p, z;"
        for order, to in (("0x5040", "$0"), ("0x7060", "$1"))
    )
    text = f"{{ .reg .b32 s, t, p, z; mov.b32 p, {power}; mov.b32 z, 0x80008000;{pairs} }}"
    return assembly(text, "=&r,=r,r", codes, dtype=jnp.bfloat16, pack=4)


def decode_float16(codes: Array, target: Target = HOST) -> Array:
    """Decodes e4m3fn [...] to float16; exact.

    Pinned: Triton would otherwise rearrange the codes, byte by byte, into the layout of float16 operands.
    """
    if target == HOST:
        return codes.astype(jnp.float16)
    text = "{ .reg .b16 x, y; mov.b32 {x, y}, $2; cvt.rn.f16x2.e4m3x2 $0, x; cvt.rn.f16x2.e4m3x2 $1, y; }"
    return assembly(text, "=&r,=r,r", codes, dtype=jnp.float16, pack=4, pinned=True)
