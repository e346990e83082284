"""Indexer scores and the lightning indexer: every implementation against float64 numpy on the same quantised keys."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equivalence import QUICK_COMPILE, assert_same_bits
from support.indexer import (
    FP8,
    KINDS,
    SHAPES,
    check,
    check_contiguous,
    contiguous,
    contiguous_inputs,
    fp8_bound,
    oracle,
    paged,
    paged_inputs,
    select,
    verify,
)
from support.marks import slow

from pallas_kernels import cdna, indexer_logits
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan
from pallas_kernels.targets import executor
from pallas_kernels.tiles import power_of_two
from sparse_mla_jax.ops import indexer
from sparse_mla_jax.ops.cache import PagedIndexCache
from sparse_mla_jax.ops.indexer import indexer_scores, lightning_indexer, paged_indexer_scores
from sparse_mla_jax.ops.topk import top_k

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("indexer")

# --- scores
DECODE, PREFILL = SHAPES


# Every kind of keys once, every type of queries with both shapes; the machine code of all is run by test_cdna_kernels.
@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        pytest.param(DECODE, "float32", id="decode-float32"),
        pytest.param(PREFILL, "bfloat16", id="prefill-bfloat16"),
        pytest.param(PREFILL, "float8_e4m3fn", id="prefill-float8_e4m3fn"),
        pytest.param(DECODE, "float8_e4m3fnuz", id="decode-float8_e4m3fnuz"),
        slow(PREFILL, "float32", id="prefill-float32"),
        slow(DECODE, "bfloat16", id="decode-bfloat16"),
        slow(DECODE, "float8_e4m3fn", id="decode-float8_e4m3fn"),
        slow(PREFILL, "float8_e4m3fnuz", id="prefill-float8_e4m3fnuz"),
    ],
)
def test_paged_against_float64(implementation, kind, shape):
    q_dtype = jnp.float32 if kind in ("float32", "float8_e4m3fn") else jnp.bfloat16
    inputs, keys, slots = paged_inputs(kind, q_dtype, **shape)
    for columns in (slots.shape[1], slots.shape[1] - 3):
        want = oracle(inputs[0], keys, inputs[1], slots[:, :columns])
        verify(paged, implementation, want, *inputs, max_length=columns)


@pytest.mark.parametrize("kind", KINDS)
def test_contiguous_against_float64(implementation, kind):
    check_contiguous(implementation, kind)


def test_extreme_intervals_are_clamped(implementation):
    q, weights = jnp.ones((4, 2, 16), jnp.float32), jnp.ones((4, 2), jnp.float32)
    starts = jnp.asarray([-5, -(2**31), 2**31 - 1, 0], jnp.int32)
    lengths = jnp.asarray([9, 2**31 - 1, 5, 2**31 - 1], jnp.int32)
    out = contiguous(
        q,
        jnp.ones((20, 16), jnp.float32),
        None,
        weights,
        row_starts=starts,
        row_lengths=lengths,
        implementation=implementation,
    )
    assert np.isfinite(np.asarray(out)).sum(axis=1).tolist() == [9, 20, 0, 20]
    # Top-k reads the same interval.
    _, chosen = top_k(jnp.zeros((4, 20), jnp.float32), 20, lengths, row_starts=starts, return_scores=True)
    assert np.isfinite(np.asarray(chosen)).sum(axis=1).tolist() == [9, 20, 0, 20]


@pytest.mark.interpret  # CDNA widens queries: the product of FP8 by FP8 is run nowhere else
@pytest.mark.parametrize("kind", FP8)
def test_fp8_queries_are_taken_at_face_value(implementation, kind):
    inputs, keys, slots = paged_inputs(kind, **SHAPES[0])
    q = (inputs[0] * 50).astype(jnp.dtype(kind))
    want, bound = oracle(q, keys, inputs[1], slots), fp8_bound(implementation)
    verify(paged, implementation, want, q, *inputs[1:], max_length=80, bound=bound)


@pytest.mark.interpret  # CDNA widens queries: the product of FP8 by FP8 is run nowhere else
@pytest.mark.parametrize("kind", FP8)
def test_fp8_queries_of_contiguous_keys(implementation, kind):
    q, stored, scales, weights, starts, ends, want = contiguous_inputs(kind, jnp.dtype(kind), 9, 6, 20, 75)
    keys = jax.lax.bitcast_convert_type(stored, jnp.dtype(kind))
    how = dict(row_starts=starts, row_lengths=ends - starts, bound=fp8_bound(implementation))
    verify(contiguous, implementation, want, q, keys, scales, weights, **how)


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_fp8_queries_of_unquantised_keys(implementation, kind):
    inputs, keys, slots = paged_inputs(kind, **SHAPES[0])
    q = inputs[0].astype(jnp.float8_e4m3fn)
    want = oracle(q, keys, inputs[1], slots)
    verify(paged, implementation, want, q, *inputs[1:], max_length=80)


@pytest.mark.parametrize("kind", FP8)
def test_fp8_queries_must_have_the_flavour_of_the_keys(kind):
    other = FP8[1 - FP8.index(kind)]
    inputs, _, _ = paged_inputs(kind, **SHAPES[0])
    q = inputs[0].astype(jnp.dtype(other))
    for call in (paged_indexer_scores, functools.partial(lightning_indexer, k=4)):
        with pytest.raises(ValueError, match=f"q is {other} and the keys are {kind}; .* flavour"):
            call(q, *inputs[1:], max_length=80)
    ints = jnp.zeros((5,), jnp.int32)
    with pytest.raises(ValueError, match=f"q is {other} and the keys are {kind}; .* flavour"):
        indexer_scores(q, jnp.zeros((9, 32), jnp.dtype(kind)), None, inputs[1], row_starts=ints, row_lengths=ints)


@pytest.mark.interpret
def test_largest_codes(implementation):
    """+-240 of e4m3fnuz is exact, but +-224 where FP8 multiplies FP8."""
    kind = jnp.float8_e4m3fnuz
    codes = np.asarray([0x7F, 0xFF, 0x7E, 0xFE, 0x01, 0x81, 0x00, 0x08], np.uint8)
    keys, q = jnp.asarray(np.tile(codes, (16, 2))), jnp.asarray(np.tile(codes[::-1], (3, 2, 2)))
    keys, q = (jax.lax.bitcast_convert_type(x, kind) for x in (keys, q))
    weights, starts, lengths = jnp.ones((3, 2), jnp.float32), jnp.zeros(3, jnp.int32), jnp.full(3, 16, jnp.int32)
    exact = [np.asarray(x).astype(np.float64) for x in (q, keys)]
    for mine in (q.astype(jnp.bfloat16), q):
        # CDNA widens queries.
        multiplied = mine.dtype == kind and implementation == "triton" and executor.value is None
        want_q, want_keys = (x.clip(-224, 224) if multiplied else x for x in exact)
        want = oracle(want_q, want_keys, weights, np.tile(np.arange(16), (3, 1)))
        rows = dict(row_starts=starts, row_lengths=lengths)
        verify(contiguous, implementation, want, mine, keys, None, weights, **rows)


def test_published_sizes(implementation):
    inputs, keys, slots = paged_inputs(
        "float8_e4m3fn", jnp.bfloat16, tokens=3, heads=64, dim=128, requests=2, pages=2, page_size=64
    )
    verify(paged, implementation, oracle(inputs[0], keys, inputs[1], slots), *inputs, max_length=128)


def test_tokens_of_requests_in_any_order(implementation):
    inputs, _, slots = paged_inputs(**SHAPES[1], missing=False)
    order = np.random.default_rng(3).permutation(40)
    q, weights, cache, table, ids, lengths = inputs
    mixed = (q[order], weights[order], cache, table, ids[order], lengths[order])
    whole, shuffled = (
        np.asarray(paged(*x, max_length=slots.shape[1], implementation=implementation)) for x in (inputs, mixed)
    )
    np.testing.assert_allclose(shuffled, whole[order], rtol=1e-5, atol=1e-5)


def test_blocks_of_columns_change_nothing(monkeypatch):
    inputs, keys, slots = paged_inputs(tokens=9, heads=4, dim=32, requests=1, pages=11, page_size=50)
    want = oracle(inputs[0], keys, inputs[1], slots)
    for budget in (1, 1 << 20):
        monkeypatch.setattr(indexer, "STEP_BYTES", budget)
        check(paged_indexer_scores(*inputs, max_length=550, implementation="xla"), want)


@settings(max_examples=15, deadline=None, database=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_any_tables(seed):
    inputs, keys, slots = paged_inputs(**SHAPES[1], seed=seed)
    verify(paged, "xla", oracle(inputs[0], keys, inputs[1], slots), *inputs, max_length=56)


def test_warm_calls_do_not_retrace(implementation):
    given = [paged_inputs(**DECODE, seed=seed)[0] for seed in (0, 1)]
    paged.check_warm(implementation, *given, max_length=80)
    select.check_warm(implementation, *given, k=4, max_length=80)


# --- plans
PLANS = [
    dict(key_block=16, head_block=16),
    dict(key_block=32, head_block=16, keys_first=True),
    dict(key_block=16, head_block=16, token_block=4, key_steps=3, keys_first=True, num_stages=3),
    dict(key_block=64, head_block=32, token_block=8, dot_tokens=2, key_steps=2, keys_first=True, num_stages=2),
    dict(key_block=128, head_block=32, token_block=8, dot_tokens=8, key_steps=16, keys_first=True),
]


def plans_with(name, values):
    """Every plan with both types of queries and each of `values`; by default with one of them, in turn."""
    turns = itertools.count()
    for plan, q_kind in itertools.product(PLANS, ("bfloat16", "cache")):
        turn = next(turns) % len(values)
        for number, value in enumerate(values):
            id = f"{'-'.join(map(str, plan.values()))}-{q_kind}-{name}{value}"
            yield pytest.param(plan, q_kind, value, id=id) if number == turn else slow(plan, q_kind, value, id=id)


@functools.partial(jax.jit, static_argnames=("kind", "plan"), compiler_options=QUICK_COMPILE)
def launch_ragged(q, keys, scales, weights, starts, ends, *, kind, plan):
    return indexer_logits.ragged(q, keys, jnp.dtype(kind), scales, weights, starts, ends, plan=plan)


@functools.partial(jax.jit, static_argnames=("max_length", "plan"), compiler_options=QUICK_COMPILE)
def launch_paged(q, cache, weights, *rows, max_length, plan):
    how = dict(max_length=max_length, plan=plan)
    return indexer_logits.paged(q, cache.data, cache.dtype, cache.scale, weights, *rows, **how)


# Heads in turn over five plans and two types: products of several tokens need 32, so both types of those have them.
@pytest.mark.parametrize(("plan", "q_kind", "heads"), list(plans_with("h", [32, 5])))
def test_plans_of_contiguous_keys(plan, q_kind, heads):
    kind = FP8[heads % 2]
    together = plan.get("dot_tokens", 1) if plan["head_block"] == heads else 1
    plan = IndexerPlan(**{**plan, "dot_tokens": together})
    q, keys, scales, weights, starts, ends, want = contiguous_inputs(
        kind, jnp.dtype(kind if q_kind == "cache" else q_kind), 11, heads, 32, 75
    )
    check(launch_ragged(q, keys, scales, weights, starts, ends, kind=kind, plan=plan), want)


@pytest.mark.parametrize(("plan", "q_kind", "page_size"), list(plans_with("p", [8, 48, 64])))
def test_plans_of_pages(plan, q_kind, page_size):
    plan = IndexerPlan(**{**plan, "dot_tokens": 1, "token_block": 1})
    kind = FP8[page_size % 3 % 2]
    inputs, keys, slots = paged_inputs(
        kind, jnp.bfloat16, tokens=7, heads=20, dim=32, requests=3, pages=-(-150 // page_size), page_size=page_size
    )
    q, weights, cache, table, ids, lengths = inputs
    q = q.astype(jnp.dtype(kind)) if q_kind == "cache" else q
    lengths = jnp.where((ids >= 0) & (ids < 3), lengths, 0)
    for columns in (slots.shape[1],) if page_size == 64 else (131,):
        got = launch_paged(q, cache, weights, table, ids, lengths, max_length=columns, plan=plan)
        check(got, oracle(q, keys, weights, slots[:, :columns]))


@pytest.mark.parametrize("plan", PLANS[2:4], ids=lambda p: "-".join(map(str, p.values())))
def test_plans_stay_within_their_arrays(plan):
    """Our interpreter of CDNA refuses any access outside; pages, scales and keys are asked for ahead."""
    require_cdna("triton")
    kind, plan = FP8[0], IndexerPlan(**{**plan, "head_block": 32})
    q, keys, scales, weights, starts, ends, want = contiguous_inputs(kind, jnp.bfloat16, 11, 32, 32, 75)
    inputs, paged_keys, slots = paged_inputs(
        kind, jnp.bfloat16, tokens=7, heads=32, dim=32, requests=3, pages=9, page_size=16
    )
    q2, weights2, cache, table, ids, lengths = inputs
    lengths = jnp.where((ids >= 0) & (ids < 3), lengths, 0)
    with cdna.device("gfx942"):
        check(indexer_logits.ragged(q, keys, jnp.dtype(kind), scales, weights, starts, ends, plan=plan), want)
        plan = dataclasses.replace(plan, dot_tokens=1)
        got = indexer_logits.paged(
            q2, cache.data, cache.dtype, cache.scale, weights2, table, ids, lengths, max_length=131, plan=plan
        )
        check(got, oracle(q2, paged_keys, weights2, slots[:, :131]))


@pytest.mark.parametrize("tokens", [1, 3, 64, 5000])
@pytest.mark.parametrize("columns", [1, 100, 16384, 65536])
@pytest.mark.parametrize("target", ["gpu", "gfx942"])
def test_plans_fit(tokens, columns, target):
    for heads, itemsize, shared in itertools.product((1, 20, 64, 128), (1, 2, 4), (False, True)):
        plan = indexer_plan(
            tokens=tokens, heads=heads, columns=columns, itemsize=itemsize, shared_keys=shared, target=target
        )
        for size in (plan.key_block, plan.token_block, plan.head_block, plan.dot_tokens, plan.num_warps):
            assert size == power_of_two(size)
        assert plan.key_block >= 16 and plan.head_block >= 16 and plan.key_steps >= 1
        assert plan.dot_tokens <= min(tokens, plan.token_block)
        assert plan.dot_tokens == 1 or (plan.head_block == heads and plan.keys_first)


# --- the lightning indexer
def best(scores, k, lengths):
    """Positions of the k largest, ties to the lower one, ascending, then -1."""
    out = np.full((len(scores), k), -1)
    for t, (row, length) in enumerate(zip(scores, lengths)):
        chosen = np.sort(np.argsort(-row[:length], kind="stable")[:k])
        out[t, : len(chosen)] = chosen
    return out


@pytest.mark.parametrize("limit", [4 * 80, 4 * 80 * 2 + 7, 1 << 20])
def test_selects_the_best(implementation, limit):
    inputs, _, _ = paged_inputs("float8_e4m3fnuz", **SHAPES[0], missing=False)
    scores = np.asarray(paged(*inputs, max_length=80, implementation=implementation))
    lengths = np.clip(np.asarray(inputs[5]), 0, 80)
    got = select.check(implementation, best(scores, 16, lengths), *inputs, k=16, max_length=80, memory_limit=limit)
    assert got.dtype == jnp.int32


def test_everything_is_selected_without_scoring(implementation):
    inputs, _, _ = paged_inputs(**SHAPES[0])
    q, weights, cache, table, ids, lengths = inputs
    seen = np.where(np.asarray(ids) < 3, np.clip(np.asarray(lengths), 0, 80), 0)
    columns = np.arange(90)
    want = np.where(columns[None] < seen[:, None], columns[None], -1)
    select.check(implementation, want, q * np.nan, weights, cache, table, ids, lengths, k=90, max_length=80)
    text = str(
        jax.make_jaxpr(functools.partial(lightning_indexer, k=80, max_length=80, implementation=implementation))(
            *inputs
        )
    )
    assert "dot_general" not in text and "pallas_call" not in text


def largest_scores(jaxpr, columns):
    """Elements of the largest float32 array with an axis of `columns` that a jaxpr computes, loops included."""
    most = 0
    for equation in jaxpr.eqns:
        for var in equation.outvars:
            shape = getattr(var.aval, "shape", ())
            if columns in shape and var.aval.dtype == jnp.float32:
                most = max(most, int(np.prod(shape)))
        for inner in inners(equation):
            most = max(most, largest_scores(inner, columns))
    return most


def inners(equation):
    """Jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


