"""DeepSeek-V3.2's published tensor names, and how each of our arrays is made of them and back.

Published matrices are output-first ([out, in], as torch.nn.Linear keeps them), ours input-first. kv_b_proj is split in
two, what makes keys and what makes values, and a layer's experts are stacked. `models.checkpoint` says what it asks of
such a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.models.params_v32 import Params
from sparse_mla_jax.models.params_v32 import param_specs as param_specs

Get = Callable[[str], np.ndarray]


def published_shapes(config: DeepseekV32Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this config holds, in the order in which they are written."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, width: int) -> None:
        shapes[name + ".weight"] = (out, width)

    def swiglu(name: str, inner: int) -> None:
        linear(name + ".gate_proj", inner, c.hidden_size)
        linear(name + ".up_proj", inner, c.hidden_size)
        linear(name + ".down_proj", c.hidden_size, inner)

    linear("model.embed_tokens", c.vocab_size, c.hidden_size)
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (c.hidden_size,)
        attention = prefix + "self_attn."
        linear(attention + "q_a_proj", c.q_lora_rank, c.hidden_size)
        shapes[attention + "q_a_layernorm.weight"] = (c.q_lora_rank,)
        linear(attention + "q_b_proj", c.num_attention_heads * c.qk_head_dim, c.q_lora_rank)
        linear(attention + "kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        shapes[attention + "kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        linear(attention + "kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        linear(attention + "o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim)
        linear(attention + "indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        linear(attention + "indexer.wk", c.index_head_dim, c.hidden_size)
        shapes[attention + "indexer.k_norm.weight"] = (c.index_head_dim,)
        shapes[attention + "indexer.k_norm.bias"] = (c.index_head_dim,)
        linear(attention + "indexer.weights_proj", c.index_n_heads, c.hidden_size)
        shapes[prefix + "post_attention_layernorm.weight"] = (c.hidden_size,)
        if not c.is_moe_layer(layer):
            swiglu(prefix + "mlp", c.intermediate_size)
            continue
        linear(prefix + "mlp.gate", c.n_routed_experts, c.hidden_size)
        shapes[prefix + "mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        for expert in range(c.n_routed_experts):
            swiglu(f"{prefix}mlp.experts.{expert}", c.moe_intermediate_size)
        if c.n_shared_experts:
            swiglu(prefix + "mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        linear("lm_head", c.vocab_size, c.hidden_size)
    return shapes


def ignored(name: str, config: DeepseekV32Config) -> bool:
    """Published tensors that this model has no use for: multi-token-prediction layers, derived buffers, tied heads."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        (layer is not None and int(layer.group(1)) >= config.num_hidden_layers)
        or name.endswith("rotary_emb.inv_freq")
        or (config.tie_word_embeddings and name == "lm_head.weight")
    )


def scale_names(name: str) -> tuple[str, ...]:
    """What the scales of an FP8 matrix may be called."""
    return (name + "_scale_inv",)


def may_be_fp4(name: str) -> bool:
    """Whether a tensor may hold FP4 values: none of this family does."""
    return False


def is_table(name: str) -> bool:
    """Whether a tensor holds integers: none of this family does."""
    return False


