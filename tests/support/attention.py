"""Inputs, oracle and checks of sparse_mla, for every module that runs it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import sparse_attention
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.ragged import DenseRows, Ragged
from support.equivalence import QUICK_COMPILE, Close, Norm, Operator

SCALE = 0.17
LENGTHS = (0, 1, 15, 16, 17, 100, 2048)
HEADS = (1, 4, 6, 16, 64, 128)
KINDS = ("float32", "bfloat16", "float8_e4m3fn", "float8_e4m3fnuz")
WILD = (-1, -7, -(2**31), 2**31 - 1)
# float32: rounding of sums. bfloat16: rounding the result alone costs 2**-8 / sqrt(3) / 1.39 = 1.6e-3 in the norm, so
# 2e-3 leaves room for nothing else: products and probabilities must be exact to 16 bits.
BOUND = {"float32": 1e-5, "bfloat16": 2e-3}


# Scores of float16 keys: 2**-12 of a key's own size, unless its scales are powers of two (then exact); the oracle's
# scores reach 30 here.
FLOAT16_BOUND = {np.float32: (4e-3, 1e-2), jnp.float8_e8m0fnu: (2e-3, 2e-5)}


def oracle(q, sources, value_dim, sinks=None):
    """float64 numpy, a loop over rows: sources are (keys[N, D], list of slot lists)."""
    q = np.asarray(q).astype(np.float64)
    out, lse = np.zeros((*q.shape[:2], value_dim)), np.full(q.shape[:2], -np.inf)
    for t in range(q.shape[0]):
        keys = np.concatenate([k[[s for s in rows[t] if 0 <= s < len(k)]] for k, rows in sources])
        if not len(keys):
            continue
        logits = SCALE * q[t] @ keys.T
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        lse[t] = np.log(weights.sum(axis=1)) + top[:, 0]
        out[t] = weights @ keys[:, :value_dim] / weights.sum(axis=1, keepdims=True)
        if sinks is not None:
            with np.errstate(over="ignore"):
                out[t] /= 1 + np.exp(np.asarray(sinks, np.float64) - lse[t])[:, None]
    return out, lse


def make_cache(rng, kind, latent, rope, group, *, pages=64, page_size=64, used=None, scale_dtype=np.float32):
    """A cache and its float64 keys [N, D]; slots that are not in `used` hold NaN in every array."""
    dtype, slots = jnp.dtype(kind), pages * page_size
    rope_dtype = dtype if kind == "float32" else jnp.dtype(jnp.bfloat16)
    ropes = rng.standard_normal((slots, rope)).astype(rope_dtype)
    poisoned = np.ones(slots, bool) if used is not None else np.zeros(slots, bool)
    if used is not None:
        poisoned[list(used)] = False
    scale = None
    if dtype.itemsize == 1:
        values = (rng.standard_normal((slots, latent)) * 60).clip(-224, 224).astype(np.float32).astype(dtype)
        scale = np.exp2(rng.uniform(-8, -5, (slots, latent // group))).astype(np.float32)
        if scale_dtype != np.float32:
            scale = np.exp2(np.round(np.log2(scale))).astype(scale_dtype)
        keys = values.astype(np.float64) * np.repeat(scale.astype(np.float64), group, axis=1)
        stored = values.view(np.uint8).copy()
        stored[poisoned] = 0x80 if "fnuz" in kind else 0x7F
        if scale_dtype == np.float32:
            scale[poisoned] = np.nan
        stored = stored.view(np.uint32)
    else:
        values = rng.standard_normal((slots, latent)).astype(dtype)
        keys, stored = values.astype(np.float64), values.copy()
        stored[poisoned] = np.nan
    keys = np.concatenate([keys, ropes.astype(np.float64)], axis=1)
    ropes[poisoned] = np.nan
    shape = (pages, page_size)
    return (
        PagedKVCache(
            latent=jnp.asarray(stored.reshape(*shape, -1)),
            scale=None if scale is None else jnp.asarray(scale.reshape(*shape, -1)),
            rope=jnp.asarray(ropes.reshape(*shape, -1)),
            dtype=dtype,
            group_size=group,
        ),
        keys,
    )


def make_rows(rng, lengths, used):
    """Slot lists: `lengths[t]` valid slots with duplicates, wild indices strewn in."""
    used = np.asarray(sorted(used))
    rows = []
    for length in lengths:
        row = list(rng.choice(used, length))
        if length > 2:
            row[1] = row[0]
        for wild in WILD:
            row.insert(int(rng.integers(0, len(row) + 1)), wild)
        rows.append([int(s) for s in row])
    return rows


def as_ragged(rows, spare=37):
    """Rows one after another; behind the last one garbage that must not be read."""
    indptr = np.cumsum([0] + [len(r) for r in rows]).astype(np.int32)
    values = np.concatenate([np.asarray(r, np.int32) for r in rows] + [np.arange(spare, dtype=np.int32)])
    return Ragged(values=jnp.asarray(values), indptr=jnp.asarray(indptr))


def as_lengths(rows, spare=19):
    """Rows in front of garbage that must not be read."""
    width = max(len(r) for r in rows) + spare
    values = np.random.default_rng(0).integers(0, 4000, (len(rows), width)).astype(np.int32)
    for t, row in enumerate(rows):
        values[t, : len(row)] = row
    return DenseRows(jnp.asarray(values), jnp.asarray([len(r) for r in rows], jnp.int32))


def as_dense(rows, width=0):
    dense = np.full((len(rows), max(width, *(len(r) for r in rows))), -1, np.int32)
    for t, row in enumerate(rows):
        dense[t, : len(row)] = row
    return jnp.asarray(dense)


def source(cache, rows):
    """What the kernel is given of a cache and rows in any form."""
    arrays = (cache.latent, cache.scale, cache.rope, cache.dtype, cache.group_size)
    if isinstance(rows, Ragged):
        return sparse_attention.Source(*arrays, rows.values, rows.indptr)
    if isinstance(rows, DenseRows):
        return sparse_attention.Source(*arrays, rows.values, None, rows.lengths)
    return sparse_attention.Source(*arrays, rows, None)


def attend(q, kv, rows, sinks=None, extra=None, *, value_dim, implementation):
    options = dict(sm_scale=SCALE, value_dim=value_dim, sinks=sinks, extra=extra, implementation=implementation)
    return sparse_mla(q, kv, rows, return_lse=True, **options)


LSE = Close(rtol=2e-6, atol=2e-5)
run = Operator(attend, ("out", "lse"), {"out": Norm(1e-5), "lse": LSE}, static=("value_dim",), name="sparse_mla")


@functools.partial(jax.jit, static_argnames=("value_dim", "plan"), compiler_options=QUICK_COMPILE)
def launch(q, sources, sinks=None, *, value_dim, plan):
    """The kernel in interpret mode by this plan; sources are pairs of a cache and rows."""
    sources = [source(*pair) for pair in sources]
    return sparse_attention.sparse_attention(q, sources, sm_scale=SCALE, value_dim=value_dim, sinks=sinks, plan=plan)


def rules(bound, lse_bound=2e-5):
    return {"out": Norm(bound), "lse": Close(rtol=2e-6, atol=lse_bound)}


def check(got, want, bound, lse_bound=2e-5, implementation="triton"):
    """Results against the oracle's; rows without keys are exactly 0 and -inf."""
    run.compare(implementation, got, want, rules(bound, lse_bound))
    check_empty(got, want)


