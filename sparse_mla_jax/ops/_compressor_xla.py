"""Entries of the windows that close in a step, by XLA and by `reference.pool`.

    pooled[c] = sum_s softmax_s(gate[s, c]) * kv[s, c]
    entry = rotate(norm * pooled / sqrt(mean(pooled ** 2) + eps))

Both read the same rows (`gather_rows`). On XLA:CPU the rounding depends on how operations are fused, and the fusion on
the step's size. Three measures keep an entry's bits the same in steps of any size: blocks of one size (`_pool_blocks`),
barriers (`_compile_apart`), and a rotation in two stages (`_multiply_rotation`, `_rotate_products`).

K windows of a block; other letters as in `_compressor_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.mesh_axes import varying
from sparse_mla_jax import reference
from sparse_mla_jax.ops._chunks import loop_to
from sparse_mla_jax.ops._compressor_state import Closings, CompressorState, CompressorWeights

# Window rows (tokens) of a block: a block pools _ROWS // S windows.
_ROWS = 128


class PoolInputs(NamedTuple):
    """Inputs of every body: weights in float32, the state before, kv and gate float32[T, C], the windows that close."""

    weights: CompressorWeights
    state: CompressorState
    kv: Array
    gate: Array
    closings: Closings

    @property
    def angles(self) -> Array:
        """float32[M, r / 2], rotation angles of every entry."""
        positions = (self.closings.window * self.weights.ratio).astype(jnp.float32)
        return positions[:, None] * self.weights.frequencies


class WindowRows(NamedTuple):
    """The tokens of some windows: kv[K, S, hd], gate[K, S, hd] with position bias, valid[K, S]."""

    kv: Array
    gate: Array
    valid: Array


def xla_entries(inputs: PoolInputs, *, reversible: bool = False) -> Array:
    """Entries float32[M, hd] by XLA; zeros after the windows that close. See `loop_to` for `reversible`."""
    weights = inputs.weights

    def pool(closings: Closings) -> Array:
        rows = _compile_apart(gather_rows(inputs._replace(closings=closings)))
        position = closings.window * weights.ratio
        return _compile_apart(_multiply_rotation(weights, _pool(weights, rows), position))

    width = weights.dim + 2 * weights.frequencies.shape[0]
    loop = partial(loop_to, reversible=reversible)
    return _rotate_products(weights, _pool_blocks(pool, inputs, max(1, _ROWS // weights.rows), width, loop))


def reference_entries(inputs: PoolInputs) -> Array:
    """Entries float32[M, hd] by the reference, all at once."""
    rows = gather_rows(inputs)
    return reference.pool(*rows, inputs.weights.norm, inputs.angles, eps=inputs.weights.eps)


def gather_rows(inputs: PoolInputs) -> WindowRows:
    """Gathers the tokens of every closing window, from the step or from the state."""
    weights, state, kv, gate, closings = inputs
    size = weights.rows
    back = jnp.arange(size, dtype=jnp.int32) - (size - 1)
    row = closings.row[:, None] + back
    position = (closings.window[:, None] + 1) * weights.ratio - 1 + back
    in_step = row >= closings.first[:, None]
    ring = jnp.where(position >= 0, position, 0) % size

    def take(new: Array, old: Array, bias: Array | None) -> Array:
        new = new.at[jnp.where(in_step, row, 0)].get(mode="promise_in_bounds")
        old = old.at[closings.state_id[:, None], ring].get(mode="promise_in_bounds")
        return _select_channels(jnp.where(in_step[..., None], new if bias is None else new + bias, old), weights)

    bias = jnp.tile(weights.position_bias, (size // weights.ratio, 1))
    return WindowRows(take(kv, state.kv, None), take(gate, state.gate, bias), position >= 0)


def _select_channels(x: Array, weights: CompressorWeights) -> Array:
    """The channels of rows x[..., S, C] that contribute to the window: [..., S, hd], previous window's tokens first."""
    m, dim = weights.ratio, weights.dim
    parts = [x[..., i * m : (i + 1) * m, i * dim : (i + 1) * dim] for i in range(weights.channels // dim)]
    return jnp.concatenate(parts, axis=-2)


# --- the formula
def _pool(weights: CompressorWeights, rows: WindowRows) -> Array:
    """Entries [K, hd] before their rotation: softmax over the window's rows per channel, weighted sum, RMSNorm."""
    valid = rows.valid[..., None]
    gate = jnp.where(valid, rows.gate, -jnp.inf)
    weight = jnp.where(valid, jnp.exp(gate - jnp.max(gate, axis=1, keepdims=True)), 0)
    pooled = jnp.sum(weight * jnp.where(valid, rows.kv, 0), axis=1) / jnp.sum(weight, axis=1)
    scale = lax.rsqrt(jnp.mean(pooled * pooled, axis=-1, keepdims=True) + weights.eps)
    return pooled * scale * weights.norm


def _multiply_rotation(weights: CompressorWeights, entry: Array, position: Array) -> Array:
    """Replaces the r rotated values of entries [K, hd] by the 2 * r products that they are sums of: [K, hd + r].

    If XLA:CPU fuses a product with its sum, it rounds once instead of twice. `_rotate_products` therefore adds outside
    of the loop.
    """
    split = weights.dim - 2 * weights.frequencies.shape[0]
    angle = position.astype(jnp.float32)[:, None] * weights.frequencies
    first, second, cos, sin = entry[:, split::2], entry[:, split + 1 :: 2], jnp.cos(angle), jnp.sin(angle)
    products = [first * cos, second * cos, second * sin, first * sin]
    return jnp.concatenate([entry[:, :split], *products], axis=-1)


def _rotate_products(weights: CompressorWeights, terms: Array) -> Array:
    """Adds the products of `_multiply_rotation`: entries [M, hd], interleaved pairs (a cos - b sin, b cos + a sin)."""
    split = weights.dim - 2 * weights.frequencies.shape[0]
    a_cos, b_cos, b_sin, a_sin = jnp.split(terms[:, split:], 4, axis=-1)
    rotated = jnp.stack([a_cos - b_sin, b_cos + a_sin], axis=-1).reshape(terms.shape[0], -1)
    return jnp.concatenate([terms[:, :split], rotated], axis=-1)


# --- the same bits in steps of any size
def _compile_apart(x: Any) -> Any:
    """Computes `x` in a fusion of its own: fused with its inputs, XLA:CPU would round its sums differently."""
    return lax.optimization_barrier(x)


def _pool_blocks(
    pool: Callable[[Closings], Array], inputs: PoolInputs, block: int, width: int, loop: Callable[..., Array]
) -> Array:
    """Calls `pool` on `block` closings at a time: float32[M, width], zeros after the last closing.

    All blocks have one size: the rounding of a sum would depend on the step's size if its shape did.
    """
    most = inputs.closings.row.shape[0]
    short = -most % block
    padded = jax.tree.map(lambda x: jnp.pad(x, (0, short)) if x.ndim else x, inputs.closings)
    lists, count = dataclasses.replace(padded, count=None), inputs.closings.count

    def step(i: Array, out: Array) -> Array:
        some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * block, block), lists)
        return lax.dynamic_update_slice_in_dim(out, pool(some), i * block, 0)

    out = varying(jnp.zeros((most + short, width), jnp.float32), inputs)
    return loop(-(-count // block), (most + short) // block, step, out)[:most]
