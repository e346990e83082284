"""DeepSeek-V4's compressors: every `ratio` tokens become one entry of a paged cache, in steps of any mix of requests.

Token t of a request gives kv_t and gate_t, float32 [C]. With overlap (C = 2 * dim) the first `dim` channels are its
contribution to the next window, the others to its own; without (C = dim) there is only its own. Where
(t + 1) % ratio == 0, window w = t // ratio closes: a softmax of the gates per channel over the rows (previous window's
tokens, which window 0 lacks, then its own) weighs their kv; the sum passes an RMSNorm and is rotated at position
ratio * w. Source: the model DeepSeek-V4 as published (its inference code of 2026-04-24, class Compressor).

A query at position t sees entries w < (t + 1) // ratio, the one that it closes among them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import compress as kernel
from pallas_kernels.plans.compress import CompressPlan
from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops._chunks import varying
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_config
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, check_size
from sparse_mla_jax.ops.ragged import slots_from_positions

# Rows that the XLA body pools at a time: of windows, never of the step, so that no sum's shape depends on it.
_ROWS = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """What open windows need of earlier tokens: as much for every request, however long it is.

    A ring: the token at position p lies at p % S, S = ratio without overlap and 2 * ratio with it. A row needs no
    clearing between requests, since one that starts at position 0 never reads what lay there.

    Attributes:
      kv: float32[N, S, C].
      gate: float32[N, S, C], position bias included.
    """

    kv: Array
    gate: Array

    @classmethod
    def create(cls, num_requests: int, *, ratio: int, dim: int, overlap: bool) -> CompressorState:
        """An empty state (all values 0).

        Args:
          num_requests: N, requests that can be open at a time, at least 1.
          ratio: tokens of a window, at least 1.
          dim: values of an entry, at least 1.
          overlap: whether windows reach back over the previous one; then C is 2 * dim, else dim.

        Raises:
          ValueError: a size other than these.
        """
        requests, spans = check_size("num_requests", num_requests, 1), 2 if overlap else 1
        shape = (requests, spans * check_size("ratio", ratio, 1), spans * check_size("dim", dim, 1))
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request's row, in this layer."""
        return sum(a.shape[1] * a.shape[2] * a.dtype.itemsize for a in (self.kv, self.gate))


def entry_pages(page_table: Array, *, page_size: int, ratio: int) -> tuple[Array, int]:
    """The page table of a cache of entries that lives in the same pages as the cache of tokens.

    An entry lies in the page of the token that closes its window: window w at entry w % E of page table[b, w // E].

    Args:
      page_table: integer [B, P], pages of tokens; -1 for none.
      page_size: tokens of a page.
      ratio: tokens of a window.

    Returns:
      (table [B, P'], E entries per page): page_table itself and page_size // ratio where ratio divides page_size, every
      (ratio // page_size)-th of its columns and 1 where page_size divides ratio.

    Raises:
      ValueError: neither divides the other, or page_table has not two axes.
    """
    page_table = jnp.asarray(page_table)
    size, ratio = check_size("page_size", page_size, 1), check_size("ratio", ratio, 1)
    require(page_table.ndim == 2, f"page_table has shape {list(page_table.shape)}; expected [B, P].")
    if size % ratio == 0:
        return page_table, size // ratio
    require(
        ratio % size == 0,
        f"page_size is {size} and ratio {ratio}; one must divide the other, so that a window ends in one page."
        f" Use a page_size that is a multiple of {ratio}, or divides it.",
    )
    every = ratio // size
    return page_table[:, every - 1 :: every], 1


def num_entries(lengths: Array, *, ratio: int) -> Array:
    """Entries that exist after `lengths` tokens of a request (also: that the query at position lengths - 1 sees)."""
    return jnp.maximum(jnp.asarray(lengths), 0) // ratio