def check_empty(got, want):
    empty = np.isneginf(want[1])
    assert (np.asarray(got[0])[empty] == 0).all() and np.isneginf(np.asarray(got[1])[empty]).all()


def verify(implementation, want, *args, bounds=(1e-5,), **keywords):
    """Runs one implementation and compares it with the oracle's results."""
    got = run.check(implementation, want, *args, rules=rules(*bounds), **keywords)
    check_empty(got, want)
    return got


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape with its inputs; `build` makes them."""

    heads: int
    kind: str = "float32"
    q_dtype: str = "float32"
    latent: int = 64
    rope: int = 16
    group: int = 32
    lengths: tuple[int, ...] = LENGTHS
    two: bool = False
    ragged: bool = True

    def build(self, seed=0):
        rng = np.random.default_rng([seed, self.heads, KINDS.index(self.kind)])
        form = as_ragged if self.ragged else as_dense
        sources = []
        for lengths in [self.lengths, (3, 0, 40, 0, 1, 16, 5)][: 1 + self.two]:
            # Slot 0 is always poisoned: it is where masked lanes are clamped to.
            used = 1 + rng.choice(64 * 64 - 1, 1000, replace=False)
            cache, keys = make_cache(rng, self.kind, self.latent, self.rope, self.group, used=used)
            rows = make_rows(rng, lengths, used)
            sources.append((cache, form(rows), keys, rows))
        q = rng.standard_normal((len(self.lengths), self.heads, self.latent + self.rope)).astype(
            jnp.dtype(self.q_dtype)
        )
        sinks = rng.standard_normal(self.heads).astype(np.float32)
        return jnp.asarray(q), sources, jnp.asarray(sinks)

    def verify(self, implementation, sinks_too=True, plain_too=True):
        q, sources, some = self.build()
        extra = sources[1][:2] if self.two else None
        plain = [(keys, rows) for _, _, keys, rows in sources]
        variants = [None] if plain_too else []
        if sinks_too:
            variants += [some, *(jnp.full_like(some, x) for x in (-np.inf, 0.0, 50.0))]
        for sinks in variants:
            want = oracle(q, plain, self.latent, sinks)
            how = dict(bounds=self.bounds(implementation), value_dim=self.latent)
            got = verify(implementation, want, q, *sources[0][:2], sinks, extra, **how)
            assert got[0].dtype == q.dtype and got[1].dtype == jnp.float32

    def bounds(self, implementation):
        """Of the output and of lse: wider where an NVIDIA GPU makes float16 of FP8 keys."""
        float16 = implementation == "triton" and jax.default_backend() == "gpu" and "float8" in self.kind
        return FLOAT16_BOUND[np.float32] if float16 and self.q_dtype == "bfloat16" else (BOUND[self.q_dtype], 2e-5)


def small(kind="float8_e4m3fnuz", heads=6, tokens=3, q_dtype=np.float32, seed=0, latent=32, rope=8, group=32, **kwargs):
    rng = np.random.default_rng(seed)
    cache, keys = make_cache(rng, kind, latent, rope, group, pages=8, page_size=16, **kwargs)
    q = jnp.asarray(rng.standard_normal((tokens, heads, latent + rope)).astype(q_dtype))
    return q, cache, keys, rng
