"""Chooses the next token on the device: greedy, or temperature and nucleus sampling with a seed per request."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax._check import require

# XLA may multiply by the reciprocal of a temperature. Between these two it is a normal float32 number; beyond, it may
# become zero.
_COLDEST, _HOTTEST = 2.0**-126, 2.0**126


def _keys(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One random key per row, from its own seed and position only."""

    def key(seed, position):
        # Name the generator: with another default, a row's numbers could depend on its neighbours.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)

    return jax.vmap(key)(seeds, positions)


def _float32(x: Any) -> jax.Array:
    """`x` in float32; what lies beyond its largest finite value becomes that value, and NaN stays."""
    limit = float(jnp.finfo(jnp.float32).max)
    if isinstance(x, jax.Array):
        return jnp.clip(x, -limit, limit).astype(jnp.float32) if x.dtype.itemsize > 4 else x.astype(jnp.float32)
    return jnp.asarray(np.clip(np.asarray(x, np.float64), -limit, limit).astype(np.float32))


def _sample_row(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """Samples one token of `logits` [V]: finds the nucleus by sorting, then samples by the Gumbel maximum."""
    # Subtract the largest logit first, so that a tiny temperature does not overflow. Subtract halves, since the
    # difference of two float32 numbers may exceed the largest; a power of two changes no other bit.
    scaled = 2 * ((0.5 * logits - 0.5 * jnp.max(logits)) / temperature)
    # By the logits: at a huge temperature the scaled ones may all be equal.
    order = jnp.argsort(logits, descending=True, stable=True)
    ranked = scaled[order]
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    # At 1 the rounded sum of a large vocabulary may pass top_p before its last tokens.
    kept = ((before < top_p) | (top_p >= 1)).at[0].set(True)
    # Add noise per token, not per rank: two near-equal logits may swap ranks between batch shapes.
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)[order]
    return order[jnp.argmax(jnp.where(kept, ranked + noise, -jnp.inf))]


def sample(
    logits: jax.Array, temperature: jax.Array, top_p: jax.Array, seeds: jax.Array, positions: jax.Array
) -> jax.Array:
    """Chooses one token per row.

    A row is greedy (the first of the largest logits) if its temperature is below the smallest normal float32, or NaN.
    Otherwise logits are divided by the temperature, cut to the smallest set of tokens whose probability reaches `top_p`
    (nucleus sampling, arXiv:1904.09751), and sampled with the key `fold_in(key(seed), position)`. A row depends on its
    own logits, parameters, seed and position only, so neighbours, buckets and preemption can not change it.

    Args:
      logits: float [B, V]; NaN counts as -inf, +inf as the largest float32.
      temperature: float [B]; above 2**126 it counts as 2**126, at which logits below 1e30 are equally probable.
      top_p: float [B]; at 0 or less, or NaN, only the most probable token is left, at 1 or more nothing is cut.
      seeds: uint32 [B]; of wider integers the lowest 32 bits count.
      positions: int32 [B], the sequence position of the token that is chosen.

    Returns:
      int32 [B] token ids.

    Raises:
      ValueError: shapes that do not fit together, or an empty vocabulary.
    """
    require(
        logits.ndim == 2 and logits.shape[1] > 0, f"logits has shape {logits.shape}; [B, V] with V >= 1 is expected."
    )
    rows = logits.shape[0]
    for name, array in (
        ("temperature", temperature),
        ("top_p", top_p),
        ("seeds", seeds),
        ("positions", positions),
    ):
        require(
            jnp.shape(array) == (rows,),
            f"{name} has shape {jnp.shape(array)}; one value per row of logits is expected, so ({rows},).",
        )
    if rows == 0:
        return jnp.zeros((0,), jnp.int32)
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))
    # A row of -inf only has no distribution; its tokens become equally probable.
    logits = jnp.where(jnp.isneginf(jnp.max(logits, axis=-1, keepdims=True)), 0.0, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p = _float32(temperature), _float32(top_p)
    random = temperature >= _COLDEST

    def mixed():
        keys = _keys(jnp.asarray(seeds).astype(jnp.uint32), jnp.asarray(positions).astype(jnp.int32))
        drawn = jax.vmap(_sample_row)(logits, jnp.clip(temperature, _COLDEST, _HOTTEST), top_p, keys)
        return jnp.where(random, drawn.astype(jnp.int32), greedy)

    # Skip sampling if every row is greedy: sorting the vocabulary costs more than a layer of a small model.
    return jax.lax.cond(jnp.any(random), mixed, lambda: greedy)
