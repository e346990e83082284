"""The exact top-k of columns that lie in parts on several devices, from the top-k of every part.

Each part has columns of its own. Its top-k gives positions (columns of the whole row) and scores. The k best of all
candidates are the k best of all columns: the k largest scores; NaN counts as -inf, -0.0 equals 0.0, ties go to the
lower position. This is the array that `top_k` gives on one device, bit for bit, whatever the number of parts.

A candidate is an entry whose position is from 0 to 2**31 - 2, also if its score is -inf. In a part, positions ascend,
then come entries that are no candidates, -1 for one. No position occurs twice.

Method: two thresholds decide each row. All candidates with a score above the k-th largest one are chosen, and of those
equal to it the ones up to a last position. Both are found bit by bit, with one count per bit, without a sort. Then
every part compacts its own candidates.

S parts, R rows, C candidates of a row in each part.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import topk_merge as kernel
from pallas_kernels.mesh_axes import varying
from pallas_kernels.plans.topk_merge import TopKMergePlan
from pallas_kernels.topk_row import OUTSIDE, monotone_keys
from sparse_mla_jax import _check
from sparse_mla_jax._check import BEYOND
from sparse_mla_jax.ops._chunks import map_row_chunks, rows_from
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan
from sparse_mla_jax.ops.topk import CPU_ROWS, check_k, find_threshold


# --- public
def top_k_merge(
    positions: Array,
    scores: Array,
    k: int | None = None,
    *,
    return_scores: bool = False,
    implementation: str | None = None,
    plan: TopKMergePlan | None = None,
) -> Any:
    """The positions of the k best candidates of all parts, ascending, then -1 (contract: see above).

    Args:
      positions: int32 [S, R, C], ascending in each part, then -1.
      scores: float32 [S, R, C], or bfloat16 (widened).
      k: how many to select, a Python int of at least 1; None means C. More than S * C is legal.
      return_scores: also return the selected scores.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".

    Returns:
      int32 [R, k]; with return_scores also float32 [R, k], the scores of these positions: -inf for NaN and for -1.

    Raises:
      ValueError: shapes or types that do not fit, k below 1, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, None, TopKMergePlan)
    positions, scores, k = _check_parts(positions, scores, k)
    fixed = jax.lax.stop_gradient(scores)
    if 0 in positions.shape:
        check_implementation(implementation)
        nothing = jnp.full((positions.shape[1], k), -1, jnp.int32)
        return (nothing, jnp.full(nothing.shape, -jnp.inf, jnp.float32)) if return_scores else nothing
    is_chosen = dispatch(
        "top_k_merge",
        implementation,
        {
            "triton": lambda: _is_chosen(positions, fixed, Limits(*kernel.find_limits(positions, fixed, k, plan=plan))),
            "xla": lambda: _is_chosen(positions, fixed, _limits(positions, fixed, k)),
            "reference": lambda: _reference(positions, fixed, k),
        },
    )
    return _in_order(positions, scores, is_chosen, k, return_scores)


