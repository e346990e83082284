"""fp8: every code, every rounding, and what may never be written, against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mla_jax.ops import fp8

FLAVOURS = [jnp.float8_e4m3fnuz, jnp.float8_e4m3fn]
NUMPY = {jnp.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz, jnp.float8_e4m3fn: ml_dtypes.float8_e4m3fn}
CODES = np.arange(256, dtype=np.uint8)
SCALES = [jnp.float32, jnp.float8_e8m0fnu]

flavours = pytest.mark.parametrize("dtype", FLAVOURS, ids=lambda d: d.__name__)
scale_dtypes = pytest.mark.parametrize("scale_dtype", SCALES, ids=lambda d: d.__name__)


def codes_of(values):
    return np.asarray(values).view(np.uint8)


def writable(dtype):
    """The codes that quantize can write: all but NaN, -0 and what lies above fp8_max."""
    values = CODES.view(NUMPY[dtype]).astype(np.float32)
    return CODES[(np.abs(values) <= fp8.fp8_max(dtype)) & (CODES != 0x80)]


def quantize_scaled(x, dtype):
    """Codes of x[N] under a scale of exactly 1: a group that holds fp8_max besides the value."""
    rows = np.stack([x, np.full_like(x, fp8.fp8_max(dtype))], -1)
    values, scales = jax.jit(lambda r: fp8.quantize(r, group_size=2, dtype=dtype))(rows)
    assert np.all(np.asarray(scales) == 1.0)
    return codes_of(values)[:, 0]


@flavours
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_decodes_all_codes_exactly(dtype, jit):
    expected = CODES.view(NUMPY[dtype]).astype(np.float32)
    decode = lambda values: fp8.dequantize(values, jnp.ones((256,), jnp.float32), group_size=1, dtype=jnp.float32)  # noqa: E731
    got = np.asarray((jax.jit(decode) if jit else decode)(jnp.asarray(CODES.view(NUMPY[dtype]))))
    np.testing.assert_array_equal(got, expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(got[finite]), np.signbit(expected[finite]))


@flavours
def test_rounds_every_boundary_to_nearest_even(dtype):
    values = np.sort(writable(dtype).view(NUMPY[dtype]).astype(np.float32))
    middles = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([values, middles, np.nextafter(middles, -np.inf), np.nextafter(middles, np.inf)])
    got, expected = quantize_scaled(edges.astype(np.float32), dtype), edges.astype(np.float32).astype(NUMPY[dtype])
    expected = np.where(expected.astype(np.float32) == 0, np.uint8(0), expected.view(np.uint8))
    np.testing.assert_array_equal(got, expected)


@flavours
def test_rounds_random_values_as_ml_dtypes_does(dtype):
    rng = np.random.default_rng(0)
    x = np.exp2(rng.uniform(-16, np.log2(fp8.fp8_max(dtype)), 200_000)) * rng.choice([-1, 1], 200_000)
    x = np.concatenate([x.astype(np.float32), np.array([0.0, -0.0, 1e-30, -1e-30, 1e-42, -1e-42], np.float32)])
    expected = x.astype(NUMPY[dtype]).view(np.uint8)
    np.testing.assert_array_equal(quantize_scaled(x, dtype), np.where(expected == 0x80, 0, expected))


@flavours
@given(data=st.data())
@settings(deadline=None, max_examples=30, database=None)
def test_whole_quantisation_matches_numpy(dtype, data):
    # One of few shapes, since each is a compilation.
    groups, group_size = data.draw(st.sampled_from([(1, 1), (3, 4), (2, 7)]))
    number = (
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
        | st.floats(-1, 1, width=32, allow_subnormal=False)
        | st.sampled_from([0.0, -0.0, 1e-5])
    )
    x = np.float32(data.draw(st.lists(number, min_size=groups * group_size, max_size=groups * group_size)))
    values, scales = jax.jit(fp8.quantize, static_argnames=("group_size", "dtype"))(
        x, group_size=group_size, dtype=dtype
    )
    flush = lambda a: np.where(np.abs(a) < np.finfo(np.float32).tiny, np.float32(0), a)  # noqa: E731
    grouped = flush(x).reshape(groups, group_size)
    amax = np.maximum(np.abs(grouped).max(-1), np.float32(1e-4))
    expected_scale = amax / np.float32(fp8.fp8_max(dtype))
    largest = np.float32(fp8.fp8_max(dtype))
    expected = flush(np.clip(grouped / expected_scale[:, None], -largest, largest)).astype(NUMPY[dtype])
    expected = np.where(expected.view(np.uint8) == 0x80, 0, expected.view(np.uint8))
    np.testing.assert_array_equal(np.asarray(scales), expected_scale)
    np.testing.assert_array_equal(codes_of(values), expected.reshape(-1))


@flavours
def test_eager_and_jit_give_the_same_bits(dtype):
    x = jax.random.normal(jax.random.key(3), (64, 8), jnp.float32) * 3
    eager = fp8.quantize(x, group_size=8, dtype=dtype)
    jitted = jax.jit(lambda x: fp8.quantize(x, group_size=8, dtype=dtype))(x)
    amax = np.abs(np.asarray(x)).max(-1, keepdims=True)
    for values, scales in (eager, jitted):
        np.testing.assert_array_equal(np.asarray(scales), amax / np.float32(fp8.fp8_max(dtype)))
        np.testing.assert_array_equal(codes_of(values), codes_of(eager[0]))


@flavours
@scale_dtypes
def test_never_writes_minus_zero_or_nan(dtype, scale_dtype):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, (4096, 8), dtype=np.uint32).view(np.float32)
    x[:8] = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38, -3.4028e38, 1e-45], np.float32)[:, None]
    values, scales = jax.jit(lambda x: fp8.quantize(x, group_size=4, dtype=dtype, scale_dtype=scale_dtype))(x)
    assert not np.isin(codes_of(values), np.setdiff1d(CODES, writable(dtype))).any()
    for out in (jnp.float32, jnp.bfloat16):
        back = np.asarray(fp8.dequantize(values, scales, group_size=4, dtype=out)).astype(np.float32)
        assert np.isfinite(back).all()
    assert (codes_of(values)[0] == 0).all() and (codes_of(values)[3:5] == 0).all()


@flavours
@scale_dtypes
def test_nan_counts_as_zero_and_infinity_saturates(dtype, scale_dtype):
    x = jnp.asarray([[jnp.nan, 1.0, -1.0, 0.5], [jnp.inf, -jnp.inf, 1e38, jnp.nan]])
    values, scales = jax.jit(lambda x: fp8.quantize(x, group_size=4, dtype=dtype, scale_dtype=scale_dtype))(x)
    back = np.asarray(fp8.dequantize(values, scales, group_size=4, dtype=jnp.float32))
    np.testing.assert_allclose(back[0], [0, 1, -1, 0.5], rtol=1e-6)
    np.testing.assert_array_equal(back[1, [0, 1, 3]], np.array([fp8.SATURATION, -fp8.SATURATION, 0], np.float32))


@flavours
def test_power_of_two_scales_are_the_least_that_fit(dtype):
    largest = fp8.fp8_max(dtype)
    exact = np.float32(largest) * np.exp2(np.arange(-20, 100)).astype(np.float32)
    amax = np.concatenate([exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    values, scales = jax.jit(lambda x: fp8.quantize(x, group_size=1, dtype=dtype, scale_dtype=jnp.float8_e8m0fnu))(
        amax[:, None]
    )
    assert scales.dtype == jnp.float8_e8m0fnu
    got = np.asarray(scales).astype(np.float64)[:, 0]
    expected = np.exp2(np.ceil(np.log2(amax.astype(np.float64) / largest)))
    np.testing.assert_array_equal(got, expected)
    assert (codes_of(values)[: len(exact), 0] == 0x7E).all()  # amax itself is exact


@flavours
def test_amax_floor(dtype):
    for scale_dtype, expected in [
        (jnp.float32, 1e-4 / fp8.fp8_max(dtype)),
        (jnp.float8_e8m0fnu, 2.0 ** -(22 - (dtype == FLAVOURS[0]))),
    ]:
        _, scales = fp8.quantize(jnp.zeros((2, 8), jnp.float32), group_size=8, dtype=dtype, scale_dtype=scale_dtype)
        np.testing.assert_allclose(np.asarray(scales).astype(np.float32), expected, rtol=1e-7)


@flavours
@scale_dtypes
def test_reinterpret_is_exact_for_every_code_that_is_written(dtype, scale_dtype):
    other = FLAVOURS[1 - FLAVOURS.index(dtype)]
    values = jnp.asarray(writable(dtype).view(NUMPY[dtype]))[:, None]
    scales = np.full(values.shape, 1e-4 / 448, np.float32)
    scales[1::3], scales[2::3] = 3.7, 1e30
    if scale_dtype == jnp.float8_e8m0fnu:
        scales = np.resize(np.array([105, 127, 230], np.uint8), len(values))[:, None].view(ml_dtypes.float8_e8m0fnu)
    before = np.asarray(fp8.dequantize(values, jnp.asarray(scales), group_size=1, dtype=jnp.float32))
    moved, moved_scales = jax.jit(lambda v, s: fp8.reinterpret(v, s, other))(values, scales)
    assert moved.dtype == other and moved_scales.dtype == scale_dtype
    np.testing.assert_array_equal(codes_of(moved), codes_of(values))
    after = np.asarray(fp8.dequantize(moved, moved_scales, group_size=1, dtype=jnp.float32))
    np.testing.assert_array_equal(after, before)
    back, back_scales = fp8.reinterpret(moved, moved_scales, dtype)
    np.testing.assert_array_equal(codes_of(back), codes_of(values))
    np.testing.assert_array_equal(np.asarray(back_scales).astype(np.float32), scales.astype(np.float32))
    same, same_scales = fp8.reinterpret(values, moved_scales, dtype)
    assert same is values and same_scales is moved_scales


def test_reinterpret_keeps_strange_e8m0_scales_in_range():
    scales = jnp.asarray(np.array([0, 1, 254, 255], np.uint8).view(ml_dtypes.float8_e8m0fnu))
    up = codes_of(fp8.reinterpret_scales(scales, jnp.float8_e4m3fn, jnp.float8_e4m3fnuz))
    down = codes_of(fp8.reinterpret_scales(scales, jnp.float8_e4m3fnuz, jnp.float8_e4m3fn))
    assert up.tolist() == [1, 2, 254, 255] and down.tolist() == [0, 0, 253, 255]


def test_e8m0_scales_decode_exactly():
    expected = CODES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = np.asarray(jax.jit(fp8.scales_to_float32)(CODES.view(ml_dtypes.float8_e8m0fnu)))
    np.testing.assert_array_equal(got[1:], expected[1:])
    assert got[0] in (0, expected[0])


@flavours
def test_words_are_little_endian(dtype):
    codes = np.random.default_rng(2).integers(0, 256, (3, 5, 12), dtype=np.uint8)
    words = jax.jit(fp8.pack_words)(codes.view(NUMPY[dtype]))
    np.testing.assert_array_equal(np.asarray(words), codes.view("<u4"))
    np.testing.assert_array_equal(codes_of(jax.jit(lambda w: fp8.unpack_words(w, dtype))(words)), codes)
    assert fp8.unpack_words(words, dtype).dtype == dtype


@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_shapes_types_and_relative_error(x_dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 18)).astype(x_dtype)
    for dtype in FLAVOURS:
        values, scales = jax.jit(fp8.quantize, static_argnames=("group_size", "dtype"))(x, group_size=6, dtype=dtype)
        assert values.shape == x.shape and values.dtype == dtype
        assert scales.shape == (2, 3, 3) and scales.dtype == jnp.float32
        back = fp8.dequantize(values, scales, group_size=6)
        assert back.dtype == jnp.bfloat16
        error = np.abs(np.asarray(back, np.float32) - np.asarray(x, np.float32))
        amax = np.abs(np.asarray(x, np.float32)).reshape(2, 3, 3, 6).max(-1).repeat(6, -1)
        assert (error <= amax / 16 * 1.01).all()


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
def test_empty(shape):
    values, scales = fp8.quantize(jnp.zeros(shape, jnp.float32), group_size=4)
    assert values.shape == shape and scales.shape == (*shape[:-1], shape[-1] // 4)
    assert fp8.dequantize(values, scales, group_size=4).shape == shape


def test_abstract_and_vmap():
    out = jax.eval_shape(lambda x: fp8.quantize(x, group_size=4), jax.ShapeDtypeStruct((3, 8), jnp.bfloat16))
    assert out[0].shape == (3, 8) and out[1].shape == (3, 2)
    x = jax.random.normal(jax.random.key(1), (3, 8))
    whole = jax.jit(lambda x: fp8.quantize(x, group_size=4))
    batched = jax.jit(jax.vmap(lambda row: fp8.quantize(row, group_size=4)))(x)
    np.testing.assert_array_equal(codes_of(batched[0]), codes_of(whole(x)[0]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fp8.quantize(jnp.ones((2, 6), jnp.float32), group_size=4), "group_size is 4"),
        (lambda: fp8.quantize(jnp.ones((2, 6), jnp.float32), group_size=0), "group_size is 0"),
        (
            lambda: fp8.quantize(jnp.ones((2, 6), jnp.float32), group_size=1.5),  # type: ignore[arg-type]
            "group_size is 1.5",
        ),
        (lambda: fp8.quantize(jnp.ones((2, 6), jnp.int32), group_size=2), "x is int32"),
        (lambda: fp8.quantize(jnp.float32(1), group_size=1), r"x is float32\[\]"),
        (lambda: fp8.quantize(jnp.ones((2, 6), jnp.float32), group_size=2, dtype=jnp.float8_e5m2), "float8_e5m2"),
        (
            lambda: fp8.quantize(jnp.ones((2, 6), jnp.float32), group_size=2, scale_dtype=jnp.bfloat16),
            "scale_dtype is bfloat16",
        ),
        (
            lambda: fp8.dequantize(jnp.ones((2, 4), jnp.float32), jnp.ones((2, 1), jnp.float32), group_size=4),
            "values is float32",
        ),
        (
            lambda: fp8.dequantize(jnp.ones((2, 4), FLAVOURS[0]), jnp.ones((2, 2), jnp.float32), group_size=4),
            r"scales is float32\[2, 2\]; expected float32 or float8_e8m0fnu \[2, 1\]",
        ),
        (lambda: fp8.scales_to_float32(jnp.ones((4,), jnp.bfloat16)), "scales is bfloat16"),
        (lambda: fp8.reinterpret(jnp.ones((4,), FLAVOURS[0]), jnp.ones((1,), jnp.float32), jnp.int8), "int8"),
        (lambda: fp8.pack_words(jnp.ones((6,), FLAVOURS[0])), "multiple of 4"),
        (lambda: fp8.unpack_words(jnp.ones((6,), jnp.int32), FLAVOURS[0]), "words is int32"),
        (lambda: fp8.fp8_max(jnp.float32), "float32"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- division --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_division_corrects_two_units(off):
    rng = np.random.default_rng(0)
    a = (rng.standard_normal(100_000) * np.exp(rng.uniform(-40, 40, 100_000))).astype(np.float32)
    b = np.exp(rng.uniform(-15, 45, a.size)).astype(np.float32)
    # Significands beside powers of two, on both sides; equal ones; zeros and a subnormal.
    near = rng.integers(-3, 4, (2, 1000)) + 0x3F800000
    a[:1000], b[:1000] = near.astype(np.int32).view(np.float32)
    a[1000:2000] = 3 * b[1000:2000]
    a[2000:2003] = 0, -0.0, 1e-45
    # Quotients at the lower end of the normal range.
    a[2003:2006], b[2003:2006] = np.float32([1, -1.5, 0.75]) * np.float32(2.0**-126) * 4, 4
    a[2006:2008], b[2006:2008] = np.float32(2.0**-125) * np.float32([1, 3]), 2
    want = a / b
    want = np.where(np.abs(want) < 2.0**-126, np.copysign(np.float32(0), want), want)

    def divide(x, y):
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x / y, jnp.int32) + off, jnp.float32)

    got = np.asarray(jax.jit(lambda a, b: fp8.divide_bits(a, b, divide))(a, b))
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))
