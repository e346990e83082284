"""Logits at every position of given sequences, computed by the step, caches and kernels that serve requests."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import CACHE_DTYPES
from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models.family import check_params, family_of, matmul_precision, partition_model
from sparse_mla_jax.ops._dispatch import check_implementation
from sparse_mla_jax.parallel.axes import Parallel, parallel_of
from sparse_mla_jax.parallel.run import Where, create_on_mesh, place_params, run_on_mesh
from sparse_mla_jax.serving.memory import check_memory
from sparse_mla_jax.serving.sizes import choose_page_size


class _ScoreInputs(NamedTuple):
    """Inputs of a step: token_ids int32 [T], seq_lens and query_lens int32 [B], page_table int32 [B, P]."""

    token_ids: Any
    seq_lens: Any
    query_lens: Any
    page_table: Any


@functools.partial(
    jax.jit,
    static_argnames=("config", "page_size", "implementation", "mesh", "parallel"),
    donate_argnames=("caches",),
)
def _score_step(
    params: Any,
    caches: Any,
    inputs: _ScoreInputs,
    *,
    config: Config,
    page_size: int,
    implementation: str | None,
    mesh: Mesh | None,
    parallel: Parallel | None,
) -> tuple[jax.Array, Any]:
    """Logits after each token of token_ids [T]: (float32 [T, V], caches)."""

    def body(params: Any, caches: Any, inputs: _ScoreInputs) -> tuple[jax.Array, Any]:
        tokens, *lengths = inputs
        metadata = build_metadata(*lengths, num_tokens=tokens.shape[0], page_size=page_size)
        rows = jnp.arange(inputs.seq_lens.shape[0], dtype=jnp.int32)
        hidden, caches = family_of(config).forward(
            params,
            tokens,
            caches,
            metadata,
            config=config,
            state_ids=rows,
            implementation=implementation,
            parallel=parallel,
        )
        return family_of(config).logits(params, hidden, config, parallel), caches

    with matmul_precision(params):
        if mesh is None or parallel is None:
            return body(params, caches, inputs)
        where = Where(mesh, parallel, partition_model(params, config, parallel))
        return run_on_mesh(body, where, params, caches, inputs)


def check_token_ids(token_ids: Any, vocab_size: int) -> np.ndarray:
    """`token_ids` as int32 [B, L].

    Raises:
      ValueError: not integers, not [B, L] with at least one token, or an id outside the vocabulary.
    """
    array = np.asarray(token_ids)
    require(
        array.ndim == 2 and np.issubdtype(array.dtype, np.integer),
        f"token_ids is {array.dtype}{list(array.shape)}; integer token ids [B, L] are expected, one sequence per row.",
    )
    require(array.size > 0, f"token_ids is empty, shape {array.shape}; give at least one sequence of one token.")
    low, high = int(array.min()), int(array.max())
    require(
        low >= 0 and high < vocab_size,
        f"token_ids holds ids from {low} to {high}; the model's vocabulary is 0..{vocab_size - 1}. "
        "Give ids of this model.",
    )
    return array.astype(np.int32)


def check_arguments(
    config: Config, token_ids: Any, *, prompt_length: int | None, chunk: int | None, page_size: int | None
) -> tuple[np.ndarray, int, int, int]:
    """Checks arguments of `score` and fills in defaults: (token_ids int32 [B, L], prompt length, chunk, page size).

    Raises:
      ValueError: an argument that is not as `score` describes it.
    """
    tokens = check_token_ids(token_ids, config.vocab_size)
    length = tokens.shape[1]
    require(
        length <= config.max_position_embeddings,
        f"token_ids has {length} tokens a row; the model's positions end at {config.max_position_embeddings} "
        "(max_position_embeddings). Give shorter sequences.",
    )
    prompt_length = length if prompt_length is None else _check.size("prompt_length", prompt_length, 0)
    require(
        prompt_length <= length,
        f"prompt_length is {prompt_length}; token_ids has {length} tokens a row, so at most {length} is expected.",
    )
    longest = max(prompt_length, 1)
    chunk = longest if chunk is None else min(_check.size("chunk", chunk), longest)
    return tokens, prompt_length, chunk, choose_page_size(config, page_size)


class _ScoreSizes(NamedTuple):
    """The sizes of a call of `score` that its caches follow from."""

    config: Config
    page_size: int
    chunk: int
    cache_dtype: Any


def _place(params: Any, tokens: np.ndarray, plan: _ScoreSizes, where: Where | None) -> tuple[Any, Any, np.ndarray]:
    """(params, caches, page_table [B, P]) for sequences [B, L], on the device or on those of a mesh."""
    config, page_size, chunk, dtype = plan
    batch, length = tokens.shape
    groups, parts = (1, 1) if where is None else (where.parallel.data, where.parallel.context)
    own, width = batch // groups, -(-length // page_size)
    # Page column p is on device p % parts of the axis "context".
    per_request = -(-width // parts)

    def create() -> Any:
        return family_of(config).create_caches(
            config, own * per_request, page_size, num_requests=own, max_query_len=chunk, dtype=dtype
        )

    _check_memory(plan, tokens, jax.eval_shape(create), where)
    row, column = np.arange(batch, dtype=np.int32) % own, np.arange(width, dtype=np.int32)
    page_table = row[:, None] * per_request + column // parts
    if where is None:
        return params, create(), page_table
    return place_params(params, where), create_on_mesh(create, where), page_table


def _check_memory(plan: _ScoreSizes, tokens: np.ndarray, caches: Any, where: Where | None) -> None:
    """Raises ValueError if one device's caches of these shapes and all logits need more memory than there is."""
    (batch, length), config = tokens.shape, plan.config
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    check_memory(
        f"the scores of {batch} sequences of {length} tokens over {config.vocab_size} ids",
        device_bytes=held + 4 * batch * plan.chunk * (config.vocab_size + config.hidden_size),
        host_bytes=4 * batch * length * config.vocab_size,
        hint="Score fewer or shorter sequences at a time, or lower chunk or page_size.",
        devices=None if where is None else list(where.mesh.local_devices),
    )


