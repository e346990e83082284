"""A model with more heads that computes the same function, for meshes with more devices than a fixture has heads."""

import dataclasses

import jax
import jax.numpy as jnp

# The axis of the heads, or of V4's groups of heads, by the name of the weight.
HEADS = {
    **dict.fromkeys(("q_b_proj", "q_proj", "output_gate"), 1),
    **dict.fromkeys(("kv_b_k", "kv_b_v", "o_proj", "sinks", "o_a_proj", "o_b_proj"), 0),
}
# What adds the heads up.
SUMS = ("o_proj", "o_b_proj")


def widen(config, params, times):
    """(config, params) with every head `times` times; the last projection takes their mean, a power of two."""
    sizes = {"num_attention_heads": times * config.num_attention_heads}
    if hasattr(config, "o_groups"):
        sizes["o_groups"] = times * config.o_groups

    def repeat(path, leaf):
        names = [getattr(key, "key", None) for key in path]
        if "self_attn" not in names or "indexer" in names or names[-1] not in HEADS:
            return leaf
        wide = jnp.concatenate([leaf] * times, axis=HEADS[names[-1]])
        return wide / times if names[-1] in SUMS else wide

    return dataclasses.replace(config, **sizes), jax.tree_util.tree_map_with_path(repeat, params)
