"""Exact FP8 decoding on bit patterns: all 256 codes against ml_dtypes, through jit (where a CPU flushes subnormals)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fp8_bits

FLAVOURS = [jnp.float8_e4m3fn, jnp.float8_e4m3fnuz]
CODES = np.arange(256, dtype=np.uint8)


def numbers(dtype):
    """Codes that are numbers, and their float32 values."""
    values = CODES.view(jnp.dtype(dtype)).astype(np.float32)
    return CODES[~np.isnan(values)], values[~np.isnan(values)]


@pytest.mark.parametrize("dtype", FLAVOURS)
@pytest.mark.parametrize("container", [np.uint8, np.uint16, np.int32, np.uint32])
def test_float32_of_every_number(dtype, container):
    codes, values = numbers(dtype)
    out = jax.jit(lambda x: fp8_bits.decode_float32(x, dtype))(codes.astype(container))
    np.testing.assert_array_equal(np.asarray(out).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("dtype", FLAVOURS)
def test_bfloat16_of_every_number(dtype):
    codes, values = numbers(dtype)
    out = jax.jit(lambda x: fp8_bits.decode_bfloat16(x, dtype))(codes)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out).astype(np.float32).view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("dtype", FLAVOURS)
def test_nan_codes_are_told_apart_and_decode_to_finite_numbers(dtype):
    expected = np.isnan(CODES.view(jnp.dtype(dtype)).astype(np.float32))
    np.testing.assert_array_equal(np.asarray(fp8_bits.is_nan(CODES, dtype)), expected)
    assert np.isfinite(np.asarray(fp8_bits.decode_float32(CODES, dtype))).all()


def test_one_byte_serves_both_flavours():
    codes, _ = numbers(jnp.float8_e4m3fn)
    as_fn, as_fnuz = (np.asarray(fp8_bits.decode_float32(codes, d)) for d in FLAVOURS)
    np.testing.assert_array_equal(as_fn, 2 * as_fnuz)


def test_planes_are_little_endian():
    words = np.arange(32, dtype=np.uint8).view(np.uint32)
    for byte in range(4):
        np.testing.assert_array_equal(np.asarray(fp8_bits.plane(jnp.asarray(words), byte)), np.arange(byte, 32, 4))


def test_e8m0_is_a_power_of_two():
    codes = np.arange(1, 255, dtype=np.uint8)
    expected = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    np.testing.assert_array_equal(np.asarray(fp8_bits.e8m0_to_float32(jnp.asarray(codes))), expected)


def test_other_types_are_not_served():
    with pytest.raises(NotImplementedError, match="float8_e5m2"):
        fp8_bits.power(jnp.float8_e5m2)
