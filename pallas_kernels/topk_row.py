"""One row of scores in the top-k kernel: reads it by blocks, marks columns, and lists the marked columns.

Letters: R rows, N columns of a row. A program has plan.lanes lanes; a block is plan.block columns, and a step
NEIGHBOURS * plan.lanes of them. All functions run in any kernel that `pallas_kernels._call.call` starts, also in
interpret mode in a notebook.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import load, store
from pallas_kernels.plans.topk import TopKPlan
from pallas_kernels.targets import Target

# The key of columns outside the interval. It is below all other keys.
OUTSIDE = -(2**31)
INFINITY = 0x7F800000
# Columns whose marks share a byte. A lane also loads this many scores with one instruction.
NEIGHBOURS = 4

# A block in registers: arrays with one element per lane.
Tile = tuple[Array, ...]


# --- keys and tiles
def monotone_keys(scores: Array) -> Array:
    """int32 keys in the order of float32 `scores`: NaN as -inf, -0.0 as 0.0, subnormals kept apart; never INT32_MIN."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    # Compare bits: float comparisons may flush subnormals to zero.
    bits = jnp.where((bits & 0x7FFFFFFF) > INFINITY, jnp.int32(-(2**23)), bits)
    # Convert sign and magnitude to two's complement, where both zeros are the same.
    return jnp.where(bits < 0, jnp.int32(OUTSIDE) - bits, bits)


def key_to_score(key: Array) -> Array:
    """The float32 of a key."""
    return lax.bitcast_convert_type(jnp.where(key < 0, jnp.int32(OUTSIDE) - key, key), jnp.float32)


def map_tiles(f: Callable, *tiles: Tile) -> Tile:
    """Applies f to the arrays of `tiles`, array by array."""
    return tuple(map(f, *tiles))