def top_k_share(
    positions: Array,
    scores: Array,
    part: Array | int,
    k: int | None = None,
    *,
    implementation: str | None = None,
    plan: TopKMergePlan | None = None,
) -> tuple[Array, Array]:
    """The positions of one part that belong to the k best candidates of all parts.

    Args:
      positions: int32 [S, R, C], ascending in each part, then -1.
      scores: float32 [S, R, C], or bfloat16 (widened).
      part: int32 scalar, the part; may be traced. Outside 0..S-1 nothing is selected.
      k: how many all parts select together, a Python int of at least 1; None means C.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".

    Returns:
      (int32 [R, C], int32 [R]): the selected positions, ascending, then -1; and how many they are. The shares of all
      parts are disjoint and make up `top_k_merge`.

    Raises:
      ValueError: shapes or types that do not fit, k below 1, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, None, TopKMergePlan)
    positions, scores, k = _check_parts(positions, scores, k)
    scores = jax.lax.stop_gradient(scores)
    part = _check.int32("part", part, hint="A scalar: jax.lax.axis_index(axis_name).")
    if 0 in positions.shape:
        check_implementation(implementation)
        return jnp.full(positions.shape[1:], -1, jnp.int32), jnp.zeros(positions.shape[1:2], jnp.int32)
    return dispatch(
        "top_k_share",
        implementation,
        {
            "triton": lambda: kernel.top_k_share(positions, scores, part, k, plan=plan),
            "xla": lambda: _share(positions, scores, part, _limits(positions, scores, k)),
            "reference": lambda: _reference_share(positions, scores, part, k),
        },
    )


# --- validation
def _check_parts(positions: Any, scores: Any, k: Any) -> tuple[Array, Array, int]:
    positions = _check.int32("positions", positions, "S", "R", "C", hint="Stack the parts.")
    types = (jnp.float32, jnp.bfloat16)
    scores = _check.array("scores", scores, types, *positions.shape, hint="One for each of positions.")
    return positions, scores.astype(jnp.float32), check_k(positions.shape[2] if k is None else k)


# --- arithmetic
class Limits(NamedTuple):
    """What decides each row.

    Attributes:
      key: int32 [R], key of the k-th largest score; candidates above it are chosen.
      last: int32 [R], of the candidates equal to it those up to this position are chosen; negative for none.
    """

    key: Array
    last: Array


def _keys(positions: Array, scores: Array) -> Array:
    """int32 keys in the order of the scores, OUTSIDE for entries that are no candidates."""
    return jnp.where(kernel.is_candidate(positions), monotone_keys(scores), OUTSIDE)


def _limits(positions: Array, scores: Array, k: int) -> Limits:
    """The XLA body: all rows at once; on a CPU in chunks that fit its cache."""
    rows = positions.shape[1]
    # All candidates of a row in one row.
    flat = tuple(jnp.moveaxis(x, 1, 0).reshape(rows, -1) for x in (positions, scores))

    def chunked(*flat: Array) -> Limits:
        def body(first: Array) -> Limits:
            positions, scores = (rows_from(x, first, CPU_ROWS) for x in flat)
            return _limits_of_rows(positions, scores, k)

        return map_row_chunks(body, rows, CPU_ROWS, like=flat)

    whole = partial(_limits_of_rows, k=k)
    if rows <= CPU_ROWS:
        return whole(*flat)
    return jax.lax.platform_dependent(*flat, cpu=chunked, default=whole)


def _limits_of_rows(positions: Array, scores: Array, k: int) -> Limits:
    """Limits of positions[R, N] and scores[R, N], both bit by bit."""
    keys = _keys(positions, scores)
    is_candidate = keys != OUTSIDE
    wanted = jnp.minimum(is_candidate.sum(axis=1, keepdims=True, dtype=jnp.int32), k)
    threshold = find_threshold(keys, wanted)
    # If a row is empty its threshold is above all keys.
    ties = wanted - (keys > threshold).sum(axis=1, keepdims=True, dtype=jnp.int32)
    # The lowest positions are the largest of their negatives. Without ties to take, the threshold is INT32_MAX.
    lowest = find_threshold(jnp.where(is_candidate & (keys == threshold), -positions, OUTSIDE), ties)
    return Limits(threshold[:, 0], -lowest[:, 0])


def _is_chosen(positions: Array, scores: Array, limits: Limits) -> Array:
    """Which of positions[..., R, C] are chosen."""
    keys = _keys(positions, scores)
    key, last = limits.key[:, None], limits.last[:, None]
    return (keys != OUTSIDE) & ((keys > key) | ((keys == key) & (positions <= last)))


def _in_order(positions: Array, scores: Array, is_chosen: Array, k: int, return_scores: bool) -> Any:
    """The chosen ones of all parts [S, R, C] by position: int32 [R, k], then -1; and their scores if asked for."""
    rows = positions.shape[1]
    columns = [jnp.where(is_chosen, positions, BEYOND), *([scores] if return_scores else [])]
    flat = [jnp.moveaxis(x, 1, 0).reshape(rows, -1) for x in columns]
    ordered = jax.lax.sort(flat, dimension=1, num_keys=1)
    pad = max(0, k - flat[0].shape[1])
    order = jnp.pad(ordered[0][:, :k], ((0, 0), (0, pad)), constant_values=BEYOND)
    out = jnp.where(order == BEYOND, -1, order)
    if not return_scores:
        return out
    taken = jnp.pad(ordered[1][:, :k], ((0, 0), (0, pad)))
    return out, jnp.where((out >= 0) & ~jnp.isnan(taken), taken, -jnp.inf)


def _share(positions: Array, scores: Array, part: Array, limits: Limits) -> tuple[Array, Array]:
    """The chosen ones of a part, packed to the front, and their number."""
    own, own_scores = (jnp.take(x, part, axis=0, mode="clip") for x in (positions, scores))
    is_part = (part >= 0) & (part < positions.shape[0])
    chosen = is_part & _is_chosen(own, own_scores, limits)
    rows, width = own.shape
    so_far = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
    target = jnp.where(chosen, so_far - 1, width)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    out = varying(jnp.full((rows, width), -1, jnp.int32), positions, scores, part, limits)
    return out.at[row, target].set(own, mode="drop", wrap_negative_indices=False), so_far[:, -1]


# --- reference
def _reference(positions: Array, scores: Array, k: int) -> Array:
    """Which candidates [S, R, C] are chosen: the first k of a sort by score and position."""
    parts, rows, width = positions.shape
    flat, keys = (jnp.moveaxis(x, 1, 0).reshape(rows, -1) for x in (positions, _keys(positions, scores)))
    # Three sort keys: candidates first, then the larger score, then the lower position.
    order = jnp.lexsort((flat, -keys, keys == OUTSIDE), axis=1)
    chosen = (jnp.argsort(order, axis=1) < k) & (keys != OUTSIDE)
    return jnp.moveaxis(chosen.reshape(rows, parts, width), 1, 0)


def _reference_share(positions: Array, scores: Array, part: Array, k: int) -> tuple[Array, Array]:
    chosen = _reference(positions, scores, k) & (jnp.arange(positions.shape[0]) == part)[:, None, None]
    width = positions.shape[2]
    return _in_order(positions, scores, chosen, width, False), chosen.sum(axis=(0, 2), dtype=jnp.int32)
