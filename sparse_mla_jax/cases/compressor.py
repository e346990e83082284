"""Cases of DeepSeek-V4's compressor."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax import reference
from sparse_mla_jax.cases.answers import entries_error, relative
from sparse_mla_jax.cases.case import KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    COMPRESSOR_FREQUENCIES,
    ROPE,
    VALUE_DIM,
    gather,
    permutation,
    seed,
)
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, CompressorWeights, compress, entry_pages


def _compress(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Entries of one decode step: every ratio-th of the requests closes a window."""
    del query
    batch, ratio, page_size = sizes["batch"], sizes["ratio"], sizes["page_size"]
    dim, overlap = VALUE_DIM, ratio == 4
    channels, pages = (2 if overlap else 1) * dim, sizes["pages"]

    def state():
        _, entries = entry_pages(jnp.zeros((0, 0), jnp.int32), page_size=page_size, ratio=ratio)
        cache = _compressor_cache(flavour, False, batch * pages, entries)
        shape = CompressorState.create(batch, ratio=ratio, dim=dim, overlap=overlap).kv.shape
        return cache, CompressorState(*(jax.random.normal(seed(19 + i), shape, jnp.float32) for i in range(2)))

    def each(number):
        # Consecutive positions: every ratio-th request, the first included, closes a window. None is a first window.
        positions = pages * page_size // 2 - 1 + jnp.arange(batch, dtype=jnp.int32)
        table = permutation(seed(21, number), batch * pages).reshape(batch, pages)
        kv, gate = (jax.random.normal(seed(22 + i, number), (batch, channels), jnp.float32) for i in range(2))
        bias = jax.random.normal(seed(24, number), (ratio, channels), jnp.float32)
        # Make the metadata here, so that it is not timed: a step makes it once for all layers.
        return kv, gate, bias, jnp.ones(dim, jnp.float32), decode_metadata(positions + 1, table, page_size=page_size)

    def fn(cache, state, kv, gate, bias, norm, metadata, *, implementation=None):
        weights = CompressorWeights(bias, norm, jnp.full((ROPE // 2,), 0.01, jnp.float32))
        return compress(cache, state, kv, gate, weights, metadata, implementation=implementation)

    def error(arguments, got):
        want = jax.jit(functools.partial(fn, implementation="reference"))(*arguments)
        after, wanted = (jax.tree.leaves(x[1]) for x in (got, want))
        if not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(after, wanted)):
            return math.inf
        every = jnp.arange(got[0].num_slots)
        return relative(*(gather(cache, every, dtype=jnp.float32) for cache in (got[0], want[0])))

    closed = batch // ratio
    read = closed * ratio * channels * 8 + batch * channels * 16
    # A value halfway between two codes may round either way: an error of an eighth, once in a thousand values.
    return Work(fn, each, read + closed * 583, 0, error, 4e-3, state=state)


def _compressor_cache(kind: str, indexer: bool, pages: int, entries: int) -> Any:
    if indexer:
        return PagedIndexCache.create(pages, entries, dim=128, dtype=jnp.dtype(kind))
    sizes: Any = dict(latent_dim=448, rope_dim=64, group_size=64, scale_dtype=jnp.float8_e8m0fnu)
    return PagedKVCache.create(pages, entries, dtype=jnp.dtype(kind), **sizes)


def _compress_step(
    cache, state, kv, gate, bias, norm, table, seq_lens, query_lens, *, page_size, implementation="triton", plan=None
):
    metadata = build_metadata(seq_lens, query_lens, table, num_tokens=kv.shape[0], page_size=page_size)
    weights = CompressorWeights(bias, norm, jnp.asarray(COMPRESSOR_FREQUENCIES))
    return compress(cache, state, kv, gate, weights, metadata, implementation=implementation, plan=plan)


def _kernel_compress(
    kind: str, heads: int | None, *, ratio: int, page_size: int, indexer: bool = False
) -> KernelProblem:
    """Four requests: a chunk from position 0, a later chunk, a token that closes a window, a token that does not."""
    del heads
    rng, (dim, overlap) = np.random.default_rng(5), (128 if indexer else 512, ratio == 4)
    channels = 2 * dim if overlap else dim
    before = np.array([0, ratio + 1, 3 * ratio - 1, 3 * ratio], np.int32)
    after = before + np.array([2 * ratio + 3, 2 * ratio + 3, 1, 1], np.int32)
    length = int(after.max())
    kv, gate = (rng.standard_normal((4, length, channels)).astype(np.float32) for _ in range(2))
    weights = [jnp.asarray(rng.standard_normal(n), jnp.float32) for n in ((ratio, channels), (dim,))]
    pages = -(-length // page_size)
    table = jnp.asarray(rng.permutation(4 * pages).reshape(4, pages), jnp.int32)
    entry_table, entries = entry_pages(table, page_size=page_size, ratio=ratio)
    cache = _compressor_cache(kind, indexer, 4 * pages, entries)
    state = CompressorState.create(4, ratio=ratio, dim=dim, overlap=overlap)

    def rows(x, first, last):
        return jnp.concatenate([x[b, i:j] for b, (i, j) in enumerate(zip(first, last))])

    fn = functools.partial(_compress_step, page_size=page_size)
    xla = functools.partial(fn, implementation="xla")
    none = np.zeros_like(before)
    earlier = [rows(x, none, before) for x in (kv, gate)]
    cache, state = jax.jit(xla)(cache, state, *earlier, *weights, table, before, before)
    args = (cache, state, *(rows(x, before, after) for x in (kv, gate)), *weights, table)
    args += jnp.asarray(after), jnp.asarray(after - before)
    kept = jax.jit(xla)(*args)[1]
    with jax.enable_x64(True):
        whole: Any = functools.partial(reference.compress, ratio=ratio, dtype=jnp.float64)
        sequences = [whole(kv[b, :n], gate[b, :n], *weights, COMPRESSOR_FREQUENCIES) for b, n in enumerate(after)]
        want = np.concatenate([np.asarray(entries) for entries in sequences])
    window = np.concatenate([np.arange(n // ratio) for n in after])
    request = np.repeat(np.arange(4), after // ratio)
    slots = np.asarray(entry_table)[request, window // entries] * entries + window % entries

    def error(got):
        cache, state = got
        if any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(kept))):
            return math.inf
        if indexer:
            return entries_error(cache_ops.gather_index(cache, slots, dtype=jnp.float32), want, kind)
        found, rope = cache_ops.gather(cache, slots, dtype=jnp.float32), cache.rope.dtype.name
        parts = (slice(0, 448), kind), (slice(448, None), rope)
        return max(entries_error(found[:, part], want[:, part], k) for part, k in parts)

    closed = int((after // ratio - before // ratio).sum())
    read = 8 * channels * ratio * closed + 4 * (ratio * channels + dim)
    return KernelProblem(fn, args, error, 1.0, read + closed * cache.bytes_per_token)


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "compress",
        "DeepSeek-V4: 6 entries of 448 + 64 values, of 8 tokens each (ratio 4), groups of 64, E8M0 scales",
        functools.partial(_kernel_compress, ratio=4, page_size=16),
    ),
    KernelCase(
        "compress_index",
        "DeepSeek-V4: 6 indexer keys of 128 values, of 8 tokens each (ratio 4)",
        functools.partial(_kernel_compress, ratio=4, page_size=16, indexer=True),
    ),
    KernelCase(
        "compress_128",
        "DeepSeek-V4: 5 entries of 448 + 64 values, of 128 tokens each, groups of 64, E8M0 scales",
        functools.partial(_kernel_compress, ratio=128, page_size=64),
    ),
)
