"""interchange: DeepSeek-V4's planar 584-byte blocks, byte for byte at the addresses that the layout gives them."""

# mypy: disable-error-code="arg-type"

import struct
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparse_mla_jax.interchange import kv_from_v4_blocks, kv_to_v4_blocks
from sparse_mla_jax.ops.cache import PagedKVCache, gather, write

FN, FNUZ, E8M0 = jnp.float8_e4m3fn, jnp.float8_e4m3fnuz, jnp.float8_e8m0fnu
NUMPY = {FNUZ: ml_dtypes.float8_e4m3fnuz, FN: ml_dtypes.float8_e4m3fn}
flavours = pytest.mark.parametrize("dtype", [FNUZ, FN], ids=lambda d: d.__name__)
both = pytest.mark.parametrize("dtype, other", [(FNUZ, FN), (FN, FNUZ)], ids=["from_fnuz", "from_fn"])
# pages, page_size, latent, rope, group, bytes of an entry's scales: V4's, and sizes that are no powers of two
SIZES = [
    (3, 64, 448, 64, 64, 8),
    (2, 2, 448, 64, 64, 8),
    (3, 5, 36, 6, 12, 8),
    (2, 3, 36, 2, 4, 16),
    (1, 1, 4, 0, 4, 8),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s[:5])))


