"""ragged: packing and page tables against plain Python loops, over shapes, holes, lengths and garbage."""

# mypy: disable-error-code="arg-type"

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, PartitionSpec
from support.equivalence import counted

from sparse_mla_jax.ops.ragged import (
    Ragged,
    combine_with_window,
    indptr_from_lengths,
    pack_rows,
    select_to_ragged,
    slots_from_positions,
)

# Few shapes, since each is a compilation; every degenerate one among them.
SHAPES = [(0, 0), (0, 3), (3, 0), (1, 1), (1, 7), (5, 1), (6, 5), (3, 33)]
INT32 = st.integers(-(2**31), 2**31 - 1)
WILD = st.integers(-3, 20) | INT32
few = functools.partial(settings, deadline=None, database=None)

pack_jit = jax.jit(pack_rows)
slots_jit = jax.jit(slots_from_positions, static_argnames="page_size")
select_jit = jax.jit(select_to_ragged, static_argnames="page_size")
dense_jit = jax.jit(Ragged.to_dense, static_argnames=("width", "fill"))


def ints(shape, elements=WILD):
    return hnp.arrays(np.int32, shape, elements=elements)


def packed(rows, capacity):
    """(values, indptr) of lists of ints, -1 behind the last."""
    flat = [v for row in rows for v in row]
    return flat + [-1] * (capacity - len(flat)), np.cumsum([0, *map(len, rows)])


def check(ragged, rows, capacity):
    values, indptr = packed(rows, capacity)
    assert ragged.values.dtype == ragged.indptr.dtype == jnp.int32
    assert (ragged.rows, ragged.capacity) == (len(rows), capacity)
    np.testing.assert_array_equal(np.asarray(ragged.indptr), indptr)
    np.testing.assert_array_equal(np.asarray(ragged.values), values)


def slot(page_table, request, position, page_size):
    requests, pages = page_table.shape
    if position < 0 or not 0 <= request < requests or position // page_size >= pages:
        return -1
    page = int(page_table[request, position // page_size])
    found = page * page_size + position % page_size
    return found if page >= 0 and page * page_size + page_size <= 2**31 else -1


@given(data=st.data())
@few(max_examples=80)
def test_pack_rows(data):
    shape = data.draw(st.sampled_from(SHAPES))
    indices = data.draw(ints(shape))
    lengths = data.draw(st.none() | ints(shape[:1], st.integers(-3, shape[1] + 3) | INT32))
    limit = data.draw(st.none() | st.integers(-1, 20))
    got = pack_jit(indices, lengths, limit=limit)
    ends = [shape[1]] * shape[0] if lengths is None else np.clip(lengths, 0, shape[1])
    high = 2**31 if limit is None else limit
    rows = [[int(v) for v in row[:end] if 0 <= v < high] for row, end in zip(indices, ends)]
    check(got, rows, shape[0] * shape[1])


@given(data=st.data())
@few(max_examples=60)
def test_to_dense(data):
    shape = data.draw(st.sampled_from(SHAPES))
    ragged = pack_jit(data.draw(ints(shape)))
    width, fill = data.draw(st.sampled_from([(0, -1), (4, -1), (40, 7)]))
    indptr, values = np.asarray(ragged.indptr), np.asarray(ragged.values)
    got = np.asarray(dense_jit(ragged, width=width, fill=fill))
    assert got.dtype == np.int32 and got.shape == (shape[0], width)
    for r in range(shape[0]):
        row = values[indptr[r] : indptr[r + 1]][:width]
        np.testing.assert_array_equal(got[r], [*row, *[fill] * (width - len(row))])


def test_dense_and_back():
    indices = np.array([[3, 1, 4], [-1, -1, -1], [5, -1, -1]], np.int32)
    np.testing.assert_array_equal(np.asarray(dense_jit(pack_jit(indices), width=3)), indices)


def test_nothing_reads_the_dirty_tail():
    ragged = Ragged(jnp.array([7, 8, 9, 111, 222]), jnp.array([0, 2, 2, 3]))
    np.testing.assert_array_equal(np.asarray(dense_jit(ragged, width=5)), [[7, 8, *[-1] * 3], [-1] * 5, [9, *[-1] * 4]])


@given(data=st.data())
@few(max_examples=30)
def test_garbage_indptr_stays_in_bounds(data):
    indptr = data.draw(ints((4,)))
    got = np.asarray(dense_jit(Ragged(jnp.arange(100, 106), jnp.asarray(indptr)), width=9))
    start, end = np.clip(indptr, 0, 6)[:-1, None].astype(int), np.clip(indptr, 0, 6)[1:, None].astype(int)
    at = start + np.arange(9)
    np.testing.assert_array_equal(got, np.where(at < end, 100 + at, -1))


@given(data=st.data())
@few(max_examples=30)
def test_indptr_from_lengths(data):
    rows = data.draw(st.sampled_from([0, 1, 6]))
    lengths = data.draw(ints((rows,), st.integers(-(2**31), 1000)))
    got = jax.jit(indptr_from_lengths)(lengths)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(got), np.cumsum([0, *np.maximum(lengths, 0)]))


@given(data=st.data())
@few(max_examples=80)
def test_slots_from_positions(data):
    shape, table, page_size = data.draw(
        st.sampled_from(
            [((4, 3), (2, 5), 3), ((4, 3), (1, 1), 1), ((2, 6), (3, 2), 64), ((0, 3), (2, 5), 3), ((4, 3), (0, 5), 3),
             ((4, 3), (2, 0), 3), ((5,), (2, 5), 3)]
        )
    )  # fmt: skip
    positions = data.draw(ints(shape))
    requests = data.draw(ints(shape[:1], st.integers(-2, 4) | INT32))
    page_table = data.draw(ints(table, st.integers(-2, 9) | INT32))
    got = np.asarray(slots_jit(positions, requests, page_table, page_size=page_size))
    expected = [
        [slot(page_table, int(r), int(p), page_size) for p in np.atleast_1d(row)] for r, row in zip(requests, positions)
    ]
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.array(expected, np.int64).reshape(shape))


