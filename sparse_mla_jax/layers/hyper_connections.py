"""Hyper-connections: n residual streams in place of one.

They replace `x + f(norm(x))`. A sub-layer reads a weighted sum of n streams, and its output is added to each with a
weight of its own. In DeepSeek-V4 the streams are first mixed by a doubly stochastic matrix M, which preserves their sum
(manifold-constrained hyper-connections); in Hy4 they are independent, without M. Weights and M depend on the token.
Sources: mHC (arXiv:2512.24880), hyper-connections (arXiv:2409.19606); formulas and constants are the models'.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.ops.hyper_connections import doubly_stochastic, merge, split

__all__ = ["doubly_stochastic", "join_streams", "merge_streams", "split_streams"]

# Most splits of the product's inner dimension, and fewest values of a split. Without splits, the few columns of few
# tokens leave a GPU idle. The operator adds the splits up, because a separate sum would be a launch of its own.
_MAX_SPLITS, _MIN_SPLIT_SIZE = 32, 128


def _multiply_in_splits(streams: Array, matrix: Array) -> Array:
    """Multiplies flat(streams[T, n, D]) by matrix[n * D, O] in S splits: float32[S, T, O], to be summed over S."""
    tokens, n, width = streams.shape
    require(
        matrix.shape[0] == n * width,
        f"fn has shape {matrix.shape}; streams of {n} x {width} values need {n * width} rows.",
    )
    splits = _MAX_SPLITS
    while splits > 1 and (n * width % splits or n * width < splits * _MIN_SPLIT_SIZE):
        splits //= 2
    flat = streams.reshape(tokens, splits, n * width // splits).astype(jnp.float32)
    matrix = matrix.astype(jnp.float32).reshape(splits, n * width // splits, matrix.shape[1])
    # Force float32 products even if the platform's default is lower: mixing weights steer every later layer.
    return jnp.einsum("tsi,sio->sto", flat, matrix, precision=jax.lax.Precision.HIGHEST)


def split_streams(
    params: dict[str, Any],
    streams: Array,
    *,
    config: Config,
    norm: Array | None = None,
    implementation: str | None = None,
) -> tuple[Array, tuple[Array, Array | None]]:
    """The input of a sub-layer, and the weights with which `join_streams` adds its output.

    Args:
      params: fn [n * D, n * (n + 2)], base [n * (n + 2)], scale [3], float32; without mixing matrix fn [n * D, 2 * n],
        base [2 * n], scale [2].
      streams: [T, n, D].
      config: the model's constants.
      norm: [D] weight of the sub-layer's own RMS norm; None leaves the norm to the caller.
      implementation: None, "triton", "xla" or "reference".

    Returns:
      (input [T, D] in streams.dtype, (weights of the output float32[T, n], mixing float32[T, n, n] or
      None)), for `join_streams`.

    Raises:
      ValueError: weights that do not fit the streams.
    """
    joined, writes, mixing = split(
        streams,
        _multiply_in_splits(streams, params["fn"]),
        params["base"],
        params["scale"],
        **config.mixing_constants,
        norm=norm,
        implementation=implementation,
    )
    return joined, (writes, mixing)


def join_streams(streams: Array, out: Array, weights: tuple[Array, Array | None]) -> Array:
    """streams'[t, j] = writes[t, j] * out[t] + sum_i mixing[t, i, j] * streams[t, i].

    Args:
      streams: [T, n, D] before the sub-layer.
      out: [T, D], the sub-layer's output.
      weights: from `split_streams`; (writes, None) leaves the streams unmixed: mixing is the identity.

    Returns:
      [T, n, D] in streams.dtype.
    """
    writes, mixing = weights
    wide = streams.astype(jnp.float32)
    mixed = wide if mixing is None else jnp.sum(mixing[:, :, :, None] * wide[:, :, None, :], axis=1)
    return (writes[:, :, None] * out.astype(jnp.float32)[:, None, :] + mixed).astype(streams.dtype)


def merge_streams(
    params: dict[str, Any],
    streams: Array,
    *,
    config: Config,
    norm: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """The one stream that the output head reads: [T, D] in streams.dtype.

    Args:
      params: fn [n * D, n], base [n], scale [1], float32.
      streams: [T, n, D].
      config: the model's constants.
      norm: [D] weight of the RMS norm that follows; None leaves the norm to the caller.
      implementation: None, "triton", "xla" or "reference".

    Raises:
      ValueError: weights that do not fit the streams.
    """
    return merge(
        streams,
        _multiply_in_splits(streams, params["fn"]),
        params["base"],
        params["scale"],
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
        norm=norm,
        implementation=implementation,
    )
