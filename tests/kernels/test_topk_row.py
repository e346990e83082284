"""The pieces of the top-k kernel, each alone in a kernel of its own: rows, marks, thresholds, ways to select."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import topk
from pallas_kernels._call import call, store_masked
from pallas_kernels.plans.topk import TopKPlan
from pallas_kernels.targets import HOST
from pallas_kernels.threshold import count_reaching, find_threshold
from pallas_kernels.topk_row import Marks, Row, TopKSpecialization, map_tiles

COLUMNS, K = 200, 9
PLAN = TopKPlan(block=64, num_warps=1, wave=8, groups=32, run=32, unroll=2)
STARTS = np.array([0, 0, 3, 64, 70, 199, 200], np.int32)
LENGTHS = np.array([200, 64, 150, 64, 20, 1, 0], np.int32)
MARKS = jax.ShapeDtypeStruct((len(STARTS), 256 // 4), jnp.uint8)
LISTED = jax.ShapeDtypeStruct((len(STARTS), COLUMNS), jnp.int32)
COUNT = jax.ShapeDtypeStruct((len(STARTS),), jnp.int32)


@pytest.fixture(scope="module")
def scores():
    # Many ties, and zeros of both signs.
    return np.round(np.random.default_rng(0).standard_normal((len(STARTS), COLUMNS)) * 2).astype(np.float32)


def run(body, scores, *shapes, plan=PLAN):
    """Runs body(row, *output_refs) for every row in interpret mode."""
    s = TopKSpecialization(COLUMNS, K, True, True, plan, HOST)

    def kernel(scores_ref, start_ref, length_ref, *refs):
        body(Row.of_program(scores_ref, (start_ref, length_ref), s), *refs)

    launch = functools.partial(call, kernel, out_shape=shapes, grid=(len(STARTS),), name="piece", target=HOST)
    return [np.asarray(x) for x in jax.jit(launch)(*map(jnp.asarray, (scores, STARTS, LENGTHS)))]


def intervals(scores):
    return [row[a : a + n] for row, a, n in zip(scores, STARTS, LENGTHS)]


@pytest.mark.parametrize("unroll", [1, 3])
def test_a_fold_reads_every_column_once(scores, unroll):
    def body(row, sum_ref):
        def add(total, _, tile):
            return total + sum(jnp.sum(jnp.where(jnp.isnan(x), 0, x + 100)) for x in tile)

        sum_ref[row.index] = row.fold_blocks(add, jnp.float32(0), unroll)

    (got,) = run(body, scores, jax.ShapeDtypeStruct(COUNT.shape, jnp.float32))
    np.testing.assert_array_equal(got, [np.sum(x + 100) for x in intervals(scores)])


def test_keys_that_reach_two_thresholds_are_counted(scores):
    def body(row, low_ref, high_ref):
        low, high = topk.monotone_keys(jnp.float32(0)), topk.monotone_keys(jnp.float32(3))
        low_ref[row.index], high_ref[row.index] = row.count_reaching(low, high)

    got = run(body, scores, COUNT, COUNT)
    np.testing.assert_array_equal(got, [[np.sum(x >= t) for x in intervals(scores)] for t in (0, 3)])


@pytest.mark.parametrize(("max_ties", "room"), [(None, COLUMNS), (4, COLUMNS), (0, 60)])
def test_marked_columns_are_listed_in_order(scores, max_ties, room):
    def body(row, mark_ref, list_ref, count_ref):
        marks = Marks(mark_ref, row)

        def mark(carry, block, tile):
            is_tie = None if max_ties is None else map_tiles(lambda x: x == 0, tile)
            marks.mark(block, map_tiles(lambda x: x > 0, tile), is_tie)
            return carry

        def take(rank, column, mask):
            store_masked(list_ref, (row.index, rank), column, mask, HOST)

        row.fold_blocks(mark, jnp.int32(0))
        count_ref[row.index] = marks.unmark(take, room, None if max_ties is None else jnp.int32(max_ties))

    _, listed, count = run(body, scores, MARKS, LISTED, COUNT)
    for row, (x, start) in enumerate(zip(intervals(scores), STARTS)):
        ties = np.flatnonzero(x == 0)[: max_ties or 0]
        want = start + np.sort(np.concatenate([np.flatnonzero(x > 0), ties]))
        assert count[row] == np.sum(x > 0)
        if count[row] <= room:
            np.testing.assert_array_equal(listed[row, : len(want)], want)


@pytest.mark.parametrize("way", ["registers", "groups", "counting"])
def test_each_way_to_select_runs_alone(scores, way):
    plan = TopKPlan(block=256, num_warps=2, wave=32) if way == "registers" else PLAN

    def body(row, out_ref, mark_ref, list_ref):
        if way == "registers":
            topk.select_in_registers(row, out_ref)
        elif way == "groups":
            topk.select_by_groups(row, Marks(mark_ref, row), list_ref, out_ref)
        else:
            topk.select_by_counting(row, Marks(mark_ref, row), out_ref)

    out = jax.ShapeDtypeStruct((len(STARTS), K), jnp.int32)
    got = run(body, scores, out, MARKS, jax.ShapeDtypeStruct((len(STARTS), PLAN.groups), jnp.int32), plan=plan)[0]
    for row, x in enumerate(intervals(scores)):
        # The caller writes rows that have at most k columns in another way.
        if len(x) > K:
            np.testing.assert_array_equal(got[row], np.sort(np.argsort(-x, kind="stable")[:K]))


@pytest.mark.parametrize("k", [1, 5, 31])
def test_a_threshold_and_its_ties(scores, k):
    keys = tuple(topk.monotone_keys(jnp.asarray(scores[0, i : i + 16])) for i in (0, 16))
    count = functools.partial(count_reaching, keys)
    threshold, ties = find_threshold(count, k, topk.max_tile(keys) + 1)
    flat = np.concatenate(keys)
    assert np.sum(flat > threshold) + min(int(ties), np.sum(flat == threshold)) == k
    # A key equals the threshold unless exactly k keys reach it.
    assert threshold <= np.sort(flat)[-k] and (np.sum(flat >= threshold) == k or threshold == np.sort(flat)[-k])
