"""Online softmax of the attention kernels: a running maximum and sum over key blocks, and sinks.

Scores are in base 2; lse is in base e.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

LOG2E = math.log2(math.e)
# Score of a masked key. It is finite, so that the difference of two such scores is not NaN.
NONE = -1e30


def dot(a: Array, b: Array, contract_b: int) -> Array:
    """float32 [M, N]: product of a[M, K] and b[N, K] (contract_b 1) or b[K, N] (0); float32 at full precision."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (contract_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def softmax_step(top: Array, total: Array, scores: Array, valid: Array) -> tuple[Array, Array, Array, Array]:
    """A step of online softmax, base 2: (new top[H], new total[H], factor of sums so far [H], probabilities[H, K])."""
    scores = jnp.where(valid[None, :], scores, NONE)
    new = jnp.maximum(top, jnp.max(scores, axis=1))
    probabilities = jnp.where(valid[None, :], jnp.exp2(scores - new[:, None]), 0.0)
    keep = jnp.exp2(top - new)
    return new, total * keep + jnp.sum(probabilities, axis=1), keep, probabilities


def sink_share(lse: Array, sinks: Array) -> Array:
    """Factor of the output with a sink: exp(lse) / (exp(lse) + exp(sink)), 0 for an empty row."""
    return jnp.where(lse == -jnp.inf, 0.0, 1.0 / (1.0 + jnp.exp(sinks - lse)))
