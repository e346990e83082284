"""Where positions lie when pages are spread over an axis: against a list of all positions of each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax.ops import context_pages
from sparse_mla_jax.ops.ragged import slots_from_positions

SIZES = [(1, 4), (2, 4), (3, 1), (8, 3)]
LENGTH = 60
BEYOND = 2**31 - 1
sizes = pytest.mark.parametrize(("n", "page_size"), SIZES)


def positions_of(index, n, page_size):
    """All positions below LENGTH that lie on a device, ascending."""
    return np.array([p for p in range(LENGTH) if p // page_size % n == index])


@sizes
def test_own_pages(n, page_size):
    for columns in (0, 1, 5, 8):
        table = np.arange(2 * columns, dtype=np.int32).reshape(2, columns)
        for index in range(n):
            want = np.full((2, -(-columns // n)), -1)
            mine = table[:, index::n]
            want[:, : mine.shape[1]] = mine
            got = jax.jit(context_pages.own_pages, static_argnums=2)(table, index, n)
            np.testing.assert_array_equal(got, want)
            assert got.dtype == jnp.int32


@sizes
def test_own_lengths(n, page_size):
    lengths = np.array([-5, *range(LENGTH + 1)])
    for index in range(n):
        mine = positions_of(index, n, page_size)
        got = jax.jit(context_pages.own_lengths, static_argnums=(2, 3))(lengths, index, n, page_size)
        np.testing.assert_array_equal(got, [(mine < length).sum() for length in lengths])


@sizes
def test_local_and_global(n, page_size):
    everywhere = np.arange(-2, LENGTH)
    for index in range(n):
        mine = positions_of(index, n, page_size)
        local = np.arange(-2, len(mine))
        np.testing.assert_array_equal(context_pages.to_global(local, index, n, page_size), [-1, -1, *mine])
        want = [int(np.flatnonzero(mine == p)[0]) if p in mine else -1 for p in everywhere]
        np.testing.assert_array_equal(context_pages.to_local(everywhere, index, n, page_size), want)


@sizes
def test_own_slots(n, page_size):
    """A slot of the whole page table is the one that the device's own page table gives."""
    columns = -(-LENGTH // page_size)
    table = np.random.default_rng(0).permutation(columns).astype(np.int32)[None]
    positions = np.arange(-1, LENGTH, dtype=np.int32)[None]
    requests = np.zeros(1, np.int32)
    slots = slots_from_positions(positions, requests, table, page_size=page_size)
    for index in range(n):
        own = context_pages.own_slots(positions, slots, index, n, page_size)
        local = context_pages.to_local(positions, index, n, page_size)
        mine = context_pages.own_pages(table, index, n)
        np.testing.assert_array_equal(own, slots_from_positions(local, requests, mine, page_size=page_size))
        assert (np.asarray(own) >= 0).sum() == len(positions_of(index, n, page_size))


def test_nothing_wraps():
    """Positions near the end of int32, where the last page is cut."""
    near = np.array([BEYOND - 1, BEYOND - 2, BEYOND - 7, BEYOND, 2**40])
    for n, page_size in ((2, 64), (8, 3), (1, 1), (1, 5), (3, 2**29), (1, BEYOND)):
        found = []
        for index in range(n):
            local = np.asarray(context_pages.to_local(near, index, n, page_size))
            assert (local[3:] == -1).all() and (local >= -1).all()
            again = context_pages.to_global(local, index, n, page_size)
            np.testing.assert_array_equal(again, np.where(local >= 0, np.minimum(near, BEYOND), -1))
            found.append(local >= 0)
            lengths = np.asarray(context_pages.own_lengths(near, index, n, page_size))
            assert (lengths >= 0).all() and (lengths >= local).all()
        assert (np.sum(found, axis=0)[:3] == 1).all()
        assert sum(int(context_pages.own_lengths(BEYOND, i, n, page_size)) for i in range(n)) == BEYOND
    high = context_pages.to_global(np.array([2**30, BEYOND - 1, BEYOND, 2**40]), 1, 4, 64)
    np.testing.assert_array_equal(high, [BEYOND] * 4)


def test_order_is_kept():
    for index in range(3):
        there = np.asarray(context_pages.to_global(np.arange(-1, 2**31 - 1, 7_654_321), index, 3, 64), np.int64)
        below = there < BEYOND
        assert (np.diff(there) >= 0).all() and (np.diff(there[below]) > 0).all() and below.any() and not below.all()


def test_types_and_places():
    with jax.enable_x64(True):
        for got in (
            context_pages.own_pages(np.zeros((1, 3), np.int64), np.int64(1), 2),
            context_pages.own_lengths(np.array([7]), np.int64(1), 2, 4),
            context_pages.to_global(np.array([7]), np.int64(1), 2, 4),
            context_pages.to_local(np.array([7]), np.int64(1), 2, 4),
            context_pages.own_slots(np.array([7]), np.array([2**40]), np.int64(1), 2, 4),
        ):
            assert got.dtype == jnp.int32
    # A place outside of the axis is clamped.
    assert context_pages.to_global(0, 9, 2, 4) == 4 and context_pages.to_global(0, -3, 2, 4) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: context_pages.own_pages(np.zeros(3, int), 0, 2), r"page_table is int\d+\[3\]; expected"),
        (lambda: context_pages.own_pages(np.zeros((1, 3), int), 0, 0), "n is 0; expected an integer of at least 1"),
        (lambda: context_pages.own_lengths(3, 0, 2, 0), "page_size is 0; expected"),
        (lambda: context_pages.to_global(3, 0, 2**16, 2**15), "page_size is 32768 and n 65536; their product"),
        (lambda: context_pages.to_local(3, np.zeros(2, int), 2, 4), r"index is int\d+\[2\]; expected integers \[\]"),
        (lambda: context_pages.own_slots(np.zeros(3, int), np.zeros(2, int), 0, 2, 4), r"slots is int\d+\[2\]"),
        (lambda: context_pages.to_local(3.0, 0, 2, 4), "positions is float"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
