"""Exact, deterministic top-k of each row, indices written in ascending order; one program per row.

Floats become int32 keys of the same order. A row of one block is read once: its k-th largest key is found by bisection
in registers, each step one count. A longer row is read twice: first for the maxima of groups of its columns, of which
k are at least the k-th largest maximum, and so are k columns; then each column that is leaves a mark, one bit. From the
marks these columns, few more than k, are listed in their order, and the k chosen among them as from a short row. Where
they are many more (equal scores, or periodic ones), the row is counted over until its threshold is exact. No atomics,
so no order to depend on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import barrier, call, load, store
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.topk import TopKPlan, topk_plan
from pallas_kernels.targets import HOST, Target, by_target

# Column arithmetic is int32 and runs up to a block past the end.
MAX_COLUMNS = 2**30
OUTSIDE = -(2**31)
INFINITY = 0x7F800000
ALL = 2**31 - 1
# Columns whose marks share a byte; a lane reads as many scores with one instruction.
NEIGHBOURS = 4

# A block in registers: arrays with one element per lane.
Tile = tuple[Array, ...]


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def monotone_keys(scores: Array) -> Array:
    """int32 keys in the order of float32 `scores`: NaN as -inf, -0.0 as 0.0, subnormals kept apart; never INT32_MIN."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    # On bits, since float comparisons may flush subnormals to zero.
    bits = jnp.where((bits & 0x7FFFFFFF) > INFINITY, jnp.int32(-(2**23)), bits)
    # Sign and magnitude become two's complement, in which both zeros are one.
    return jnp.where(bits < 0, jnp.int32(OUTSIDE) - bits, bits)


def _score(key: Array) -> Array:
    """The float32 of a key."""
    return lax.bitcast_convert_type(jnp.where(key < 0, jnp.int32(OUTSIDE) - key, key), jnp.float32)


def _each(f: Callable, *tiles: Tile) -> Tile:
    return tuple(map(f, *tiles))


