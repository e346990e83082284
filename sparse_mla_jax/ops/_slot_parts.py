"""The arrays behind a cache's slots, and the bodies of a write.

A cache lists its arrays in `PARTS`: pairs of (array of pages, its scales or None). For a write, `parts_of` turns each
pair into a `CachePart`: pages and page offsets become one axis of slots, E8M0 scales become bytes. `with_parts` turns
the written arrays back into a cache.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import cache_write as kernel
from pallas_kernels import rounding
from pallas_kernels.cache_parts import CachePart
from pallas_kernels.plans.cache_write import CacheWritePlan
from sparse_mla_jax import reference
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch

# (field of an array of pages, field of its scales or None).
PartNames = tuple[str, str | None]


class PagedArrays:
    """Base of the paged caches: sizes that follow from their arrays."""

    PARTS: ClassVar[tuple[PartNames, ...]]
    dtype: np.dtype

    def _arrays(self) -> list[Array]:
        """The arrays of the cache in the order of PARTS, without those that are None."""
        named = (getattr(self, name) for names in self.PARTS for name in names if name is not None)
        return [array for array in named if array is not None]

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self._arrays()[0].shape[0]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._arrays()[0].shape[1]

    @property
    def num_slots(self) -> int:
        """Tokens of the cache: num_pages * page_size."""
        return self.num_pages * self.page_size

    @property
    def quantized(self) -> bool:
        """Whether the latents or index keys are FP8."""
        return fp8.is_fp8(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer, scales included."""
        return sum(math.prod(x.shape[2:]) * x.dtype.itemsize for x in self._arrays())


def is_slot(slots: Array, num_slots: int) -> Array:
    """Whether each of `slots` lies in 0..num_slots - 1."""
    return (slots >= 0) & (slots < num_slots)


def flatten_pages(pages: Array) -> Array:
    """pages[P, S, ...] -> [P * S, W]; W is 1 if there is no third axis. E8M0 becomes bytes."""
    if pages.dtype == fp8.E8M0:
        pages = lax.bitcast_convert_type(pages, jnp.uint8)
    return pages.reshape(pages.shape[0] * pages.shape[1], math.prod(pages.shape[2:]))


def restore_pages(flat: Array, like: Array) -> Array:
    """The inverse of `flatten_pages`."""
    pages = flat.reshape(like.shape)
    return lax.bitcast_convert_type(pages, fp8.E8M0) if like.dtype == fp8.E8M0 else pages


def parts_of(cache: Any) -> list[CachePart]:
    """The arrays of a cache as CacheParts, slots in one axis; `rows` is None until a write sets it."""
    return [_part_of(cache, *names) for names in cache.PARTS]


def _part_of(cache: Any, pages: str, scales: str | None) -> CachePart:
    scale = None if scales is None else getattr(cache, scales)
    flat = flatten_pages(getattr(cache, pages))
    if scale is None:
        return CachePart(None, flat)
    return CachePart(None, flat, flatten_pages(scale), cache.dtype.name, cache.group_size)


def with_parts[Cache](cache: Cache, written: list[list[Array]]) -> Cache:
    """`cache` with its arrays replaced by `written`, which has the order and shapes of `parts_of`."""
    old: Any = cache
    new = {}
    for names, arrays in zip(old.PARTS, written):
        for name, flat in zip(names, arrays):
            new[name] = restore_pages(flat, getattr(old, name))
    return dataclasses.replace(old, **new)


def write_parts(
    operator: str, parts: list[CachePart], slots: Array, implementation: str | None, plan: CacheWritePlan | None
) -> list[list[Array]]:
    """Writes the rows of every part to `slots`; returns the new arrays of each part."""
    if slots.shape[0] == 0:
        check_implementation(implementation)
        return [part.arrays for part in parts]
    return dispatch(
        operator,
        implementation,
        {
            "triton": lambda: with_derivative_of(_xla_write, partial(kernel.write, plan=plan), parts, slots),
            "xla": lambda: _xla_write(parts, slots),
            "reference": lambda: _reference_write(parts, slots),
        },
    )


def _xla_write(parts: list[CachePart], slots: Array) -> list[list[Array]]:
    token = jnp.arange(slots.shape[0], dtype=jnp.int32)
    # The last token of a slot wins. A GPU scatter has no order, so drop the earlier tokens of the slot beforehand.
    order = jnp.argsort(slots, stable=True)
    is_repeated = slots[order[:-1]] == slots[order[1:]]
    superseded = jnp.zeros(slots.shape, bool).at[order[:-1]].set(is_repeated, unique_indices=True)

    def scatter(pages, rows):
        at = jnp.where(is_slot(slots, pages.shape[0]) & ~superseded, slots, -1 - token)
        return pages.at[at].set(rows, mode="drop", wrap_negative_indices=False, unique_indices=True)

    return [[scatter(pages, rows) for pages, rows in zip(part.arrays, _rows_to_store(part))] for part in parts]


def _rows_to_store(part: CachePart) -> list[Array]:
    """The part's rows in the types of `part.arrays`: values, and scales if quantised."""
    if part.scales is None:
        return [rounding.convert(part.rows, part.pages.dtype)]
    scale_dtype = fp8.E8M0 if part.scales.dtype == jnp.uint8 else part.scales.dtype
    codes, scales = fp8.quantize_codes(
        part.rows, group_size=part.group_size, dtype=part.flavour, scale_dtype=scale_dtype
    )
    return [fp8.pack_words(codes) if part.pages.dtype == jnp.uint32 else codes, flatten_pages(scales[None])]


def _reference_write(parts: list[CachePart], slots: Array) -> list[list[Array]]:
    written = []
    for part in parts:
        if part.scales is None:
            is_same = part.rows.dtype == part.pages.dtype
            rows = [part.rows if is_same else part.rows.astype(jnp.float32).astype(part.pages.dtype)]
        else:
            e8m0 = part.scales.dtype == jnp.uint8
            codes, scales = reference.quantize(
                part.rows, group_size=part.group_size, dtype=jnp.dtype(part.flavour), power_of_two=e8m0
            )
            if part.pages.dtype == jnp.uint32:
                codes = lax.bitcast_convert_type(codes.reshape(codes.shape[0], -1, 4), jnp.uint32)
            rows = [codes, lax.bitcast_convert_type(scales.astype(fp8.E8M0), jnp.uint8) if e8m0 else scales]
        written.append([reference.write(pages, new, slots) for pages, new in zip(part.arrays, rows)])
    return written


def gather_rows(pages: Array, slots: Array) -> Array:
    """pages[P, S, ...] at slots[...]. Slots are clamped into range; the caller masks the invalid ones."""
    dtype, num_slots = pages.dtype, pages.shape[0] * pages.shape[1]
    if dtype == fp8.E8M0:
        pages = lax.bitcast_convert_type(pages, jnp.uint8)
    at = jnp.clip(slots, 0, num_slots - 1)
    rows = pages.reshape(num_slots, *pages.shape[2:]).at[at].get(mode="promise_in_bounds")
    return lax.bitcast_convert_type(rows, dtype) if dtype == fp8.E8M0 else rows


def empty_scales(shape: tuple[int, ...], scale_dtype: Any) -> Array:
    """Scales of an empty cache: zeros, or ones for E8M0, which has no zero."""
    if jnp.dtype(scale_dtype) == fp8.E8M0:
        return lax.bitcast_convert_type(jnp.full(shape, 127, jnp.uint8), fp8.E8M0)
    return jnp.zeros(shape, scale_dtype)
