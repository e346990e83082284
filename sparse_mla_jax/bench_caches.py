"""Cases of cache writes: a step's tokens into both caches, entries of the compressors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.bench_work import (
    DIM,
    LAYOUTS,
    PAGE,
    ROPE,
    VALUE_DIM,
    Case,
    Work,
    gather,
    gather_index,
    index_cache,
    kv_cache,
    nbytes,
    permutation,
    random_slots,
    relative,
    seed,
)
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages


# --- cache writes ----------------------------------------------------------------------------------------------------
def _write(sizes: Mapping[str, int], flavour: str, query: str, *, layout: str) -> Work:
    """`write_token` of the tokens of one step into donated caches."""
    del query
    tokens, slots = sizes["tokens"], sizes["slots"]
    latent = LAYOUTS[layout][0]

    def state():
        return kv_cache(layout, flavour, slots), index_cache(flavour, slots, DIM)

    def each(number):
        rows = [
            jax.random.normal(seed(11 + i, number), (tokens, n), jnp.bfloat16)
            for i, n in enumerate((latent, ROPE, DIM))
        ]
        return (*rows, random_slots(seed(14, number), 1, tokens, slots, own=False)[0])

    def fn(cache, index, latent, rope, key, slots, *, implementation=None):
        return cache_ops.write_token(cache, index, latent, rope, key, slots, implementation=implementation)

    def error(arguments, got):
        cache, index, rows, rope, key, at = arguments
        at = np.asarray(at)
        untouched = np.setdiff1d(np.arange(0, slots, max(1, slots // 4096), dtype=np.int32), at)
        for before, after, read in ((cache, got[0], gather), (index, got[1], gather_index)):
            old, new = (np.asarray(read(x, untouched, dtype=jnp.float32)) for x in (before, after))
            if not np.array_equal(old, new):
                return math.inf
        stored = np.asarray(gather(got[0], at, dtype=jnp.float32))
        if not np.array_equal(stored[:, latent:], np.asarray(rope).astype(np.float32)):
            return math.inf
        index_error = relative(gather_index(got[1], at, dtype=jnp.float32), key)
        return max(relative(stored[:, :latent], rows), index_error)

    caches = jax.eval_shape(lambda: (kv_cache(layout, flavour, PAGE), index_cache(flavour, PAGE, DIM)))
    size = nbytes(jax.eval_shape(lambda: each(0))) + tokens * sum(c.bytes_per_token for c in caches)
    # Rounding to three bits of mantissa is 2.6e-2 of the norm.
    return Work(fn, each, size, 0, error, 4e-2, state=state)


def _compress(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Entries of one decode step: every ratio-th of the requests closes a window."""
    del query
    batch, ratio, page_size = sizes["batch"], sizes["ratio"], sizes["page_size"]
    dim, overlap = VALUE_DIM, ratio == 4
    channels, pages = (2 if overlap else 1) * dim, sizes["pages"]

    def state():
        _, entries = entry_pages(jnp.zeros((0, 0), jnp.int32), page_size=page_size, ratio=ratio)
        latent, group, scale = LAYOUTS["v4"]
        cache = PagedKVCache.create(
            batch * pages,
            entries,
            latent_dim=latent,
            rope_dim=ROPE,
            group_size=group,
            dtype=jnp.dtype(flavour),
            scale_dtype=scale,
        )
        shape = CompressorState.create(batch, ratio=ratio, dim=dim, overlap=overlap).kv.shape
        return cache, CompressorState(*(jax.random.normal(seed(19 + i), shape) for i in range(2)))

    def each(number):
        # Positions one apart, so that every ratio-th request closes, the first among them; far from a first window.
        positions = pages * page_size // 2 - 1 + jnp.arange(batch, dtype=jnp.int32)
        table = permutation(seed(21, number), batch * pages).reshape(batch, pages)
        kv, gate = (jax.random.normal(seed(22 + i, number), (batch, channels)) for i in range(2))
        bias = jax.random.normal(seed(24, number), (ratio, channels))
        return kv, gate, bias, jnp.ones(dim), positions, table

    def fn(cache, state, kv, gate, bias, norm, positions, table, *, implementation=None):
        rows = jnp.arange(batch, dtype=jnp.int32)
        return compress(
            cache,
            state,
            kv,
            gate,
            bias,
            norm,
            jnp.full((ROPE // 2,), 0.01),
            positions=positions,
            request_ids=rows,
            query_indptr=jnp.arange(batch + 1, dtype=jnp.int32),
            seq_lens=positions + 1,
            page_table=table,
            page_size=page_size,
            ratio=ratio,
            implementation=implementation,
        )

    def error(arguments, got):
        want = jax.jit(functools.partial(fn, implementation="reference"))(*arguments)
        after, wanted = (jax.tree.leaves(x[1]) for x in (got, want))
        if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(after, wanted)):
            return math.inf
        every = jnp.arange(got[0].num_slots)
        return relative(*(gather(cache, every, dtype=jnp.float32) for cache in (got[0], want[0])))

    closed = batch // ratio
    read = closed * ratio * channels * 8 + batch * channels * 16
    # A value between two codes may fall to either side: an eighth of it, once in a thousand.
    return Work(fn, each, read + closed * 583, 0, error, 4e-3, state=state)


# --- the list --------------------------------------------------------------------------------------------------------
def cache_cases() -> Iterator[Case]:
    """The tokens of a decode step into both caches; the entries that they close."""
    for layout in LAYOUTS:
        make = functools.partial(_write, layout=layout)
        yield Case(f"cache-{layout}-t128", "cache", {"tokens": 128, "slots": 1 << 18}, make, reach=5.0)
    for ratio in (4, 128):
        sizes = {"batch": 128, "ratio": ratio, "page_size": 256, "pages": 16}
        yield Case(f"cache-compress-{ratio}-b128", "cache", sizes, _compress)
