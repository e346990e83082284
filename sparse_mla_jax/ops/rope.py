"""Rotary position embedding: YaRN's frequencies, and the rotation (interleaved or half-split pairs, and its inverse).

Sources: RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071) as DeepSeek-V3.2 uses it: no factor on the amplitude.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import RopeConfig


@functools.lru_cache(maxsize=64)
def _frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """The frequencies in float64 [dim // 2]; see `rope_frequencies`."""
    plain = rope.theta ** (-2.0 * np.arange(dim // 2, dtype=np.float64) / dim)
    if rope.factor <= 1.0:
        return plain

    def index_of(rotations: float) -> float:
        """The (fractional) index of the pair that turns `rotations` times over the original context."""
        return dim * math.log(rope.original_max_position / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low = max(math.floor(index_of(rope.beta_fast)), 0)
    high = min(math.ceil(index_of(rope.beta_slow)), dim - 1)
    # In tiny models both ends of the ramp may be the same pair: it becomes a step.
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)
    return plain * (1.0 - ramp) + plain / rope.factor * ramp


def rope_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Radians per position of every rotated pair: float32[dim // 2], computed in float64 at trace time.

    Pairs that turn more than `beta_fast` times over the original context keep their frequency. The frequency of those
    that turn less than `beta_slow` times is divided by `factor`. A linear ramp lies between. Factor 1 is plain RoPE.
    The amplitude, `attention_factor`, is not in the frequencies: multiply what `rotate` gives by it.

    Args:
      rope: the constants.
      dim: rotated dimensions, even.

    Raises:
      ValueError: `dim` is odd or below 2.
    """
    dim = _check.size("dim", dim, 2)
    require(dim % 2 == 0, f"dim is {dim}; rotation works on pairs, so pass an even number of dimensions.")
    return _frequencies(rope, dim).astype(np.float32)


def rotate(x: Array, positions: Array, frequencies: Any, *, interleaved: bool, inverse: bool = False) -> Array:
    """Rotates every pair of the last axis by position * frequency.

    Args:
      x: [..., dim], any floating type.
      positions: integers whose axes are the first axes of x: [T] fits x[T, dim] and x[T, H, dim].
      frequencies: [dim // 2] radians per position, from `rope_frequencies`.
      interleaved: pairs are (x_2i, x_2i+1), and stay in place; otherwise (x_i, x_{i + dim/2}).
      inverse: rotate back.

    Returns:
      x's shape and type; the arithmetic is float32.

    Raises:
      ValueError: `frequencies` is not half as long as the last axis, or `positions` does not fit the first axes.
    """
    x, frequencies = _check.array("x", x, jnp.floating, ..., "dim"), _check.floats("frequencies", frequencies, ...)
    require(
        frequencies.ndim == 1 and 2 * frequencies.shape[0] == x.shape[-1],
        f"frequencies is {_check.describe(frequencies)}; expected [dim // 2] for x of last axis {x.shape[-1]}."
        " Cut x to the rotated dimensions, or call rope_frequencies with their number.",
    )
    hint = f"Its axes are the first ones of x {list(x.shape)}."
    positions = _check.int32("positions", positions, *x.shape[:-1][: np.ndim(positions)], hint=hint)
    spread = positions.reshape(positions.shape + (1,) * (x.ndim - positions.ndim))
    angle = spread.astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(-angle if inverse else angle)
    wide = x.astype(jnp.float32)
    half = frequencies.shape[0]
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    rotated = (first * cos - second * sin, second * cos + first * sin)
    out = jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
    return out.astype(x.dtype)
