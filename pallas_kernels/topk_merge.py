"""The top-k of several parts of the columns from the top-k of each; one program per row, candidates in registers.

Two limits decide a row. The first is the key of the k-th largest score, found by bisection as in a short row of top-k.
If more candidates have this key than are wanted, the second is the last position that is taken of them, found by
bisection of the positions. A part then compacts its own chosen candidates: it has them in order.

The kernel uses no atomics, so results do not depend on any order of execution.

S parts, R rows, C candidates of a row in each part.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store, store_masked
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.topk_merge import TopKMergePlan, topk_merge_plan
from pallas_kernels.targets import Target, by_target
from pallas_kernels.threshold import ALL, count_reaching, find_threshold
from pallas_kernels.tiles import power_of_two
from pallas_kernels.topk_row import (
    INFINITY,
    OUTSIDE,
    Tile,
    add_all,
    map_tiles,
    max_tile,
    monotone_keys,
    split_lanes,
    sum_before,
    sum_tile,
)

# Most candidates of a row, padding included: two counts are packed into one sum.
MAX_CANDIDATES = 2**15 - 1


def is_candidate(positions: Array) -> Array:
    """Whether entries are candidates: not those below 0, and not 2**31 - 1, which stands for what int32 does not hold."""
    return (positions >= 0) & (positions < ALL)


@dataclasses.dataclass(frozen=True)
class MergeSpecialization:
    """Compile-time constants.

    Attributes:
      parts, columns: S and C.
      k: how many candidates all parts select together.
      plan: static sizes.
      target: the machine that the kernel runs on.
    """

    parts: int
    columns: int
    k: int
    plan: TopKMergePlan
    target: Target

    @property
    def arrays(self) -> int:
        """Arrays [plan.block] that hold a part."""
        return -(-self.columns // self.plan.block)

    @property
    def width(self) -> int:
        """C rounded up to a power of two, and to the lanes of a program."""
        return max(self.plan.lanes, power_of_two(self.columns))


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates of a row in a kernel.

    Attributes:
      positions_ref, scores_ref: int32 and float32 [S, R, C].
      row: the row.
      s: compile-time constants.
    """

    positions_ref: Any
    scores_ref: Any
    row: Array
    s: MergeSpecialization

    def read(self, ref: Any, part: Array | int, columns: Array, other: Any) -> Array:
        """Elements of a part; `other` past its end."""
        whole = self.s.columns % columns.shape[0] == 0
        at = ref.at[part, self.row, columns]
        return load(at) if whole else load(at, mask=columns < self.s.columns, other=other)

    def keys(self, part: Array | int, columns: Array, positions: Array) -> Array:
        """int32 keys in the order of the scores; OUTSIDE where there is no candidate."""
        scores = self.read(self.scores_ref, part, columns, 0.0)
        return jnp.where(is_candidate(positions), monotone_keys(scores), jnp.int32(OUTSIDE))

    def tiles(self) -> list[tuple[int, Array]]:
        """(part, columns) of every array [block]."""
        block = self.s.plan.block
        starts = [i * block + jnp.arange(block, dtype=jnp.int32) for i in range(self.s.arrays)]
        return [(part, columns) for part in range(self.s.parts) for columns in starts]

    def positions(self) -> Tile:
        """Positions of all candidates, -1 where there is none."""
        return tuple(self.read(self.positions_ref, part, columns, -1) for part, columns in self.tiles())

    def find_limits(self) -> tuple[Array, Array]:
        """(key, last): chosen are candidates above `key`, and those equal to it up to the position `last`."""
        keys = tuple(self.keys(*where, found) for where, found in zip(self.tiles(), self.positions()))
        is_long = sum_tile(map_tiles(lambda key: (key != OUTSIDE).astype(jnp.int32), keys)) > self.s.k
        # A row of at most k candidates is chosen whole: its search ends before the first step.
        high = max_tile(keys) + 1
        low = jnp.where(is_long, jnp.int32(-INFINITY), high - 1)
        key, ties = find_threshold(functools.partial(count_reaching, keys), self.s.k, high, low=low)
        last = lax.cond(is_long & (ties != ALL), lambda: self._find_last(keys, key, ties), lambda: ties)
        return jnp.where(is_long, key, jnp.int32(OUTSIDE)), last

    def _find_last(self, keys: Tile, key: Array, ties: Array) -> Array:
        """The position up to which there are `ties` candidates with this key."""
        # Read positions again: few rows come here, and all rows would keep the registers.
        equal = map_tiles(lambda x, position: jnp.where(x == key, position, -1), keys, self.positions())
        # The lowest positions are the largest of their negatives.
        negatives = map_tiles(lambda x: jnp.where(x < 0, jnp.int32(OUTSIDE), -x), equal)
        count = functools.partial(count_reaching, negatives)
        return -find_threshold(count, ties, jnp.int32(1), low=-max_tile(equal))[0]

    def write_share(self, part: Array, limits: tuple[Array, Array], out_ref: Any, count_ref: Any) -> None:
        """Writes the chosen positions of a part, then -1, and their number; out_ref: [R, C], count_ref: [R]."""
        s, (key, last) = self.s, limits
        is_part, inside = (part >= 0) & (part < s.parts), jnp.clip(part, 0, s.parts - 1)
        columns = jnp.arange(s.width, dtype=jnp.int32)
        positions = self.read(self.positions_ref, inside, columns, -1)
        keys = self.keys(inside, columns, positions)
        chosen = is_part & (keys != OUTSIDE) & ((keys > key) | ((keys == key) & (positions <= last)))
        tiles = (split_lanes(x, s.width // s.plan.lanes) for x in (columns, positions, chosen.astype(jnp.int32)))
        column_tile, position_tile, chosen_tile = tiles
        rank, total = sum_before(add_all(chosen_tile)), sum_tile(chosen_tile)
        for column, position, count in zip(column_tile, position_tile, chosen_tile):
            # The others follow in their order, so that every place is written once.
            place = jnp.where(count != 0, rank, total + column - rank)
            value = jnp.where(count != 0, position, -1)
            store_masked(out_ref, (self.row, place), value, column < s.columns, s.target)
            rank = rank + count
        store(count_ref.at[self.row], total)


# --- kernels and launch
def _share_kernel(positions_ref, scores_ref, part_ref, out_ref, count_ref, *, s: MergeSpecialization):
    """Grid (R,): the chosen candidates of one part and one row."""
    candidates = Candidates(positions_ref, scores_ref, pl.program_id(0), s)
    candidates.write_share(part_ref[0], candidates.find_limits(), out_ref, count_ref)


def _limits_kernel(positions_ref, scores_ref, key_ref, last_ref, *, s: MergeSpecialization):
    """Grid (R,): what decides one row."""
    row = pl.program_id(0)
    key, last = Candidates(positions_ref, scores_ref, row, s).find_limits()
    store(key_ref.at[row], key)
    store(last_ref.at[row], last)


def _launch(kernel: Any, name: str, arrays: tuple[Array, ...], out_shape: Any, k: int, plan: TopKMergePlan | None):
    parts, rows, columns = arrays[0].shape

    def launch(target, *arrays):
        chosen = choose_plan(name, plan, topk_merge_plan, parts=parts, columns=columns, target=target)
        s = MergeSpecialization(parts, columns, k, chosen, target)
        padded = parts * s.arrays * chosen.block
        if padded > MAX_CANDIDATES:
            raise NotImplementedError(f"{padded} candidates of a row; the kernel supports at most {MAX_CANDIDATES}")
        return call(
            functools.partial(kernel, s=s),
            *arrays,
            out_shape=out_shape,
            grid=(rows,),
            name=name,
            target=target,
            num_warps=chosen.num_warps,
        )

    return by_target(launch, *arrays)


def top_k_share(
    positions: Array, scores: Array, part: Array, k: int, *, plan: TopKMergePlan | None = None
) -> tuple[Array, Array]:
    """Candidates of a part that belong to the top-k of all: (int32 [R, C], then -1; their number int32 [R]).

    Args:
      positions: int32 [S, R, C], ascending in each part, then -1.
      scores: float32 [S, R, C].
      part: int32 scalar; outside 0..S-1 nothing is chosen.
      k: how many all parts select together.
      plan: replaces the heuristic one.

    Raises:
      NotImplementedError: more candidates than a program's registers hold, or arrays of 2**31 elements and more.
    """
    _, rows, columns = positions.shape
    shapes = [jax.ShapeDtypeStruct((rows, columns), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    arrays = positions, scores, part.reshape(1)
    out, count = _launch(_share_kernel, "top_k_share", arrays, shapes, k, plan)
    return out, count


def find_limits(positions: Array, scores: Array, k: int, *, plan: TopKMergePlan | None = None) -> tuple[Array, Array]:
    """(key, last) int32 [R]: the top-k of all parts are the candidates above `key`, and those equal up to `last`.

    Arguments and errors as of `top_k_share`.
    """
    shapes = [jax.ShapeDtypeStruct(positions.shape[1:2], jnp.int32)] * 2
    key, last = _launch(_limits_kernel, "top_k_merge", (positions, scores), shapes, k, plan)
    return key, last
