"""Paged caches as pytrees of typed arrays: create, write, gather.

A slot is page * page_size + offset, int32; -1 means none. A write returns a new cache; it is in place if the caller
donates the old one (`jax.jit(step, donate_argnums=...)`). FP8 values are stored as words or bytes, because XLA:CPU
converts a whole FP8-typed array to move one row of it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.cache_parts import CachePart
from pallas_kernels.plans.cache_write import CacheWritePlan
from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops._dispatch import with_plan
from sparse_mla_jax.ops._slot_parts import PagedArrays, PartNames, empty_scales, gather_rows, is_slot, write_parts
from sparse_mla_jax.ops._slot_parts import parts_of as parts_of
from sparse_mla_jax.ops._slot_parts import with_parts as with_parts

MAX_SLOTS = 2**31 - 1
# Kept for callers of the former name.
check_size = _check.size
_DTYPES = (fp8.E4M3FNUZ, fp8.E4M3FN, jnp.dtype(jnp.bfloat16), fp8.FLOAT32)


@serializable
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["latent", "scale", "rope"], meta_fields=["dtype", "group_size"]
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache(PagedArrays):
    """Latents and rotated keys of one layer's tokens, in pages.

    Attributes:
      latent: uint32[pages, page_size, L // 4] for FP8 (four values a word, little endian), else
        dtype[pages, page_size, L].
      scale: float32 or float8_e8m0fnu [pages, page_size, L // group_size] for FP8, else None.
      rope: [pages, page_size, R], float32 in a float32 cache, else bfloat16; never quantised.
      dtype: static; type of the latent values.
      group_size: static; latent values that share a scale.
    """

    PARTS: ClassVar[tuple[PartNames, ...]] = (("latent", "scale"), ("rope", None))

    latent: Array
    scale: Array | None
    rope: Array
    dtype: np.dtype
    group_size: int

    @classmethod
    def create(
        cls,
        num_pages: int,
        page_size: int,
        *,
        latent_dim: int,
        rope_dim: int,
        group_size: int,
        dtype: Any = jnp.float8_e4m3fnuz,
        scale_dtype: Any = jnp.float32,
    ) -> PagedKVCache:
        """An empty cache (all values 0).

        Args:
          num_pages: pages, at least 1; num_pages * page_size < 2**31.
          page_size: tokens of a page, at least 1.
          latent_dim: L; with FP8 a multiple of 4 and of group_size.
          rope_dim: R, at least 0.
          group_size: latent values that share a scale (V3.2: 128, V4: 64); no effect in unquantised caches.
          dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.
          scale_dtype: float32, or float8_e8m0fnu for powers of two; no effect in unquantised caches.

        Raises:
          ValueError: a size or type other than these.
        """
        pages = _check_pages(num_pages, page_size)
        latent_dim, rope_dim = _check.size("latent_dim", latent_dim), _check.size("rope_dim", rope_dim, 0)
        group_size, dtype = _check.size("group_size", group_size), _check.dtype("dtype", dtype, _DTYPES)
        fp8.check_scale_dtype(scale_dtype)
        rope = jnp.zeros((*pages, rope_dim), jnp.float32 if dtype == fp8.FLOAT32 else jnp.bfloat16)
        if not fp8.is_fp8(dtype):
            return cls(jnp.zeros((*pages, latent_dim), dtype), None, rope, dtype, group_size)
        groups = fp8.check_groups(latent_dim, group_size, "latent_dim")
        _check_words("latent_dim", latent_dim)
        latent = jnp.zeros((*pages, latent_dim // 4), jnp.uint32)
        return cls(latent, empty_scales((*pages, groups), scale_dtype), rope, dtype, group_size)

    @property
    def latent_dim(self) -> int:
        """L, values of a latent."""
        return self.latent.shape[2] * (4 if self.quantized else 1)

    @property
    def rope_dim(self) -> int:
        """R, values of a rotated key."""
        return self.rope.shape[2]

    def values(self) -> Array:
        """The latents in their own type, dtype[pages, page_size, L], without their scales.

        For inspection and tests: an FP8 cache is copied as a whole.
        """
        return fp8.unpack_words(self.latent, self.dtype) if self.quantized else self.latent


@serializable
@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scale"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class PagedIndexCache(PagedArrays):
    """The indexer's keys of one layer's tokens, in pages.

    Attributes:
      data: the keys as stored: uint8[pages, page_size, D] for FP8 (their bytes), else dtype[pages, page_size, D].
      scale: float32[pages, page_size] for FP8, else None.
      dtype: static; type of the keys.
    """

    PARTS: ClassVar[tuple[PartNames, ...]] = (("data", "scale"),)

    data: Array
    scale: Array | None
    dtype: np.dtype

    @classmethod
    def create(cls, num_pages: int, page_size: int, *, dim: int, dtype: Any = jnp.float8_e4m3fnuz) -> PagedIndexCache:
        """An empty cache (all values 0).

        Args:
          num_pages: pages, at least 1; num_pages * page_size < 2**31.
          page_size: tokens of a page, at least 1.
          dim: D, values of a key; with FP8 a multiple of 4.
          dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.

        Raises:
          ValueError: a size or type other than these.
        """
        pages, dim = _check_pages(num_pages, page_size), _check.size("dim", dim)
        dtype = _check.dtype("dtype", dtype, _DTYPES)
        if not fp8.is_fp8(dtype):
            return cls(jnp.zeros((*pages, dim), dtype), None, dtype)
        _check_words("dim", dim)
        return cls(jnp.zeros((*pages, dim), jnp.uint8), empty_scales(pages, jnp.float32), dtype)

    @property
    def key(self) -> Array:
        """The keys in their own type, dtype[pages, page_size, D], without their scales (a bitcast of `data`)."""
        return lax.bitcast_convert_type(self.data, self.dtype) if self.quantized else self.data

    @property
    def dim(self) -> int:
        """D, values of a key."""
        return self.data.shape[2]

    @property
    def group_size(self) -> int:
        """Values that share a scale: all D of a key."""
        return self.dim


def write_token(
    cache: PagedKVCache,
    index_cache: PagedIndexCache,
    latent: Array,
    rope: Array,
    key: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    plan: CacheWritePlan | None = None,
    config: CacheWritePlan | None = None,
) -> tuple[PagedKVCache, PagedIndexCache]:
    """`write` and `write_index` of the same tokens: one launch on a GPU, in place if the caller donates the caches.

    Args:
      cache: latents and rotary keys before.
      index_cache: the indexer's keys before; it may have another number of slots.
      latent: floating [T, L].
      rope: floating [T, R], already rotated.
      key: floating [T, D], normalised and rotated.
      slots: integer [T], see `write`.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      Both caches after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, CacheWritePlan)
    slots = _as_slots(slots, "T")
    parts = [*_kv_parts(cache, latent, rope, slots), *_index_parts(index_cache, key, slots)]
    *kv, index = write_parts("write_token", parts, slots, implementation, plan)
    return with_parts(cache, kv), with_parts(index_cache, [index])


def write(
    cache: PagedKVCache,
    latent: Array,
    rope: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    plan: CacheWritePlan | None = None,
    config: CacheWritePlan | None = None,
) -> PagedKVCache:
    """Stores tokens, quantised by groups if the cache is FP8; in place if the caller donates `cache`.

    Every implementation writes the same bytes. FP8 follows `fp8.quantize`. Other values are rounded to nearest, ties to
    even; a NaN that is converted to bfloat16 becomes the quiet NaN of its sign. Measured on an H200: float32 tokens
    gave the bytes of a CPU; for bfloat16 tokens with subnormals and NaN, a few bytes of kernel and XLA alike differed.

    Args:
      cache: the cache before.
      latent: floating [T, L].
      rope: floating [T, R], already rotated.
      slots: integer [T]. Tokens whose slot is below 0 or at least num_slots are skipped. If several tokens have the
        same slot, the last one is stored.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      The cache after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, CacheWritePlan)
    slots = _as_slots(slots, "T")
    parts = _kv_parts(cache, latent, rope, slots)
    return with_parts(cache, write_parts("write", parts, slots, implementation, plan))


def write_index(
    cache: PagedIndexCache,
    key: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    plan: CacheWritePlan | None = None,
    config: CacheWritePlan | None = None,
) -> PagedIndexCache:
    """Stores the indexer's keys, quantised with one scale per key if the cache is FP8; in place under donation.

    Args:
      cache: the cache before.
      key: floating [T, D], normalised and rotated.
      slots: integer [T], see `write`.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      The cache after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, CacheWritePlan)
    slots = _as_slots(slots, "T")
    parts = _index_parts(cache, key, slots)
    return with_parts(cache, write_parts("write_index", parts, slots, implementation, plan))


