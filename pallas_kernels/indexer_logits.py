"""Indexer scores: sum over heads of weight * relu(q . key), times the key's scale, in float32.

Letters: T tokens, H heads, D dimensions, N columns (keys that a token may score), K keys of a block. Contiguous keys: a
program holds one block of keys and scores it for a few tokens in turn. Paged: a program walks over a few blocks of the
keys of one token. FP8 keys are loaded as bytes and decoded exactly to bfloat16. If the queries are FP8 too, NVIDIA's
tensor cores multiply both without decoding. In that case, and in interpret mode, +-240 of e4m3fnuz counts as +-224
(`fp8_nvidia`). Columns outside a token's interval are -inf. A product never mixes columns, so garbage that was loaded
for them is not cleared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import fp8_nvidia
from pallas_kernels._call import call, load
from pallas_kernels.fp8_nvidia import NATIVE
from pallas_kernels.indexer_tiles import (
    IndexerRefs,
    IndexerSpecialization,
    load_keys,
    load_queries,
    load_scales,
    score_keys,
    store_rows,
)
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan
from pallas_kernels.targets import CDNA, Target, by_target


# --- contiguous keys
class TokenIntervals(NamedTuple):
    """Columns start..end-1 of tokens, int32; is_seen: whether they overlap the program's keys."""

    start: Array
    end: Array
    is_seen: Array


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGroups:
    """The tokens of a program, in groups of dot_tokens.

    Attributes:
      start_ref, end_ref: int32 [T], intervals of columns.
      low: first column of the program's keys.
      first_token: first token.
      count: number of groups.
      s: compile-time constants of the kernel.
    """

    start_ref: Any
    end_ref: Any
    low: Array
    first_token: Array
    count: Array
    s: IndexerSpecialization

    def find_token(self, group: Array) -> Array:
        """First token of a group."""
        # The last group may repeat tokens of the previous one, with the same results.
        return jnp.minimum(self.first_token + group * self.s.plan.dot_tokens, self.s.tokens - self.s.plan.dot_tokens)

    def load_intervals(self, tokens: Array) -> TokenIntervals:
        """Intervals of one token, or of tokens [n]."""
        start, end = load(self.start_ref.at[tokens]), load(self.end_ref.at[tokens])
        return TokenIntervals(start, end, (start < self.low + self.s.plan.key_block) & (end > self.low) & (end > start))

    def find_seen(self) -> tuple[Array, Array]:
        """Range begin..stop-1 from the first to the last group that sees a key of the program."""
        lane = jnp.arange(self.s.plan.token_block, dtype=jnp.int32)
        group = jnp.minimum(lane // self.s.plan.dot_tokens, self.count - 1)
        is_seen = self.load_intervals(self.find_token(group) + lane % self.s.plan.dot_tokens).is_seen  # [token_block]
        stop = jnp.max(jnp.where(is_seen, group + 1, 0), axis=0)
        return jnp.minimum(jnp.min(jnp.where(is_seen, group, self.count), axis=0), stop), stop


def _ragged_kernel(*refs, s: IndexerSpecialization):
    """Grid (key blocks, token blocks): out[token_block, key_block] of keys that all tokens share."""
    named, together = IndexerRefs.of(refs, s), s.plan.dot_tokens
    low, first_token = pl.program_id(0) * s.plan.key_block, pl.program_id(1) * s.plan.token_block
    columns = low + jnp.arange(s.plan.key_block, dtype=jnp.int32)  # [K]
    count = jnp.minimum(s.plan.token_block, s.tokens - first_token + together - 1) // together
    start_ref, end_ref = named.others
    groups = TokenGroups(start_ref, end_ref, low, first_token, count, s)
    begin, stop = groups.find_seen()
    slots = columns if s.columns % s.plan.key_block == 0 else jnp.minimum(columns, s.columns - 1)
    scales = load_scales(named, slots, s)  # [K, 1] or [1, 1]

    def score_group(keys, group, _):
        token = groups.find_token(group)
        tokens = token if together == 1 else token + jnp.arange(together, dtype=jnp.int32)
        start, end, is_seen = groups.load_intervals(tokens)
        # [K, dot_tokens]
        inside = (columns[:, None] >= start.reshape(1, -1)) & (columns[:, None] < end.reshape(1, -1))

        def score():
            return score_keys(load_queries(named, token, s), keys, scales, inside, s)

        # Do not skip unseen groups if loads are pipelined: conditional loads are not issued ahead.
        skip = together == 1 and s.plan.num_stages == 1
        scores = jax.lax.cond(is_seen, score, lambda: s.unseen_scores) if skip else score()
        store_rows(named.out, token, columns, scores, s)
        return ()

    def score_seen(_, keys):
        jax.lax.fori_loop(begin, stop, functools.partial(score_group, keys), ())
        return jnp.zeros_like(keys)

    def store_unseen(i, _):
        group = jnp.where(i < begin, i, i + (stop - begin))
        store_rows(named.out, groups.find_token(group), columns, s.unseen_scores, s)
        return ()

    # `if` written as a 0/1-trip loop: a loop-carried operand stays in shared memory; otherwise Triton reloads it into
    # registers for every dot.
    jax.lax.fori_loop(0, jnp.minimum(stop - begin, 1), score_seen, load_keys(named.keys, slots, s))
    jax.lax.fori_loop(0, count - (stop - begin), store_unseen, ())


# --- paged keys
class PagedKeys(NamedTuple):
    """A block of keys that is loaded one step ahead.

    Attributes:
      slot: first slot of the block, or the slots of all its keys [K].
      exists: whether the page of the block exists, or the page of each key [K].
      scales: float32 [K, 1] or [1, 1].
      keys: [K, D padded], or () if the compiler prefetches them.
    """

    slot: Array
    exists: Array
    scales: Array
    keys: Any


@dataclasses.dataclass(frozen=True, eq=False)
class KeyBlocks:
    """The blocks of keys of one token that a program walks over, numbered from 0.

    Attributes:
      refs: the kernel's arguments; `refs.others[0]` is the page table, int32 [requests, pages].
      request: row of the page table.
      first: the program's first block, counted from the token's first key.
      lane: columns of a block [K], from 0 on.
      s: compile-time constants of the kernel.
    """

    refs: IndexerRefs
    request: Array
    first: Array
    lane: Array
    s: IndexerSpecialization

    def columns_of(self, i: Array | int) -> Array:
        """Columns [K] of block i."""
        return (self.first + i) * self.s.plan.key_block + self.lane

    def load_page(self, i: Array | int) -> Array:
        """Loads the page of block i, or the pages of its columns [K]; past the last block, those of the last block."""
        s, page_ref, block = self.s, self.refs.others[0], self.s.plan.key_block
        # Under jax_enable_x64 `div` takes a Python integer as int64.
        page_size = jnp.int32(s.page_size)
        low = jnp.minimum(self.first + i, -(-s.columns // block) - 1) * block
        if s.page_size % block == 0:
            return page_ref[self.request, jax.lax.div(low, page_size)]
        number = jax.lax.div(jnp.minimum(low + self.lane, s.columns - 1), page_size)  # [K]
        return load(page_ref.at[jnp.full_like(number, self.request), number])

    def find_slots(self, i: Array | int, page: Array) -> tuple[Array, Array]:
        """First slot of block i, or its slots [K], and whether their pages exist."""
        s = self.s
        low = (self.first + i) * s.plan.key_block
        exists = (page >= 0) & (page < s.num_slots // s.page_size)
        offset = jax.lax.rem(low if page.ndim == 0 else low + self.lane, jnp.int32(s.page_size))
        return jnp.where(exists, page * s.page_size, 0) + offset, exists

    def load_keys(self, slot: Array) -> Array:
        """Keys [K, D padded] of a block."""
        return load_keys(self.refs.keys, self._spread(slot), self.s)

    def fetch(self, i: Array | int, page: Array) -> PagedKeys:
        """Loads block i, which lies in `page`."""
        slot, exists = self.find_slots(i, page)
        scales = load_scales(self.refs, self._spread(slot), self.s)
        # Prefetch keys by hand only if they must be decoded: the compiler prefetches other keys.
        return PagedKeys(slot, exists, scales, self.load_keys(slot) if self.s.is_packed else ())

    def _spread(self, slot: Array) -> Array:
        return slot + self.lane if slot.ndim == 0 else slot


def _score_blocks(blocks: KeyBlocks, token: Array, length: Array, filled: Array) -> None:
    """Scores the first `filled` blocks (at least one) of a token that sees `length` keys."""
    refs, s = blocks.refs, blocks.s
    queries: Iterable = load_queries(refs, token, s)
    # Load the queries before the loop, which would load them again in every step.
    queries = list(queries) if s.plan.key_steps > 1 else queries

    def score_block(i, state):
        # loaded: block i. page: the page of block i + 1.
        loaded, page = state
        ahead = blocks.fetch(i + 1, page)
        keys = loaded.keys if s.is_packed else blocks.load_keys(loaded.slot)
        columns = blocks.columns_of(i)
        inside = (loaded.exists & (columns < length))[:, None]  # [K, 1]
        store_rows(refs.out, token, columns, score_keys(queries, keys, loaded.scales, inside, s), s)
        return ahead, blocks.load_page(i + 2)

    state = blocks.fetch(0, blocks.load_page(0)), blocks.load_page(1)
    if s.plan.key_steps > 1:
        jax.lax.fori_loop(0, filled, score_block, state)
    else:
        score_block(0, state)


def _paged_kernel(*refs, s: IndexerSpecialization):
    """Grid (runs of key blocks, T): out[token, key_steps * key_block] of keys in the pages of the token's request."""
    named, block = IndexerRefs.of(refs, s), s.plan.key_block
    _, request_ref, length_ref = named.others
    token, first = pl.program_id(1), pl.program_id(0) * s.plan.key_steps
    lane = jnp.arange(block, dtype=jnp.int32)
    length = jnp.minimum(length_ref[token], s.columns)
    request = jnp.clip(request_ref[token], 0, s.num_requests - 1)
    blocks = KeyBlocks(named, request, first, lane, s)
    steps = jnp.minimum(s.plan.key_steps, -(-s.columns // block) - first)
    filled = jnp.clip((length + block - 1) // block - first, 0, steps)

    def store_unseen(i, _):
        store_rows(named.out, token, blocks.columns_of(i), s.unseen_scores, s)
        return ()

    jax.lax.cond(filled > 0, lambda: _score_blocks(blocks, token, length, filled), lambda: None)
    jax.lax.fori_loop(filled, steps, store_unseen, ())


# --- launch
class IndexerOperands(NamedTuple):
    """q and keys as a kernel loads them, flavour of FP8 keys (or None), type of both factors of a product."""

    q: Array
    keys: Array
    fp8: jnp.dtype | None
    compute: jnp.dtype


def _convert_operands(q: Array, keys: Array, dtype: jnp.dtype, target: Target) -> IndexerOperands:
    """Chooses the type in which q[T, H, D] and keys[..., D] are multiplied; `dtype` is the type of the keys."""
    fp8 = jnp.dtype(dtype) if keys.dtype == jnp.uint8 else None
    if q.dtype.itemsize == 1 and (fp8 is None or target in CDNA):
        q = q.astype(jnp.bfloat16)
    float32 = q.dtype == jnp.float32 or keys.dtype == jnp.float32
    compute = NATIVE if q.dtype.itemsize == 1 else jnp.dtype(jnp.float32 if float32 else jnp.bfloat16)
    if compute == NATIVE:
        # A bitcast costs nothing: XLA passes the same bytes on.
        q, keys = (jax.lax.bitcast_convert_type(x, NATIVE) for x in (q, keys))
        q = q if fp8 == NATIVE else fp8_nvidia.saturate(q)
    return IndexerOperands(q, keys, fp8, compute)


@dataclasses.dataclass(frozen=True)
class IndexerLaunch:
    """Static arguments of a launch.

    Attributes:
      kernel: its body.
      name: its name in profilers.
      dtype: type of the keys.
      columns: N.
      plan: None for the heuristic plan.
      pages: (page size, number of requests); (0, 0) for contiguous keys.
    """

    kernel: Callable[..., None]
    name: str
    dtype: jnp.dtype
    columns: int
    plan: IndexerPlan | None
    pages: tuple[int, int] = (0, 0)

    def run(self, target: Target, q: Array, keys: Array, scales: Array | None, weights: Array, *others: Array) -> Array:
        """Launches the kernel: scores float32 [T, N]. others: arguments that only this kernel has."""
        q, keys, fp8, compute = _convert_operands(q, keys, self.dtype, target)
        (tokens, heads, dim), shared, columns = q.shape, self.pages == (0, 0), self.columns
        plan = choose_plan(
            self.name,
            self.plan,
            indexer_plan,
            tokens=tokens,
            heads=heads,
            columns=columns,
            itemsize=compute.itemsize,
            shared_keys=shared,
            target=target,
        )
        scaled, num_slots = scales is not None, math.prod(keys.shape[:-1])
        s = IndexerSpecialization(
            tokens, heads, dim, columns, num_slots, fp8, compute, scaled, plan, target, *self.pages
        )
        blocks = -(-columns // plan.key_block)
        return call(
            functools.partial(self.kernel, s=s),
            q.reshape(tokens * heads, dim),
            keys.reshape(num_slots, dim),
            weights.reshape(-1),
            *others,
            *([] if scales is None else [scales.reshape(-1)]),
            out_shape=jax.ShapeDtypeStruct((tokens, columns), jnp.float32),
            grid=(blocks, -(-tokens // plan.token_block)) if shared else (-(-blocks // plan.key_steps), tokens),
            name=self.name,
            target=target,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


def ragged(
    q: Array,
    keys: Array,
    dtype: jnp.dtype,
    scales: Array | None,
    weights: Array,
    starts: Array,
    ends: Array,
    *,
    plan: IndexerPlan | None = None,
) -> Array:
    """Scores of contiguous keys, float32 [T, N]: row t scores columns starts[t]..ends[t]-1; the others are -inf.

    q[T, H, D], keys[N, D] (FP8 as bytes of flavour `dtype`), scales[N] or None, weights[T, H].
    """
    launch = IndexerLaunch(_ragged_kernel, "ragged_indexer_logits", dtype, keys.shape[0], plan)
    return by_target(launch.run, q, keys, scales, weights, starts, ends)


def paged(
    q: Array,
    keys: Array,
    dtype: jnp.dtype,
    scales: Array | None,
    weights: Array,
    page_table: Array,
    request_ids: Array,
    lengths: Array,
    *,
    max_length: int,
    plan: IndexerPlan | None = None,
) -> Array:
    """Scores of the keys of each token's request, found through the page table: float32 [T, max_length].

    q[T, H, D], keys[pages, page, D] (FP8 as bytes of flavour `dtype`), scales[pages, page] or None, weights[T, H].
    """

    pages = (keys.shape[1], page_table.shape[0])
    launch = IndexerLaunch(_paged_kernel, "paged_indexer_logits", dtype, max_length, plan, pages)
    return by_target(launch.run, q, keys, scales, weights, page_table, request_ids, lengths)
