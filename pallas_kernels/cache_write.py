"""Writes tokens into paged caches in place: quantise to FP8 by groups, or round to bfloat16, and store at a slot.

One program per token, all parts of a token (latent, rotary key, indexer's key) in one launch. Everything but the two
divisions is integer arithmetic on float32 bits, so that no cast, no flush of subnormals and no NaN differs between
machines, and the divisions are rounded once: the bytes are those of `sparse_mla_jax.ops.fp8` everywhere. A token whose
slot a later token names writes nothing, so that no two programs write one row.
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
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.cache_write import CacheWritePlan, cache_write_plan
from pallas_kernels.targets import Target, by_target

_SOURCES = ("bfloat16", "float16", "float32")


# --- kernel ----------------------------------------------------------------------------------------------------------
def _is_last(slot_ref, slot: Array, token: Array, tokens: int, scan: int) -> Array:
    """Whether no later token names the slot."""

    def last_in(first, last):
        at = first + jnp.arange(scan, dtype=jnp.int32)
        others = load(slot_ref.at[at], mask=at < tokens, other=-1) if tokens % scan else load(slot_ref.at[at])
        same = others == slot
        return jnp.maximum(last, jnp.max(jnp.where(same, at, jnp.int32(-1))))

    if tokens <= scan:
        last = last_in(jnp.int32(0), token)
    else:
        last = lax.fori_loop(token // scan, jnp.int32(-(-tokens // scan)), lambda i, n: last_in(i * scan, n), token)
    return last == token


def _kernel(*refs, parts: Sequence[CachePart], tokens: int, plan: CacheWritePlan, target: Target):
    """Grid (T,); refs: slots, the rows of every part, the arrays of all parts before, and after (the same)."""
    slot_ref, *row_refs = refs[: 1 + len(parts)]
    out_refs = list(refs[-sum(len(p.arrays) for p in parts) :])
    token = pl.program_id(0)
    grids = [Grid(1 if p.scales is None else p.scales.shape[1], p.group_size or p.rows.shape[1], target) for p in parts]
    # All in flight before the first is waited for.
    rows = [grid.load(ref, token) for grid, ref in zip(grids, row_refs)]
    slot = slot_ref[token]
    mine = (slot >= 0) & _is_last(slot_ref, slot, token, tokens, plan.scan)

    for part, grid, row in zip(parts, grids, rows):
        after = [out_refs.pop(0) for _ in part.arrays]
        encoded = encode(part, row, grid, target)

        @pl.when(mine & (slot < part.pages.shape[0]))
        def _(after=after, encoded=encoded):
            for ref, (tile, value) in zip(after, encoded):
                tile.store(ref, slot, value)


# --- launch ----------------------------------------------------------------------------------------------------------


def write(parts: Sequence[CachePart], slots: Array, *, plan: CacheWritePlan | None = None) -> list[list[Array]]:
    """`CachePart.arrays` of every part after rows[t] is written at slots[t]; in place where the arrays are donated.

    slots int32 [T], T at least 1; those below 0 or from N on are skipped, and of several tokens with one slot the last
    is written.

    Raises:
      NotImplementedError: types or groups that the kernel does not serve, or arrays of 2**31 elements and more.
    """
    for part in parts:
        if part.rows.dtype.name not in _SOURCES:
            raise NotImplementedError(f"rows are {part.rows.dtype}; the kernel reads {', '.join(_SOURCES)}")
        if part.flavour is not None and part.group_size % 4:
            raise NotImplementedError(f"groups of {part.group_size} values; the kernel writes four at a time")
    if slots.dtype != jnp.int32:
        raise NotImplementedError(f"slots are {slots.dtype}; the kernel reads int32")

    def run(target, parts, slots):
        chosen = choose_plan(
            "cache_write",
            plan,
            cache_write_plan,
            tokens=slots.shape[0],
            width=max(p.rows.shape[1] for p in parts),
            target=target,
        )
        arrays = [a for p in parts for a in p.arrays]
        shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p) for p in parts]
        return call(
            functools.partial(_kernel, parts=shapes, tokens=slots.shape[0], plan=chosen, target=target),
            slots,
            *[p.rows for p in parts],
            *arrays,
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays],
            grid=(slots.shape[0],),
            name="cache_write",
            target=target,
            num_warps=chosen.num_warps,
            input_output_aliases={1 + len(parts) + i: i for i in range(len(arrays))},
        )

    # A row without values has no kernel argument.
    real = [p for p in parts if p.rows.shape[1]]
    after = iter(by_target(run, real, slots) if real else ())
    return [[next(after) for _ in p.arrays] if p.rows.shape[1] else p.arrays for p in parts]
