"""DeepSeek-V4's compressor: pools a window of tokens, normalises, rotates, quantises and stores its entry in place.

One program per window that may close in a step. Programs whose window does not close exit at once. An online softmax
reads the tokens of a window block by block, from the state (earlier tokens) or from the rows of this step. Both go
through the same operations, so the bits of an entry do not depend on how a sequence was cut into steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load
from pallas_kernels.cache_parts import CachePart, Grid, encode
from pallas_kernels.online_softmax import LOG2E, NONE
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.compress import CompressPlan, compress_plan
from pallas_kernels.targets import Target, by_target


class _Window:
    """The tokens of one window: positions low..middle-1 are in the state, middle..end-1 are rows of this step."""

    def __init__(self, refs, closing: Sequence[Array], dim: int):
        self.kv, self.gate, self.old_kv, self.old_gate, self.bias = refs
        row, first, window, self.state = closing
        self.ratio, self.rows, self.dim = self.bias.shape[0], self.old_kv.shape[1], dim
        self.end = (window + 1) * self.ratio
        # Leave out positions below 0: window 0 has no previous window.
        self.low = jnp.maximum(self.end - self.rows, 0)
        # In this step the token at position p has row origin + p.
        self.origin = row - (self.end - 1)
        self.middle = jnp.maximum(self.low, first - self.origin)

    def _load(self, ref, grid: Grid, position: Array, exists: Array, *at: Array) -> Array:
        """Loads the channels of ref[at] that the token at `position` contributes; 0 where `exists` is False."""
        # Tokens of the previous window contribute the first `dim` channels, tokens of this window the last.
        column = grid.at
        if self.rows > self.ratio:
            column = column + jnp.where(position >= self.end - self.ratio, jnp.int32(self.dim), jnp.int32(0))
        mask = jnp.broadcast_to(exists, grid.shape)
        mask = mask if grid.exists is None else mask & grid.exists
        # Clip the indices: with known bounds the compiler needs no 64-bit address sums and no branches for masks.
        index = [jnp.full_like(column, jnp.clip(i, 0, n - 1)) for i, n in zip(at, ref.shape)]
        return load(ref.at[*index, column], mask=mask, other=0.0)

    def _old(self, grid: Grid, positions: list[Array]) -> list[tuple[Array, Array]]:
        """Loads (kv, gate) of `positions` from the state; 0 from position `middle` on."""
        found = []
        for position in positions:
            at = position, position < self.middle, self.state, lax.rem(position, jnp.int32(self.rows))
            found.append((self._load(self.old_kv, grid, *at), self._load(self.old_gate, grid, *at)))
        return found

    def _new(self, grid: Grid, positions: list[Array]) -> list[tuple[Array, Array]]:
        """Loads (kv, gate) of `positions` from the rows of this step; 0 from position `end` on."""
        found = []
        for position in positions:
            at = position, position < self.end
            row, step = self.origin + position, lax.rem(position, jnp.int32(self.ratio))
            gate = self._load(self.gate, grid, *at, row) + self._load(self.bias, grid, *at, step)
            found.append((self._load(self.kv, grid, *at, row), gate))
        return found

    def pool(self, grid: Grid, block: int) -> Array:
        """Sums kv over the window, weighted by the softmax of the gates; padding is 0.

        Tokens are added one by one in a fixed order, so block boundaries change no bit (a block ends where the state
        ends). Tokens past the end of a block change nothing.
        """
        old_blocks = lax.div(self.middle - self.low + (block - 1), jnp.int32(block))
        new_blocks = lax.div(self.end - self.middle + (block - 1), jnp.int32(block))

        def step(i, carry):
            older = i < old_blocks
            first = jnp.where(older, self.low + i * block, self.middle + (i - old_blocks) * block)
            end = jnp.where(older, self.middle, self.end)
            positions = [first + j for j in range(block)]
            tokens = lax.cond(older, lambda: self._old(grid, positions), lambda: self._new(grid, positions))
            top, total, pooled = carry
            for position, (kv, gate) in zip(positions, tokens):
                gate = jnp.where(position < end, gate, NONE)
                higher = gate > top
                # One of the two factors of an online softmax is 1. A sum with one product has one way to become an FMA.
                factor = jnp.exp2(-jnp.abs(gate - top) * LOG2E)
                top = jnp.where(higher, gate, top)
                total = jnp.where(higher, total, 1.0) * factor + jnp.where(higher, 1.0, total)
                pooled = jnp.where(higher, pooled, kv) * factor + jnp.where(higher, kv, pooled)
            return top, total, pooled

        zeros = jnp.zeros(grid.shape, jnp.float32)
        carry = jnp.full(grid.shape, NONE, jnp.float32), zeros, zeros
        _, total, pooled = lax.fori_loop(jnp.int32(0), old_blocks + new_blocks, step, carry)
        return pooled / total


def _rotate(x: Array, grid: Grid, turn_ref, i: Array, dim: int) -> Array:
    """Rotates interleaved pairs of the last r of the `dim` values x[groups, each] by turn_ref[i] (cosines, sines)."""
    pairs = turn_ref.shape[2]

    def halves(tile):
        return jnp.unstack(tile.reshape(tile.shape[0], -1, 2), axis=-1)

    first, second = halves(x)
    at = halves(grid.at)[0] - (dim - 2 * pairs)
    pair, turning = at >> 1, (at >= 0) & (at < 2 * pairs)
    if grid.exists is not None:
        turning &= halves(grid.exists)[0]
    entry = jnp.full_like(pair, i)
    cos, sin = (load(turn_ref.at[entry, jnp.full_like(pair, k), pair], mask=turning, other=0) for k in (0, 1))
    turned = first * cos - second * sin, second * cos + first * sin
    both = [jnp.where(turning, new, old) for new, old in zip(turned, (first, second))]
    return jnp.stack(both, axis=-1).reshape(x.shape)


def _kernel(*refs, parts: Sequence[CachePart], eps: float, rotated: bool, plan: CompressPlan, target: Target):
    """Grid (M,). refs: closings, five of `_Window`, norm, rotation if any, all arrays, the same as aliased outputs."""
    closings_ref, *token_refs, norm_ref = refs[:7]
    out_refs = refs[-sum(len(p.arrays) for p in parts) :]
    i, dim = pl.program_id(0), norm_ref.shape[0]
    *closing, slot = [closings_ref[i, k] for k in range(5)]

    @pl.when((slot >= 0) & (slot < parts[0].pages.shape[0]))
    def _():
        each = parts[0].group_size or dim
        grid = Grid(-(-dim // each), each, target).columns(0, dim)
        x = _Window(token_refs, closing, dim).pool(grid, plan.block)
        mean = jnp.sum(jnp.sum(x * x, axis=1), axis=0) * (1.0 / dim)
        entry = x * lax.rsqrt(mean + eps) * grid.load(norm_ref)
        if rotated:
            entry = _rotate(entry, grid, refs[7], i, dim)
        after, column = list(out_refs), 0
        for part, width in zip(parts, _widths(parts, dim)):
            for tile, value in encode(part, entry, grid.columns(column, width), target):
                tile.store(after.pop(0), slot, value)
            column += width


def _widths(parts: Sequence[CachePart], dim: int) -> list[int]:
    """Number of values of an entry that each part holds; the first part holds the remainder."""
    rest = [part.pages.shape[1] for part in parts[1:]]
    return [dim - sum(rest), *rest]


def compress(
    parts: Sequence[CachePart],
    closings: Array,
    tokens: tuple[Array, Array],
    state: tuple[Array, Array],
    position_bias: Array,
    norm: Array,
    *,
    rotation: Array,
    eps: float,
    plan: CompressPlan | None = None,
) -> list[list[Array]]:
    """Stores the entries of `closings` and returns `CachePart.arrays` of every part; in place if they are donated.

    Args:
      parts: hold consecutive columns of an entry [hd]; `CachePart.rows` is None.
      closings: int32 [M, 5]: row of the token that closes the window, first row of its request, number of the window,
        row of the state, slot of the entry. A slot outside [0, slots) skips the window. Slots are distinct.
      tokens: kv and gate, float32 [T, C].
      state: kv and gate of earlier tokens, float32 [N, S, C]; the token at position p is at p % S.
      position_bias: float32 [m, C].
      norm: float32 [hd].
      rotation: float32 [M, 2, r / 2], cosines and sines for the last r values.
      eps: epsilon of the RMSNorm.
      plan: None for the heuristic plan.

    Raises:
      NotImplementedError: groups or widths that the kernel does not support, or arrays of 2**31 elements and more.
    """
    (kv, gate), (state_kv, state_gate), turns = tokens, state, rotation
    dim, rows, rotated = norm.shape[0], state_kv.shape[1], turns.shape[2] > 0
    for part in parts:
        if part.flavour is not None and part.group_size % 4:
            raise NotImplementedError(f"groups of {part.group_size} values; the kernel writes four at a time")
    if rotated and dim % 2:
        raise NotImplementedError(f"entries of {dim} values; the kernel rotates pairs of an even number")
    real = [part for part, width in zip(parts, _widths(parts, dim)) if width]

    def run(target, parts, *inputs):
        chosen = choose_plan("compress", plan, compress_plan, rows=rows, width=dim, target=target)
        arrays = [a for p in parts for a in p.arrays]
        shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p) for p in parts]
        return call(
            functools.partial(_kernel, parts=shapes, eps=eps, rotated=rotated, plan=chosen, target=target),
            *inputs,
            *arrays,
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
            grid=(closings.shape[0],),
            name="compress",
            target=target,
            num_warps=chosen.num_warps,
            input_output_aliases={len(inputs) + i: i for i in range(len(arrays))},
        )

    inputs = [closings, kv, gate, state_kv, state_gate, position_bias, norm, *([turns] if rotated else [])]
    after = iter(by_target(run, real, *inputs))
    return [[next(after) for _ in p.arrays] if width else p.arrays for p, width in zip(parts, _widths(parts, dim))]
