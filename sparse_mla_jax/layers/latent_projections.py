"""Projections of a DeepSeek-V3.2 attention layer, from the hidden state and from the query latent.

T tokens, D hidden size, H heads, r_q width of the query latent (the query's low-rank form), R latent width, dn / dr
nope and rope dimensions of a head, Hi indexer heads of Di dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.norm import INNER_EPS
from sparse_mla_jax.layers.projections import Path, fuse, place, project
from sparse_mla_jax.layers.selection import IndexInputs, Queries
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.fp8 import is_fp8
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.rope import rope_frequencies

# Weights with the same input, in the order of their columns in the fused matrix.
_GROUPS: dict[str, list[Path]] = {
    "hidden_proj": [("q_a_proj",), ("kv_a_proj_with_mqa",), ("indexer", "wk"), ("indexer", "weights_proj")],
    "q_latent_proj": [("indexer", "wq_b"), ("q_b_proj",)],
}


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """Concatenates the weights of one layer that multiply the same input: fewer matrix products and launches.

    Call it once, when the weights are loaded; `attention_step` accepts fused and separate weights. Replaced are:

    * q_a_proj, kv_a_proj_with_mqa, indexer.wk and indexer.weights_proj by hidden_proj [D, r_q + R + dr + Di + Hi];
    * indexer.wq_b and q_b_proj by q_latent_proj [r_q, Hi * Di + H * (dn + dr)];
    * kv_b_k by q_absorb [H, dn + dr, R + dr], which maps the first dn values of a query to the latent space and passes
      the dr rotated ones through.
    """
    if "hidden_proj" in params:
        return params
    key = params["kv_b_k"]
    heads, nope, rank = key.shape
    rope = params["q_b_proj"].shape[2] - nope
    absorb = jnp.zeros((heads, nope + rope, rank + rope), key.dtype).at[:, :nope, :rank].set(key)
    fused = fuse({name: weight for name, weight in params.items() if name != "kv_b_k"}, _GROUPS)
    return fused | {"q_absorb": absorb.at[:, nope:, rank:].set(jnp.eye(rope, dtype=key.dtype))}


class LatentProjections(NamedTuple):
    """Products of the hidden state: float32, except q_latent, which has hidden's type.

    Attributes:
      q_latent: [T, r_q], the query latent, which heads and indexer share.
      latent: [T, R], normed.
      rope: [T, dr], the rotated shared key.
      index_key: [T, Di].
      index_weights: [T, Hi], the indexer's head weights, scales folded in.
    """

    q_latent: Array
    latent: Array
    rope: Array
    index_key: Array
    index_weights: Array


def project_hidden(
    params: dict[str, Any], hidden: Array, meta: StepMetadata, c: DeepseekV32Config, implementation: str | None
) -> LatentProjections:
    """The products of hidden [T, D], normed and rotated; the arguments are those of `attention_step`."""
    (weight, bias), part = _index_norm(params, c), functools.partial(Section, 0, 1, dtype="float32")
    parts = place(
        [
            part(c.q_lora_rank, weight=params["q_a_layernorm"], dtype=hidden.dtype.name),
            part(c.kv_lora_rank, weight=params["kv_a_layernorm"]),
            part(c.qk_rope_head_dim, rotated=0, interleaved=c.rope_interleave, scale=_amplitude(c)),
            part(c.index_head_dim, weight=weight, bias=bias, rotated=0, interleaved=c.indexer_rope_interleave),
            part(c.index_n_heads, scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5),
        ]
    )
    finish = functools.partial(
        norm_rope,
        positions=meta.positions,
        frequencies=_frequencies(c),
        eps=INNER_EPS,
        implementation=implementation,
    )
    done = project(params, "hidden_proj", hidden, _GROUPS["hidden_proj"], parts, finish)
    return LatentProjections(*(heads[:, 0] for heads in done))


def project_q_latent(
    params: dict[str, Any],
    q_latent: Array,
    meta: StepMetadata,
    c: DeepseekV32Config,
    implementation: str | None,
    *,
    index_dtype: Any = None,
    index_weights: Array | None = None,
) -> Queries:
    """The queries [T, H, dn + dr], last dr values rotated; and the indexer's inputs if its head weights are given.

    `index_dtype`: type of the indexer's queries; None without head weights.
    """
    parts = [_query_part(c, q_latent.dtype)]
    if index_weights is not None:
        parts.append(_index_part(c, jnp.dtype(index_dtype), index_weights))

    def finish(product: Array, parts: Sequence[Section]) -> list[Any]:
        product = product.astype(q_latent.dtype)
        return norm_rope(product, parts, meta.positions, _frequencies(c), implementation=implementation)

    done = project(params, "q_latent_proj", q_latent, _GROUPS["q_latent_proj"], parts, finish)
    if index_weights is None:
        return Queries(done[0], None)
    return Queries(done[0], IndexInputs(*(done[1] if parts[1].quantized else (done[1], index_weights))))


def _query_part(c: DeepseekV32Config, dtype: np.dtype) -> Section:
    start, rotated = c.index_n_heads * c.index_head_dim, c.qk_nope_head_dim
    return Section(
        start, c.num_attention_heads, c.qk_head_dim, dtype.name, rotated=rotated, interleaved=c.rope_interleave
    )


def _index_part(c: DeepseekV32Config, dtype: np.dtype, weights: Array) -> Section:
    """The indexer's queries: rotation of the first dimensions, the others unchanged."""
    factor = weights if is_fp8(dtype) else None
    interleaved = c.indexer_rope_interleave
    return Section(0, c.index_n_heads, c.index_head_dim, dtype.name, rotated=0, interleaved=interleaved, factor=factor)


def _frequencies(c: DeepseekV32Config) -> np.ndarray:
    return rope_frequencies(c.rope, c.qk_rope_head_dim)


def _amplitude(c: DeepseekV32Config) -> float:
    """The factor of rotated keys. Only products with a query matter, so keys take the factors of both."""
    return c.rope.attention_factor**2


def _index_norm(params: dict[str, Any], c: DeepseekV32Config) -> tuple[Array, Array]:
    """Weight and bias [Di] of the index keys' norm, times the amplitude in the dimensions that will be rotated."""
    norm = params["indexer"]["k_norm"]
    if _amplitude(c) == 1.0:
        return norm["weight"], norm["bias"]
    factor = np.ones(c.index_head_dim, np.float32)
    factor[: c.qk_rope_head_dim] = _amplitude(c)
    return norm["weight"] * factor, norm["bias"] * factor
