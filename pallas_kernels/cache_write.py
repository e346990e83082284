"""Writes tokens into paged caches in place: quantises groups to FP8, or rounds to bfloat16, and stores at a slot.

One program writes all arrays of one token: latent, rotary key and index key. All arithmetic but the two divisions is on
float32 bits as integers. Casts, subnormals and NaN therefore give the same result on every machine. The divisions are
rounded once. The bytes equal those of `sparse_mla_jax.ops.fp8` everywhere. A token whose slot a later token names
writes nothing, so no two programs write the same row.
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


# --- kernel
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
    """Grid (T,). refs: slots, rows of every part, arrays of all parts, and the same arrays as aliased outputs."""
    slot_ref, *row_refs = refs[: 1 + len(parts)]
    out_refs = list(refs[-sum(len(p.arrays) for p in parts) :])
    token = pl.program_id(0)
    grids = [Grid(1 if p.scales is None else p.scales.shape[1], p.group_size or p.rows.shape[1], target) for p in parts]
    # Issue all loads before waiting for the first.
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


# --- launch
def write(parts: Sequence[CachePart], slots: Array, *, plan: CacheWritePlan | None = None) -> list[list[Array]]:
    """Writes rows[t] of every part at slots[t] and returns its `CachePart.arrays`; in place if they are donated.

    slots: int32 [T], T at least 1. Slots outside [0, N) are skipped. If several tokens name one slot, the last token is
    written.

    Raises:
      NotImplementedError: types or groups that the kernel does not support, or arrays of 2**31 elements and more.
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

    # Leave parts of width 0 out of the launch.
    real = [p for p in parts if p.rows.shape[1]]
    after = iter(by_target(run, real, slots) if real else ())
    return [[next(after) for _ in p.arrays] if p.rows.shape[1] else p.arrays for p in parts]
