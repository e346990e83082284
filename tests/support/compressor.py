"""Compressors, their tokens and caches, entries by the definition in float64, and steps that feed them."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax import reference
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, gather, gather_index
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages
from support.equivalence import Close, Operator, assert_leaves, assert_same_bits

FNUZ, FN, BF16, F32 = jnp.float8_e4m3fnuz, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
FP8, E8M0 = (FNUZ, FN), jnp.float8_e8m0fnu
FIELDS = ("positions", "request_ids", "query_indptr", "seq_lens", "page_table", "page_size")


def plain_step(
    cache, state, kv, gate, weights, table, seq_lens, query_lens, ids=None, *, page_size, decode=False, implementation
):
    if decode:
        m = decode_metadata(seq_lens, table, page_size=page_size)
    else:
        m = build_metadata(seq_lens, query_lens, table, num_tokens=kv.shape[0], page_size=page_size)
    owners = {name: getattr(m, name) for name in FIELDS}
    how: Any = dict(ratio=weights[0].shape[0], implementation=implementation)
    return compress(cache, state, kv, gate, *weights, state_ids=ids, **owners, **how)


step = Operator(plain_step, ("cache", "state"), {}, static=("page_size", "decode"), name="compress")


@dataclasses.dataclass(frozen=True)
class Case:
    """One compressor and its cache; `rope` values of `dim` are rotated; no `group`: an indexer's cache."""

    ratio: int
    overlap: bool
    page_size: int
    dtype: Any = F32
    dim: int = 12
    rope: int = 4
    group: int = 4
    scale_dtype: Any = F32

    def __str__(self):
        kinds = [jnp.dtype(d).name.removeprefix("float8_") for d in (self.dtype, self.scale_dtype)]
        sizes = (self.ratio, "overlap" if self.overlap else "alone", self.page_size, self.dim, self.rope, self.group)
        return "-".join(map(str, (*sizes, *kinds)))

    @property
    def channels(self):
        return self.dim * (1 + self.overlap)

    def tokens(self, *shape, seed=0):
        """kv and gate of tokens [..., C]."""
        rng = np.random.default_rng([seed, 7])
        kv, gate = (rng.standard_normal((*shape, self.channels)).astype(np.float32) for _ in range(2))
        return kv, 2 * gate

    def weights(self):
        rng = np.random.default_rng(self.ratio)
        bias, norm = (rng.standard_normal(n).astype(np.float32) for n in ((self.ratio, self.channels), self.dim))
        return bias, norm, (10.0 ** -np.arange(self.rope // 2)).astype(np.float32)

    def cache(self, pages, fill=None):
        """An empty cache, or one whose every byte is 0xFF (NaN)."""
        entries = max(1, self.page_size // self.ratio)
        if not self.group:
            cache: Any = PagedIndexCache.create(pages, entries, dim=self.dim, dtype=self.dtype)
        else:
            sizes: Any = dict(latent_dim=self.dim - self.rope, rope_dim=self.rope, group_size=self.group)
            cache = PagedKVCache.create(pages, entries, dtype=self.dtype, scale_dtype=self.scale_dtype, **sizes)
        return cache if fill is None else filled(cache)

    def state(self, requests, fill=None):
        state = CompressorState.create(requests, ratio=self.ratio, dim=self.dim, overlap=self.overlap)
        return state if fill is None else filled(state)

    def table(self, requests, length, seed=0):
        pages = -(-length // self.page_size)
        order = np.random.default_rng(seed).permutation(requests * pages + 3)
        return order[: requests * pages].reshape(requests, pages).astype(np.int32), order.size

    def slots(self, table, windows):
        """Slot of every entry of every request, [B, windows]."""
        table, entries = entry_pages(table, page_size=self.page_size, ratio=self.ratio)
        w = np.arange(windows)
        return np.asarray(table)[:, w // entries] * entries + w % entries

    def entries(self, cache, slots):
        """What the cache holds at slots[...], float32[..., dim]."""
        every = (gather_all if self.group else gather_all_keys)(cache)
        return np.asarray(every)[slots]

    def expected(self, kv, gate):
        """Entries of sequences kv[B, n, C] in float64, [B, n // ratio, dim]."""
        return definition(self, kv.tobytes(), gate.tobytes(), len(kv))

    def check(self, got, want):
        allowed = np.full(want.shape, 5e-6)
        latent = self.dim - self.rope if self.group else self.dim
        unit = {F32: 2.0**-24, BF16: 2.0**-8}.get(self.dtype, 2.0**-4)
        allowed[:, :latent] += unit * np.abs(want[:, :latent])
        if self.dtype in FP8:
            allowed[:, :latent] += 2.0**-10 / 224 * np.abs(want[:, :latent]).max(axis=1, keepdims=True)
        if self.dtype != F32:
            allowed[:, latent:] += 2.0**-8 * np.abs(want[:, latent:])
        chex.assert_tree_all_finite(got)
        assert_leaves(got, want, Close(atol=allowed), f"entries of {self}")

    def ring(self, kv, gate, kept):
        """The state's row after a sequence: what its last S tokens left, `kept` elsewhere."""
        size, bias = (1 + self.overlap) * self.ratio, self.weights()[0]
        rows = np.array(kept.kv), np.array(kept.gate)
        for p in range(max(0, len(kv) - size), len(kv)):
            rows[0][p % size], rows[1][p % size] = kv[p], gate[p] + bias[p % self.ratio]
        return rows


@functools.lru_cache(maxsize=4)
def definition(case, kv, gate, requests):
    rows = [np.frombuffer(x, np.float32).reshape(requests, -1, case.channels) for x in (kv, gate)]
    with jax.enable_x64(True):
        one: Any = functools.partial(reference.compress, ratio=case.ratio, dtype=jnp.float64)
        return np.asarray(jax.jit(jax.vmap(one, in_axes=(0, 0, None, None, None)))(*rows, *case.weights()))


def filled(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8).view(x.dtype).reshape(x.shape)), tree
    )


@jax.jit
def gather_all(cache):
    return gather(cache, jnp.arange(cache.num_slots), dtype=F32)


@jax.jit
def gather_all_keys(cache):
    return gather_index(cache, jnp.arange(cache.num_slots), dtype=F32)


def same(got, want):
    assert_same_bits(got, want, "compress")


def run(case, kv, gate, steps, table, cache, state, *, tokens, implementation, ids=None, jitted=step):
    """Feeds kv[B, n, C], gate[B, n, C] in steps of so many tokens of each request; padding rows are NaN."""
    done = np.zeros(len(kv), np.int32)
    for lengths in np.asarray(steps, np.int32):
        rows = []
        for x in (kv, gate):
            row = np.full((tokens, case.channels), np.nan, np.float32)
            taken = np.concatenate([x[b, d : d + n] for b, (d, n) in enumerate(zip(done, lengths))])
            row[: len(taken)] = taken
            rows.append(row)
        done = done + lengths
        seq_lens = np.where(lengths > 0, done, 0).astype(np.int32)
        how: Any = dict(page_size=case.page_size, implementation=implementation)
        cache, state = jitted(cache, state, *rows, case.weights(), table, seq_lens, lengths, ids, **how)
    return cache, state
