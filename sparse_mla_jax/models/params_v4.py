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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.attention_weights import compressed_shapes

Params = dict[str, Any]

# Always float32 with their subtrees, whatever the type of the matrices: small, and rounding them costs accuracy.
_FLOAT32_NAMES = frozenset(
    {
        "norm",
        "input_layernorm",
        "post_attention_layernorm",
        "q_a_layernorm",
        "kv_layernorm",
        "sinks",
        "position_bias",
        "attn_hc",
        "ffn_hc",
        "hc_head",
        "e_score_correction_bias",
    }
)


def _swiglu_shapes(*stack: int, hidden: int, inner: int) -> Params:
    return {
        "gate_proj": (*stack, hidden, inner),
        "up_proj": (*stack, hidden, inner),
        "down_proj": (*stack, inner, hidden),
    }


def _mixing_shapes(c: DeepseekV4Config) -> Params:
    mixes = c.hc_mult * (c.hc_mult + 2)
    return {"fn": (c.hc_mult * c.hidden_size, mixes), "base": (mixes,), "scale": (3,)}


def layer_shapes(config: DeepseekV4Config, layer: int) -> Params:
    """The pytree of layer number `layer` with shapes (tuples) in place of arrays."""
    c = config
    gate: Params = {"weight": (c.hidden_size, c.n_routed_experts)}
    if c.is_hash_layer(layer):
        gate["token_experts"] = (c.vocab_size, c.num_experts_per_tok)
    else:
        gate["e_score_correction_bias"] = (c.n_routed_experts,)
    mlp: Params = {
        "gate": gate,
        "experts": _swiglu_shapes(c.n_routed_experts, hidden=c.hidden_size, inner=c.moe_intermediate_size),
    }
    if c.n_shared_experts:
        inner = c.moe_intermediate_size * c.n_shared_experts
        mlp["shared_experts"] = _swiglu_shapes(hidden=c.hidden_size, inner=inner)
    return {
        "attn_hc": _mixing_shapes(c),
        "input_layernorm": (c.hidden_size,),
        "self_attn": compressed_shapes(c, layer),
        "ffn_hc": _mixing_shapes(c),
        "post_attention_layernorm": (c.hidden_size,),
        "mlp": mlp,
    }


def rest_shapes(config: DeepseekV4Config) -> Params:
    """The pytree of the parameters outside the layers, with shapes (tuples) in place of arrays."""
    c = config
    shapes: Params = {
        "embed_tokens": (c.vocab_size, c.hidden_size),
        "norm": (c.hidden_size,),
        "hc_head": {"fn": (c.hc_mult * c.hidden_size, c.hc_mult), "base": (c.hc_mult,), "scale": (1,)},
    }
    if not c.tie_word_embeddings:
        shapes["lm_head"] = (c.hidden_size, c.vocab_size)
    return shapes


def param_specs(config: DeepseekV4Config, dtype: Any = jnp.float32) -> Params:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array.

    Args:
      config: the model's shapes.
      dtype: float32 or bfloat16, of the matrices. Norms, sinks, biases and the hyper-connections' weights are always
        float32; token_experts is int32.

    Returns:
      A pytree like that of `init_params`.
    """
    layers = [layer_shapes(config, layer) for layer in range(config.num_hidden_layers)]

    def spec(path: tuple, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        names = {getattr(key, "key", None) for key in path}
        kind = jnp.float32 if names & _FLOAT32_NAMES else jnp.int32 if "token_experts" in names else dtype
        return jax.ShapeDtypeStruct(shape, kind)

    shapes = {**rest_shapes(config), "layers": layers}
    return jax.tree_util.tree_map_with_path(spec, shapes, is_leaf=lambda node: isinstance(node, tuple))


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
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_specs(config, dtype))
    # The axis that a product sums over, unless it is the second to last one.
    inputs = {"q_b_proj": 0, "wq_b": 0, "embed_tokens": 1}

    def init(number: int, path: tuple, spec: jax.ShapeDtypeStruct) -> Array:
        name, own = path[-1].key, jax.random.fold_in(key, number)
        if name == "token_experts":
            tokens, chosen = spec.shape
            return jax.lax.top_k(jax.random.uniform(own, (tokens, config.n_routed_experts)), chosen)[1]
        if "bias" in name or name in ("base", "sinks"):
            return jnp.zeros(spec.shape, spec.dtype)
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        spread = (0.1 if name == "fn" else 1.0) * np.sqrt(1 / spec.shape[inputs.get(name, -2)])
        return (jax.random.normal(own, spec.shape, jnp.float32) * spread).astype(spec.dtype)

    return jax.tree_util.tree_unflatten(tree, [init(i, path, spec) for i, (path, spec) in enumerate(leaves)])