def compress[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache,
    state: CompressorState,
    kv: Array,
    gate: Array,
    position_bias: Array,
    norm: Array,
    frequencies: Any,
    *,
    positions: Array,
    request_ids: Array,
    query_indptr: Array,
    seq_lens: Array,
    page_table: Array,
    page_size: int,
    state_ids: Array | None = None,
    ratio: int,
    eps: float = 1e-6,
    implementation: str | None = None,
    config: CompressPlan | None = None,
) -> tuple[Cache, CompressorState]:
    """Takes in a step's tokens: stores the entries of the windows that they close, and keeps what open windows need.

    Arithmetic is float32 up to the cache, which rounds or quantises as `cache.write` does. However a sequence is cut
    into steps, each implementation gives the same entries and state, bit for bit. Both arguments `cache` and `state`
    are updated in place where the caller donates them.

    Args:
      cache: entries before; hd = latent_dim + rope_dim (the rotated values) of a PagedKVCache, dim of a
        PagedIndexCache. Its page_size is the entries per page that `entry_pages` gives.
      state: open windows before.
      kv: floating [T, C], C = hd, or 2 * hd with overlap.
      gate: floating [T, C], without position bias.
      position_bias: floating [ratio, C], by position in the window.
      norm: floating [hd], weight of the RMSNorm.
      frequencies: [r / 2] radians per position; the last r values are rotated, in interleaved pairs.
      positions: int [T], as in `metadata.StepMetadata`, like the five that follow. Of a request's rows the first one's
        position is read, the others follow it.
      request_ids: int [T].
      query_indptr: int [B + 1]; rows outside it, and those of requests of length 0, are padding.
      seq_lens: int [B], tokens of each request, this step's included.
      page_table: int [B, P], pages of tokens. An entry whose page is -1 is not stored.
      page_size: tokens of a page.
      state_ids: int [B], each request's row of `state`; None means row b for request b. Requests whose row is not
        there store nothing. Two requests must not have one row.
      ratio: tokens of a window.
      eps: of the RMSNorm.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      config: a plan of the kernel in place of the heuristic one (static); implies "triton".

    Returns:
      (cache, state) after.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not serve the case.
    """
    implementation = with_config(implementation, config, CompressPlan)
    check_implementation(implementation)
    table, entries = entry_pages(_integers("page_table", page_table, None, None), page_size=page_size, ratio=ratio)
    window = _as_window(cache, state, position_bias, norm, frequencies, ratio, eps)
    _check_pages(cache, entries, page_size, ratio)
    kv = _floats("kv", kv, None, window.channels)
    gate = _floats("gate", gate, kv.shape[0], window.channels)
    tokens, requests = kv.shape[0], table.shape[0]
    seq_lens = _integers("seq_lens", seq_lens, requests)
    query_indptr = _integers("query_indptr", query_indptr, requests + 1)
    positions, request_ids = (
        _integers(name, x, tokens) for name, x in (("positions", positions), ("request_ids", request_ids))
    )
    state_ids = _as_state_ids(state_ids, state, requests)
    if tokens == 0 or requests == 0:
        return cache, state
    spans = _spans(positions, request_ids, query_indptr, seq_lens, state_ids, state.kv.shape[0])
    closings = _closings(spans, table, entries, tokens, ratio)
    written = dispatch(
        "compress",
        implementation,
        {
            "triton": lambda: _triton_compress(cache, window, state, kv, gate, closings, config),
            "xla": lambda: _written(cache, _xla_entries(window, state, kv, gate, closings), closings, "xla"),
            "reference": lambda: _written(
                cache, _reference_entries(window, state, kv, gate, closings), closings, "reference"
            ),
        },
    )
    # What reads the old state must be over before it is overwritten, or XLA keeps a copy.
    written, state = lax.optimization_barrier((written, state))
    return written, _updated(state, kv, gate, window.bias, spans, request_ids)


# --- who owns which rows, and what closes ----------------------------------------------------------------------------
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Window:
    """One compressor: its weights in float32, and its constants.

    Attributes:
      bias: [m, C].
      norm: [hd].
      frequencies: [r / 2].
      eps: static.
    """

    bias: Array
    norm: Array
    frequencies: Array
    eps: float = dataclasses.field(metadata={"static": True})

    @property
    def ratio(self) -> int:
        """m, tokens of a window."""
        return self.bias.shape[0]

    @property
    def channels(self) -> int:
        """C, values of a token."""
        return self.bias.shape[1]

    @property
    def dim(self) -> int:
        """hd, values of an entry."""
        return self.norm.shape[0]

    @property
    def rows(self) -> int:
        """S, tokens that an entry is made of."""
        return self.channels // self.dim * self.ratio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Spans:
    """A step's rows by request: rows first..end-1 hold positions position, position + 1, ... All int32[B].

    Padding, and requests without a row of the state, have end == first.
    """

    first: Array
    end: Array
    position: Array
    state_id: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Closings:
    """The windows that close in a step, request by request. All int32[M] but `count`.

    Attributes:
      row: of the token that closes the window.
      first: the request's first row: earlier tokens lie in the state.
      window: w.
      state_id: the request's row of the state.
      slot: where the entry is stored, -1 for nowhere.
      count: int32, how many there are; what follows them has slot -1.
    """

    row: Array
    first: Array
    window: Array
    state_id: Array
    slot: Array
    count: Array


