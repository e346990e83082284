"""Runs an operator over equal chunks of rows inside one jitted program, to bound its memory, without padded copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mesh_axes import varying


def loop_to(stop: Array, most: int, step: Callable[[Array, Any], Any], state: Any, *, reversible: bool) -> Any:
    """Runs state = step(i, state) for i = 0 .. min(stop, most) - 1; `stop` is known at run time only.

    Args:
      stop: int32 scalar.
      most: static.
      step: of one number and the state.
      state: pytree of arrays, varying over the axes of what `step` closes over.
      reversible: whether reverse mode must work, which needs a static number of steps: then all `most` are taken,
        those from `stop` on leave the state as it is, and the values of a step are computed again for its derivative.
    """
    if not reversible:
        return jax.lax.fori_loop(0, jnp.minimum(stop, most), step, state)

    @jax.checkpoint
    def maybe(i: Array, state: Any) -> Any:
        return jax.lax.cond(i < stop, step, lambda i, state: state, i, state)

    return jax.lax.fori_loop(0, most, maybe, state)


def map_row_chunks(body: Callable[[Array], Any], num_rows: int, chunk: int, *, like: Any) -> Any:
    """Computes rows 0..num_rows-1 by chunks: `body(first)` gives arrays [chunk, ...] for rows first..first+chunk-1.

    The last chunk starts early enough to be whole, so some rows may be computed twice, with the same result. `like`:
    the arrays that `body` closes over; the result varies over their shard_map axes.
    """
    if chunk >= num_rows:
        return body(jnp.int32(0))
    shapes = jax.eval_shape(body, jax.ShapeDtypeStruct((), jnp.int32))
    out = varying(jax.tree.map(lambda s: jnp.zeros((num_rows, *s.shape[1:]), s.dtype), shapes), like)

    def step(i, out):
        start = jnp.minimum(i * chunk, num_rows - chunk).astype(jnp.int32)
        return jax.tree.map(lambda o, p: jax.lax.dynamic_update_slice_in_dim(o, p, start, 0), out, body(start))

    return jax.lax.fori_loop(0, -(-num_rows // chunk), step, out)


def rows_from(x: Array, first: Array, chunk: int) -> Array:
    """Rows first..first+chunk-1 of `x`, for use inside `map_row_chunks`."""
    return x if chunk >= x.shape[0] else jax.lax.dynamic_slice_in_dim(x, first, chunk, 0)
