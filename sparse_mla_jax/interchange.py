"""Converts caches from and to the packed layouts of other engines, byte for byte.

Layouts of vLLM, all little endian; a page has `bs` tokens (entries in V4's compressed caches):

    V3.2, row of the main cache, 656 bytes, interleaved:   512 FP8 latent | 4 float32 scales | 64 bfloat16 rope
    V3.2 and V4, page of the index cache, bs * 132 bytes, planar:
        bs * 128 FP8 keys | bs float32 scales | padding up to the stride
    V4, page of a main cache, bs * 584 bytes, planar:
        bs * (448 FP8 latent | 64 bfloat16 rope) | bs * (7 E8M0 scales | a zero byte) | padding up to the stride

In a V4 page at address A, the latents of entry i start at A + i * 576, its rope at A + i * 576 + 448, its scales at
A + bs * 576 + i * 8. Engines declare the shape [pages, bs, 584], but only its size is right: [page, i] is not entry i.
Pages start at multiples of 576 bytes: 64 entries take 37440 bytes, 2 take 1728.

Sizes come from the cache, or from arguments that default to the model's, so that other widths work too. With L latents
in groups of G and R rotary values, 576 is L + 2 * R, and 8 is L // G rounded up to a multiple of 8. All functions are
pure and jittable, and accept numpy arrays.

**Flavours.** `dtype` is the flavour of the packed bytes: float8_e4m3fn or float8_e4m3fnuz. A cache of the same flavour
has the same bytes, whatever they are, so that export and import (and import and export) is the identity. A cache of the
other flavour has the same bytes, and scales twice or half as large (`ops.fp8.reinterpret`). This is exact for every
code that this library writes. Other writers may have left three codes that it never writes:

* -0 of e4m3fn (0x80) is NaN in e4m3fnuz. An import that changes the flavour stores +0 instead.
* NaN (0x7F and 0xFF of e4m3fn, 0x80 of e4m3fnuz) stays NaN, in the code of the other flavour.
* +-240 of e4m3fnuz (0x7F, 0xFF) would be +-480 in e4m3fn and saturates to +-448 (a relative error of 1/15).

An import that changes the flavour (`cache_dtype`) therefore keeps numbers, but not always bytes. An export, and
`ops.cache.reinterpret_cache` (for caches that this library wrote), change the flavour without looking at the bytes.
Float32 scales that are subnormal or NaN keep their bits only if the flavour stays. E8M0 scales at either end (2**-127,
2**127) can not be halved or doubled and stay unchanged.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache

_VIEW = "View the packed cache as bytes."


def kv_to_v32_rows(cache: PagedKVCache, *, dtype: Any = None) -> Array:
    """Exports a cache to packed rows: uint8[pages, page_size, L + 4 * (L // group_size) + 2 * R], 656 wide for V3.2.

    E8M0 scales become float32 (exact).

    Args:
      cache: an FP8 cache.
      dtype: the flavour that the reader expects, None for the cache's own.

    Raises:
      ValueError: the cache is not FP8, or dtype is not an FP8 flavour.
    """
    codes, scale = _leave(cache.latent, cache.scale, cache.dtype, dtype)
    return jnp.concatenate([fp8.unpack_words(codes, jnp.uint8), _bytes(scale), _bytes(cache.rope)], axis=-1)


def kv_from_v32_rows(
    rows: Array,
    *,
    dtype: Any,
    cache_dtype: Any = None,
    latent_dim: int = 512,
    rope_dim: int = 64,
    group_size: int = 128,
) -> PagedKVCache:
    """Imports a cache from packed rows: the inverse of `kv_to_v32_rows`.

    Args:
      rows: uint8[pages, page_size, L + 4 * (L // group_size) + 2 * R]. If pages end with padding, first reshape to
        [pages, stride], cut to page_size * 656 bytes, and reshape.
      dtype: the flavour of the bytes, float8_e4m3fn or float8_e4m3fnuz.
      cache_dtype: the flavour of the cache, None for that of the bytes.
      latent_dim: L, a multiple of 4 and of group_size.
      rope_dim: R.
      group_size: latent values that share a scale.

    Raises:
      ValueError: another type, or a width that does not fit the sizes.
    """
    rows = _check.array("rows", rows, (jnp.uint8,), "pages", "page_size", "bytes", hint=_VIEW)
    latent_dim, rope_dim = _check.size("latent_dim", latent_dim), _check.size("rope_dim", rope_dim, 0)
    groups = fp8.check_groups(latent_dim, group_size, "latent_dim")
    require(latent_dim % 4 == 0, f"latent_dim is {latent_dim}; a cache stores FP8 in words of four, give a multiple.")
    width = latent_dim + 4 * groups + 2 * rope_dim
    require(
        rows.shape[2] == width,
        f"rows have shape {list(rows.shape)}; expected {width} bytes a row: {latent_dim} FP8 values, {groups} float32"
        f" scales, {rope_dim} bfloat16 values. Give latent_dim, rope_dim and group_size of the rows.",
    )
    codes, scale, rope = jnp.split(rows, [latent_dim, latent_dim + 4 * groups], axis=-1)
    codes, scale, cache_dtype = _enter(codes, _from_bytes(scale, jnp.float32), dtype, cache_dtype)
    return PagedKVCache(fp8.pack_words(codes), scale, _from_bytes(rope, jnp.bfloat16), cache_dtype, int(group_size))


def index_to_planar_blocks(cache: PagedIndexCache, *, dtype: Any = None, block_stride: int | None = None) -> Array:
    """Exports an index cache to packed pages: uint8[pages, block_stride], keys first, then scales, then zeros.

    Args:
      cache: an FP8 cache.
      dtype: the flavour that the reader expects, None for the cache's own.
      block_stride: bytes from one page to the next, None for the minimum, page_size * (D + 4).

    Raises:
      ValueError: the cache is not FP8, dtype is not an FP8 flavour, or the stride is too small.
    """
    codes, scale = _leave(cache.data, cache.scale, cache.dtype, dtype)
    least = cache.page_size * (cache.dim + 4)
    stride = least if block_stride is None else _check.size("block_stride", block_stride)
    require(
        stride >= least,
        f"block_stride is {stride}; pages of {cache.page_size} tokens need {least} bytes ({cache.dim} + 4 a token).",
    )
    pages = cache.num_pages
    blocks = jnp.concatenate([codes.reshape(pages, -1), _bytes(scale)], axis=-1)
    return jnp.pad(blocks, ((0, 0), (0, stride - least)))


def index_from_planar_blocks(
    blocks: Array, *, page_size: int, dtype: Any, cache_dtype: Any = None, dim: int = 128
) -> PagedIndexCache:
    """Imports an index cache from packed pages: the inverse of `index_to_planar_blocks`.

    Keys are read in plain order ([token, D]). The 16x16-shuffled order of some ROCm writers is not supported.

    Args:
      blocks: uint8[pages, stride], stride >= page_size * (dim + 4), the rest of a page is ignored; or
        uint8[pages, page_size, dim + 4], the shape that engines declare for the same planar bytes.
      page_size: tokens of a page.
      dtype: the flavour of the bytes, float8_e4m3fn or float8_e4m3fnuz.
      cache_dtype: the flavour of the cache, None for that of the bytes.
      dim: D, a multiple of 4.

    Raises:
      ValueError: another type, or a stride that is too small.
    """
    blocks = _check_blocks(blocks)
    page_size, dim = _check.size("page_size", page_size), _check.size("dim", dim)
    require(dim % 4 == 0, f"dim is {dim}; a cache stores FP8 in words of four, give a multiple.")
    blocks = _as_pages(blocks, page_size, dim + 4)
    pages, keys, least = blocks.shape[0], page_size * dim, page_size * (dim + 4)
    scale = _from_bytes(blocks[:, keys:least], jnp.float32)
    codes, scale, cache_dtype = _enter(blocks[:, :keys].reshape(pages, page_size, dim), scale, dtype, cache_dtype)
    return PagedIndexCache(codes, scale, cache_dtype)


def kv_to_v4_blocks(cache: PagedKVCache, *, dtype: Any = None, block_stride: int | None = None) -> Array:
    """Exports a cache with E8M0 scales to packed pages of V4: uint8[pages, block_stride], with zeros as padding.

    Args:
      cache: an FP8 cache with scale_dtype float8_e8m0fnu.
      dtype: the flavour that the reader expects, None for the cache's own.
      block_stride: bytes from one page to the next; None for the smallest multiple of L + 2 * R that holds a page.

    Raises:
      ValueError: the cache is not FP8 or has float32 scales, dtype is not an FP8 flavour, or the stride is too small.
    """
    scale = cache.scale
    if scale is None or scale.dtype != fp8.E8M0:
        raise ValueError(
            f"cache has dtype {cache.dtype} with {'no' if scale is None else scale.dtype} scales; V4's layout holds FP8"
            " with E8M0 scales. Create it with an FP8 dtype and scale_dtype float8_e8m0fnu."
        )
    row, scales = _v4_widths(cache.latent_dim, cache.rope_dim, cache.group_size)
    pages, page_size, groups = scale.shape
    least = page_size * (row + scales)
    stride = -(-least // row) * row if block_stride is None else _check.size("block_stride", block_stride)
    require(
        stride >= least,
        f"block_stride is {stride}; pages of {page_size} entries need {least} bytes ({row} + {scales} an entry).",
    )
    scale = fp8.reinterpret_scales(scale, cache.dtype, cache.dtype if dtype is None else dtype)
    rows = jnp.concatenate([fp8.unpack_words(cache.latent, jnp.uint8), _bytes(cache.rope)], axis=-1)
    codes = jnp.pad(lax.bitcast_convert_type(scale, jnp.uint8), ((0, 0), (0, 0), (0, scales - groups)))
    blocks = jnp.concatenate([rows.reshape(pages, -1), codes.reshape(pages, -1)], axis=-1)
    return jnp.pad(blocks, ((0, 0), (0, stride - least)))


def kv_from_v4_blocks(
    blocks: Array,
    *,
    page_size: int,
    dtype: Any,
    cache_dtype: Any = None,
    latent_dim: int = 448,
    rope_dim: int = 64,
    group_size: int = 64,
) -> PagedKVCache:
    """Imports a cache from packed pages of V4: the inverse of `kv_to_v4_blocks`. Its scales are E8M0.

    Args:
      blocks: uint8[pages, stride], the padding after a page's entries and after an entry's scales is ignored; or
        uint8[pages, page_size, 584], the shape that engines declare for the same bytes.
      page_size: entries of a page.
      dtype: the flavour of the bytes, float8_e4m3fn or float8_e4m3fnuz.
      cache_dtype: the flavour of the cache, None for that of the bytes.
      latent_dim: L, a multiple of 4 and of group_size.
      rope_dim: R.
      group_size: latent values that share a scale.

    Raises:
      ValueError: another type, sizes that do not fit together, or a stride that is too small.
    """
    blocks = _check_blocks(blocks)
    page_size = _check.size("page_size", page_size)
    latent_dim, rope_dim = _check.size("latent_dim", latent_dim), _check.size("rope_dim", rope_dim, 0)
    groups = fp8.check_groups(latent_dim, group_size, "latent_dim")
    require(latent_dim % 4 == 0, f"latent_dim is {latent_dim}; a cache stores FP8 in words of four, give a multiple.")
    row, scales = _v4_widths(latent_dim, rope_dim, group_size)
    blocks = _as_pages(blocks, page_size, row + scales)
    pages, rows = blocks.shape[0], page_size * row
    codes, rope = jnp.split(blocks[:, :rows].reshape(pages, page_size, row), [latent_dim], axis=-1)
    scale = blocks[:, rows : page_size * (row + scales)].reshape(pages, page_size, scales)[..., :groups]
    codes, scale, cache_dtype = _enter(codes, lax.bitcast_convert_type(scale, fp8.E8M0), dtype, cache_dtype)
    return PagedKVCache(fp8.pack_words(codes), scale, _from_bytes(rope, jnp.bfloat16), cache_dtype, int(group_size))


def _v4_widths(latent_dim: int, rope_dim: int, group_size: int) -> tuple[int, int]:
    """Bytes of an entry in the rows (576) and in the scales (8)."""
    return latent_dim + 2 * rope_dim, -(-(latent_dim // group_size) // 8) * 8


def _check_blocks(blocks: Any) -> Array:
    axes = ("pages", "page_size", "bytes") if np.ndim(blocks) == 3 else ("pages", "stride")
    return _check.array("blocks", blocks, (jnp.uint8,), *axes, hint=_VIEW)


def _as_pages(blocks: Array, page_size: int, width: int) -> Array:
    """`blocks` as planar pages uint8[pages, stride] of at least `page_size` * `width` bytes."""
    require(
        blocks.ndim == 2 or blocks.shape[1:] == (page_size, width),
        f"blocks have shape {list(blocks.shape)}; expected [pages, stride] or [pages, {page_size}, {width}].",
    )
    blocks = blocks.reshape(blocks.shape[0], -1) if blocks.ndim == 3 else blocks
    require(
        blocks.shape[1] >= page_size * width,
        f"blocks have {blocks.shape[1]} bytes a page; {page_size} tokens of {width} bytes need {page_size * width}."
        " Give the page_size and the widths that they were written with.",
    )
    return blocks


def _leave(stored: Array, scale: Array | None, cache_dtype: Any, dtype: Any) -> tuple[Array, Array]:
    """For an export: the stored bytes of a cache, and float32 scales for reading them as `dtype`."""
    if scale is None:
        raise ValueError(f"cache has dtype {cache_dtype}; the packed layouts hold FP8. Create it with an FP8 dtype.")
    scale = fp8.scales_to_float32(scale)
    return stored, fp8.reinterpret_scales(scale, cache_dtype, cache_dtype if dtype is None else dtype)


def _enter(codes: Array, scale: Array, dtype: Any, cache_dtype: Any) -> tuple[Array, Array, Any]:
    """For an import: (codes, scales, flavour) of the cache, from bytes uint8[...] of flavour `dtype` and scales."""
    source = jnp.dtype(dtype)
    target = source if cache_dtype is None else jnp.dtype(cache_dtype)
    scale = fp8.reinterpret_scales(scale, source, target)
    if source == target:
        return codes, scale, target
    magnitude, sign = codes & 0x7F, codes & 0x80
    if source == fp8.E4M3FN:
        codes = jnp.where(magnitude == 0x7F, jnp.uint8(0x80), jnp.where(codes == 0x80, jnp.uint8(0), codes))
    else:
        codes = jnp.where(codes == 0x80, jnp.uint8(0x7F), sign | jnp.minimum(magnitude, jnp.uint8(0x7E)))
    return codes, scale, target


def _bytes(array: Array) -> Array:
    """The bytes of array[..., N], little endian: uint8[..., N * itemsize]."""
    width = array.shape[-1] * array.dtype.itemsize
    return lax.bitcast_convert_type(array, jnp.uint8).reshape(*array.shape[:-1], width)


def _from_bytes(data: Array, dtype: Any) -> Array:
    """The inverse of _bytes."""
    size = jnp.dtype(dtype).itemsize
    return lax.bitcast_convert_type(data.reshape(*data.shape[:-1], data.shape[-1] // size, size), dtype)
