"""Indexer scores: sum over heads of weight * relu(q . key), times the key's scale, in float32.

Contiguous keys: a program holds one block of keys and scores it for a few tokens in turn. Paged: a program walks over a
few blocks of the keys of one token. FP8 keys are read as bytes and decoded exactly to bfloat16; NVIDIA's units multiply
them by FP8 queries as they are (`fp8_nvidia`; +-240 of e4m3fnuz counts as +-224 there, and in interpret mode). Columns
outside a token's interval are -inf; what was read for them reaches no other column, so garbage is not cleared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import fp8_bits, fp8_nvidia
from pallas_kernels._call import call, load, store
from pallas_kernels._primitives import dot_fp8
from pallas_kernels.fp8_nvidia import NATIVE
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan
from pallas_kernels.targets import CDNA, HOST, Target, by_target
from pallas_kernels.tiles import grid2, power_of_two


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a kernel is specialised for; fp8: flavour of the keys, compute: type of the factors of a product."""

    tokens: int
    heads: int
    dim: int
    columns: int
    num_slots: int
    fp8: jnp.dtype | None
    compute: jnp.dtype
    scaled: bool
    plan: IndexerPlan
    target: Target
    page_size: int = 0
    num_requests: int = 0

    @property
    def nothing(self) -> Array:
        """Scores of keys that are not seen."""
        return jnp.full((self.plan.key_block, self.plan.dot_tokens), -jnp.inf, jnp.float32)

    @property
    def packed(self) -> bool:
        """Whether FP8 keys are decoded four at a time, to their values."""
        return self.fp8 is not None and self.compute == jnp.bfloat16 and self.target not in (HOST, *CDNA)

    @property
    def power(self) -> float:
        """What sums of products are multiplied by, beside the keys' scales (a power of two)."""
        if self.compute == NATIVE:
            return 1.0 if self.fp8 == NATIVE else 0.25
        return 1.0 if self.fp8 is None or self.packed else fp8_bits.power(self.fp8, self.target)


