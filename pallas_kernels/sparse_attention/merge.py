"""Merges the results of the splits of a row: one program per token, head and block of columns."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store
from pallas_kernels.online_softmax import sink_share
from pallas_kernels.targets import CDNA, Target
from pallas_kernels.tiles import grid2, power_of_two

# Values that a program loads at once.
TILE = 4096


def _kernel(*refs, splits: int, columns: int, block: int, partial: bool, has_units: bool):
    outs_ref, lses_ref, *more, out_ref, lse_ref = refs
    unit_ref, sink_ref = more[:has_units], more[has_units:]
    token, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * block
    i = jnp.arange(max(2, power_of_two(splits)), dtype=jnp.int32)
    exists = i < splits
    parts = jnp.where(exists, i, 0)
    here = (parts, jnp.full_like(i, token), jnp.full_like(i, head))
    lses, units = load(lses_ref.at[here]), [load(ref.at[here]) for ref in unit_ref]
    lses = jnp.where(exists, lses, -jnp.inf)
    top = jnp.max(lses, axis=0)
    # Splits without keys have weight 0. If the row has no keys, all weights are 0.
    weights = jnp.exp(lses - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=0)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    share = 1.0 / safe
    if sink_ref:
        share = share * sink_share(lse, sink_ref[0][head])

    c = first + jnp.arange(block, dtype=jnp.int32)
    inside = c < columns
    rows, cols = grid2(parts, c if columns % block == 0 else jnp.where(inside, c, 0))
    where = outs_ref.at[rows, jnp.full_like(rows, token), jnp.full_like(rows, head), cols]
    values = (
        load(where, mask=jnp.broadcast_to((weights > 0)[:, None], rows.shape), other=0.0) if partial else load(where)
    )
    factors = weights * share
    for unit in units:
        # The scale of a split without keys may be uninitialised.
        factors = factors * jnp.where(weights > 0, unit, 0.0)
    merged = jnp.sum(values.astype(jnp.float32) * factors[:, None], axis=0)
    # Do not use store_masked, which has no select on GPUs. Without the select, padded columns take more registers on
    # gfx942 (occupancy 7 -> 5).
    at = jnp.where(inside, c, columns)
    store(out_ref.at[jnp.full_like(at, token), jnp.full_like(at, head), at], merged.astype(out_ref.dtype), mask=inside)
    lse_ref[token, head] = lse


def merge_splits(
    outs: Array,
    lses: Array,
    units: Array | None = None,
    *,
    sinks: Array | None,
    dtype: Any,
    target: Target,
    partial: bool = False,
) -> tuple[Array, Array]:
    """Merges outs[S, T, H, V] and lses float32 [S, T, H] in a fixed order: (out dtype [T, H, V], lse float32 [T, H]).

    units: scales of outs, float32 [S, T, H]; None: 1.
    partial: does not load splits of weight 0, which may be uninitialised.
    """
    splits, tokens, heads, columns = outs.shape
    block = max(16, min(power_of_two(columns), TILE // power_of_two(splits)))
    # Every wave repeats the weights. On NVIDIA many splits mean few programs: more warps hide their loads better.
    per_wave = 1024 if splits > 8 and target not in CDNA else 2048
    return call(
        functools.partial(
            _kernel, splits=splits, columns=columns, block=block, partial=partial, has_units=units is not None
        ),
        outs,
        lses,
        *(x for x in (units, sinks) if x is not None),
        out_shape=(
            jax.ShapeDtypeStruct((tokens, heads, columns), dtype),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ),
        grid=(tokens, heads, -(-columns // block)),
        name="merge_splits",
        num_warps=max(1, block * power_of_two(splits) // per_wave),
        target=target,
    )
