"""What is out of range stays out of range: integers beyond int32, of numpy, of lists and of jax, in every operator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax import metadata
from sparse_mla_jax.ops import attention, cache, compressor, indexer, ragged, router, topk, window

BEYOND = [2**32, 2**32 + 1, 2**40 + 3, 2**63 - 1]
NAMES = ("xla", pytest.param("triton", marks=pytest.mark.slow), "reference")
SCORES = np.arange(8, dtype=np.float32)[None]
TABLE = np.array([[1, 0]])


@pytest.fixture(
    params=["numpy", "jax int64", *(pytest.param(x, marks=pytest.mark.slow) for x in ("list", "jax uint32"))]
)
def wide(request):
    """Makes an array of the integers in one of the ways in which they may come."""
    if request.param == "numpy":
        yield lambda *x: np.array(x, np.int64)
    elif request.param == "list":
        yield lambda *x: list(x)
    else:
        dtype = jnp.dtype(request.param.split()[1])
        # uint32 can not hold them: there, beyond int32 begins at 2**31.
        high = np.iinfo(dtype).max
        with jax.enable_x64(True):
            yield lambda *x: jnp.asarray([i if i < 2**31 else min(i, high - i % 4) for i in x], dtype)


def full():
    empty = cache.PagedKVCache.create(2, 4, latent_dim=8, rope_dim=4, group_size=8, dtype=jnp.float32)
    return cache.write(empty, np.ones((8, 8), np.float32), np.ones((8, 4), np.float32), np.arange(8))


def keys():
    empty = cache.PagedIndexCache.create(2, 4, dim=8, dtype=jnp.float32)
    return cache.write_index(empty, np.ones((8, 8), np.float32), np.arange(8))


@pytest.mark.parametrize("name", NAMES)
def test_slots(wide, name):
    slots = wide(*BEYOND)
    old, rows = full(), np.full((4, 8), 2, np.float32)
    new = cache.write(old, rows, rows[:, :4], slots, implementation=name)
    np.testing.assert_array_equal(new.latent, old.latent)
    q = np.ones((4, 1, 12), np.float32)
    form = ragged.DenseRows(jnp.asarray(slots)[:, None] if isinstance(slots, jax.Array) else np.array(slots)[:, None])
    _, lse = attention.sparse_mla(q, old, form, sm_scale=1.0, value_dim=8, return_lse=True, implementation=name)
    assert np.isneginf(lse).all()


def test_gathers_and_rows(wide):
    assert not np.any(cache.gather(full(), wide(*BEYOND), dtype=jnp.float32))
    assert not np.any(cache.gather_index(keys(), wide(*BEYOND), dtype=jnp.float32))
    packed = ragged.pack_rows(np.array([BEYOND]), wide(2**40), limit=2**40)
    assert packed.indptr.tolist() == [0, 0]
    assert ragged.indptr_from_lengths(wide(3)).tolist() == [0, 3]


def test_positions_pages_and_requests(wide):
    four = wide(0, 0, 0, 0)
    assert ragged.slots_from_positions(wide(*BEYOND), four, TABLE, page_size=4).tolist() == [-1] * 4
    assert ragged.slots_from_positions(four, wide(*BEYOND), TABLE, page_size=4).tolist() == [-1] * 4
    pages = np.array([[page, 0] for page in BEYOND])
    assert ragged.slots_from_positions(four, wide(0, 1, 2, 3), pages, page_size=4).tolist() == [-1] * 4
    assert window.ring_slots(wide(*BEYOND), four, ring=4).tolist() == [-1] * 4
    assert window.ring_slots(four, wide(*BEYOND), ring=4).tolist() == [-1] * 4
    # The product of ring and state would wrap.
    assert window.ring_slots(four, wide(2**30, 2**29, 2**31 - 1, 1), ring=4).tolist() == [-1, -1, -1, 4]
    assert (np.asarray(window.window_slots(four, wide(*BEYOND), window=2, ring=4)) == -1).all()
    rows = ragged.combine_with_window(np.zeros((4, 0), int), wide(*BEYOND), window=2, window_start=0)
    assert rows.indptr.tolist() == [0] * 5
    rows = ragged.combine_with_window(np.array([[2**40]]), wide(0), window=1, window_start=5)
    assert rows.values[:1].tolist() == [5]


@pytest.mark.parametrize("name", NAMES)
def test_lengths_are_clamped(wide, name):
    all_of_it = [[5, 6, 7]]
    for length in (2**32 + 1, 2**63 - 1):
        assert topk.top_k(SCORES, 3, wide(length), implementation=name).tolist() == all_of_it
        assert topk.top_k(SCORES, 3, row_starts=wide(length), implementation=name).tolist() == [[-1] * 3]
        ends = dict(row_starts=wide(2), row_ends=wide(length))
        assert topk.top_k_prefill(SCORES, 3, **ends, implementation=name).tolist() == [[3, 4, 5]]
        assert topk.top_k_decode(SCORES, 3, seq_lens=wide(length), next_n=1, implementation=name).tolist() == all_of_it
    q, weights = np.ones((1, 2, 8), np.float32), np.ones((1, 2), np.float32)
    rows = dict(row_starts=wide(2), row_lengths=wide(2**40))
    scores = indexer.indexer_scores(q, np.ones((8, 8), np.float32), None, weights, **rows, implementation=name)
    assert np.isfinite(scores).sum() == 6
    seen = [
        indexer.paged_indexer_scores(
            q, weights, keys(), TABLE, wide(request), wide(length), max_length=8, implementation=name
        )
        for request, length in ((0, 2**40), (2**32, 8))
    ]
    assert [int(np.isfinite(scores).sum()) for scores in seen] == [8, 0]


def test_metadata(wide):
    meta = metadata.build_metadata(wide(2**32 + 2), wide(1), TABLE, num_tokens=1, page_size=4)
    assert not bool(meta.valid[0]) and meta.slots.tolist() == [-1]
    meta = metadata.decode_metadata(wide(2**40 + 3), TABLE, page_size=4)
    assert not bool(meta.valid[0]) and meta.slots.tolist() == [-1]
    meta = metadata.decode_metadata(wide(3), np.array([[2**32 + 1, 0]]), page_size=4)
    assert meta.slots.tolist() == [-1]


def test_the_rest(wide):
    assert compressor.num_entries(wide(2**40), ratio=4).tolist() == [(2**31 - 1) // 4]
    table, _ = compressor.entry_pages(np.array([[2**32]]), page_size=4, ratio=4)
    assert table.tolist() == [[2**31 - 1]]
    logits = np.ones((1, 4), np.float32)
    _, ids = router.hash_route(logits, wide(2**40), np.array([[0], [3]]), scale=1.0)
    assert ids.tolist() == [[3]]
