"""Norms: float32 arithmetic, the result in the input's type."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.layers.projections import matmul

# DeepSeek's norms inside the attention layer (query and key-value latents, indexer key) always use this epsilon.
INNER_EPS = 1e-6


def _check_width(name: str, vector: Array, x: Array) -> None:
    require(
        x.ndim >= 1 and vector.shape == x.shape[-1:],
        f"{name} has shape {vector.shape}; x of shape {x.shape} needs {x.shape[-1:]}. Give the norm of this width.",
    )


def rms_norm(x: Array, weight: Array, *, eps: float = INNER_EPS) -> Array:
    """weight * x / sqrt(mean(x ** 2) + eps) over the last axis (arXiv:1910.07467).

    Args:
      x: [..., D], any float type.
      weight: [D].
      eps: added to the mean square.

    Returns:
      [..., D] in x.dtype, computed in float32.

    Raises:
      ValueError: weight is not as wide as x.
    """
    _check_width("weight", weight, x)
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array, *, eps: float = INNER_EPS) -> Array:
    """weight * (x - mean) / sqrt(var + eps) + bias over the last axis (arXiv:1607.06450), biased variance.

    Args:
      x: [..., D], any float type.
      weight: [D].
      bias: [D].
      eps: added to the variance.

    Returns:
      [..., D] in x.dtype, computed in float32.

    Raises:
      ValueError: weight or bias is not as wide as x.
    """
    _check_width("weight", weight, x)
    _check_width("bias", bias, x)
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def gated_rms_norm(params: dict[str, Any], x: Array, *, eps: float) -> Array:
    """y * sigmoid(W_up silu(W_down y)) with y = `rms_norm`(x): the low-rank gated norm of A.X-K2.

    Args:
      params: weight [D], down [D, r], up [r, D].
      x: [T, D], any float type.
      eps: added to the mean square.

    Returns:
      [T, D] in x.dtype.

    Raises:
      ValueError: weight is not as wide as x.
    """
    normed = rms_norm(x, params["weight"], eps=eps)
    inner = jax.nn.silu(matmul(normed, params["down"])).astype(x.dtype)
    gate = jax.nn.sigmoid(matmul(inner, params["up"]))
    return (normed.astype(jnp.float32) * gate).astype(x.dtype)
