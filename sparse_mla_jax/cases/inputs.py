"""Random inputs that cases share: caches, rows of slots, sections of a projection; and the bytes of arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.norm_rope import Section
from sparse_mla_jax.ops.ragged import Ragged

PAGE = 64
# (latent values, group size, type of the scales).
LAYOUTS = {"v32": (512, 128, jnp.float32), "v4": (448, 64, jnp.float8_e8m0fnu)}
# Number of values: of a rotated key, of an attention result, of an indexer's key.
ROPE, VALUE_DIM, DIM = 64, 512, 128
# Types of the indexer's queries: bfloat16, or the FP8 flavour of the cache.
QUERIES = ("bfloat16", "cache")
# Number of rows that are compared with float64. All rows are timed.
SAMPLE = 8


def nbytes(*trees: Any) -> int:
    """Total bytes of arrays or of their shapes."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(trees))


def seed(purpose: int, number: int | Array = 0) -> Array:
    """A different random key for every purpose and argument set."""
    # Use the generator that compiles fastest; its quality is sufficient here.
    return jax.random.fold_in(jax.random.key(purpose, impl="unsafe_rbg"), number)


def permutation(key: Array, count: int) -> Array:
    """int32 [count], 0..count-1 in random order."""
    return jnp.argsort(jax.random.bits(key, (count,))).astype(jnp.int32)


