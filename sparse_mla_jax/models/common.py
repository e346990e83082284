"""Both ends of a step, alike in every model family: its arguments are checked, ids become vectors, vectors logits."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.layers.moe import matmul
from sparse_mla_jax.metadata import StepMetadata


def check_step(token_ids: Array, caches: tuple[Any, ...], metadata: StepMetadata, config: Config) -> None:
    """Raises ValueError unless there is a token id for every token of `metadata` and a cache for every layer."""
    require(
        token_ids.shape == (metadata.num_tokens,) and jnp.issubdtype(token_ids.dtype, jnp.integer),
        f"token_ids is {token_ids.dtype}{list(token_ids.shape)}; metadata needs int32[{metadata.num_tokens}].",
    )
    require(
        len(caches) == config.num_hidden_layers,
        f"caches has {len(caches)} layers, config {config.num_hidden_layers}; make them with create_caches.",
    )


def check_prompt(token_ids: Array) -> None:
    """Raises ValueError unless token_ids has one axis and at least one token."""
    require(
        token_ids.ndim == 1 and token_ids.shape[0] >= 1,
        f"token_ids has shape {token_ids.shape}; int32[T] with at least one token is expected.",
    )


def embed(params: dict[str, Any], token_ids: Array) -> Array:
    """Embeddings [T, D] of token_ids int[T]; ids outside the vocabulary are clamped into it."""
    table = params["embed_tokens"]
    return table[jnp.clip(token_ids, 0, table.shape[0] - 1)]


def logits(params: dict[str, Any], hidden: Array, config: Config) -> Array:
    """Scores of the next token, float32[..., V], from final-normed hidden [..., D]; ask only for rows that you need."""
    if config.tie_word_embeddings:
        return jnp.einsum("...d,vd->...v", hidden, params["embed_tokens"], preferred_element_type=jnp.float32)
    return matmul(hidden, params["lm_head"])
