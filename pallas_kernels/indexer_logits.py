"""Indexer scores: sum over heads of weight * relu(q . key), times the key's scale, in float32.

A program holds one block of keys and scores it for one token (paged: each token has keys of its own) or for a few
tokens in turn (ragged: all tokens share the keys). FP8 keys are read as bytes and decoded exactly to bfloat16; blocks
that a token does not see are not multiplied. Columns outside a token's interval are -inf.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import fp8_bits
from pallas_kernels._call import call, dispatch, load, store
from pallas_kernels.plans.attention import power_of_two
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is specialised for."""

    tokens: int
    heads: int
    dim: int
    columns: int
    num_slots: int
    fp8: jnp.dtype | None
    compute: jnp.dtype
    scaled: bool
    plan: IndexerPlan
    target: str
    page_size: int = 0
    num_requests: int = 0


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def head_sum(q: Array, keys: Array, weights: Array) -> Array:
    """float32 [K]: sum over heads of weights[H] * relu(q[H, D] . keys[K, D]); float32 operands at full precision."""
    dots = jax.lax.dot_general(
        q,
        keys,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jnp.sum(jnp.maximum(dots, 0.0) * weights[:, None], axis=0)


# --- pieces of the kernels -------------------------------------------------------------------------------------------
def _grid2(rows: Array, columns: Array) -> tuple[Array, Array]:
    """Index arrays [R, C] of rows[R] and columns[C] (gathers want an index array on every axis)."""
    shape = (rows.shape[0], columns.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None, :], shape)


def _load_keys(key_ref, slots: Array, valid: Array, s: _Static) -> Array:
    """Keys of slots[K] in the compute dtype, [K, D padded to a power of two]; zeros where invalid.

    FP8 keys come without their power of two. Invalid keys read slot 0: on CDNA every masked load is a branch.
    """
    d = jnp.arange(max(16, power_of_two(s.dim)), dtype=jnp.int32)
    full = d.shape[0] == s.dim
    # A select hides from Triton that columns are consecutive, and with it wide loads.
    rows, cols = _grid2(jnp.where(valid, slots, 0), d if full else jnp.where(d < s.dim, d, 0))
    keys = load(key_ref.at[rows, cols])
    exists = valid[:, None] if full else valid[:, None] & (d < s.dim)[None, :]
    if s.fp8 is None:
        return jnp.where(exists, keys, 0).astype(s.compute)
    raw = jnp.where(exists, fp8_bits.decode_codes(keys, s.fp8, s.target), 0)
    return fp8_bits.truncate_to_bfloat16(raw) if s.compute == jnp.bfloat16 else raw


def _scores(q_ref, weight_ref, token, keys: Array, s: _Static) -> Array:
    """float32 [K]: unscaled scores of one token against `keys`, a block of heads at a time."""
    d = jnp.arange(keys.shape[1], dtype=jnp.int32)
    full = d.shape[0] == s.dim
    total = jnp.zeros((keys.shape[0],), jnp.float32)
    for first in range(0, s.heads, s.plan.head_block):
        heads = first + jnp.arange(s.plan.head_block, dtype=jnp.int32)
        # Heads that do not exist repeat the last one, with weight 0.
        safe = jnp.minimum(heads, s.heads - 1)
        rows, cols = _grid2(safe, d if full else jnp.where(d < s.dim, d, 0))
        q = load(q_ref.at[jnp.full_like(rows, token), rows, cols]).astype(s.compute)
        weights = load(weight_ref.at[jnp.full_like(safe, token), safe])
        q = q if full else jnp.where((d < s.dim)[None, :], q, 0)
        total += head_sum(q, keys, jnp.where(heads < s.heads, weights, 0.0))
    return total if s.fp8 is None else total * fp8_bits.power(s.fp8, s.target)


def _store_row(out_ref, token, columns: Array, scores: Array, exists, s: _Static) -> None:
    # Masked lanes point past the array: interpret mode writes old values back through them.
    mask = (columns < s.columns) & exists
    target = jnp.where(mask, columns, s.columns)
    store(out_ref.at[jnp.full_like(target, token), target], scores, mask=mask)


def _finish(scores: Array, scale: Array | None, inside: Array) -> Array:
    return jnp.where(inside, scores if scale is None else scores * scale, -jnp.inf)


# --- kernels ---------------------------------------------------------------------------------------------------------
def _ragged_kernel(*refs, s: _Static):
    """Grid (key blocks, token blocks): out[token_block, key_block] of keys that all tokens share."""
    q_ref, key_ref, weight_ref, start_ref, end_ref, *scale_ref, out_ref = refs
    low, first_token = pl.program_id(0) * s.plan.key_block, pl.program_id(1) * s.plan.token_block
    columns = low + jnp.arange(s.plan.key_block, dtype=jnp.int32)
    exists = columns < s.columns
    keys = _load_keys(key_ref, columns, exists, s)
    scale = load(scale_ref[0].at[jnp.where(exists, columns, 0)]) if s.scaled else None

    def one_token(i, _):
        token = first_token + i
        real = token < s.tokens
        safe = jnp.where(real, token, 0)
        start, end = start_ref[safe], end_ref[safe]
        seen = real & (start < low + s.plan.key_block) & (end > low) & (end > start)
        scores = jax.lax.cond(
            seen,
            lambda: _scores(q_ref, weight_ref, safe, keys, s),
            lambda: jnp.zeros((s.plan.key_block,), jnp.float32),
        )
        inside = (columns >= start) & (columns < end)
        _store_row(out_ref, safe, columns, _finish(scores, scale, inside), real, s)
        return 0

    jax.lax.fori_loop(0, s.plan.token_block, one_token, 0)


