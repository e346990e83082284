"""Shared by both indexer kernels: specialization, loads, products, stores.

Letters: T tokens, H heads, D dimensions, N columns (keys that a token may score), K keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits, fp8_nvidia
from pallas_kernels._call import load, store_masked
from pallas_kernels._primitives import dot_fp8
from pallas_kernels.fp8_nvidia import NATIVE
from pallas_kernels.plans.indexer import IndexerPlan
from pallas_kernels.targets import CDNA, HOST, Target
from pallas_kernels.tiles import grid2, power_of_two


@dataclasses.dataclass(frozen=True)
class IndexerSpecialization:
    """Compile-time constants of an indexer kernel.

    Attributes:
      tokens, heads, dim, columns: T, H, D, N.
      num_slots: number of stored keys.
      fp8: flavour of the keys, None if they are not FP8.
      compute: type of the factors of a product.
      scaled: whether keys have scales.
      plan: static sizes.
      target: the machine that the kernel runs on.
      page_size, num_requests: sizes of paged keys, else 0.
    """

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
    def unseen_scores(self) -> Array:
        """Scores [K, dot_tokens] of keys outside the tokens' intervals: -inf."""
        return jnp.full((self.plan.key_block, self.plan.dot_tokens), -jnp.inf, jnp.float32)

    @property
    def is_packed(self) -> bool:
        """Whether FP8 keys are decoded four at a time, to their full values (`factor` is 1)."""
        return self.fp8 is not None and self.compute == jnp.bfloat16 and self.target not in (HOST, *CDNA)

    @property
    def factor(self) -> float:
        """The power of two by which sums of products are multiplied, besides the keys' scales."""
        if self.compute == NATIVE:
            return 1.0 if self.fp8 == NATIVE else 0.25
        return 1.0 if self.fp8 is None or self.is_packed else fp8_bits.power(self.fp8, self.target)


class IndexerRefs(NamedTuple):
    """Arguments of both kernels.

    Attributes:
      q: [T * H, D].
      keys: [slots, D].
      weights: float32 [T * H].
      scales: one float32 [slots], or an empty list.
      out: float32 [T, N].
      others: arguments that only one of the kernels has.
    """

    q: Any
    keys: Any
    weights: Any
    scales: Sequence[Any]
    out: Any
    others: Sequence[Any]

    @classmethod
    def of(cls, refs: Sequence[Any], s: IndexerSpecialization) -> IndexerRefs:
        """Names the references of a kernel."""
        q, keys, weights, *others, out = refs
        count = len(others) - s.scaled
        return cls(q, keys, weights, others[count:], out, others[:count])


# --- arithmetic
def head_sums(q: Array, keys: Array, weights: Array, s: IndexerSpecialization) -> Array:
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
        # Do not reshape to [K, 1, H]: the sum would then go through shared memory.
        return jnp.sum(products, axis=1)[:, None]
    return jnp.sum(products.reshape(keys.shape[0], s.plan.dot_tokens, -1), axis=2)


def score_keys(
    queries: Iterable[tuple[Array, Array]], keys: Array, scales: Array, inside: Array, s: IndexerSpecialization
) -> Array:
    """float32 [K, dot_tokens]: scores of blocks of heads against `keys`, -inf where not `inside`."""
    sums = functools.reduce(jnp.add, (head_sums(q, keys, weights, s) for q, weights in queries))
    return jnp.where(inside, sums * scales, -jnp.inf)


# --- loads and stores
def _padded_dims(s: IndexerSpecialization) -> tuple[Array, bool]:
    """Dimensions [D padded to a power of two] that a tile reads, and whether none is padding."""
    d = jnp.arange(max(32 if s.compute == NATIVE else 16, power_of_two(s.dim)), dtype=jnp.int32)
    # Select only if there is padding: a select hides from Triton that columns are consecutive, so loads are narrow.
    return (d, True) if d.shape[0] == s.dim else (jnp.where(d < s.dim, d, 0), False)


def load_keys(key_ref, slots: Array, s: IndexerSpecialization) -> Array:
    """Loads keys of slots[K] in the compute dtype, [K, D padded]; the caller multiplies scores by `s.factor`.

    Padding repeats dimension 0. It adds nothing, since padding of the queries is 0.
    """
    keys = load(key_ref.at[grid2(slots, _padded_dims(s)[0])])  # [K, D padded]
    if s.compute == NATIVE:
        return keys if s.fp8 == NATIVE else fp8_nvidia.saturate(keys, s.target)
    if s.fp8 is None:
        return keys.astype(s.compute)
    if s.is_packed:
        return fp8_nvidia.decode_bfloat16(keys, s.fp8)
    raw = fp8_bits.decode_codes(keys, s.fp8, s.target)
    return fp8_bits.truncate_to_bfloat16(raw) if s.compute == jnp.bfloat16 else raw


def load_queries(refs: IndexerRefs, token: Array, s: IndexerSpecialization) -> Iterator[tuple[Array, Array]]:
    """Loads dot_tokens tokens by blocks of heads: queries [tokens * heads, D padded], weights [tokens * heads]."""
    count = s.plan.head_block * s.plan.dot_tokens
    d, whole = _padded_dims(s)
    for first in range(0, s.heads, s.plan.head_block):
        heads = first + jnp.arange(count, dtype=jnp.int32)
        full = first + count <= s.heads * s.plan.dot_tokens
        # Padding repeats the last head, with weight 0.
        rows = token * s.heads + (heads if full else jnp.minimum(heads, s.heads - 1))
        q, weights = load(refs.q.at[grid2(rows, d)]), load(refs.weights.at[rows])  # [count, D padded], [count]
        if not whole:
            q = jnp.where((jnp.arange(d.shape[0]) < s.dim)[None, :], q, jnp.zeros((), q.dtype))
        yield q.astype(s.compute), weights if full else jnp.where(heads < s.heads, weights, 0.0)


def load_scales(refs: IndexerRefs, slots: Array, s: IndexerSpecialization) -> Array:
    """float32 [K, 1], or [1, 1] without scales: factors that turn sums of products into scores."""
    return (load(refs.scales[0].at[slots]) * s.factor)[:, None] if s.scaled else jnp.full((1, 1), s.factor)


def store_rows(out_ref, token, columns: Array, scores: Array, s: IndexerSpecialization) -> None:
    """Stores scores[K, dot_tokens] at `columns` [K] of the rows from `token` on."""
    cols, tokens = grid2(columns, token + jnp.arange(s.plan.dot_tokens, dtype=jnp.int32))
    mask = None if s.columns % s.plan.key_block == 0 else cols < s.columns
    store_masked(out_ref, (tokens, cols), scores, mask, s.target)