def test_the_largest_slots():
    page_size = 3
    last = (2**31 - page_size) // page_size
    got = slots_jit(np.array([[0, 2, 3]]), np.array([0]), np.array([[last, last + 1]]), page_size=page_size)
    assert np.asarray(got).tolist() == [[last * 3, last * 3 + 2, -1]]


@given(data=st.data())
@few(max_examples=60)
def test_select_to_ragged(data):
    shape = data.draw(st.sampled_from([(4, 5), (0, 5), (4, 0), (1, 33)]))
    positions = data.draw(ints(shape))
    requests = data.draw(ints(shape[:1], st.integers(-1, 3)))
    page_table = data.draw(ints((3, 4), st.integers(-1, 9)))
    valid = data.draw(st.none() | hnp.arrays(np.bool_, shape[:1]))
    got = select_jit(positions, requests, page_table, page_size=4, valid=valid)
    rows = [
        [s for s in (slot(page_table, int(r), int(p), 4) for p in row) if s >= 0] if keep else []
        for r, row, keep in zip(requests, positions, [True] * shape[0] if valid is None else valid)
    ]
    check(got, rows, shape[0] * shape[1])


def test_padding_rows_can_not_touch_real_ones():
    rng = np.random.default_rng(0)
    table, valid = np.array([[5, 2, 7], [1, 0, 3]]), np.array([True, False, True, False])
    positions, requests = rng.integers(-1, 12, (4, 6)), np.array([0, 0, 1, 0])
    clean = select_jit(positions, requests, table, page_size=4, valid=valid)
    positions[~valid], requests[~valid] = rng.integers(-(2**31), 2**31, (2, 6)), [2**31 - 1, -7]
    dirty = select_jit(positions, requests, table, page_size=4, valid=valid)
    np.testing.assert_array_equal(np.asarray(dirty.values), np.asarray(clean.values))
    np.testing.assert_array_equal(np.asarray(dirty.indptr), np.asarray(clean.indptr))


def test_duplicates_and_order_are_kept():
    check(pack_jit(np.array([[4, -1, 4, 2], [9, 9, -5, 0]])), [[4, 4, 2], [9, 9, 0]], 8)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32])
def test_other_integer_types(dtype):
    indices = np.arange(200 * 2).reshape(200, 2).astype(dtype)
    got = pack_jit(indices, np.full((200,), 1, dtype), limit=300)
    check(got, [[int(v)] if 0 <= v < 300 else [] for v in indices[:, 0]], 400)
    table = np.arange(200, dtype=np.uint8)[:, None]
    got = slots_jit(np.zeros((200, 1), dtype), np.arange(200).astype(dtype), table, page_size=300)
    ids = np.arange(200).astype(dtype)[:, None]
    np.testing.assert_array_equal(np.asarray(got), np.where(ids >= 0, ids.astype(np.int32) * 300, -1))


def test_no_host_reads_and_abstract_use():
    out: Any = jax.eval_shape(
        lambda p, r, t, v: select_to_ragged(p, r, t, page_size=16, valid=v),
        jax.ShapeDtypeStruct((6, 5), jnp.int32),
        jax.ShapeDtypeStruct((6,), jnp.int32),
        jax.ShapeDtypeStruct((2, 3), jnp.int32),
        jax.ShapeDtypeStruct((6,), jnp.bool_),
    )
    assert isinstance(out, Ragged) and (out.rows, out.capacity) == (6, 30)
    dense: Any = jax.eval_shape(lambda r: r.to_dense(4), out)
    assert dense.shape == (6, 4)