def _spans(
    positions: Array, request_ids: Array, indptr: Array, seq_lens: Array, state_ids: Array, num_states: int
) -> _Spans:
    tokens = positions.shape[0]
    first = jnp.clip(indptr[:-1], 0, tokens)
    owned = jnp.clip(indptr[1:], first, tokens) - first
    at = jnp.minimum(first, tokens - 1)
    position = positions[at]
    rest = seq_lens - position
    real = (request_ids[at] == jnp.arange(first.shape[0])) & (position >= 0) & (rest <= owned)
    real &= (state_ids >= 0) & (state_ids < num_states)
    number = jnp.clip(rest, 0, owned)
    # Rows beyond the page table are padding that claims position 0 of request 0.
    last = jnp.clip(first + number - 1, 0, tokens - 1)
    real &= positions[last] == position + number - 1
    end = first + jnp.where(real, number, 0)
    return _Spans(first, end, position, jnp.where(real, state_ids, 0))


def _closings(spans: _Spans, table: Array, entries: int, tokens: int, ratio: int) -> _Closings:
    requests = spans.first.shape[0]
    most = min(tokens, tokens // ratio + requests)
    before = spans.position // ratio
    number = (spans.position + spans.end - spans.first) // ratio - before
    ends = jnp.cumsum(number, dtype=jnp.int32)
    i = jnp.arange(most, dtype=jnp.int32)
    b = jnp.searchsorted(ends, i, side="right", method="compare_all").astype(jnp.int32)
    b = jnp.minimum(b, requests - 1)
    exists = i < ends[-1]
    window = jnp.where(exists, before[b] + i - (ends - number)[b], 0)
    row = jnp.where(exists, spans.first[b] + (window + 1) * ratio - 1 - spans.position[b], 0)
    slot = slots_from_positions(jnp.where(exists, window, -1), b, table, page_size=entries)
    return _Closings(row, spans.first[b], window, spans.state_id[b], slot, ends[-1])


# --- bodies ----------------------------------------------------------------------------------------------------------
def _own(x: Array, window: _Window) -> Array:
    """Of rows [..., S, C] each one's contribution to the window [..., S, hd]: the previous window's tokens' first."""
    m, dim = window.ratio, window.dim
    parts = [x[..., i * m : (i + 1) * m, i * dim : (i + 1) * dim] for i in range(window.channels // dim)]
    return jnp.concatenate(parts, axis=-2)


def _rows(
    window: _Window, state: CompressorState, kv: Array, gate: Array, closings: _Closings
) -> tuple[Array, Array, Array]:
    """(kv[K, S, hd], gate[K, S, hd], valid[K, S]) of every closing's tokens, from the step or from the state."""
    size = window.rows
    back = jnp.arange(size, dtype=jnp.int32) - (size - 1)
    row = closings.row[:, None] + back
    position = (closings.window[:, None] + 1) * window.ratio - 1 + back
    here = row >= closings.first[:, None]
    ring = jnp.where(position >= 0, position, 0) % size

    def take(new, old, bias):
        new = new.at[jnp.where(here, row, 0)].get(mode="promise_in_bounds")
        old = old.at[closings.state_id[:, None], ring].get(mode="promise_in_bounds")
        return _own(jnp.where(here[..., None], new if bias is None else new + bias, old), window)

    bias = jnp.tile(window.bias, (size // window.ratio, 1))
    return take(kv, state.kv, None), take(gate, state.gate, bias), position >= 0


def _pool(window: _Window, rows: tuple[Array, Array, Array], at: Array) -> Array:
    """Entries of `_rows`, [K, hd + r]: in place of r rotated values the 2 * r products that `_turned` adds up.

    at[K] are the positions of rotation.
    """
    kv, gate, valid = rows
    valid = valid[..., None]
    gate = jnp.where(valid, gate, -jnp.inf)
    weight = jnp.where(valid, jnp.exp(gate - jnp.max(gate, axis=1, keepdims=True)), 0)
    pooled = jnp.sum(weight * jnp.where(valid, kv, 0), axis=1) / jnp.sum(weight, axis=1)
    scale = lax.rsqrt(jnp.mean(pooled * pooled, axis=-1, keepdims=True) + window.eps)
    entry = pooled * scale * window.norm
    split = window.dim - 2 * window.frequencies.shape[0]
    angle = at.astype(jnp.float32)[:, None] * window.frequencies
    first, second, cos, sin = entry[:, split::2], entry[:, split + 1 :: 2], jnp.cos(angle), jnp.sin(angle)
    products = [first * cos, second * cos, second * sin, first * sin]
    return jnp.concatenate([entry[:, :split], *products], axis=-1)


def _turned(window: _Window, terms: Array) -> Array:
    """Entries [M, hd] of what `_pool` gave, outside of its loop.

    Where XLA:CPU fuses a product and its sum, it rounds them once; what it fuses depends on the step's size.
    """
    split = window.dim - 2 * window.frequencies.shape[0]
    a, b, c, d = jnp.split(terms[:, split:], 4, axis=-1)
    turned = jnp.stack([a - c, b + d], axis=-1).reshape(terms.shape[0], -1)
    return jnp.concatenate([terms[:, :split], turned], axis=-1)


def _xla_entries(window: _Window, state: CompressorState, kv: Array, gate: Array, closings: _Closings) -> Array:
    """float32[M, hd]: closings in blocks of one size, as many blocks as there are closings; zeros elsewhere."""
    most = closings.row.shape[0]
    block = max(1, _ROWS // window.rows)
    short = -most % block
    padded = jax.tree.map(lambda x: jnp.pad(x, (0, short)) if x.ndim else x, closings)
    lists, count = dataclasses.replace(padded, count=None), closings.count

    def step(i, out):
        some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * block, block), lists)
        # Sums are compiled apart from where their rows come from: else they are fused differently by the step's size.
        rows = lax.optimization_barrier(_rows(window, state, kv, gate, some))
        entries = lax.optimization_barrier(_pool(window, rows, some.window * window.ratio))
        return lax.dynamic_update_slice_in_dim(out, entries, i * block, 0)

    width = window.dim + 2 * window.frequencies.shape[0]
    out = varying(jnp.zeros((most + short, width), jnp.float32), (window, state, kv, gate, closings))
    return _turned(window, lax.fori_loop(jnp.int32(0), -(-count // block), step, out)[:most])


def _reference_entries(window: _Window, state: CompressorState, kv: Array, gate: Array, closings: _Closings) -> Array:
    rows = _rows(window, state, kv, gate, closings)
    angles = (closings.window * window.ratio).astype(jnp.float32)[:, None] * window.frequencies
    kv, gate, valid = rows
    return reference.pool(kv, gate, valid, window.norm, angles, eps=window.eps)


def _triton_compress[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache,
    window: _Window,
    state: CompressorState,
    kv: Array,
    gate: Array,
    closings: _Closings,
    plan: CompressPlan | None,
) -> Cache:
    angles = (closings.window * window.ratio).astype(jnp.float32)[:, None] * window.frequencies
    turns = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    lists = closings.row, closings.first, closings.window, closings.state_id, closings.slot
    written = kernel.compress(
        cache_ops.parts_of(cache),
        jnp.stack(lists, axis=1),
        kv,
        gate,
        state.kv,
        state.gate,
        window.bias,
        window.norm,
        turns,
        eps=window.eps,
        plan=plan,
    )
    return cache_ops.with_parts(cache, written)


def _written[Cache: (PagedKVCache, PagedIndexCache)](
    cache: Cache, entries: Array, closings: _Closings, implementation: str
) -> Cache:
    if isinstance(cache, PagedIndexCache):
        return cache_ops.write_index(cache, entries, closings.slot, implementation=implementation)
    latent, rope = entries[:, : cache.latent_dim], entries[:, cache.latent_dim :]
    return cache_ops.write(cache, latent, rope, closings.slot, implementation=implementation)


def _updated(
    state: CompressorState, kv: Array, gate: Array, bias: Array, spans: _Spans, request_ids: Array
) -> CompressorState:
    """The state after the step: every request's last S tokens, at position % S."""
    size, tokens = state.kv.shape[1], kv.shape[0]
    back = min(size, tokens)
    if tokens <= spans.end.size * back:
        row = jnp.arange(tokens, dtype=jnp.int32)
        owner = jnp.clip(request_ids, 0, spans.end.size - 1)
    else:
        # Long chunks: only their last rows.
        owner = jnp.repeat(jnp.arange(spans.end.size, dtype=jnp.int32), back)
        row = spans.end[owner] - 1 - jnp.arange(owner.size, dtype=jnp.int32) % back
    first, end = spans.first[owner], spans.end[owner]
    present = (row >= jnp.maximum(first, end - size)) & (row < end)
    row = jnp.where(present, row, 0)
    position = spans.position[owner] + row - first
    # Places that are nowhere differ too, or the indices would not be unique.
    at = spans.state_id[owner] * size + position % size
    at = jnp.where(present, at, -1 - jnp.arange(at.size, dtype=jnp.int32))

    def put(pages, rows):
        flat = pages.reshape(-1, pages.shape[-1])
        flat = flat.at[at].set(rows, mode="drop", wrap_negative_indices=False, unique_indices=True)
        return flat.reshape(pages.shape)

    gate = gate[row] + bias[position % bias.shape[0]]
    return CompressorState(put(state.kv, kv[row]), put(state.gate, gate))


# --- arguments -------------------------------------------------------------------------------------------------------
def _as_window(
    cache: Any, state: CompressorState, bias: Any, norm: Any, frequencies: Any, ratio: int, eps: float
) -> _Window:
    require(
        isinstance(cache, PagedKVCache | PagedIndexCache),
        f"cache is a {type(cache).__name__}; expected a PagedKVCache or a PagedIndexCache.",
    )
    kv_cache = isinstance(cache, PagedKVCache)
    dim = cache.latent_dim + cache.rope_dim if kv_cache else cache.dim
    norm = _floats("norm", norm, dim)
    frequencies = _floats("frequencies", frequencies, None)
    rotated = 2 * frequencies.shape[0]
    require(
        rotated == cache.rope_dim if kv_cache else rotated <= dim,
        f"frequencies has shape {list(frequencies.shape)}, one per pair of rotated values; the cache has"
        + (f" a rope_dim of {cache.rope_dim}: pass [{cache.rope_dim // 2}]." if kv_cache else f" a dim of {dim}."),
    )
    bias = _floats("position_bias", bias, ratio, None)
    channels = bias.shape[1]
    require(
        channels in (dim, 2 * dim),
        f"position_bias has shape {list(bias.shape)}; expected [ratio, {dim}], or [ratio, {2 * dim}] with overlap,"
        f" for a cache of entries of {dim} values.",
    )
    expected = (channels // dim * ratio, channels)
    for name, array in (("kv", state.kv), ("gate", state.gate)):
        require(
            array.ndim == 3 and tuple(array.shape[1:]) == expected and array.dtype == jnp.float32,
            f"state.{name} is {array.dtype}{list(array.shape)}; expected float32[N, {expected[0]}, {expected[1]}]."
            f" Create it with ratio={ratio}, dim={dim}, overlap={channels == 2 * dim}.",
        )
    return _Window(bias, norm, frequencies, float(eps))


def _check_pages(cache: PagedKVCache | PagedIndexCache, entries: int, page_size: int, ratio: int) -> None:
    require(
        cache.page_size == entries,
        f"cache has a page_size of {cache.page_size}; pages of {page_size} tokens hold {entries} entries of {ratio}"
        f" tokens. Create the cache with page_size={entries}, or pass the page_size of the tokens' cache.",
    )


def _as_state_ids(state_ids: Any, state: CompressorState, requests: int) -> Array:
    if state_ids is not None:
        ids = jnp.asarray(state_ids)
        known = _integers("state_ids", ids, requests)
        # A wide type may have wrapped into somebody's row.
        return jnp.where((ids >= 0) & (ids < state.kv.shape[0]), known, -1)
    require(
        state.kv.shape[0] >= requests,
        f"state has {state.kv.shape[0]} rows for {requests} requests; create it with num_requests={requests} or more,"
        " or pass state_ids.",
    )
    return jnp.arange(requests, dtype=jnp.int32)


def _fits(array: Array, axes: tuple[int | None, ...]) -> bool:
    return array.ndim == len(axes) and all(n is None or n == size for n, size in zip(axes, array.shape))


def _floats(name: str, array: Any, *axes: int | None) -> Array:
    """`array` in float32; ValueError unless it is floating with these axes (None: of any size)."""
    array = jnp.asarray(array)
    require(
        jnp.issubdtype(array.dtype, jnp.floating) and _fits(array, axes),
        f"{name} is {array.dtype}{list(array.shape)}; expected floating values"
        f" [{', '.join('any' if n is None else str(n) for n in axes)}].",
    )
    return array.astype(jnp.float32)


def _integers(name: str, array: Any, *axes: int | None) -> Array:
    """`array` in int32; ValueError unless it is an integer array with these axes (None: of any size)."""
    array = jnp.asarray(array)
    require(
        jnp.issubdtype(array.dtype, jnp.integer) and _fits(array, axes),
        f"{name} is {array.dtype}{list(array.shape)}; expected integers"
        f" [{', '.join('any' if n is None else str(n) for n in axes)}].",
    )
    return array.astype(jnp.int32)