def random_bytes(shape, seed=0):
    """Any byte at all, NaN codes and NaN scales included."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def widths(size) -> dict[str, Any]:
    return dict(latent_dim=size[2], rope_dim=size[3], group_size=size[4])


def filled(size, dtype) -> Any:
    cache = PagedKVCache.create(*size[:2], **widths(size), dtype=dtype, scale_dtype=E8M0)
    rng, n = np.random.default_rng(0), cache.num_slots
    latent = rng.standard_normal((n, size[2])) * np.exp2(rng.integers(-9, 9, (n, 1)))
    rope = rng.standard_normal((n, size[3])).astype(np.float32)
    return jax.jit(write)(cache, latent.astype(np.float32), rope, np.arange(n))


def rows_of(cache):
    return np.asarray(jax.jit(gather, static_argnames="dtype")(cache, np.arange(cache.num_slots), dtype=jnp.float32))


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)  # type: ignore[operator]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def unused(size, stride):
    """Which bytes of a page hold nothing: behind an entry's scales and behind the entries."""
    _, page, latent, rope, group, scales = size
    rows = page * (latent + 2 * rope)
    free = np.zeros(stride, bool)
    for entry in range(page):
        free[rows + entry * scales + latent // group : rows + (entry + 1) * scales] = True
    free[rows + page * scales :] = True
    return free


# --- addresses -------------------------------------------------------------------------------------------------------
@flavours
@pytest.mark.parametrize("page, stride", [(2, 1728), (64, 37440)])
def test_a_page_written_by_hand(dtype, page, stride):
    """Two pages put together one byte at a time from the layout's table, read, and written again."""
    blocks, expected = np.zeros((2, stride), np.uint8), np.zeros((2 * page, 512), np.float32)
    one = {FN: 0x38, FNUZ: 0x40}[dtype]  # 1.0; each step is an eighth
    for block in range(2):
        for i in range(page):
            token = block * page + i
            for d in range(448):
                blocks[block, i * 576 + d] = one + (token + d) % 8
                scale = 120 + (token + d // 64) % 15
                expected[token, d] = (1 + (token + d) % 8 / 8) * 2.0 ** (scale - 127)
            for j in range(64):
                expected[token, 448 + j] = token - j
                bits = struct.unpack("<I", struct.pack("<f", token - j))[0] >> 16
                struct.pack_into("<H", blocks[block], i * 576 + 448 + 2 * j, bits)
            for g in range(7):
                blocks[block, page * 576 + i * 8 + g] = 120 + (token + g) % 15
    cache = jax.jit(lambda b: kv_from_v4_blocks(b, page_size=page, dtype=dtype))(blocks)
    assert cache.dtype == dtype and cache.group_size == 64 and cache.scale.dtype == E8M0
    np.testing.assert_array_equal(rows_of(cache), expected)
    out = np.asarray(jax.jit(kv_to_v4_blocks)(cache))
    np.testing.assert_array_equal(out, blocks)  # the stride is the one that engines use


@flavours
def test_what_the_library_quantised_lies_where_the_layout_says(dtype):
    cache, page = filled(SIZES[0], dtype), 64
    raw, expected = np.asarray(kv_to_v4_blocks(cache)).tobytes(), rows_of(cache)
    assert len(raw) == 3 * 37440
    for token in (0, 1, 63, 64, 191):
        block, i = divmod(token, page)
        at = block * 37440
        values = np.frombuffer(raw, NUMPY[dtype], 448, at + i * 576).astype(np.float32)
        rope = np.frombuffer(raw, ml_dtypes.bfloat16, 64, at + i * 576 + 448).astype(np.float32)
        scales = np.frombuffer(raw, np.uint8, 8, at + page * 576 + i * 8)
        assert scales[7] == 0 and (scales[:7] >= 105).all()
        values = values * np.float32(2) ** (scales[:7].repeat(64) - 127.0)
        np.testing.assert_array_equal(np.concatenate([values, rope]), expected[token])


# --- in and out ------------------------------------------------------------------------------------------------------
@flavours
@sizes
@pytest.mark.parametrize("padding", [0, 7])
def test_in_and_out_is_the_identity_for_any_bytes(dtype, size, padding):
    pages, page, latent, rope, _, scales = size
    least = page * (latent + 2 * rope + scales)
    stride = least + padding
    blocks, free = random_bytes((pages, stride)), unused(size, stride)
    read = jax.jit(lambda b: kv_from_v4_blocks(b, page_size=page, dtype=dtype, **widths(size)))
    cache = read(blocks)
    assert (cache.num_pages, cache.page_size, cache.latent_dim, cache.rope_dim) == (pages, page, latent, rope)
    out = np.asarray(jax.jit(lambda c: kv_to_v4_blocks(c, block_stride=stride))(cache))
    np.testing.assert_array_equal(out, np.where(free, 0, blocks))
    # Bytes that hold nothing do not matter, and the declared three-axis shape is the same bytes.
    same_bits(read(np.where(free, 0xFF, blocks)), cache)
    same_bits(read(blocks[:, :least].reshape(pages, page, -1)), cache)


@flavours
@sizes
def test_out_and_in_is_the_identity(dtype, size):
    cache = filled(size, dtype)
    blocks = kv_to_v4_blocks(cache)
    row = size[2] + 2 * size[3]
    assert blocks.shape[1] % row == 0 and 0 <= blocks.shape[1] - size[1] * (row + size[5]) < row
    same_bits(kv_from_v4_blocks(blocks, page_size=size[1], dtype=dtype, **widths(size)), cache)


# --- flavours --------------------------------------------------------------------------------------------------------
@both
@sizes
def test_the_other_flavour_holds_the_same_numbers(dtype, other, size):
    cache, page = filled(size, dtype), size[1]
    blocks = kv_to_v4_blocks(cache)
    moved = kv_from_v4_blocks(blocks, page_size=page, dtype=dtype, cache_dtype=other, **widths(size))
    assert moved.dtype == other and moved.scale is not None and moved.scale.dtype == E8M0
    np.testing.assert_array_equal(rows_of(moved), rows_of(cache))
    # Our codes keep their bytes, so the way back gives the very same file.
    np.testing.assert_array_equal(np.asarray(kv_to_v4_blocks(moved, dtype=dtype)), np.asarray(blocks))
    # Written out for a reader of the other flavour: the same bytes but for the scales, one up or down.
    out = np.asarray(kv_to_v4_blocks(cache, dtype=other)).astype(int)
    rows = page * (size[2] + 2 * size[3])
    step = np.where(unused(size, out.shape[1]), 0, {FN: -1, FNUZ: 1}[other])
    step[:rows] = 0
    np.testing.assert_array_equal(out, np.asarray(blocks) + step)
    same_bits(kv_from_v4_blocks(out.astype(np.uint8), page_size=page, dtype=other, **widths(size)), moved)


@both
def test_codes_and_scales_that_only_other_writers_leave(dtype, other):
    """All 256 codes under ordinary, extreme and NaN scales."""
    scales = np.array([127, 1, 253, 0, 254, 255], np.uint8)
    blocks = np.zeros((1, 6 * (256 + 8)), np.uint8)
    blocks[0, : 6 * 256] = np.tile(np.arange(256, dtype=np.uint8), 6)
    blocks[0, 6 * 256 :: 8] = scales
    options: Any = dict(page_size=6, dtype=dtype, latent_dim=256, rope_dim=0, group_size=256)
    codes = np.arange(256, dtype=np.uint8).view(NUMPY[dtype]).astype(np.float64)
    same = kv_from_v4_blocks(blocks, **options)
    np.testing.assert_array_equal(np.asarray(same.scale).view(np.uint8).ravel(), scales)
    moved = kv_from_v4_blocks(blocks, cache_dtype=other, **options)
    step = {FN: -1, FNUZ: 1}[other]
    expected = [*np.clip(scales[:5].astype(int) + step, 0, 254), 255]  # the ends stay
    np.testing.assert_array_equal(np.asarray(moved.scale).view(np.uint8).ravel(), expected)
    held = np.asarray(moved.values()).astype(np.float64)[0]
    wanted = codes * {FN: 2, FNUZ: 0.5}[other]
    if other == FN:
        wanted[[0x7F, 0xFF]] = [448, -448]  # +-240 twice would be +-480
    for entry in held:
        np.testing.assert_array_equal(entry, wanted)
    assert np.isnan(held[0]).sum() == {FN: 1, FNUZ: 2}[other]
    np.testing.assert_array_equal(rows_of(same)[0], codes.astype(np.float32))
    np.testing.assert_array_equal(rows_of(moved)[0], (wanted * 2.0**step).astype(np.float32))
    assert np.isnan(rows_of(moved)[5]).all()


def test_abstract():
    blocks = jax.ShapeDtypeStruct((4, 37440), jnp.uint8)
    cache: Any = jax.eval_shape(lambda b: kv_from_v4_blocks(b, page_size=64, dtype=FN, cache_dtype=FNUZ), blocks)
    assert cache.dtype == FNUZ and cache.latent.shape == (4, 64, 112) and cache.scale.shape == (4, 64, 7)
    assert cache.rope.shape == (4, 64, 64) and jax.eval_shape(kv_to_v4_blocks, cache) == blocks


PAGES = np.zeros((2, 1728), np.uint8)
TINY: Any = dict(latent_dim=8, rope_dim=2, group_size=4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: kv_from_v4_blocks(PAGES.astype(np.int8), page_size=2, dtype=FN), "blocks is int8"),
        (lambda: kv_from_v4_blocks(PAGES[0], page_size=2, dtype=FN), r"expected uint8 \[pages, stride\]"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=3, dtype=FN), "3 tokens of 584 bytes need 1752"),
        (lambda: kv_from_v4_blocks(PAGES.reshape(2, 3, 576), page_size=3, dtype=FN), r"or \[pages, 3, 584\]"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=0, dtype=FN), "page_size is 0"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=2, dtype=FN, group_size=100), "group_size is 100"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=2, dtype=FN, rope_dim=-1), "rope_dim is -1"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=2, dtype=FN, latent_dim=6, group_size=6), "words of four"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=2, dtype=jnp.bfloat16), "bfloat16"),
        (lambda: kv_from_v4_blocks(PAGES, page_size=2, dtype=FN, cache_dtype=jnp.float32), "float32"),
        (lambda: kv_to_v4_blocks(PagedKVCache.create(1, 2, **TINY, dtype=FN)), "float32 scales"),
        (lambda: kv_to_v4_blocks(PagedKVCache.create(1, 2, **TINY, dtype="float32")), "no scales"),
        (lambda: kv_to_v4_blocks(filled(SIZES[1], FN), block_stride=1167), "block_stride is 1167.*need 1168 bytes"),
        (lambda: kv_to_v4_blocks(filled(SIZES[1], FN), dtype=jnp.bfloat16), "bfloat16"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
