"""Search for the k-th largest of int32 keys in a kernel, by counts of the keys that reach a threshold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.topk_row import INFINITY, Tile, map_tiles, sum_tile

# As a number of keys: all of them.
ALL = 2**31 - 1


class Bisection(NamedTuple):
    """State of the search for a threshold, int32 scalars.

    Attributes:
      low, high: at least k keys reach `low`, fewer than k reach `high`.
      reached: how many keys reach `low`.
      above: how many keys reach `high`.
      steps: counts so far.
    """

    low: Array
    high: Array
    reached: Array
    above: Array
    steps: Array


def _narrow(count: Callable, k: int | Array, guess: Array | None, state: Bisection) -> Bisection:
    """One step of the search: counts the keys that reach two thresholds between low and high."""
    low, high, reached, above, steps = state
    distance = high - low
    # About a third (1/4 + 1/16), by logical shifts: the distance may be as large as 2**32.
    third = sum(lax.shift_right_logical(distance, jnp.int32(bits)) for bits in (2, 4))
    third = jnp.maximum(third, 1)
    a, b = low + third, high - third
    if guess is not None:
        a = jnp.where(steps == 0, jnp.clip(guess, low + 1, high - 1), a)
        b = jnp.where(steps == 0, jnp.clip(guess + 1, low + 1, high - 1), b)
    reach_a, reach_b = count(a, b)
    is_b, is_a = reach_b >= k, reach_a >= k
    return Bisection(
        jnp.where(is_b, b, jnp.where(is_a, a, low)),
        jnp.where(is_b, high, jnp.where(is_a, b, a)),
        jnp.where(is_b, reach_b, jnp.where(is_a, reach_a, reached)),
        jnp.where(is_b, above, jnp.where(is_a, reach_b, reach_a)),
        steps + 1,
    )


def find_threshold(
    count: Callable,
    k: int | Array,
    high: Array,
    *,
    low: Array | None = None,
    enough: int | None = None,
    guess: Array | None = None,
) -> tuple[Array, Array]:
    """The largest threshold that at least k keys reach, or one that at most `enough` (k if None) reach.

    Args:
      count: (low, high) -> how many keys reach each of these thresholds.
      k: how many keys are wanted.
      high: a threshold that fewer than k keys reach.
      low: a threshold that at least k keys reach; None for the key of -inf.
      enough: ends the search early.
      guess: probably the answer.

    Returns:
      The threshold, and how many of the keys equal to it to take besides all keys above it; INT32_MAX: all.
    """
    stop = k if enough is None else enough
    low = jnp.int32(-INFINITY) if low is None else low

    def is_open(state):
        return (state.reached > stop) & (state.high - state.low != 1)

    state = Bisection(low, high, jnp.int32(ALL), jnp.int32(0), jnp.int32(0))
    state = lax.while_loop(is_open, functools.partial(_narrow, count, k, guess), state)
    return state.low, jnp.where(state.reached <= stop, jnp.int32(ALL), k - state.above)


def count_reaching(keys: Tile, low: Array, high: Array) -> tuple[Array, Array]:
    """How many of fewer than 2**15 keys are at or above each of two thresholds; low <= high."""
    # Pack two counts into one sum.
    both = sum_tile(
        map_tiles(lambda key: jnp.where(key >= high, 2**16 + 1, jnp.where(key >= low, jnp.int32(1), 0)), keys)
    )
    return both & 0xFFFF, both >> 16