def _split(x: Array, parts: int) -> Tile:
    """[lanes * parts] -> parts arrays [lanes]: a lane's neighbouring elements."""
    if parts == 1:
        return (x,)
    even, odd = jnp.unstack(x.reshape(-1, 2), axis=-1)
    return tuple(half for pair in zip(_split(even, parts // 2), _split(odd, parts // 2)) for half in pair)


def _sum(tile: Tile) -> Array:
    # Lanes add up on their own: one reduction across waves.
    return jnp.sum(sum(tile[1:], tile[0]), dtype=jnp.int32)


def _largest(tile: Tile) -> Array:
    return jnp.max(functools.reduce(jnp.maximum, tile))


def _count(keys: Tile, low: Array, high: Array) -> tuple[Array, Array]:
    """How many of fewer than 2**15 keys are at or above each of two thresholds; low <= high."""
    both = _sum(_each(lambda key: jnp.where(key >= high, 2**16 + 1, jnp.where(key >= low, jnp.int32(1), 0)), keys))
    return both & 0xFFFF, both >> 16


def _before(counts: Array) -> Array:
    """What the lanes before each lane hold."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


def _search(count: Callable, k: int, high: Array, *, enough: int | None = None, guess: Array | None = None):
    """The largest threshold that at least k keys reach, or one that at most `enough` (k if None) reach.

    Args:
      count: of two thresholds, how many keys reach each; all reach that of -inf.
      k: how many are wanted.
      high: fewer than k reach it.
      enough: ends the search.
      guess: probably the answer.

    Returns:
      The threshold, and how many that equal it are wanted beside all above it: INT32_MAX where all are.
    """
    enough = k if enough is None else enough

    def divide(state):
        low, high, reached, above, steps = state
        distance = high - low
        # About a third, without sign: it may be as much as 2**32.
        third = sum(lax.shift_right_logical(distance, jnp.int32(bits)) for bits in (2, 4))
        third = jnp.maximum(third, 1)
        a, b = low + third, high - third
        if guess is not None:
            a = jnp.where(steps == 0, jnp.clip(guess, low + 1, high - 1), a)
            b = jnp.where(steps == 0, jnp.clip(guess + 1, low + 1, high - 1), b)
        of_a, of_b = count(a, b)
        is_b, is_a = of_b >= k, of_a >= k
        return (
            jnp.where(is_b, b, jnp.where(is_a, a, low)),
            jnp.where(is_b, high, jnp.where(is_a, b, a)),
            jnp.where(is_b, of_b, jnp.where(is_a, of_a, reached)),
            jnp.where(is_b, above, jnp.where(is_a, of_b, of_a)),
            steps + 1,
        )

    state = (jnp.int32(-INFINITY), high, jnp.int32(ALL), jnp.int32(0), jnp.int32(0))
    low, _, reached, above, _ = lax.while_loop(lambda s: (s[2] > enough) & (s[1] - s[0] != 1), divide, state)
    return low, jnp.where(reached <= enough, jnp.int32(ALL), k - above)


# --- kernel ----------------------------------------------------------------------------------------------------------
def _kernel(scores_ref, *refs, given: tuple[bool, bool], columns: int, k: int, plan: TopKPlan, target: Target):
    row = pl.program_id(0)
    bounds, (out_ref, *scratch) = refs[: sum(given)], refs[sum(given) :]
    # Clamped here, not before the launch, which would be a kernel more.
    start = jnp.clip(bounds[0][row], 0, columns) if given[0] else jnp.int32(0)
    room = columns - start
    end = start + (jnp.clip(bounds[-1][row], 0, room) if given[1] else room)
    lanes = jnp.arange(plan.lanes, dtype=jnp.int32)
    step = NEIGHBOURS * plan.lanes

    def write(ref, place, value, mask):
        # Interpret mode writes old values back through masked lanes: point them past the array.
        place = jnp.where(mask, place, ref.shape[1]) if target == HOST else place
        store(ref.at[row, place], value, mask=mask)

    # --- the row
    def columns_of(block, whole=step) -> Tile:
        return tuple(block * plan.block + i + jnp.arange(whole, dtype=jnp.int32) for i in range(0, plan.block, whole))

    def read(block, *, masked: bool, whole=step) -> Tile:
        """Scores of a block in arrays [whole]; NaN outside of the row's interval where masked, else all are inside."""
        at = columns_of(block, whole)
        if masked:
            return tuple(load(scores_ref.at[row, a], mask=(a >= start) & (a < end), other=jnp.nan) for a in at)
        return tuple(load(scores_ref.at[row, a]) for a in at)

    # Blocks inside of the interval, the edges beside them, and those that hold any of it.
    head, tail = start % plan.block, end % plan.block
    inner = (start + plan.block - 1) // plan.block, end // plan.block
    first_block, last_block = start // plan.block, (end + plan.block - 1) // plan.block

    def over_row(body, carry, unroll=1):
        """Folds body(carry, block, scores) over the blocks of the row, in any order."""

        def edge(i, carry):
            block = jnp.where(i == 0, first_block, inner[1])
            return body(carry, block, read(block, masked=True))

        def several(n, first):
            def advance(i, carry):
                blocks = [first + i * n + j for j in range(n)]
                # All in flight before the first is waited for.
                scores = [read(block, masked=False) for block in blocks]
                for block, x in zip(blocks, scores):
                    carry = body(carry, block, x)
                return carry

            return advance

        # An interval within one block is its head.
        edges = (head == 0).astype(jnp.int32), 1 + ((tail != 0) & (inner[0] <= inner[1])).astype(jnp.int32)
        carry = lax.fori_loop(*edges, edge, carry)
        steps = jnp.maximum(inner[1] - inner[0], 0) // unroll
        carry = lax.fori_loop(jnp.int32(0), steps, several(unroll, inner[0]), carry)
        if unroll == 1:
            return carry
        first = inner[0] + steps * unroll
        return lax.fori_loop(jnp.int32(0), inner[1] - first, several(1, first), carry)

    def keys_of(block, scores: Tile) -> Tile:
        return tuple(
            jnp.where((at >= start) & (at < end), monotone_keys(x), jnp.int32(OUTSIDE))
            for at, x in zip(columns_of(block), scores)
        )

    def count_row(*ts):
        def add(totals, block, scores):
            keys = keys_of(block, scores)
            return tuple(sum(((key >= t).astype(jnp.int32) for key in keys), n) for n, t in zip(totals, ts))

        totals = over_row(add, (jnp.zeros((step,), jnp.int32),) * 2)
        return tuple(_sum((n,)) for n in totals)

    # --- marks
    def mark(block, sure: Tile, maybe: Tile | None = None) -> None:
        """Leaves a byte for 4 columns: bits of those that are chosen, and above them of those that may be."""
        for i, flags in enumerate(sure):
            bits = _split(flags.astype(jnp.int32), NEIGHBOURS)
            if maybe is not None:
                bits += _split(maybe[i].astype(jnp.int32), NEIGHBOURS)
            byte = functools.reduce(jnp.bitwise_or, [b << j for j, b in enumerate(bits)])
            place = block * (plan.block // NEIGHBOURS) + i * plan.lanes + lanes
            store(scratch[0].at[row, place], byte.astype(jnp.uint8))

    def unmark(take: Callable, room: int, ties: Array | None = None) -> Array:
        """Calls take(rank, column, mask) for chosen columns in order, unless they are more than `room`: how many.

        Of those that may be chosen the first `ties` are; the result does not count them.
        """
        width = plan.run // NEIGHBOURS
        first, stop = (block * (plan.block // NEIGHBOURS) for block in (first_block, last_block))

        def words(marks: Tile, shift: int) -> list[Array]:
            """A bit per column, 32 to a word."""
            nibbles = [((mark >> shift) & 15) << (NEIGHBOURS * (j % 8)) for j, mark in enumerate(marks)]
            return [functools.reduce(jnp.bitwise_or, nibbles[j : j + 8]) for j in range(0, width, 8)]

        def chunk(i, carry):
            chosen, tied = carry
            base = first + i * (plan.lanes * width)
            at = base + jnp.arange(plan.lanes * width, dtype=jnp.int32)
            marks = _split(load(scratch[0].at[row, at], mask=at < stop, other=0).astype(jnp.int32), width)
            sure = words(marks, 0)
            maybe = [jnp.zeros_like(word) for word in sure] if ties is None else words(marks, NEIGHBOURS)
            counts = [lax.population_count(word) for word in sure]
            rank = _before(sum(counts[1:], counts[0])) + chosen
            chosen = chosen + _sum(tuple(counts))
            seen = jnp.zeros_like(rank)
            if ties is not None:
                more = [lax.population_count(word) for word in maybe]
                seen = _before(sum(more[1:], more[0])) + tied
                tied = tied + _sum(tuple(more))
                rank = rank + jnp.minimum(seen, ties)
                counts = [a + b for a, b in zip(counts, more)]

            def lowest(word, _, state):
                """Takes the lowest marked column of each lane."""
                sure, maybe, rank, seen = state
                both = sure | maybe
                bit = both & -both
                column = (base + lanes * width) * NEIGHBOURS + 32 * word + lax.population_count(bit - 1)
                mask = both != 0
                if ties is not None:
                    tie = (maybe & bit) != 0
                    mask = mask & (~tie | (seen < ties))
                    seen = seen + tie.astype(jnp.int32)
                take(rank, column, mask)
                return sure & ~bit, maybe & ~bit, rank + mask.astype(jnp.int32), seen

            rounds = jnp.where(chosen <= room, _largest(tuple(counts)), 0)
            for j, word in enumerate(zip(sure, maybe)):
                body = functools.partial(lowest, j)
                *_, rank, seen = lax.fori_loop(jnp.int32(0), rounds, body, (*word, rank, seen))
            return chosen, tied

        chunks = (stop - first + plan.lanes * width - 1) // (plan.lanes * width)
        return lax.fori_loop(jnp.int32(0), chunks, chunk, (jnp.int32(0), jnp.int32(0)))[0]

    # --- ways to choose
    def among(keys: Tile, places: Tile) -> None:
        """Writes the places of the k largest of more than k keys; neighbours belong to one lane."""
        threshold, ties = _search(functools.partial(_count, keys), k, _largest(keys) + 1)
        equal = _each(lambda key: (key == threshold).astype(jnp.int32), keys)
        above = _each(lambda key: (key > threshold).astype(jnp.int32), keys)
        # Two counts below 2**16 in one running sum.
        packed = _before(sum(above[1:], above[0]) + (sum(equal[1:], equal[0]) << 16))
        ranks, equals = packed & 0xFFFF, packed >> 16
        for place, a, e in zip(places, above, equal):
            write(out_ref, ranks + jnp.minimum(equals, ties), place - start, (a | (e & (equals < ties))) != 0)
            ranks, equals = ranks + a, equals + e

    def by_counting(guess: Array | None = None) -> None:
        """Any row, by its exact threshold."""
        threshold, ties = _search(count_row, k, jnp.int32(INFINITY + 1), guess=guess)

        def both(carry, block, scores):
            keys = keys_of(block, scores)
            mark(block, _each(lambda key: key > threshold, keys), _each(lambda key: key == threshold, keys))
            return carry

        over_row(both, jnp.int32(0))
        barrier(target)
        unmark(lambda rank, column, mask: write(out_ref, rank, column - start, mask), columns, ties)

    def by_groups() -> None:
        def larger(maxima, _, scores):
            for i, x in enumerate(scores):
                at = i % len(maxima)
                # NaN loses.
                maxima = (*maxima[:at], jnp.where(x > maxima[at], x, maxima[at]), *maxima[at + 1 :])
            return maxima

        nothing = (jnp.full((step,), -jnp.inf, jnp.float32),) * (plan.groups // step)
        maxima = _each(monotone_keys, over_row(larger, nothing, plan.unroll))
        # A threshold that some more reach is as good, and found in fewer steps.
        estimate, _ = _search(functools.partial(_count, maxima), k, _largest(maxima) + 1, enough=k + k // 16)
        score = _score(estimate)

        def reaching(carry, block, scores):
            mark(block, _each(lambda x: x >= score, scores))
            return carry

        over_row(reaching, jnp.int32(0), plan.unroll)
        barrier(target)
        found = unmark(lambda rank, column, mask: write(scratch[1], rank, column, mask), plan.groups)

        def listed():
            barrier(target)
            at = jnp.arange(plan.groups, dtype=jnp.int32)
            found_at = load(scratch[1].at[row, at], mask=at < found, other=0)
            ranks, places = (_split(x, plan.groups // plan.lanes) for x in (at, found_at))
            keys = tuple(
                jnp.where(r < found, monotone_keys(load(scores_ref.at[row, p], mask=r < found, other=0.0)), OUTSIDE)
                for r, p in zip(ranks, places)
            )
            among(keys, places)

        # NaN equals -inf, which no comparison of floats says; if they flush subnormals, more columns reach the score.
        usable = (estimate > -INFINITY) & (found >= k) & (found <= plan.groups)
        lax.cond(usable, listed, lambda: by_counting(estimate))

    def in_registers() -> None:
        (scores,) = lax.cond(
            (start == 0) & (end >= plan.block),
            lambda: read(0, masked=False, whole=plan.block),
            lambda: read(0, masked=True, whole=plan.block),
        )
        at = jnp.arange(plan.block, dtype=jnp.int32)
        keys = jnp.where((at >= start) & (at < end), monotone_keys(scores), jnp.int32(OUTSIDE))
        among(*(_split(x, plan.block // plan.lanes) for x in (keys, at)))

    def all_columns() -> None:
        def fill(i, carry):
            at = i * step + jnp.arange(step, dtype=jnp.int32)
            write(out_ref, at, jnp.where(at < end - start, at, -1), at < k)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(-(-k // step)), fill, jnp.int32(0))

    select = in_registers if columns <= plan.block else by_groups if plan.groups else by_counting
    if k < columns:
        lax.cond(end - start > k, select, all_columns)
    else:
        all_columns()


# --- launch ----------------------------------------------------------------------------------------------------------
def top_k(
    scores: Array, k: int, starts: Array | None = None, lengths: Array | None = None, *, plan: TopKPlan | None = None
) -> Array:
    """Columns of float32 scores[R, N] within int32 starts[R] and lengths[R] -> int32[R, k], relative to starts.

    Starts and lengths are clamped to the row; without them a row begins at 0 and ends with the columns.

    Raises:
      NotImplementedError: more columns than int32 arithmetic serves, or arrays of 2**31 elements and more.
    """
    rows, columns = scores.shape
    if max(columns, k) > MAX_COLUMNS:
        raise NotImplementedError(f"{columns} columns and k {k}; the kernel serves at most {MAX_COLUMNS} of each")

    given = (starts is not None, lengths is not None)

    def launch(target, *arrays):
        chosen = choose_plan("top_k", plan, topk_plan, columns=columns, k=k, target=target)
        shapes = [jax.ShapeDtypeStruct((rows, k), jnp.int32)]
        if k < columns and columns > chosen.block:
            blocks = -(-columns // chosen.block)
            shapes.append(jax.ShapeDtypeStruct((rows, blocks * chosen.block // NEIGHBOURS), jnp.uint8))
            if chosen.groups:
                shapes.append(jax.ShapeDtypeStruct((rows, chosen.groups), jnp.int32))
        return call(
            functools.partial(_kernel, given=given, columns=columns, k=k, plan=chosen, target=target),
            *arrays,
            out_shape=shapes,
            grid=(rows,),
            name="top_k",
            target=target,
            num_warps=chosen.num_warps,
        )[0]

    return by_target(launch, scores, *[x for x in (starts, lengths) if x is not None])