def sample(rows: int) -> np.ndarray:
    """Rows that are checked: first, last, and evenly between."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLE)).round().astype(np.int32))


@jax.jit
def _rows_of(x: Any, rows: Any) -> Any:
    return x[rows]


def take(x: Any, rows: np.ndarray) -> np.ndarray:
    """Copies some rows of a large array to the host."""
    return np.asarray(_rows_of(x, rows))


# Jit them as a whole: without jit, every operation is compiled separately.
gather = jax.jit(cache_ops.gather, static_argnames="dtype")
gather_index = jax.jit(cache_ops.gather_index, static_argnames="dtype")
dense = jax.jit(Ragged.to_dense, static_argnames="width")


def distinct(key: Array, rows: int, wanted: int, room: int) -> Array:
    """int32 [rows, wanted]: ascending and distinct, one from each of `wanted` equal intervals of 0..room-1."""
    part = room // wanted
    return jnp.arange(wanted, dtype=jnp.int32) * part + jax.random.randint(key, (rows, wanted), 0, part, jnp.int32)


def random_slots(key: Array, rows: int, selected: int, slots: int, *, own: bool) -> Array:
    """Slots int32 [rows, selected] in random pages; `own`: each row reads its own region of the cache."""
    room = slots // rows if own else slots
    position = distinct(key, rows, selected, room)
    if own:
        position += room * jnp.arange(rows, dtype=jnp.int32)[:, None]
    pages = permutation(jax.random.fold_in(key, 1), slots // PAGE)
    return pages[position // PAGE] * PAGE + position % PAGE


def filled[Cache: (PagedKVCache, PagedIndexCache)](cache: Cache) -> Cache:
    """`cache` with random tokens in all of its slots, written by the library's own quantiser."""
    # Write in chunks: the tokens are float32 until they are written.
    some = min(cache.num_slots, 1 << 14)

    def fill(i: Array, cache: Any) -> Any:
        key, at = seed(1, i), i * some + jnp.arange(some, dtype=jnp.int32)
        if isinstance(cache, PagedIndexCache):
            return cache_ops.write_index(cache, jax.random.normal(key, (some, cache.dim), jnp.float32), at)
        latent = jax.random.normal(key, (some, cache.latent_dim), jnp.float32)
        return cache_ops.write(
            cache, latent, jax.random.normal(jax.random.fold_in(key, 1), (some, ROPE), jnp.float32), at
        )

    return jax.lax.fori_loop(0, -(-cache.num_slots // some), fill, cache)


@functools.partial(jax.jit, static_argnames=("layout", "flavour", "slots"))
def kv_cache(layout: str, flavour: str, slots: int) -> PagedKVCache:
    """A cache of `slots` random tokens."""
    latent, group, scale = LAYOUTS[layout]
    empty = PagedKVCache.create(
        slots // PAGE,
        PAGE,
        latent_dim=latent,
        rope_dim=ROPE,
        group_size=group,
        dtype=jnp.dtype(flavour),
        scale_dtype=scale,
    )
    return filled(empty)


@functools.partial(jax.jit, static_argnames=("flavour", "slots", "dim"))
def index_cache(flavour: str, slots: int, dim: int) -> PagedIndexCache:
    """An index cache of `slots` random keys."""
    return filled(PagedIndexCache.create(slots // PAGE, PAGE, dim=dim, dtype=jnp.dtype(flavour)))


def random_cache(
    rng: np.random.Generator, kind: str, latent: int, group: int, scale_dtype: Any, rope_dim: int = ROPE
) -> PagedKVCache:
    """A cache of 8 pages of 64 slots, written by the library's own quantiser."""
    cache = PagedKVCache.create(
        8,
        64,
        latent_dim=latent,
        rope_dim=rope_dim,
        group_size=group,
        dtype=jnp.dtype(kind),
        scale_dtype=scale_dtype,
    )
    rows, rope = (jnp.asarray(rng.standard_normal((512, n)), jnp.float32) for n in (latent, rope_dim))
    return cache_ops.write(cache, rows, rope, jnp.arange(512))


def random_index_keys(rng: np.random.Generator, kind: str, slots: int) -> PagedIndexCache:
    """An index cache of `slots` random keys in pages of 64."""
    cache = PagedIndexCache.create(slots // 64, 64, dim=128, dtype=jnp.dtype(kind))
    return cache_ops.write_index(cache, jnp.asarray(rng.standard_normal((slots, 128)), jnp.float32), jnp.arange(slots))


COMPRESSOR_FREQUENCIES = (1.6e5 ** (-np.arange(32) / 32)).astype(np.float32)


def v32_hidden_parts(vector: Callable[[int], Array], dtype: str) -> tuple[Section, ...]:
    """Sections of DeepSeek-V3.2's product of the hidden state, 2304 columns side by side.

    The query latent in `dtype`, and in float32: the latent, the rotated key that all heads share, the indexer's key and
    head weights. vector: size -> a norm's weight or bias, float32 [size].
    """
    c, part = DeepseekV32Config(), functools.partial(Section, heads=1)
    widths = c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim, c.index_head_dim, c.index_n_heads
    query, latent, key, index, weights = (int(sum(widths[:i])) for i in range(5))
    return (
        part(start=query, width=widths[0], weight=vector(widths[0]), dtype=dtype),
        part(start=latent, width=widths[1], weight=vector(widths[1]), dtype="float32"),
        part(start=key, width=widths[2], rotated=0, interleaved=True, dtype="float32"),
        part(
            start=index, width=widths[3], weight=vector(widths[3]), bias=vector(widths[3]), rotated=0, dtype="float32"
        ),
        part(start=weights, width=widths[4], scale=(widths[3] * widths[4]) ** -0.5, dtype="float32"),
    )


def v32_query_parts(heads: int, dtype: str, index_dtype: str, factor: Array | None) -> tuple[Section, ...]:
    """Sections of DeepSeek-V3.2's product of the query latent: `heads` queries of 128 + 64, and the indexer's queries.

    index_dtype: type of the indexer's 64 queries of 128. FP8 needs `factor` float32 [T, 64], multiplied into scales.
    """
    c = DeepseekV32Config()
    index = c.index_n_heads * c.index_head_dim
    rotated = c.qk_nope_head_dim
    return (
        Section(index, heads, c.qk_head_dim, dtype, rotated=rotated, interleaved=True),
        Section(0, c.index_n_heads, c.index_head_dim, index_dtype, rotated=0, factor=factor),
    )