def stored_dtype(name: str, shape: tuple[int, ...], dtype: Any) -> np.dtype:
    """The type in which a tensor is written where matrices are `dtype`."""
    return np.dtype(np.float32) if len(shape) == 1 else np.dtype(dtype)  # vectors are norms and biases


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_attention(get: Get, prefix: str, c: DeepseekV32Config) -> Params:
    heads, indexer = c.num_attention_heads, prefix + "indexer."
    kv_b = get(prefix + "kv_b_proj.weight").reshape(heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    return {
        "q_a_proj": get(prefix + "q_a_proj.weight").T,
        "q_a_layernorm": get(prefix + "q_a_layernorm.weight"),
        "q_b_proj": get(prefix + "q_b_proj.weight").T.reshape(c.q_lora_rank, heads, c.qk_head_dim),
        "kv_a_proj_with_mqa": get(prefix + "kv_a_proj_with_mqa.weight").T,
        "kv_a_layernorm": get(prefix + "kv_a_layernorm.weight"),
        "kv_b_k": kv_b[:, : c.qk_nope_head_dim],
        "kv_b_v": kv_b[:, c.qk_nope_head_dim :].transpose(0, 2, 1),
        "o_proj": get(prefix + "o_proj.weight").T.reshape(heads, c.v_head_dim, c.hidden_size),
        "indexer": {
            "wq_b": get(indexer + "wq_b.weight").T.reshape(c.q_lora_rank, c.index_n_heads, c.index_head_dim),
            "wk": get(indexer + "wk.weight").T,
            "k_norm": {"weight": get(indexer + "k_norm.weight"), "bias": get(indexer + "k_norm.bias")},
            "weights_proj": get(indexer + "weights_proj.weight").T,
        },
    }


def _read_swiglu(get: Get, prefix: str) -> Params:
    return {name: get(f"{prefix}{name}.weight").T for name in ("gate_proj", "up_proj", "down_proj")}


def _read_mlp(get: Get, prefix: str, layer: int, c: DeepseekV32Config) -> Params:
    if not c.is_moe_layer(layer):
        return _read_swiglu(get, prefix)
    experts = [_read_swiglu(get, f"{prefix}experts.{expert}.") for expert in range(c.n_routed_experts)]
    params: Params = {
        "gate": {
            "weight": get(prefix + "gate.weight").T,
            "e_score_correction_bias": get(prefix + "gate.e_score_correction_bias"),
        },
        "experts": {name: [expert[name] for expert in experts] for name in experts[0]},
    }
    if c.n_shared_experts:
        params["shared_experts"] = _read_swiglu(get, prefix + "shared_experts.")
    return params


def read_layer(get: Get, number: int, config: DeepseekV32Config) -> Params:
    """Layer `number` from its published tensors; experts come as lists."""
    prefix = f"model.layers.{number}."
    return {
        "input_layernorm": get(prefix + "input_layernorm.weight"),
        "self_attn": _read_attention(get, prefix + "self_attn.", config),
        "post_attention_layernorm": get(prefix + "post_attention_layernorm.weight"),
        "mlp": _read_mlp(get, prefix + "mlp.", number, config),
    }


def read_rest(get: Get, config: DeepseekV32Config) -> Params:
    """What lies outside the layers."""
    params: Params = {"embed_tokens": get("model.embed_tokens.weight"), "norm": get("model.norm.weight")}
    if not config.tie_word_embeddings:
        params["lm_head"] = get("lm_head.weight").T
    return params


# --- writing ---------------------------------------------------------------------------------------------------------


def config_to_json(config: DeepseekV32Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.23) and `load_config` both read."""
    c = config
    rope: dict[str, Any] = {"rope_theta": c.rope.theta, "rope_type": "default"}
    if c.rope.factor != 1.0:
        rope = {
            "rope_type": "yarn",
            "rope_theta": c.rope.theta,
            "factor": c.rope.factor,
            "original_max_position_embeddings": c.rope.original_max_position,
            "beta_fast": c.rope.beta_fast,
            "beta_slow": c.rope.beta_slow,
            "mscale": c.rope.mscale_all_dim,
            "mscale_all_dim": c.rope.mscale_all_dim,
            # Cosines and sines carry no amplitude; said outright, because without mscale the reader would add one.
            "attention_factor": 1.0,
        }
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads"
        " q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts"
        " num_experts_per_tok n_group topk_group routed_scaling_factor norm_topk_prob first_k_dense_replace"
        " index_n_heads index_head_dim index_topk rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    kinds = ["sparse" if c.is_moe_layer(layer) else "dense" for layer in range(c.num_hidden_layers)]
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": str(jnp.dtype(dtype)),
        **{name: getattr(c, name) for name in names.split()},
        "num_key_value_heads": c.num_attention_heads,
        "head_dim": c.qk_rope_head_dim,
        "qk_head_dim": c.qk_head_dim,
        "layer_types": ["indexed_attention"] * c.num_hidden_layers,
        "mlp_layer_types": kinds,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _publish_swiglu(prefix: str, params: Params) -> Iterator[tuple[str, Any]]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"{prefix}{name}.weight", params[name].T


def _publish_attention(prefix: str, p: Params) -> Iterator[tuple[str, Any]]:
    yield prefix + "q_a_proj.weight", p["q_a_proj"].T
    yield prefix + "q_a_layernorm.weight", p["q_a_layernorm"]
    yield prefix + "q_b_proj.weight", p["q_b_proj"].reshape(p["q_b_proj"].shape[0], -1).T
    yield prefix + "kv_a_proj_with_mqa.weight", p["kv_a_proj_with_mqa"].T
    yield prefix + "kv_a_layernorm.weight", p["kv_a_layernorm"]
    both = np.concatenate([p["kv_b_k"], p["kv_b_v"].transpose(0, 2, 1)], axis=1)
    yield prefix + "kv_b_proj.weight", both.reshape(-1, both.shape[-1])
    yield prefix + "o_proj.weight", p["o_proj"].reshape(-1, p["o_proj"].shape[-1]).T
    indexer = p["indexer"]
    yield prefix + "indexer.wq_b.weight", indexer["wq_b"].reshape(indexer["wq_b"].shape[0], -1).T
    yield prefix + "indexer.wk.weight", indexer["wk"].T
    yield prefix + "indexer.k_norm.weight", indexer["k_norm"]["weight"]
    yield prefix + "indexer.k_norm.bias", indexer["k_norm"]["bias"]
    yield prefix + "indexer.weights_proj.weight", indexer["weights_proj"].T


def publish(params: Params, config: DeepseekV32Config) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and arrays, in the order of `published_shapes`; one layer at a time is on the host."""
    yield "model.embed_tokens.weight", np.asarray(params["embed_tokens"])
    for number, on_device in enumerate(params["layers"]):
        layer, prefix = jax.tree.map(np.asarray, on_device), f"model.layers.{number}."
        mlp, mlp_prefix = layer["mlp"], prefix + "mlp."
        yield prefix + "input_layernorm.weight", layer["input_layernorm"]
        yield from _publish_attention(prefix + "self_attn.", layer["self_attn"])
        yield prefix + "post_attention_layernorm.weight", layer["post_attention_layernorm"]
        if not config.is_moe_layer(number):
            yield from _publish_swiglu(mlp_prefix, mlp)
            continue
        yield mlp_prefix + "gate.weight", mlp["gate"]["weight"].T
        yield mlp_prefix + "gate.e_score_correction_bias", mlp["gate"]["e_score_correction_bias"]
        for expert in range(config.n_routed_experts):
            own = {name: stack[expert] for name, stack in mlp["experts"].items()}
            yield from _publish_swiglu(f"{mlp_prefix}experts.{expert}.", own)
        if config.n_shared_experts:
            yield from _publish_swiglu(mlp_prefix + "shared_experts.", mlp["shared_experts"])
    yield "model.norm.weight", np.asarray(params["norm"])
    if not config.tie_word_embeddings:
        yield "lm_head.weight", np.asarray(params["lm_head"]).T