# --- arithmetic on arrays --------------------------------------------------------------------------------------------
def head_sums(q: Array, keys: Array, weights: Array, s: _Static) -> Array:
    """float32 [K, tokens]: sums over heads of weights[tokens * H] * relu(q[tokens * H, D] . keys[K, D])."""

    def dot(a, b):
        if s.compute == NATIVE:
            return dot_fp8(a, b, s.target)
        dims, highest = (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST
        return jax.lax.dot_general(a, b, dims, precision=highest, preferred_element_type=jnp.float32)

    if not s.plan.keys_first:
        return jnp.sum(jnp.maximum(dot(q, keys), 0.0) * weights[:, None], axis=0)[:, None]
    products = jnp.maximum(dot(keys, q), 0.0) * weights[None, :]
    if s.plan.dot_tokens == 1:
        # Not reshaped to [K, 1, H]: the sum then goes through shared memory.
        return jnp.sum(products, axis=1)[:, None]
    return jnp.sum(products.reshape(keys.shape[0], s.plan.dot_tokens, -1), axis=2)


# --- pieces of the kernels -------------------------------------------------------------------------------------------
def _dims(s: _Static) -> tuple[Array, bool]:
    """Dimensions [D padded to a power of two] that a tile reads, and whether all of them exist."""
    d = jnp.arange(max(32 if s.compute == NATIVE else 16, power_of_two(s.dim)), dtype=jnp.int32)
    # A select hides from Triton that columns are consecutive, and with it wide loads.
    return (d, True) if d.shape[0] == s.dim else (jnp.where(d < s.dim, d, 0), False)


def _load_keys(key_ref, slots: Array, s: _Static) -> Array:
    """Keys of slots[K] in the compute dtype, [K, D padded]; short of `s.power` where FP8 is decoded to floats.

    Padding repeats dimension 0: it is the queries that are 0 there.
    """
    keys = load(key_ref.at[grid2(slots, _dims(s)[0])])
    if s.compute == NATIVE:
        return keys if s.fp8 == NATIVE else fp8_nvidia.saturate(keys, s.target)
    if s.fp8 is None:
        return keys.astype(s.compute)
    if s.packed:
        return fp8_nvidia.decode_bfloat16(keys, s.fp8)
    raw = fp8_bits.decode_codes(keys, s.fp8, s.target)
    return fp8_bits.truncate_to_bfloat16(raw) if s.compute == jnp.bfloat16 else raw


def _queries(q_ref, weight_ref, token, s: _Static) -> Iterator[tuple[Array, Array]]:
    """Loads dot_tokens tokens by blocks of heads: queries [tokens * heads, D padded], weights [tokens * heads]."""
    count = s.plan.head_block * s.plan.dot_tokens
    d, whole = _dims(s)
    for first in range(0, s.heads, s.plan.head_block):
        heads = first + jnp.arange(count, dtype=jnp.int32)
        full = first + count <= s.heads * s.plan.dot_tokens
        # Heads that do not exist repeat the last one, with weight 0.
        rows = token * s.heads + (heads if full else jnp.minimum(heads, s.heads - 1))
        q, weights = load(q_ref.at[grid2(rows, d)]), load(weight_ref.at[rows])
        if not whole:
            q = jnp.where((jnp.arange(d.shape[0]) < s.dim)[None, :], q, jnp.zeros((), q.dtype))
        yield q.astype(s.compute), weights if full else jnp.where(heads < s.heads, weights, 0.0)


def _scores(queries: Iterable[tuple[Array, Array]], keys: Array, s: _Static) -> Array:
    """float32 [K, dot_tokens]: unscaled scores of blocks of heads against `keys`."""
    return functools.reduce(jnp.add, (head_sums(q, keys, weights, s) for q, weights in queries))


def _load_scales(scale_ref, slots: Array, s: _Static) -> Array:
    """float32 [K, 1] or [1, 1]: what makes scores of sums of products."""
    return (load(scale_ref[0].at[slots]) * s.power)[:, None] if s.scaled else jnp.full((1, 1), s.power)


def _store_rows(out_ref, token, columns: Array, scores: Array, s: _Static) -> None:
    """Writes scores[K, dot_tokens] to the rows from `token` on."""
    cols, tokens = grid2(columns, token + jnp.arange(s.plan.dot_tokens, dtype=jnp.int32))
    if s.columns % s.plan.key_block == 0:
        store(out_ref.at[tokens, cols], scores)
    else:
        # Masked lanes point past the array: interpret mode writes old values back through them.
        mask = cols < s.columns
        store(out_ref.at[tokens, jnp.where(mask, cols, s.columns)], scores, mask=mask)


# --- kernels ---------------------------------------------------------------------------------------------------------
def _ragged_kernel(*refs, s: _Static):
    """Grid (key blocks, token blocks): out[token_block, key_block] of keys that all tokens share."""
    q_ref, key_ref, weight_ref, start_ref, end_ref, *scale_ref, out_ref = refs
    low, first_token = pl.program_id(0) * s.plan.key_block, pl.program_id(1) * s.plan.token_block
    columns = low + jnp.arange(s.plan.key_block, dtype=jnp.int32)
    together = s.plan.dot_tokens
    groups = jnp.minimum(s.plan.token_block, s.tokens - first_token + together - 1) // together

    def token_of(group):
        # The last group may repeat tokens of the one before, with the same results.
        return jnp.minimum(first_token + group * together, s.tokens - together)

    def interval(tokens):
        start, end = load(start_ref.at[tokens]), load(end_ref.at[tokens])
        return start, end, (start < low + s.plan.key_block) & (end > low) & (end > start)

    # From the first group that sees some of the keys to the last one.
    lane = jnp.arange(s.plan.token_block, dtype=jnp.int32)
    group = jnp.minimum(lane // together, groups - 1)
    seen = interval(token_of(group) + lane % together)[2]
    stop = jnp.max(jnp.where(seen, group + 1, 0), axis=0)
    begin = jnp.minimum(jnp.min(jnp.where(seen, group, groups), axis=0), stop)

    slots = columns if s.columns % s.plan.key_block == 0 else jnp.minimum(columns, s.columns - 1)
    scales = _load_scales(scale_ref, slots, s)

    def score(_, keys):
        def one_group(group, _):
            token = token_of(group)
            start, end, seen = interval(token if together == 1 else token + jnp.arange(together, dtype=jnp.int32))
            inside = (columns[:, None] >= start.reshape(1, -1)) & (columns[:, None] < end.reshape(1, -1))

            def some():
                return jnp.where(inside, _scores(_queries(q_ref, weight_ref, token, s), keys, s) * scales, -jnp.inf)

            # Loads under a condition are not issued ahead.
            skip = together == 1 and s.plan.num_stages == 1
            scores = jax.lax.cond(seen, some, lambda: s.nothing) if skip else some()
            _store_rows(out_ref, token, columns, scores, s)
            return ()

        jax.lax.fori_loop(begin, stop, one_group, ())
        return jnp.zeros_like(keys)

    def unseen(i, _):
        group = jnp.where(i < begin, i, i + (stop - begin))
        _store_rows(out_ref, token_of(group), columns, s.nothing, s)
        return ()

    # A condition as a loop: Triton gives its matrix units shared memory for what a loop carries, but registers, which
    # are filled again for every product, for what it sees computed.
    jax.lax.fori_loop(0, jnp.minimum(stop - begin, 1), score, _load_keys(key_ref, slots, s))
    jax.lax.fori_loop(0, groups - (stop - begin), unseen, ())


def _paged_kernel(*refs, s: _Static):
    """Grid (runs of key blocks, T): out[token, key_steps * key_block] of keys in the pages of the token's request."""
    q_ref, key_ref, weight_ref, page_ref, request_ref, length_ref, *scale_ref, out_ref = refs
    block, token, first = s.plan.key_block, pl.program_id(1), pl.program_id(0) * s.plan.key_steps
    lane = jnp.arange(block, dtype=jnp.int32)
    length = jnp.minimum(length_ref[token], s.columns)
    request = jnp.clip(request_ref[token], 0, s.num_requests - 1)
    steps = jnp.minimum(s.plan.key_steps, -(-s.columns // block) - first)
    filled = jnp.clip((length + block - 1) // block - first, 0, steps)

    def page_of(i):
        """Page of a block of columns, or of each of them; of the last block that there is at most."""
        low = jnp.minimum(first + i, -(-s.columns // block) - 1) * block
        if s.page_size % block == 0:
            return page_ref[request, jax.lax.div(low, s.page_size)]
        place = jax.lax.div(jnp.minimum(low + lane, s.columns - 1), s.page_size)
        return load(page_ref.at[jnp.full_like(place, request), place])

    def place_of(i, page):
        """First slot of a block of columns, or all its slots, and whether their pages exist."""
        low = (first + i) * block
        exists = (page >= 0) & (page < s.num_slots // s.page_size)
        offset = jax.lax.rem(low if page.ndim == 0 else low + lane, s.page_size)
        return jnp.where(exists, page * s.page_size, 0) + offset, exists

    def slots_of(slot):
        return slot + lane if slot.ndim == 0 else slot

    def fetch(slot):
        """What is asked for a step ahead; keys only where they are computed, others the compiler asks for itself."""
        return _load_scales(scale_ref, slots_of(slot), s), _load_keys(key_ref, slots_of(slot), s) if s.packed else ()

    def walk():
        queries: Iterable = _queries(q_ref, weight_ref, token, s)
        # The loop would read them again.
        queries = list(queries) if s.plan.key_steps > 1 else queries

        def step(i, ahead):
            slot, exists, (scales, keys), page = ahead
            next_slot, next_exists = place_of(i + 1, page)
            fetched = fetch(next_slot)
            keys = keys if s.packed else _load_keys(key_ref, slots_of(slot), s)
            columns = (first + i) * block + lane
            inside = (exists & (columns < length))[:, None]
            _store_rows(out_ref, token, columns, jnp.where(inside, _scores(queries, keys, s) * scales, -jnp.inf), s)
            return next_slot, next_exists, fetched, page_of(i + 2)

        slot, exists = place_of(0, page_of(0))
        ahead = slot, exists, fetch(slot), page_of(1)
        if s.plan.key_steps > 1:
            jax.lax.fori_loop(0, filled, step, ahead)
        else:
            step(0, ahead)

    def unseen(i, _):
        _store_rows(out_ref, token, (first + i) * block + lane, s.nothing, s)
        return ()

    jax.lax.cond(filled > 0, walk, lambda: None)
    jax.lax.fori_loop(filled, steps, unseen, ())


# --- launch ----------------------------------------------------------------------------------------------------------
def _launch(
    kernel,
    target: Target,
    q: Array,
    keys: Array,
    scales: Array | None,
    weights: Array,
    *arrays: Array,
    dtype: jnp.dtype,
    columns: int,
    plan: IndexerPlan | None,
    pages: tuple[int, int] = (0, 0),
) -> Array:
    """Runs `kernel`; pages: page_size and number of requests, (0, 0) for contiguous keys."""
    fp8 = jnp.dtype(dtype) if keys.dtype == jnp.uint8 else None
    if q.dtype.itemsize == 1 and (fp8 is None or target in CDNA):
        q = q.astype(jnp.bfloat16)
    float32 = q.dtype == jnp.float32 or keys.dtype == jnp.float32
    compute = NATIVE if q.dtype.itemsize == 1 else jnp.dtype(jnp.float32 if float32 else jnp.bfloat16)
    if compute == NATIVE:
        # Free: XLA passes the same bytes on.
        q, keys = (jax.lax.bitcast_convert_type(x, NATIVE) for x in (q, keys))
        q = q if fp8 == NATIVE else fp8_nvidia.saturate(q)
    (tokens, heads, dim), shared = q.shape, pages == (0, 0)
    plan = choose_plan(
        "indexer_logits",
        plan,
        indexer_plan,
        tokens=tokens,
        heads=heads,
        columns=columns,
        itemsize=compute.itemsize,
        shared_keys=shared,
        target=target,
    )
    scaled, num_slots = scales is not None, math.prod(keys.shape[:-1])
    s = _Static(tokens, heads, dim, columns, num_slots, fp8, compute, scaled, plan, target, *pages)
    blocks = -(-columns // plan.key_block)
    grid = (blocks, -(-tokens // plan.token_block)) if shared else (-(-blocks // plan.key_steps), tokens)
    return call(
        functools.partial(kernel, s=s),
        q.reshape(tokens * heads, dim),
        keys.reshape(num_slots, dim),
        weights.reshape(-1),
        *arrays,
        *([] if scales is None else [scales.reshape(-1)]),
        out_shape=jax.ShapeDtypeStruct((tokens, columns), jnp.float32),
        grid=grid,
        name=kernel.__name__.strip("_").replace("kernel", "indexer_logits"),
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
    """Contiguous keys: row t scores columns starts[t]..ends[t]-1; float32[T, N].

    q[T, H, D], keys[N, D] (FP8 as bytes of flavour `dtype`), scales[N] or None, weights[T, H].
    """

    launch = functools.partial(_launch, _ragged_kernel, dtype=dtype, columns=keys.shape[0], plan=plan)
    return by_target(launch, q, keys, scales, weights, starts, ends)


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
    """Keys of each token's own request, through the page table: float32[T, max_length].

    q[T, H, D], keys[pages, page, D] (FP8 as bytes of flavour `dtype`), scales[pages, page] or None, weights[T, H].
    """

    pages = (keys.shape[1], page_table.shape[0])
    launch = functools.partial(_launch, _paged_kernel, dtype=dtype, columns=max_length, plan=plan, pages=pages)
    return by_target(launch, q, keys, scales, weights, page_table, request_ids, lengths)
