"""top_k: every implementation, bit for bit, against numpy's stable argsort on the contract's definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equivalence import QUICK_COMPILE, Operator, Same, assert_leaves
from support.marks import interpreted, rarely, slow
from support.topk import COLUMNS, KINDS, KS, cases, check_rows, oracle, select

from pallas_kernels import topk as kernel
from pallas_kernels.plans.topk import TopKPlan, topk_plan
from sparse_mla_jax.ops import _dispatch
from sparse_mla_jax.ops.topk import top_k, top_k_decode, top_k_prefill

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("topk")

# Every number of columns, every k, one block and several; the other combinations are slow tests.
SOME = [(1, 64), (2047, 512), (2048, 1000), (2049, 2048), (4097, 1), (20000, 64)]
EVERY = [(columns, k) for columns in COLUMNS for k in KS]


def scored(scores, k, lengths=None, starts=None, *, implementation=None):
    return top_k(scores, k, lengths, row_starts=starts, return_scores=True, implementation=implementation)


both = Operator(scored, ("local", "scores"), {"local": Same(), "scores": Same()}, static=("k",), name="top_k")
only = {"local": Same()}
plain = Operator(top_k, ("local",), only, static=("k",))
prefill = Operator(top_k_prefill, ("local",), only, static=("k",))
decode = Operator(top_k_decode, ("local",), only, static=("k", "next_n"))


# --- the contract
@pytest.mark.parametrize(("columns", "k"), rarely(EVERY, SOME))
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_a_stable_sort(implementation, columns, k):
    check_rows(columns, k, 33, implementation)


# In registers and over several blocks; machine code has all of them.
FEW = [(2047, 512), (4097, 2048)]


@pytest.mark.parametrize(
    ("columns", "k"), [*FEW, *(interpreted(*s) for s in [*SOME, (1, 1), (20000, 1000)] if s not in FEW)]
)
def test_kernel_equals_a_stable_sort(columns, k):
    check_rows(columns, k, 33, "triton")


@pytest.mark.parametrize(
    ("columns", "k", "rows"), [(2049, 512, 3), (2047, 2048, 1), slow(2049, 512, 1), slow(2047, 2048, 3)]
)
def test_equals_a_stable_sort_in_few_rows(implementation, columns, k, rows):
    check_rows(columns, k, rows, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_equals_a_stable_sort_everywhere(implementation, columns, k, rows):
    check_rows(columns, k, rows, implementation)


special = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, -1.0, np.inf, -np.inf, np.nan, 3e38, -3e38])
wild = st.one_of(st.integers(-3, 50), st.sampled_from([-(2**31), 2**31 - 1]))


# --- the kernel's ways through a row
# Waves of 8 lanes, so that a block is small: in registers, by groups, and by counting alone.
IN_REGISTERS = TopKPlan(block=1024, num_warps=4, wave=8)
BY_GROUPS = TopKPlan(block=128, num_warps=2, wave=8, groups=64, run=16, unroll=2)
BY_COUNTING = TopKPlan(block=64, num_warps=1, wave=8, run=64, unroll=1)
PLANS = {
    "registers": IN_REGISTERS,
    "groups": BY_GROUPS,
    "counting": BY_COUNTING,
    "one lane per column": TopKPlan(block=256, num_warps=2, wave=8, groups=256, run=8, unroll=3),
}


@functools.partial(jax.jit, static_argnums=(1, 4), compiler_options=QUICK_COMPILE)
def launch(scores, k, starts, ends, plan):
    return kernel.top_k(scores, k, starts, ends - starts, plan=plan)


def check_plan(plan, k, scores, starts, lengths):
    columns = scores.shape[1]
    low = np.clip(starts, 0, columns)
    high = low + np.minimum(np.maximum(lengths, 0), columns - low)
    low, high = low.astype(np.int32), high.astype(np.int32)
    assert_leaves(launch(scores, k, low, high, plan), oracle(scores, k, starts, lengths), Same(), str(plan))


# Rows of less than a block, of one and of more, and each way once at least.
WAYS = [(name, *sizes) for name in PLANS for sizes in [(127, 7), (128, 32), (129, 1), (1023, 32), (1024, 7)]]
OFTEN = [
    ("registers", 127, 7),
    ("groups", 128, 32),
    ("groups", 129, 1),
    ("groups", 1023, 32),
    ("counting", 1023, 32),
    ("one lane per column", 1024, 7),
]


@pytest.mark.parametrize(("plan", "columns", "k"), rarely(WAYS, OFTEN))
def test_every_way_equals_a_stable_sort(plan, columns, k):
    for batch in cases(columns, k, 33):
        check_plan(PLANS[plan], k, *batch)


# Rows that an estimate from maxima of groups misjudges, or that have ties where it matters.
HARD = {
    "period of the groups": lambda rng, n: (np.arange(n) % 64).astype(np.float32),
    "one group": lambda rng, n: np.where(np.arange(n) % 64 == 5, rng.standard_normal(n) + 9, 0).astype(np.float32),
    "plateau below": lambda rng, n: np.where(rng.permutation(n) < 10, rng.random(n) + 1, 0).astype(np.float32),
    "plateau of both zeros": lambda rng, n: np.where(rng.permutation(n) < 10, 1, rng.choice([0.0, -0.0], n)),
    "plateau of -inf and NaN": lambda rng, n: np.where(rng.permutation(n) < 10, 1, rng.choice([-np.inf, np.nan], n)),
    "plateau of subnormals": lambda rng, n: rng.choice([0.0, 1e-45, -1e-45, 3e-45], n),
    "one bin": lambda rng, n: (np.float32(1.25).view(np.int32) + rng.integers(0, 300, n, np.int32)).view(np.float32),
    "two values": lambda rng, n: rng.choice([1.0, 2.0], n),
    "winners at the end": lambda rng, n: np.where(np.arange(n) >= n - 32, 2.0, rng.random(n)),
    "cluster": lambda rng, n: rng.random(n) + 3.0 * (np.abs(np.arange(n) - n // 2) < 20),
}


@pytest.mark.parametrize("kind", [*HARD, "equal", "ascending", "descending"])
@pytest.mark.parametrize("plan", [BY_GROUPS, BY_COUNTING], ids=["groups", "counting"])
def test_hard_rows(plan, kind):
    rng = np.random.default_rng(0)
    columns, lengths, starts = 1000, np.array([1000, 999, 500, 33, 32, 31, 1]), np.array([0, 1, 250, 640, 3, 127, 999])
    scores = np.stack([(HARD | KINDS)[kind](rng, columns).astype(np.float32) for _ in lengths])
    check_plan(plan, 32, scores, starts, lengths)


THREE = [PLANS[name] for name in ("registers", "groups", "counting")]


@pytest.mark.parametrize("plan", [*THREE, slow(PLANS["one lane per column"])], ids=PLANS.keys())
@settings(max_examples=15, deadline=None, database=None)
@given(data=st.data())
def test_every_way_with_any_values(plan, data):
    n, rows = 400, 3
    few = data.draw(st.lists(st.one_of(special, st.floats(width=32)), min_size=1, max_size=40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scores = rng.choice(np.array(few, np.float32), (rows, n))
    scores[:, :: data.draw(st.integers(1, 64))] = rng.standard_normal()
    starts, lengths = (np.array(data.draw(st.lists(wild, min_size=rows, max_size=rows)), np.int32) for _ in "ab")
    lengths = np.where(lengths > 0, lengths.astype(np.int64) * 8, lengths)
    check_plan(plan, 32, scores, starts, lengths)


@pytest.mark.parametrize("target", ["gpu", "gfx942"])
def test_plans_are_consistent(target):
    for columns in [1, 50, 128, 129, 2048, 4096, 4097, 8192, 8193, 20000, 131072, 2**20, 2**30]:
        for k in [1, 64, 512, 1000, 2048, 2049, 4096, 5000, 2**20]:
            plan = topk_plan(columns=columns, k=k, target=target)
            assert plan.block % (4 * plan.lanes) == 0 and plan.num_warps <= 16
            assert plan.wave == (32 if target == "gpu" else 64)
            if columns > plan.block:
                assert plan.run >= 8 and plan.run & (plan.run - 1) == 0
                assert plan.groups == 0 or max(2 * k, 4 * plan.lanes) <= plan.groups <= plan.block
                assert plan.groups or k > 2048


# XLA:CPU may compare subnormal floats as zeros; every implementation compares integers.
def test_subnormals_are_not_zeros(implementation):
    rng = np.random.default_rng(0)
    scores = (rng.integers(-3, 4, (2, 300)) * np.float64(2.0**-149)).astype(np.float32)
    want = oracle(scores, 70, [0, 0], [300, 300])
    select.check(implementation, want, scores, 70, np.zeros(2, int), np.full(2, 300))


# Not the fixture: hypothesis wants arguments that do not belong to one test function.
@pytest.mark.parametrize(
    ("implementation", "k"),
    [(name, k) for name in ("reference", "xla") for k in (1, 7, 50)]
    + [interpreted("triton", 1), ("triton", 7), interpreted("triton", 50)],
)
@settings(max_examples=15, deadline=None, database=None)
@given(
    st.lists(special, min_size=3 * 43, max_size=3 * 43),
    st.lists(wild, min_size=3, max_size=3),
    st.lists(wild, min_size=3, max_size=3),
)
def test_any_values_starts_and_lengths(implementation, k, values, starts, lengths):
    scores = np.array(values, np.float32).reshape(3, 43)
    starts, lengths = np.array(starts, np.int32), np.array(lengths, np.int32)
    select.check(implementation, oracle(scores, k, starts, lengths), scores, k, starts, lengths)


def test_twenty_runs_are_one(implementation):
    scores = np.round(np.random.default_rng(0).standard_normal((9, 2048)) * 2).astype(np.float32)
    runs = {
        np.asarray(select(scores, 64, np.zeros(9, int), np.full(9, 2048), implementation=implementation)).tobytes()
        for _ in range(20)
    }
    assert len(runs) == 1


def test_warm_calls_do_not_retrace(implementation):
    rng = np.random.default_rng(0)
    starts = np.array([0, 3, 9])
    given = [(rng.standard_normal((3, 300)).astype(np.float32), 7, starts + n, 100 * starts) for n in range(2)]
    select.check_warm(implementation, *given)


def test_more_wanted_than_columns(implementation):
    plain.check(implementation, np.array([[0, 1, 2, -1, -1]]), jnp.array([[3.0, jnp.nan, 9.0]], jnp.float32), 5)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty_arrays(implementation, shape):
    local, scores = both(jnp.zeros(shape, jnp.float32), 4, implementation=implementation)
    assert local.shape == scores.shape == (shape[0], 4)
    assert np.all(np.asarray(local) == -1) and np.all(np.asarray(scores) == -np.inf)


def test_scores_come_along(implementation):
    scores = jnp.array([[9.0, 1.0, jnp.nan, -0.0, 2.0, 0.0], [5.0, -jnp.inf, jnp.nan, 9.0, 9.0, 9.0]], jnp.float32)
    want = [[0, 1, 2, 3], [0, 1, -1, -1]], [[1, -np.inf, 0, 2], [-np.inf] * 4]
    both.check(implementation, tuple(map(np.array, want)), scores, 4, jnp.array([4, 2]), jnp.array([1, 1]))
    want = [[0, 4], [0, 1]], [[9, 2], [5, -np.inf]]
    both.check(implementation, tuple(map(np.array, want)), scores, 2, jnp.array([6, 3]))


def test_bfloat16_is_widened(implementation):
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 500)), jnp.bfloat16)
    want = oracle(np.asarray(scores, np.float32), 64, [0] * 3, [500] * 3)
    _, values = both.check(implementation, {"local": want}, scores, 64)
    assert values.dtype == jnp.float32


# --- prefill and decode
def test_prefill_takes_intervals(implementation):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((9, 300)).astype(np.float32)
    starts = np.array([0, 5, 10, 299, 300, -4, 40, 1000, 7], np.int32)
    ends = np.array([300, 6, 5, 300, 300, 9, 2**31 - 1, 2000, -(2**31)], np.int32)
    low, high = np.clip(starts, 0, 300), np.clip(ends, 0, 300)
    want = oracle(scores, 64, low, high - low)
    prefill.check(implementation, want, scores, 64, row_starts=starts, row_ends=ends)


@pytest.mark.parametrize("next_n", [1, 3, slow(2)])
def test_decode_counts_back_from_the_last_token(implementation, next_n):
    seq_lens = np.array([100, 64, 3, 2, 1, 0, -5, 300, 301, 2**31 - 1, -(2**31)], np.int32)
    scores = np.random.default_rng(0).standard_normal((len(seq_lens) * next_n, 300)).astype(np.float32)
    lengths = [max(0, int(n) - next_n + j + 1) for n in seq_lens for j in range(next_n)]
    want = oracle(scores, 64, [0] * len(lengths), lengths)
    decode.check(implementation, want, scores, 64, seq_lens=seq_lens, next_n=next_n)
    each = np.clip(np.array(lengths, np.int64), 0, 2**31 - 1).astype(np.int32).reshape(-1, next_n)
    decode.check(implementation, want, scores, 64, seq_lens=each, next_n=next_n)


def test_decode_rows_may_have_lengths_of_their_own(implementation):
    scores = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    lengths = np.array([[7, 50], [-1, 20]])
    want = oracle(scores, 8, [0] * 4, lengths.reshape(-1))
    decode.check(implementation, want, scores, 8, seq_lens=lengths, next_n=2)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_lengths_of_other_integer_types(dtype):
    scores = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    want = oracle(scores, 4, [0, 120], [100, 3])
    select.check(None, want, scores, 4, np.array([0, 120], dtype), np.array([100, 3], dtype))


@pytest.mark.parametrize("name", ["registers", "groups", slow("counting"), slow("one lane per column")])
def test_every_way_under_x64(name):
    """By groups counts too, where an estimate fails."""
    scores = np.round(np.random.default_rng(0).standard_normal((2, 1000)), 1).astype(np.float32)
    with jax.enable_x64(True):
        lengths = jnp.zeros(2, jnp.int32), jnp.full(2, 1000, jnp.int32)
        got = launch(jnp.asarray(scores), 32, *lengths, PLANS[name])
        np.testing.assert_array_equal(got, oracle(scores, 32, [0, 0], [1000, 1000]))


# --- inside other programs
def test_under_x64(implementation):
    with jax.enable_x64(True):
        scores = jnp.asarray(np.random.default_rng(0).standard_normal((3, 100)), jnp.float32)
        lengths = jnp.array([100, 2**40, -(2**40)])
        got = top_k(scores, 8, lengths, implementation=implementation)
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, oracle(np.asarray(scores), 8, [0] * 3, [100, 100, 0]))


@pytest.mark.parametrize("rows", [3, 40])
def test_under_shard_map(rows):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    scores = np.random.default_rng(0).standard_normal((rows, 100)).astype(np.float32)
    lengths = np.arange(rows, dtype=np.int32) * 2
    local = jax.shard_map(lambda s, n: top_k(s, 8, n), mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(local)(scores, lengths), oracle(scores, 8, [0] * rows, lengths))


def test_xla_serves_what_the_kernel_does_not(monkeypatch):
    wide = jax.ShapeDtypeStruct((1, kernel.MAX_COLUMNS + 1), jnp.float32)
    with pytest.raises(ValueError, match=r"implementation='triton'.*at most"):
        jax.eval_shape(lambda s: top_k(s, 8, implementation="triton"), wide)
    long = jax.ShapeDtypeStruct((2**12, 2**20), jnp.float32)
    with pytest.raises(ValueError, match=r"2\*\*31 elements"):
        jax.eval_shape(lambda s: top_k(s, 8, implementation="triton"), long)
    monkeypatch.setattr(_dispatch, "preferred", lambda: ("triton", "xla"))
    assert jax.eval_shape(lambda s: top_k(s, 8), wide).shape == (1, 8)
    text = str(jax.make_jaxpr(lambda s: top_k(s, 8))(jnp.zeros((2, 9), jnp.float32)))
    assert "pallas_call" in text


# --- errors
scores = jnp.zeros((4, 10), jnp.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(scores, 0), "k is 0; expected"),
        (lambda: top_k(scores, -1), "k is -1; expected"),
        (lambda: top_k(scores, True), "k is True; expected"),
        (lambda: top_k(scores, 2.0), "k is 2.0; expected"),
        (lambda: jax.jit(top_k)(scores, 2), "mark it static"),
        (lambda: top_k(scores[0], 2), r"scores is float32\[10\]; expected"),
        (lambda: top_k(scores.astype(int), 2), r"scores is int(32|64)\[4, 10\]; expected"),
        (lambda: top_k(scores.astype(jnp.float16), 2), r"scores is float16\[4, 10\]; expected"),
        (lambda: top_k(scores, 2, jnp.zeros(3, int)), "row_lengths is"),
        (lambda: top_k(scores, 2, jnp.zeros(4, jnp.float32)), "row_lengths is"),
        (lambda: top_k(scores, 2, row_starts=jnp.zeros((4, 1), int)), "row_starts is"),
        (lambda: top_k(scores, 2, implementation="cuda"), "implementation is 'cuda'"),
        (lambda: top_k(scores[:0], 2, implementation="cuda"), "implementation is 'cuda'"),
        (
            lambda: top_k_prefill(scores, 2, row_starts=jnp.zeros(4, int), row_ends=jnp.zeros(4, jnp.float32)),
            "row_ends is",
        ),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros(4, int), next_n=0), "next_n is 0"),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros(4, int), next_n=2), "seq_lens has shape"),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros(1, int), next_n=3), "seq_lens has shape"),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros((4, 2), int), next_n=1), "seq_lens has shape"),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros(4, jnp.float32), next_n=1), "seq_lens is"),
        (lambda: top_k_decode(scores, 2, seq_lens=jnp.zeros((4, 1), jnp.float32), next_n=1), "seq_lens is"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
