"""Chooses the next token on the device: greedy, or temperature and nucleus sampling with a seed per request."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_mla_jax._check import require


def _keys(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One random key per row, from its own seed and position only."""

    def key(seed, position):
        # Name the generator: with another default, a row's numbers could depend on its neighbours.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)

    return jax.vmap(key)(seeds, positions)


def _sample_row(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, key: jax.Array) -> jax.Array:
    """Samples one token of `logits` [V]: finds the nucleus by sorting, then samples by the Gumbel maximum."""
    # Subtract the largest logit first, so that a tiny temperature does not overflow.
    scaled = (logits - jnp.max(logits)) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    order = jnp.argsort(scaled, descending=True, stable=True)
    ranked = scaled[order]
    probabilities = jax.nn.softmax(ranked)
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < top_p).at[0].set(True)
    # Add noise per token, not per rank: two near-equal logits may swap ranks between batch shapes.
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)[order]
    return order[jnp.argmax(jnp.where(kept, ranked + noise, -jnp.inf))]


def sample(
    logits: jax.Array, temperature: jax.Array, top_p: jax.Array, seeds: jax.Array, positions: jax.Array
) -> jax.Array:
    """Chooses one token per row.

    A row is greedy (the first of the largest logits) if its temperature is 0 or less. Otherwise logits are divided by
    the temperature, cut to the smallest set of tokens whose probability reaches `top_p` (nucleus sampling,
    arXiv:1904.09751), and sampled with the key `fold_in(key(seed), position)`. A row depends on its own logits,
    parameters, seed and position only, so neighbours, buckets and preemption can not change it.

    Args:
      logits: float [B, V]; NaN counts as -inf, +inf as the largest float32.
      temperature: float32 [B].
      top_p: float32 [B]; at 0 or less only the most probable token is left, at 1 or more nothing is cut.
      seeds: uint32 [B].
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
    # A row of -inf only has no distribution; make it give token 0, greedy or not.
    logits = jnp.where(jnp.isneginf(jnp.max(logits, axis=-1, keepdims=True)), 0.0, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    random = jnp.asarray(temperature, jnp.float32) > 0

    def mixed():
        keys = _keys(jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32))
        drawn = jax.vmap(_sample_row)(
            logits, jnp.asarray(temperature, jnp.float32), jnp.asarray(top_p, jnp.float32), keys
        )
        return jnp.where(random, drawn.astype(jnp.int32), greedy)

    # Skip sampling if every row is greedy: sorting the vocabulary costs more than a layer of a small model.
    return jax.lax.cond(jnp.any(random), mixed, lambda: greedy)
