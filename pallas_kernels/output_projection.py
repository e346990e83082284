"""Output projection by groups: undoes the rotation of attention's output and multiplies each group by its matrix.

A tiled matrix product with one program per group, block of tokens and block of columns. The last values of a head are
rotated. The program first walks over the ends of all heads of its group and undoes the rotation in registers. Then it
walks over all other values.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store_masked
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.output_projection import LEAST, ProjectionPlan, projection_plan
from pallas_kernels.targets import Target, by_target
from pallas_kernels.tiles import power_of_two


def _masked(ref, rows: Array, columns: Array, inside: Array | None) -> Array:
    """Loads ref[rows, columns]; 0 where `inside` is False."""
    rows, columns = jnp.broadcast_arrays(rows, columns)
    if inside is None:
        return load(ref.at[rows, columns])
    return load(ref.at[rows, columns], mask=jnp.broadcast_to(inside, rows.shape), other=0.0)


class _Product:
    """The loads of one program: `width` values of each of `heads` heads of its tokens, and weights of its group."""

    def __init__(self, x_ref, w_ref, token: Array, column: Array, heads: int, width: int):
        self.x_ref, self.w_ref, self.token, self.column = x_ref, w_ref, token[:, None], column[None, :]
        # First value of the group in a row of x; first row of the group in w.
        self.group = pl.program_id(2) * (heads * width)

    def weights(self, first: Array, size: int, count: int) -> Array:
        """Loads weight rows first..first+size-1 of the group, [size, columns]; rows from `count` on are 0."""
        row = jnp.arange(size, dtype=jnp.int32)[:, None]
        return _masked(self.w_ref, self.group + first + row, self.column, None if size == count else row < count)

    def values(self, first: Array, at: Array, count: int) -> Array:
        """Loads values first + at of the group, [tokens, len(at)]; 0 where at >= count."""
        at = at[None, :]
        return _masked(self.x_ref, self.token, self.group + first + at, None if at.shape[1] == count else at < count)


def _turned(product: _Product, first: Array, cos: Array, sin: Array, count: int) -> Array:
    """Loads `count` values from `first` on and rotates their pairs back, [tokens, R]; cos, sin: [tokens, R / 2]."""
    tokens, pairs = cos.shape
    x = product.values(first, jnp.arange(2 * pairs, dtype=jnp.int32), count).astype(jnp.float32)
    even, odd = jnp.unstack(x.reshape(tokens, pairs, 2), axis=2)
    turned = jnp.stack([even * cos + odd * sin, odd * cos - even * sin], axis=-1)
    return turned.reshape(tokens, 2 * pairs).astype(product.x_ref.dtype)


def _kernel(x_ref, w_ref, cos_ref, sin_ref, out_ref, *, heads: int, width: int, plan: ProjectionPlan, target: Target):
    """Grid (token blocks, column blocks, groups); x [T, H * d], w [g * I, O], cos, sin [T, r / 2], out [T, g * O]."""
    tokens, columns, rotated = x_ref.shape[0], w_ref.shape[1], 2 * cos_ref.shape[1]
    kept = width - rotated
    token = pl.program_id(0) * plan.tokens + jnp.arange(plan.tokens, dtype=jnp.int32)
    column = pl.program_id(1) * plan.columns + jnp.arange(plan.columns, dtype=jnp.int32)
    # Padding repeats the last token and column: the rows and columns of a product are independent.
    here = jnp.minimum(token, tokens - 1)
    # Take the minimum only if there is padding: it hides that columns are consecutive, so loads are narrow.
    there = column if columns % plan.columns == 0 else jnp.minimum(column, columns - 1)
    product = _Product(x_ref, w_ref, here, there, heads, width)
    dot = functools.partial(jnp.dot, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    turn = max(LEAST, power_of_two(rotated))
    pair = jnp.arange(turn // 2, dtype=jnp.int32)[None, :]
    inside = None if turn == rotated else 2 * pair < rotated
    cos, sin = (_masked(ref, here[:, None], pair, inside) for ref in (cos_ref, sin_ref))
    step = jnp.arange(plan.step, dtype=jnp.int32)
    whole, rest = divmod(kept, plan.step)

    def one(first: Array, count: int, total: Array) -> Array:
        return total + dot(product.values(first, step, count), product.weights(first, plan.step, count))

    def steps(i: Array, total: Array) -> Array:
        head = lax.div(i, jnp.int32(whole))
        return one(head * width + (i - head * whole) * plan.step, plan.step, total)

    def ends(head: Array, total: Array) -> Array:
        first = head * width + whole * plan.step
        if rest:
            total = one(first, rest, total)
        first += rest
        return total + dot(_turned(product, first, cos, sin, rotated), product.weights(first, turn, rotated))

    # Use two loops in sequence, not nested ones: the load pipeline of an inner loop would start anew for each head.
    total = lax.fori_loop(jnp.int32(0), jnp.int32(heads), ends, jnp.zeros((plan.tokens, plan.columns), jnp.float32))
    if whole:
        total = lax.fori_loop(jnp.int32(0), jnp.int32(heads * whole), steps, total)
    exists = (token < tokens)[:, None] & (column < columns)[None, :]
    if not tokens % plan.tokens and not columns % plan.columns:
        exists = None
    rows, at = jnp.broadcast_arrays(here[:, None], pl.program_id(2) * columns + column[None, :])
    store_masked(out_ref, (rows, at), total.astype(out_ref.dtype), exists, target)


def rotated_projection(
    out: Array, weight: Array, cos: Array, sin: Array, *, plan: ProjectionPlan | None = None
) -> Array:
    """Rotates the last values of `out` back and multiplies each group by its matrix: [T, g, O] in out.dtype.

    Args:
      out: bfloat16 or float32 [T, H, d], T at least 1.
      weight: [g, H // g * d, O] of the same type.
      cos, sin: float32 [T, r / 2], r at least 2, of the angles by which the last r values of a head are rotated.
      plan: None for the heuristic plan.

    Raises:
      NotImplementedError: types that the kernel does not support, no rotation, or arrays of 2**31 elements and more.
    """
    tokens, heads, width = out.shape
    groups, inner, columns = weight.shape
    if out.dtype != weight.dtype or out.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"out is {out.dtype}, weight {weight.dtype}; the kernel takes two bfloat16 or float32"
        )
    if cos.shape[1] == 0:
        raise NotImplementedError("no values are rotated; that is a plain product")

    def run(target: Target, *arrays: Any) -> Array:
        chosen = choose_plan(
            "rotated_projection",
            plan,
            projection_plan,
            tokens=tokens,
            groups=groups,
            columns=columns,
            kept=width - 2 * cos.shape[1],
            itemsize=out.dtype.itemsize,
            target=target,
        )
        return call(
            functools.partial(_kernel, heads=heads // groups, width=width, plan=chosen, target=target),
            *arrays,
            out_shape=jax.ShapeDtypeStruct((tokens, groups * columns), out.dtype),
            grid=(-(-tokens // chosen.tokens), -(-columns // chosen.columns), groups),
            name="rotated_projection",
            target=target,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )

    flat = out.reshape(tokens, heads * width), weight.reshape(groups * inner, columns)
    return by_target(run, *flat, cos, sin).reshape(tokens, groups, columns)
