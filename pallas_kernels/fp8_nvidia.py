"""FP8 for NVIDIA's matrix units, as PTX, four codes of a register at a time.

The units multiply e4m3fn. They read a code of e4m3fnuz as exactly twice its value, except +-240, which is NaN there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._primitives import assembly
from pallas_kernels.targets import HOST, Target

NATIVE = jnp.dtype(jnp.float8_e4m3fn)


def saturate(codes: Array, target: Target = HOST) -> Array:
    """e4m3fn [...] of e4m3fn [...]: codes that are NaN become the largest numbers."""
    if target == HOST:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        return jax.lax.bitcast_convert_type(codes - ((codes & 0x7F) == 0x7F).astype(jnp.uint8), NATIVE)
    # What 0x7F + 1 carries into is the sign bit of its own byte.
    text = (
        "{ .reg .b32 t; and.b32 t, $1, 0x7F7F7F7F; add.u32 t, t, 0x01010101; shr.u32 t, t, 7;"
        " and.b32 t, t, 0x01010101; sub.u32 $0, $1, t; }"
    )
    return assembly(text, "=r,r", codes, dtype=NATIVE, pack=4)


def decode_bfloat16(codes: Array, dtype) -> Array:
    """bfloat16 values of uint8 codes [...] of flavour `dtype`, exact, subnormals included.

    Sign, exponent and mantissa, moved to where a bfloat16 has them, are the value short of a power of two.
    """
    # As the sum of a product and -0, which older units than Hopper's have too.
    power = "0x7B807B80" if jnp.dtype(dtype) == NATIVE else "0x7B007B00"
    pairs = "".join(
        f" prmt.b32 t, 0, $2, {order}; and.b32 s, t, 0x7F007F00; shr.u32 s, s, 4;"
        f" lop3.b32 t, t, 0x80008000, s, 0xEA; fma.rn.bf16x2 {to}, t, p, z;"
        for order, to in (("0x5040", "$0"), ("0x7060", "$1"))
    )
    text = f"{{ .reg .b32 s, t, p, z; mov.b32 p, {power}; mov.b32 z, 0x80008000;{pairs} }}"
    return assembly(text, "=&r,=r,r", codes, dtype=jnp.bfloat16, pack=4)


def decode_float16(codes: Array, target: Target = HOST) -> Array:
    """float16 values of e4m3fn [...], exact.

    Pinned: Triton would bring the codes, byte by byte, into the order in which the units read float16.
    """
    if target == HOST:
        return codes.astype(jnp.float16)
    text = "{ .reg .b16 x, y; mov.b32 {x, y}, $2; cvt.rn.f16x2.e4m3x2 $0, x; cvt.rn.f16x2.e4m3x2 $1, y; }"
    return assembly(text, "=&r,=r,r", codes, dtype=jnp.float16, pack=4, pinned=True)
