"""interchange: the packed layouts against struct-by-struct readers, byte for byte, both ways."""

# mypy: disable-error-code="arg-type"

import struct
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sparse_mla_jax.interchange import (
    index_from_planar_blocks,
    index_to_planar_blocks,
    kv_from_v32_rows,
    kv_to_v32_rows,
)
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, gather, gather_index, write, write_index

FN, FNUZ = jnp.float8_e4m3fn, jnp.float8_e4m3fnuz
NUMPY = {FNUZ: ml_dtypes.float8_e4m3fnuz, FN: ml_dtypes.float8_e4m3fn}
flavours = pytest.mark.parametrize("dtype", [FNUZ, FN], ids=lambda d: d.__name__)
both = pytest.mark.parametrize("dtype, other", [(FNUZ, FN), (FN, FNUZ)], ids=["from_fnuz", "from_fn"])

gather_jit = jax.jit(gather, static_argnames="dtype")
gather_index_jit = jax.jit(gather_index, static_argnames="dtype")
# (pages, page_size, latent, rope, group): V3.2's, and sizes that are no powers of two
SIZES = [(2, 64, 512, 64, 128), (3, 5, 36, 6, 12), (1, 1, 4, 0, 4)]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def random_bytes(shape, seed=0):
    """Any byte at all, NaN codes and NaN scales included."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(pages, page, latent, rope, group, dtype) -> Any:
    cache = PagedKVCache.create(pages, page, latent_dim=latent, rope_dim=rope, group_size=group, dtype=dtype)
    n = cache.num_slots
    return jax.jit(write)(cache, normal((n, latent), 0), normal((n, rope), 1), np.arange(n))


def filled_index(pages, page, dim, dtype) -> Any:
    cache = PagedIndexCache.create(pages, page, dim=dim, dtype=dtype)
    n = cache.num_slots
    return jax.jit(write_index)(cache, normal((n, dim), 2), np.arange(n))


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)  # type: ignore[operator]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def rows_of(cache):
    return np.asarray(gather_jit(cache, np.arange(cache.num_slots), dtype=jnp.float32))


def keys_of(cache):
    return np.asarray(gather_index_jit(cache, np.arange(cache.num_slots), dtype=jnp.float32))


@flavours
@sizes
def test_rows_in_and_out_are_the_identity_for_any_bytes(dtype, size):
    pages, page, latent, rope, group = size
    rows = random_bytes((pages, page, latent + 4 * latent // group + 2 * rope))
    read = lambda r: kv_from_v32_rows(r, dtype=dtype, latent_dim=latent, rope_dim=rope, group_size=group)  # noqa: E731
    cache = jax.jit(read)(rows)
    assert cache.dtype == dtype and cache.group_size == group
    assert (cache.num_pages, cache.page_size, cache.latent_dim, cache.rope_dim) == (pages, page, latent, rope)
    np.testing.assert_array_equal(np.asarray(jax.jit(kv_to_v32_rows)(cache)), rows)


@flavours
@sizes
def test_rows_out_and_in_are_the_identity(dtype, size):
    pages, page, latent, rope, group = size
    cache = filled(pages, page, latent, rope, group, dtype)
    back = kv_from_v32_rows(kv_to_v32_rows(cache), dtype=dtype, latent_dim=latent, rope_dim=rope, group_size=group)
    same_bits(back, cache)


@flavours
def test_rows_lie_where_the_layout_says(dtype):
    cache = filled(2, 64, 512, 64, 128, dtype)
    rows = np.asarray(kv_to_v32_rows(cache))
    assert rows.shape == (2, 64, 656)
    raw, expected = rows.tobytes(), rows_of(cache)
    for token in (0, 63, 64, 127):
        row = raw[token * 656 : (token + 1) * 656]
        values = np.frombuffer(row[:512], NUMPY[dtype]).astype(np.float32)
        scales = np.array(struct.unpack("<4f", row[512:528]), np.float32)
        rope = np.array(struct.unpack("<64H", row[528:]), np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(np.concatenate([values * scales.repeat(128), rope]), expected[token])


@flavours
@pytest.mark.parametrize("pages, page, dim, padding", [(3, 64, 128, 0), (2, 64, 128, 192), (2, 5, 20, 7), (1, 1, 4, 1)])
def test_blocks_both_ways(dtype, pages, page, dim, padding):
    least = page * (dim + 4)
    stride = least + padding
    blocks = random_bytes((pages, stride))
    read = jax.jit(lambda b: index_from_planar_blocks(b, page_size=page, dtype=dtype, dim=dim))
    cache = read(blocks)
    out = np.asarray(jax.jit(lambda c: index_to_planar_blocks(c, block_stride=stride))(cache))
    np.testing.assert_array_equal(out[:, :least], blocks[:, :least])
    assert out.shape == (pages, stride) and (out[:, least:] == 0).all()
    # The padding's bytes do not matter, and the declared three-axis shape is the same bytes.
    blocks[:, least:] = 0xFF
    same_bits(read(blocks), cache)
    same_bits(read(blocks[:, :least].reshape(pages, page, dim + 4)), cache)
    mine = filled_index(pages, page, dim, dtype)
    same_bits(read(index_to_planar_blocks(mine)), mine)


@flavours
def test_blocks_lie_where_the_layout_says(dtype):
    page, dim, stride = 64, 128, 8640
    cache = filled_index(3, page, dim, dtype)
    raw, expected = np.asarray(index_to_planar_blocks(cache, block_stride=stride)).tobytes(), keys_of(cache)
    for token in (0, 1, 63, 64, 191):
        block, p = divmod(token, page)
        at = block * stride
        key = np.frombuffer(raw[at + p * dim : at + (p + 1) * dim], NUMPY[dtype]).astype(np.float32)
        (scale,) = struct.unpack_from("<f", raw, at + page * dim + 4 * p)
        np.testing.assert_array_equal(key * np.float32(scale), expected[token])


@both
def test_the_other_flavour_holds_the_same_numbers(dtype, other):
    cache, index = filled(2, 5, 36, 6, 12, dtype), filled_index(2, 5, 20, dtype)
    rows, blocks = kv_to_v32_rows(cache), index_to_planar_blocks(index)
    width: Any = dict(latent_dim=36, rope_dim=6, group_size=12)
    moved = jax.jit(lambda r: kv_from_v32_rows(r, dtype=dtype, cache_dtype=other, **width))(rows)
    moved_index = index_from_planar_blocks(blocks, page_size=5, dtype=dtype, cache_dtype=other, dim=20)
    assert moved.dtype == moved_index.dtype == other
    np.testing.assert_array_equal(rows_of(moved), rows_of(cache))
    np.testing.assert_array_equal(keys_of(moved_index), keys_of(index))
    # Our codes keep their bytes, so the way back gives the very same file.
    np.testing.assert_array_equal(np.asarray(kv_to_v32_rows(moved, dtype=dtype)), np.asarray(rows))
    np.testing.assert_array_equal(np.asarray(index_to_planar_blocks(moved_index, dtype=dtype)), np.asarray(blocks))
    # Written out for a reader of the other flavour, and read as such.
    same_bits(kv_from_v32_rows(kv_to_v32_rows(cache, dtype=other), dtype=other, **width), moved)
    out = index_to_planar_blocks(index, dtype=other)
    same_bits(index_from_planar_blocks(out, page_size=5, dtype=other, dim=20), moved_index)


@both
def test_codes_that_only_other_writers_leave(dtype, other):
    codes = np.arange(256, dtype=np.uint8)
    rows = np.zeros((1, 1, 256 + 4), np.uint8)
    rows[..., :256], rows[..., 256:] = codes, np.frombuffer(struct.pack("<f", 2.0), np.uint8)
    expected = codes.view(NUMPY[dtype]).astype(np.float32) * 2
    read = lambda **kw: rows_of(  # noqa: E731
        kv_from_v32_rows(rows, dtype=dtype, latent_dim=256, rope_dim=0, group_size=256, **kw)
    )[0]
    np.testing.assert_array_equal(read(), expected)
    if dtype == FNUZ:
        expected[[0x7F, 0xFF]] = [448, -448]  # +-240 twice would be +-480
    np.testing.assert_array_equal(read(cache_dtype=other), expected)
    key = index_from_planar_blocks(rows[0], page_size=1, dtype=dtype, cache_dtype=other, dim=256)
    np.testing.assert_array_equal(keys_of(key)[0], expected)
    assert not ((np.asarray(key.data) == 0x80) & ~np.isnan(expected)).any()


@flavours
def test_power_of_two_scales_become_float32(dtype):
    cache = PagedKVCache.create(
        1, 2, latent_dim=8, rope_dim=2, group_size=4, dtype=dtype, scale_dtype=jnp.float8_e8m0fnu
    )
    cache = jax.jit(write)(cache, normal((2, 8)), jnp.ones((2, 2), jnp.float32), np.arange(2))
    back = kv_from_v32_rows(kv_to_v32_rows(cache), dtype=dtype, latent_dim=8, rope_dim=2, group_size=4)
    assert back.scale is not None and back.scale.dtype == jnp.float32
    np.testing.assert_array_equal(rows_of(back), rows_of(cache))


def test_abstract_and_shard_map():
    rows = jax.ShapeDtypeStruct((4, 64, 656), jnp.uint8)
    cache: Any = jax.eval_shape(lambda r: kv_from_v32_rows(r, dtype=FN, cache_dtype=FNUZ), rows)
    assert cache.dtype == FNUZ and cache.latent.shape == (4, 64, 128)
    assert jax.eval_shape(kv_to_v32_rows, cache) == rows
    index = filled_index(2, 3, 8, FN)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = PartitionSpec("x")
    mapped = jax.shard_map(index_to_planar_blocks, mesh=mesh, in_specs=(spec,), out_specs=spec)
    np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(index)), np.asarray(index_to_planar_blocks(index)))


TINY: Any = dict(latent_dim=8, rope_dim=2, group_size=4)
ROWS = np.zeros((2, 3, 656), np.uint8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kv_from_v32_rows(ROWS.astype(np.int8), dtype=FN), "rows is int8"),
        (lambda: kv_from_v32_rows(ROWS[0], dtype=FN), r"expected uint8 \[pages, page_size, bytes\]"),
        (lambda: kv_from_v32_rows(ROWS[..., :655], dtype=FN), "expected 656 bytes"),
        (lambda: kv_from_v32_rows(ROWS, dtype=FN, group_size=100), "group_size is 100"),
        (lambda: kv_from_v32_rows(ROWS, dtype=FN, rope_dim=-1), "rope_dim is -1"),
        (lambda: kv_from_v32_rows(ROWS, dtype=FN, latent_dim=6, group_size=6), "words of four"),
        (lambda: kv_from_v32_rows(ROWS, dtype=jnp.bfloat16), "bfloat16"),
        (lambda: kv_from_v32_rows(ROWS, dtype=FN, cache_dtype=jnp.float32), "float32"),
        (lambda: kv_to_v32_rows(PagedKVCache.create(1, 2, **TINY, dtype="float32")), "hold FP8"),
        (lambda: index_from_planar_blocks(ROWS[0], page_size=5, dtype=FN), "need 660"),
        (lambda: index_from_planar_blocks(ROWS, page_size=3, dtype=FN), r"expected \[pages, stride\]"),
        (lambda: index_from_planar_blocks(ROWS[0], page_size=0, dtype=FN), "page_size is 0"),
        (lambda: index_from_planar_blocks(ROWS[0], page_size=1, dtype=FN, dim=6), "words of four"),
        (lambda: index_to_planar_blocks(filled_index(1, 3, 8, FN), block_stride=35), "block_stride is 35"),
        (lambda: index_to_planar_blocks(PagedIndexCache.create(1, 2, dim=8, dtype=jnp.bfloat16)), "hold FP8"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
