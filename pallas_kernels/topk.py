"""Exact, deterministic top-k of each row, indices written in ascending order; one program per row.

Floats become int32 keys of the same order. The k-th largest key is found bit by bit (32 counts over the row, which
stays in cache, or in registers when it fits in one block); one more pass writes the columns above it, and the first of
its equals, to the place that a running count gives them. No atomics, so no order to depend on.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._call import call, dispatch, load, store
from pallas_kernels.plans.topk import TopKPlan, topk_plan

# Column arithmetic is int32 and runs up to a block past the end.
MAX_COLUMNS = 2**30
OUTSIDE = -(2**31)
NEGATIVE_INFINITY = -(2**23)


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def monotone_keys(scores: Array) -> Array:
    """int32 keys in the order of float32 `scores`: NaN as -inf, -0.0 as 0.0, subnormals kept apart; never INT32_MIN."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    # On bits, since float comparisons may flush subnormals to zero.
    bits = jnp.where((bits & 0x7FFFFFFF) > 0x7F800000, jnp.int32(NEGATIVE_INFINITY), bits)
    # Sign and magnitude become two's complement, in which both zeros are one.
    return jnp.where(bits < 0, jnp.int32(OUTSIDE) - bits, bits)


def _count(flags: Array) -> Array:
    return jnp.sum(flags.astype(jnp.int32), dtype=jnp.int32)


# --- kernel ----------------------------------------------------------------------------------------------------------
def _kernel(scores_ref, start_ref, end_ref, out_ref, *, columns: int, k: int, plan: TopKPlan):
    row = pl.program_id(0)
    start, end = start_ref[row], end_ref[row]
    wanted = jnp.minimum(end - start, k)
    lanes = jnp.arange(plan.block, dtype=jnp.int32)
    single = columns <= plan.block
    first_block, last_block = (0, 1) if single else (start // plan.block, (end + plan.block - 1) // plan.block)

    def read(block):
        """Columns, whether they belong to the row, and their keys."""
        column = block * plan.block + lanes
        inside = (column >= start) & (column < end)
        at = jnp.where(inside, column, 0)
        scores = load(scores_ref.at[jnp.full_like(at, row), at], mask=inside, other=0.0)
        return column, inside, jnp.where(inside, monotone_keys(scores), jnp.int32(OUTSIDE))

    held = read(0) if single else None

    def over_blocks(body, carry):
        """Folds body(carry, column, inside, keys) over the blocks of the row, from the left."""
        if held is not None:
            return body(carry, *held)
        return jax.lax.fori_loop(first_block, last_block, lambda b, c: body(c, *read(b)), carry)

    def count(condition):
        # Lanes add up on their own: one reduction across waves per count, not one per block.
        def add(total, _, inside, keys):
            return total + (inside & condition(keys)).astype(jnp.int32)

        return jnp.sum(over_blocks(add, jnp.zeros((plan.block,), jnp.int32)), dtype=jnp.int32)

    def one_bit(i, t):
        candidate = t ^ jnp.left_shift(jnp.int32(1), 31 - i)
        return jnp.where(count(lambda keys: keys >= candidate) >= wanted, candidate, t)

    # A row that is taken whole keeps the lowest threshold: every key is above it. (Typed: the lowering would give two
    # bare literals the type of the condition.)
    steps = jnp.where(end - start > k, jnp.int32(32), jnp.int32(0))
    threshold = jax.lax.fori_loop(jnp.int32(0), steps, one_bit, jnp.int32(OUTSIDE))
    ties = wanted - count(lambda keys: keys > threshold)

    def emit(carry, column, inside, keys):
        above_before, equal_before = carry
        above, equal = inside & (keys > threshold), inside & (keys == threshold)
        # A scan across wavefronts: old Triton had it wrong on gfx942 (ROCm/triton#947), so tests compare every index.
        above_so_far = above_before + jnp.cumsum(above.astype(jnp.int32), dtype=jnp.int32)
        equal_so_far = equal_before + jnp.cumsum(equal.astype(jnp.int32), dtype=jnp.int32)
        chosen = above | (equal & (equal_so_far <= ties))
        # Masked lanes point past the array: interpret mode writes old values back through them.
        place = jnp.where(chosen, above_so_far + jnp.minimum(equal_so_far, ties) - 1, k)
        store(out_ref.at[jnp.full_like(place, row), place], column - start, mask=chosen)
        return above_before + _count(above), equal_before + _count(equal)

    over_blocks(emit, (jnp.int32(0), jnp.int32(0)))

    def fill(b, carry):
        place = b * plan.block + lanes
        empty = (place >= wanted) & (place < k)
        place = jnp.where(empty, place, k)
        store(out_ref.at[jnp.full_like(place, row), place], jnp.full_like(place, -1), mask=empty)
        return carry

    jax.lax.fori_loop(wanted // plan.block, jnp.int32(-(-k // plan.block)), fill, jnp.int32(0))


# --- launch ----------------------------------------------------------------------------------------------------------
def top_k(scores: Array, k: int, starts: Array, ends: Array, *, plan: TopKPlan | None = None) -> Array:
    """Columns of float32 scores[R, N] with 0 <= starts[R] <= c < ends[R] <= N -> int32[R, k], relative to starts.

    Raises:
      NotImplementedError: more columns than int32 arithmetic serves, or arrays of 2**31 elements and more.
    """
    rows, columns = scores.shape
    if max(columns, k) > MAX_COLUMNS:
        raise NotImplementedError(f"{columns} columns and k {k}; the kernel serves at most {MAX_COLUMNS} of each")

    def launch(target, *arrays):
        chosen = plan or topk_plan(columns=columns, target=target)
        return call(
            functools.partial(_kernel, columns=columns, k=k, plan=chosen),
            *arrays,
            out_shape=jax.ShapeDtypeStruct((rows, k), jnp.int32),
            grid=(rows,),
            name="top_k",
            target=target,
            num_warps=chosen.num_warps,
        )

    return dispatch(launch, scores, starts, ends)
