"""sparse_mla, merge, apply_sinks: every implementation against a float64 oracle on the same quantised inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import (
    BOUND,
    HEADS,
    KINDS,
    SCALE,
    WILD,
    Case,
    as_dense,
    as_lengths,
    as_ragged,
    check,
    make_rows,
    oracle,
    run,
    small,
    verify,
)
from support.equivalence import Close, assert_same_bits

from sparse_mla_jax.ops import attention
from sparse_mla_jax.ops.attention import apply_sinks, merge, sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.ragged import DenseRows, Ragged

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("attention")

ROWS = [[0, 3, 1], [1, 2, -1], [5, 6, 6]]
# Rows of the contracts have one width, so that they share programs.
dense = functools.partial(as_dense, width=7)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# --- the matrix
QUICK = [
    Case(1, "float8_e4m3fnuz", "bfloat16"),
    Case(4, "float32", "float32", two=True),
    Case(6, "float8_e4m3fn", "float32"),
    Case(16, "bfloat16", "bfloat16", ragged=False),
    Case(64, "float8_e4m3fn", "bfloat16", two=True),
    Case(128, "float8_e4m3fnuz", "float32"),
]
FULL = [
    Case(heads, kind, q_dtype, two=two, ragged=ragged)
    for heads in HEADS
    for kind in KINDS
    for q_dtype in ("float32", "bfloat16")
    for two in (False, True)
    for ragged in (False, True)
]


@pytest.mark.parametrize("case", QUICK, ids=str)
@pytest.mark.parametrize("name", ["xla", "reference"])
def test_against_float64(case, name):
    case.verify(name, plain_too=case.two)  # without sinks: the contracts below, and the full matrix


@pytest.mark.parametrize(
    "case",
    [
        Case(6, "float8_e4m3fnuz", "bfloat16", lengths=(0, 1, 15, 16, 17, 100), two=False),
        Case(20, "float8_e4m3fn", "bfloat16", lengths=(16, 0, 33, 1, 2, 15, 17), two=True),
        Case(1, "float32", "float32", lengths=(0, 17, 100)),
        Case(4, "bfloat16", "bfloat16", lengths=(0, 17, 100), ragged=False),
        Case(3, "float8_e4m3fnuz", "float32", latent=48, rope=6, group=12, lengths=(5, 0, 40)),
    ],
    ids=str,
)
def test_kernel_against_float64(case):
    """The short list of what runs in interpret mode beside machine code; without sinks: the contracts below."""
    case.verify("triton", plain_too=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("name", ["xla", "reference"])
def test_full_matrix(case, name):
    case.verify(name)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in FULL if c.two == c.ragged == (c.q_dtype == "bfloat16")], ids=str)
def test_full_matrix_of_the_kernel(case):
    case.verify("triton")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes(kind, implementation):
    Case(16, kind, "bfloat16", latent=512, rope=64, group=128).verify(implementation, sinks_too=False)


# --- contracts
def test_duplicates_count_twice(implementation):
    q, cache, keys, _ = small()
    rows = [[5, 5, 9], [5, 9, 9], [7, 7, 7]]
    got = verify(implementation, oracle(q, [(keys, rows)], 32), q, cache, dense(rows), value_dim=32)
    np.testing.assert_allclose(np.asarray(got[0])[2], np.broadcast_to(keys[7, :32], (6, 32)), rtol=1e-5)


@pytest.mark.interpret
def test_lengths_end_rows(implementation):
    """Two sources of rows with lengths: what lies behind them names slots that hold poison."""
    q, cache, keys, rng = small(used=range(64))
    rows, more = make_rows(rng, (40, 0, 13), range(64)), make_rows(rng, (0, 5, 33), range(64))
    want = oracle(q, [(keys, rows), (keys, more)], 32)
    verify(implementation, want, q, cache, as_lengths(rows), None, (cache, as_lengths(more)), value_dim=32)


def test_lengths_are_clamped_to_the_width(implementation):
    q, cache, keys, rng = small()
    values = jnp.asarray(rng.integers(0, 128, (3, 20)), jnp.int32)
    given = DenseRows(values, jnp.asarray([-(2**31), 2**31 - 1, 7], jnp.int32))
    rows = [[], np.asarray(values[1]).tolist(), np.asarray(values[2, :7]).tolist()]
    want = oracle(q, [(keys, rows)], 32)
    verify(implementation, want, q, cache, given, value_dim=32)


def test_rows_without_keys_are_exactly_zero(implementation):
    q, cache, _, _ = small(used=())
    none = dense([[-1, -1], [128, 2**31 - 1], [-(2**31), -5]])
    cases = [(none, jnp.full((6,), sink)) for sink in (-np.inf, 0.0, 50.0, np.inf)]
    for rows, sinks in [*cases, (as_ragged([[], [128], []]), None)]:
        out, lse = run(q, cache, rows, sinks, value_dim=32, implementation=implementation)
        assert (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


def test_infinite_sink_takes_everything(implementation):
    q, cache, _, _ = small()
    rows = dense([[1, 2], [3, 4], [5, 6]])
    out, lse = run(q, cache, rows, jnp.full((6,), np.inf, jnp.float32), value_dim=32, implementation=implementation)
    assert (np.asarray(out) == 0).all() and np.isfinite(np.asarray(lse)).all()


def test_two_sources_are_one_softmax(implementation):
    q, cache, _, _ = small()
    first, second = [[1, 2], [3, -1], [-1, -1]], [[9, 2, 3], [-1, -1, -1], [4, 4, 5]]
    one = run(q, cache, dense([a + b for a, b in zip(first, second)]), value_dim=32, implementation=implementation)
    close = Close(rtol=1e-5, atol=1e-6)
    arguments = q, cache, dense(first), None, (cache, dense(second))
    run.check(implementation, one, *arguments, value_dim=32, rules={"out": close, "lse": close})


def test_one_row_may_hold_the_whole_capacity(implementation):
    q, cache, keys, rng = small(tokens=8, heads=2)
    rows = [[], [], [int(s) for s in rng.integers(0, 128, 100)], [], [3], [], [], []]
    want = oracle(q, [(keys, rows)], 32)
    verify(implementation, want, q, cache, as_ragged(rows, 0), value_dim=32)


def test_indptr_beyond_the_capacity_is_clamped(implementation):
    q, cache, keys, _ = small()
    ragged = Ragged(values=jnp.asarray([1, 2, 3, 4], jnp.int32), indptr=jnp.asarray([0, 2, 3, 2**31 - 1], jnp.int32))
    want = oracle(q, [(keys, [[1, 2], [3], [4]])], 32)
    verify(implementation, want, q, cache, ragged, value_dim=32)


@pytest.mark.parametrize(
    ("dtype", "value_dim"),
    [(jnp.float32, 21), (jnp.bfloat16, 40), slow(jnp.float32, 40), slow(jnp.bfloat16, 21)],
)
def test_plain_arrays_and_other_value_dims(implementation, dtype, value_dim):
    q, _, _, rng = small(q_dtype=dtype)
    kv = jnp.asarray(rng.standard_normal((50, 40)).astype(dtype))
    rows = [[0, 49, 50], [7, -1, 7], [1, 2, 3]]
    want = oracle(q, [(np.asarray(kv).astype(np.float64), rows)], value_dim)
    bounds = (BOUND[jnp.dtype(dtype).name],)
    got = verify(implementation, want, q, kv, dense(rows), value_dim=value_dim, bounds=bounds)
    assert got[0].shape == (3, 6, value_dim)


# The other two beside poison, in the next test.
@pytest.mark.parametrize("kind", ["float32", slow("bfloat16"), slow("float8_e4m3fn"), "float8_e4m3fnuz"])
def test_values_may_include_the_rope_part(implementation, kind):
    q, cache, keys, _ = small(kind)
    rows = ROWS
    want = oracle(q, [(keys, rows)], 40)
    verify(implementation, want, q, cache, dense(rows), value_dim=40)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn"])
def test_poison_stays_out_of_rope_values(implementation, kind):
    q, cache, keys, _ = small(kind, used=(1, 3, 5, 6))
    rows = [[3, 1, -1], [1, 200, -1], [5, 6, 6]]
    want = oracle(q, [(keys, rows)], 40)
    verify(implementation, want, q, cache, dense(rows), value_dim=40)


def test_power_of_two_scales(implementation):
    q, cache, keys, _ = small(scale_dtype=jnp.float8_e8m0fnu)
    rows = ROWS
    want = oracle(q, [(keys, rows)], 32)
    verify(implementation, want, q, cache, dense(rows), value_dim=32)


@pytest.mark.parametrize("kind", ["float8_e4m3fnuz", "bfloat16"])
def test_no_rope_part(implementation, kind):
    q, cache, keys, _ = small(kind, rope=0)
    rows = ROWS
    want = oracle(q, [(keys, rows)], 32)
    verify(implementation, want, q, cache, dense(rows), value_dim=32)


def test_large_logits_do_not_overflow(implementation):
    q, cache, keys, _ = small()
    q, rows = q * 3000, ROWS
    limits = {"out": Close(rtol=1e-2, atol=1e-2), "lse": Close(rtol=1e-5)}
    run.check(implementation, oracle(q, [(keys, rows)], 32), q, cache, dense(rows), value_dim=32, rules=limits)


@pytest.mark.parametrize("shape", ["no tokens", "no width", "no capacity", "no slots"])
def test_empty_inputs(implementation, shape):
    q, cache, _, _ = small()
    kv, rows = cache, jnp.zeros((3, 2), jnp.int32)
    if shape == "no tokens":
        q, rows = q[:0], rows[:0]
    elif shape == "no width":
        rows = rows[:, :0]
    elif shape == "no capacity":
        rows = Ragged(values=jnp.zeros((0,), jnp.int32), indptr=jnp.zeros((4,), jnp.int32))
    else:
        kv = jnp.zeros((0, 40), jnp.float32)
    out, lse = run(q, kv, rows, jnp.zeros((6,), jnp.float32), value_dim=32, implementation=implementation)
    assert out.shape == (q.shape[0], 6, 32) and (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_any_indices(data):
    q, cache, keys, _ = small(tokens=4)
    index = st.one_of(st.integers(-3, 130), st.sampled_from(WILD))
    rows = data.draw(st.lists(st.lists(index, max_size=20), min_size=4, max_size=4))
    spare = 80 - sum(len(r) for r in rows)
    verify("xla", oracle(q, [(keys, rows)], 32), q, cache, as_ragged(rows, spare), value_dim=32)


def test_warm_calls_do_not_retrace(implementation):
    """Other queries, slots and lengths: the same program."""
    q, cache, _, rng = small()
    given = [(q * scale, cache, dense(rng.integers(-1, 128, (3, 5)).tolist())) for scale in (1, 2)]
    run.check_warm(implementation, *given, value_dim=32)


# --- the XLA body's blocks and chunks
def test_rows_wider_than_a_block(monkeypatch):
    monkeypatch.setattr(attention, "MAX_BLOCK", 7)
    q, cache, keys, rng = small()
    rows = make_rows(rng, (40, 0, 13), range(128))
    for form in (as_dense(rows), as_ragged(rows), as_lengths(rows)):
        out, lse = sparse_mla(q, cache, form, sm_scale=SCALE, value_dim=32, return_lse=True, implementation="xla")
        check((out, lse), oracle(q, [(keys, rows)], 32), 1e-5)


def test_chunks_of_rows_change_nothing(monkeypatch):
    q, cache, keys, rng = small(tokens=11)
    rows = make_rows(rng, rng.integers(0, 30, 11), range(128))
    monkeypatch.setattr(attention, "CHUNK_BYTES", 40_000)
    for form in (as_dense(rows), as_ragged(rows), as_lengths(rows)):
        out, lse = sparse_mla(q, cache, form, sm_scale=SCALE, value_dim=32, return_lse=True, implementation="xla")
        check((out, lse), oracle(q, [(keys, rows)], 32), 1e-5)


def test_temporaries_are_bounded():
    avals = [
        jax.ShapeDtypeStruct((512, 6, 80), jnp.float32),
        jax.eval_shape(lambda: PagedKVCache.create(256, 64, latent_dim=64, rope_dim=16, group_size=64)),
        jax.ShapeDtypeStruct((512, 2048), jnp.int32),
    ]
    body = functools.partial(sparse_mla, sm_scale=SCALE, value_dim=64, implementation="xla")
    assert jax.jit(body).lower(*avals).compile().memory_analysis().temp_size_in_bytes < 64 << 20


# --- inside other programs
def test_same_bits_every_time(implementation):
    q, sources, _ = Case(6, "float8_e4m3fnuz", "bfloat16", lengths=(0, 17)).build()
    outs = [run(q, *sources[0][:2], value_dim=64, implementation=implementation) for _ in range(20)]
    for other in outs[1:]:
        assert_same_bits(other, outs[0], run.label(implementation))


@pytest.mark.parametrize("name", ["xla", "reference"])
def test_inside_shard_map_and_while_loop(name):
    q, cache, keys, _ = small(tokens=4, heads=2)
    rows = [[1, 2, 3], [], [4, 200], [5]]
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.sharding.PartitionSpec

    def body(q, cache, rows):
        def step(_, out):
            return 0 * out + sparse_mla(q, cache, rows, sm_scale=SCALE, value_dim=32, implementation=name)

        return jax.lax.fori_loop(0, 2, step, q[..., :32])

    for form, spec in ((as_dense(rows), part("x")), (as_ragged(rows), part())):
        out = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(part("x"), part(), spec), out_specs=part("x")))(
            q, cache, form
        )
        want = oracle(q, [(keys, rows)], 32)[0]
        np.testing.assert_allclose(np.asarray(out), want, rtol=1e-4, atol=1e-5)


# --- merge and apply_sinks
def test_merge_joins_disjoint_parts(implementation):
    q, cache, keys, rng = small()
    rows = make_rows(rng, (40, 0, 13), range(128))
    parts = [
        run(q, cache, as_dense([r[i::3] for r in rows], 20), value_dim=32, implementation=implementation)
        for i in (0, 1, 2)
    ]
    merged = jax.jit(merge)(jnp.stack([p[0] for p in parts]), jnp.stack([p[1] for p in parts]))
    check(merged, oracle(q, [(keys, rows)], 32), 1e-5)
    sinks = jnp.asarray(rng.standard_normal(6), jnp.float32)
    want = oracle(q, [(keys, rows)], 32, sinks)
    check((apply_sinks(*merged, sinks), merged[1]), want, 1e-5)


def test_merge_ignores_stale_parts():
    outs = jnp.stack([jnp.ones((2, 3, 4), jnp.float32), jnp.full((2, 3, 4), jnp.nan, jnp.float32)])
    lses = jnp.stack([jnp.zeros((2, 3), jnp.float32), jnp.full((2, 3), -jnp.inf)])
    join = jax.jit(merge)
    out, lse = join(outs, lses)
    assert (np.asarray(out) == 1).all() and (np.asarray(lse) == 0).all()
    out, lse = join(outs[1:], lses[1:])
    assert (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


def test_merge_and_sinks_keep_the_dtype():
    out, lse = merge(jnp.ones((2, 2, 3, 4), jnp.bfloat16), jnp.zeros((2, 2, 3), jnp.float32))
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert apply_sinks(out, lse, jnp.zeros((3,), jnp.float32)).dtype == jnp.bfloat16


# --- errors
def test_sources_of_different_layouts():
    q, cache, keys, rng = small()
    kv = jnp.asarray(rng.standard_normal((20, 40)), jnp.float32)
    rows = [[1, 2], [3, 4], [19, -1]]
    arguments = (q, cache, as_dense(rows), None, (kv, as_dense(rows)))
    want = oracle(q, [(keys, rows), (np.asarray(kv, np.float64), rows)], 32)
    check(run(*arguments, value_dim=32, implementation=None), want, 1e-5)
    with pytest.raises(ValueError, match="different layouts"):
        run(*arguments, value_dim=32, implementation="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((3, 40), jnp.float32)}, r"q is .*\[T, H, D\]"),
        ({"q": jnp.zeros((3, 6, 40), jnp.int32)}, "q is int32"),
        ({"q": jnp.zeros((3, 6, 41), jnp.float32)}, "must agree"),
        ({"kv": jnp.zeros((3, 40), jnp.int8)}, "kv is int8"),
        ({"kv": jnp.zeros((3, 40), jnp.float8_e4m3fn)}, "PagedKVCache"),
        ({"kv": "cache"}, "kv is str"),
        ({"rows": jnp.zeros((3, 4), jnp.float32)}, r"rows of kv is float32\[3, 4\]; expected integers \[3, W\]"),
        (
            {"rows": jnp.zeros((4, 4), jnp.int32)},
            r"int32\[4, 4\]; expected integers \[3, W\]. One row of slots per token of q",
        ),
        ({"rows": Ragged(values=jnp.zeros((4,), jnp.int32), indptr=jnp.zeros((3,), jnp.int32))}, "2 rows"),
        ({"rows": [[1], [2], ["a"]]}, "rows of kv is list"),
        ({"sm_scale": float("nan")}, "sm_scale"),
        ({"sm_scale": None}, "sm_scale"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"value_dim": 41}, "value_dim is 41"),
        ({"sinks": jnp.zeros((5,), jnp.float32)}, r"\[6\]"),
        ({"extra": jnp.zeros((3, 40), jnp.float32)}, "pair"),
        ({"extra": (jnp.zeros((3, 30), jnp.float32), jnp.zeros((3, 1), jnp.int32))}, "extra has keys of 30"),
        ({"implementation": "cuda"}, "cuda"),
    ],
)
def test_errors_name_the_argument(change, message):
    q, cache, _, _ = small()
    arguments = {"q": q, "kv": cache, "rows": jnp.zeros((3, 2), jnp.int32), "sm_scale": 1.0, "value_dim": 32, **change}
    with pytest.raises(ValueError, match=message):
        sparse_mla(**arguments)


def test_sm_scale_is_required():
    q, cache, _, _ = small()
    with pytest.raises(TypeError, match="sm_scale"):
        sparse_mla(q, cache, jnp.zeros((3, 2), jnp.int32), value_dim=32)
