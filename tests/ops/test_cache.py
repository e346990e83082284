"""cache: what a write keeps, byte for byte, what a gather gives, and that neither moves more than its rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from support.cache import (
    DIM,
    DTYPES,
    FP8,
    GROUP,
    LATENT,
    PAGE,
    PAGES,
    ROPE,
    SLOTS,
    Bytes,
    expected_rows,
    gather_index_jit,
    gather_jit,
    kv_cache,
    poisoned,
    rows,
    same_bytes,
    slots_of,
    write_index_jit,
    write_index_op,
    write_jit,
    write_op,
    write_token_op,
)
from support.equivalence import QUICK_COMPILE
from support.marks import interpreted, slow

from pallas_kernels import cache_write, cdna
from pallas_kernels.cdna import lowering
from pallas_kernels.plans.cache_write import CacheWritePlan, cache_write_plan
from sparse_mla_jax.ops.cache import (
    PagedIndexCache,
    PagedKVCache,
    gather,
    gather_index,
    reinterpret_cache,
    write,
    write_index,
    write_token,
)

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("cache")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
flavours = pytest.mark.parametrize("dtype", FP8, ids=lambda d: d.__name__)


def structure(tree) -> Any:
    return jax.tree.structure(tree)


@dtypes
@given(
    slots=st.lists(st.integers(0, SLOTS + 3) | st.sampled_from([-1, -2, 2**31 - 1, -(2**31)]), min_size=7, max_size=7)
)
@settings(deadline=None, max_examples=15, database=None)
def test_write_then_gather(dtype, slots):
    latent, rope, key = rows(7)
    # Distinct where valid, as the contract asks.
    slots = np.array([s if not 0 <= s < SLOTS or s not in slots[:i] else -1 for i, s in enumerate(slots)], np.int32)
    before, before_index = (
        poisoned(kv_cache(dtype)),
        poisoned(PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype)),
    )
    after = write_jit(before, latent, rope, slots)
    after_index = write_index_jit(before_index, key, slots)
    valid = (slots >= 0) & (slots < SLOTS)

    got = np.asarray(gather_jit(after, slots, dtype=jnp.float32))
    np.testing.assert_array_equal(got, np.where(valid[:, None], expected_rows(latent, rope, dtype), 0))
    assert not np.signbit(got[~valid]).any()
    got_index = np.asarray(gather_index_jit(after_index, slots, dtype=jnp.float32))
    if dtype in FP8:
        np.testing.assert_allclose(got_index[valid], np.asarray(key)[valid], atol=float(jnp.abs(key).max()) / 16)
    else:
        np.testing.assert_array_equal(got_index[valid], np.asarray(key.astype(dtype), np.float32)[valid])
    assert (got_index[~valid] == 0).all()

    untouched = np.setdiff1d(np.arange(SLOTS), slots[valid])
    for old, new in [(before, after), (before_index, after_index)]:
        same_bytes(slots_of(new, untouched), slots_of(old, untouched))


# --- bytes
V32, V4 = (512, 64, 128, 128), (448, 64, 128, 64)
CASES = [
    Bytes(FP8[0]),
    Bytes(FP8[0], jnp.float8_e8m0fnu, jnp.bfloat16),
    Bytes(FP8[1], jnp.float32, jnp.bfloat16),
    Bytes(FP8[1], jnp.float8_e8m0fnu),
    Bytes(jnp.bfloat16),
    Bytes(jnp.bfloat16, rows_dtype=jnp.bfloat16),
    Bytes(jnp.float32, rows_dtype=jnp.bfloat16),
    Bytes(jnp.float32),
    # Groups that are no power of two, one group, one value a token, no rotary key.
    Bytes(FP8[0], rows_dtype=jnp.float16, sizes=(60, 3, 12, 12)),
    Bytes(FP8[1], sizes=(8, 0, 4, 8), slots=(4,)),
    Bytes(jnp.bfloat16, sizes=(7, 1, 1, 1), slots=(17, 16, 15)),
    Bytes(jnp.float32, sizes=(6, 0, 4, 1), slots=(2, 4, 2)),
    Bytes(FP8[0], sizes=V32),
    Bytes(FP8[1], jnp.float8_e8m0fnu, sizes=V4),
    Bytes(jnp.bfloat16, sizes=V32),
]
ALL_TYPES = [
    Bytes(d, s, r, sizes)
    for d in DTYPES
    for s in ((jnp.float32, jnp.float8_e8m0fnu) if d in FP8 else (jnp.float32,))
    for r in (jnp.float32, jnp.bfloat16, jnp.float16)
    for sizes in ((LATENT, ROPE, DIM, GROUP), V32, V4)
]
MORE = [slow(c) for c in ALL_TYPES if c not in CASES]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("case", [*CASES, *MORE], ids=str)
def test_bytes_are_those_of_the_reference(implementation, case):
    caches, rows, slots = case.build()
    want = write_token_op(*caches, *rows, slots, implementation="reference")
    got = write_token_op(*caches, *rows, slots, implementation=implementation)
    same_bytes(got, want, write_token_op.label(implementation))
    # What is not named is as it was, and of several tokens the last is there.
    for before, after in zip(caches, want):
        valid = slots[(slots >= 0) & (slots < before.num_slots)]
        others = np.setdiff1d(np.arange(before.num_slots), valid)
        same_bytes(slots_of(after, others), slots_of(before, others))
    last = {slot: token for token, slot in enumerate(slots.tolist())}
    alone = np.array([s if last[s] == token else -1 for token, s in enumerate(slots.tolist())], np.int32)
    same_bytes(write_token_op(*caches, *rows, alone, implementation="reference"), want)


def test_warm_calls_do_not_retrace(implementation):
    given = []
    for shift in (0, 1):
        caches, values, slots = Bytes(FP8[0]).build()
        given.append((*caches, *(x + shift for x in values), slots + np.int32(shift)))
    write_token_op.check_warm(implementation, *given)


# A kernel that quantises and one that casts; the other types of both in the test of bytes.
@pytest.mark.parametrize("dtype", [FP8[0], slow(FP8[1]), jnp.bfloat16, slow(jnp.float32)], ids=lambda d: d.__name__)
def test_both_halves_of_a_token(implementation, dtype):
    caches, (latent, rope, key), slots = Bytes(dtype).build()
    both = write_token_op(*caches, latent, rope, key, slots, implementation=implementation)
    halves = (write_op, (latent, rope)), (write_index_op, (key,))
    same_bytes(both, tuple(f(c, *a, slots, implementation=implementation) for c, (f, a) in zip(caches, halves)))


# Less than a block of 16, one, and more; interpret mode where a block is left over.
@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        *[("gfx942", 15), ("gfx942", 17), ("gfx950", 16), ("gfx950", 50), ("cpu", 17)],
        *[slow("gfx942", 16), slow("gfx942", 50), slow("gfx950", 15), slow("gfx950", 17)],
        *[interpreted("cpu", 15), interpreted("cpu", 16), interpreted("cpu", 50)],
    ],
)
def test_later_tokens_are_found_block_by_block(monkeypatch, target, tokens):
    monkeypatch.setattr(cache_write, "cache_write_plan", lambda **_: CacheWritePlan(scan=16, num_warps=2))
    case = Bytes(FP8[0], slots=tuple(np.random.default_rng(tokens).integers(-1, SLOTS, tokens).tolist()))
    caches, rows, slots = case.build()
    want = write_token_op(*caches, *rows, slots, implementation="reference")
    step = jax.jit(functools.partial(write_token, implementation="triton"), compiler_options=QUICK_COMPILE)
    if target == "cpu":
        return same_bytes(step(*caches, *rows, slots), want)
    require_cdna("triton")
    with cdna.device(target):
        same_bytes(step(*caches, *rows, slots), want)


def test_the_kernel_declines():
    cache = PagedKVCache.create(2, 4, latent_dim=12, rope_dim=2, group_size=6, dtype=FP8[0])
    arguments = (jnp.ones((2, 12), jnp.float32), jnp.ones((2, 2), jnp.float32), jnp.arange(2))
    with pytest.raises(ValueError, match="groups of 6 values"):
        write(cache, *arguments, implementation="triton")
    assert (gather_jit(write_jit(cache, *arguments), np.arange(2), dtype=jnp.float32) == 1).all()
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        write(cache, *arguments, implementation="cuda")
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        write(
            cache, jnp.ones((0, 12), jnp.float32), jnp.ones((0, 2), jnp.float32), jnp.arange(0), implementation="cuda"
        )


def test_plans_are_memoised_and_sensible():
    key = dict(tokens=128, width=512, target="nvidia")
    assert cache_write_plan(**key) is cache_write_plan(**key)
    assert cache_write_plan(**key).scan == 128
    assert cache_write_plan(tokens=10**6, width=4, target="nvidia") == CacheWritePlan(scan=1024, num_warps=1)


TARGETS = {"NVIDIA H200": (132, "cuda"), "gfx942": (304, "rocm"), "gfx950": (256, "rocm")}
LARGE = [c for c in CASES if c.sizes[0] > 400]


# Of AMD's targets one case each: all are compiled by the test of one launch.
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (case, kind) if n == at or kind.startswith("NVIDIA") else slow(case, kind)
        for at, kind in enumerate(TARGETS)
        for n, case in enumerate(LARGE)
    ],
    ids=str,
)
def test_lowering(case, kind):
    """One kernel; on NVIDIA its division is the one that rounds once."""
    cores, platform = TARGETS[kind]
    caches, rows, slots = case.build()
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    step = jax.jit(lambda *a: write_token(*a, implementation="triton"))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = step.trace(*caches, *rows, slots).lower(lowering_platforms=(platform,))
    (kernel,) = lowering.calls_in(lowered)
    assert len(kernel.aliases) == len(jax.tree.leaves(caches))
    assert ("div.rn.f32" in kernel.ir) == (platform == "cuda" and case.dtype in FP8)
    assert "arith.divf" not in kernel.ir or platform == "rocm"


# --- contents
@dtypes
def test_contents_and_properties(dtype):
    cache, index = kv_cache(dtype), PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype)
    quantized = dtype in FP8
    assert cache.dtype == index.dtype == dtype and cache.group_size == GROUP
    assert (cache.num_pages, cache.page_size, cache.num_slots) == (PAGES, PAGE, SLOTS)
    assert (index.num_pages, index.page_size, index.num_slots) == (PAGES, PAGE, SLOTS)
    assert (cache.latent_dim, cache.rope_dim, index.dim) == (LATENT, ROPE, DIM)
    assert cache.quantized == index.quantized == quantized
    assert (cache.scale is None) == (index.scale is None) == (not quantized)
    assert cache.values().shape == (PAGES, PAGE, LATENT) and cache.values().dtype == dtype
    assert index.key.shape == (PAGES, PAGE, DIM) and index.key.dtype == dtype
    size = jnp.dtype(dtype).itemsize
    rope_size = 4 if dtype == jnp.float32 else 2
    assert cache.rope.dtype.itemsize == rope_size
    assert cache.bytes_per_token == LATENT * size + ROPE * rope_size + quantized * 4 * LATENT // GROUP
    assert cache.bytes_per_token * SLOTS == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert index.bytes_per_token * SLOTS == sum(leaf.nbytes for leaf in jax.tree.leaves(index))
    assert (np.asarray(gather_jit(cache, np.arange(SLOTS), dtype=jnp.float32)) == 0).all()
    latent, rope, key = rows(1)
    at = (2, 1)
    slot = np.array([at[0] * PAGE + at[1]])
    filled, filled_index = write_jit(cache, latent, rope, slot), write_index_jit(index, key, slot)
    want = expected_rows(latent, rope, dtype)[0]
    scale = np.asarray(filled.scale)[at].repeat(GROUP) if quantized else 1
    np.testing.assert_array_equal(np.asarray(filled.values())[at].astype(np.float32) * scale, want[:LATENT])
    scale = np.asarray(filled_index.scale)[at] if quantized else 1
    got = np.asarray(filled_index.key)[at].astype(np.float32) * scale
    np.testing.assert_allclose(got, np.asarray(key)[0], atol=0.3 if quantized else 0.02)


def test_published_sizes():
    for dtype, main, index in [
        (FP8[0], 656, 132),
        (FP8[1], 656, 132),
        (jnp.bfloat16, 1152, 256),
        (jnp.float32, 2304, 512),
    ]:
        cache = PagedKVCache.create(2, 64, latent_dim=512, rope_dim=64, group_size=128, dtype=dtype)
        assert cache.bytes_per_token == main
        assert PagedIndexCache.create(2, 64, dim=128, dtype=dtype).bytes_per_token == index


@flavours
def test_power_of_two_scales(dtype):
    cache = kv_cache(dtype, scale_dtype=jnp.float8_e8m0fnu)
    assert cache.scale is not None and cache.scale.dtype == jnp.float8_e8m0fnu
    latent, rope, _ = rows(4)
    slots = np.array([14, -1, 0, 99])
    assert (np.asarray(gather_jit(cache, slots, dtype=jnp.float32)) == 0).all()
    got = np.asarray(gather_jit(write_jit(cache, latent, rope, slots), slots, dtype=jnp.float32))
    np.testing.assert_allclose(got[[0, 2], :LATENT], np.asarray(latent)[[0, 2]], rtol=1 / 16, atol=1e-3)
    assert (got[[1, 3]] == 0).all()


@flavours
def test_other_flavour_holds_the_same_numbers(dtype):
    other = FP8[1 - FP8.index(dtype)]
    latent, rope, key = rows(SLOTS)
    slots = np.arange(SLOTS)
    cache = write_jit(kv_cache(dtype), latent, rope, slots)
    index = write_index_jit(PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype), key, slots)
    moved, moved_index = (jax.jit(lambda c: reinterpret_cache(c, other))(c) for c in (cache, index))
    assert moved.dtype == moved_index.dtype == other
    for get, a, b in [(gather_jit, cache, moved), (gather_index_jit, index, moved_index)]:
        np.testing.assert_array_equal(
            np.asarray(get(a, slots, dtype=jnp.float32)), np.asarray(get(b, slots, dtype=jnp.float32))
        )
    np.testing.assert_array_equal(np.asarray(moved.latent), np.asarray(cache.latent))
    np.testing.assert_array_equal(np.asarray(moved_index.data), np.asarray(index.data))
    for a, b in [(reinterpret_cache(moved, dtype), cache), (reinterpret_cache(cache, dtype), cache)]:
        assert a.dtype == b.dtype
        same_bytes(a, b)


@dtypes
def test_poison_never_reaches_other_slots(dtype):
    latent, rope, key = rows(2)
    slots = np.array([4, 9])
    cache = poisoned(write_jit(kv_cache(dtype), latent, rope, slots), keep=slots)
    index = poisoned(write_index_jit(PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype), key, slots), keep=slots)
    asked = np.array([[9, -1, 4], [SLOTS, 4, -(2**31)]])
    for out in (jnp.float32, jnp.bfloat16):
        got, got_index = gather_jit(cache, asked, dtype=out), gather_index_jit(index, asked, dtype=out)
        assert got.shape == (2, 3, LATENT + ROPE) and got_index.shape == (2, 3, DIM)
        assert got.dtype == got_index.dtype == out
        want = np.asarray(jnp.asarray(expected_rows(latent, rope, dtype)).astype(out))
        np.testing.assert_array_equal(np.asarray(got)[[0, 0, 1], [0, 2, 1]], want[[1, 0, 0]])
        for result in (got, got_index):
            assert np.isfinite(np.asarray(result, np.float32)).all()
            assert (np.asarray(result, np.float32)[[0, 1, 1], [1, 0, 2]] == 0).all()


# --- inside other programs
@dtypes
def test_abstract(dtype):
    make = lambda: (kv_cache(dtype), PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype))  # noqa: E731
    cache, index = jax.eval_shape(make)
    real, real_index = make()
    assert structure((cache, index)) == structure((real, real_index))
    assert (cache.num_slots, cache.latent_dim, cache.bytes_per_token) == (SLOTS, LATENT, real.bytes_per_token)
    assert (index.num_slots, index.dim, index.bytes_per_token) == (SLOTS, DIM, real_index.bytes_per_token)
    latent, rope, key = rows(4)
    slots = jax.ShapeDtypeStruct((4,), jnp.int32)
    assert jax.eval_shape(write, cache, latent, rope, slots) == cache
    assert jax.eval_shape(write_index, index, key, slots) == index
    assert jax.eval_shape(write_token, cache, index, latent, rope, key, slots) == (cache, index)
    out = jax.eval_shape(lambda c, s: gather(c, s, dtype=jnp.bfloat16), cache, slots)
    assert out.shape == (4, LATENT + ROPE) and out.dtype == jnp.bfloat16


@dtypes
def test_inside_shard_map(dtype):
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    latent, rope, key = rows(4)
    slots = np.array([3, -1, 8, 99], np.int32)

    def step(cache, index, latent, rope, key, slots):
        cache, index = write(cache, latent, rope, slots), write_index(index, key, slots)
        return gather(cache, slots, dtype=jnp.float32), gather_index(index, slots, dtype=jnp.float32)

    arguments = (kv_cache(dtype), PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype), latent, rope, key, slots)
    specs = (PartitionSpec("x"), PartitionSpec("x"), *[PartitionSpec()] * 4)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"))
    for a, b in zip(jax.jit(mapped)(*arguments), jax.jit(step)(*arguments)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("slot_dtype", [np.int8, np.uint8, np.int16, np.int32, np.uint32])
# Slots are widened before any implementation sees them.
@pytest.mark.parametrize("name", ["xla", interpreted("triton"), "reference"])
def test_slots_of_any_integer_type(name, slot_dtype):
    cache = PagedKVCache.create(100, 7, latent_dim=4, rope_dim=2, group_size=4, dtype=jnp.float32)
    slots = np.array([3, 100, np.iinfo(slot_dtype).max], slot_dtype)
    after = write_op(cache, jnp.ones((3, 4), jnp.float32), jnp.ones((3, 2), jnp.float32), slots, implementation=name)
    want = [1, 1, slots[-1] < 700]
    assert (np.asarray(gather_jit(after, slots, dtype=jnp.float32))[:, 0] == want).all()


@dtypes
def test_no_tokens(dtype):
    cache, index = kv_cache(dtype), PagedIndexCache.create(PAGES, PAGE, dim=DIM, dtype=dtype)
    none = jnp.zeros((0,), jnp.int32)
    latent, rope, key = rows(0)
    for a, b in [(write_jit(cache, latent, rope, none), cache), (write_index_jit(index, key, none), index)]:
        same_bytes(a, b)
    assert gather_jit(cache, none, dtype=jnp.float32).shape == (0, LATENT + ROPE)
    assert gather_index_jit(index, none, dtype=jnp.float32).shape == (0, DIM)


def test_caches_are_pytrees_that_compare_by_type():
    a, b = kv_cache(FP8[0]), kv_cache(FP8[1])
    assert structure(a) != structure(b)
    assert structure(a) == structure(dataclasses.replace(a, rope=a.rope + 1))
    assert len(jax.tree.leaves(kv_cache(jnp.float32))) == 2


KV: Any = dict(latent_dim=LATENT, rope_dim=ROPE, group_size=GROUP)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PagedKVCache.create(0, 4, **KV), "num_pages is 0"),
        (lambda: PagedKVCache.create(4, 0, **KV), "page_size is 0"),
        (lambda: PagedKVCache.create(4, -64, **KV), "page_size is -64"),
        (lambda: PagedKVCache.create(4, **KV | {"page_size": 2.0}), "page_size is 2.0"),
        (lambda: PagedKVCache.create(4, True, **KV), "page_size is True"),
        (lambda: PagedKVCache.create(4, **KV | {"page_size": "64"}), "page_size is '64'"),
        (lambda: PagedKVCache.create(2**25, 64, **KV), r"2\*\*31"),
        (lambda: PagedKVCache.create(4, 4, **KV | {"latent_dim": 0}), "latent_dim is 0"),
        (lambda: PagedKVCache.create(4, 4, **KV | {"rope_dim": -1}), "rope_dim is -1"),
        (lambda: PagedKVCache.create(4, 4, **KV | {"group_size": 0}), "group_size is 0"),
        (lambda: PagedKVCache.create(4, 4, **KV | {"group_size": 7}), "group_size is 7"),
        (lambda: PagedKVCache.create(4, 4, latent_dim=6, rope_dim=2, group_size=3), "multiple of 4"),
        (lambda: PagedKVCache.create(4, 4, **KV, dtype=jnp.float8_e5m2), "float8_e5m2"),
        (lambda: PagedKVCache.create(4, 4, **KV, dtype="fp8"), "dtype is 'fp8'"),
        (lambda: PagedKVCache.create(4, 4, **KV, dtype=jnp.int8), "dtype is int8"),
        (lambda: PagedKVCache.create(4, 4, **KV, scale_dtype=jnp.bfloat16), "scale_dtype is bfloat16"),
        (lambda: PagedIndexCache.create(0, 4, dim=8), "num_pages is 0"),
        (lambda: PagedIndexCache.create(4, 0, dim=8), "page_size is 0"),
        (lambda: PagedIndexCache.create(2**25, 64, dim=8), r"2\*\*31"),
        (lambda: PagedIndexCache.create(4, 4, dim=0), "dim is 0"),
        (lambda: PagedIndexCache.create(4, 4, dim=6), "multiple of 4"),
        (lambda: PagedIndexCache.create(4, 4, dim=8, dtype=jnp.float16), "float16"),
        (lambda: write(kv_cache(FP8[0]), rows(3)[0], rows(3)[1], jnp.arange(4)), r"latent is .*expected .*\[4, "),
        (
            lambda: write(kv_cache(FP8[0]), rows(3)[0], rows(3)[1], jnp.ones((3, 1), jnp.int32)),
            r"slots is int32\[3, 1\]",
        ),
        (lambda: write(kv_cache(FP8[0]), rows(3)[0], rows(3)[1], jnp.ones((3,), jnp.float32)), "slots is float32"),
        (lambda: write(kv_cache(FP8[0]), rows(3)[1], rows(3)[0], jnp.arange(3)), r"latent is .*expected .*\[3, "),
        (lambda: write(kv_cache(FP8[0]), rows(3)[0], rows(3)[2], jnp.arange(3)), r"rope is .*expected .*\[3, "),
        (lambda: write(kv_cache(FP8[0]), rows(3)[0].astype(int), rows(3)[1], jnp.arange(3)), "latent is int(32|64)"),
        (
            lambda: write_index(PagedIndexCache.create(4, 4, dim=8), rows(3)[2], jnp.arange(3)),
            r"key is .*\[3, 8\]",
        ),
        (
            lambda: write_token(
                kv_cache(FP8[0]), PagedIndexCache.create(4, 4, dim=8), *rows(3)[:2], rows(3)[2], jnp.arange(3)
            ),
            r"key is .*\[3, 8\]",
        ),
        (lambda: gather(kv_cache(FP8[0]), jnp.ones((3,), jnp.float32), dtype=jnp.float32), "slots is float32"),
        (lambda: gather(kv_cache(FP8[0]), jnp.arange(3), dtype=jnp.int32), "dtype is"),
        (lambda: reinterpret_cache(kv_cache(jnp.float32), FP8[0]), "cache has dtype float32"),
        (lambda: reinterpret_cache(kv_cache(FP8[0]), jnp.float32), "dtype is float32"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unquantised_caches_take_any_width():
    cache = PagedKVCache.create(2, 3, latent_dim=7, rope_dim=0, group_size=4, dtype=jnp.bfloat16)
    assert (cache.latent_dim, cache.rope_dim, cache.bytes_per_token) == (7, 0, 14)
