import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import Close, Operator, assert_leaves, assert_same_bits

from sparse_mla_jax import reference
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops.norm_rope import Section, norm_rope

FREQUENCIES = np.array([1.0, 0.3, 0.01], np.float32)
POSITIONS = np.array([0, 7, 163839], np.int32)


def vector(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def layer_parts(rng, dtype):
    """All kinds of parts, of awkward widths, with columns between them that nobody takes."""
    return (
        Section(0, 1, 21, dtype, weight=vector(rng, 21), eps=0.5),
        Section(22, 1, 24, "float32", weight=vector(rng, 24), bias=vector(rng, 24), rotated=2),
        Section(46, 5, 10, dtype, rotated=4, interleaved=True, gain=vector(rng, 3, 5)),
        Section(96, 3, 6, "float32", rotated=0),
        Section(114, 1, 3, "float32", scale=0.37),
    )


def expected(x, part, positions):
    """float64."""
    with jax.enable_x64(True):
        mine = np.asarray(x, np.float64)[:, part.start : part.start + part.columns]
        out = reference.norm_rope(
            jnp.asarray(mine.reshape(-1, part.heads, part.width)),
            part.weight,
            part.bias,
            # What is turned by is float32 by contract.
            jnp.asarray((positions.astype(np.float32)[:, None] * FREQUENCIES).astype(np.float64)),
            rotated=part.rotated,
            interleaved=part.interleaved,
            eps=1e-6 if part.eps is None else part.eps,
            dtype=jnp.float64,
        )
        gain = 1.0 if part.gain is None else np.asarray(part.gain, np.float64)[..., None]
        return np.asarray(out) * part.scale * gain


def finish(x, parts, positions, *, implementation=None):
    return norm_rope(x, parts, positions, FREQUENCIES, implementation=implementation)


run = Operator(finish, ("parts",), {}, name="norm_rope")


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_against_float64(dtype, implementation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 120)) * 3, dtype)
    parts = layer_parts(rng, dtype)
    want = [expected(x.astype(jnp.float32), part, POSITIONS) for part in parts]
    limits = [1e-6 if part.dtype == "float32" else 2**-8 for part in parts]
    rules = {"parts": [Close(rtol=limit, atol=limit * 4) for limit in limits]}
    got = run.check(implementation, want, x, parts, POSITIONS, rules=rules)
    assert all(a.dtype == part.dtype for a, part in zip(got, parts, strict=True))


def test_warm_calls_do_not_retrace(implementation):
    rng = np.random.default_rng(0)
    parts = layer_parts(rng, "float32")
    given = [(jnp.asarray(rng.normal(size=(3, 120)), jnp.float32), parts, POSITIONS + n) for n in np.int32([0, 1])]
    run.check_warm(implementation, *given)


@pytest.mark.parametrize(("dtype", "heads"), [("float8_e4m3fn", 3), ("float8_e4m3fnuz", 8)])
def test_fp8_is_quantised_per_token_and_head(dtype, heads, implementation):
    rng = np.random.default_rng(1)
    x, factor = jnp.asarray(rng.normal(size=(3, heads * 12 + 4)), jnp.bfloat16), vector(rng, 3, heads)
    # The gain turns the sign of some heads and leaves none of its scale in the factor.
    part = Section(4, heads, 12, dtype, rotated=0, factor=factor, gain=vector(rng, 3, heads))
    # Both in one call: the scales by themselves, and with a factor.
    both = run(x, [part, dataclasses.replace(part, factor=None)], POSITIONS, implementation=implementation)
    ((values, scales), (same_values, plain)) = both
    assert_same_bits(same_values, values)
    assert values.dtype == dtype and values.shape == (3, heads, 12) and scales.shape == (3, heads)
    want = expected(x.astype(jnp.float32), part, POSITIONS)
    _, want_scales = fp8.quantize(jnp.asarray(want, jnp.float32), group_size=12, dtype=dtype)
    assert_leaves(scales, want_scales[..., 0] * factor, Close(rtol=1e-6), "scales")
    assert_leaves(plain, want_scales[..., 0], Close(rtol=1e-6), "scales without a factor")
    got = np.asarray(values.astype(jnp.float32)) * np.asarray(scales / factor)[..., None]
    # Half a unit of three bits of mantissa, or of the smallest subnormal.
    assert_leaves(got, want, Close(atol=np.abs(want) / 15 + 2.0**-10 * np.asarray(want_scales)), "values")


