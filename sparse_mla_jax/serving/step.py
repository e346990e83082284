"""The pure function behind a step of the engine: metadata, the model's forward pass, logits, sampling."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models.family import family_of, matmul_precision, partition_model
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.run import Where, run_on_mesh
from sparse_mla_jax.serving.sampling import sample


class StepInputs(NamedTuple):
    """The host's inputs of a step: T tokens and B = max_batch rows (requests), both padded; P pages per row.

    On a mesh with several groups of requests, every array has the rows of one group after those of the other.

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
    parallel: Parallel | None = None,
) -> tuple[jax.Array, Any]:
    """The pure function behind `Engine.step`: (sampled tokens int32 [B], caches); padded rows give any token.

    With `parallel` it is what one device does inside `jax.shard_map`, for the rows of its group.
    """
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
            parallel=parallel,
        )
        scores = family_of(config).logits(params, hidden[metadata.last_token], config, parallel)
        # Position of the sampled token: the length before it, however the earlier tokens were cut into steps.
        tokens = sample(scores, inputs.temperature, inputs.top_p, inputs.seeds, metadata.seq_lens)
    return tokens, caches


def _step_anywhere(
    params: Any, caches: Any, inputs: StepInputs, *, mesh: Mesh | None = None, **options: Any
) -> tuple[jax.Array, Any]:
    """`model_step` on one device, or on every device of `mesh`: (sampled tokens int32 [groups * B], caches)."""
    parallel = options.get("parallel")
    if mesh is None or parallel is None:
        return model_step(params, caches, inputs, **options)
    where = Where(mesh, parallel, partition_model(params, options["config"], parallel))
    return run_on_mesh(functools.partial(model_step, **options), where, params, caches, inputs)


jitted_step = jax.jit(
    _step_anywhere,
    static_argnames=("config", "page_size", "implementation", "mesh", "parallel"),
    donate_argnames=("caches",),
)
