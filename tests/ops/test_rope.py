"""rope: frequencies against the formula written out here, rotation against complex numbers in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mla_jax import reference
from sparse_mla_jax.config import DEEPSEEK_V32, RopeConfig
from sparse_mla_jax.ops.rope import rope_frequencies, rotate

YARN = DEEPSEEK_V32.rope
CONFIGS = [
    YARN,
    RopeConfig(),
    RopeConfig(theta=160000.0, factor=16.0, original_max_position=65536),
    RopeConfig(factor=4.0, original_max_position=64, beta_fast=4.0),
    RopeConfig(theta=500.0, factor=2.0, original_max_position=7, beta_slow=2.0),
]
pairings = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half-split"])


def formula(rope, dim):
    """One pair at a time, in Python floats."""
    base = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
    if rope.factor == 1:
        return np.array(base)

    def c(r):
        return dim * math.log(rope.original_max_position / (2 * math.pi * r)) / (2 * math.log(rope.theta))

    low, high = max(math.floor(c(rope.beta_fast)), 0), min(math.ceil(c(rope.beta_slow)), dim - 1)
    out = []
    for i, b in enumerate(base):
        ramp = min(max((i - low) / (high - low or 0.001), 0), 1)
        out.append(b * (1 - ramp) + b / rope.factor * ramp)
    return np.array(out)


@pytest.mark.parametrize("rope", CONFIGS, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 16, 64])
def test_frequencies_are_the_formula_rounded_once(rope, dim):
    got = rope_frequencies(rope, dim)
    assert got.dtype == np.float32 and got.shape == (dim // 2,)
    np.testing.assert_allclose(got, formula(rope, dim), rtol=2**-24, atol=0)


def test_published_sizes_keep_the_fast_pairs_and_slow_the_others_by_forty():
    got, plain = rope_frequencies(YARN, 64).astype(np.float64), 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(got[:11], plain[:11], rtol=1e-7)
    np.testing.assert_allclose(got[23:], plain[23:] / 40, rtol=1e-7)
    assert np.all(got[11:23] < plain[11:23]) and np.all(got[11:23] > plain[11:23] / 40)


def test_frequencies_do_not_share_memory_between_calls():
    first = rope_frequencies(YARN, 8)
    first[:] = 0
    assert np.all(rope_frequencies(YARN, 8) > 0)


@pairings
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (5, 3, 8), (0, 3, 8), (5, 6, 64)], ids=str)
def test_rotation_is_a_complex_product(interleaved, inverse, shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    positions = np.array([0, 1, 63, 1000, 163839], np.int32)[: shape[0]]
    frequencies = rope_frequencies(YARN, shape[-1])
    angles = positions.astype(np.float64)[:, None] * frequencies.astype(np.float64)
    angles = angles.reshape(len(positions), *(1,) * (len(shape) - 2), shape[-1] // 2)
    want = reference.rotate(x, angles, interleaved=interleaved, inverse=inverse)
    got = jax.jit(lambda x, p: rotate(x, p, frequencies, interleaved=interleaved, inverse=inverse))(x, positions)
    assert got.shape == shape and got.dtype == jnp.float32
    # A float32 angle is off by at most half a unit in its last place; the rest is rounding of products.
    slack = np.repeat(angles, 2, -1).max(-1, keepdims=True, initial=0) * 2**-24 + 3 * 2**-24
    assert np.all(np.abs(np.asarray(got) - want) <= 2 * np.abs(x).max(initial=0) * slack)


@pairings
def test_one_pair_by_hand(interleaved):
    x = jnp.array([[3.0, 5.0, 7.0, 11.0]])
    got = np.asarray(rotate(x, jnp.array([2]), np.array([0.25, 0.5], np.float32), interleaved=interleaved))[0]
    c0, s0, c1, s1 = math.cos(0.5), math.sin(0.5), math.cos(1.0), math.sin(1.0)
    if interleaved:
        want = [3 * c0 - 5 * s0, 5 * c0 + 3 * s0, 7 * c1 - 11 * s1, 11 * c1 + 7 * s1]
    else:
        want = [3 * c0 - 7 * s0, 5 * c1 - 11 * s1, 7 * c0 + 3 * s0, 11 * c1 + 5 * s1]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pairings
@settings(max_examples=20, deadline=None, database=None)
@given(st.lists(st.integers(0, 2**20), min_size=4, max_size=4), st.integers(0, 2**31))
def test_inverse_undoes_and_scores_depend_on_distance_only(interleaved, positions, seed):
    x = np.random.default_rng(seed).standard_normal((4, 2, 16)).astype(np.float32)
    frequencies = rope_frequencies(RopeConfig(), 16)
    turned = rotate(x, jnp.array(positions), frequencies, interleaved=interleaved)
    back = rotate(turned, jnp.array(positions), frequencies, interleaved=interleaved, inverse=True)
    np.testing.assert_allclose(back, x, atol=2e-6)
    near = [rotate(x[:1], jnp.array([p]), frequencies, interleaved=interleaved) for p in (40, 10)]
    far = [rotate(x[:1], jnp.array([p]), frequencies, interleaved=interleaved) for p in (1040, 1010)]
    np.testing.assert_allclose(jnp.vdot(near[0], near[1]), jnp.vdot(far[0], far[1]), atol=5e-3)


def test_position_zero_is_the_identity_and_bfloat16_rounds_once():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2, 8)), jnp.bfloat16)
    frequencies = rope_frequencies(YARN, 8)
    assert np.array_equal(rotate(x, jnp.zeros(3, jnp.int32), frequencies, interleaved=True), x)
    positions = jnp.array([3, 500, 9000])
    got = rotate(x, positions, frequencies, interleaved=True)
    wide = rotate(x.astype(jnp.float32), positions, frequencies, interleaved=True)
    assert got.dtype == jnp.bfloat16 and np.array_equal(got, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: rope_frequencies(YARN, 7), "dim is 7"),
        (lambda: rope_frequencies(YARN, 0), "dim is 0"),
        (
            lambda: rotate(jnp.ones((2, 8), jnp.float32), jnp.zeros(2, int), np.ones(8, np.float32), interleaved=True),
            "frequencies",
        ),
        (
            lambda: rotate(jnp.ones((2, 8), jnp.float32), jnp.zeros(3, int), np.ones(4, np.float32), interleaved=True),
            "positions",
        ),
        (
            lambda: rotate(
                jnp.ones((2, 8), jnp.float32), jnp.zeros(2, jnp.float32), np.ones(4, np.float32), interleaved=True
            ),
            "positions",
        ),
        (lambda: rotate(jnp.ones((2, 8), int), jnp.zeros(2, int), np.ones(4, np.float32), interleaved=True), "x is"),
    ],
)
def test_what_does_not_fit_is_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
