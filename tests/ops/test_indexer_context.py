"""The lightning indexer and attention with the pages of every request spread over an axis: as on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.equivalence import Close, Same, assert_leaves
from support.marks import slow

from sparse_mla_jax.ops import attention, cache, context_pages, indexer
from sparse_mla_jax.ops.merge_across import merge_across
from sparse_mla_jax.ops.ragged import slots_from_positions

REQUESTS, PAGES, PAGE_SIZE, DIM = 3, 9, 4, 32
# A request that does not exist, no key, one page, all.
OWNERS = np.array([0, 0, 1, 2, 2, 1, 5], np.int32)
LENGTHS = np.array([0, 36, 5, 17, 23, 35, 9], np.int32)
# The last page of request 1 is none of the cache: its columns score -inf.
TABLE = np.arange(REQUESTS * PAGES, dtype=np.int32).reshape(REQUESTS, PAGES)
TABLE[1, 8] = -1


def on_mesh(n, fn, args, in_specs, out_specs):
    mesh = jax.make_mesh((n,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs))(*args)


def integers(seed, *shape):
    """Sums of their products are exact, and many are equal."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape), jnp.float32)


def spread_pages(n):
    """(the page table with numbers of local pages, [n, local pages]: which page of TABLE each holds)."""
    own = -(-PAGES // n)
    local, held = np.full_like(TABLE, -1), np.zeros((n, REQUESTS * own), np.int32)
    for (request, column), page in np.ndenumerate(TABLE):
        if page >= 0:
            local[request, column] = request * own + column // n
            held[column % n, local[request, column]] = page
    return local, held


def spread_cache(whole, n):
    """The caches of all devices, one after the other; a page that no table names holds keys of another request."""
    return jax.tree.map(lambda x: x[spread_pages(n)[1].reshape(-1)], whole)


@functools.cache
def index_cache(kind):
    empty = cache.PagedIndexCache.create(TABLE.size, PAGE_SIZE, dim=DIM, dtype=kind)
    return cache.write_index(empty, integers(0, TABLE.size * PAGE_SIZE, DIM), jnp.arange(TABLE.size * PAGE_SIZE))


QUERY, WEIGHTS = integers(1, 7, 4, DIM), integers(2, 7, 4)


def select(n, kind="float32", *, name="xla", own=False, **how):
    """lightning_indexer on n devices; with `own`, [n, T, k]."""
    local, _ = spread_pages(n)

    def fn(keys):
        got = indexer.lightning_indexer(
            *(QUERY, WEIGHTS, keys, local, OWNERS, LENGTHS),
            **how,
            axis_name="x",
            own_keys=own,
            implementation=name,
        )
        return got[None] if own else got

    return on_mesh(n, fn, (spread_cache(index_cache(kind), n),), P("x"), P("x") if own else P())


def select_on_one(kind="float32", **how):
    run = functools.partial(indexer.lightning_indexer, implementation="xla", **how)
    return jax.jit(run)(QUERY, WEIGHTS, index_cache(kind), TABLE, OWNERS, LENGTHS)


# Less and more than a device has, with scores and without, and all that is visible.
SELECTIONS = [
    dict(k=5, max_length=36),
    dict(k=20, max_length=33, return_scores=True),
    dict(k=40, max_length=36),
    dict(k=40, max_length=36, return_scores=True),
]


@pytest.mark.parametrize(
    ("n", "kind", "name", "how"),
    [
        (2, "float32", "xla", SELECTIONS[0]),
        (4, "float32", "xla", SELECTIONS[1]),
        slow(8, "float8_e4m3fn", "xla", SELECTIONS[1]),
        (4, "float32", "xla", SELECTIONS[2]),
        (8, "float32", "xla", SELECTIONS[3]),
        (2, "float8_e4m3fnuz", "triton", SELECTIONS[1]),
        slow(1, "float32", "xla", SELECTIONS[1]),
        slow(3, "bfloat16", "xla", SELECTIONS[1]),
        slow(4, "float8_e4m3fn", "triton", SELECTIONS[0]),
        slow(2, "float32", "reference", SELECTIONS[1]),
    ],
)
def test_selects_as_one_device(n, kind, name, how):
    assert_leaves(select(n, kind, name=name, **how), select_on_one(kind, **how), Same())


def test_chunks_of_rows_change_nothing():
    """Two rows of the 20 columns of the first device at a time."""
    how = SELECTIONS[1]
    assert_leaves(select(2, **how, memory_limit=2 * 4 * 20), select_on_one(**how), Same())


@pytest.mark.parametrize(
    ("n", "name", "how"),
    [
        (2, "xla", SELECTIONS[0]),
        (4, "xla", SELECTIONS[2]),
        (8, "xla", dict(k=20, max_length=36, memory_limit=3 * 4 * 8)),
        (2, "triton", dict(k=20, max_length=36)),
        slow(4, "triton", SELECTIONS[0]),
        slow(2, "reference", SELECTIONS[0]),
    ],
)
def test_own_keys_are_the_part_of_this_device(n, name, how):
    shares = np.asarray(select(n, name=name, own=True, **how))
    want = np.asarray(select_on_one(**{key: how[key] for key in ("k", "max_length")}))
    for index in range(n):
        is_own = (want >= 0) & (want // PAGE_SIZE % n == index)
        for row, own in enumerate(is_own):
            mine = want[row, own]
            np.testing.assert_array_equal(
                shares[index, row], np.pad(mine, (0, how["k"] - len(mine)), constant_values=-1)
            )


def test_no_token():
    def fn(keys):
        how = dict(k=3, max_length=36, axis_name="x", own_keys=True)
        none = jnp.zeros(0, jnp.int32)
        return indexer.lightning_indexer(QUERY[:0], WEIGHTS[:0], keys, TABLE, none, none, **how)[None]

    assert on_mesh(2, fn, (spread_cache(index_cache("float32"), 2),), P("x"), P("x")).shape == (2, 0, 3)


# --- attention
def parts_of_attention(n, heads, dtype=jnp.float32):
    """Attention on one device, and on n to the share of each, merged; row 0 has no key, row 2 those of one page."""
    rng = np.random.default_rng(0)
    latent, rope = (jnp.asarray(rng.standard_normal((TABLE.size * PAGE_SIZE, d)), jnp.float32) for d in (24, 8))
    sizes = dict(latent_dim=24, rope_dim=8, group_size=8, dtype="float32")
    whole = cache.PagedKVCache.create(TABLE.size, PAGE_SIZE, **sizes)
    whole = cache.write(whole, latent, rope, jnp.arange(TABLE.size * PAGE_SIZE), implementation="xla")
    q = jnp.asarray(rng.standard_normal((7, heads, 32)), dtype)
    chosen = np.asarray(select_on_one(k=12, max_length=36))
    attend = functools.partial(attention.sparse_mla, sm_scale=0.2, value_dim=24, return_lse=True, implementation="xla")
    local, _ = spread_pages(n)

    def fn(keys):
        index = jax.lax.axis_index("x")
        mine = context_pages.to_local(chosen, index, n, PAGE_SIZE)
        pages = context_pages.own_pages(local, index, n)
        return merge_across(*attend(q, keys, slots_from_positions(mine, OWNERS, pages, page_size=PAGE_SIZE)), "x")

    got = on_mesh(n, fn, (spread_cache(whole, n),), P("x"), P())
    return got, jax.jit(attend)(q, whole, slots_from_positions(chosen, OWNERS, TABLE, page_size=PAGE_SIZE))


# By heads, which the devices share, and where they can not be shared.
@pytest.mark.parametrize(("n", "heads"), [(2, 4), (4, 6), slow(8, 8), slow(1, 3), slow(4, 4)])
def test_merged_attention_is_that_of_one_device(n, heads):
    got, want = parts_of_attention(n, heads)
    # Sums of at most 12 weights of values of size 1 in another order.
    assert_leaves(got, want, Close(rtol=4e-6, atol=2e-6))
    assert (got[0][0] == 0).all() and jnp.isneginf(got[1][0]).all()


def test_merged_attention_in_bfloat16():
    (out, lse), (want, _) = parts_of_attention(2, 4, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    # Each part and the result are rounded to 8 bits.
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("heads", [2, 3])
def test_empty_parts_may_hold_anything(heads):
    """The rule of `merge`, whatever marks them: -inf, inf, NaN."""
    outs = np.random.default_rng(0).standard_normal((2, 4, heads, 5)).astype(np.float32)
    lses = np.zeros((2, 4, heads), np.float32)
    for row, mark in enumerate((-np.inf, np.inf, np.nan)):
        lses[0, row], outs[0, row] = mark, np.nan
    lses[1, 2] = -np.inf
    got = on_mesh(2, lambda o, s: merge_across(o[0], s[0], "x"), (outs, lses), (P("x"), P("x")), P())
    assert_leaves(got, jax.jit(attention.merge)(outs, lses), Close(rtol=1e-6))
    np.testing.assert_array_equal(got[0][:2], outs[1, :2])
    assert (got[0][2] == 0).all() and jnp.isneginf(got[1][2]).all()


# --- errors
def call(**how):
    given = dict(k=3, max_length=36) | how
    return indexer.lightning_indexer(QUERY, WEIGHTS, index_cache("float32"), TABLE, OWNERS, LENGTHS, **given)


def inside(fn):
    """`fn` on two devices that hold the same."""
    return lambda: on_mesh(2, lambda x: (fn(), x)[1], (jnp.zeros(2),), P("x"), P("x"))


OUT, LSE = jnp.zeros((2, 3, 4), jnp.float32), jnp.zeros((2, 3), jnp.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: call(axis_name="x"), "axis_name is 'x'; no mesh axis of that name is in use here"),
        (inside(lambda: call(axis_name="y")), "axis_name is 'y'; no mesh axis"),
        (inside(lambda: call(axis_name=("x",))), r"axis_name is \('x',\); expected the name of one mesh axis"),
        (lambda: call(own_keys=True), "own_keys is set without axis_name"),
        (inside(lambda: call(axis_name="x", own_keys=True, return_scores=True)), "return_scores is set with own_keys"),
        (inside(lambda: call(axis_name="x", memory_limit=79)), "memory_limit is 79; .* One row of 20 scores"),
        (inside(lambda: call(axis_name="x", max_length=37)), "max_length is 37; expected an integer from 1 to 36"),
        (lambda: merge_across(OUT, LSE, "x"), "axis_name is 'x'; no mesh axis"),
        (inside(lambda: merge_across(OUT[0], LSE, "x")), r"out is float32\[3, 4\]; expected"),
        (inside(lambda: merge_across(OUT, LSE[:1], "x")), r"lse is float32\[1, 3\]; expected floating values \[2, 3\]"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
