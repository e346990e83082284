"""The steps that every model offers on top of its `forward`: prefill and decode, which return logits."""

from __future__ import annotations

from typing import Any

from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.models.common import Family, check_page_size
from sparse_mla_jax.parallel.axes import Parallel


def prefill(
    params: dict[str, Any],
    token_ids: Array,
    caches: Any,
    seq_lens: Array,
    query_lens: Array,
    page_table: Array,
    *,
    config: Config,
    page_size: int | None = None,
    state_ids: Array | None = None,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Array, Any]:
    """One step over prompts, chunks of prompts, or a mix with decode tokens; see `build_metadata` for the layout.

    Args:
      params, token_ids, caches, config, state_ids, implementation, parallel: as in `forward`. token_ids: the tokens of
        all requests one after the other, then padding; at least one.
      seq_lens: int[B] tokens of each request, those of this step included.
      query_lens: int[B] tokens of each request in this step.
      page_table: int[B, P].
      page_size: tokens per page (static); may be omitted if the caches know it: unless all layers are sliding.

    Returns:
      (float32[B, V] logits after each request's last token; meaningless for requests without tokens, caches).

    Raises:
      ValueError: arguments that do not fit together (at trace time).
    """
    require(
        token_ids.ndim == 1 and token_ids.shape[0] >= 1,
        f"token_ids has shape {token_ids.shape}; int32[T] with at least one token is expected.",
    )
    model = _model(config)
    page_size = check_page_size(page_size, model.tokens_per_page(caches))
    metadata = build_metadata(seq_lens, query_lens, page_table, num_tokens=token_ids.shape[0], page_size=page_size)
    hidden, caches = model.forward(
        params,
        token_ids,
        caches,
        metadata,
        config=config,
        state_ids=state_ids,
        implementation=implementation,
        parallel=parallel,
    )
    return model.logits(params, hidden[metadata.last_token], config, parallel), caches


def decode(
    params: dict[str, Any],
    token_ids: Array,
    caches: Any,
    seq_lens: Array,
    page_table: Array,
    *,
    config: Config,
    page_size: int | None = None,
    state_ids: Array | None = None,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Array, Any]:
    """One token of every request; row b belongs to request b, and rows with seq_lens[b] <= 0 are padding.

    Arguments as in `prefill`, except: token_ids int[B] holds the newest token of each request; no query_lens.

    Returns:
      (float32[B, V] logits, caches).
    """
    model = _model(config)
    page_size = check_page_size(page_size, model.tokens_per_page(caches))
    metadata = decode_metadata(seq_lens, page_table, page_size=page_size)
    hidden, caches = model.forward(
        params,
        token_ids,
        caches,
        metadata,
        config=config,
        state_ids=state_ids,
        implementation=implementation,
        parallel=parallel,
    )
    return model.logits(params, hidden, config, parallel), caches


def _model(config: Config) -> Family:
    # The model modules import this one.
    from sparse_mla_jax.models.family import family_of

    return family_of(config)
