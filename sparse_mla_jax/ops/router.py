"""Routers: the experts of each token and their weights.

A bias that balances the load takes part in the choice of experts, but not in their weights. Source: DeepSeek-V3's
technical report (arXiv:2412.19437), section 2.1.2. DeepSeek-V4 scores with sqrt(softplus) and has no groups; its first
layers look the experts up by token id. Mistral Large 4 takes a softmax over all experts, without a bias. T tokens, E
experts, V token ids.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax._check import require


def biased_grouped_topk(
    logits: Array,
    bias: Array,
    *,
    num_groups: int,
    groups_kept: int,
    k: int,
    scale: float,
    renormalize: bool = True,
    excluded: float = -math.inf,
) -> tuple[Array, Array]:
    """Chooses `k` experts inside the best `groups_kept` groups (the noaux_tc method of DeepSeek-V3).

    Scores are sigmoid(logits); experts are chosen by score + bias. The score of a group is the sum of its two largest
    biased scores (or its only one). Ties go to the lower group and the lower expert. A NaN logit counts as score 0.

    Args:
      logits: [T, E] float32 or bfloat16 outputs of the gate; widened to float32 before anything else.
      bias: float32 [E]. Narrower types are refused: in bfloat16, near-equal biases become equal and other experts win.
      num_groups: groups of consecutive experts, a divisor of E.
      groups_kept: groups of a token from which its experts are chosen.
      k: experts per token.
      scale: multiplies the weights.
      renormalize: divide the weights by their sum first (a sum of 0 leaves them 0).
      excluded: biased score of the experts of other groups, for the choice (static). With a finite one, such as 0 in
        A.X-K2, they win against lower biased scores.

    Returns:
      (weights float32 [T, k] from the unbiased scores, ids int32 [T, k]), by descending biased score.

    Raises:
      ValueError: shapes, types or counts that do not fit.
    """
    logits = _check_logits(logits)
    bias = _check_bias(bias, logits.shape[1])
    groups = _check_groups(logits.shape[1], num_groups, groups_kept, k)
    score = jax.nn.sigmoid(_nan_as_lowest(logits))
    ids = _choose(score + bias, *groups, excluded)
    return _weights(score, ids, scale, renormalize), ids


def softmax_grouped_topk(
    logits: Array, *, num_groups: int, groups_kept: int, k: int, scale: float, renormalize: bool = True
) -> tuple[Array, Array]:
    """Chooses `k` experts by their share of a softmax over all experts (Mistral Large 4, no bias).

    Experts are chosen inside the best `groups_kept` groups; the score of a group is the sum of its two largest shares
    (or its only one). Ties go to the lower group and the lower expert. A NaN logit counts as share 0, an infinite one
    as the largest finite float32.

    Args:
      logits: [T, E] float32 or bfloat16 outputs of the gate; widened to float32 before anything else.
      num_groups, groups_kept, k: as in `biased_grouped_topk`.
      scale: multiplies the weights.
      renormalize: divide the weights by their sum first (a sum of 0 leaves them 0).

    Returns:
      (weights float32 [T, k], ids int32 [T, k]), by descending share.

    Raises:
      ValueError: shapes, types or counts that do not fit.
    """
    logits = _check_logits(logits)
    groups = _check_groups(logits.shape[1], num_groups, groups_kept, k)
    limits = jnp.finfo(jnp.float32)
    logits = jnp.minimum(_nan_as_lowest(logits), limits.max)
    # A row of -inf alone has no share to give: all are 0, not NaN.
    powers = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True, initial=limits.min))
    total = powers.sum(axis=-1, keepdims=True)
    share = powers / jnp.where(total > 0, total, 1.0)
    ids = _choose(share, *groups, -math.inf)
    return _weights(share, ids, scale, renormalize), ids


def sqrt_softplus_topk(
    logits: Array, bias: Array, *, k: int, scale: float, renormalize: bool = True
) -> tuple[Array, Array]:
    """Chooses the `k` experts with the largest sqrt(softplus(logits)) + bias (DeepSeek-V4, no groups).

    Ties go to the lower expert. A NaN logit counts as score 0, an infinite one as the largest finite float32.

    Args:
      logits: [T, E] float32 or bfloat16 outputs of the gate; widened to float32 before anything else.
      bias: float32 [E], added for the choice only. Narrower types are refused.
      k: experts per token.
      scale: multiplies the weights.
      renormalize: divide the weights by their sum first (a sum of 0 leaves them 0).

    Returns:
      (weights float32 [T, k] from the unbiased scores, ids int32 [T, k]), by descending biased score.

    Raises:
      ValueError: shapes, types or counts that do not fit.
    """
    logits = _check_logits(logits)
    bias = _check_bias(bias, logits.shape[1])
    _, _, k = _check_groups(logits.shape[1], 1, 1, k)
    score = _sqrt_softplus(logits)
    ids = jax.lax.top_k(score + bias, k)[1].astype(jnp.int32)
    return _weights(score, ids, scale, renormalize), ids


def hash_route(
    logits: Array, token_ids: Array, table: Array, *, scale: float, renormalize: bool = True
) -> tuple[Array, Array]:
    """Looks up experts by token id; weights are sqrt(softplus(logits)) (the first layers of DeepSeek-V4).

    Args:
      logits: [T, E] float32 or bfloat16 outputs of the gate.
      token_ids: integer [T]; ids outside the table, such as those of padding, are clamped into it.
      table: integer [V, k] experts of every token id, clamped into [0, E).
      scale: multiplies the weights.
      renormalize: divide the weights by their sum first (a sum of 0 leaves them 0).

    Returns:
      (weights float32 [T, k], ids int32 [T, k]) in the table's order.

    Raises:
      ValueError: shapes or types that do not fit.
    """
    logits = _check_logits(logits)
    token_ids = _check.int32("token_ids", token_ids, logits.shape[0], hint="One per row of logits.")
    table = _check.int32("table", table, "V", "k", hint="The experts of every token id.")
    require(table.size > 0, f"table is {_check.describe(table)}; expected an expert at least of a token id at least.")
    chosen = table.at[jnp.clip(token_ids, 0, table.shape[0] - 1)].get(mode="promise_in_bounds")
    ids = jnp.clip(chosen, 0, logits.shape[1] - 1)
    return _weights(_sqrt_softplus(logits), ids, scale, renormalize), ids


def _nan_as_lowest(logits: Array) -> Array:
    """`logits` with -inf for NaN."""
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits)


def _choose(choice: Array, num_groups: int, groups_kept: int, k: int, excluded: float) -> Array:
    """Experts int32 [T, k] of the largest choice[T, E], which is `excluded` outside the groups that are kept."""
    tokens, experts = choice.shape
    size = experts // num_groups
    choice = choice.reshape(tokens, num_groups, size)
    # lax.top_k puts the lower index first among equals.
    group_score = jax.lax.top_k(choice, min(2, size))[0].sum(axis=-1)
    kept = jax.lax.top_k(group_score, groups_kept)[1]
    is_kept = (kept[:, :, None] == jnp.arange(num_groups)).any(axis=1)
    masked = jnp.where(is_kept[:, :, None], choice, excluded).reshape(tokens, experts)
    return jax.lax.top_k(masked, k)[1].astype(jnp.int32)


def _sqrt_softplus(logits: Array) -> Array:
    """sqrt(softplus(logits)) in float32, always finite: NaN gives 0, infinity counts as the largest float32."""
    largest = jnp.finfo(jnp.float32).max
    return jnp.sqrt(jax.nn.softplus(jnp.clip(_nan_as_lowest(logits), None, largest)))


def _weights(score: Array, ids: Array, scale: float, renormalize: bool) -> Array:
    """Weights float32 [T, k]: scores of the chosen experts, divided by their sum if `renormalize`, times `scale`."""
    weights = jnp.take_along_axis(score, ids, axis=-1, mode="clip")
    if renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
    return weights * jnp.float32(scale)


def _check_logits(logits: Array) -> Array:
    """float32 [T, E]."""
    logits = _check.floats("logits", logits, "T", "E")
    require(logits.shape[1] > 0, f"logits is {_check.describe(logits)}; expected at least one expert.")
    return logits


def _check_bias(bias: Array, experts: int) -> Array:
    hint = "Keep the router's bias in float32, as the checkpoint has it."
    return _check.array("bias", bias, (jnp.float32,), experts, hint=hint)


def _check_groups(experts: int, num_groups: int, groups_kept: int, k: int) -> tuple[int, int, int]:
    """The three counts as ints that fit together."""
    num_groups = _check.size("num_groups", num_groups)
    require(
        experts % num_groups == 0,
        f"num_groups is {num_groups}; expected a divisor of the number of experts ({experts}); 1 means no groups.",
    )
    groups_kept = _check.size("groups_kept", groups_kept, 1, num_groups)
    reachable = groups_kept * (experts // num_groups)
    return num_groups, groups_kept, _check.size("k", k, 1, reachable, hint="So many experts are in groups_kept groups.")
