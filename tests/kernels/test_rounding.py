"""Bits of values before they are rounded: every NaN and subnormal as it is."""

import jax
import ml_dtypes
import numpy as np

from pallas_kernels.rounding import float32_bits

QUIET, INFINITY = 0x400000, 0x7F800000


def bits_of(x):
    return np.asarray(jax.jit(float32_bits)(x)).view(np.uint32)


def test_float32_bits_are_kept():
    """Signalling NaN (quiet bit clear), subnormals, both zeros and infinities among them."""
    special = [0, 1, 0x80000000, 0x007FFFFF, INFINITY, 0xFF800000, INFINITY + 1, 0xFFBFFFFF, 0x7FC00000, 0x3F800001]
    bits = np.concatenate([special, np.random.default_rng(0).integers(0, 2**32, 1000)]).astype(np.uint32)
    np.testing.assert_array_equal(bits_of(bits.view(np.float32)), bits)


def test_bfloat16_bits_are_the_upper_half():
    codes = np.arange(2**16, dtype=np.uint32)
    np.testing.assert_array_equal(bits_of(codes.astype(np.uint16).view(ml_dtypes.bfloat16)), codes << 16)


def test_float16_is_widened_exactly_and_its_nan_are_quiet():
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    got = bits_of(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], values[~nan].astype(np.float32).view(np.uint32))
    assert ((got[nan] & 0x7FFFFFFF) > INFINITY).all() and (got[nan] & QUIET).all()
