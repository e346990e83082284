"""The step's metadata, computed inside the program from the lengths; and the buckets to which the host pads a step.

Serving engines usually prepare such metadata on the host, between steps, in persistent buffers. Three families of
published defects come from that, and can not happen here:

* A schedule was reused because a fingerprint of the lengths looked the same, although query lengths had changed
  (vllm-project/vllm#47042: garbage after some 20 000 tokens). Here nothing is kept between steps: every value is a
  function of this call's arguments, evaluated by the compiled step itself. Test: `test_nothing_is_remembered`.
* Lengths, or the number of entries of a ragged list, were fetched from the device to size something on the host
  (vllm-project/vllm#43898, and #54369: 38 % of the decode time). Here sizes are static shapes and lengths stay traced
  values: reading one is a trace-time error. Tests: `test_no_value_reaches_the_host`, `test_lengths_never_retrace`.
* The tail of a persistent buffer held values of an earlier, larger step (vllm-project/vllm#42982). Here no buffer is
  persistent, and everything after the last real token or request is overwritten with neutral values (length 0,
  slot -1, page -1) before any operator can see it. Tests: `test_tails_are_clean`, `test_garbage_in_padding`.

The buckets depend on static integers only and are memoised.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._serialization import serializable
from sparse_mla_jax.ops.ragged import slots_from_positions


@serializable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """The request, visible length and cache slot of every token of a step. All arrays are int32 except `valid`.

    T tokens (a static bucket size), B requests, P pages per request. Tokens after the last real one, and tokens whose
    position is beyond the page table, are padding.

    Attributes:
      positions: [T] position in the request's sequence; 0 for padding.
      request_ids: [T] row of `page_table` that the token belongs to; 0 for padding.
      slots: [T] cache slot that the token is written to, page * page_size + offset; -1 for padding.
      lengths: [T] visible keys, position + 1; 0 for padding.
      valid: bool[T], False for padding.
      seq_lens: [B] tokens of each request, this step's included; 0 for a padded request.
      query_indptr: [B + 1] the tokens of request b are query_indptr[b] .. query_indptr[b + 1] - 1.
      last_token: [B] index of the last token of each request in this step. A request without tokens has 0 from
        `build_metadata`, and its padded row b from `decode_metadata`.
      page_table: [B, P] pages of each request; -1 after the pages that its length needs.
      page_size: static, tokens per page.
      max_length: static, P * page_size, the longest possible sequence.
    """

    positions: Array
    request_ids: Array
    slots: Array
    lengths: Array
    valid: Array
    seq_lens: Array
    query_indptr: Array
    last_token: Array
    page_table: Array
    page_size: int = dataclasses.field(metadata={"static": True})
    max_length: int = dataclasses.field(metadata={"static": True})

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.positions.shape[0]

    @property
    def num_requests(self) -> int:
        """B, padding included."""
        return self.seq_lens.shape[0]


class _Requests(NamedTuple):
    """The checked arguments of a step: seq_lens int32 [B], at least 0; page_table int32 [B, P]; tokens per page."""

    seq_lens: Array
    page_table: Array
    page_size: int


def _check_requests(seq_lens: Array, page_table: Array, page_size: int) -> _Requests:
    seq_lens = _check.int32("seq_lens", seq_lens, "B")
    page_table = _check.int32("page_table", page_table, "B", "P")
    require(
        page_table.shape[0] == seq_lens.shape[0],
        f"page_table has {page_table.shape[0]} rows for {seq_lens.shape[0]} seq_lens; give one row per request.",
    )
    page_size = _check.size("page_size", page_size, hint="64 is usual.")
    require(
        page_table.shape[1] * page_size < _check.BEYOND,
        f"page_table with {page_table.shape[1]} pages of {page_size} tokens overflows int32; use fewer pages.",
    )
    return _Requests(jnp.maximum(seq_lens, 0), page_table, page_size)


def _assemble(positions: Array, request_ids: Array, present: Array, indptr: Array, requests: _Requests) -> StepMetadata:
    """Neutralises all padding. Only this function makes slots and visible lengths."""
    seq_lens, page_table, page_size = requests
    max_length = page_table.shape[1] * page_size
    used = jnp.arange(page_table.shape[1], dtype=jnp.int32)[None, :] * page_size < seq_lens[:, None]
    page_table = jnp.where(used, page_table, -1)
    valid = present & (positions >= 0) & (positions < max_length)
    positions = jnp.where(valid, positions, 0)
    request_ids = jnp.where(valid, request_ids, 0)
    if min(page_table.shape) == 0:  # no page anywhere: nothing to look up
        slots = jnp.full(positions.shape, -1, jnp.int32)
    else:
        written = jnp.where(valid, positions, -1)[:, None]
        slots = slots_from_positions(written, request_ids, page_table, page_size=page_size)[:, 0]
    counts = indptr[1:] - indptr[:-1]
    last = jnp.where(counts > 0, jnp.minimum(indptr[1:], positions.shape[0]) - 1, 0)
    return StepMetadata(
        positions=positions,
        request_ids=request_ids,
        slots=slots,
        lengths=jnp.where(valid, positions + 1, 0),
        valid=valid,
        seq_lens=jnp.clip(seq_lens, 0, max_length),
        query_indptr=indptr,
        last_token=jnp.maximum(last, 0),
        page_table=page_table,
        page_size=page_size,
        max_length=max_length,
    )


def build_metadata(
    seq_lens: Array, query_lens: Array, page_table: Array, *, num_tokens: int, page_size: int
) -> StepMetadata:
    """Metadata of one step of any mix of prefill chunks and decode tokens; call it inside the jitted step.

    Requests follow each other in order, and the tokens of a request are consecutive: request b has query_lens[b] rows
    from row sum(query_lens[:b]) on. They are the last query_lens[b] of its seq_lens[b] tokens. A request with
    seq_len <= 0 or query_len <= 0 has no rows, whatever else its entries hold. A query_len above the seq_len counts as
    the seq_len. Tokens that do not fit into num_tokens, or into the pages of the table, are dropped.

    Args:
      seq_lens: int[B] tokens of each request, those of this step included.
      query_lens: int[B] tokens of each request in this step.
      page_table: int[B, P] pages of each request.
      num_tokens: static T, the bucket to which the step's tokens were padded (see `buckets`).
      page_size: static, tokens per page.

    Returns:
      StepMetadata; no value depends on anything but the arguments.

    Raises:
      ValueError: wrong ranks, types or sizes (at trace time).
    """
    requests = _check_requests(seq_lens, page_table, page_size)
    seq_lens = requests.seq_lens
    query_lens = _check.int32("query_lens", query_lens, seq_lens.shape[0], hint="One per request, as seq_lens.")
    hint = "It is a shape, the padded number of tokens: pass a static int."
    num_tokens = _check.size("num_tokens", num_tokens, 0, hint=hint)
    owned = jnp.clip(query_lens, 0, seq_lens)
    # Counts above num_tokens are never needed; the bound keeps the running sum from overflowing.
    ends = jnp.cumsum(jnp.minimum(owned, num_tokens), dtype=jnp.int32)
    indptr = jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), ends]), num_tokens)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if seq_lens.shape[0] == 0:
        nothing = jnp.zeros(num_tokens, jnp.int32)
        return _assemble(nothing, nothing, nothing > 0, indptr, requests)
    request = jnp.searchsorted(indptr[1:], token, side="right", method="compare_all").astype(jnp.int32)
    request = jnp.minimum(request, seq_lens.shape[0] - 1)
    positions = (seq_lens - owned - indptr[:-1])[request] + token
    return _assemble(positions, request, token < indptr[-1], indptr, requests)


def decode_metadata(seq_lens: Array, page_table: Array, *, page_size: int) -> StepMetadata:
    """Metadata of a pure decode step: row b is the newest token of request b, or padding if seq_lens[b] <= 0.

    The only difference from `build_metadata` with query lengths of one: padded requests keep their row, so the host
    need not compact the batch.

    Args:
      seq_lens: int[B] tokens of each request, this one included; 0 or less for a padded request.
      page_table: int[B, P] pages of each request.
      page_size: static, tokens per page.

    Returns:
      StepMetadata with T = B.

    Raises:
      ValueError: wrong ranks, types or sizes (at trace time).
    """
    requests = _check_requests(seq_lens, page_table, page_size)
    seq_lens = requests.seq_lens
    row = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)
    indptr = jnp.arange(seq_lens.shape[0] + 1, dtype=jnp.int32)
    return _assemble(seq_lens - 1, row, seq_lens > 0, indptr, requests)


def buckets(max_size: int, *, min_size: int = 1) -> tuple[int, ...]:
    """Sizes to which the host pads tokens or requests: min_size, doubling, and max_size last.

    At most half of a padded step is padding, and the number of compiled programs is logarithmic. Memoised.

    Args:
      max_size: the largest size that occurs; need not be a power of two.
      min_size: the smallest bucket.

    Returns:
      Strictly ascending sizes that end in max_size.

    Raises:
      ValueError: sizes below one, or min_size above max_size.
    """
    min_size = _check.size("min_size", min_size)
    return _buckets(_check.size("max_size", max_size, min_size, hint=f"min_size is {min_size}."), min_size)


@functools.lru_cache(maxsize=256)
def _buckets(max_size: int, min_size: int) -> tuple[int, ...]:
    sizes = []
    while min_size < max_size:
        sizes.append(min_size)
        min_size *= 2
    return (*sizes, max_size)


def bucket_for(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of the ascending `sizes` that holds `size`.

    Raises:
      ValueError: all are smaller than `size`.
    """
    size = _check.size("size", size, 0)
    place = bisect.bisect_left(sizes, size)
    require(
        place < len(sizes),
        f"size is {size}, above the largest bucket {sizes[-1] if sizes else 0}; split the step or enlarge the buckets.",
    )
    return sizes[place]
