"""sparse_mla, merge, apply_sinks: every implementation against a float64 oracle on the same quantised inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse_attention
from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.sparse_attention.rows import blocks_of_part
from sparse_mla_jax.ops import attention
from sparse_mla_jax.ops.attention import apply_sinks, merge, sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.ragged import DenseRows, Ragged

SCALE = 0.17
LENGTHS = (0, 1, 15, 16, 17, 100, 2048)
HEADS = (1, 4, 6, 16, 64, 128)
KINDS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz")
WILD = (-1, -7, -(2**31), 2**31 - 1)
# float32: rounding of sums. bfloat16: rounding the result alone costs 2**-8 / sqrt(3) / 1.39 = 1.6e-3 in the norm, so
# 2e-3 leaves room for nothing else: products and probabilities must be exact to 16 bits.
BOUND = {"float32": 1e-5, "bfloat16": 2e-3}


# Scores of float16 keys: 2**-12 of a key's own size, unless its scales are powers of two (then exact); the oracle's
# scores reach 30 here.
FLOAT16_BOUND = {np.float32: (4e-3, 1e-2), jnp.float8_e8m0fnu: (2e-3, 2e-5)}


# --- oracle and inputs -----------------------------------------------------------------------------------------------
def oracle(q, sources, value_dim, sinks=None):
    """float64 numpy, a loop over rows: sources are (keys[N, D], list of slot lists)."""
    q = np.asarray(q).astype(np.float64)
    out, lse = np.zeros((*q.shape[:2], value_dim)), np.full(q.shape[:2], -np.inf)
    for t in range(q.shape[0]):
        keys = np.concatenate([k[[s for s in rows[t] if 0 <= s < len(k)]] for k, rows in sources])
        if not len(keys):
            continue
        logits = SCALE * q[t] @ keys.T
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        lse[t] = np.log(weights.sum(axis=1)) + top[:, 0]
        out[t] = weights @ keys[:, :value_dim] / weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            with np.errstate(over="ignore"):
                out[t] /= 1 + np.exp(np.asarray(sinks, np.float64) - lse[t])[:, None]
    return out, lse


def make_cache(rng, kind, latent, rope, group, *, pages=64, page_size=64, used=None, scale_dtype=np.float32):
    """A cache and its float64 keys [N, D]; slots that are not in `used` hold NaN in every array."""
    dtype, slots = jnp.dtype(kind), pages * page_size
    rope_dtype = dtype if kind == "float32" else jnp.dtype(jnp.bfloat16)
    ropes = rng.standard_normal((slots, rope)).astype(rope_dtype)
    poisoned = np.ones(slots, bool) if used is not None else np.zeros(slots, bool)
    if used is not None:
        poisoned[list(used)] = False
    scale = None
    if dtype.itemsize == 1:
        values = (rng.standard_normal((slots, latent)) * 60).clip(-224, 224).astype(np.float32).astype(dtype)
        scale = np.exp2(rng.uniform(-8, -5, (slots, latent // group))).astype(np.float32)
        if scale_dtype != np.float32:
            scale = np.exp2(np.round(np.log2(scale))).astype(scale_dtype)
        keys = values.astype(np.float64) * np.repeat(scale.astype(np.float64), group, axis=1)
        stored = values.view(np.uint8).copy()
        stored[poisoned] = 0x80 if "fnuz" in kind else 0x7F
        if scale_dtype == np.float32:
            scale[poisoned] = np.nan
        stored = stored.view(np.uint32)
    else:
        values = rng.standard_normal((slots, latent)).astype(dtype)
        keys, stored = values.astype(np.float64), values.copy()
        stored[poisoned] = np.nan
    keys = np.concatenate([keys, ropes.astype(np.float64)], axis=1)
    ropes[poisoned] = np.nan
    shape = (pages, page_size)
    return (
        PagedKVCache(
            latent=jnp.asarray(stored.reshape(*shape, -1)),
            scale=None if scale is None else jnp.asarray(scale.reshape(*shape, -1)),
            rope=jnp.asarray(ropes.reshape(*shape, -1)),
            dtype=dtype,
            group_size=group,
        ),
        keys,
    )


def make_rows(rng, lengths, used):
    """Slot lists: `lengths[t]` valid slots with duplicates, wild indices strewn in."""
    used = np.asarray(sorted(used))
    rows = []
    for length in lengths:
        row = list(rng.choice(used, length))
        if length > 2:
            row[1] = row[0]
        for wild in WILD:
            row.insert(int(rng.integers(0, len(row) + 1)), wild)
        rows.append([int(s) for s in row])
    return rows


def as_ragged(rows, spare=37):
    """Rows one after another; behind the last one garbage that must not be read."""
    indptr = np.cumsum([0] + [len(r) for r in rows]).astype(np.int32)
    values = np.concatenate([np.asarray(r, np.int32) for r in rows] + [np.arange(spare, dtype=np.int32)])
    return Ragged(values=jnp.asarray(values), indptr=jnp.asarray(indptr))


def as_lengths(rows, spare=19):
    """Rows in front of garbage that must not be read."""
    width = max(len(r) for r in rows) + spare
    values = np.random.default_rng(0).integers(0, 4000, (len(rows), width)).astype(np.int32)
    for t, row in enumerate(rows):
        values[t, : len(row)] = row
    return DenseRows(jnp.asarray(values), jnp.asarray([len(r) for r in rows], jnp.int32))


def as_dense(rows):
    dense = np.full((len(rows), max(len(r) for r in rows)), -1, np.int32)
    for t, row in enumerate(rows):
        dense[t, : len(row)] = row
    return jnp.asarray(dense)


def source(cache, rows):
    """What the kernel is given of a cache and rows in any form."""
    arrays = (cache.latent, cache.scale, cache.rope, cache.dtype, cache.group_size)
    if isinstance(rows, Ragged):
        return sparse_attention.Source(*arrays, rows.values, rows.indptr)
    if isinstance(rows, DenseRows):
        return sparse_attention.Source(*arrays, rows.values, None, rows.lengths)
    return sparse_attention.Source(*arrays, rows, None)


@functools.partial(jax.jit, static_argnames=("value_dim", "implementation"))
def run(q, kv, rows, sinks=None, extra=None, *, value_dim, implementation):
    return sparse_mla(
        q,
        kv,
        rows,
        sm_scale=SCALE,
        value_dim=value_dim,
        sinks=sinks,
        extra=extra,
        return_lse=True,
        implementation=implementation,
    )


def check(got, want, bound, lse_bound=2e-5):
    out, lse = (np.asarray(x).astype(np.float64) for x in got)
    size = np.linalg.norm(want[0])
    assert np.isfinite(out).all()
    assert np.linalg.norm(out - want[0]) <= bound * size
    empty = np.isneginf(want[1])
    assert (out[empty] == 0).all() and np.isneginf(lse[empty]).all()
    np.testing.assert_allclose(lse[~empty], want[1][~empty], atol=lse_bound, rtol=2e-6)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape with its inputs; `build` makes them."""

    heads: int
    kind: str = "float32"
    q_dtype: str = "float32"
    latent: int = 64
    rope: int = 16
    group: int = 32
    lengths: tuple[int, ...] = LENGTHS
    two: bool = False
    ragged: bool = True

    def build(self, seed=0):
        rng = np.random.default_rng([seed, self.heads, KINDS.index(self.kind)])
        form = as_ragged if self.ragged else as_dense
        sources = []
        for lengths in [self.lengths, (3, 0, 40, 0, 1, 16, 5)][: 1 + self.two]:
            # Slot 0 is always poisoned: it is where masked lanes are clamped to.
            used = 1 + rng.choice(64 * 64 - 1, 1000, replace=False)
            cache, keys = make_cache(rng, self.kind, self.latent, self.rope, self.group, used=used)
            rows = make_rows(rng, lengths, used)
            sources.append((cache, form(rows), keys, rows))
        q = rng.standard_normal((len(self.lengths), self.heads, self.latent + self.rope)).astype(
            jnp.dtype(self.q_dtype)
        )
        sinks = rng.standard_normal(self.heads).astype(np.float32)
        return jnp.asarray(q), sources, jnp.asarray(sinks)

    def verify(self, implementation, sinks_too=True, plain_too=True):
        q, sources, some = self.build()
        extra = sources[1][:2] if self.two else None
        plain = [(keys, rows) for _, _, keys, rows in sources]
        variants = [None] if plain_too else []
        if sinks_too:
            variants += [some, *(jnp.full_like(some, x) for x in (-np.inf, 0.0, 50.0))]
        for sinks in variants:
            got = run(q, *sources[0][:2], sinks, extra, value_dim=self.latent, implementation=implementation)
            assert got[0].dtype == q.dtype and got[1].dtype == jnp.float32
            check(got, oracle(q, plain, self.latent, sinks), *self.bounds(implementation))

    def bounds(self, implementation):
        """Of the output and of lse: wider where an NVIDIA GPU makes float16 of FP8 keys."""
        float16 = implementation == "triton" and jax.default_backend() == "gpu" and "float8" in self.kind
        return FLOAT16_BOUND[np.float32] if float16 and self.q_dtype == "bfloat16" else (BOUND[self.q_dtype], 2e-5)


