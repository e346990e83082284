"""Shared by all models: the exports of a model module, argument checks, embedding, logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require, size
from sparse_mla_jax.config import Config
from sparse_mla_jax.layers.moe import matmul
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.collectives import join_columns, sum_over


class Family(NamedTuple):
    """The functions that a model module exports as FAMILY, with the same arguments in every module.

    Attributes:
      forward, prefill, decode: the steps.
      logits: scores of the next token from the result of `forward`.
      param_specs, init_params, fuse_projections: parameters.
      create_caches, default_page_size: caches, and tokens per page that suit the model.
      tokens_per_page: tokens per page of caches; None if they do not know it.
      bytes_per_token, bytes_per_request: size of the caches per token of context and per running request.
    """

    forward: Callable[..., tuple[Array, Any]]
    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[..., tuple[Array, Any]]
    logits: Callable[..., Array]
    param_specs: Callable[..., Any]
    init_params: Callable[..., Any]
    fuse_projections: Callable[[Any], Any]
    create_caches: Callable[..., Any]
    default_page_size: Callable[[Any], int]
    tokens_per_page: Callable[[Any], int | None]
    bytes_per_token: Callable[[Any, int], float]
    bytes_per_request: Callable[[Any], int]


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


def check_page_size(page_size: int | None, of_caches: int | None) -> int:
    """Tokens per page: `of_caches`, or `page_size` if the caches do not know it (None).

    Raises:
      ValueError: the two differ, or both are None.
    """
    if of_caches is None:
        return size("page_size", page_size, hint="These caches do not say it; make them with create_caches.")
    require(
        page_size is None or page_size == of_caches,
        f"page_size is {page_size!r}; the caches have pages of {of_caches} tokens. Leave it out, or make the caches"
        " with it.",
    )
    return of_caches


def embed(
    params: dict[str, Any], token_ids: Array, config: Config | None = None, parallel: Parallel | None = None
) -> Array:
    """Embeddings [T, D] of token_ids int[T]; ids outside the vocabulary are clamped into it.

    Over "tensor" (which needs `config`) a device looks up the ids of its own rows; the sum with the zeros of the others
    is exact.
    """
    table = params["embed_tokens"]
    if parallel is None or config is None or table.shape[0] == config.vocab_size:
        return table[jnp.clip(token_ids, 0, table.shape[0] - 1)]
    axes = parallel.present("tensor")
    local = jnp.clip(token_ids, 0, config.vocab_size - 1) - jax.lax.axis_index(axes) * table.shape[0]
    rows = table[jnp.clip(local, 0, table.shape[0] - 1)]
    return sum_over(jnp.where(((local >= 0) & (local < table.shape[0]))[:, None], rows, 0), axes)


def logits(params: dict[str, Any], hidden: Array, config: Config, parallel: Parallel | None = None) -> Array:
    """Scores of the next token, float32[..., V], from final-normed hidden [..., D]; pass only the rows you need.

    Over "tensor" a device computes the columns of its part of the vocabulary, which are joined.
    """
    if config.tie_word_embeddings:
        scores = jnp.einsum("...d,vd->...v", hidden, params["embed_tokens"], preferred_element_type=jnp.float32)
    else:
        scores = matmul(hidden, params["lm_head"])
    if parallel is None or scores.shape[-1] == config.vocab_size:
        return scores
    return join_columns(scores, parallel.axis("tensor"))
