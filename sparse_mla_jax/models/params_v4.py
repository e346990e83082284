"""DeepSeek-V4's parameters as a pytree: shapes, types, random weights.

A plain pytree of arrays. Matrices are stored input-first, so that a product reads `x @ w`. V vocabulary, D hidden, n =
hc_mult streams, H heads of width d, r_q and r_o ranks of query and output, g = o_groups, Hi and Di the indexer's heads
and their width, m a layer's compression ratio, c = 2 if its windows overlap (m = 4), else 1, E experts of inner width
I, k experts per token:

    embed_tokens [V, D], norm [D], lm_head [D, V] (absent when tied), hc_head {fn [n*D, n], base [n], scale [1]},
    layers: one dict per layer with
      attn_hc, ffn_hc: {fn [n*D, n*(n+2)], base [n*(n+2)], scale [3]}
      input_layernorm [D], post_attention_layernorm [D]
      self_attn: q_a_proj [D, r_q], q_a_layernorm [r_q], q_b_proj [r_q, H, d], kv_proj [D, d], kv_layernorm [d],
        sinks [H], o_a_proj [g, H//g*d, r_o], o_b_proj [g*r_o, D],
        compressor (m > 1) {kv_proj [D, c*d], gate_proj [D, c*d], position_bias [m, c*d], norm [d]},
        indexer (m = 4) {wq_b [r_q, Hi, Di], weights_proj [D, Hi], compressor: the same at width Di}
      mlp: gate {weight [D, E], e_score_correction_bias [E] or, in hash layers, token_experts int32[V, k]},
        experts {gate_proj [E, D, I], up_proj [E, D, I], down_proj [E, I, D]},
        shared_experts {gate_proj, up_proj, down_proj} of inner width I * n_shared_experts (absent when that is 0)
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.attention_weights import compressed_shapes
from sparse_mla_jax.models.params import Params, mixing_shapes, mixture_shapes, random_params, rest_shapes, specs_of


def _layer_shapes(c: DeepseekV4Config, layer: int) -> Params:
    experts = {"e_score_correction_bias": (c.n_routed_experts,)}
    table = {"token_experts": (c.vocab_size, c.num_experts_per_tok)}
    mixes = mixing_shapes(c, c.hc_mult * (c.hc_mult + 2), 3)
    return {
        "attn_hc": mixes,
        "input_layernorm": (c.hidden_size,),
        "self_attn": compressed_shapes(c, layer),
        "ffn_hc": mixes,
        "post_attention_layernorm": (c.hidden_size,),
        "mlp": mixture_shapes(
            c, table if c.is_hash_layer(layer) else experts, c.moe_intermediate_size * c.n_shared_experts
        ),
    }


def param_specs(config: DeepseekV4Config, dtype: Any = jnp.float32) -> Params:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array.

    Args:
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices. Norms, sinks, biases and the hyper-connections' weights are always
        float32; token_experts is int32.

    Returns:
      A pytree like that of `init_params`.
    """
    layers = [_layer_shapes(config, layer) for layer in range(config.num_hidden_layers)]
    return specs_of({**rest_shapes(config), "layers": layers}, dtype)


def init_params(key: Array, config: DeepseekV4Config, dtype: Any = jnp.float32) -> Params:
    """Random weights with which every layer is numerically well behaved.

    Matrices are normal with variance 1 / inputs, those of the hyper-connections with a hundredth of that. Norms and the
    hyper-connections' scales are 1, biases and sinks 0. token_experts holds k different experts for each token.

    Args:
      key: a `jax.random.key`.
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices.

    Returns:
      The parameters' pytree.
    """
    return random_params(key, param_specs(config, dtype), config.n_routed_experts, {"fn": 0.1})
