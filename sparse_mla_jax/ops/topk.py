"""Exact top-k of the rows of a score matrix: the same array from every implementation, run and device.

Contract of each row: select the k largest scores of columns start <= c < start + length. NaN counts as -inf, -0.0
equals 0.0, ties go to the lower column. The result is exactly min(k, length) column indices, counted from the row's
start, in ascending order, then -1. Columns outside the interval are never selected, whatever they hold.

Method of the XLA body: map floats to integers of the same order and find the k-th largest of a row bit by bit, with
one count per bit. Then select the columns above it and the first columns equal to it; a running count gives each
its place in the result. Measured on 2 CPU cores against lax.top_k and a sort: equal at [8, 2048] with k 128 (0.3 ms),
1.2 times faster at [512, 2048] (15 ms), 1.7 times at [64, 20000] with k 2048 (25 ms). Rows may start at any column
without a gather.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import topk as kernel
from pallas_kernels.mesh_axes import varying
from pallas_kernels.plans.topk import TopKPlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops._chunks import map_row_chunks, rows_from
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops._row_bounds import clamp, clamp_rows

OUTSIDE = -(2**31)
# Rows per chunk on a CPU: the 32 counts over a chunk read it from the cache (16 is best of 4 to 512, up to 1.7 times).
CPU_ROWS = 16


# --- public
def top_k(
    scores: Array,
    k: int,
    row_lengths: Array | None = None,
    *,
    row_starts: Array | None = None,
    return_scores: bool = False,
    implementation: str | None = None,
    plan: TopKPlan | None = None,
    config: TopKPlan | None = None,
) -> Any:
    """Columns of the k largest scores of each row, counted from its start, ascending, then -1 (contract: see above).

    Args:
      scores: [R, N] float32, or bfloat16 (widened).
      k: how many to select, a Python int of at least 1; more than N is legal.
      row_lengths: int32 [R], number of columns from the row's start on; clamped to the array, negative counts as 0;
        None means up to the last column.
      row_starts: int32 [R], a row's first column, clamped to [0, N]; None means 0.
      return_scores: also return the selected scores.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      int32 [R, k]; with return_scores also float32 [R, k], the scores of these columns: -inf for NaN and for index -1.

    Raises:
      ValueError: shapes or types that do not fit, k below 1, or an implementation that does not support the case.
    """
    scores = _scores(scores)
    # Columns are integers: they have no derivative, whatever the scores have.
    fixed = jax.lax.stop_gradient(scores)
    implementation, plan = with_plan(implementation, plan, config, TopKPlan)
    k = check_k(k)
    rows, columns = scores.shape
    starts, lengths = clamp_rows(row_starts, row_lengths, rows=rows, columns=columns)
    if 0 in scores.shape:
        check_implementation(implementation)
        local = jnp.full((rows, k), -1, jnp.int32)
    else:
        local = dispatch(
            "top_k",
            implementation,
            {
                "triton": lambda: kernel.top_k(
                    fixed, k, _narrow(row_starts, starts), _narrow(row_lengths, lengths), plan=plan
                ),
                "xla": lambda: _xla(fixed, k, starts, lengths),
                "reference": lambda: reference.top_k(fixed, k, starts, lengths),
            },
        )
    return (local, _selected(scores, local, starts)) if return_scores else local


def top_k_prefill(
    scores: Array, k: int, *, row_starts: Array, row_ends: Array, implementation: str | None = None
) -> Array:
    """`top_k` of columns row_starts[r] <= c < row_ends[r]: int32 [R, k], counted from row_starts.

    Args:
      scores: [R, N] float32 or bfloat16.
      k: how many to select, at least 1.
      row_starts, row_ends: int32 [R], clamped to [0, N]; an end before its start is an empty row.
      implementation: None for the best that runs here, or "triton", "xla", "reference".

    Raises:
      ValueError: as `top_k`.
    """
    scores = _scores(scores)
    rows, columns = scores.shape
    starts, ends = (clamp(n, x, rows, columns) for n, x in (("row_starts", row_starts), ("row_ends", row_ends)))
    return top_k(scores, k, ends - starts, row_starts=starts, implementation=implementation)


def top_k_decode(scores: Array, k: int, *, seq_lens: Array, next_n: int, implementation: str | None = None) -> Array:
    """`top_k` for a decode step of B requests with `next_n` query tokens each: int32 [B * next_n, k].

    Args:
      scores: [B * next_n, N] float32 or bfloat16; row b * next_n + j is token j of request b.
      k: how many to select, at least 1.
      seq_lens: int32 [B], the request's length with all its next_n tokens: token j sees seq_lens[b] - next_n + j + 1
        columns; or int32 [B, next_n], how many columns each token sees. A token that sees less than 1 is padding.
      next_n: query tokens per request, at least 1 (more than 1 in speculative decoding).
      implementation: None for the best that runs here, or "triton", "xla", "reference".

    Raises:
      ValueError: as `top_k`; rows that are not B * next_n.
    """
    scores = _scores(scores)
    rows, columns = scores.shape
    next_n = _check.size("next_n", next_n)
    seq_lens = _check.int32("seq_lens", seq_lens, ..., hint="The tokens of each request.")
    require(
        rows % next_n == 0 and seq_lens.shape in ((rows // next_n,), (rows // next_n, next_n)),
        f"seq_lens has shape {list(seq_lens.shape)} for scores {list(scores.shape)} and next_n {next_n}; expected [B]"
        " or [B, next_n] with B * next_n rows of scores.",
    )
    if seq_lens.ndim == 2:
        return top_k(scores, k, seq_lens.reshape(-1), implementation=implementation)
    # Clamp before the subtraction, which could wrap. A limit of N alone would cut the earlier tokens of a long request.
    bounded = clamp("seq_lens", seq_lens, rows // next_n, columns + next_n)
    seen = bounded[:, None] - (next_n - 1) + jnp.arange(next_n, dtype=jnp.int32)
    return top_k(scores, k, seen.reshape(-1), implementation=implementation)


# --- validation
def check_k(k: Any) -> int:
    """`k` as an int in 1..2**31 - 1."""
    return _check.size("k", k, 1, 2**31 - 1, hint="It is a shape: mark it static under jit.")


def _scores(scores: Any) -> Array:
    scores = _check.array("scores", scores, (jnp.float32, jnp.bfloat16), "R", "N", hint="Cast or reshape it.")
    return scores.astype(jnp.float32)


def _narrow(given: Any, clamped: Array) -> Array | None:
    """`given` if it is int32, since the kernel clamps it; `clamped` for other types; None for None."""
    if given is None:
        return None
    return given if isinstance(given, Array) and given.dtype == jnp.int32 else clamped


# --- arithmetic
def find_threshold(keys: Array, wanted: Array) -> Array:
    """The largest t per row such that at least wanted[R, 1] of keys[R, N] are >= t: int32 [R, 1], bit by bit."""

    def one_bit(i, t):
        # t starts at INT32_MIN. The first bit is the sign: xor clears it. Later bits are 0: xor sets them.
        candidate = t ^ jnp.left_shift(jnp.int32(1), 31 - i)
        enough = (keys >= candidate).sum(axis=1, keepdims=True, dtype=jnp.int32) >= wanted
        return jnp.where(enough, candidate, t)

    first = varying(jnp.full((keys.shape[0], 1), OUTSIDE, jnp.int32), keys, wanted)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(32), one_bit, first)


def _xla(scores: Array, k: int, starts: Array, lengths: Array) -> Array:
    """The XLA body: all rows at once; on a CPU in chunks that fit its cache."""

    def whole(scores, starts, lengths):
        return _bisect(scores, k, starts, lengths)

    def chunked(*arrays):
        def body(first):
            return whole(*(rows_from(x, first, CPU_ROWS) for x in arrays))

        return map_row_chunks(body, arrays[0].shape[0], CPU_ROWS, like=arrays)

    if scores.shape[0] <= CPU_ROWS:
        return whole(scores, starts, lengths)
    return jax.lax.platform_dependent(scores, starts, lengths, cpu=chunked, default=whole)


def _bisect(scores: Array, k: int, starts: Array, lengths: Array) -> Array:
    rows, columns = scores.shape
    column = jnp.arange(columns, dtype=jnp.int32)[None, :]
    inside = (column >= starts[:, None]) & (column < (starts + lengths)[:, None])
    keys = jnp.where(inside, kernel.monotone_keys(scores), OUTSIDE)
    wanted = jnp.minimum(lengths, k)[:, None]
    threshold = find_threshold(keys, wanted)
    # If a row is empty or selected whole, its threshold is meaningless and `inside` decides alone.
    above = inside & (keys > threshold)
    equal = inside & (keys == threshold)
    ties = wanted - above.sum(axis=1, keepdims=True, dtype=jnp.int32)
    above_so_far = jnp.cumsum(above, axis=1, dtype=jnp.int32)
    equal_so_far = jnp.cumsum(equal, axis=1, dtype=jnp.int32)
    chosen = above | (equal & (equal_so_far <= ties))
    target = jnp.where(chosen, above_so_far + jnp.minimum(equal_so_far, ties) - 1, k)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    out = varying(jnp.full((rows, k), -1, jnp.int32), scores, starts, lengths)
    return out.at[row, target].set(column - starts[:, None], mode="drop", wrap_negative_indices=False)


def _selected(scores: Array, local: Array, starts: Array) -> Array:
    """Scores float32 [R, k] of the columns `local`, counted from `starts`; -inf for NaN and for -1."""
    if scores.size == 0:
        return jnp.full(local.shape, -jnp.inf, jnp.float32)
    at = jnp.where(local >= 0, local + starts[:, None], 0)
    taken = jnp.take_along_axis(scores, at, axis=1, mode="clip")
    return jnp.where((local >= 0) & ~jnp.isnan(taken), taken, -jnp.inf)
