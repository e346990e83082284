"""The pure function behind a step of the engine: metadata, the model's forward pass, logits, sampling."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models.family import family_of, matmul_precision
from sparse_mla_jax.serving.sampling import sample


class StepInputs(NamedTuple):
    """The host's inputs of a step: T tokens and B = max_batch rows (requests), both padded; P pages per row.

    Attributes:
      token_ids: int32 [T], the rows' tokens one after the other.
      seq_lens: int32 [B], each sequence's length after this step; 0 in padded rows.
      query_lens: int32 [B], number of tokens that the row has in this step; 0 in padded rows.
      page_table: int32 [B, P], -1 for no page.
      state_ids: int32 [B], row of the per-request state (in models that have one); -1 in padded rows.
      temperature: float32 [B].
      top_p: float32 [B].
      seeds: uint32 [B].
    """

    token_ids: Any
    seq_lens: Any
    query_lens: Any
    page_table: Any
    state_ids: Any
    temperature: Any
    top_p: Any
    seeds: Any


def model_step(
    params: Any,
    caches: Any,
    inputs: StepInputs,
    *,
    config: Config,
    page_size: int,
    implementation: str | None,
) -> tuple[jax.Array, Any]:
    """The pure function behind `Engine.step`: (sampled tokens int32 [B], caches); padded rows give any token."""
    with matmul_precision(params):
        metadata = build_metadata(
            inputs.seq_lens,
            inputs.query_lens,
            inputs.page_table,
            num_tokens=inputs.token_ids.shape[0],
            page_size=page_size,
        )
        hidden, caches = family_of(config).forward(
            params,
            inputs.token_ids,
            caches,
            metadata,
            config=config,
            state_ids=inputs.state_ids,
            implementation=implementation,
        )
        scores = family_of(config).logits(params, hidden[metadata.last_token], config)
        # Position of the sampled token: the length before it, however the earlier tokens were cut into steps.
        tokens = sample(scores, inputs.temperature, inputs.top_p, inputs.seeds, metadata.seq_lens)
    return tokens, caches


jitted_step = jax.jit(
    model_step, static_argnames=("config", "page_size", "implementation"), donate_argnames=("caches",)
)