def test_rows_do_not_see_each_other(implementation):
    rng = np.random.default_rng(2)
    x = np.asarray(rng.normal(size=(3, 120)), np.float32)
    parts = layer_parts(rng, "float32")
    alone = run(x, parts, POSITIONS, implementation=implementation)
    x[1] = np.nan
    both = run(x, parts, POSITIONS, implementation=implementation), alone
    others = [jax.tree.map(lambda a: np.asarray(a)[[0, 2]], result) for result in both]
    assert_same_bits(*others, run.label(implementation))


def test_nothing_to_do():
    part = Section(0, 2, 6, "float8_e4m3fn", rotated=0)
    (values, scales), plain = norm_rope(
        jnp.zeros((0, 12), jnp.float32), [part, Section(0, 1, 12, "bfloat16")], jnp.zeros(0, jnp.int32), FREQUENCIES
    )
    assert values.shape == (0, 2, 6) and scales.shape == (0, 2) and plain.shape == (0, 1, 12)
    assert norm_rope(jnp.zeros((2, 12), jnp.float32), [], jnp.zeros(2, jnp.int32), FREQUENCIES) == []


def test_gradients_of_the_xla_body():
    part = Section(0, 2, 6, "float32", weight=jnp.ones(6, jnp.float32), rotated=0)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 12)), jnp.float32)
    grad = jax.grad(lambda x: finish(x, [part], POSITIONS, implementation="xla")[0][..., 0].sum())(x)
    assert np.isfinite(grad).all() and np.any(grad)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Section(3, 2, 5, "float32"), "parts.0. takes 2 heads of 5 columns from 3 on; x has 12"),
        (Section(0, 1, 12, "float16"), "parts.0. is to be float16"),
        (Section(0, 2, 6, "float32", rotated=1), "rotated from column 1 on; 3 frequencies turn 6 of 6"),
        (Section(0, 2, 6, "float32", bias=jnp.ones(6, jnp.float32)), "a bias and no weight"),
        (
            Section(0, 2, 6, "float32", weight=jnp.ones(12, jnp.float32)),
            r"weight is float32\[12\]; expected floating values \[6\]",
        ),
        (
            Section(0, 2, 6, "float32", factor=jnp.ones((2, 2), jnp.float32)),
            "a factor belongs to the scales of an FP8 part",
        ),
        (Section(0, 2, 6, "float32", gain=jnp.ones((3, 2), jnp.float32)), r"gain is float32\[3, 2\]; .* \[2, 2\]"),
        (Section(0, 2, 6, "float32", eps=1e-5), "eps 1e-05 and no weight"),
        (
            Section(0, 2, 6, "float32", weight=jnp.ones(6, jnp.float32), eps=-1),
            "eps -1 and a weight; expected a number",
        ),
    ],
)
def test_bad_parts(part, message):
    with pytest.raises(ValueError, match=message):
        norm_rope(jnp.zeros((2, 12), jnp.float32), [part], jnp.zeros(2, jnp.int32), FREQUENCIES)


def test_bad_arguments():
    part = [Section(0, 2, 6, "float32")]
    for change, message in (
        ({"x": jnp.zeros((2, 3, 4), jnp.float32)}, "x is float32"),
        ({"x": jnp.zeros((2, 12), jnp.float16)}, "x is float16"),
        ({"positions": jnp.zeros(3, jnp.int32)}, "positions is int32"),
        ({"frequencies": np.ones((2, 2))}, "frequencies is float32"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ):
        given = {
            "x": jnp.zeros((2, 12), jnp.float32),
            "positions": jnp.zeros(2, jnp.int32),
            "frequencies": FREQUENCIES,
        } | change
        with pytest.raises(ValueError, match=message):
            norm_rope(given.pop("x"), part, given.pop("positions"), given.pop("frequencies"), **given)