@pytest.mark.parametrize("limit", [64 << 10, 256 << 10])
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_scores_stay_within_the_memory_limit(limit, name):
    columns = 4 * 1021  # found nowhere else among the shapes
    inputs = (
        jax.ShapeDtypeStruct((96, 4, 32), jnp.float32),
        jax.ShapeDtypeStruct((96, 4), jnp.float32),
        jax.eval_shape(lambda: PagedIndexCache.create(1021, 4, dim=32)),
        jax.ShapeDtypeStruct((2, 1021), jnp.int32),
        jax.ShapeDtypeStruct((96,), jnp.int32),
        jax.ShapeDtypeStruct((96,), jnp.int32),
    )
    body = functools.partial(lightning_indexer, k=32, max_length=columns, implementation=name)
    bounded = jax.make_jaxpr(functools.partial(body, memory_limit=limit))(*inputs)
    assert 0 < 4 * largest_scores(bounded.jaxpr, columns) <= limit
    assert 4 * largest_scores(jax.make_jaxpr(body)(*inputs).jaxpr, columns) >= 4 * 96 * columns
    if name == "xla":
        compiled = jax.jit(functools.partial(body, memory_limit=limit)).lower(*inputs).compile()
        free = jax.jit(body).lower(*inputs).compile()
        saved = free.memory_analysis().temp_size_in_bytes - compiled.memory_analysis().temp_size_in_bytes
        assert saved > 0.9 * (4 * 96 * columns - limit)


