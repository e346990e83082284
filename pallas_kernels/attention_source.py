"""What attention kernels share but arithmetic: sources of keys, a program's walk over a row's slots, the launch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import fp8_bits
from pallas_kernels._call import call, load, store
from pallas_kernels._primitives import load_from
from pallas_kernels.online_softmax import LOG2E, sink_share
from pallas_kernels.tiles import power_of_two

# The largest value of a part lies in [2**14, 2**15) of its unit.
HALF_EXPONENT = 14


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["latent", "scale", "rope", "values", "indptr", "lengths"],
    meta_fields=["dtype", "group_size"],
)
@dataclasses.dataclass(frozen=True)
class Source:
    """One key source and the slots that rows name in it.

    Attributes:
      latent: uint32 [..., L // 4] words of FP8 values when `scale` is given, else bfloat16 or float32 [..., L].
      scale: float32 or E8M0 [..., L // group_size], or None.
      rope: bfloat16 or float32 [..., R], or None.
      dtype: FP8 flavour of the words (dtype of the latents otherwise).
      group_size: latent values per scale.
      values: int32 slots, [T, W] or, with indptr, flat.
      indptr: int32 [T + 1] or None.
      lengths: int32 [T], entries of [T, W] that count, or None for all of them.
    """

    latent: Array
    scale: Array | None
    rope: Array | None
    dtype: jnp.dtype
    group_size: int
    values: Array
    indptr: Array | None
    lengths: Array | None = None

    @property
    def width(self) -> int:
        """Slots per row: exact for dense rows, the even share of the capacity for ragged ones."""
        return self.values.shape[1] if self.indptr is None else -(-self.values.shape[0] // (self.indptr.shape[0] - 1))

    @property
    def num_slots(self) -> int:
        """Rows of the flattened key arrays."""
        return math.prod(self.latent.shape[:-1])


def kernel_arrays(source: Source) -> dict[str, Array]:
    """Kernel arguments of a source, one slot per row; E8M0 scales as their bytes."""
    flat = {"latent": source.latent.reshape(source.num_slots, -1)}
    if source.scale is not None:
        scale = source.scale.reshape(source.num_slots, -1)
        is_float = scale.dtype == jnp.float32
        flat["scale"] = scale if is_float else jax.lax.bitcast_convert_type(scale, jnp.uint8)
    if source.rope is not None and source.rope.shape[-1]:
        flat["rope"] = source.rope.reshape(source.num_slots, -1)
    flat["values"] = source.values.reshape(-1)
    if source.indptr is not None:
        flat["indptr"] = source.indptr
    elif source.lengths is not None:
        flat["lengths"] = source.lengths
    return flat


def row_bounds(refs: dict, token, width: int):
    """First element and length of a row's slots."""
    if "lengths" in refs:
        return token * width, jnp.clip(refs["lengths"][token], 0, width)
    if "indptr" not in refs:
        return token * width, jnp.int32(width)
    capacity = refs["values"].shape[0]
    start = jnp.clip(refs["indptr"][token], 0, capacity)
    return start, jnp.maximum(jnp.clip(refs["indptr"][token + 1], 0, capacity) - start, 0)


def choose(number: Array | int, values: Sequence[Any]) -> Any:
    """values[number]."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(number == i, value, chosen)
    return chosen


def key_slots(
    sources: Sequence[dict], part: Part, s: Any
) -> tuple[Callable[[Array], Array | int], Callable[[Array], Array]]:
    """(number_of, slots_of): a key block's source, and its slots [key_block], -1 where there is none.

    Blocks of a row are counted through its sources, one after the other.
    """
    size = s.plan.key_block
    # Of each source: its first block; the first slot, less what is before its blocks; the end of its slots, counted so.
    before, starts, ends = [jnp.int32(0)], [], []
    for refs, width, count in zip(sources, s.widths, part.blocks):
        start, length = row_bounds(refs, part.token, width)
        starts.append(start - before[-1] * size)
        ends.append(length + before[-1] * size)
        before.append(before[-1] + count)
    counts = [jnp.int32(count) for count in s.counts]

    def number_of(block: Array) -> Array | int:
        number: Array | int = 0
        for first in before[1:-1]:
            number = number + (block >= first).astype(jnp.int32)
        return number

    def slots_of(block: Array) -> Array:
        number = number_of(block)
        at = block * size + jnp.arange(size, dtype=jnp.int32)
        inside = at < choose(number, ends)
        lists = [refs["values"] for refs in sources]
        slots = load_from(lists, number, jnp.where(inside, choose(number, starts) + at, 0), target=s.target)
        return jnp.where(inside & (slots >= 0) & (slots < choose(number, counts)), slots, -1)

    return number_of, slots_of


def _some_key(slots_of: Callable[[Array], Array], first: Array, last: Array) -> Array:
    """A slot that exists among key blocks first..last-1 of a row, -1 if none does."""
    return jax.lax.while_loop(
        lambda c: (c[1] < 0) & (c[0] < last), lambda c: (c[0] + 1, jnp.max(slots_of(c[0]))), (first, jnp.int32(-1))
    )[1]


def some_keys(slots_of: Callable[[Array], Array], part: Part) -> tuple[list[Array], Array, Array]:
    """(a slot of each source that a part's blocks name, its first and last block but for sources of which it has none).

    Keys that are not there may repeat that slot with weight 0: reads need no mask then, and meet nobody else's NaN.
    """
    assert len(part.blocks) <= 2, "a source between others could not be left out"
    first, last, found = part.first, part.last, []
    for number, (begin, end) in enumerate(ranges(part)):
        present = _some_key(slots_of, begin, end)
        if number == 0:
            first = jnp.where(present < 0, end, first)
        else:
            last = jnp.where(present < 0, begin, last)
        found.append(jnp.maximum(present, 0))
    return found, first, last


def unpack(refs: Sequence[Any], s: Any) -> tuple[Any, list[dict], Any, Any, Any, Any]:
    """References of a launch: (queries, arrays of each source by name, sinks or None, out, lse, units or None)."""
    at, sources = 1, []
    for names in s.names:
        sources.append(dict(zip(names, refs[at : at + len(names)])))
        at += len(names)
    sinks, outputs = refs[at : at + s.has_sinks], refs[at + s.has_sinks :]
    return refs[0], sources, *(sinks or [None]), *outputs, *([] if s.plan.half_parts else [None])


def _blocks(lengths: Sequence[Array], s: Any) -> list[Array]:
    """Key blocks of a row in each source."""
    return [(length + s.plan.key_block - 1) // s.plan.key_block for length in lengths]


def _part_size(sources: Sequence[dict], tokens: int, s: Any) -> Array:
    """Key blocks of a part, if the keys of all rows were `plan.shares` parts."""

    def keys(refs, width):
        if "indptr" in refs:
            return jnp.clip(refs["indptr"][tokens], 0, refs["values"].shape[0])
        if "lengths" not in refs:
            return jnp.int32(tokens * width)
        i = jnp.arange(max(16, power_of_two(tokens)), dtype=jnp.int32)
        lengths = jnp.clip(load(refs["lengths"].at[jnp.minimum(i, tokens - 1)]), 0, width)
        return jnp.sum(jnp.where(i < tokens, lengths, 0), axis=0)

    size = s.plan.shares * s.plan.key_block
    return jnp.maximum((sum(keys(r, w) for r, w in zip(sources, s.widths)) + size - 1) // size, 1)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a program works on.

    Attributes:
      token, split: row of the outputs.
      first_head, heads: heads [head_block]; those past the last do not exist.
      blocks: key blocks of each source.
      first, last: the program's share of them all.
    """

    token: Array
    split: Array
    first_head: Array
    heads: Array
    blocks: list[Array]
    first: Array
    last: Array


def blocks_of_part(split: Array, parts: Array | int, total: Array) -> tuple[Array, Array]:
    """First and last of `total` key blocks that part `split` of `parts` takes; none from part `parts` on.

    Parts differ by one block at most, the longer ones first: programs that share a multiprocessor then add up alike.
    """
    size = total // parts
    longer = total - size * parts
    first = split * size + jnp.minimum(split, longer)
    return first, jnp.where(split < parts, first + size + (split < longer).astype(jnp.int32), first)


def part_of(place: Sequence[Array], sources: Sequence[dict], tokens: int, s: Any) -> Part:
    """What the program at `place` (token, block of heads, split) works on."""
    token, head_block, split = place
    first_head = head_block * s.plan.head_block
    heads = first_head + jnp.arange(s.plan.head_block, dtype=jnp.int32)
    blocks = _blocks([row_bounds(r, token, w)[1] for r, w in zip(sources, s.widths)], s)
    total = functools.reduce(jnp.add, blocks)
    if s.plan.splits == 1:
        return Part(token, split, first_head, heads, blocks, jnp.int32(0), total)
    parts = s.plan.splits
    if s.plan.shares:
        # Long rows get more programs than short ones; programs beyond a row's parts have nothing to do.
        size = _part_size(sources, tokens, s)
        parts = jnp.clip((total + size - 1) // size, 1, parts)
    return Part(token, split, first_head, heads, blocks, *blocks_of_part(split, parts, total))


def _program(kernel: Callable[..., None], *refs: Any, s: Any) -> None:
    """`kernel` on the program's part. A program without keys only writes that it has none: its `out` is not read."""
    _, sources, _, _, lse_ref, _ = unpack(refs, s)
    part = part_of([pl.program_id(axis) for axis in range(3)], sources, lse_ref.shape[1], s)

    def leave():
        _store_by_head(lse_ref, part, jnp.full(part.heads.shape, -jnp.inf, jnp.float32), s)

    if s.plan.shares:
        jax.lax.cond(part.first < part.last, lambda: kernel(*refs, part=part, s=s), leave)
    else:
        kernel(*refs, part=part, s=s)


def ranges(part: Part) -> list[tuple[Array, Array]]:
    """First and last block of a part in each source, counted through all sources."""
    ends = [part.first]
    for number in range(1, len(part.blocks)):
        ends.append(jnp.clip(functools.reduce(jnp.add, part.blocks[:number]), part.first, part.last))
    return list(zip(ends, [*ends[1:], part.last]))


def stored_heads(part: Part, s: Any) -> tuple[Array, Array | None]:
    """Where the heads [head_block] of a part are stored, and which of them exist (None: all).

    Those that do not point past the array: interpret mode writes old values back through masked lanes.
    """
    if s.heads % s.plan.head_block == 0:
        return part.heads, None
    exists = part.heads < s.heads
    return jnp.where(exists, part.heads, s.heads), exists


def _store_by_head(ref: Any, part: Part, values: Array, s: Any) -> None:
    heads, exists = stored_heads(part, s)
    where = ref.at[jnp.full_like(heads, part.split), jnp.full_like(heads, part.token), heads]
    store(where, values, mask=exists)


def finish_softmax(lse_ref: Any, sink_ref: Any, part: Part, top: Array, total: Array, s: Any) -> Array:
    """Stores the lse of an online softmax (base 2, by head); returns what its sums of values are multiplied by."""
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, (top + jnp.log2(safe)) * (1 / LOG2E), -jnp.inf)
    share = 1.0 / safe
    if sink_ref is not None:
        heads, exists = stored_heads(part, s)
        if exists is None:
            sinks = load(sink_ref.at[heads])
        else:
            sinks = load(sink_ref.at[jnp.where(exists, heads, 0)], mask=exists, other=0.0)
        share = share * sink_share(lse, sinks)
    _store_by_head(lse_ref, part, lse, s)
    return share


def to_units(unit_ref: Any, part: Part, largest: Array, s: Any) -> Array:
    """Stores the unit [head_block] of a part's float16 values, a power of two; returns its inverse.

    `largest` magnitudes of a head lie in [2**14, 2**15) of it; float16's 11 bits hold down to 2**-28 of that.
    """
    exponent = jnp.maximum(fp8_bits.exponent(largest) - HALF_EXPONENT, 1)
    _store_by_head(unit_ref, part, fp8_bits.from_exponent(exponent), s)
    return fp8_bits.from_exponent(254 - exponent)


def store_values(out_ref: Any, part: Part, columns: Array, values: Array, inside: Array | None, s: Any) -> None:
    """Stores values [head_block, *C] at `columns` [*C] of heads that exist, where `inside` [*C] (None: everywhere)."""
    heads, exists = stored_heads(part, s)
    rows = jnp.broadcast_to(jnp.expand_dims(heads, range(1, values.ndim)), values.shape)
    where = out_ref.at[
        jnp.full_like(rows, part.split),
        jnp.full_like(rows, part.token),
        rows,
        jnp.broadcast_to(columns[None], values.shape),
    ]
    mask = None if inside is None else jnp.broadcast_to(inside[None], values.shape)
    if exists is not None:
        there = jnp.broadcast_to(jnp.expand_dims(exists, range(1, values.ndim)), values.shape)
        mask = there if mask is None else mask & there
    store(where, values.astype(out_ref.dtype), mask=mask)


def described(sources: Sequence[Source]) -> tuple[list[Array], dict[str, Any]]:
    """Arrays of all sources in argument order, and what a kernel is told of them: names, counts, widths."""
    arrays = [kernel_arrays(s) for s in sources]
    return [a for named in arrays for a in named.values()], dict(
        names=tuple(tuple(a) for a in arrays),
        counts=tuple(s.num_slots for s in sources),
        widths=tuple(0 if s.indptr is not None else s.values.shape[1] for s in sources),
    )


def launch_rows(kernel: Callable[..., None], s: Any, q: Array, arrays: Sequence[Array], sinks: Array | None) -> Any:
    """(out[splits, T, H, value_dim], lse[splits, T, H]) of `kernel` over the grid (T, head blocks, splits).

    With `plan.half_parts`, `out` is float16 and units[splits, T, H] follow. With `plan.shares`, programs without keys
    write `lse` alone.
    """
    tokens, heads = q.shape[:2]
    plan = s.plan
    dtype = q.dtype if plan.splits == 1 else jnp.float16 if plan.half_parts else jnp.float32
    by_head = jax.ShapeDtypeStruct((plan.splits, tokens, heads), jnp.float32)
    return call(
        functools.partial(_program, kernel, s=s),
        q,
        *arrays,
        *([sinks] if sinks is not None and s.has_sinks else []),
        out_shape=(
            jax.ShapeDtypeStruct((plan.splits, tokens, heads, s.value_dim), dtype),
            *[by_head] * (2 if plan.half_parts else 1),
        ),
        grid=(tokens, -(-heads // plan.head_block), plan.splits),
        name="sparse_mla",
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        target=s.target,
    )