def score(
    params: Any,
    config: Config,
    token_ids: Any,
    *,
    prompt_length: int | None = None,
    chunk: int | None = None,
    cache_dtype: Any = "float8_e4m3fnuz",
    page_size: int | None = None,
    implementation: str | None = None,
    progress: bool = False,
    mesh: Mesh | None = None,
    parallel: Parallel | None = None,
) -> np.ndarray:
    """Teacher-forced logits: entry [b, i] scores the token that follows token_ids[b, : i + 1].

    The first `prompt_length` tokens of all sequences go through prefill, `chunk` at a time; the others go through the
    decode step one by one. Float32 models multiply in full float32 precision. At most two programs are compiled: one
    for B * chunk tokens, one for B.

    Args:
      params: from `init_params` or `load_checkpoint`; their type is the type of the computation.
      config: the model's shapes.
      token_ids: integers [B, L].
      prompt_length: 0..L; None: L, so prefill only. 0 decodes from an empty cache.
      chunk: tokens per sequence and prefill step; None: the whole prompt at once.
      cache_dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.
      page_size: tokens per page; None: 64, or 256 for DeepSeek-V4 (a multiple or divisor of every compress ratio).
      implementation: None, "triton", "xla" or "reference".
      progress: show a progress bar of the tokens on stderr.
      mesh: of axes "data", "context" and "tensor", from `parallel.make_mesh`; None for one device. Sequences are split
        over "data", in order.
      parallel: the axes, if they are not those of `mesh` with experts over "data" and "tensor".

    Returns:
      float32 [B, L, V] on the host.

    Raises:
      ValueError: an argument that is not as described, or logits that need more memory than there is.
    """
    check_implementation(implementation)
    cache_type = _check.dtype("cache_dtype", cache_dtype, CACHE_DTYPES)
    tokens, prompt_length, chunk, page_size = check_arguments(
        config, token_ids, prompt_length=prompt_length, chunk=chunk, page_size=page_size
    )
    batch, length = tokens.shape
    parallel = parallel_of(mesh, parallel)
    choose_page_size(config, page_size, 1 if parallel is None else parallel.context)
    params, where, groups = check_params(params, config, parallel=parallel), None, 1
    if mesh is not None and parallel is not None:
        where, groups = Where(mesh, parallel, partition_model(params, config, parallel)), parallel.data
    # Groups have equally many sequences: the last may be padding.
    tokens = np.pad(tokens, ((0, -batch % groups), (0, 0)))
    params, caches, page_table = _place(params, tokens, _ScoreSizes(config, page_size, chunk, cache_type), where)
    step = functools.partial(
        _score_step, config=config, page_size=page_size, implementation=implementation, mesh=mesh, parallel=parallel
    )
    logits = np.empty((batch, length, config.vocab_size), np.float32)
    start = 0
    with tqdm(total=length, desc="scoring", unit="token", disable=None if progress else True, leave=False) as bar:
        while start < length:
            size = chunk if start < prompt_length else 1
            end = min(start + size, prompt_length) if start < prompt_length else start + 1
            inputs = _ScoreInputs(*_pack_rows(tokens[:, start:end], groups, size, end), page_table)
            scores, caches = step(params, caches, inputs)
            used = tokens.shape[0] // groups * (end - start)
            rows = np.asarray(scores).reshape(groups, -1, config.vocab_size)[:, :used]
            logits[:, start:end] = rows.reshape(tokens.shape[0], end - start, -1)[:batch]
            bar.update(end - start)
            start = end
    return logits


def _pack_rows(tokens: np.ndarray, groups: int, size: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """token_ids, seq_lens and query_lens of a step over tokens [B, n], which end at position `end`.

    Every group's tokens are followed by padding up to `size` a sequence, so that no further program is compiled.
    """
    batch, count = tokens.shape
    own = batch // groups
    flat = np.zeros((groups, own * size), np.int32)
    flat[:, : own * count] = tokens.reshape(groups, -1)
    return flat.reshape(-1), np.full(batch, end, np.int32), np.full(batch, count, np.int32)
