"""Token sampling: greedy and nucleus rows, and that a row depends on nothing but itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mla_jax.serving.sampling import sample

jitted = jax.jit(sample)


def draw(logits, temperature=1.0, top_p=1.0, seeds=0, positions=0, function=jitted):
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    rows = len(logits)
    return np.asarray(
        function(
            logits,
            np.full(rows, temperature, np.float32),
            np.full(rows, top_p, np.float32),
            np.broadcast_to(np.asarray(seeds, np.uint32), rows),
            np.broadcast_to(np.asarray(positions, np.int32), rows),
        )
    )


def test_greedy_takes_the_first_of_the_largest():
    logits = [[0, 3, 3, 1], [5, -1, 2, 5], [-np.inf, -np.inf, -7, -np.inf], [np.nan, 1, np.inf, 2]]
    np.testing.assert_array_equal(draw(logits, temperature=0.0), [1, 0, 2, 2])
    np.testing.assert_array_equal(draw(logits, temperature=-1.0), [1, 0, 2, 2])


def test_greedy_and_sampled_rows_share_a_batch():
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)
    seeds, positions = np.arange(4, dtype=np.uint32), np.arange(4, dtype=np.int32)
    temperature = np.array([0, 1, 0, 2], np.float32)
    mixed = np.asarray(jitted(logits, temperature, np.ones(4, np.float32), seeds, positions))
    assert mixed.dtype == np.int32
    np.testing.assert_array_equal(mixed[[0, 2]], logits.argmax(-1)[[0, 2]])
    for row in (1, 3):
        alone = draw(logits[row], temperature[row], seeds=row, positions=row)
        assert mixed[row] == alone[0]


def test_a_row_depends_on_its_own_seed_and_position_only():
    logits = np.random.default_rng(1).normal(size=(8, 100)).astype(np.float32)
    seeds, positions = np.arange(8) * 7, np.arange(8) + 3
    tokens = draw(logits, seeds=seeds, positions=positions)
    order = np.random.default_rng(2).permutation(8)
    np.testing.assert_array_equal(draw(logits[order], seeds=seeds[order], positions=positions[order]), tokens[order])
    np.testing.assert_array_equal(draw(logits[:3], seeds=seeds[:3], positions=positions[:3]), tokens[:3])
    np.testing.assert_array_equal(draw(logits, seeds=seeds, positions=positions), tokens)
    same = np.repeat(logits[:1], 64, axis=0)
    assert len(set(draw(same, seeds=5, positions=np.arange(64)).tolist())) > 10
    assert len(set(draw(same, seeds=np.arange(64), positions=5).tolist())) > 10
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw(logits, seeds=seeds, positions=positions, function=sample), tokens)


def test_frequencies_follow_the_softmax_at_the_temperature():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    rows = 20000
    for temperature in (1.0, 2.0):
        tokens = draw(np.tile(logits, (rows, 1)), temperature=temperature, seeds=11, positions=np.arange(rows))
        wanted = probabilities ** (1 / temperature)
        wanted /= wanted.sum()
        np.testing.assert_allclose(np.bincount(tokens, minlength=4) / rows, wanted, atol=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {2}), (-1.0, {2}), (0.4, {2}), (0.55, {2, 0}), (0.9, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    logits = np.log(np.array([0.3, 0.05, 0.5, 0.15], np.float32))
    tokens = draw(np.tile(logits, (2000, 1)), top_p=top_p, seeds=np.arange(2000))
    assert set(tokens.tolist()) == kept


def test_tiny_temperature_and_extreme_logits():
    logits = np.array([[1, 2, 1.999], [3e38, -3e38, 0], [np.inf, 0, np.nan]], np.float32)
    np.testing.assert_array_equal(draw(logits, temperature=1e-30), [1, 0, 0])
    assert draw([[-np.inf, -np.inf]], temperature=1.0)[0] in (0, 1)
    tokens = draw(np.tile(np.array([-np.inf, 0, -np.inf, 0, np.nan], np.float32), (200, 1)), seeds=np.arange(200))
    assert set(tokens.tolist()) == {1, 3}


@pytest.mark.parametrize("temperature", [2.0**126, 1e38, 3e38, np.inf])
def test_huge_temperatures(temperature):
    """Every finite logit is as probable as any other, and the nucleus is that of the logits."""
    rows = np.array([[1, 2, 3, 2.5], [-np.inf, 0, -np.inf, np.nan], [5, -np.inf, 4, np.nan], [3e38, -3e38, 0, 0]])
    logits = np.repeat(rows.astype(np.float32), 1000, axis=0)
    tokens = draw(logits, temperature, seeds=np.arange(4000)).reshape(4, 1000)
    np.testing.assert_allclose(np.bincount(tokens[0], minlength=4) / 1000, 0.25, atol=0.05)
    assert [set(row.tolist()) for row in tokens[1:3]] == [{1}, {0, 2}]
    # Differences as large as the temperature count: e^-3.5 and e^-7.
    share = np.bincount(tokens[3], minlength=4) / 1000
    assert 0.9 < share[0] < 1 and share[2] + share[3] > 0.01
    assert set(draw(logits, temperature, top_p=0.4, seeds=np.arange(4000))[:1000].tolist()) == {2, 3}
    np.testing.assert_array_equal(draw(logits, temperature, top_p=0.0)[::1000], [2, 1, 0, 0])


@pytest.mark.parametrize("temperature", [np.nan, -np.inf, -0.0, 1e-45, 1e-39])
def test_temperatures_that_are_greedy(temperature):
    np.testing.assert_array_equal(draw([[1, 3, 3], [np.nan, -np.inf, -2]], temperature, seeds=7), [1, 2])


@pytest.mark.parametrize(("top_p", "kept"), [(np.nan, {2}), (-np.inf, {2}), (1e-45, {2}), (np.inf, {0, 1, 2})])
def test_extreme_top_p(top_p, kept):
    tokens = draw(np.tile(np.array([1.0, 0.5, 1.5], np.float32), (300, 1)), top_p=top_p, seeds=np.arange(300))
    assert set(tokens.tolist()) == kept


def test_numbers_of_other_types():
    """float64 beyond float32, and integers of 64 bits: no warning, and the row of its float32 and int32."""
    logits = np.random.default_rng(5).normal(size=(3, 9)).astype(np.float32)
    options = np.array([1e300, 1.0, 1e-300]), np.ones(3), np.arange(3), np.arange(3, dtype=np.int64)
    tokens = jax.jit(lambda logits: sample(logits, *options))(logits)
    assert tokens.dtype == jnp.int32
    expected = draw(logits, seeds=np.arange(3), positions=np.arange(3))[1]
    assert int(tokens[1]) == expected and int(tokens[2]) == logits[2].argmax()


def test_one_token_vocabulary_no_rows_and_bfloat16():
    assert draw([[4.0]], temperature=1.0).tolist() == [0]
    empty = sample(
        jnp.zeros((0, 5), jnp.float32),
        jnp.zeros(0, jnp.float32),
        jnp.zeros(0, jnp.float32),
        jnp.zeros(0, jnp.uint32),
        jnp.zeros(0, jnp.int32),
    )
    assert empty.shape == (0,) and empty.dtype == jnp.int32
    low = jitted(
        jnp.array([[0, 9, 3]], jnp.bfloat16), *(np.zeros(1, t) for t in (np.float32, np.float32, np.uint32, np.int32))
    )
    assert low.tolist() == [1]


def test_largest_seed():
    assert draw(np.zeros((1, 9)), seeds=np.uint32(2**32 - 1), positions=2**31 - 1)[0] in range(9)


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_bad_logits(shape):
    with pytest.raises(ValueError, match="logits has shape"):
        sample(jnp.zeros(shape, jnp.float32), *(jnp.zeros(shape[:1], jnp.float32) for _ in range(4)))


@pytest.mark.parametrize("position", range(4))
def test_bad_parameters(position):
    arrays = [jnp.zeros(2, jnp.float32) for _ in range(4)]
    arrays[position] = jnp.zeros(3, jnp.float32)
    with pytest.raises(ValueError, match=r"has shape \(3,\); one value per row of logits is expected, so \(2,\)"):
        sample(jnp.zeros((2, 5), jnp.float32), *arrays)


@settings(deadline=None, max_examples=30, database=None)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=6, max_size=6),
    st.floats(0.05, 1),
    st.integers(0, 2**31 - 1),
)
def test_the_token_is_in_the_nucleus(logits, top_p, seed):
    token = int(draw(logits, top_p=top_p, seeds=seed)[0])
    probabilities = np.exp(np.array(logits)) / np.exp(np.array(logits)).sum()
    order = np.argsort(-probabilities, kind="stable")
    rank = order.tolist().index(token)
    assert probabilities[order[:rank]].sum() < top_p + 1e-6