def test_same_bits_every_time(implementation):
    inputs, _, _ = paged_inputs("float8_e4m3fnuz", jnp.bfloat16, **SHAPES[0])
    first, *others = [paged(*inputs, max_length=80, implementation=implementation) for _ in range(20)]
    for other in others:
        assert_same_bits(other, first, paged.label(implementation))


def test_inside_shard_map():
    inputs, keys, slots = paged_inputs(**SHAPES[1], missing=False)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    part, whole = jax.sharding.PartitionSpec("x"), jax.sharding.PartitionSpec()
    body = functools.partial(paged_indexer_scores, max_length=56, implementation="xla")
    got = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(part, part, whole, whole, part, part), out_specs=part))(
        *inputs
    )
    check(got, oracle(inputs[0], keys, inputs[1], slots))


# --- empty inputs, plans, errors
def test_empty_inputs(implementation):
    (q, weights, cache, table, ids, lengths), _, _ = paged_inputs(**SHAPES[0])
    none = (q[:0], weights[:0], cache, table, ids[:0], lengths[:0])
    assert paged(*none, max_length=80, implementation=implementation).shape == (0, 80)
    assert select(*none, k=4, max_length=80, implementation=implementation).shape == (0, 4)
    out = paged(q, weights, cache, table[:0], ids, lengths, max_length=80, implementation=implementation)
    assert np.isneginf(np.asarray(out)).all()
    out = contiguous(q, q[:0, 0], None, weights, row_starts=ids, row_lengths=ids, implementation=implementation)
    assert out.shape == (5, 0)


