"""Sparse latent attention over FP8 keys on NVIDIA GPUs: keys become scaled float16, one matrix product per byte plane.

On NVIDIA GPUs the generic kernel (`planes`) is limited by traffic between registers and shared memory. In this kernel
the words of all groups form one wide tile. Decoding multiplies each key by its group scale and divides it by a power of
two that all keys share. That power of two is the one of the largest scale so far; it grows as the running maximum of
the softmax does. No key overflows float16. A key keeps float16's 11 bits unless it is 2**14 times smaller than the
largest of its row. Queries are float16 with a power-of-two scale per head. Rope stays bfloat16. The loads of the next
keys are in flight while a block is multiplied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits
from pallas_kernels._primitives import load_from
from pallas_kernels.online_softmax import LOG2E, NONE, dot
from pallas_kernels.plans.attention import AttentionPlan
from pallas_kernels.sparse_attention.program import AttentionCall, kernel_arguments, launch_rows, unpack
from pallas_kernels.sparse_attention.results import finish_softmax, store_values, to_units
from pallas_kernels.sparse_attention.rows import RowPart, Source, choose, key_slots, some_keys
from pallas_kernels.targets import Target
from pallas_kernels.tiles import grid2, power_of_two

# Widest tile of words: float16 planes of 32 keys then take 32 KiB of shared memory.
MAX_WORDS = 128


@dataclasses.dataclass(frozen=True)
class Float16Specialization:
    """Compile-time constants of the kernel."""

    heads: int
    value_dim: int
    scale: float
    words: int
    groups: int
    rope: int
    names: tuple[tuple[str, ...], ...]  # arrays of each source, in argument order
    counts: tuple[int, ...]  # slots of each source
    widths: tuple[int, ...]  # dense width of each source, 0 when ragged
    fp8: Any
    exact_scales: bool  # scales are powers of two
    has_sinks: bool
    plan: AttentionPlan
    target: Target

    @property
    def width(self) -> int:
        """Words of the tile, padded to a power of two."""
        return max(16, power_of_two(self.words))

    @property
    def rope_width(self) -> int:
        """Rotated columns of the tile, padded to a power of two."""
        return max(16, power_of_two(self.rope))

    @property
    def rope_values(self) -> bool:
        """Whether rope columns belong to the values too."""
        return self.value_dim > 4 * self.words


def supports(q: Array, sources: Sequence[Source], value_dim: int) -> bool:
    """Whether this kernel supports the call: bfloat16 queries, FP8 sources of one layout, groups that fill the tile."""
    first = sources[0]
    if first.scale is None or q.dtype != jnp.bfloat16:
        return False
    words, groups = first.latent.shape[-1], first.scale.shape[-1]
    tile = max(16, power_of_two(words))
    rope = q.shape[-1] - 4 * words
    alike = all(
        s.scale is not None
        and (s.latent.shape[-1], s.scale.shape[-1], jnp.dtype(s.dtype)) == (words, groups, jnp.dtype(first.dtype))
        and s.scale.dtype == first.scale.dtype
        and (rope == 0 or (s.rope is not None and s.rope.dtype == jnp.bfloat16))
        for s in sources
    )
    even = first.group_size % 4 == 0 and tile == power_of_two(groups) * (first.group_size // 4)
    return alike and even and tile <= MAX_WORDS and value_dim >= 4 * words


# --- arithmetic
def _split4(x: Array) -> list[Array]:
    """Splits [A, W, 4] into four [A, W], in registers: one lane holds the whole last axis."""
    even, odd = jnp.unstack(x.reshape(*x.shape[:2], 2, 2), axis=3)
    (first, third), (second, fourth) = jnp.unstack(even, axis=2), jnp.unstack(odd, axis=2)
    return [first, second, third, fourth]


def _join4(planes: Sequence[Array]) -> Array:
    """Joins four [A, W] to [A, W, 4]."""
    even, odd = (jnp.stack([planes[i], planes[i + 2]], axis=-1) for i in (0, 1))
    return jnp.stack([even, odd], axis=-1).reshape(*planes[0].shape, 4)


# --- pieces of the kernel
def _grid3(rows: Array, words: Array) -> tuple[Array, Array]:
    """Index arrays [R, W, 4] of rows and of the four columns of every word."""
    shape = (rows.shape[0], words.shape[0], 4)
    columns = jnp.broadcast_to(words[None, :, None] * 4, shape) + jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    return jnp.broadcast_to(rows[:, None, None], shape), columns


def _inside(index: Array, count: int, shape: tuple[int, ...], axis: int) -> Array | None:
    """Mask of `shape`: whether the index along `axis` is below `count`; None if all are."""
    if index.shape[0] == count:
        return None
    return jnp.broadcast_to(jnp.expand_dims(index < count, [a for a in range(len(shape)) if a != axis]), shape)


def _load_queries(q_ref, token, heads: Array, s: Float16Specialization):
    """Loads (four float16 planes [H, width], their power-of-two scale [H], rope bfloat16 [H, rope_width] or None)."""
    safe = jnp.minimum(heads, s.heads - 1)
    words = jnp.arange(s.width, dtype=jnp.int32)
    rows, cols = _grid3(safe, words)
    mask = _inside(words, s.words, rows.shape, 1)
    q = load_from([q_ref], 0, jnp.full_like(rows, token), rows, cols, target=s.target, mask=mask).astype(jnp.float32)
    exponent = fp8_bits.exponent(jnp.max(jnp.max(jnp.abs(q), axis=2), axis=1))
    planes = [p.astype(jnp.float16) for p in _split4(q * fp8_bits.from_exponent(254 - exponent)[:, None, None])]
    if not s.rope:
        return planes, fp8_bits.from_exponent(exponent), None
    rows, cols, mask = _rope_grid(safe, s)
    rope = load_from([q_ref], 0, jnp.full_like(rows, token), rows, 4 * s.words + cols, target=s.target, mask=mask)
    return planes, fp8_bits.from_exponent(exponent), rope


def _rope_grid(rows: Array, s: Float16Specialization) -> tuple[Array, Array, Array | None]:
    c = jnp.arange(s.rope_width, dtype=jnp.int32)
    rows, cols = grid2(rows, c)
    return rows, cols, _inside(c, s.rope, rows.shape, 1)


def _scales(sources: Sequence[dict], number, slots: Array, s: Float16Specialization) -> Array:
    """Loads the scales of slots[K], float32 or E8M0 bytes [K, groups]; groups are padded to a power of two with 0."""
    g = jnp.arange(power_of_two(s.groups), dtype=jnp.int32)
    rows, cols = grid2(slots, g)
    mask = _inside(g, s.groups, rows.shape, 1)
    return load_from([refs["scale"] for refs in sources], number, rows, cols, target=s.target, mask=mask)


def _keys(sources: Sequence[dict], number, slots: Array, s: Float16Specialization) -> tuple[Array, ...]:
    """Loads undecoded words [K, width] and rope [K, rope_width] of slots[K]; padded columns are 0."""
    words = jnp.arange(s.width, dtype=jnp.int32)
    rows, cols = grid2(slots, words)
    mask = _inside(words, s.words, rows.shape, 1)
    latent = load_from([refs["latent"] for refs in sources], number, rows, cols, target=s.target, mask=mask)
    if not s.rope:
        return (latent,)
    rows, cols, mask = _rope_grid(slots, s)
    return latent, load_from([refs["rope"] for refs in sources], number, rows, cols, target=s.target, mask=mask)


def _planes(words: Array, scales: Array, unit: Array, s: Float16Specialization) -> tuple[list[Array], Array]:
    """Decodes words to (four float16 planes [K, width] divided by 2 ** (unit - 127), unit); `unit` never decreases."""
    scales = fp8_bits.e8m0_to_float32(scales) if s.exact_scales else scales
    unit = jnp.maximum(unit, fp8_bits.exponent(jnp.max(jnp.max(scales, axis=1), axis=0)))
    factor = scales * (fp8_bits.from_exponent(254 - unit) * fp8_bits.float16_power(s.fp8, s.target))
    upper = factor.astype(jnp.float16)
    rest = None if s.exact_scales else _spread((factor - upper.astype(jnp.float32)).astype(jnp.float16), s)
    upper = _spread(upper, s)
    return [fp8_bits.float16_plane(words, byte, upper, rest, s.fp8, s.target) for byte in range(4)], unit


def _spread(groups: Array, s: Float16Specialization) -> Array:
    """Repeats the value of each group at all of its words: [K, G] -> [K, width]."""
    shape = (*groups.shape, s.width // groups.shape[1])
    return jnp.broadcast_to(groups[:, :, None], shape).reshape(groups.shape[0], s.width)


def _over_blocks(sources: Sequence[dict], part: RowPart, queries, state, s: Float16Specialization):
    """Folds the key blocks of the program into the softmax state."""
    q_planes, q_unit, q_rope = queries
    number_of, slots_of = key_slots(sources, part, s)
    # Absent keys load a present slot, so that loads need no mask.
    present, first, last = some_keys(slots_of, part)

    def read(number, slots):
        there = jnp.where(slots >= 0, slots, choose(number, present))
        return _scales(sources, number, there, s), *_keys(sources, number, there, s)

    def body(i, carry):
        (top, total, sums, rope_sum, unit), slots, after, scales, *keys = carry
        planes, new_unit = _planes(keys[0], scales, unit, s)
        scores = dot(q_planes[0], planes[0], 1)
        for q, k in zip(q_planes[1:], planes[1:]):
            scores += dot(q, k, 1)
        # Issue the next loads between the products. Before them, they would delay the loads that the products wait for.
        ahead, later = read(number_of(i + 1), after), slots_of(i + 2)
        scores = scores * (fp8_bits.from_exponent(new_unit) * (s.scale * LOG2E) * q_unit)[:, None]
        if s.rope:
            scores += dot(q_rope, keys[1], 1) * (s.scale * LOG2E)
        valid = slots >= 0
        scores = jnp.where(valid[None, :], scores, NONE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(valid[None, :], jnp.exp2(scores - new_top[:, None]), 0.0)
        keep = jnp.exp2(top - new_top)
        # Accumulate per lane; reduce across lanes once at the end.
        total = total * keep[:, None] + weights
        keep_sums = (keep * fp8_bits.from_exponent(jnp.maximum(127 + unit - new_unit, 0)))[:, None]
        halves = weights.astype(jnp.float16)
        sums = tuple(x * keep_sums + dot(halves, k, 0) for x, k in zip(sums, planes))
        if s.rope_values:
            upper = fp8_bits.truncate_to_bfloat16(weights)
            lower = (weights - upper.astype(jnp.float32)).astype(jnp.bfloat16)
            rope_sum = rope_sum * keep[:, None] + dot(upper, keys[1], 0) + dot(lower, keys[1], 0)
        return (new_top, total, sums, rope_sum, new_unit), after, later, *ahead

    slots = slots_of(first)
    carry = (state, slots, slots_of(first + 1), *read(number_of(first), slots))
    return jax.lax.fori_loop(first, last, body, carry)[0]


def kernel(*refs, part: RowPart, s: Float16Specialization):
    """Grid (T, head blocks, splits): out[split, token, heads, value_dim] and lse[split, token, heads]."""
    q_ref, sources, sink_ref, *out_refs = unpack(refs, s)
    queries = _load_queries(q_ref, part.token, part.heads, s)
    block = s.plan.head_block
    state = (
        jnp.full((block,), NONE, jnp.float32),
        jnp.zeros((block, s.plan.key_block), jnp.float32),
        tuple(jnp.zeros((block, s.width), jnp.float32) for _ in range(4)),
        jnp.zeros((block, s.rope_width) if s.rope_values else (block,), jnp.float32),
        jnp.int32(1),
    )

    state = _over_blocks(sources, part, queries, state, s)
    _store_results(out_refs, sink_ref, part, state, s)


def _store_results(out_refs, sink_ref, part: RowPart, state, s: Float16Specialization):
    out_ref, lse_ref, unit_ref = out_refs
    top, total, sums, rope_sum, unit = state
    share = finish_softmax(lse_ref, sink_ref, part, top, jnp.sum(total, axis=1), s)
    shares = [share * fp8_bits.from_exponent(unit), share]
    if s.plan.half_parts:
        tops = [jnp.max(functools.reduce(jnp.maximum, map(jnp.abs, sums)), axis=1) * shares[0]]
        if s.rope_values:
            tops.append(jnp.max(jnp.abs(rope_sum), axis=1) * share)
        inverse = to_units(unit_ref, part, functools.reduce(jnp.maximum, tops), s)
        shares = [share * inverse for share in shares]
    words = jnp.arange(s.width, dtype=jnp.int32)
    columns = words[:, None] * 4 + jax.lax.broadcasted_iota(jnp.int32, (s.width, 4), 1)
    inside = None if s.words == s.width else jnp.broadcast_to(words[:, None] < s.words, columns.shape)
    values = _join4([x * shares[0][:, None] for x in sums])
    store_values(out_ref, part, columns, values, inside, s)
    if s.rope_values:
        columns = 4 * s.words + jnp.arange(s.rope_width, dtype=jnp.int32)
        inside = None if 4 * s.words + s.rope_width <= s.value_dim else columns < s.value_dim
        store_values(out_ref, part, columns, rope_sum * shares[1][:, None], inside, s)


# --- launch
def specialize(request: AttentionCall) -> tuple[list[Array], Float16Specialization]:
    """Returns (arrays of all sources in argument order, specialization of `kernel`); `supports` must hold."""
    _, heads, dim = request.q.shape
    first = request.sources[0]
    assert first.scale is not None
    arrays, meta = kernel_arguments(request.sources)
    static = Float16Specialization(
        heads=heads,
        value_dim=request.value_dim,
        scale=request.sm_scale,
        words=first.latent.shape[-1],
        groups=first.scale.shape[-1],
        rope=dim - 4 * first.latent.shape[-1],
        **meta,
        fp8=jnp.dtype(first.dtype),
        exact_scales=first.scale.dtype != jnp.float32,
        has_sinks=request.sinks is not None and request.plan.splits == 1,
        plan=request.plan,
        target=request.target,
    )
    return arrays, static


def launch(request: AttentionCall) -> tuple[Array, ...]:
    """Returns (out[splits, T, H, value_dim], lse[splits, T, H], with `half_parts` scales of out [splits, T, H]).

    `supports` must hold.
    """
    arrays, static = specialize(request)
    return launch_rows(kernel, static, request, arrays)
