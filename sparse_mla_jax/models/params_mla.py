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

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.layers.attention_weights import mla_shapes
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.models.params import (
    Params,
    mixing_shapes,
    mixture_shapes,
    random_params,
    rest_shapes,
    specs_of,
    swiglu_shapes,
)


def _mlp_shapes(c: MlaConfig, layer: MlaLayer) -> Params:
    if not layer.is_moe:
        return swiglu_shapes(hidden=c.hidden_size, inner=c.intermediate_size)
    bias = {"e_score_correction_bias": (c.n_routed_experts,)} if c.scoring_func == "sigmoid" else {}
    return mixture_shapes(c, bias, c.shared_width)


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
        shapes |= dict.fromkeys(("attn_hc", "ffn_hc"), mixing_shapes(c, 2 * c.hc_mult, 2))
    return shapes


def param_specs(config: MlaConfig, dtype: Any = jnp.float32) -> Params:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array.

    Args:
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices; norms, biases, routers and other small weights are always float32.

    Returns:
      A pytree like that of `init_params`.
    """
    shapes = {**rest_shapes(config), "layers": [_layer_shapes(config, layer) for layer in config.layers]}
    if config.learned_rope:
        shapes["rope_alpha"] = (config.qk_rope_head_dim // 2,)
    return specs_of(shapes, dtype, wide=("gate", *(["lm_head"] if config.float32_head else [])))


def init_params(key: Array, config: MlaConfig, dtype: Any = jnp.float32) -> Params:
    """Random weights: matrices normal with variance 1 / inputs, norms 1, biases 0.

    Args:
      key: a `jax.random.key`.
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices.

    Returns:
      The parameters' pytree.
    """
    return random_params(key, param_specs(config, dtype), config.n_routed_experts)
