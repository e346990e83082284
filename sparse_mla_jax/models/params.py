"""Shared by the parameters of all models: shapes of their feed-forward parts and streams, types, random weights.

Pytrees of dicts and lists have shapes (tuples) in place of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.config import Config

Params = dict[str, Any]

# Always float32 with their subtrees, whatever the type of the matrices: small, and rounding them costs accuracy.
_FLOAT32_NAMES = frozenset(
    {
        *("norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "kv_layernorm"),
        *("k_rope_layernorm", "k_norm", "q_norm", "sinks", "query_scale", "rope_alpha", "position_bias"),
        *("attn_hc", "ffn_hc", "hc_head", "e_score_correction_bias"),
        *("q_a_proj_bias", "kv_a_proj_with_mqa_bias", "o_proj_bias"),
    }
)
# Tables of expert numbers.
_INT32_NAME = "token_experts"
# Vectors that start at 0; others start at 1.
_ZEROS = frozenset({"base", "sinks", "rope_alpha"})
# Axes that a product sums over, unless it is the second to last one.
_INPUTS = {
    **dict.fromkeys(("q_b_proj", "q_proj", "wq_b", "output_gate"), (0,)),
    **{"kv_b_k": (2,), "o_proj": (0, 1), "embed_tokens": (1,)},
}


def swiglu_shapes(*stack: int, hidden: int, inner: int) -> Params:
    """A SwiGLU's matrices, with the axes `stack` first."""
    return {
        "gate_proj": (*stack, hidden, inner),
        "up_proj": (*stack, hidden, inner),
        "down_proj": (*stack, inner, hidden),
    }


def mixture_shapes(config: Config, gate: Params, shared_width: int) -> Params:
    """A mixture of experts; `gate` are the router's arrays besides its matrix."""
    c = config
    shapes: Params = {
        "gate": {"weight": (c.hidden_size, c.n_routed_experts), **gate},
        "experts": swiglu_shapes(c.n_routed_experts, hidden=c.hidden_size, inner=c.moe_intermediate_size),
    }
    if c.n_shared_experts:
        shapes["shared_experts"] = swiglu_shapes(hidden=c.hidden_size, inner=shared_width)
    return shapes


def mixing_shapes(config: Config, weights: int, scales: int) -> Params:
    """Hyper-connections that make so many weights, with so many scales, from the streams."""
    return {"fn": (config.hc_mult * config.hidden_size, weights), "base": (weights,), "scale": (scales,)}


def rest_shapes(config: Config) -> Params:
    """The parameters outside the layers that every model has, and those that merge its streams."""
    c = config
    shapes: Params = {"embed_tokens": (c.vocab_size, c.hidden_size), "norm": (c.hidden_size,)}
    if c.hc_mult:
        shapes["hc_head"] = mixing_shapes(c, c.hc_mult, 1)
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.hidden_size, c.vocab_size)
    return shapes


def specs_of(shapes: Params, dtype: Any, wide: tuple[str, ...] = ()) -> Params:
    """Shapes with types: matrices have `dtype`, small weights and those in `wide` are float32, tables int32."""

    def spec(path: tuple, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        names = {getattr(key, "key", None) for key in path}
        is_wide = names & _FLOAT32_NAMES or names.intersection(wide)
        return jax.ShapeDtypeStruct(shape, jnp.int32 if _INT32_NAME in names else jnp.float32 if is_wide else dtype)

    return jax.tree_util.tree_map_with_path(spec, shapes, is_leaf=lambda node: isinstance(node, tuple))


def random_params(key: Array, specs: Params, experts: int, spreads: Mapping[str, float] | None = None) -> Params:
    """Random weights: matrices normal with variance 1 / inputs, norms and scales 1, biases and sinks 0.

    Args:
      key: a `jax.random.key`.
      specs: from `specs_of`.
      experts: a table of experts names different ones of so many for each token.
      spreads: factors of the standard deviation, by the names of matrices.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(specs)

    def init(number: int, path: tuple, spec: jax.ShapeDtypeStruct) -> Array:
        name, own = path[-1].key, jax.random.fold_in(key, number)
        if name == _INT32_NAME:
            tokens, chosen = spec.shape
            return jax.lax.top_k(jax.random.uniform(own, (tokens, experts)), chosen)[1]
        if "bias" in name or name in _ZEROS:
            return jnp.zeros(spec.shape, spec.dtype)
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        fan_in = int(np.prod([spec.shape[axis] for axis in _INPUTS.get(name, (-2,))]))
        spread = (spreads or {}).get(name, 1.0) * fan_in**-0.5
        return (jax.random.normal(own, spec.shape, jnp.float32) * spread).astype(spec.dtype)

    return jax.tree_util.tree_unflatten(tree, [init(i, path, spec) for i, (path, spec) in enumerate(leaves)])