def gather(cache: PagedKVCache, slots: Array, *, dtype: Any) -> Array:
    """Rows [latent, rope] of tokens, dequantised: slots[...] -> dtype[..., L + R].

    A slot that is negative or at least num_slots gives exact zeros, whatever the pages hold. NaN codes give NaN.

    Raises:
      ValueError: slots are not integers, or dtype is not a floating type.
    """
    slots = _as_slots(slots, ...)
    dtype = _check.dtype("dtype", dtype, jnp.floating)
    latent = gather_rows(cache.latent, slots)
    if cache.scale is not None:
        codes = fp8.unpack_words(latent, jnp.uint8)
        scale = gather_rows(cache.scale, slots)
        latent = fp8.dequantize_codes(codes, scale, cache.dtype, group_size=cache.group_size, dtype=dtype)
    rows = jnp.concatenate([latent.astype(dtype), gather_rows(cache.rope, slots).astype(dtype)], axis=-1)
    return jnp.where(is_slot(slots, cache.num_slots)[..., None], rows, jnp.zeros((), dtype))


def gather_index(cache: PagedIndexCache, slots: Array, *, dtype: Any) -> Array:
    """The indexer's keys of tokens, dequantised: slots[...] -> dtype[..., D]. Invalid slots give zeros, see `gather`.

    Raises:
      ValueError: slots are not integers, or dtype is not a floating type.
    """
    slots = _as_slots(slots, ...)
    dtype = _check.dtype("dtype", dtype, jnp.floating)
    key = gather_rows(cache.data, slots)
    if cache.scale is not None:
        scale = gather_rows(cache.scale[..., None], slots)
        key = fp8.dequantize_codes(key, scale, cache.dtype, group_size=cache.dim, dtype=dtype)
    return jnp.where(is_slot(slots, cache.num_slots)[..., None], key.astype(dtype), jnp.zeros((), dtype))


