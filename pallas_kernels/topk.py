"""Exact, deterministic top-k of each row, indices written in ascending order; one program per row.

Floats become int32 keys of the same order. There are three ways to select, and the plan chooses one:

- In registers: a row of one block is read once. Bisection finds its k-th largest key; each step is one count.
- By groups: a longer row is read twice. The first pass keeps the maxima of groups of columns. At least k maxima, so at
  least k columns, reach the k-th largest maximum. The second pass marks the columns that reach it, one bit each. They
  are slightly more than k. They are listed in order, and k of them are selected as in a short row.
- By counting: any row. Each step of the bisection reads the row again, until the threshold is exact. This is also the
  fallback if too many columns reach the estimate (equal or periodic scores).

The kernel uses no atomics, so results do not depend on any order of execution. `topk_row` loads rows and keeps marks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels._call import barrier, call, load, store_masked
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.topk import TopKPlan, topk_plan
from pallas_kernels.targets import by_target
from pallas_kernels.threshold import count_reaching, find_threshold
from pallas_kernels.topk_row import (
    INFINITY,
    NEIGHBOURS,
    OUTSIDE,
    Marks,
    Row,
    Tile,
    TopKSpecialization,
    add_all,
    key_to_score,
    map_tiles,
    max_tile,
    monotone_keys,
    split_lanes,
    sum_before,
)

# Column arithmetic is int32 and runs up to a block past the end.
MAX_COLUMNS = 2**30


# --- estimate
def estimate_threshold(row: Row) -> Array:
    """A key that at least k columns of the row reach, and rarely many more; reads the row once."""
    s = row.s

    def update_maxima(maxima, _, scores):
        for i, x in enumerate(scores):
            at = i % len(maxima)
            # NaN never becomes a maximum: the comparison is False.
            maxima = (*maxima[:at], jnp.where(x > maxima[at], x, maxima[at]), *maxima[at + 1 :])
        return maxima

    # groups / step arrays [step]
    lowest = (jnp.full((s.step,), -jnp.inf, jnp.float32),) * (s.plan.groups // s.step)
    maxima = map_tiles(monotone_keys, row.fold_blocks(update_maxima, lowest, s.plan.unroll))
    # Stop early: a threshold that slightly more than k maxima reach is as good, and takes fewer steps.
    count = functools.partial(count_reaching, maxima)
    return find_threshold(count, s.k, max_tile(maxima) + 1, enough=s.k + s.k // 16)[0]


# --- ways to select
def write_largest(row: Row, out_ref: Any, keys: Tile, columns: Tile) -> None:
    """Writes the columns of the k largest of more than k keys, arrays [lanes]; a lane holds neighbouring columns."""
    s = row.s
    threshold, max_ties = find_threshold(functools.partial(count_reaching, keys), s.k, max_tile(keys) + 1)
    equal = map_tiles(lambda key: (key == threshold).astype(jnp.int32), keys)
    above = map_tiles(lambda key: (key > threshold).astype(jnp.int32), keys)
    # Pack two counts below 2**16 into one running sum.
    packed = sum_before(add_all(above) + (add_all(equal) << 16))
    ranks, ties = packed & 0xFFFF, packed >> 16
    for column, is_above, is_equal in zip(columns, above, equal):
        index = row.index, ranks + jnp.minimum(ties, max_ties)
        value = column - row.bounds.start
        store_masked(out_ref, index, value, (is_above | (is_equal & (ties < max_ties))) != 0, s.target)
        ranks, ties = ranks + is_above, ties + is_equal


def select_in_registers(row: Row, out_ref: Any) -> None:
    """Writes the top k columns of a row of one block; out_ref: int32 [R, k]."""
    plan, bounds = row.s.plan, row.bounds
    (scores,) = lax.cond(  # [block]
        (bounds.start == 0) & (bounds.end >= plan.block),
        lambda: row.read(0, masked=False, width=plan.block),
        lambda: row.read(0, masked=True, width=plan.block),
    )
    columns = jnp.arange(plan.block, dtype=jnp.int32)
    keys = row.to_keys(columns, scores)
    write_largest(row, out_ref, *(split_lanes(x, plan.block // plan.lanes) for x in (keys, columns)))


def select_by_groups(row: Row, marks: Marks, list_ref: Any, out_ref: Any) -> None:
    """Writes the top k columns of a row by the maxima of groups; list_ref: int32 [R, groups] of scratch memory."""
    plan, target = row.s.plan, row.s.target
    estimate = estimate_threshold(row)
    score = key_to_score(estimate)

    def mark_block(carry, block, scores):
        marks.mark(block, map_tiles(lambda x: x >= score, scores))
        return carry

    def list_column(rank, column, mask):
        store_masked(list_ref, (row.index, rank), column, mask, target)

    row.fold_blocks(mark_block, jnp.int32(0), plan.unroll)
    barrier(target)
    found = marks.unmark(list_column, plan.groups)
    # An estimate of -inf is not usable: NaN counts as -inf, but x >= -inf is False for it. Comparisons that flush
    # subnormals let more columns reach the score; `found` counts them.
    usable = (estimate > -INFINITY) & (found >= row.s.k) & (found <= plan.groups)
    lax.cond(
        usable,
        lambda: select_listed(row, list_ref, out_ref, found),
        lambda: select_by_counting(row, marks, out_ref, estimate),
    )


def select_listed(row: Row, list_ref: Any, out_ref: Any, found: Array) -> None:
    """Writes the top k of the `found` columns that this program has listed in list_ref[R, groups]."""
    plan = row.s.plan
    barrier(row.s.target)
    ranks = jnp.arange(plan.groups, dtype=jnp.int32)
    columns = load(list_ref.at[row.index, ranks], mask=ranks < found, other=0)  # [groups]

    def read_keys(rank, column):
        return jnp.where(
            rank < found,
            monotone_keys(load(row.scores_ref.at[row.index, column], mask=rank < found, other=0.0)),  # [lanes]
            OUTSIDE,
        )

    rank_tile, column_tile = (split_lanes(x, plan.groups // plan.lanes) for x in (ranks, columns))
    write_largest(row, out_ref, map_tiles(read_keys, rank_tile, column_tile), column_tile)


def select_by_counting(row: Row, marks: Marks, out_ref: Any, guess: Array | None = None) -> None:
    """Writes the top k columns of any row by its exact threshold; guess: probably the key of the threshold."""
    s = row.s
    threshold, max_ties = find_threshold(row.count_reaching, s.k, jnp.int32(INFINITY + 1), guess=guess)

    def mark_block(carry, block, scores):
        keys = row.keys_of(block, scores)
        marks.mark(block, map_tiles(lambda key: key > threshold, keys), map_tiles(lambda key: key == threshold, keys))
        return carry

    def write_column(rank, column, mask):
        store_masked(out_ref, (row.index, rank), column - row.bounds.start, mask, s.target)

    row.fold_blocks(mark_block, jnp.int32(0))
    barrier(s.target)
    marks.unmark(write_column, s.columns, max_ties)


def write_all(row: Row, out_ref: Any) -> None:
    """Writes all columns of a row that has at most k, then -1."""
    s, bounds = row.s, row.bounds

    def write_step(i, carry):
        at = i * s.step + jnp.arange(s.step, dtype=jnp.int32)
        column = jnp.where(at < bounds.end - bounds.start, at, -1)
        store_masked(out_ref, (row.index, at), column, at < s.k, s.target)
        return carry

    lax.fori_loop(jnp.int32(0), jnp.int32(-(-s.k // s.step)), write_step, jnp.int32(0))


# --- kernel and launch
def _kernel(scores_ref, *refs, s: TopKSpecialization):
    """Grid (R,): out[row, k] of scores[row, N]; refs: starts and lengths if given, out, scratch."""
    given = s.has_starts + s.has_lengths
    bound_refs, (out_ref, *scratch) = refs[:given], refs[given:]
    row = Row.of_program(scores_ref, bound_refs, s)

    def select():
        if s.columns <= s.plan.block:
            select_in_registers(row, out_ref)
        elif s.plan.groups:
            select_by_groups(row, Marks(scratch[0], row), scratch[1], out_ref)
        else:
            select_by_counting(row, Marks(scratch[0], row), out_ref)

    if s.k < s.columns:
        lax.cond(row.bounds.end - row.bounds.start > s.k, select, lambda: write_all(row, out_ref))
    else:
        write_all(row, out_ref)


def top_k(
    scores: Array, k: int, starts: Array | None = None, lengths: Array | None = None, *, plan: TopKPlan | None = None
) -> Array:
    """Columns of float32 scores[R, N] within int32 starts[R] and lengths[R] -> int32[R, k], relative to starts.

    Starts and lengths are clamped to the row; without them a row begins at 0 and ends with the columns.

    Raises:
      NotImplementedError: more columns than int32 arithmetic supports, or arrays of 2**31 elements and more.
    """
    rows, columns = scores.shape
    if max(columns, k) > MAX_COLUMNS:
        raise NotImplementedError(f"{columns} columns and k {k}; the kernel supports at most {MAX_COLUMNS} of each")

    def launch(target, *arrays):
        chosen = choose_plan("top_k", plan, topk_plan, columns=columns, k=k, target=target)
        shapes = [jax.ShapeDtypeStruct((rows, k), jnp.int32)]
        if k < columns and columns > chosen.block:
            blocks = -(-columns // chosen.block)
            shapes.append(jax.ShapeDtypeStruct((rows, blocks * chosen.block // NEIGHBOURS), jnp.uint8))
            if chosen.groups:
                shapes.append(jax.ShapeDtypeStruct((rows, chosen.groups), jnp.int32))
        s = TopKSpecialization(columns, k, starts is not None, lengths is not None, chosen, target)
        return call(
            functools.partial(_kernel, s=s),
            *arrays,
            out_shape=shapes,
            grid=(rows,),
            name="top_k",
            target=target,
            num_warps=chosen.num_warps,
        )[0]

    return by_target(launch, scores, *[x for x in (starts, lengths) if x is not None])
