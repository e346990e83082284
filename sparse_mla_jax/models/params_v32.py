"""DeepSeek-V3.2's parameters as a pytree: shapes, types, random weights.

A plain pytree of arrays. Matrices are stored input-first ([D_in, ...]), so that a product reads `x @ w`:

    embed_tokens [V, D], norm [D], lm_head [D, V] (absent when tied), layers: one dict per layer with
      input_layernorm [D], post_attention_layernorm [D], self_attn (see `layers.mla.attention_step`), mlp: SwiGLU
      {gate_proj [D, I], up_proj [D, I], down_proj [I, D]} or a mixture (see `layers.moe.moe`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.attention_weights import mla_shapes

Params = dict[str, Any]

# Always float32, whatever the type of the matrices: they are small, and rounding them costs accuracy.
_FLOAT32_NAMES = frozenset(
    {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "q_a_layernorm",
        "kv_a_layernorm",
        "k_norm",
        "e_score_correction_bias",
    }
)


def _swiglu_shapes(*stack: int, hidden: int, inner: int) -> Params:
    return {
        "gate_proj": (*stack, hidden, inner),
        "up_proj": (*stack, hidden, inner),
        "down_proj": (*stack, inner, hidden),
    }


def _mlp_shapes(c: DeepseekV32Config, layer: int) -> Params:
    if not c.is_moe_layer(layer):
        return _swiglu_shapes(hidden=c.hidden_size, inner=c.intermediate_size)
    shapes = {
        "gate": {"weight": (c.hidden_size, c.n_routed_experts), "e_score_correction_bias": (c.n_routed_experts,)},
        "experts": _swiglu_shapes(c.n_routed_experts, hidden=c.hidden_size, inner=c.moe_intermediate_size),
    }
    if c.n_shared_experts:
        inner = c.moe_intermediate_size * c.n_shared_experts
        shapes["shared_experts"] = _swiglu_shapes(hidden=c.hidden_size, inner=inner)
    return shapes


def param_specs(config: DeepseekV32Config, dtype: Any = jnp.float32) -> Params:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array.

    Args:
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices; norms and the router's bias are always float32.

    Returns:
      A pytree like that of `init_params`.
    """
    shapes: Params = {
        "embed_tokens": (config.vocab_size, config.hidden_size),
        "layers": [
            {
                "input_layernorm": (config.hidden_size,),
                "self_attn": mla_shapes(config),
                "post_attention_layernorm": (config.hidden_size,),
                "mlp": _mlp_shapes(config, layer),
            }
            for layer in range(config.num_hidden_layers)
        ],
        "norm": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.hidden_size, config.vocab_size)

    def spec(path: tuple, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        wide = any(getattr(key, "key", None) in _FLOAT32_NAMES for key in path)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if wide else dtype)

    return jax.tree_util.tree_map_with_path(spec, shapes, is_leaf=lambda node: isinstance(node, tuple))


def init_params(key: Array, config: DeepseekV32Config, dtype: Any = jnp.float32) -> Params:
    """Random weights: matrices normal with variance 1 / inputs, norms 1, biases 0.

    Args:
      key: a `jax.random.key`.
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices.

    Returns:
      The parameters' pytree.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_specs(config, dtype))
    # Axes that a product sums over, unless it is the second to last one.
    inputs = {"q_b_proj": (0,), "wq_b": (0,), "kv_b_k": (2,), "o_proj": (0, 1), "embed_tokens": (1,)}

    def init(number: int, path: tuple, spec: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if "bias" in name:
            return jnp.zeros(spec.shape, spec.dtype)
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        fan_in = int(np.prod([spec.shape[axis] for axis in inputs.get(name, (-2,))]))
        values = jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
        return (values * fan_in**-0.5).astype(spec.dtype)

    return jax.tree_util.tree_unflatten(tree, [init(i, path, spec) for i, (path, spec) in enumerate(leaves)])
