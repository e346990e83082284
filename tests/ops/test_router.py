"""router: against the reference and against a loop over tokens in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equivalence import Close, Operator, Same

from sparse_mla_jax import reference
from sparse_mla_jax.ops import router
from sparse_mla_jax.ops.router import biased_grouped_topk, hash_route, sqrt_softplus_topk

V32 = dict(num_groups=8, groups_kept=4, k=8, scale=2.5)
SMALL = dict(num_groups=3, groups_kept=2, k=4, scale=1.5)


def route_by(logits, bias, *, implementation="xla", **keywords):
    """The operator, which has one body, and its reference."""
    return (reference if implementation == "reference" else router).biased_grouped_topk(logits, bias, **keywords)


def route_by_share(logits, *, implementation="xla", **keywords):
    return (reference if implementation == "reference" else router).softmax_grouped_topk(logits, **keywords)


STATIC = ("num_groups", "groups_kept", "k", "scale", "renormalize", "excluded")
RULES = {"weights": Close(rtol=1e-6), "ids": Same()}
operator = Operator(route_by, ("weights", "ids"), RULES, static=STATIC, name="biased_grouped_topk")
route = functools.partial(operator, implementation="xla")
by_share = Operator(route_by_share, ("weights", "ids"), RULES, static=STATIC[:-1], name="softmax_grouped_topk")


def by_loop(logits, bias, *, renormalize=True, **sizes):
    """The biased router: scores as float32, so that ties are the same ties."""
    score = np.asarray(jax.nn.sigmoid(jnp.where(jnp.isnan(logits), -jnp.inf, jnp.asarray(logits, jnp.float32))))
    return grouped_by_loop(score, score + np.asarray(bias, np.float32), renormalize=renormalize, **sizes)


def grouped_by_loop(score, choice, *, num_groups, groups_kept, k, scale, renormalize=True, excluded=-np.inf):
    """One token at a time; the weights in float64."""
    size = score.shape[1] // num_groups
    weights, ids = np.zeros((len(score), k)), np.zeros((len(score), k), np.int32)
    for t in range(len(score)):
        worth = [np.float32(sum(sorted(choice[t, g * size : g * size + size])[-2:])) for g in range(num_groups)]
        kept = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:groups_kept]
        mine = [choice[t, e] if e // size in kept else excluded for e in range(score.shape[1])]
        ids[t] = sorted(range(score.shape[1]), key=lambda e: (-mine[e], e))[:k]
        weights[t] = score[t, ids[t]].astype(np.float64)
        total = weights[t].sum()
        weights[t] *= scale / (total if renormalize and total > 0 else 1)
    return weights, ids


def check(logits, bias, **sizes):
    """The body and the reference against the loop; gives what the body chose."""
    want = by_loop(logits, bias, **sizes)
    found = operator.check_all(want, logits, bias, implementations=("reference", "xla"), **sizes)
    weights, ids = found["xla"]
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
    return np.asarray(weights), np.asarray(ids)


def test_warm_calls_do_not_retrace():
    logits = np.random.default_rng(0).standard_normal((4, 21)).astype(np.float32)
    bias = np.zeros(21, np.float32)
    operator.check_warm("xla", (logits, bias), (-logits, bias + 1), **SMALL)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("experts", "sizes"),
    [
        (256, V32),
        (21, SMALL),
        (3, dict(SMALL, k=2)),
        (7, dict(num_groups=1, groups_kept=1, k=7, scale=1.0)),
        (1, dict(num_groups=1, groups_kept=1, k=1, scale=2.5)),
    ],
    ids=["v3.2", "three groups of seven", "groups of one", "one group, all chosen", "one expert"],
)
def test_equals_a_loop_over_tokens(experts, sizes, dtype, renormalize):
    rng = np.random.default_rng(experts)
    logits = jnp.asarray(rng.standard_normal((40, experts)) * 2, dtype)
    bias = jnp.asarray(rng.standard_normal(experts) * 0.2, jnp.float32)
    weights, ids = check(logits, bias, renormalize=renormalize, **sizes)
    assert all(len(set(row)) == sizes["k"] for row in ids)
    if renormalize:
        np.testing.assert_allclose(weights.sum(-1), sizes["scale"], rtol=1e-6)


@settings(max_examples=30, deadline=None, database=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, -1.0, 30.0, -1e4, np.inf, -np.inf, np.nan, 0.5]), min_size=42, max_size=42),
    st.lists(st.sampled_from([0.0, 0.25, -0.25, 8.0]), min_size=21, max_size=21),
)
def test_ties_and_extremes(logits, bias):
    check(np.array(logits, np.float32).reshape(2, 21), np.array(bias, np.float32), **SMALL)


def test_equal_logits_choose_the_lowest_groups_and_experts():
    weights, ids = check(np.zeros((2, 256), np.float32), np.zeros(256, np.float32), **V32)
    np.testing.assert_array_equal(ids, np.tile(np.arange(8), (2, 1)))
    np.testing.assert_allclose(weights, 2.5 / 8)


def test_two_good_experts_beat_one_great_one():
    logits = np.full((1, 21), -9.0, np.float32)
    logits[0, 3] = 9.0
    logits[0, [8, 9, 15, 16]] = 1.0
    _, ids = check(logits, np.zeros(21, np.float32), **SMALL)
    assert 3 not in ids


def test_bias_decides_but_does_not_weigh():
    logits = np.zeros((1, 4), np.float32)
    weights, ids = check(
        logits, np.array([0, 5, 0, 9], np.float32), num_groups=1, groups_kept=1, k=3, scale=3.0, renormalize=True
    )
    np.testing.assert_array_equal(ids, [[3, 1, 0]])
    np.testing.assert_allclose(weights, 1.0)


def test_experts_of_other_groups_with_a_finite_score():
    """A.X-K2: 0 instead of -inf wins against negative biased scores, and has weights of its own."""
    logits = np.array([[3, 2, -3, -4, -5, 1]], np.float32)
    bias = np.array([0, 0, -1, -1, -1, -1], np.float32)
    sizes = dict(num_groups=2, groups_kept=1, k=3, scale=2.0)
    _, ids = check(logits, bias, **sizes, excluded=0.0)
    np.testing.assert_array_equal(ids, [[0, 1, 3]])
    _, ids = check(logits, bias, **sizes)
    np.testing.assert_array_equal(ids, [[0, 1, 2]])


@pytest.mark.parametrize(
    ("experts", "sizes", "dtype", "renormalize"),
    [
        (128, dict(num_groups=1, groups_kept=1, k=4, scale=1.0), "bfloat16", True),
        (21, SMALL, "float32", True),
        (21, SMALL, "float32", False),
    ],
)
def test_softmax_of_all_experts(experts, sizes, dtype, renormalize):
    """Shares of all experts, also of those whose group is left out; large logits do not overflow."""
    logits = jnp.asarray(np.random.default_rng(experts).standard_normal((40, experts)) * 3 + 100, dtype)
    wide = np.asarray(logits.astype(jnp.float32), np.float64)
    share = np.exp(wide - wide.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    want = grouped_by_loop(share, share, renormalize=renormalize, **sizes)
    # float32 exponentials of arguments up to 20: 2**-24 of those is 1e-6.
    rules = {"weights": Close(rtol=4e-6)}
    how = dict(implementations=("reference", "xla"), rules=rules, renormalize=renormalize, **sizes)
    weights, ids = by_share.check_all(want, logits, **how)["xla"]
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
    assert route_by_share(logits[:0], **sizes)[0].shape == (0, sizes["k"])


def test_softmax_extremes():
    logits = np.full((4, 6), -np.inf, np.float32)
    logits[1], logits[2, [1, 4]], logits[3] = np.nan, np.inf, [np.nan, 1e4, -1e4, 1e4, -np.inf, 0]
    sizes = dict(num_groups=3, groups_kept=2, k=3, scale=1.5)
    weights, ids = (
        [[0, 0, 0], [0, 0, 0], [0.75, 0.75, 0], [0.75, 0.75, 0]],
        [[0, 1, 2], [0, 1, 2], [1, 4, 0], [1, 3, 0]],
    )
    want = np.array(weights), np.array(ids, np.int32)
    by_share.check_all(want, logits, implementations=("reference", "xla"), **sizes)


def test_bias_stays_float32_beside_bfloat16_logits():
    logits = jnp.zeros((1, 64), jnp.bfloat16)
    bias = np.float32(4.0) + np.arange(64, dtype=np.float32) * np.float32(1e-4)
    sizes = dict(num_groups=1, groups_kept=1, k=8, scale=1.0)
    _, ids = check(logits, bias, **sizes)
    np.testing.assert_array_equal(ids[0], np.arange(63, 55, -1))
    rounded = np.asarray(jnp.asarray(bias, jnp.bfloat16), np.float32)
    _, other = check(logits, rounded, **sizes)
    assert not np.array_equal(ids, other)
    with pytest.raises(ValueError, match="bias is bfloat16"):
        biased_grouped_topk(logits, jnp.asarray(bias, jnp.bfloat16), **sizes)


def test_nan_counts_as_score_zero_and_a_zero_sum_is_guarded():
    logits = np.full((2, 21), -np.inf, np.float32)
    logits[1] = np.nan
    weights, ids = check(logits, np.zeros(21, np.float32), **SMALL)
    assert np.all(weights == 0)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]] * 2)


def test_no_tokens():
    weights, ids = route(jnp.zeros((0, 21), jnp.float32), jnp.zeros(21, jnp.float32), **SMALL)
    assert weights.shape == ids.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(logits=jnp.zeros(21, jnp.float32)), "logits"),
        (dict(logits=jnp.zeros((2, 21), int)), "logits"),
        (dict(bias=jnp.zeros(20, jnp.float32)), "bias"),
        (dict(num_groups=4), "num_groups"),
        (dict(num_groups=0), "num_groups"),
        (dict(groups_kept=4), "groups_kept"),
        (dict(groups_kept=0), "groups_kept"),
        (dict(k=0), "k is 0"),
        (dict(k=15), "k is 15"),
    ],
)
def test_what_does_not_fit_is_named(change, name):
    arguments = dict(logits=jnp.zeros((2, 21), jnp.float32), bias=jnp.zeros(21, jnp.float32), **SMALL) | change
    with pytest.raises(ValueError, match=name):
        biased_grouped_topk(**arguments)


# --- DeepSeek-V4
V4 = dict(k=6, scale=1.5)


def v4_scores(logits):
    """float64 sqrt(softplus); NaN counts as -inf, infinity as the largest float32."""
    x = np.asarray(jnp.asarray(logits, jnp.float32), np.float64)
    return np.sqrt(np.logaddexp(np.minimum(np.where(np.isnan(x), -np.inf, x), np.finfo(np.float32).max), 0.0))


def v4_weights(logits, ids, scale, renormalize):
    chosen = np.take_along_axis(v4_scores(logits), np.asarray(ids), axis=-1)
    total = chosen.sum(-1, keepdims=True)
    return chosen * scale / (np.where(total > 0, total, 1) if renormalize else 1)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("experts", "sizes"), [(256, V4), (8, dict(k=3, scale=2.5)), (5, dict(k=5, scale=1.0))])
def test_sqrt_softplus_chooses_by_biased_score(experts, sizes, dtype, renormalize):
    rng = np.random.default_rng(experts)
    logits = jnp.asarray(rng.standard_normal((40, experts)) * 3, dtype)
    bias = jnp.asarray(rng.standard_normal(experts) * 0.3, jnp.float32)
    weights, ids = sqrt_softplus_topk(logits, bias, **sizes, renormalize=renormalize)
    assert weights.dtype == jnp.float32 and ids.dtype == jnp.int32
    for row, score in zip(np.asarray(ids), v4_scores(logits) + np.asarray(bias, np.float64)):
        assert len(set(row)) == sizes["k"]
        # Chosen in descending order, nothing left out that is larger (float32 rounds near-equal scores).
        assert np.all(np.diff(score[row]) <= 1e-6)
        assert np.delete(score, row).max(initial=-np.inf) <= score[row].min() + 1e-6
    np.testing.assert_allclose(weights, v4_weights(logits, ids, sizes["scale"], renormalize), rtol=2e-6)
    slow_weights, slow_ids = reference.sqrt_softplus_topk(logits, bias, **sizes, renormalize=renormalize)
    np.testing.assert_array_equal(ids, slow_ids)
    np.testing.assert_allclose(weights, slow_weights, rtol=2e-6)


def test_sqrt_softplus_extremes():
    logits = np.array([[np.nan, -np.inf, -1e4, 0.0, 20.0, 1e4], [np.inf, np.inf, 3e38, -1.0, 0.0, 1.0]], np.float32)
    weights, ids = sqrt_softplus_topk(logits, np.zeros(6, np.float32), k=3, scale=1.5)
    np.testing.assert_array_equal(ids, [[5, 4, 3], [0, 1, 2]])
    np.testing.assert_allclose(weights, v4_weights(logits, ids, 1.5, True), rtol=2e-6)
    nothing, ids = sqrt_softplus_topk(np.full((1, 4), -np.inf, np.float32), np.zeros(4, np.float32), k=2, scale=1.5)
    np.testing.assert_array_equal(ids, [[0, 1]])
    np.testing.assert_array_equal(nothing, [[0, 0]])


def test_bias_reverses_the_choice_and_not_the_weights():
    logits = np.array([[3.0, 2.0, 1.0, 0.0]], np.float32)
    weights, ids = sqrt_softplus_topk(logits, np.array([0, 1, 2, 30], np.float32), k=2, scale=1.0)
    np.testing.assert_array_equal(ids, [[3, 2]])
    np.testing.assert_allclose(weights, v4_weights(logits, ids, 1.0, True), rtol=2e-6)


def test_hash_route_follows_the_table():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.permuted(np.tile(np.arange(8), (50, 1)), axis=1)[:, :3])
    tokens, logits = rng.integers(0, 50, 40), rng.standard_normal((40, 8)).astype(np.float32)
    weights, ids = jax.jit(functools.partial(hash_route, scale=1.5))(logits, tokens, table)
    np.testing.assert_array_equal(ids, np.asarray(table)[tokens])
    np.testing.assert_allclose(weights, v4_weights(logits, ids, 1.5, True), rtol=2e-6)
    np.testing.assert_allclose(weights, reference.hash_route(logits, tokens, table, scale=1.5)[0], rtol=2e-6)


def test_hash_route_clamps_what_padding_holds():
    table = np.array([[1, 9], [-3, 2]])
    _, ids = hash_route(np.zeros((3, 4), np.float32), np.array([-1, 0, 7]), table, scale=1.0)
    np.testing.assert_array_equal(ids, [[1, 3], [1, 3], [0, 2]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sqrt_softplus_topk(np.zeros((2, 4), np.float32), np.zeros(3, np.float32), k=1, scale=1.0), "bias"),
        (
            lambda: sqrt_softplus_topk(jnp.zeros((2, 4), jnp.float32), jnp.zeros(4, jnp.bfloat16), k=1, scale=1.0),
            "bias is bfloat16",
        ),
        (lambda: sqrt_softplus_topk(np.zeros((2, 4), np.float32), np.zeros(4, np.float32), k=5, scale=1.0), "k is 5"),
        (lambda: sqrt_softplus_topk(np.zeros(4, np.float32), np.zeros(4, np.float32), k=1, scale=1.0), "logits"),
        (lambda: hash_route(np.zeros((2, 4), np.float32), np.zeros(3, int), np.zeros((5, 2), int), scale=1.0), "token"),
        (lambda: hash_route(np.zeros((2, 4), np.float32), np.zeros(2), np.zeros((5, 2), int), scale=1.0), "token"),
        (lambda: hash_route(np.zeros((2, 4), np.float32), np.zeros(2, int), np.zeros((5, 2)), scale=1.0), "table"),
        (lambda: hash_route(np.zeros((2, 4), np.float32), np.zeros(2, int), np.zeros((0, 2), int), scale=1.0), "table"),
    ],
)
def test_v4_routers_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
