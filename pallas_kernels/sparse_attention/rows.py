"""Sources of keys, the slots of a row in them, and the key blocks that a program takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels._call import load
from pallas_kernels._primitives import load_from
from pallas_kernels.tiles import power_of_two


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
      lengths: int32 [T], number of valid entries in each row of [T, W]; None: all.
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
    """Index of a row's first slot in `values`, and the number of its slots."""
    if "lengths" in refs:
        return token * width, jnp.clip(refs["lengths"][token], 0, width)
    if "indptr" not in refs:
        return token * width, jnp.int32(width)
    capacity = refs["values"].shape[0]
    start = jnp.clip(refs["indptr"][token], 0, capacity)
    return start, jnp.maximum(jnp.clip(refs["indptr"][token + 1], 0, capacity) - start, 0)


def choose(number: Array | int, values: Sequence[Any]) -> Any:
    """values[number] by selects, since `number` may be traced."""
    chosen = values[0]
    for i, value in enumerate(values[1:], 1):
        chosen = jnp.where(number == i, value, chosen)
    return chosen


def key_slots(
    sources: Sequence[dict], part: RowPart, s: Any
) -> tuple[Callable[[Array], Array | int], Callable[[Array], Array]]:
    """Returns (number_of, slots_of): functions of a key block that give its source, and its slots [key_block] or -1.

    Key blocks of a row are numbered through its sources, one source after the other.
    """
    size = s.plan.key_block
    # Per source: index of its first block; offset so that `offset + block * size` is the slot's index; one past its
    # last slot in the same numbering.
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
    """A valid slot in key blocks first..last-1 of a row, -1 if there is none."""
    return jax.lax.while_loop(
        lambda c: (c[1] < 0) & (c[0] < last), lambda c: (c[0] + 1, jnp.max(slots_of(c[0]))), (first, jnp.int32(-1))
    )[1]


def some_keys(slots_of: Callable[[Array], Array], part: RowPart) -> tuple[list[Array], Array, Array]:
    """Returns (a valid slot of each source in the program's blocks, first, last); skips a source without such a slot.

    Absent keys load that slot with weight 0. Loads then need no mask and never meet the NaN of another row's slot.
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


def _blocks(lengths: Sequence[Array], s: Any) -> list[Array]:
    """Number of key blocks of a row in each source."""
    return [(length + s.plan.key_block - 1) // s.plan.key_block for length in lengths]


def _part_size(sources: Sequence[dict], tokens: int, s: Any) -> Array:
    """Key blocks of a split, if the keys of all rows are cut into `plan.shares` equal splits."""

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
class RowPart:
    """A program's share of a row.

    Attributes:
      token, split: indices into the outputs.
      first_head, heads: first head, and all heads [head_block]; heads past the last one are padding.
      blocks: number of key blocks of each source.
      first, last: the program takes key blocks first..last-1 of all sources.
    """

    token: Array
    split: Array
    first_head: Array
    heads: Array
    blocks: list[Array]
    first: Array
    last: Array


def blocks_of_part(split: Array, parts: Array | int, total: Array) -> tuple[Array, Array]:
    """Split number `split` of `parts` takes blocks first..last-1 of `total`; none if split >= parts.

    Splits differ by at most one block, and longer ones come first: programs that share a multiprocessor then have equal
    work in total.
    """
    size = total // parts
    longer = total - size * parts
    first = split * size + jnp.minimum(split, longer)
    return first, jnp.where(split < parts, first + size + (split < longer).astype(jnp.int32), first)


def part_of(place: Sequence[Array], sources: Sequence[dict], tokens: int, s: Any) -> RowPart:
    """The share of the program at `place`: (token, head block, split)."""
    token, head_block, split = place
    first_head = head_block * s.plan.head_block
    heads = first_head + jnp.arange(s.plan.head_block, dtype=jnp.int32)
    blocks = _blocks([row_bounds(r, token, w)[1] for r, w in zip(sources, s.widths)], s)
    total = functools.reduce(jnp.add, blocks)
    if s.plan.splits == 1:
        return RowPart(token, split, first_head, heads, blocks, jnp.int32(0), total)
    parts = s.plan.splits
    if s.plan.shares:
        # Long rows get more splits than short ones. Programs beyond the splits of a row have no keys.
        size = _part_size(sources, tokens, s)
        parts = jnp.clip((total + size - 1) // size, 1, parts)
    return RowPart(token, split, first_head, heads, blocks, *blocks_of_part(split, parts, total))


def ranges(part: RowPart) -> list[tuple[Array, Array]]:
    """The program's blocks first..last-1 in each source, numbered through all sources."""
    ends = [part.first]
    for number in range(1, len(part.blocks)):
        ends.append(jnp.clip(functools.reduce(jnp.add, part.blocks[:number]), part.first, part.last))
    return list(zip(ends, [*ends[1:], part.last]))
