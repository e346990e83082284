"""Which experts a token goes to, and with what weights.

Source: DeepSeek-V3's technical report (arXiv:2412.19437), section 2.1.2: a bias that balances the load takes part in
the choice of experts and never in their weights.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import require


def biased_grouped_topk(
    logits: Array,
    bias: Array,
    *,
    num_groups: int,
    groups_kept: int,
    k: int,
    scale: float,
    renormalize: bool = True,
) -> tuple[Array, Array]:
    """Chooses `k` experts inside the best `groups_kept` groups (the noaux_tc method of DeepSeek-V3).

    Scores are sigmoid(logits); the biased score, score + bias, decides. A group is worth the sum of its two largest
    biased scores (or its only one); ties go to the lower group and the lower expert. A NaN logit counts as score 0.

    Args:
      logits: [T, E] float32 or bfloat16 outputs of the gate; widened to float32 before anything else.
      bias: float32 [E]. Narrower types are refused: in bfloat16 near-equal biases collapse and other experts win.
      num_groups: groups of consecutive experts, a divisor of E.
      groups_kept: groups that experts are chosen from.
      k: experts per token.
      scale: multiplies the weights.
      renormalize: divide the weights by their sum first (a sum of 0 leaves them 0).

    Returns:
      (weights float32 [T, k] from the unbiased scores, ids int32 [T, k]), by descending biased score.

    Raises:
      ValueError: shapes, types or counts that do not fit.
    """
    logits, bias = jnp.asarray(logits), jnp.asarray(bias)
    _check(logits, bias, num_groups, groups_kept, k)
    tokens, experts = logits.shape
    size = experts // num_groups
    wide = logits.astype(jnp.float32)
    score = jax.nn.sigmoid(jnp.where(jnp.isnan(wide), -jnp.inf, wide))
    choice = (score + bias).reshape(tokens, num_groups, size)
    # lax.top_k puts the lower index first among equals.
    group_score = jax.lax.top_k(choice, min(2, size))[0].sum(axis=-1)
    kept = jax.lax.top_k(group_score, groups_kept)[1]
    alive = (kept[:, :, None] == jnp.arange(num_groups)).any(axis=1)
    masked = jnp.where(alive[:, :, None], choice, -jnp.inf).reshape(tokens, experts)
    ids = jax.lax.top_k(masked, k)[1].astype(jnp.int32)
    weights = jnp.take_along_axis(score, ids, axis=-1, mode="clip")
    if renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1.0)
    return weights * jnp.float32(scale), ids


def _check(logits: Array, bias: Array, num_groups: int, groups_kept: int, k: int) -> None:
    """Raises ValueError for what does not fit."""
    require(
        logits.ndim == 2 and logits.shape[1] > 0 and jnp.issubdtype(logits.dtype, jnp.floating),
        f"logits is {logits.dtype}{logits.shape}; expected float32 or bfloat16 [T, E] with at least one expert.",
    )
    experts = logits.shape[1]
    require(
        bias.shape == (experts,) and bias.dtype == jnp.float32,
        f"bias is {bias.dtype}{bias.shape}; expected float32 [E] = ({experts},). Keep the router's bias in float32, as"
        " the checkpoint has it.",
    )
    require(
        num_groups >= 1 and experts % num_groups == 0,
        f"num_groups is {num_groups}; expected a divisor of the number of experts ({experts}); 1 means no groups.",
    )
    require(
        1 <= groups_kept <= num_groups,
        f"groups_kept is {groups_kept}; expected 1 to num_groups ({num_groups}).",
    )
    reachable = groups_kept * (experts // num_groups)
    require(1 <= k <= reachable, f"k is {k}; expected 1 to {reachable}, the experts in groups_kept groups.")
