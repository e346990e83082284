"""Cases of cache writes: a step's tokens into both caches, and the compressors' entries."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.cases.answers import (
    relative,
)
from sparse_mla_jax.cases.case import FP8, Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.compressor import _compress
from sparse_mla_jax.cases.inputs import (
    DIM,
    LAYOUTS,
    PAGE,
    ROPE,
    gather,
    gather_index,
    index_cache,
    kv_cache,
    nbytes,
    random_cache,
    random_index_keys,
    random_slots,
    seed,
)
from sparse_mla_jax.ops import cache as cache_ops


# --- cache writes
def _write(sizes: Mapping[str, int], flavour: str, query: str, *, layout: str) -> Work:
    """`write_token` of one step's tokens into donated caches."""
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


# --- the list
def cache_cases() -> Iterator[Case]:
    """Writes of a decode step's tokens into both caches, and of the entries that they close."""
    for layout in LAYOUTS:
        make = functools.partial(_write, layout=layout)
        yield Case(f"cache-{layout}-t128", "cache", {"tokens": 128, "slots": 1 << 18}, make, reach=5.0)
    for ratio in (4, 128):
        sizes = {"batch": 128, "ratio": ratio, "page_size": 256, "pages": 16}
        yield Case(f"cache-compress-{ratio}-b128", "cache", sizes, _compress)


def _kernel_cache_write(kind: str, heads: int | None, *, latent: int, group: int, scale_dtype: Any) -> KernelProblem:
    """A write in which some tokens are skipped and one is overwritten by a later token of the same slot."""
    del heads
    rng, tokens = np.random.default_rng(4), 8
    cache = random_cache(rng, kind, latent, group, scale_dtype)
    index = random_index_keys(rng, kind, 512)
    rows = [jnp.asarray(rng.standard_normal((tokens, n)), jnp.float32) for n in (latent, 64, 128)]
    slots = jnp.asarray([5, 511, -1, 70, 512, 5, 0, 300], jnp.int32)
    want = jax.jit(functools.partial(cache_ops.write_token, implementation="reference"))(cache, index, *rows, slots)

    def fn(cache, index, *arguments, implementation="triton", plan=None):
        return cache_ops.write_token(cache, index, *arguments, implementation=implementation, plan=plan)

    def error(got):
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
        return float(sum((np.asarray(a).view(np.uint8) != np.asarray(b).view(np.uint8)).sum() for a, b in pairs))

    token = cache.bytes_per_token + index.bytes_per_token
    return KernelProblem(fn, (cache, index, *rows, slots), error, 0.0, nbytes(rows, slots) + 5 * token)


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "cache_write",
        "DeepSeek-V3.2: 8 tokens of 512 + 64 values and a key of 128, groups of 128, float32 scales",
        functools.partial(_kernel_cache_write, latent=512, group=128, scale_dtype=jnp.float32),
    ),
    KernelCase(
        "cache_write_v4",
        "DeepSeek-V4: 8 tokens of 448 + 64 values and a key of 128, groups of 64, E8M0 scales",
        functools.partial(_kernel_cache_write, latent=448, group=64, scale_dtype=jnp.float8_e8m0fnu),
        FP8,
    ),
)
