"""Paged caches as pytrees of typed arrays: create, write, gather.

A slot is page * page_size + offset, int32; -1 means none. A write returns a new cache and is in place where the caller
donates the old one (`jax.jit(step, donate_argnums=...)`): FP8 is kept as words or bytes, because XLA:CPU moves a row of
an FP8-typed array by converting the whole of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import cache_write as kernel
from pallas_kernels import rounding
from pallas_kernels.cache_parts import Part
from pallas_kernels.plans.cache_write import CacheWritePlan
from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_config

MAX_SLOTS = 2**31 - 1
_DTYPES = (fp8.E4M3FNUZ, fp8.E4M3FN, jnp.dtype(jnp.bfloat16), fp8.FLOAT32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["latent", "scale", "rope"], meta_fields=["dtype", "group_size"]
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Latents and rotated keys of one layer's tokens, by pages.

    Attributes:
      latent: uint32[pages, page_size, L // 4] for FP8 (four values a word, little endian), else
        dtype[pages, page_size, L].
      scale: float32 or float8_e8m0fnu [pages, page_size, L // group_size] for FP8, else None.
      rope: [pages, page_size, R], float32 in a float32 cache, else bfloat16; never quantised.
      dtype: static; type of the latent values.
      group_size: static; latent values that share a scale.
    """

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
          group_size: latent values that share a scale (V3.2: 128, V4: 64); of no effect in unquantised caches.
          dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.
          scale_dtype: float32, or float8_e8m0fnu for powers of two; of no effect in unquantised caches.

        Raises:
          ValueError: a size or type other than these.
        """
        pages = _check_pages(num_pages, page_size)
        latent_dim, rope_dim = check_size("latent_dim", latent_dim, 1), check_size("rope_dim", rope_dim, 0)
        group_size, dtype = check_size("group_size", group_size, 1), _check_dtype(dtype)
        fp8.check_scale_dtype(scale_dtype)
        rope = jnp.zeros((*pages, rope_dim), jnp.float32 if dtype == fp8.FLOAT32 else jnp.bfloat16)
        if not fp8.is_fp8(dtype):
            return cls(jnp.zeros((*pages, latent_dim), dtype), None, rope, dtype, group_size)
        groups = fp8.check_groups(latent_dim, group_size, "latent_dim")
        _check_words("latent_dim", latent_dim)
        latent = jnp.zeros((*pages, latent_dim // 4), jnp.uint32)
        return cls(latent, _empty_scales((*pages, groups), scale_dtype), rope, dtype, group_size)

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.latent.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.latent.shape[1]

    @property
    def num_slots(self) -> int:
        """Tokens of the cache: num_pages * page_size."""
        return self.num_pages * self.page_size

    @property
    def latent_dim(self) -> int:
        """L, values of a latent."""
        return self.latent.shape[2] * (4 if self.quantized else 1)

    @property
    def rope_dim(self) -> int:
        """R, values of a rotated key."""
        return self.rope.shape[2]

    @property
    def quantized(self) -> bool:
        """Whether latents are FP8."""
        return fp8.is_fp8(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer, scales included."""
        return _bytes_per_token(self.latent, self.scale, self.rope)

    def values(self) -> Array:
        """The latents in their own type, dtype[pages, page_size, L], without their scales.

        For people and tests: of an FP8 cache this is a copy of the whole.
        """
        return fp8.unpack_words(self.latent, self.dtype) if self.quantized else self.latent


