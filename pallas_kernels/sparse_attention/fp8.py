"""Sparse latent attention over FP8 keys on NVIDIA GPUs: scores are FP8 products of undecoded keys.

A bfloat16 query is split into two e4m3 terms with one power-of-two scale. Their sum is exact, except for elements 2**9
times smaller than the largest of the head; those err by 2**-17 of the largest. In the first product the keys are the
rows, and both terms of all heads are the columns. Keys therefore go to the tensor cores through shared memory alone,
loaded one block ahead. Group scales multiply the scores. Only the second product needs float16 keys. They are unscaled
codes; the scales multiply the weights. The running maximum is that of weight times the key's largest scale (rounded
down to a power of two). Neither of them then overflows float16, and the largest product keeps its bits. Tensor cores
keep about 14 bits of a sum. The kernel therefore multiplies narrow tiles of columns and adds their sums in float32.

Tensor cores read e4m3fn. They read a code of e4m3fnuz as twice its value, except two. 0x80 (NaN) counts as 0. +-240
(0x7F, 0xFF; this library writes neither) is NaN: a program with NaN in its sums starts again in `float16`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits, fp8_nvidia
from pallas_kernels._call import MAX_ELEMENTS, load
from pallas_kernels._primitives import dot_fp8, hidden, load_codes, load_from
from pallas_kernels.online_softmax import LOG2E, NONE, dot
from pallas_kernels.plans.attention import AttentionPlan
from pallas_kernels.sparse_attention import float16
from pallas_kernels.sparse_attention.program import AttentionCall, kernel_arguments, launch_rows, unpack
from pallas_kernels.sparse_attention.results import finish_softmax, store_values, to_units
from pallas_kernels.sparse_attention.rows import RowPart, Source, key_slots, part_of
from pallas_kernels.targets import Target
from pallas_kernels.tiles import grid2, power_of_two

# The scale of a head's query brings its largest element into [2**7, 2**8).
QUERY_EXPONENT = 7
# Clamp key scales at 2**-80 so that an all-zero key still gets its softmax weight.
LEAST_EXPONENT = 127 - 80


@dataclasses.dataclass(frozen=True)
class Fp8Specialization:
    """Compile-time constants of the kernel."""

    heads: int
    value_dim: int
    scale: float
    latent: int
    groups: int
    rope: int
    names: tuple[tuple[str, ...], ...]  # arrays of each source, in argument order
    counts: tuple[int, ...]  # slots of each source
    widths: tuple[int, ...]  # dense width of each source, 0 when ragged
    unit: float  # value of a code divided by what tensor cores read
    again: Any  # specialization of the float16 fallback if tensor cores read some numbers as NaN, else None
    has_sinks: bool
    plan: AttentionPlan
    target: Target

    @property
    def tile(self) -> int:
        """Columns of one product: a group, or a power-of-two fraction of it."""
        return min(self.plan.tile, self.latent // self.groups)

    @property
    def rope_values(self) -> bool:
        """Whether rope columns belong to the values too."""
        return self.value_dim > self.latent


def supports(q: Array, sources: Sequence[Source], value_dim: int) -> bool:
    """Whether this kernel supports the call: bfloat16 queries, FP8 sources of one layout, power-of-two groups, rope."""
    first = sources[0]
    if first.scale is None or q.dtype != jnp.bfloat16:
        return False
    latent = 4 * first.latent.shape[-1]
    group, rope = latent // first.scale.shape[-1], q.shape[-1] - latent
    alike = all(
        s.scale is not None
        and (4 * s.latent.shape[-1], latent // s.scale.shape[-1]) == (latent, group)
        and jnp.dtype(s.dtype) == jnp.dtype(first.dtype)
        and s.scale.dtype == first.scale.dtype
        and (rope == 0 or (s.rope is not None and s.rope.dtype == jnp.bfloat16))
        and 4 * s.latent.size <= MAX_ELEMENTS
        for s in sources
    )
    even = group * first.scale.shape[-1] == latent and group == power_of_two(group) >= 32
    exact = jnp.dtype(first.dtype) == fp8_nvidia.NATIVE or float16.supports(q, sources, value_dim)
    return alike and even and exact and (rope == 0 or rope == power_of_two(rope) >= 16) and value_dim >= latent


# --- pieces of the kernel
def _load_queries(q_ref, part: RowPart, s: Fp8Specialization):
    """Loads (FP8 terms [2 * H, tile] of every tile, their power-of-two scale [H], rope bfloat16 [H, rope] or None)."""
    i = jnp.arange(2 * s.plan.head_block, dtype=jnp.int32)
    # Order rows as 8 upper terms, then their 8 lower terms: one lane then holds both terms of a head.
    lower = (i & 8) != 0
    both = part.first_head + (i >> 4) * 8 + (i & 7)

    def read(rows, column, width):
        rows, cols = grid2(jnp.minimum(rows, s.heads - 1), column + jnp.arange(width, dtype=jnp.int32))
        return load(q_ref.at[jnp.full_like(rows, part.token), rows, cols])

    tiles = [read(both, column, s.tile).astype(jnp.float32) for column in range(0, s.latent, s.tile)]
    top = _largest([jnp.abs(q) for q in tiles])
    exponent = jnp.maximum(fp8_bits.exponent(top) - QUERY_EXPONENT, 1)
    terms = []
    for q in tiles:
        q = q * fp8_bits.from_exponent(254 - exponent)[:, None]
        upper = q.astype(fp8_nvidia.NATIVE).astype(jnp.float32)
        terms.append(jnp.where(lower[:, None], q - upper, upper).astype(fp8_nvidia.NATIVE))
    unit = jnp.max(fp8_bits.from_exponent(exponent).reshape(-1, 2, 8), axis=1).reshape(-1)
    return terms, unit, read(part.heads, s.latent, s.rope) if s.rope else None


def _largest(tiles: Sequence[Array]) -> Array:
    """float32 [H]: the largest value of each head over all tiles [H, width].

    Takes the maximum of tiles of one width element by element, then reduces across lanes and warps once per width.
    """
    widths = sorted({tile.shape[1] for tile in tiles})
    alike = ([tile for tile in tiles if tile.shape[1] == width] for width in widths)
    return functools.reduce(jnp.maximum, (jnp.max(functools.reduce(jnp.maximum, same), axis=1) for same in alike))


def _load_scales(sources: Sequence[dict], number, slots: Array, s: Fp8Specialization) -> tuple[Array, ...]:
    """Loads the stored scales [K] of every group; absent keys (slot -1) load those of slot 0."""
    refs, there = [source["scale"] for source in sources], jnp.maximum(slots, 0)
    return tuple(
        load_from(refs, number, there, jnp.full_like(there, group), target=s.target) for group in range(s.groups)
    )


def _load_keys(sources: Sequence[dict], number, slots: Array, s: Fp8Specialization) -> tuple[list[Array], Array | None]:
    """Loads e4m3fn [K, tile] of every tile, and rope [K, rope] or None; absent keys (slot -1) are 0."""
    refs, there, mask = [source["latent"] for source in sources], jnp.maximum(slots, 0), slots >= 0
    tiles = [
        load_codes(refs, number, there, mask, column, s.tile, fp8_nvidia.NATIVE, s.target)
        for column in range(0, s.latent, s.tile)
    ]
    if not s.rope:
        return tiles, None
    rows, cols = grid2(there, jnp.arange(s.rope, dtype=jnp.int32))
    mask = jnp.broadcast_to(mask[:, None], rows.shape)
    return tiles, load_from([source["rope"] for source in sources], number, rows, cols, target=s.target, mask=mask)


def _scores(terms: Sequence[Array], keys: Sequence[Array], scales: Sequence[Array], s: Fp8Specialization) -> Array:
    """Scores float32 [K, H], without the scale of the queries."""
    per_group = len(keys) // s.groups
    total = None
    for group, scale in enumerate(scales):
        tiles = range(group * per_group, (group + 1) * per_group)
        part = functools.reduce(jnp.add, (dot_fp8(keys[i], terms[i], s.target) for i in tiles)) * scale[:, None]
        total = part if total is None else total + part
    assert total is not None
    return jnp.sum(total.reshape(total.shape[0], -1, 2, 8), axis=2).reshape(total.shape[0], -1)


def _add_values(
    sums, keep: Array, weights: Array, keys: Sequence[Array], factors: Sequence[Array], s: Fp8Specialization
):
    """Returns sums * keep + (weights * factor) . values, tile by tile."""
    per_group = len(keys) // s.groups
    out = []
    for i, (total, codes) in enumerate(zip(sums, keys)):
        halves = (weights * factors[i // per_group][:, None]).astype(jnp.float16)
        out.append(total * keep[:, None] + _dot_keys(halves, fp8_nvidia.decode_float16(codes, s.target)))
    return tuple(out)


def _dot_keys(a: Array, b: Array) -> Array:
    """float32 [M, N]: a.T @ b of a[K, M] and b[K, N]."""
    return dot(a.T, b, 0)


def _over_blocks(
    sources: Sequence[dict], number_of, slots_of, begin: Array, part: RowPart, queries, state, s: Fp8Specialization
):
    """Folds the key blocks of the program into the softmax state; `begin`: slots of its first block."""
    terms, unit, q_rope = queries

    def body(i, carry):
        (top, total, sums, rope_sum), scales = carry
        number, slots = number_of(i), slots_of(i)
        valid = slots >= 0
        keys, rope = _load_keys(sources, number, slots, s)
        scales = [fp8_bits.e8m0_to_float32(x) if x.dtype == jnp.uint8 else x for x in scales]
        scales = [jnp.where(valid, x, 0.0) for x in scales]
        largest = jnp.maximum(fp8_bits.exponent(functools.reduce(jnp.maximum, scales)), LEAST_EXPONENT)
        inverse = fp8_bits.from_exponent(254 - largest)
        scores = _scores(terms, keys, scales, s) * (unit * (s.unit * s.scale * LOG2E))[None, :]
        # Prefetch the next block's scales by hand: they are too narrow for cp.async. The last block prefetches slot 0.
        ahead = _load_scales(sources, number_of(i + 1), jnp.where(i + 1 < part.last, slots_of(i + 1), -1), s)
        if rope is not None:
            scores += dot(rope, q_rope, 1) * (s.scale * LOG2E)
        scores = jnp.where(valid[:, None], scores + (largest - 127).astype(jnp.float32)[:, None], NONE)
        new_top = jnp.maximum(top, jnp.max(scores, axis=0))
        weights = jnp.where(valid[:, None], jnp.exp2(scores - new_top[None, :]), 0.0)
        keep = jnp.exp2(top - new_top)
        plain = weights * inverse[:, None]
        # Accumulate per lane; reduce across lanes once at the end.
        total = total * keep[None, :] + plain
        sums = _add_values(sums, keep, weights, keys, [scale * inverse for scale in scales], s)
        if rope is not None and s.rope_values:
            upper = fp8_bits.truncate_to_bfloat16(plain)
            lower = (plain - upper.astype(jnp.float32)).astype(jnp.bfloat16)
            rope_sum = rope_sum * keep[:, None] + _dot_keys(upper, rope) + _dot_keys(lower, rope)
        return (new_top, total, sums, rope_sum), ahead

    carry = (state, _load_scales(sources, number_of(part.first), begin, s))
    return jax.lax.fori_loop(part.first, part.last, body, carry)[0]


def _kernel(*refs, part: RowPart, s: Fp8Specialization):
    """Grid (T, head blocks, splits): out[split, token, heads, value_dim] and lse[split, token, heads]."""
    q_ref, sources, sink_ref, *out_refs = unpack(refs, s)
    number_of, slots_of = key_slots(sources, part, s)
    # Load the first slots before the query, whose arithmetic would delay the loads of the first keys.
    begin = slots_of(part.first)
    queries = _load_queries(q_ref, part, s)
    block = s.plan.head_block
    state = (
        jnp.full((block,), NONE, jnp.float32),
        jnp.zeros((s.plan.key_block, block), jnp.float32),
        tuple(jnp.zeros((block, s.tile), jnp.float32) for _ in range(0, s.latent, s.tile)),
        jnp.zeros((block, s.rope) if s.rope_values else (block,), jnp.float32),
    )

    top, total, *sums = _over_blocks(sources, number_of, slots_of, begin, part, queries, state, s)
    total = jnp.sum(total, axis=0)
    if s.again is None:
        _store_values(out_refs[0], part, _results(out_refs, sink_ref, part, (top, total, *sums), s), s)
        return
    # Look for NaN in the sums: a maximum may drop it.
    met = jnp.max((total != total).astype(jnp.int32), axis=0) > 0
    # Convert to the output type before the branch: the float32 sums would stay live across it.
    values = _results(out_refs, sink_ref, part, (top, total, *sums), s)
    jax.lax.cond(met, lambda: _start_again(*refs, part=part, s=s), lambda: _store_values(out_refs[0], part, values, s))


def _start_again(*refs, part: RowPart, s: Fp8Specialization):
    """Repeats the program in `float16`, in smaller key blocks. It overwrites lse and scales, many barriers later."""
    if s.plan.half_parts:
        # Recompute the indices here instead of keeping them alive through the main loop. Measured: faster for short
        # splits, slower for long ones.
        _, sources, _, _, lse_ref, _ = unpack(refs, s)
        place = part.token, part.first_head // s.plan.head_block, part.split
        hidden_place = [jnp.max(hidden(jnp.full((16,), x), s.target), axis=0) for x in place]
        part = part_of(hidden_place, sources, lse_ref.shape[1], s)
    steps = s.plan.key_block // s.again.plan.key_block
    blocks = [steps * count for count in part.blocks]
    part = dataclasses.replace(part, blocks=blocks, first=steps * part.first, last=steps * part.last)
    float16.kernel(*refs, part=part, s=s.again)


def _results(out_refs, sink_ref, part: RowPart, state, s: Fp8Specialization) -> list[Array]:
    """Stores lse and scales; returns the values [heads, width] of every tile in the output type."""
    out_ref, lse_ref, unit_ref = out_refs
    top, total, sums, rope_sum = state
    share = finish_softmax(lse_ref, sink_ref, part, top, total, s)
    sums, shares = [*sums], [share * s.unit] * len(sums)
    largest = [functools.reduce(jnp.maximum, map(jnp.abs, sums)) * s.unit]
    if s.rope_values:
        sums, shares, largest = [*sums, rope_sum], [*shares, share], [*largest, jnp.abs(rope_sum)]
    if s.plan.half_parts:
        inverse = to_units(unit_ref, part, _largest(largest) * share, s)
        shares = [share * inverse for share in shares]
    return [(value * share[:, None]).astype(out_ref.dtype) for value, share in zip(sums, shares)]


def _store_values(out_ref, part: RowPart, values: Sequence[Array], s: Fp8Specialization) -> None:
    for i, value in enumerate(values):
        columns = i * s.tile + jnp.arange(value.shape[1], dtype=jnp.int32)
        inside = None if i * s.tile + value.shape[1] <= s.value_dim else columns < s.value_dim
        store_values(out_ref, part, columns, value, inside, s)


# --- launch
def launch(request: AttentionCall) -> tuple[Array, ...]:
    """Returns (out[splits, T, H, value_dim], lse[splits, T, H], with `half_parts` scales of out [splits, T, H]).

    `supports` must hold.
    """
    _, heads, dim = request.q.shape
    first = request.sources[0]
    assert first.scale is not None
    arrays, meta = kernel_arguments(request.sources)
    latent = 4 * first.latent.shape[-1]
    plain = jnp.dtype(first.dtype) == fp8_nvidia.NATIVE
    again = None
    if not plain:
        # Use small key blocks in the fallback: they leave the most registers to the main loop.
        finer = dataclasses.replace(request.plan, key_block=16)
        _, again = float16.specialize(dataclasses.replace(request, plan=finer))
    static = Fp8Specialization(
        heads=heads,
        value_dim=request.value_dim,
        scale=request.sm_scale,
        latent=latent,
        groups=first.scale.shape[-1],
        rope=dim - latent,
        **meta,
        unit=1.0 if plain else 0.5,
        again=again,
        has_sinks=request.sinks is not None and request.plan.splits == 1,
        plan=request.plan,
        target=request.target,
    )
    return launch_rows(_kernel, static, request, arrays)