def _paged_kernel(*refs, s: _Static):
    """Grid (key blocks, T): out[token, key_block] of the keys in the pages of the token's request."""
    q_ref, key_ref, weight_ref, page_ref, request_ref, length_ref, *scale_ref, out_ref = refs
    token, low = pl.program_id(1), pl.program_id(0) * s.plan.key_block
    columns = low + jnp.arange(s.plan.key_block, dtype=jnp.int32)
    length = jnp.minimum(length_ref[token], s.columns)
    request = jnp.clip(request_ref[token], 0, s.num_requests - 1)

    def score():
        exists = columns < length
        place = jnp.where(exists, columns // s.page_size, 0)
        page = load(page_ref.at[jnp.full_like(place, request), place])
        valid = exists & (page >= 0) & (page < s.num_slots // s.page_size)
        slots = jnp.where(valid, page * s.page_size + columns % s.page_size, 0)
        keys = _load_keys(key_ref, slots, valid, s)
        scale = load(scale_ref[0].at[slots]) if s.scaled else None
        return _finish(_scores(q_ref, weight_ref, token, keys, s), scale, valid)

    nothing = jnp.full((s.plan.key_block,), -jnp.inf, jnp.float32)
    _store_row(out_ref, token, columns, jax.lax.cond(low < length, score, lambda: nothing), True, s)


# --- launch ----------------------------------------------------------------------------------------------------------
def _static(
    target: str, q: Array, keys: Array, dtype, scaled: bool, columns: int, plan: IndexerPlan | None, shared: bool
) -> _Static:
    fp8 = jnp.dtype(dtype) if keys.dtype == jnp.uint8 else None
    float32 = q.dtype == jnp.float32 or keys.dtype == jnp.float32
    compute = jnp.dtype(jnp.float32 if float32 else jnp.bfloat16)
    tokens, heads, dim = q.shape
    plan = plan or indexer_plan(
        tokens=tokens, heads=heads, columns=columns, itemsize=compute.itemsize, shared_keys=shared, target=target
    )
    return _Static(tokens, heads, dim, columns, math.prod(keys.shape[:-1]), fp8, compute, scaled, plan, target)


def _launch(kernel, static: _Static, rows: int, q: Array, keys: Array, scales: Array | None, *arrays: Array) -> Array:
    return call(
        functools.partial(kernel, s=static),
        q,
        keys.reshape(-1, keys.shape[-1]),
        *arrays,
        *([] if scales is None else [scales.reshape(-1)]),
        out_shape=jax.ShapeDtypeStruct((static.tokens, static.columns), jnp.float32),
        grid=(-(-static.columns // static.plan.key_block), rows),
        name=kernel.__name__.strip("_").replace("kernel", "indexer_logits"),
        target=static.target,
        num_warps=static.plan.num_warps,
        num_stages=static.plan.num_stages,
    )


def ragged(
    q: Array,
    keys: Array,
    dtype: jnp.dtype,
    scales: Array | None,
    weights: Array,
    starts: Array,
    ends: Array,
    *,
    plan: IndexerPlan | None = None,
) -> Array:
    """Contiguous keys: row t scores columns starts[t]..ends[t]-1; float32[T, N].

    q[T, H, D], keys[N, D] (FP8 as bytes of flavour `dtype`), scales[N] or None, weights[T, H].
    """

    def launch(target, q, keys, scales, *arrays):
        static = _static(target, q, keys, dtype, scales is not None, keys.shape[0], plan, True)
        rows = -(-static.tokens // static.plan.token_block)
        return _launch(_ragged_kernel, static, rows, q, keys, scales, *arrays)

    return dispatch(launch, q, keys, scales, weights, starts, ends)


def paged(
    q: Array,
    keys: Array,
    dtype: jnp.dtype,
    scales: Array | None,
    weights: Array,
    page_table: Array,
    request_ids: Array,
    lengths: Array,
    *,
    max_length: int,
    plan: IndexerPlan | None = None,
) -> Array:
    """Keys of each token's own request, through the page table: float32[T, max_length].

    q[T, H, D], keys[pages, page, D] (FP8 as bytes of flavour `dtype`), scales[pages, page] or None, weights[T, H].
    """

    def launch(target, q, keys, scales, *arrays):
        static = _static(target, q, keys, dtype, scales is not None, max_length, plan, False)
        static = dataclasses.replace(static, page_size=keys.shape[1], num_requests=page_table.shape[0])
        return _launch(_paged_kernel, static, static.tokens, q, keys, scales, *arrays)

    return dispatch(launch, q, keys, scales, weights, page_table, request_ids, lengths)
