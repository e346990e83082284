"""A compressor's weights and state; the rows of each request in a step, and the windows that they close.

T tokens of a step, B requests, N rows of the state, M windows that may close, C values of a token, hd values of an
entry, m = ratio tokens of a window, S tokens that make an entry: m, or 2 * m if windows overlap.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import size
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.ragged import slots_from_positions


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """The last S tokens of each request, which its open windows still need; the size does not depend on its length.

    A ring: the token at position p is stored at p % S, S = ratio without overlap and 2 * ratio with it. A row needs no
    clearing between requests: a request that starts at position 0 never reads the old contents.

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
          num_requests: N, most requests that run at a time, at least 1.
          ratio: tokens of a window, at least 1.
          dim: values of an entry, at least 1.
          overlap: whether an entry also weighs the previous window's tokens; then C is 2 * dim, else dim.

        Raises:
          ValueError: a size other than these.
        """
        requests, windows = size("num_requests", num_requests), 2 if overlap else 1
        shape = (requests, windows * size("ratio", ratio), windows * size("dim", dim))
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))

    @property
    def num_rows(self) -> int:
        """N, most requests that run at a time."""
        return self.kv.shape[0]

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request's row, in this layer."""
        return sum(a.shape[1] * a.shape[2] * a.dtype.itemsize for a in (self.kv, self.gate))


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorWeights:
    """One compressor: its weights, and the constants of its norm and rotation.

    Attributes:
      position_bias: floating [m, C], by position in the window; added to the gate.
      norm: floating [hd], weight of the RMSNorm.
      frequencies: [r / 2] radians per position; the last r values are rotated, in interleaved pairs.
      eps: of the RMSNorm (static).
    """

    position_bias: Array
    norm: Array
    frequencies: Any
    eps: float = dataclasses.field(default=1e-6, metadata={"static": True})

    @property
    def ratio(self) -> int:
        """m, tokens of a window."""
        return self.position_bias.shape[0]

    @property
    def channels(self) -> int:
        """C, values of a token."""
        return self.position_bias.shape[1]

    @property
    def dim(self) -> int:
        """hd, values of an entry."""
        return self.norm.shape[0]

    @property
    def rows(self) -> int:
        """S, tokens that make an entry."""
        return self.channels // self.dim * self.ratio


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """The rows of each request in a step: rows first..end-1 hold positions position, position + 1, ... All int32[B].

    Padded requests and requests without a row of the state have end == first.
    """

    first: Array
    end: Array
    position: Array
    state_id: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Closings:
    """The windows that close in a step, request by request. All int32[M] but `count`.

    Attributes:
      row: row of the token that closes the window.
      first: the request's first row; tokens before it are in the state.
      window: w, the number of the window in its request.
      state_id: the request's row of the state.
      slot: cache slot of the entry, -1 if it is not stored.
      count: int32 scalar, number of closings; the elements after them have slot -1.
    """

    row: Array
    first: Array
    window: Array
    state_id: Array
    slot: Array
    count: Array


def find_spans(metadata: StepMetadata, state_ids: Array, num_states: int) -> Spans:
    """Finds the rows, first position and row of the state of every request; state_ids int32[B]."""
    positions, tokens, indptr = metadata.positions, metadata.num_tokens, metadata.query_indptr
    first = jnp.clip(indptr[:-1], 0, tokens)
    owned = jnp.clip(indptr[1:], first, tokens) - first
    at = jnp.minimum(first, tokens - 1)
    position = positions[at]
    rest = metadata.seq_lens - position
    is_valid = (metadata.request_ids[at] == jnp.arange(first.shape[0])) & (position >= 0) & (rest <= owned)
    is_valid &= (state_ids >= 0) & (state_ids < num_states)
    number = jnp.clip(rest, 0, owned)
    # Tokens beyond the page table became padding: position 0 of request 0. Their positions do not count up.
    last = jnp.clip(first + number - 1, 0, tokens - 1)
    is_valid &= positions[last] == position + number - 1
    end = first + jnp.where(is_valid, number, 0)
    return Spans(first, end, position, jnp.where(is_valid, state_ids, 0))


def find_closings(spans: Spans, table: Array, *, entries: int, tokens: int, ratio: int) -> Closings:
    """Finds the windows of `ratio` tokens that close in a step of `tokens` rows; table int32[B, P] of entry pages."""
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
    return Closings(row, spans.first[b], window, spans.state_id[b], slot, ends[-1])


def update_state(
    state: CompressorState, kv: Array, gate: Array, position_bias: Array, spans: Spans, request_ids: Array
) -> CompressorState:
    """The state after the step: every request's last S tokens of kv[T, C] and gate[T, C], at position % S."""
    row, position, at = place_rows(spans, request_ids, state.kv.shape[1])

    def put(pages: Array, rows: Array) -> Array:
        flat = pages.reshape(-1, pages.shape[-1])
        flat = flat.at[at].set(rows, mode="drop", wrap_negative_indices=False, unique_indices=True)
        return flat.reshape(pages.shape)

    gate = gate[row] + position_bias[position % position_bias.shape[0]]
    return CompressorState(put(state.kv, kv[row]), put(state.gate, gate))


class PlacedRows(NamedTuple):
    """Rows of a step, their positions, and their places in the flat rings; dropped rows have distinct negative places.

    All int32[R]. No place occurs twice: a request longer than the ring keeps its last rows only.
    """

    row: Array
    position: Array
    at: Array


def place_rows(spans: Spans, request_ids: Array, ring: int) -> PlacedRows:
    """Finds where rings of `ring` rows keep the rows of a step."""
    owner, row = _last_rows(spans, request_ids, ring)
    first, end = spans.first[owner], spans.end[owner]
    is_kept = (row >= jnp.maximum(first, end - ring)) & (row < end)
    row = jnp.where(is_kept, row, 0)
    position = spans.position[owner] + row - first
    # Give dropped rows distinct negative indices; `unique_indices=True` requires it.
    at = spans.state_id[owner] * ring + position % ring
    return PlacedRows(row, position, jnp.where(is_kept, at, -1 - jnp.arange(at.size, dtype=jnp.int32)))


def _last_rows(spans: Spans, request_ids: Array, ring: int) -> tuple[Array, Array]:
    """(request, row) int32[R] of all rows that may be among the last `ring` rows of their request."""
    tokens, requests = request_ids.shape[0], spans.end.size
    last = min(ring, tokens)
    if tokens <= requests * last:
        return jnp.clip(request_ids, 0, requests - 1), jnp.arange(tokens, dtype=jnp.int32)
    # Chunks longer than the ring: visit only their last rows.
    owner = jnp.repeat(jnp.arange(requests, dtype=jnp.int32), last)
    return owner, spans.end[owner] - 1 - jnp.arange(owner.size, dtype=jnp.int32) % last