def reinterpret_cache[Cache: (PagedKVCache, PagedIndexCache)](cache: Cache, dtype: Any) -> Cache:
    """The same numbers in the other FP8 flavour: the bytes stay, the scales double or halve (see `fp8.reinterpret`).

    Raises:
      ValueError: the cache is not quantised, or dtype is not an FP8 flavour.
    """
    if cache.scale is None:
        raise ValueError(
            f"cache has dtype {cache.dtype}; only FP8 caches have two flavours. Create it with an FP8 dtype."
        )
    dtype = _check.dtype("dtype", dtype, (fp8.E4M3FNUZ, fp8.E4M3FN))
    return dataclasses.replace(cache, scale=fp8.reinterpret_scales(cache.scale, cache.dtype, dtype), dtype=dtype)


def _check_pages(num_pages: Any, page_size: Any) -> tuple[int, int]:
    pages, size = _check.size("num_pages", num_pages), _check.size("page_size", page_size)
    require(
        pages * size <= MAX_SLOTS,
        f"num_pages * page_size is {pages} * {size}; slots are int32, so the cache must have fewer than 2**31 of them."
        " Use fewer pages, one cache per layer and per device.",
    )
    return pages, size


def _check_words(name: str, width: int) -> None:
    require(
        width % 4 == 0,
        f"{name} is {width}; an FP8 cache stores four values to a word, so it must be a multiple of 4."
        " Pad it, or use dtype bfloat16.",
    )


def _as_slots(slots: Any, *axes: _check.Axis) -> Array:
    return _check.int32("slots", slots, *axes, hint="A slot is page * page_size + offset; -1 means none.")


def _as_rows(name: str, rows: Any, slots: Array, width: int) -> Array:
    """The rows to write, unquantised: floating [slots, width]."""
    hint = "One row per slot, as wide as the cache."
    return _check.array(name, rows, jnp.floating, slots.shape[0], width, hint=hint)


def _kv_parts(cache: PagedKVCache, latent: Any, rope: Any, slots: Array) -> list[CachePart]:
    _check.instance("cache", cache, PagedKVCache, hint="Make it with PagedKVCache.create.")
    rows = _as_rows("latent", latent, slots, cache.latent_dim), _as_rows("rope", rope, slots, cache.rope_dim)
    return [dataclasses.replace(part, rows=x) for part, x in zip(parts_of(cache), rows)]


def _index_parts(cache: PagedIndexCache, key: Any, slots: Array) -> list[CachePart]:
    _check.instance("index cache", cache, PagedIndexCache, hint="Make it with PagedIndexCache.create.")
    key = _as_rows("key", key, slots, cache.dim)
    return [dataclasses.replace(part, rows=key) for part in parts_of(cache)]