@functools.partial(jax.tree_util.register_dataclass, data_fields=["data", "scale"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class PagedIndexCache:
    """The indexer's keys of one layer's tokens, by pages.

    Attributes:
      data: the keys as stored: uint8[pages, page_size, D] for FP8 (their bytes), else dtype[pages, page_size, D].
      scale: float32[pages, page_size] for FP8, else None.
      dtype: static; type of the keys.
    """

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
        pages, dim, dtype = _check_pages(num_pages, page_size), check_size("dim", dim, 1), _check_dtype(dtype)
        if not fp8.is_fp8(dtype):
            return cls(jnp.zeros((*pages, dim), dtype), None, dtype)
        _check_words("dim", dim)
        return cls(jnp.zeros((*pages, dim), jnp.uint8), _empty_scales(pages, jnp.float32), dtype)

    @property
    def key(self) -> Array:
        """The keys in their own type, dtype[pages, page_size, D], without their scales (a bitcast of `data`)."""
        return lax.bitcast_convert_type(self.data, self.dtype) if self.quantized else self.data

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self.data.shape[0]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.data.shape[1]

    @property
    def num_slots(self) -> int:
        """Tokens of the cache: num_pages * page_size."""
        return self.num_pages * self.page_size

    @property
    def dim(self) -> int:
        """D, values of a key."""
        return self.data.shape[2]

    @property
    def quantized(self) -> bool:
        """Whether keys are FP8."""
        return fp8.is_fp8(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in this layer, the scale included."""
        return _bytes_per_token(self.data, self.scale)


def write_token(
    cache: PagedKVCache,
    index_cache: PagedIndexCache,
    latent: Array,
    rope: Array,
    key: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    config: CacheWritePlan | None = None,
) -> tuple[PagedKVCache, PagedIndexCache]:
    """`write` and `write_index` of the same tokens: one launch on a GPU, in place where the caller donates the caches.

    Args:
      cache: latents and rotary keys before.
      index_cache: the indexer's keys before; it may have another number of slots.
      latent: floating [T, L].
      rope: floating [T, R], already rotated.
      key: floating [T, D], normalised and rotated.
      slots: integer [T], see `write`.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      Both caches after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not serve the case.
    """
    slots = _as_slots(slots)
    parts = [*_kv_parts(cache, latent, rope, slots), _index_part(index_cache, key, slots)]
    *kv, index = _written("write_token", parts, slots, implementation, config)
    return _with_kv(cache, kv), _with_index(index_cache, index)


def write(
    cache: PagedKVCache,
    latent: Array,
    rope: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    config: CacheWritePlan | None = None,
) -> PagedKVCache:
    """Stores tokens, quantised by groups where the cache is FP8; in place where the caller donates `cache`.

    The bytes are the same from every implementation: FP8 as `fp8.quantize` says, other values rounded to nearest even,
    of which a NaN becomes the quiet NaN of its sign when its type changes to bfloat16. An H200 wrote a CPU's bytes for
    float32 tokens; for bfloat16 ones with subnormals and NaN a few bytes differed, from kernel and XLA alike.

    Args:
      cache: the cache before.
      latent: floating [T, L].
      rope: floating [T, R], already rotated.
      slots: integer [T]; those below 0 or from num_slots on are skipped, and of several tokens with one slot the last
        stays.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      The cache after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not serve the case.
    """
    slots = _as_slots(slots)
    return _with_kv(cache, _written("write", _kv_parts(cache, latent, rope, slots), slots, implementation, config))


def write_index(
    cache: PagedIndexCache,
    key: Array,
    slots: Array,
    *,
    implementation: str | None = None,
    config: CacheWritePlan | None = None,
) -> PagedIndexCache:
    """Stores the indexer's keys, quantised with one scale a key where the cache is FP8; in place under donation.

    Args:
      cache: the cache before.
      key: floating [T, D], normalised and rotated.
      slots: integer [T], see `write`.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      The cache after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not serve the case.
    """
    slots = _as_slots(slots)
    (index,) = _written("write_index", [_index_part(cache, key, slots)], slots, implementation, config)
    return _with_index(cache, index)


def gather(cache: PagedKVCache, slots: Array, *, dtype: Any) -> Array:
    """Rows [latent, rope] of tokens, dequantised: slots[N] -> dtype[N, L + R].

    A slot below 0 or from num_slots on gives exact zeros, whatever the pages hold. (Any shape of slots will do: [...]
    gives [..., L + R].)

    Raises:
      ValueError: slots are not integers, or dtype is not a floating type.
    """
    slots = _as_slots(slots)
    _check_float(dtype)
    latent = _gather(cache.latent, slots)
    if cache.scale is not None:
        codes = fp8.unpack_words(latent, jnp.uint8)
        scale = _gather(cache.scale, slots)
        latent = fp8.dequantize_codes(codes, scale, cache.dtype, group_size=cache.group_size, dtype=dtype)
    rows = jnp.concatenate([latent.astype(dtype), _gather(cache.rope, slots).astype(dtype)], axis=-1)
    return jnp.where(_valid(slots, cache.num_slots)[..., None], rows, jnp.zeros((), dtype))


def gather_index(cache: PagedIndexCache, slots: Array, *, dtype: Any) -> Array:
    """The indexer's keys of tokens, dequantised: slots[N] -> dtype[N, D]; invalid slots as in `gather`.

    Raises:
      ValueError: slots are not integers, or dtype is not a floating type.
    """
    slots = _as_slots(slots)
    _check_float(dtype)
    key = _gather(cache.data, slots)
    if cache.scale is not None:
        scale = _gather(cache.scale[..., None], slots)
        key = fp8.dequantize_codes(key, scale, cache.dtype, group_size=cache.dim, dtype=dtype)
    return jnp.where(_valid(slots, cache.num_slots)[..., None], key.astype(dtype), jnp.zeros((), dtype))


def reinterpret_cache[Cache: (PagedKVCache, PagedIndexCache)](cache: Cache, dtype: Any) -> Cache:
    """The same numbers in the other FP8 flavour: bytes stay, scales are doubled or halved (see `fp8.reinterpret`).

    Raises:
      ValueError: the cache is not quantised, or dtype is not an FP8 flavour.
    """
    if cache.scale is None:
        raise ValueError(
            f"cache has dtype {cache.dtype}; only FP8 caches have two flavours. Create it with an FP8 dtype."
        )
    require(fp8.is_fp8(dtype), f"dtype is {jnp.dtype(dtype)}; expected float8_e4m3fnuz or float8_e4m3fn.")
    scale = fp8.reinterpret_scales(cache.scale, cache.dtype, dtype)
    return dataclasses.replace(cache, scale=scale, dtype=jnp.dtype(dtype))


def _valid(slots: Array, num_slots: int) -> Array:
    return (slots >= 0) & (slots < num_slots)


def _flat(pages: Array) -> Array:
    """pages[P, S, ...] -> [P * S, W], W 1 where there is no third axis; E8M0 as its bytes."""
    if pages.dtype == fp8.E8M0:
        pages = lax.bitcast_convert_type(pages, jnp.uint8)
    return pages.reshape(pages.shape[0] * pages.shape[1], math.prod(pages.shape[2:]))


def _paged(flat: Array, like: Array) -> Array:
    """The inverse of `_flat`."""
    pages = flat.reshape(like.shape)
    return lax.bitcast_convert_type(pages, fp8.E8M0) if like.dtype == fp8.E8M0 else pages


def _part(pages: Array, scale: Array | None, dtype: np.dtype, group_size: int) -> Part:
    if scale is None:
        return Part(None, _flat(pages))
    return Part(None, _flat(pages), _flat(scale), dtype.name, group_size)


def parts_of(cache: PagedKVCache | PagedIndexCache) -> list[Part]:
    """What a slot of the cache is made of, for kernels: `rows` is None, slots are one axis."""
    if isinstance(cache, PagedIndexCache):
        return [_part(cache.data, cache.scale, cache.dtype, cache.dim)]
    return [
        _part(cache.latent, cache.scale, cache.dtype, cache.group_size),
        _part(cache.rope, None, cache.dtype, 0),
    ]


def with_parts[Cache: (PagedKVCache, PagedIndexCache)](cache: Cache, written: list[list[Array]]) -> Cache:
    """The cache with the arrays of `parts_of` replaced by others."""
    return _with_index(cache, written[0]) if isinstance(cache, PagedIndexCache) else _with_kv(cache, written)


def _kv_parts(cache: PagedKVCache, latent: Any, rope: Any, slots: Array) -> list[Part]:
    latent = _as_rows("latent", latent, slots, cache.latent_dim)
    rope = _as_rows("rope", rope, slots, cache.rope_dim)
    return [dataclasses.replace(part, rows=rows) for part, rows in zip(parts_of(cache), (latent, rope))]


def _index_part(cache: PagedIndexCache, key: Any, slots: Array) -> Part:
    key = _as_rows("key", key, slots, cache.dim)
    return dataclasses.replace(parts_of(cache)[0], rows=key)


def _with_kv(cache: PagedKVCache, written: list[list[Array]]) -> PagedKVCache:
    (latent, *scale), (rope,) = written
    scales = cache.scale if cache.scale is None else _paged(scale[0], cache.scale)
    return dataclasses.replace(cache, latent=_paged(latent, cache.latent), scale=scales, rope=_paged(rope, cache.rope))


def _with_index(cache: PagedIndexCache, written: list[Array]) -> PagedIndexCache:
    data, *scale = written
    scales = cache.scale if cache.scale is None else _paged(scale[0], cache.scale)
    return dataclasses.replace(cache, data=_paged(data, cache.data), scale=scales)


def _written(
    operator: str, parts: list[Part], slots: Array, implementation: str | None, config: CacheWritePlan | None
) -> list[list[Array]]:
    """The arrays of every part after the write."""
    implementation = with_config(implementation, config, CacheWritePlan)
    if slots.shape[0] == 0:
        check_implementation(implementation)
        return [part.arrays for part in parts]
    return dispatch(
        operator,
        implementation,
        {
            "triton": lambda: _triton_write(parts, slots, config),
            "xla": lambda: _xla_write(parts, slots),
            "reference": lambda: _reference_write(parts, slots),
        },
    )


def _triton_write(parts: list[Part], slots: Array, plan: CacheWritePlan | None) -> list[list[Array]]:
    if slots.dtype != jnp.int32:
        most = max(part.pages.shape[0] for part in parts)
        slots = jnp.where(_valid(slots, most), slots, -1).astype(jnp.int32)
    return kernel.write(parts, slots, plan=plan)


def _xla_write(parts: list[Part], slots: Array) -> list[list[Array]]:
    token = jnp.arange(slots.shape[0], dtype=jnp.int32)
    # Not left to the scatter: on a GPU its order is any.
    order = jnp.argsort(slots, stable=True)
    again = slots[order[:-1]] == slots[order[1:]]
    superseded = jnp.zeros(slots.shape, bool).at[order[:-1]].set(again, unique_indices=True)

    def scatter(pages, rows):
        at = jnp.where(_valid(slots, pages.shape[0]) & ~superseded, slots.astype(jnp.int32), -1 - token)
        return pages.at[at].set(rows, mode="drop", wrap_negative_indices=False, unique_indices=True)

    return [[scatter(pages, rows) for pages, rows in zip(part.arrays, _stored(part))] for part in parts]


def _stored(part: Part) -> list[Array]:
    """The rows of `part.arrays`."""
    if part.scales is None:
        return [rounding.convert(part.rows, part.pages.dtype)]
    scale_dtype = fp8.E8M0 if part.scales.dtype == jnp.uint8 else part.scales.dtype
    codes, scales = fp8.quantize_codes(
        part.rows, group_size=part.group_size, dtype=part.flavour, scale_dtype=scale_dtype
    )
    return [fp8.pack_words(codes) if part.pages.dtype == jnp.uint32 else codes, _flat(scales[None])]


def _reference_write(parts: list[Part], slots: Array) -> list[list[Array]]:
    written = []
    for part in parts:
        if part.scales is None:
            same = part.rows.dtype == part.pages.dtype
            rows = [part.rows if same else part.rows.astype(jnp.float32).astype(part.pages.dtype)]
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


def _gather(pages: Array, slots: Array) -> Array:
    """pages[P, S, ...] at slots[...], clamped into range: the caller masks."""
    dtype, num_slots = pages.dtype, pages.shape[0] * pages.shape[1]
    if dtype == fp8.E8M0:
        pages = lax.bitcast_convert_type(pages, jnp.uint8)
    at = jnp.clip(slots, 0, num_slots - 1).astype(jnp.int32)
    rows = pages.reshape(num_slots, *pages.shape[2:]).at[at].get(mode="promise_in_bounds")
    return lax.bitcast_convert_type(rows, dtype) if dtype == fp8.E8M0 else rows


def _empty_scales(shape: tuple[int, ...], scale_dtype: Any) -> Array:
    """Zeros; E8M0 has no zero and gets ones."""
    if jnp.dtype(scale_dtype) == fp8.E8M0:
        return lax.bitcast_convert_type(jnp.full(shape, 127, jnp.uint8), fp8.E8M0)
    return jnp.zeros(shape, scale_dtype)


def _bytes_per_token(*arrays: Array | None) -> int:
    return sum(int(np.prod(a.shape[2:])) * a.dtype.itemsize for a in arrays if a is not None)


def check_size(name: str, value: Any, low: int) -> int:
    """`value` as an int; ValueError unless it is an integer (no bool) of at least `low`."""
    try:
        size = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = low - 1
    require(size >= low, f"{name} is {value!r}; expected an integer of at least {low}.")
    return size


def _check_pages(num_pages: Any, page_size: Any) -> tuple[int, int]:
    pages, size = check_size("num_pages", num_pages, 1), check_size("page_size", page_size, 1)
    require(
        pages * size <= MAX_SLOTS,
        f"num_pages * page_size is {pages} * {size}; slots are int32, so the cache must have fewer than 2**31 of them."
        " Use fewer pages, one cache per layer and per device.",
    )
    return pages, size


def _check_dtype(dtype: Any) -> np.dtype:
    names = ", ".join(d.name for d in _DTYPES)
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype is {dtype!r}; expected one of {names}.") from None
    require(known in _DTYPES, f"dtype is {known}; expected one of {names}.")
    return known


def _check_words(name: str, width: int) -> None:
    require(
        width % 4 == 0,
        f"{name} is {width}; an FP8 cache stores four values to a word, so it must be a multiple of 4."
        " Pad it, or use dtype bfloat16.",
    )


def _as_slots(slots: Any) -> Array:
    slots = jnp.asarray(slots)
    require(
        jnp.issubdtype(slots.dtype, jnp.integer),
        f"slots are {slots.dtype}; expected an integer array (-1 for none).",
    )
    # The number of slots must be expressible where it is compared.
    return slots.astype(jnp.int32) if slots.dtype.itemsize < 4 else slots


def _as_rows(name: str, rows: Any, slots: Array, width: int) -> Array:
    rows = jnp.asarray(rows)
    require(slots.ndim == 1, f"slots have shape {list(slots.shape)}; expected [T], one per token.")
    expected = (slots.shape[0], width)
    require(
        tuple(rows.shape) == expected,
        f"{name} has shape {list(rows.shape)}; expected {list(expected)}: one row per slot, as wide as the cache.",
    )
    require(
        jnp.issubdtype(rows.dtype, jnp.floating),
        f"{name} is {rows.dtype}; expected floating values, which the cache quantises itself.",
    )
    return rows


def _check_float(dtype: Any) -> None:
    require(jnp.issubdtype(jnp.dtype(dtype), jnp.floating), f"dtype is {dtype}; expected a floating type.")