# --- the matrix ------------------------------------------------------------------------------------------------------
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
    case.verify(name)


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
    case.verify("triton", plain_too=False)  # without sinks: the contracts below


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


# --- contracts -------------------------------------------------------------------------------------------------------
def small(kind="float8_e4m3fnuz", heads=6, tokens=3, q_dtype=np.float32, seed=0, latent=32, rope=8, group=32, **kwargs):
    rng = np.random.default_rng(seed)
    cache, keys = make_cache(rng, kind, latent, rope, group, pages=8, page_size=16, **kwargs)
    q = jnp.asarray(rng.standard_normal((tokens, heads, latent + rope)).astype(q_dtype))
    return q, cache, keys, rng


def test_duplicates_count_twice(implementation):
    q, cache, keys, _ = small()
    rows = [[5, 5, 9], [5, 9, 9], [7, 7, 7]]
    got = run(q, cache, as_dense(rows), value_dim=32, implementation=implementation)
    check(got, oracle(q, [(keys, rows)], 32), 1e-5)
    np.testing.assert_allclose(np.asarray(got[0])[2], np.broadcast_to(keys[7, :32], (6, 32)), rtol=1e-5)


def test_lengths_end_rows(implementation):
    """Two sources of rows with lengths: what lies behind them names slots that hold poison."""
    q, cache, keys, rng = small(used=range(64))
    rows, more = make_rows(rng, (40, 0, 13), range(64)), make_rows(rng, (0, 5, 33), range(64))
    out, lse = run(
        q, cache, as_lengths(rows), None, (cache, as_lengths(more)), value_dim=32, implementation=implementation
    )
    check((out, lse), oracle(q, [(keys, rows), (keys, more)], 32), 1e-5)


