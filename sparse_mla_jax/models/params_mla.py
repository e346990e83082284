"""The parameters of models with latent attention as a pytree: shapes, types, random weights.

A plain pytree of arrays. Matrices are stored input-first ([D_in, ...]), so that a product reads `x @ w`:

    embed_tokens [V, D], norm [D], lm_head [D, V] (absent when tied), layers: one dict per layer with
      input_layernorm [D], post_attention_layernorm [D], self_attn (see `layers.mla.attention_step`), mlp: SwiGLU
      {gate_proj [D, I], up_proj [D, I], down_proj [I, D]} or a mixture (see `layers.moe.moe`).

As the config asks: hc_head {fn [n*D, n], base [n], scale [1]} and in every layer attn_hc, ffn_hc {fn [n*D, 2*n],
base [2*n], scale [2]} (n = hc_mult residual streams); rope_alpha [dr // 2] (learned_rope); gated norms {weight [D],
down [D, r], up [r, D]} in place of input_layernorm, and of post_attention_layernorm in layers with experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.layers.attention_weights import mla_shapes
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig

Params = dict[str, Any]

# Always float32, whatever the type of the matrices: they are small, and rounding them costs accuracy.
_FLOAT32_NAMES = frozenset(
    {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "q_a_layernorm",
        "kv_a_layernorm",
        "k_rope_layernorm",
        "k_norm",
        "q_norm",
        "sinks",
        "query_scale",
        "rope_alpha",
        "attn_hc",
        "ffn_hc",
        "hc_head",
        "e_score_correction_bias",
        "q_a_proj_bias",
        "kv_a_proj_with_mqa_bias",
        "o_proj_bias",
    }
)
# Vectors that start at 0; others start at 1.
_ZEROS = frozenset({"base", "sinks", "rope_alpha"})


def _swiglu_shapes(*stack: int, hidden: int, inner: int) -> Params:
    return {
        "gate_proj": (*stack, hidden, inner),
        "up_proj": (*stack, hidden, inner),
        "down_proj": (*stack, inner, hidden),
    }


def _mlp_shapes(c: MlaConfig, layer: MlaLayer) -> Params:
    if not layer.is_moe:
        return _swiglu_shapes(hidden=c.hidden_size, inner=c.intermediate_size)
    gate: Params = {"weight": (c.hidden_size, c.n_routed_experts)}
    if c.scoring_func == "sigmoid":
        gate["e_score_correction_bias"] = (c.n_routed_experts,)
    shapes = {
        "gate": gate,
        "experts": _swiglu_shapes(c.n_routed_experts, hidden=c.hidden_size, inner=c.moe_intermediate_size),
    }
    if c.n_shared_experts:
        shapes["shared_experts"] = _swiglu_shapes(hidden=c.hidden_size, inner=c.shared_width)
    return shapes


def _norm_shapes(c: MlaConfig, gated: bool) -> Any:
    if not gated:
        return (c.hidden_size,)
    rank = c.gated_norm_rank
    return {"weight": (c.hidden_size,), "down": (c.hidden_size, rank), "up": (rank, c.hidden_size)}


def _layer_shapes(c: MlaConfig, layer: MlaLayer) -> Params:
    is_gated = c.gated_norm_rank > 0
    shapes: Params = {
        "input_layernorm": _norm_shapes(c, is_gated),
        "self_attn": mla_shapes(c, layer),
        "post_attention_layernorm": _norm_shapes(c, is_gated and layer.is_moe),
        "mlp": _mlp_shapes(c, layer),
    }
    if c.hc_mult:
        mixes = {"fn": (c.hc_mult * c.hidden_size, 2 * c.hc_mult), "base": (2 * c.hc_mult,), "scale": (2,)}
        shapes |= {"attn_hc": mixes, "ffn_hc": mixes}
    return shapes


def param_specs(config: MlaConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array.

    Args:
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices; norms, biases and other small weights are always float32.

    Returns:
      A pytree like that of `init_params`.
    """
    c = config
    shapes: Params = {
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "layers": [_layer_shapes(c, layer) for layer in c.layers],
        "norm": (c.hidden_size,),
    }
    if c.hc_mult:
        shapes["hc_head"] = {"fn": (c.hc_mult * c.hidden_size, c.hc_mult), "base": (c.hc_mult,), "scale": (1,)}
    if c.learned_rope:
        shapes["rope_alpha"] = (c.qk_rope_head_dim // 2,)
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.hidden_size, c.vocab_size)
    wide = _FLOAT32_NAMES | ({"lm_head"} if c.float32_head else set())

    def spec(path: tuple, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        is_wide = any(getattr(key, "key", None) in wide for key in path)
        return jax.ShapeDtypeStruct(shape, jnp.float32 if is_wide else dtype)

    return jax.tree_util.tree_map_with_path(spec, shapes, is_leaf=lambda node: isinstance(node, tuple))


def init_params(key: Array, config: MlaConfig, dtype: Any = jnp.float32) -> Params:
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
    first = dict.fromkeys(("q_b_proj", "q_proj", "wq_b", "output_gate"), (0,))
    inputs = {**first, "kv_b_k": (2,), "o_proj": (0, 1), "embed_tokens": (1,)}

    def init(number: int, path: tuple, spec: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if "bias" in name or name in _ZEROS:
            return jnp.zeros(spec.shape, spec.dtype)
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        fan_in = int(np.prod([spec.shape[axis] for axis in inputs.get(name, (-2,))]))
        values = jax.random.normal(jax.random.fold_in(key, number), spec.shape, jnp.float32)
        return (values * fan_in**-0.5).astype(spec.dtype)

    return jax.tree_util.tree_unflatten(tree, [init(i, path, spec) for i, (path, spec) in enumerate(leaves)])
