import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_mla_jax.metadata import bucket_for, buckets, build_metadata, decode_metadata

GARBAGE = np.iinfo(np.int32)


def build(seq_lens, query_lens, table, num_tokens, page_size):
    arrays = [np.asarray(a, np.int32) for a in (seq_lens, query_lens, table)]
    return jitted(*arrays, num_tokens=num_tokens, page_size=page_size)


jitted = jax.jit(build_metadata, static_argnames=("num_tokens", "page_size"))


def expected(seq_lens, query_lens, table, num_tokens, page_size):
    """The definition, token by token."""
    rows = []
    indptr = [0]
    limit = table.shape[1] * page_size
    for request, (length, queries) in enumerate(zip(seq_lens, query_lens)):
        queries = max(0, min(queries, length))
        for position in range(max(length, 0) - queries, max(length, 0)):
            page = table[request, position // page_size] if position < limit else -1
            slot = page * page_size + position % page_size if page >= 0 else -1
            rows.append((position, request, slot, position + 1, True) if position < limit else (0, 0, -1, 0, False))
        indptr.append(min(len(rows), num_tokens))
    rows = (rows + [(0, 0, -1, 0, False)] * num_tokens)[:num_tokens]
    return [np.array(column) for column in zip(*rows)], indptr


def check(seq_lens, query_lens, table, num_tokens, page_size):
    meta = build(seq_lens, query_lens, table, num_tokens, page_size)
    columns, indptr = expected(seq_lens, query_lens, np.asarray(table), num_tokens, page_size)
    for name, column in zip(("positions", "request_ids", "slots", "lengths", "valid"), columns):
        np.testing.assert_array_equal(getattr(meta, name), column, err_msg=name)
        assert getattr(meta, name).dtype == (bool if name == "valid" else np.int32), name
    np.testing.assert_array_equal(meta.query_indptr, indptr)
    last = [end - 1 if end > start else 0 for start, end in itertools.pairwise(indptr)]
    np.testing.assert_array_equal(meta.last_token, last)
    limit = np.shape(table)[1] * page_size
    np.testing.assert_array_equal(meta.seq_lens, np.clip(seq_lens, 0, limit))
    assert (meta.page_size, meta.max_length) == (page_size, limit)
    return meta


@settings(deadline=None, max_examples=60, database=None)
@given(st.data())
def test_against_the_definition(data):
    page_size = data.draw(st.sampled_from([1, 3, 4]))
    length = st.integers(-2, 4 * page_size + 2)
    seq_lens = data.draw(st.lists(length, min_size=5, max_size=5))
    query_lens = [data.draw(st.sampled_from([-1, 0, 1, 2, n, n + 3])) for n in seq_lens]
    table = np.random.default_rng(0).permutation(20).reshape(5, 4)
    check(seq_lens, query_lens, table, 24, page_size)


def test_mixed_step():
    """A decode token, a whole prompt, the second chunk of a prompt, a request that waits."""
    meta = check([7, 5, 6, 4], [1, 5, 3, 0], np.arange(8).reshape(4, 2)[::-1], 12, 4)
    np.testing.assert_array_equal(meta.positions, [6, 0, 1, 2, 3, 4, 3, 4, 5, 0, 0, 0])
    np.testing.assert_array_equal(meta.last_token, [0, 5, 8, 0])


@pytest.mark.parametrize(
    ("seq_lens", "query_lens", "shape", "num_tokens"),
    [([], [], (0, 3), 4), ([], [], (0, 0), 4), ([3], [2], (1, 0), 4), ([3], [2], (1, 2), 0)],
    ids=["no requests", "nothing", "no pages", "no tokens"],
)
def test_empty(seq_lens, query_lens, shape, num_tokens):
    arrays = [np.asarray(a, np.int32) for a in (seq_lens, query_lens, np.zeros(shape))]
    meta = build_metadata(*arrays, num_tokens=num_tokens, page_size=4)
    assert meta.slots.shape == (num_tokens,) and not np.any(meta.valid)
    np.testing.assert_array_equal(meta.slots, -1)
    np.testing.assert_array_equal(meta.lengths, 0)


def test_nothing_is_remembered():
    """Steps that an incomplete fingerprint of the lengths would confuse, one after the other."""
    table = np.arange(20).reshape(2, 10)
    first = check([9, 9], [1, 4], table, 8, 4)
    swapped = check([9, 9], [4, 1], table, 8, 4)
    assert not np.array_equal(first.lengths, swapped.lengths)
    # Chunks of one prompt: the same clipped lengths, other visible keys for every token.
    for seq_len in (8, 12, 16, 40):
        check([seq_len, 1], [4, 1], table, 8, 4)
    np.testing.assert_array_equal(first.lengths, build([9, 9], [1, 4], table, 8, 4).lengths)


def test_no_value_reaches_the_host():
    """Traced with lengths that have no value, and the program calls nothing outside itself."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((4,), (4,), (4, 8))]
    traced = jitted.trace(*shapes, num_tokens=16, page_size=64)
    for forbidden in ("callback", "outfeed", "debug"):
        assert forbidden not in str(traced.jaxpr)
    assert "custom_call" not in traced.lower().as_text()


def test_lengths_never_retrace():
    counted = jax.jit(
        chex.assert_max_traces(lambda *a: build_metadata(*a, num_tokens=16, page_size=4), n=1)  # one for ever
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(-3, 40, size=(2, 4)).astype(np.int32)
        counted(lengths[0], lengths[1], rng.integers(0, 50, (4, 9)).astype(np.int32))
    chex.clear_trace_counter()


def test_tails_are_clean():
    """A small step after a large one equals the small step alone, and its tail is neutral."""
    table = np.arange(12).reshape(3, 4)
    alone = build([5, 0, 0], [2, 0, 0], table, 16, 4)
    large = build([16, 15, 9], [5, 6, 5], table, 16, 4)
    assert np.all(large.valid)
    after = build([5, 0, 0], [2, 0, 0], table, 16, 4)
    chex.assert_trees_all_equal(alone, after)
    for array, neutral in ((after.lengths, 0), (after.slots, -1), (after.positions, 0), (after.request_ids, 0)):
        np.testing.assert_array_equal(array[2:], neutral)
    np.testing.assert_array_equal(after.page_table, [[0, 1, -1, -1], [-1] * 4, [-1] * 4])


@pytest.mark.parametrize("seq_garbage", [0, -1, GARBAGE.min])
@pytest.mark.parametrize("query_garbage", [GARBAGE.min, -7, 0, 3, GARBAGE.max])
def test_garbage_in_padding(seq_garbage, query_garbage):
    """Padded requests anywhere, with any entries: every field but their own stays what it was."""
    table = np.arange(16).reshape(4, 4)
    clean = build([6, 0, 11, 0], [2, 0, 3, 0], table, 8, 4)
    table[1], table[3], table[0, 2:], table[2, 3] = GARBAGE.max, GARBAGE.min, -5, 10**9
    dirty = build([6, seq_garbage, 11, seq_garbage], [2, query_garbage, 3, query_garbage], table, 8, 4)
    chex.assert_trees_all_equal(clean, dirty)
    waiting = build([6, GARBAGE.max, 11, 9], [2, 0, 3, GARBAGE.min], table, 8, 4)
    for name in ("positions", "request_ids", "slots", "lengths", "valid", "last_token", "query_indptr"):
        np.testing.assert_array_equal(getattr(waiting, name), getattr(clean, name), err_msg=name)


def test_too_many_tokens_are_dropped():
    check([9, 9, 9], [4, 4, 4], np.arange(9).reshape(3, 3), 6, 4)
    meta = build([GARBAGE.max] * 3, [GARBAGE.max] * 3, np.arange(9).reshape(3, 3), 6, 4)
    np.testing.assert_array_equal(meta.query_indptr, [0, 6, 6, 6])


def test_decode_rows_belong_to_their_requests():
    table = np.arange(12, dtype=np.int32).reshape(4, 3)
    meta = decode_metadata(np.array([5, 0, 12, GARBAGE.min], np.int32), table, page_size=4)
    np.testing.assert_array_equal(meta.valid, [True, False, True, False])
    np.testing.assert_array_equal(meta.slots, [1 * 4 + 0, -1, 8 * 4 + 3, -1])
    np.testing.assert_array_equal(meta.lengths, [5, 0, 12, 0])
    np.testing.assert_array_equal(meta.last_token, [0, 1, 2, 3])
    dense = build_metadata(np.array([5, 12], np.int32), np.ones(2, np.int32), table[[0, 2]], num_tokens=2, page_size=4)
    np.testing.assert_array_equal(dense.slots, meta.slots[np.array([0, 2])])


def test_buckets():
    assert buckets(1) == (1,) and buckets(8) == (1, 2, 4, 8) and buckets(100, min_size=16) == (16, 32, 64, 100)
    assert buckets(6) is buckets(6)  # memoised
    assert [bucket_for(n, buckets(100)) for n in (0, 1, 3, 64, 65, 100)] == [1, 1, 4, 64, 100, 100]
    for size in range(1, 200):
        assert bucket_for(size, buckets(200)) < 2 * size
    with pytest.raises(ValueError, match="size is 101, above the largest bucket 100"):
        bucket_for(101, buckets(100))
    for bad in ({"max_size": 0}, {"max_size": 4, "min_size": 5}, {"max_size": 4, "min_size": 0}):
        with pytest.raises(ValueError, match="min_size"):
            buckets(**bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 0}, "page_size is 0"),
        ({"num_tokens": -1}, "num_tokens is -1"),
        ({"seq_lens": np.zeros((2, 2), np.int32)}, "seq_lens is"),
        ({"seq_lens": np.zeros(2, np.float32)}, "seq_lens is float32"),
        ({"query_lens": np.zeros(3, np.int32)}, "query_lens is"),
        ({"page_table": np.zeros((3, 4), np.int32)}, "page_table has 3 rows"),
        ({"page_size": 2**30}, "overflows int32"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "seq_lens": np.zeros(2, np.int32),
        "query_lens": np.zeros(2, np.int32),
        "page_table": np.zeros((2, 4), np.int32),
        "num_tokens": 4,
        "page_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        build_metadata(**{**good, **change})
