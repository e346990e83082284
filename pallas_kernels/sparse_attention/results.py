"""Stores of a program: its values, its lse, and the scales of float16 splits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits
from pallas_kernels._call import load, store_masked
from pallas_kernels.online_softmax import LOG2E, sink_share
from pallas_kernels.sparse_attention.rows import RowPart

# The scale of a split brings its largest value into [2**14, 2**15).
HALF_EXPONENT = 14


def existing_heads(part: RowPart, s: Any) -> Array | None:
    """Mask [head_block] of a program's heads that are not padding; None: all."""
    return None if s.heads % s.plan.head_block == 0 else part.heads < s.heads


def store_by_head(ref: Any, part: RowPart, values: Array, s: Any) -> None:
    """Stores one value [head_block] per head of the program."""
    index = jnp.full_like(part.heads, part.split), jnp.full_like(part.heads, part.token), part.heads
    store_masked(ref, index, values, existing_heads(part, s), s.target)


def finish_softmax(lse_ref: Any, sink_ref: Any, part: RowPart, top: Array, total: Array, s: Any) -> Array:
    """Stores the lse of an online softmax (base 2, [head_block]); returns the factor [head_block] of its sums."""
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, (top + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
    share = 1.0 / safe
    if sink_ref is not None:
        exists = existing_heads(part, s)
        if exists is None:
            sinks = load(sink_ref.at[part.heads])
        else:
            sinks = load(sink_ref.at[jnp.where(exists, part.heads, 0)], mask=exists, other=0.0)
        share = share * sink_share(lse, sinks)
    store_by_head(lse_ref, part, lse, s)
    return share


def to_units(unit_ref: Any, part: RowPart, largest: Array, s: Any) -> Array:
    """Stores the power-of-two scale [head_block] of a split's float16 values; returns its inverse.

    It brings the `largest` magnitude of a head into [2**14, 2**15). Values keep float16's 11 bits down to 2**-28 of it.
    """
    exponent = jnp.maximum(fp8_bits.exponent(largest) - HALF_EXPONENT, 1)
    store_by_head(unit_ref, part, fp8_bits.from_exponent(exponent), s)
    return fp8_bits.from_exponent(254 - exponent)


def store_values(out_ref: Any, part: RowPart, columns: Array, values: Array, inside: Array | None, s: Any) -> None:
    """Stores values [head_block, *C] at `columns` [*C] of real heads, where `inside` [*C] (None: everywhere)."""
    exists = existing_heads(part, s)
    heads = jnp.broadcast_to(jnp.expand_dims(part.heads, range(1, values.ndim)), values.shape)
    index = (
        jnp.full_like(heads, part.split),
        jnp.full_like(heads, part.token),
        heads,
        jnp.broadcast_to(columns[None], values.shape),
    )
    mask = None if inside is None else jnp.broadcast_to(inside[None], values.shape)
    if exists is not None:
        real = jnp.broadcast_to(jnp.expand_dims(exists, range(1, values.ndim)), values.shape)
        mask = real if mask is None else mask & real
    store_masked(out_ref, index, values.astype(out_ref.dtype), mask, s.target)