def test_lengths_are_clamped_to_the_width(implementation):
    q, cache, keys, rng = small()
    values = jnp.asarray(rng.integers(0, 128, (3, 20)), jnp.int32)
    given = DenseRows(values, jnp.asarray([-(2**31), 2**31 - 1, 7], jnp.int32))
    rows = [[], np.asarray(values[1]).tolist(), np.asarray(values[2, :7]).tolist()]
    got = run(q, cache, given, value_dim=32, implementation=implementation)
    check(got, oracle(q, [(keys, rows)], 32), 1e-5)


def test_rows_without_keys_are_exactly_zero(implementation):
    q, cache, _, _ = small(used=())
    dense = jnp.asarray([[-1, -1], [128, 2**31 - 1], [-(2**31), -5]], jnp.int32)
    cases = [(dense, jnp.full((6,), sink)) for sink in (-np.inf, 0.0, 50.0, np.inf)]
    for rows, sinks in [*cases, (as_ragged([[], [128], []]), None)]:
        out, lse = run(q, cache, rows, sinks, value_dim=32, implementation=implementation)
        assert (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


def test_infinite_sink_takes_everything(implementation):
    q, cache, _, _ = small()
    rows = jnp.asarray([[1, 2], [3, 4], [5, 6]], jnp.int32)
    out, lse = run(q, cache, rows, jnp.full((6,), np.inf), value_dim=32, implementation=implementation)
    assert (np.asarray(out) == 0).all() and np.isfinite(np.asarray(lse)).all()


def test_two_sources_are_one_softmax(implementation):
    q, cache, _, _ = small()
    first, second = jnp.asarray([[1, 2], [3, -1], [-1, -1]]), jnp.asarray([[9, 2, 3], [-1, -1, -1], [4, 4, 5]])
    both = run(q, cache, first, None, (cache, second), value_dim=32, implementation=implementation)
    one = run(q, cache, jnp.concatenate([first, second], 1), value_dim=32, implementation=implementation)
    for a, b in zip(both, one):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_one_row_may_hold_the_whole_capacity(implementation):
    q, cache, keys, rng = small(tokens=8, heads=2)
    rows = [[], [], [int(s) for s in rng.integers(0, 128, 100)], [], [3], [], [], []]
    check(
        run(q, cache, as_ragged(rows, 0), value_dim=32, implementation=implementation),
        oracle(q, [(keys, rows)], 32),
        1e-5,
    )


def test_indptr_beyond_the_capacity_is_clamped(implementation):
    q, cache, keys, _ = small()
    ragged = Ragged(values=jnp.asarray([1, 2, 3, 4], jnp.int32), indptr=jnp.asarray([0, 2, 3, 2**31 - 1], jnp.int32))
    got = run(q, cache, ragged, value_dim=32, implementation=implementation)
    check(got, oracle(q, [(keys, [[1, 2], [3], [4]])], 32), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value_dim", [40, 21])
def test_plain_arrays_and_other_value_dims(implementation, dtype, value_dim):
    q, _, _, rng = small(q_dtype=dtype)
    kv = jnp.asarray(rng.standard_normal((50, 40)).astype(dtype))
    rows = [[0, 49, 50], [7, -1, 7], [1, 2, 3]]
    got = run(q, kv, as_dense(rows), value_dim=value_dim, implementation=implementation)
    assert got[0].shape == (3, 6, value_dim)
    check(got, oracle(q, [(np.asarray(kv).astype(np.float64), rows)], value_dim), BOUND[jnp.dtype(dtype).name])


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_include_the_rope_part(implementation, kind):
    q, cache, keys, _ = small(kind)
    rows = [[0, 3, 1], [1, 2, -1], [5, 6, 6]]
    check(
        run(q, cache, as_dense(rows), value_dim=40, implementation=implementation), oracle(q, [(keys, rows)], 40), 1e-5
    )


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn"])
def test_poison_stays_out_of_rope_values(implementation, kind):
    q, cache, keys, _ = small(kind, used=(1, 3, 5, 6))
    rows = [[3, 1, -1], [1, 200, -1], [5, 6, 6]]
    check(
        run(q, cache, as_dense(rows), value_dim=40, implementation=implementation), oracle(q, [(keys, rows)], 40), 1e-5
    )


def test_power_of_two_scales(implementation):
    q, cache, keys, _ = small(scale_dtype=jnp.float8_e8m0fnu)
    rows = [[0, 3, 1], [1, 2, -1], [5, 6, 6]]
    check(
        run(q, cache, as_dense(rows), value_dim=32, implementation=implementation), oracle(q, [(keys, rows)], 32), 1e-5
    )


def test_no_rope_part(implementation):
    q, cache, keys, _ = small(rope=0)
    rows = [[0, 3, 1], [1, 2, -1], [5, 6, 6]]
    check(
        run(q, cache, as_dense(rows), value_dim=32, implementation=implementation), oracle(q, [(keys, rows)], 32), 1e-5
    )


def test_large_logits_do_not_overflow(implementation):
    q, cache, keys, _ = small()
    q, rows = q * 3000, [[0, 3, 1], [1, 2, -1], [5, 6, 6]]
    out, lse = run(q, cache, as_dense(rows), value_dim=32, implementation=implementation)
    want = oracle(q, [(keys, rows)], 32)
    np.testing.assert_allclose(np.asarray(lse), want[1], rtol=1e-5)
    np.testing.assert_allclose(np.asarray(out), want[0], rtol=1e-2, atol=1e-2)


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
        kv = jnp.zeros((0, 40))
    out, lse = run(q, kv, rows, jnp.zeros((6,)), value_dim=32, implementation=implementation)
    assert out.shape == (q.shape[0], 6, 32) and (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


@settings(max_examples=20, deadline=None, database=None)
@given(data=st.data())
def test_any_indices(data):
    q, cache, keys, _ = small(tokens=4)
    index = st.one_of(st.integers(-3, 130), st.sampled_from(WILD))
    rows = data.draw(st.lists(st.lists(index, max_size=20), min_size=4, max_size=4))
    spare = 80 - sum(len(r) for r in rows)
    got = run(q, cache, as_ragged(rows, spare), value_dim=32, implementation="xla")
    check(got, oracle(q, [(keys, rows)], 32), 1e-5)


# --- the XLA body's blocks and chunks, the kernel's splits -----------------------------------------------------------
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


@pytest.mark.parametrize(
    ("splits", "key_block", "shares"),
    [(1, 32, 0), (2, 16, 0), (3, 16, 0), (16, 16, 0), (2, 16, 4), (4, 16, 6), (8, 16, 99)],
)
@pytest.mark.parametrize("held", [as_ragged, as_lengths])
def test_splits_of_the_keys(splits, key_block, shares, held):
    q, cache, keys, rng = small()
    rows, more = make_rows(rng, (100, 0, 13), range(128)), make_rows(rng, (5, 40, 0), range(128))
    sources = [source(cache, held(rows)), source(cache, held(more))]
    sinks = jnp.linspace(-2.0, 2.0, 6)
    plan = AttentionPlan(splits=splits, key_block=key_block, shares=shares)
    got = sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=32, sinks=sinks, plan=plan)
    check(got, oracle(q, [(keys, rows), (keys, more)], 32, sinks), 1e-5)


@pytest.mark.parametrize("scale_dtype", FLOAT16_BOUND, ids=["float32", "e8m0"])
@pytest.mark.parametrize(
    ("form", "kind"), [(form, kind) for form in ("float16", "native") for kind in ("float8_e4m3fn", "float8_e4m3fnuz")]
)
@pytest.mark.parametrize(
    ("splits", "shares", "half_parts", "value_dim", "held"),
    [
        (1, 0, False, 80, as_ragged),
        pytest.param(1, 0, False, 64, as_dense, marks=pytest.mark.slow),
        pytest.param(3, 0, False, 70, as_ragged, marks=pytest.mark.slow),
        (3, 0, True, 70, as_ragged),
        (3, 7, True, 80, as_ragged),
        pytest.param(3, 7, False, 64, as_lengths, marks=pytest.mark.slow),
        (3, 7, True, 64, as_lengths),
    ],
)
def test_forms_for_nvidia(form, kind, scale_dtype, splits, shares, half_parts, value_dim, held):
    """The forms that NVIDIA GPUs run, here in interpret mode: poison, empty rows, wild slots, two sources, sinks."""
    rng = np.random.default_rng(3)
    sources, plain = [], []
    for lengths in ((0, 1, 33, 100, 0), (3, 0, 40, 0, 0)):
        used = 1 + rng.choice(64 * 64 - 1, 300, replace=False)
        cache, keys = make_cache(rng, kind, 64, 16, 32, used=used, scale_dtype=scale_dtype)
        rows = make_rows(rng, lengths, used)
        sources.append(source(cache, held(rows)))
        plain.append((keys, rows))
    q = jnp.asarray(rng.standard_normal((5, 6, 80)) * np.exp2(np.arange(-3, 3))[None, :, None], jnp.bfloat16)
    sinks = jnp.linspace(-2.0, 2.0, 6)
    plan = AttentionPlan(**{form: True}, key_block=32, splits=splits, shares=shares, half_parts=half_parts)
    assert sparse_attention.float16.supports(q, sources, value_dim)
    assert sparse_attention.fp8.supports(q, sources, value_dim)
    got = sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=value_dim, sinks=sinks, plan=plan)
    want = oracle(q, plain, value_dim, sinks)
    bound, lse_bound = FLOAT16_BOUND[scale_dtype]
    out, lse = (np.asarray(x).astype(np.float64) for x in got)
    assert np.isfinite(out).all() and (out[4] == 0).all() and np.isneginf(lse[4]).all()
    assert np.linalg.norm(out - want[0]) <= bound * np.linalg.norm(want[0])
    np.testing.assert_allclose(lse[:4], want[1][:4], atol=lse_bound, rtol=2e-6)


@pytest.mark.parametrize(
    ("scale_dtype", "latent", "value_dim"), [(np.float32, 64, 64), (jnp.float8_e8m0fnu, 96, 112)], ids=["v32", "v4"]
)
@pytest.mark.parametrize(
    ("splits", "shares", "half_parts", "key_block", "held"),
    [
        pytest.param(1, 0, False, 32, as_ragged, marks=pytest.mark.slow),
        (1, 0, False, 16, as_dense),
        (3, 0, True, 32, as_dense),
        pytest.param(3, 7, False, 32, as_ragged, marks=pytest.mark.slow),
        (3, 7, True, 32, as_ragged),
        pytest.param(3, 7, True, 32, as_lengths, marks=pytest.mark.slow),
    ],
)
def test_numbers_that_are_nan_to_the_units(scale_dtype, latent, value_dim, splits, shares, half_parts, key_block, held):
    """+-240 of e4m3fnuz in keys that rows name: exact; rows that do not name them keep their bits."""
    rng = np.random.default_rng(6)
    before, after, plain, touched = [], [], [], set()
    for lengths, marked in (((0, 1, 33, 100, 9), 3), ((3, 0, 40, 0, 5), 2)):
        used = 1 + rng.choice(64 * 64 - 1, 300, replace=False)
        cache, keys = make_cache(rng, "float8_e4m3fnuz", latent, 16, 32, used=used, scale_dtype=scale_dtype)
        rows = make_rows(rng, lengths, used)
        named = [slot for slot in rows[marked] if 0 <= slot < 4096]
        codes = np.asarray(cache.latent).reshape(4096, -1).view(np.uint8).copy()
        scale = np.asarray(cache.scale).reshape(4096, -1).astype(np.float64)
        unused = np.setdiff1d(np.arange(4096), used)[:50]
        chosen = {named[-1]: 5, named[len(named) // 2]: latent - 1}
        for at, (slot, column) in enumerate([*chosen.items(), *((slot, 7) for slot in unused)]):
            codes[slot, column] = (0x7F, 0xFF)[at % 2]
            keys[slot, column] = (240, -240)[at % 2] * scale[slot, column // 32]
        touched |= {t for t, row in enumerate(rows) if set(chosen) & set(row)}
        before.append(source(cache, held(rows)))
        words = jnp.asarray(codes.view(np.uint32).reshape(cache.latent.shape))
        after.append(source(dataclasses.replace(cache, latent=words), held(rows)))
        plain.append((keys, rows))
    q = jnp.asarray(rng.standard_normal((5, 6, latent + 16)), jnp.bfloat16)
    sinks = jnp.linspace(-2.0, 2.0, 6)
    plan = AttentionPlan(form="fp8", key_block=key_block, splits=splits, shares=shares, half_parts=half_parts)
    body = functools.partial(sparse_attention.sparse_attention, sm_scale=SCALE, value_dim=value_dim, plan=plan)
    (clean, _), (out, lse) = (body(q, sources, sinks=sinks) for sources in (before, after))
    want = oracle(q, plain, value_dim, sinks)
    bound, lse_bound = FLOAT16_BOUND[scale_dtype]
    out, lse = (np.asarray(x).astype(np.float64) for x in (out, lse))
    assert np.isfinite(out).all() and {2, 3} <= touched < set(range(5))
    for t in range(5):
        assert np.linalg.norm(out[t] - want[0][t]) <= bound * np.linalg.norm(want[0][t]), t
    np.testing.assert_allclose(lse, want[1], atol=lse_bound, rtol=2e-6)
    same = sorted(set(range(5)) - touched)
    assert np.array_equal(out[same], np.asarray(clean).astype(np.float64)[same])


@pytest.mark.parametrize("form", ["generic", "anchored", "float16", "native"])
@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("splits", [1, 3])
def test_sources_of_different_size(form, small, splits):
    """A slot past the smaller cache is none there, and one in the larger; what it would alias is poison."""
    rng = np.random.default_rng(8)
    few, room = 256, 4096
    sources, plain = [], []
    for number in (0, 1):
        used = 1 + rng.choice((few if number == small else room) - 1, 200, replace=False)
        cache, keys = make_cache(rng, "float8_e4m3fn", 128, 16, 64, used=used)
        rows = make_rows(rng, (0, 40, 3, 70), used)
        if number == small:
            rows = [[*row, *rng.integers(few, room, 9).tolist()] for row in rows]
            cache = jax.tree.map(lambda a: a[: few // 64], cache)
            keys = keys[:few]
        sources.append(source(cache, as_lengths(rows)))
        plain.append((keys, [[slot for slot in row if slot < len(keys)] for row in rows]))
    q = jnp.asarray(rng.standard_normal((4, 6, 144)), jnp.bfloat16)
    half_parts = splits > 1 and form in ("float16", "native")
    plan = AttentionPlan(
        key_block=32, splits=splits, half_parts=half_parts, **({} if form == "generic" else {form: True})
    )
    got = sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=144, plan=plan)
    check(got, oracle(q, plain, 144), *(FLOAT16_BOUND[np.float32] if form in ("float16", "native") else (2e-3, 2e-5)))


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz"])
@pytest.mark.parametrize("scale_dtype", [np.float32, jnp.float8_e8m0fnu], ids=["float32", "e8m0"])
@pytest.mark.parametrize("splits", [1, 3])
def test_anchored_keys(kind, scale_dtype, splits):
    """Keys that are not there repeat one that is; the others of the cache are poison. Some parts have no key at all."""
    rng = np.random.default_rng(4)
    used = 1 + rng.choice(64 * 64 - 1, 300, replace=False)
    q = jnp.asarray(rng.standard_normal((5, 6, 144)), jnp.bfloat16)
    plan = AttentionPlan(anchored=True, key_block=32, splits=splits, num_stages=2)
    first, second = make_rows(rng, (0, 1, 33, 100), used), make_rows(rng, (3, 0, 64, 7), used)
    first.append([-1] * 40 + first[2])
    second.append([-1] * 100)
    sources, truth = [], []
    for rows in (first, second):
        cache, keys = make_cache(rng, kind, 128, 16, 64, used=used, scale_dtype=scale_dtype)
        source = sparse_attention.Source(cache.latent, cache.scale, cache.rope, cache.dtype, 64, as_dense(rows), None)
        # What a select would still pass through were no test of it.
        assert all(tile.full for tile in sparse_attention.layout(source, plan))
        sources.append(source)
        truth.append((keys, rows))
    # All columns are values: FP8 codes of NaN are numbers on a CPU, the NaN of rope columns is not.
    got = sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=144, plan=plan)
    check(got, oracle(q, truth, 144), 2e-3)


@pytest.mark.parametrize("form", ["float16", "native"])
@pytest.mark.parametrize("order", [1, -1])
def test_units_follow_the_largest_scale(order, form):
    """Keys 2**17 apart: the unit grows on the way (order 1) or from the start, nothing overflows."""
    rng = np.random.default_rng(5)
    cache, keys = make_cache(rng, "float8_e4m3fn", 64, 16, 32, scale_dtype=jnp.float8_e8m0fnu)
    factor = np.exp2(np.linspace(-10, 7, 4096).round())
    codes = np.asarray(jax.lax.bitcast_convert_type(cache.scale, jnp.uint8)).reshape(4096, 2).astype(np.int32)
    codes = (codes + np.log2(factor)[:, None].astype(np.int32)).astype(np.uint8).reshape(64, 64, 2)
    scale = jax.lax.bitcast_convert_type(jnp.asarray(codes), jnp.float8_e8m0fnu)
    keys[:, :64] *= factor[:, None]
    rows = np.arange(0, 4096, 41)[None, ::order].astype(np.int32)
    q = jnp.asarray(rng.standard_normal((1, 4, 80)) * 1e-3, jnp.bfloat16)
    source = sparse_attention.Source(cache.latent, scale, cache.rope, cache.dtype, 32, jnp.asarray(rows), None)
    plan = AttentionPlan(**{form: True}, key_block=16)
    out, _ = sparse_attention.sparse_attention(q, [source], sm_scale=SCALE, value_dim=64, plan=plan)
    want = oracle(q, [(keys, rows.tolist())], 64)[0]
    assert np.linalg.norm(np.asarray(out).astype(np.float64) - want) <= 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("form", ["float16", "native"])
def test_units_of_queries(form):
    """Heads whose largest columns lie in the first or in the last tile, in no part of the latents, or are tiny."""
    rng = np.random.default_rng(11)
    cache, keys = make_cache(rng, "float8_e4m3fn", 128, 16, 32)
    factors = np.full((4, 144), 2.0**-4)
    factors[0, :32], factors[1, 96:128], factors[2, :128], factors[3] = 4, 4, 0, 2.0**-60
    q = jnp.asarray(rng.standard_normal((2, 4, 144)) * factors, jnp.bfloat16)
    rows = [[*range(90)], [*range(40, 60)]]
    plan = AttentionPlan(**{form: True}, key_block=16)
    sources = [source(cache, as_ragged(rows))]
    out, _ = sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=128, plan=plan)
    out, want = np.asarray(out).astype(np.float64), oracle(q, [(keys, rows)], 128)[0]
    assert (np.linalg.norm(out - want, axis=-1) <= 4e-3 * np.linalg.norm(want, axis=-1)).all()


@pytest.mark.parametrize("form", ["float16", "native"])
@pytest.mark.parametrize("exponent", [-90, -20, 0, 20, 90])
def test_units_of_parts(form, exponent):
    """Values 2**40 apart in a row's parts, far beyond float16: all precise but what is 2**28 below a head's largest."""
    rng = np.random.default_rng(9)
    cache, keys = make_cache(rng, "float8_e4m3fn", 64, 16, 32)
    rope = keys[:, 64:] * np.exp2(exponent + np.where(np.arange(4096) % 2, 20.0, -20.0))[:, None]
    keys[:, 64:] = np.asarray(jnp.asarray(rope, jnp.bfloat16)).astype(np.float64)
    rope = jnp.asarray(keys[:, 64:], jnp.bfloat16).reshape(64, 64, 16)
    # The rope part of the query is 0: values of any size weigh alike.
    q = jnp.asarray(rng.standard_normal((3, 4, 80)) * (np.arange(80) < 64), jnp.bfloat16)
    # Parts of small values, of large ones, of both, and of none.
    rows = [[*range(0, 64, 2), *range(1, 65, 2)], [*range(2, 70, 2), 5], []]
    source = sparse_attention.Source(cache.latent, cache.scale, rope, cache.dtype, 32, as_dense(rows), None)
    plan = AttentionPlan(**{form: True}, key_block=16, splits=4, half_parts=True)
    out, _ = sparse_attention.sparse_attention(q, [source], sm_scale=SCALE, value_dim=80, plan=plan)
    out, want = np.asarray(out).astype(np.float64), oracle(q, [(keys, rows)], 80)[0]
    assert np.isfinite(out).all() and (out[2] == 0).all()
    # Of a part's largest value, a unit of float16's smallest numbers is 2**-38.
    least = 2.0**-38 * np.abs(want).max(axis=-1)
    for columns in (slice(0, 64), slice(64, 80)):
        error = np.linalg.norm((out - want)[..., columns], axis=-1)
        assert (error <= 4e-3 * np.linalg.norm(want[..., columns], axis=-1) + 8 * least).all()


@settings(deadline=None, database=None)
@given(st.integers(0, 200), st.integers(1, 17), st.integers(0, 3))
def test_parts_are_even(total, parts, beyond):
    """Every block is in one part, parts differ by one block at most, the longer ones first; none is left for others."""
    first, last = (np.asarray(x) for x in blocks_of_part(np.arange(parts + beyond), parts, total))
    assert not (last - first)[parts:].any()
    first, last = first[:parts], last[:parts]
    assert first[0] == 0 and last[-1] == total and (first[1:] == last[:-1]).all()
    sizes = last - first
    assert (sizes >= 0).all() and (np.diff(sizes) <= 0).all() and sizes[0] - sizes[-1] <= 1


def test_plans_are_memoised_and_sensible():
    key = dict(tokens=8, heads=16, width=2048, itemsize=2)
    assert attention_plan(**key) is attention_plan(**key)
    assert attention_plan(**key).splits > 1
    assert attention_plan(**{**key, "tokens": 4096}).splits == 1
    assert attention_plan(**{**key, "width": 1}).splits == 1


# --- inside other programs -------------------------------------------------------------------------------------------
def test_same_bits_every_time(implementation):
    q, sources, _ = Case(6, "float8_e4m3fnuz", "bfloat16", lengths=(0, 17, 40)).build()
    outs = [run(q, *sources[0][:2], value_dim=64, implementation=implementation) for _ in range(20)]
    for out, lse in outs[1:]:
        assert np.asarray(out).tobytes() == np.asarray(outs[0][0]).tobytes()
        assert np.asarray(lse).tobytes() == np.asarray(outs[0][1]).tobytes()


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


# --- merge and apply_sinks -------------------------------------------------------------------------------------------
def test_merge_joins_disjoint_parts(implementation):
    q, cache, keys, rng = small()
    rows = make_rows(rng, (40, 0, 13), range(128))
    parts = [
        run(q, cache, as_dense([r[i::3] for r in rows]), value_dim=32, implementation=implementation) for i in (0, 1, 2)
    ]
    merged = merge(jnp.stack([p[0] for p in parts]), jnp.stack([p[1] for p in parts]))
    check(merged, oracle(q, [(keys, rows)], 32), 1e-5)
    sinks = jnp.asarray(rng.standard_normal(6), jnp.float32)
    want = oracle(q, [(keys, rows)], 32, sinks)
    check((apply_sinks(*merged, sinks), merged[1]), want, 1e-5)


def test_merge_ignores_stale_parts():
    outs = jnp.stack([jnp.ones((2, 3, 4)), jnp.full((2, 3, 4), jnp.nan)])
    lses = jnp.stack([jnp.zeros((2, 3)), jnp.full((2, 3), -jnp.inf)])
    out, lse = merge(outs, lses)
    assert (np.asarray(out) == 1).all() and (np.asarray(lse) == 0).all()
    out, lse = merge(outs[1:], lses[1:])
    assert (np.asarray(out) == 0).all() and np.isneginf(np.asarray(lse)).all()


def test_merge_and_sinks_keep_the_dtype():
    out, lse = merge(jnp.ones((2, 2, 3, 4), jnp.bfloat16), jnp.zeros((2, 2, 3)))
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert apply_sinks(out, lse, jnp.zeros((3,))).dtype == jnp.bfloat16


# --- errors ----------------------------------------------------------------------------------------------------------
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
        ({"q": jnp.zeros((3, 40))}, r"q is .*\[T, H, D\]"),
        ({"q": jnp.zeros((3, 6, 40), jnp.int32)}, "q is int32"),
        ({"q": jnp.zeros((3, 6, 41))}, "must agree"),
        ({"kv": jnp.zeros((3, 40), jnp.int8)}, "kv is int8"),
        ({"kv": jnp.zeros((3, 40), jnp.float8_e4m3fn)}, "PagedKVCache"),
        ({"kv": "cache"}, "kv is str"),
        ({"rows": jnp.zeros((3, 4))}, r"rows of kv is float32\[3, 4\]; expected integers \[3, W\]"),
        ({"rows": jnp.zeros((4, 4), jnp.int32)}, r"rows of kv is int32\[4, 4\]; expected integers \[3, W\]"),
        ({"rows": Ragged(values=jnp.zeros((4,), jnp.int32), indptr=jnp.zeros((3,), jnp.int32))}, "2 rows"),
        ({"rows": [[1], [2], [3]]}, "rows of kv is list"),
        ({"sm_scale": float("nan")}, "sm_scale"),
        ({"sm_scale": None}, "sm_scale"),
        ({"value_dim": 0}, "value_dim is 0"),
        ({"value_dim": 41}, "value_dim is 41"),
        ({"sinks": jnp.zeros((5,))}, r"\[6\]"),
        ({"extra": jnp.zeros((3, 40))}, "pair"),
        ({"extra": (jnp.zeros((3, 30)), jnp.zeros((3, 1), jnp.int32))}, "extra has keys of 30"),
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
