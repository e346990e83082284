"""The forms and splits of sparse_mla's kernel, each by its plan, in interpret mode against the float64 oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import (
    FLOAT16_BOUND,
    as_dense,
    as_lengths,
    as_ragged,
    check,
    launch,
    make_cache,
    make_rows,
    oracle,
    small,
    source,
)
from support.equivalence import Norm, assert_leaves

from pallas_kernels import sparse_attention
from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.sparse_attention.rows import blocks_of_part

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("attention_plans")

# By default one form of rows each, of which a split needs nothing but where a row's blocks begin; two parts are as
# three, and one part is what the kernel's contracts have.
SPLITS = [(1, 32, 0), (2, 16, 0), (3, 16, 0), (16, 16, 0), (2, 16, 4), (4, 16, 6), (8, 16, 99)]
OFTEN = [(as_lengths if n in (1, 3, 5) else as_ragged) for n in range(len(SPLITS))]


@pytest.mark.parametrize(
    ("splits", "key_block", "shares", "held"),
    [
        pytest.param(*split, held, marks=[] if held is often and n > 1 else pytest.mark.slow)
        for n, (split, often) in enumerate(zip(SPLITS, OFTEN))
        for held in (as_ragged, as_lengths)
    ],
)
def test_splits_of_the_keys(splits, key_block, shares, held):
    q, cache, keys, rng = small()
    rows, more = make_rows(rng, (100, 0, 13), range(128)), make_rows(rng, (5, 40, 0), range(128))
    sources = [(cache, held(rows)), (cache, held(more))]
    sinks = jnp.linspace(-2.0, 2.0, 6, dtype=jnp.float32)
    plan = AttentionPlan(splits=splits, key_block=key_block, shares=shares)
    got = launch(q, sources, sinks, value_dim=32, plan=plan)
    check(got, oracle(q, [(keys, rows), (keys, more)], 32, sinks), 1e-5)


LAYOUTS = [
    (1, 0, False, 80, as_ragged),
    (1, 0, False, 64, as_dense),
    (3, 0, False, 70, as_ragged),
    (3, 0, True, 70, as_ragged),
    (3, 7, True, 80, as_ragged),
    (3, 7, False, 64, as_lengths),
    (3, 7, True, 64, as_lengths),
]
FLAVOURS = [(kind, scale) for kind in ("float8_e4m3fn", "float8_e4m3fnuz") for scale in FLOAT16_BOUND]
# By default every form has each flavour with each type of scales, and each of these layouts, once: the flavour decides
# how codes become numbers, the layout which of them a program reads and where its sums go.
ONCE = {"float16": dict(zip((0, 3, 4, 6), FLAVOURS)), "fp8": dict(zip((6, 0, 3, 4), FLAVOURS))}


def forms_for_nvidia():
    for form in ONCE:
        for number, layout in enumerate(LAYOUTS):
            for kind, scale in FLAVOURS:
                name = f"{form}-{kind}-{'float32' if scale is np.float32 else 'e8m0'}-" + "-".join(
                    x.__name__ if callable(x) else str(x) for x in layout
                )
                marks = [] if ONCE[form].get(number) == (kind, scale) else pytest.mark.slow
                yield pytest.param(form, kind, scale, *layout, id=name, marks=marks)


@pytest.mark.parametrize(
    ("form", "kind", "scale_dtype", "splits", "shares", "half_parts", "value_dim", "held"), list(forms_for_nvidia())
)
def test_forms_for_nvidia(form, kind, scale_dtype, splits, shares, half_parts, value_dim, held):
    """The forms that NVIDIA GPUs run, here in interpret mode: poison, empty rows, wild slots, two sources, sinks."""
    rng = np.random.default_rng(3)
    sources, plain = [], []
    for lengths in ((0, 1, 33, 100, 0), (3, 0, 40, 0, 0)):
        used = 1 + rng.choice(64 * 64 - 1, 300, replace=False)
        cache, keys = make_cache(rng, kind, 64, 16, 32, used=used, scale_dtype=scale_dtype)
        rows = make_rows(rng, lengths, used)
        sources.append((cache, held(rows)))
        plain.append((keys, rows))
    q = jnp.asarray(rng.standard_normal((5, 6, 80)) * np.exp2(np.arange(-3, 3))[None, :, None], jnp.bfloat16)
    sinks = jnp.linspace(-2.0, 2.0, 6, dtype=jnp.float32)
    plan = AttentionPlan(form=form, key_block=32, splits=splits, shares=shares, half_parts=half_parts)
    for module in (sparse_attention.float16, sparse_attention.fp8):
        assert module.supports(q, [source(*pair) for pair in sources], value_dim)
    got = launch(q, sources, sinks, value_dim=value_dim, plan=plan)
    assert np.isneginf(got[1][4]).all()
    check(got, oracle(q, plain, value_dim, sinks), *FLOAT16_BOUND[scale_dtype])


@pytest.mark.parametrize("form", [sparse_attention.float16, sparse_attention.fp8], ids=["float16", "fp8"])
def test_what_a_form_takes(form):
    """Keys without a rotated part too; of mixed types, or with a rotated part that is no bfloat16, none."""
    rng = np.random.default_rng(0)
    kinds = "float8_e4m3fn", "float8_e4m3fnuz", "bfloat16"
    first, other, wide = (source(make_cache(rng, kind, 64, 16, 32)[0], np.zeros((2, 4), np.int32)) for kind in kinds)
    q = jnp.zeros((2, 6, 80), jnp.bfloat16)
    bare = dataclasses.replace(first, rope=None)
    assert form.supports(q, [first, first], 64) and form.supports(q[..., :64], [bare, bare], 64)
    assert not form.supports(q, [first, bare], 64)
    assert not form.supports(q, [first, other], 64)
    assert not form.supports(q, [dataclasses.replace(first, rope=first.rope.astype(jnp.float32))], 64)
    assert not form.supports(q.astype(jnp.float32), [first], 64)
    assert not form.supports(q, [wide], 64)


SIZES = {"v32": (np.float32, 64, 64), "v4": (jnp.float8_e8m0fnu, 96, 112)}
NAN_LAYOUTS = [
    (1, 0, False, 32, as_ragged),
    (1, 0, False, 16, as_dense),
    (3, 0, True, 32, as_dense),
    (3, 7, False, 32, as_ragged),
    (3, 7, True, 32, as_ragged),
    (3, 7, True, 32, as_lengths),
]


# A program without parts once, parts of both kinds with one of the sizes each.
@pytest.mark.parametrize(
    ("scale_dtype", "latent", "value_dim", "splits", "shares", "half_parts", "key_block", "held"),
    [
        pytest.param(
            *sizes,
            *layout,
            id=f"{name}-{number}",
            marks=[] if (name, number) in (("v4", 1), ("v32", 2), ("v4", 4)) else pytest.mark.slow,
        )
        for name, sizes in SIZES.items()
        for number, layout in enumerate(NAN_LAYOUTS)
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
        before.append((cache, held(rows)))
        words = jnp.asarray(codes.view(np.uint32).reshape(cache.latent.shape))
        after.append((dataclasses.replace(cache, latent=words), held(rows)))
        plain.append((keys, rows))
    q = jnp.asarray(rng.standard_normal((5, 6, latent + 16)), jnp.bfloat16)
    sinks = jnp.linspace(-2.0, 2.0, 6, dtype=jnp.float32)
    plan = AttentionPlan(form="fp8", key_block=key_block, splits=splits, shares=shares, half_parts=half_parts)
    (clean, _), (out, lse) = (launch(q, x, sinks, value_dim=value_dim, plan=plan) for x in (before, after))
    want = oracle(q, plain, value_dim, sinks)
    bound, lse_bound = FLOAT16_BOUND[scale_dtype]
    out, lse = (np.asarray(x).astype(np.float64) for x in (out, lse))
    assert np.isfinite(out).all() and {2, 3} <= touched < set(range(5))
    for t in range(5):
        assert np.linalg.norm(out[t] - want[0][t]) <= bound * np.linalg.norm(want[0][t]), t
    np.testing.assert_allclose(lse, want[1], atol=lse_bound, rtol=2e-6)
    same = sorted(set(range(5)) - touched)
    assert np.array_equal(out[same], np.asarray(clean).astype(np.float64)[same])


# Fields of a plan that choose what a test calls a form.
FORM_FIELDS = {"generic": {}, "anchored": {"anchored": True}, "float16": {"form": "float16"}, "fp8": {"form": "fp8"}}


# Of the four combinations of the smaller source and of splits, two with every form by default.
@pytest.mark.parametrize(
    ("form", "small", "splits"),
    [
        pytest.param(form, small, splits, marks=[] if (splits > 1) == (small ^ number % 2) else pytest.mark.slow)
        for number, form in enumerate(["generic", "anchored", "float16", "fp8"])
        for small in (0, 1)
        for splits in (1, 3)
    ],
)
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
        sources.append((cache, as_lengths(rows)))
        plain.append((keys, [[slot for slot in row if slot < len(keys)] for row in rows]))
    q = jnp.asarray(rng.standard_normal((4, 6, 144)), jnp.bfloat16)
    half_parts = splits > 1 and form in ("float16", "fp8")
    plan = AttentionPlan(key_block=32, splits=splits, half_parts=half_parts, **FORM_FIELDS[form])
    got = launch(q, sources, value_dim=144, plan=plan)
    check(got, oracle(q, plain, 144), *(FLOAT16_BOUND[np.float32] if form in ("float16", "fp8") else (2e-3, 2e-5)))


# bfloat16 has no scales: the second type of them repeats the first.
ANCHORED = {("bfloat16", 0, 3), ("float8_e4m3fn", 0, 1), ("float8_e4m3fn", 1, 3), ("float8_e4m3fnuz", 1, 1)}


@pytest.mark.parametrize(
    ("kind", "scale_dtype", "splits"),
    [
        pytest.param(
            kind,
            scale,
            splits,
            id=f"{kind}-{('float32', 'e8m0')[number]}-{splits}",
            marks=[] if (kind, number, splits) in ANCHORED else pytest.mark.slow,
        )
        for kind in ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz")
        for number, scale in enumerate([np.float32, jnp.float8_e8m0fnu])
        for splits in (1, 3)
    ],
)
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
        # What a select would still pass through were no test of it.
        assert all(tile.full for tile in sparse_attention.layout(source(cache, as_dense(rows)), plan))
        sources.append((cache, as_dense(rows)))
        truth.append((keys, rows))
    # All columns are values: FP8 codes of NaN are numbers on a CPU, the NaN of rope columns is not.
    got = launch(q, sources, value_dim=144, plan=plan)
    check(got, oracle(q, truth, 144), 2e-3)


@pytest.mark.parametrize("form", ["float16", "fp8"])
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
    sources = [(dataclasses.replace(cache, scale=scale), jnp.asarray(rows))]
    out, _ = launch(q, sources, value_dim=64, plan=AttentionPlan(form=form, key_block=16))
    assert_leaves(out, oracle(q, [(keys, rows.tolist())], 64)[0], Norm(2e-3), form)


@pytest.mark.parametrize("form", ["float16", "fp8"])
def test_units_of_queries(form):
    """Heads whose largest columns lie in the first or in the last tile, in no part of the latents, or are tiny."""
    rng = np.random.default_rng(11)
    cache, keys = make_cache(rng, "float8_e4m3fn", 128, 16, 32)
    factors = np.full((4, 144), 2.0**-4)
    factors[0, :32], factors[1, 96:128], factors[2, :128], factors[3] = 4, 4, 0, 2.0**-60
    q = jnp.asarray(rng.standard_normal((2, 4, 144)) * factors, jnp.bfloat16)
    rows = [[*range(90)], [*range(40, 60)]]
    plan = AttentionPlan(form=form, key_block=16)
    out, _ = launch(q, [(cache, as_ragged(rows))], value_dim=128, plan=plan)
    out, want = np.asarray(out).astype(np.float64), oracle(q, [(keys, rows)], 128)[0]
    assert (np.linalg.norm(out - want, axis=-1) <= 4e-3 * np.linalg.norm(want, axis=-1)).all()


@pytest.mark.parametrize("form", ["float16", "fp8"])
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
    plan = AttentionPlan(form=form, key_block=16, splits=4, half_parts=True)
    out, _ = launch(q, [(dataclasses.replace(cache, rope=rope), as_dense(rows))], value_dim=80, plan=plan)
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
    every = blocks_of_part(np.arange(20), parts, total)  # of one size, which compiles once
    first, last = (np.asarray(x)[: parts + beyond] for x in every)
    assert not (last - first)[parts:].any()
    first, last = first[:parts], last[:parts]
    assert first[0] == 0 and last[-1] == total and (first[1:] == last[:-1]).all()
    sizes = last - first
    assert (sizes >= 0).all() and (np.diff(sizes) <= 0).all() and sizes[0] - sizes[-1] <= 1


def test_plans_are_memoised_and_sensible():
    key = dict(tokens=8, heads=16, width=2048, itemsize=2, target="gfx942")
    assert attention_plan(**key) is attention_plan(**key)
    assert attention_plan(**key).splits > 1
    assert attention_plan(**{**key, "tokens": 4096}).splits == 1
    assert attention_plan(**{**key, "width": 1}).splits == 1


def test_wide_keys_have_more_waves_and_smaller_blocks():
    """dots3's 1024 + 64: one wave of CDNA would spill, and two blocks of 128 keys exceed NVIDIA's shared memory."""
    key = dict(tokens=8, heads=64, width=512, itemsize=2, columns=1088)
    assert [attention_plan(**key, target=arch).num_warps for arch in ("gfx942", "gfx950")] == [2, 2]
    assert attention_plan(**key, fp8=True, target="gfx942").num_warps == 4
    assert attention_plan(**{**key, "itemsize": 4}, target="gfx942").num_warps == 4
    native = attention_plan(**key, fp8=True, native=True, key_bytes=1152, target="nvidia")
    assert 2 * native.key_block * 1152 <= 227 * 1024