def split_lanes(x: Array, count: int) -> Tile:
    """[lanes * count] -> `count` arrays [lanes]: a lane's neighbouring elements; `count` is a power of two."""
    if count == 1:
        return (x,)
    even, odd = jnp.unstack(x.reshape(-1, 2), axis=-1)
    return tuple(half for pair in zip(split_lanes(even, count // 2), split_lanes(odd, count // 2)) for half in pair)


def add_all(arrays: Sequence[Array]) -> Array:
    """Sum of arrays of one shape, element by element."""
    return sum(arrays[1:], arrays[0])


def sum_tile(tile: Sequence[Array]) -> Array:
    """int32 sum of all elements."""
    # Accumulate per lane; reduce across lanes once at the end.
    return jnp.sum(add_all(tile), dtype=jnp.int32)


def max_tile(tile: Sequence[Array]) -> Array:
    """The largest element."""
    return jnp.max(functools.reduce(jnp.maximum, tile))


def sum_before(counts: Array) -> Array:
    """int32 [lanes]: sum of the counts[lanes] of the lanes before each lane."""
    return jnp.cumsum(counts, dtype=jnp.int32) - counts


# --- row
@dataclasses.dataclass(frozen=True)
class TopKSpecialization:
    """Compile-time constants of a top-k kernel.

    Attributes:
      columns: columns of a row.
      k: columns to select.
      has_starts, has_lengths: whether the caller gives these bounds of the interval of each row.
      plan: static sizes.
      target: the machine that the kernel runs on.
    """

    columns: int
    k: int
    has_starts: bool
    has_lengths: bool
    plan: TopKPlan
    target: Target

    @property
    def step(self) -> int:
        """Columns of a step: NEIGHBOURS per lane."""
        return NEIGHBOURS * self.plan.lanes


class RowBounds(NamedTuple):
    """int32 scalars: the interval of a row that may be selected, in columns and in blocks.

    Attributes:
      start, end: columns start..end-1.
      lanes: index of each lane [lanes].
      head: number of columns before `start` in its block.
      tail: number of columns before `end` in its block.
      inner, inner_stop: blocks inner..inner_stop-1 lie entirely inside.
      first, stop: blocks first..stop-1 overlap the interval.
    """

    start: Array
    end: Array
    lanes: Array
    head: Array
    tail: Array
    inner: Array
    inner_stop: Array
    first: Array
    stop: Array


def find_bounds(start: Array, end: Array, plan: TopKPlan) -> RowBounds:
    """Bounds of the columns start..end-1."""
    lanes = jnp.arange(plan.lanes, dtype=jnp.int32)
    head, tail = start % plan.block, end % plan.block
    inner, inner_stop = (start + plan.block - 1) // plan.block, end // plan.block
    first, stop = start // plan.block, (end + plan.block - 1) // plan.block
    return RowBounds(start, end, lanes, head, tail, inner, inner_stop, first, stop)


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A row of scores in a kernel.

    Attributes:
      scores_ref: float32 [R, N].
      index: the row.
      bounds: the interval of it that may be selected.
      s: compile-time constants of the kernel.
    """

    scores_ref: Any
    index: Array
    bounds: RowBounds
    s: TopKSpecialization

    @classmethod
    def of_program(cls, scores_ref: Any, bound_refs: Sequence[Any], s: TopKSpecialization) -> Row:
        """The row of this program; bound_refs: int32 [R] starts and lengths, as many of them as `s` has."""
        index = pl.program_id(0)
        # Clamp here: clamping before the launch would need one more kernel.
        start = jnp.clip(bound_refs[0][index], 0, s.columns) if s.has_starts else jnp.int32(0)
        room = s.columns - start
        end = start + (jnp.clip(bound_refs[-1][index], 0, room) if s.has_lengths else room)
        return cls(scores_ref, index, find_bounds(start, end, s.plan), s)

    def is_inside(self, columns: Array) -> Array:
        """Whether columns lie in the interval."""
        return (columns >= self.bounds.start) & (columns < self.bounds.end)

    def columns_of(self, block: Array | int, width: int) -> Tile:
        """Columns of a block in arrays [width]."""
        size = self.s.plan.block
        return tuple(block * size + i + jnp.arange(width, dtype=jnp.int32) for i in range(0, size, width))

    def read(self, block: Array | int, *, masked: bool, width: int | None = None) -> Tile:
        """Scores of a block in arrays [width], by default [step].

        masked: columns outside the interval are not loaded and give NaN. If False, all columns must be inside.
        """
        tile = self.columns_of(block, width or self.s.step)
        if masked:
            return tuple(
                load(self.scores_ref.at[self.index, columns], mask=self.is_inside(columns), other=jnp.nan)
                for columns in tile
            )
        return tuple(load(self.scores_ref.at[self.index, columns]) for columns in tile)

    def fold_blocks(self, body: Callable, carry: Any, unroll: int = 1) -> Any:
        """Folds body(carry, block, scores) over the blocks of the interval, in any order.

        scores: a tile of arrays [step]. unroll: blocks whose loads are issued before the first is waited for.
        """
        head, tail, first_inner, stop = self.bounds.head, self.bounds.tail, self.bounds.inner, self.bounds.inner_stop

        def visit_edge(i, carry):
            block = jnp.where(i == 0, self.bounds.first, stop)
            return body(carry, block, self.read(block, masked=True))

        def visit(n, first):
            def advance(i, carry):
                blocks = [first + i * n + j for j in range(n)]
                # Issue all loads before waiting for the first.
                scores = [self.read(block, masked=False) for block in blocks]
                for block, x in zip(blocks, scores):
                    carry = body(carry, block, x)
                return carry

            return advance

        # Edges are the head and, if it is another block, the tail. An interval within one block is one edge.
        edges = (head == 0).astype(jnp.int32), 1 + ((tail != 0) & (first_inner <= stop)).astype(jnp.int32)
        carry = lax.fori_loop(*edges, visit_edge, carry)
        steps = jnp.maximum(stop - first_inner, 0) // unroll
        carry = lax.fori_loop(jnp.int32(0), steps, visit(unroll, first_inner), carry)
        if unroll == 1:
            return carry
        first = first_inner + steps * unroll
        return lax.fori_loop(jnp.int32(0), stop - first, visit(1, first), carry)

    def to_keys(self, columns: Array, scores: Array) -> Array:
        """int32 keys of the scores of `columns`; OUTSIDE for columns outside the interval."""
        return jnp.where(self.is_inside(columns), monotone_keys(scores), jnp.int32(OUTSIDE))

    def keys_of(self, block: Array, scores: Tile) -> Tile:
        """Keys of a block, arrays [step]."""
        return tuple(self.to_keys(columns, x) for columns, x in zip(self.columns_of(block, self.s.step), scores))

    def count_reaching(self, *thresholds: Array) -> Tile:
        """How many keys of the interval are at or above each threshold; reads the row once."""

        def add(totals, block, scores):
            keys = self.keys_of(block, scores)
            return tuple(add_reaching(keys, t, n) for n, t in zip(totals, thresholds))

        # [step] counts per threshold
        totals = self.fold_blocks(add, (jnp.zeros((self.s.step,), jnp.int32),) * len(thresholds))
        return tuple(sum_tile((n,)) for n in totals)


def add_reaching(keys: Tile, threshold: Array, counts: Array) -> Array:
    """`counts` plus, element by element, how many keys are at or above the threshold."""
    return sum(((key >= threshold).astype(jnp.int32) for key in keys), counts)


# --- marks
def pack_words(marks: Tile, shift: int) -> list[Array]:
    """A bit per column, 32 to a word, of bytes of marks [lanes]; shift: 0 for sure columns, NEIGHBOURS for ties."""
    nibbles = [((mark >> shift) & 15) << (NEIGHBOURS * (j % 8)) for j, mark in enumerate(marks)]
    return [functools.reduce(jnp.bitwise_or, nibbles[j : j + 8]) for j in range(0, len(marks), 8)]


class MarkedColumns(NamedTuple):
    """Columns that a lane must still list.

    Attributes:
      sure, ties: a bit per column, int32 [lanes].
      rank: how many columns are listed before the next one [lanes].
      seen: how many ties come before it [lanes].
    """

    sure: Array
    ties: Array
    rank: Array
    seen: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Marks:
    """Marks of a row's columns in scratch memory.

    A byte holds the marks of NEIGHBOURS columns: sure ones in its low bits, ties in the bits above.

    Attributes:
      ref: uint8 [R, N / NEIGHBOURS], N rounded up to blocks.
      row: the row.
    """

    ref: Any
    row: Row

    def mark(self, block: Array, sure: Tile, ties: Tile | None = None) -> None:
        """Writes the marks of a block; sure, ties: booleans, arrays [step]."""
        plan = self.row.s.plan
        for i, flags in enumerate(sure):
            # NEIGHBOURS, or twice as many, arrays [lanes]
            bits = split_lanes(flags.astype(jnp.int32), NEIGHBOURS)
            if ties is not None:
                bits += split_lanes(ties[i].astype(jnp.int32), NEIGHBOURS)
            byte = functools.reduce(jnp.bitwise_or, [b << j for j, b in enumerate(bits)])
            at = block * (plan.block // NEIGHBOURS) + i * plan.lanes + self.row.bounds.lanes
            store(self.ref.at[self.row.index, at], byte.astype(jnp.uint8))

    def unmark(self, take: Callable, room: int, max_ties: Array | None = None) -> Array:
        """Calls take(rank, column, mask) for the marked columns in order; for none if there are more than `room`.

        max_ties: lists only this many ties, the first ones. None: nothing has been marked as a tie.

        Returns:
          The number of sure columns, which does not count ties.
        """
        plan, (first, stop) = self.row.s.plan, self._find_range()
        width = plan.run // NEIGHBOURS

        def list_chunk(i, carry):
            found, tied = carry
            base = first + i * (plan.lanes * width)
            at = base + jnp.arange(plan.lanes * width, dtype=jnp.int32)
            marks = load(self.ref.at[self.row.index, at], mask=at < stop, other=0)  # [width * lanes]
            marks = split_lanes(marks.astype(jnp.int32), width)
            sure = pack_words(marks, 0)  # width / 8 arrays [lanes]
            ties = [jnp.zeros_like(word) for word in sure] if max_ties is None else pack_words(marks, NEIGHBOURS)
            counts = [lax.population_count(word) for word in sure]
            rank = sum_before(add_all(counts)) + found
            found = found + sum_tile(counts)
            seen = jnp.zeros_like(rank)
            if max_ties is not None:
                more = [lax.population_count(word) for word in ties]
                seen = sum_before(add_all(more)) + tied
                tied = tied + sum_tile(more)
                rank = rank + jnp.minimum(seen, max_ties)
                counts = [a + b for a, b in zip(counts, more)]
            rounds = jnp.where(found <= room, max_tile(counts), 0)
            for j, words in enumerate(zip(sure, ties)):
                state = MarkedColumns(*words, rank, seen)
                body = functools.partial(_take_lowest, take, max_ties, functools.partial(self._locate, base, j))
                *_, rank, seen = lax.fori_loop(jnp.int32(0), rounds, body, state)
            return found, tied

        chunks = (stop - first + plan.lanes * width - 1) // (plan.lanes * width)
        return lax.fori_loop(jnp.int32(0), chunks, list_chunk, (jnp.int32(0), jnp.int32(0)))[0]

    def _find_range(self) -> tuple[Array, Array]:
        """The bytes first..stop-1 that hold marks of the interval."""
        size = self.row.s.plan.block // NEIGHBOURS
        return self.row.bounds.first * size, self.row.bounds.stop * size

    def _locate(self, base: Array, word: int, bit: Array) -> Array:
        """Column of one bit of each lane's word, int32 [lanes]; base: the byte at which the chunk begins."""
        plan = self.row.s.plan
        byte = base + self.row.bounds.lanes * (plan.run // NEIGHBOURS)
        return byte * NEIGHBOURS + 32 * word + lax.population_count(bit - 1)


def _take_lowest(take: Callable, max_ties: Array | None, locate: Callable, _, state: MarkedColumns) -> MarkedColumns:
    """Lists the lowest column of each lane, unless it is a tie beyond `max_ties`, and removes its bit."""
    sure, ties, rank, seen = state
    both = sure | ties
    bit = both & -both
    column = locate(bit)
    mask = both != 0
    if max_ties is not None:
        is_tie = (ties & bit) != 0
        mask = mask & (~is_tie | (seen < max_ties))
        seen = seen + is_tie.astype(jnp.int32)
    take(rank, column, mask)
    return MarkedColumns(sure & ~bit, ties & ~bit, rank + mask.astype(jnp.int32), seen)