def test_plans_are_memoised():
    key = dict(tokens=8, heads=64, columns=8192, itemsize=2, shared_keys=True, target="nvidia")
    assert indexer_plan(**key) is indexer_plan(**key)
    assert indexer_plan(**{**key, "columns": 1}).key_block == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((5, 32), jnp.float32)}, "q is"),
        ({"q": jnp.zeros((5, 4, 32), jnp.int8)}, "q is int8"),
        ({"q": jnp.zeros((5, 4, 31), jnp.float32)}, "must agree"),
        ({"weights": jnp.zeros((5, 3), jnp.float32)}, "weights is"),
        ({"cache": jnp.zeros((5, 3), jnp.float32)}, "PagedIndexCache"),
        ({"page_table": jnp.zeros((3, 5), jnp.float32)}, "page_table is float32"),
        ({"request_ids": jnp.zeros((4,), jnp.int32)}, "request_ids is"),
        ({"lengths": jnp.zeros((5,), jnp.float32)}, "lengths is"),
        ({"max_length": 81}, "P \\* page_size = 80"),
        ({"max_length": 0}, "max_length is 0"),
        ({"k": 0}, "k is 0"),
        ({"memory_limit": 319}, "needs 320"),
        ({"implementation": "cuda"}, "cuda"),
    ],
)
def test_errors_name_the_argument(change, message):
    inputs, _, _ = paged_inputs(**SHAPES[0])
    names = ("q", "weights", "cache", "page_table", "request_ids", "lengths")
    arguments = {**dict(zip(names, inputs)), "k": 4, "max_length": 80, **change}
    with pytest.raises(ValueError, match=message):
        lightning_indexer(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": jnp.zeros((9, 31), jnp.float32)}, "must agree"),
        ({"keys": jnp.zeros((9, 32), jnp.int32)}, "keys is int32"),
        (
            {"key_scales": jnp.zeros((8,), jnp.float32)},
            r"key_scales is float32\[8\]; expected floating values \[9\]. One scale per key",
        ),
        ({"row_starts": jnp.zeros((4,), jnp.int32)}, "row_starts"),
        ({"row_lengths": jnp.zeros((5,), jnp.float32)}, "row_lengths"),
    ],
)
def test_errors_of_contiguous_scores(change, message):
    ints = jnp.zeros((5,), jnp.int32)
    arguments = dict(
        q=jnp.zeros((5, 4, 32), jnp.float32),
        keys=jnp.zeros((9, 32), jnp.float32),
        key_scales=None,
        weights=jnp.zeros((5, 4), jnp.float32),
        row_starts=ints,
        row_lengths=ints,
    )
    with pytest.raises(ValueError, match=message):
        indexer_scores(**{**arguments, **change})