def test_a_traced_limit():
    # One program for every limit.
    pack = jax.jit(counted(lambda arrays: pack_rows(arrays[0], limit=arrays[1]), "pack_rows"))
    for limit in (0, 3, 9):
        check(pack((np.array([[1, 5, 2]]), limit)), [[v for v in (1, 5, 2) if v < limit]], 3)


def test_inside_shard_map_and_vmap():
    positions = np.array([[3, -1, 0], [7, 2, 99]])
    requests, table = np.array([0, 1]), np.array([[4, 1], [0, 3]])
    step = functools.partial(select_to_ragged, page_size=4)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = PartitionSpec("x")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    got = jax.jit(mapped)(positions, requests, table)
    check(got, [[19, 16], [15, 2]], 6)
    stacked = jax.jit(jax.vmap(step, in_axes=(0, 0, None)))(positions[:, None], requests[:, None], table)
    np.testing.assert_array_equal(np.asarray(stacked.values), [[19, 16, -1], [15, 2, -1]])


ONES = np.ones((2, 3), np.int32)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: pack_rows(np.ones((2, 3))), "indices is float32"),
        (lambda: pack_rows(np.ones((2,), np.int32)), r"indices is int32\[2\]"),
        (lambda: pack_rows(ONES, np.ones((3,), np.int32)), r"lengths is int32\[3\]; expected integers \[2\]"),
        (lambda: jax.eval_shape(pack_rows, jax.ShapeDtypeStruct((2**16, 2**16), jnp.int32)), r"2\*\*31"),
        (lambda: indptr_from_lengths(ONES), "lengths is int32"),
        (
            lambda: slots_from_positions(ONES, np.zeros(3, np.int32), ONES, page_size=4),
            r"request_ids is int32\[3\]",
        ),
        (lambda: slots_from_positions(ONES, np.zeros(2, np.int32), ONES[0], page_size=4), "page_table is int32"),
        (lambda: slots_from_positions(ONES, np.zeros(2, np.int32), ONES, page_size=0), "page_size is 0"),
        (lambda: select_to_ragged(ONES[0], np.zeros(3, np.int32), ONES, page_size=4), "positions is int32"),
        (lambda: select_to_ragged(ONES, np.zeros(2, np.int32), ONES, page_size=4, valid=np.ones(2)), "valid is float"),
        (lambda: pack_rows(ONES).to_dense(-1), "width is -1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- chosen entries beside a window ----------------------------------------------------------------------------------
def combined(positions, queries, window, far_start, near_start, first, valid):
    """The rows as lists."""
    rows = []
    for t, query in enumerate(queries):
        far = [far_start[t] + p for p in positions[t] if p >= 0]
        seen = range(max(0, query - window + 1, first[t]), query + 1)
        rows.append([*far, *(near_start[t] + p - first[t] for p in seen)] if valid[t] else [])
    return rows


@few(max_examples=40)
@given(st.data(), st.sampled_from([(0, 3), (1, 0), (4, 5)]), st.sampled_from([1, 2, 6]))
def test_combine_with_window(data, shape, window):
    tokens = shape[0]
    positions = data.draw(ints(shape, st.integers(-2, 30)))
    queries = data.draw(ints(tokens, st.integers(-1, 40)))
    starts, near = (data.draw(ints(tokens, st.integers(0, 100))) for _ in range(2))
    first = data.draw(ints(tokens, st.integers(0, 8)))
    valid = data.draw(hnp.arrays(bool, tokens))
    ragged = combine_with_window(
        positions,
        queries,
        window=window,
        compressed_start=starts,
        window_start=near,
        first_position=first,
        valid=valid,
    )
    rows = combined(positions, queries, window, starts, near, first, valid)
    check(ragged, rows, tokens * (shape[1] + window))


def test_combine_with_window_takes_plain_integers():
    ragged = combine_with_window(np.array([[1, -1]]), np.array([2]), window=2, window_start=10)
    check(ragged, [[1, 11, 12]], 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(positions=np.zeros((2, 3))), "positions is float"),
        (dict(positions=np.zeros((3, 3), int)), r"positions is int32\[3, 3\]; expected integers \[2, W\]"),
        (dict(window=0), "window is 0"),
        (dict(window_start=np.zeros(3, int)), "window_start is int"),
        (dict(first_position=np.zeros(2)), "first_position is float"),
        (dict(valid=np.ones(2, int)), "valid is int"),
    ],
)
def test_combine_with_window_refuses(arguments, message):
    given = dict(positions=np.zeros((2, 3), int), query_positions=np.zeros(2, int), window=2, window_start=0)
    with pytest.raises(ValueError, match=message):
        combine_with_window(**{**given, **arguments})
