"""Inputs, oracle and checks of the indexer's scores, for every module that runs them."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.ops.cache import PagedIndexCache
from sparse_mla_jax.ops.indexer import indexer_scores, lightning_indexer, paged_indexer_scores
from support.equivalence import Close, Operator, Same, assert_leaves

FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")
KINDS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz")


def oracle(q, keys, weights, slots):
    """float64 numpy: slots[T, N] into keys[N', D] (scales applied), -1 gives -inf."""
    q, weights = np.asarray(q).astype(np.float64), np.asarray(weights, np.float64)
    out = np.full(slots.shape, -np.inf)
    for t in range(len(q)):
        seen = slots[t] >= 0
        out[t, seen] = weights[t] @ np.maximum(q[t] @ keys[slots[t, seen]].T, 0)
    return out


def make_keys(rng, kind, count, dim, used=None):
    """Stored keys, scales and float64 keys [N, D]; rows that are not in `used` hold NaN."""
    dtype = jnp.dtype(kind)
    poisoned = np.zeros(count, bool)
    if used is not None:
        poisoned[:] = True
        poisoned[list(used)] = False
    if dtype.itemsize > 1:
        values = rng.standard_normal((count, dim)).astype(dtype)
        stored = values.copy()
        stored[poisoned] = np.nan
        return stored, None, values.astype(np.float64)
    values = (rng.standard_normal((count, dim)) * 60).clip(-224, 224).astype(np.float32).astype(dtype)
    scales = np.exp2(rng.uniform(-8, -5, count)).astype(np.float32)
    keys = values.astype(np.float64) * scales[:, None]
    stored = values.view(np.uint8).copy()
    stored[poisoned] = 0x80 if "fnuz" in kind else 0x7F
    scales[poisoned] = np.nan
    return stored, scales, keys


def paged_inputs(
    kind="float32", q_dtype=np.float32, *, tokens, heads, dim, requests, pages, page_size, seed=0, missing=True
):
    """Everything of one paged call, wild values included, and the slots [T, max_length] that it may read."""
    rng = np.random.default_rng([seed, KINDS.index(kind), heads])
    total, length = requests * pages + 3, pages * page_size
    table = rng.permutation(total)[: requests * pages].reshape(requests, pages).astype(np.int32)
    ids = np.sort(rng.integers(0, requests, tokens)).astype(np.int32)
    lengths = rng.integers(0, length + 1, tokens).astype(np.int32)
    lengths[: min(4, tokens)] = [0, length, -5, 2**31 - 1][:tokens]
    if missing:
        table[0, 0], table[-1, -1], ids[-1] = -1, total, requests
    columns = np.arange(length)
    own = table[np.clip(ids, 0, requests - 1)][:, columns // page_size].astype(np.int64)
    slots = own * page_size + columns % page_size
    known = ((ids >= 0) & (ids < requests))[:, None]
    slots = np.where((own >= 0) & (own < total) & known & (columns[None] < lengths[:, None]), slots, -1)
    stored, scales, keys = make_keys(rng, kind, total * page_size, dim, set(slots[slots >= 0].tolist()))
    cache = PagedIndexCache(
        jnp.asarray(stored.reshape(total, page_size, dim)),
        None if scales is None else jnp.asarray(scales.reshape(total, page_size)),
        jnp.dtype(kind),
    )
    q = jnp.asarray(rng.standard_normal((tokens, heads, dim)).astype(q_dtype))
    weights = jnp.asarray(rng.standard_normal((tokens, heads)), jnp.float32)
    return (q, weights, cache, jnp.asarray(table), jnp.asarray(ids), jnp.asarray(lengths)), keys, slots


def contiguous_inputs(kind, q_dtype, tokens, heads, dim, count):
    """Everything of one contiguous call, keys as bytes, NaN in keys that no row sees; float64 scores."""
    rng = np.random.default_rng([tokens, heads])
    starts = rng.integers(4, count - 5, tokens).astype(np.int32)
    ends = np.minimum(starts + rng.integers(0, count, tokens), count - 5).astype(np.int32)
    # Rows that see nothing, one key, all of them.
    starts[:4], ends[:4] = [9, 30, 20, 4], [9, 2, 21, count - 5]
    columns = np.arange(count)[None]
    inside = (columns >= starts[:, None]) & (columns < ends[:, None])
    stored, scales, keys = make_keys(rng, kind, count, dim, used=range(4, count - 5))
    q = jnp.asarray(rng.standard_normal((tokens, heads, dim)), q_dtype)
    weights = jnp.asarray(rng.standard_normal((tokens, heads)), jnp.float32)
    want = oracle(q, keys, weights, np.where(inside, columns, -1))
    return q, *map(jnp.asarray, (stored, scales)), weights, *map(jnp.asarray, (starts, ends)), want


def limit(want, bound=3e-6):
    """float32 sums of D * H products: relative to the size of the scores, since heads cancel."""
    return Close(atol=bound * np.abs(want[np.isfinite(want)]).max(initial=1.0))


def check(got, want, bound=3e-6):
    """Scores within the bound, -inf where nothing is seen and only there."""
    got = np.asarray(got)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    assert_leaves(got, want, limit(want, bound), "scores")


def fp8_bound(implementation):
    """NVIDIA's FP8 units keep about 14 bits of a sum."""
    return 5e-4 if implementation == "triton" and jax.default_backend() == "gpu" else 3e-6


# Rules come with the wanted scores: see `limit`.
paged = Operator(paged_indexer_scores, ("scores",), {}, static=("max_length",))
contiguous = Operator(indexer_scores, ("scores",), {})
select = Operator(lightning_indexer, ("local",), {"local": Same()}, static=("k", "max_length", "memory_limit"))


def verify(operator, implementation, want, *args, bound=3e-6, **keywords):
    """Runs one implementation and compares its scores with the oracle's."""
    got = operator.check(implementation, want, *args, rules={"scores": limit(want, bound)}, **keywords)
    np.testing.assert_array_equal(np.isneginf(np.asarray(got)), np.isneginf(want))
    return got


SHAPES = [
    dict(tokens=5, heads=4, dim=32, requests=3, pages=5, page_size=16),  # decode: a request per token or so
    dict(tokens=40, heads=6, dim=20, requests=2, pages=7, page_size=8),  # prefill: many tokens per request
]


def check_contiguous(implementation, kind):
    """Rows of every kind over contiguous keys, scales [N] and [N, 1], NaN in keys that no row sees."""
    rng = np.random.default_rng(1)
    stored, scales, keys = make_keys(rng, kind, 75, 20, used=range(4, 70))
    stored = stored if scales is None else stored.view(jnp.dtype(kind))
    starts = np.asarray([4, 10, 69, 30, 80, 5, 60, 4], np.int32)
    lengths = np.asarray([66, 1, 1, 0, 4, -3, 10, 30], np.int32)
    columns = np.arange(75)[None]
    inside = (columns >= starts[:, None]) & (columns < starts[:, None] + np.maximum(lengths, 0)[:, None])
    slots = np.where(inside, columns, -1)
    q = jnp.asarray(rng.standard_normal((8, 6, 20)), jnp.bfloat16 if "fnuz" in kind else jnp.float32)
    weights = jnp.asarray(rng.standard_normal((8, 6)), jnp.float32)
    for shape in ((75,), (75, 1)):
        scale = None if scales is None else jnp.asarray(scales).reshape(shape)
        rows = dict(row_starts=jnp.asarray(starts), row_lengths=jnp.asarray(lengths))
        want = oracle(q, keys, weights, slots)
        verify(contiguous, implementation, want, q, jnp.asarray(stored), scale, weights, **rows)
