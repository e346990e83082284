"""DeepSeek-V3.2: the keys of its config.json and the names of its tensors.

FP8 matrices have their scales in "weight_scale_inv", as DeepSeek publishes them, or in "weight_scale", as
compressed-tensors, Quark and ModelOpt write them. Experts may be fused, as transformers holds them in memory:
"mlp.experts.gate_up_proj" [E, 2 I, D], gate rows first, and "mlp.experts.down_proj" [E, D, I].
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.fields import COMMON_FIELDS, ConfigFields, read_sizes, write_sizes
from sparse_mla_jax.families.published import (
    KEYS_AND_VALUES,
    SAME,
    Places,
    PublishedFamily,
    PublishedTensor,
    Shape,
    StoredPart,
    is_run_time_scale,
    table_rows,
    transposed,
)
from sparse_mla_jax.families.rotary import read_rope, write_yarn
from sparse_mla_jax.shapes import DeepseekV32Config

# --- config.json

# Hugging Face transformers has no such fields: it always rotates like this.
_UNWRITTEN = {"rope_interleave": True, "indexer_rope_interleave": False}


def read_config(fields: ConfigFields) -> DeepseekV32Config:
    """Reads a config with published names or those of Hugging Face transformers (5.x)."""
    sizes = read_sizes(fields, DeepseekV32Config, aliases=mla_fields.ALIASES, nulls=mla_fields.NULLS)
    mla_fields.read_dense_layers(fields, sizes)
    context = sizes.get("max_position_embeddings", DeepseekV32Config.max_position_embeddings)
    config = DeepseekV32Config(**sizes, rope=read_rope(fields, context))
    fields.require_values(mla_fields.FIXED)
    mla_fields.check_derived(fields, config)
    mla_fields.check_indexed_layers(fields, config.num_hidden_layers)
    return config


def write_config(config: DeepseekV32Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.23) and `read_config` both read."""
    c = config
    rope: dict[str, Any] = {"rope_theta": c.rope.theta, "rope_type": "default"}
    if c.rope.factor != 1.0 or c.rope.attention_factor != 1.0:
        rope |= {
            "rope_type": "yarn",
            **write_yarn(c.rope),
            "mscale": c.rope.mscale_all_dim,
            "mscale_all_dim": c.rope.mscale_all_dim,
            # Write the amplitude of cosines and sines explicitly: without mscale, readers differ.
            "attention_factor": float(c.rope.attention_factor),
        }
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": str(jnp.dtype(dtype)),
        **{name: value for name, value in write_sizes(c).items() if value != _UNWRITTEN.get(name)},
        "num_key_value_heads": c.num_attention_heads,
        "head_dim": c.qk_rope_head_dim,
        "qk_head_dim": c.qk_head_dim,
        "layer_types": ["indexed_attention"] * c.num_hidden_layers,
        "mlp_layer_types": ["sparse" if c.is_moe_layer(layer) else "dense" for layer in range(c.num_hidden_layers)],
        "rope_parameters": rope,
        **COMMON_FIELDS,
        "mlp_bias": False,
        "pad_token_id": None,
    }


# --- tensors

_LAYER: Places = {"input_layernorm.weight": "input_layernorm"}
_ATTENTION: Places = {
    "q_a_proj.weight": "q_a_proj",
    "q_a_layernorm.weight": "q_a_layernorm",
    "q_b_proj.weight": "q_b_proj",
    "kv_a_proj_with_mqa.weight": "kv_a_proj_with_mqa",
    "kv_a_layernorm.weight": "kv_a_layernorm",
    "kv_b_proj.weight": ("kv_b_k kv_b_v", KEYS_AND_VALUES),
    "o_proj.weight": ("o_proj", transposed(inputs=2)),
    "indexer.wq_b.weight": "indexer.wq_b",
    "indexer.wk.weight": "indexer.wk",
    "indexer.k_norm.weight": "indexer.k_norm.weight",
    "indexer.k_norm.bias": "indexer.k_norm.bias",
    "indexer.weights_proj.weight": "indexer.weights_proj",
}
_AFTER_ATTENTION: Places = {"post_attention_layernorm.weight": "post_attention_layernorm"}
_GATE: Places = {
    "gate.weight": "gate.weight",
    "gate.e_score_correction_bias": "gate.e_score_correction_bias",
}
_SWIGLU = ("gate_proj", "up_proj", "down_proj")


def _swiglu(name: str, place: str, expert: str = "") -> Iterator[PublishedTensor]:
    return table_rows({f"{part}.weight": part + expert for part in _SWIGLU}, name, place)


def _mlp(c: DeepseekV32Config, layer: int, name: str, place: str) -> Iterator[PublishedTensor]:
    if not c.is_moe_layer(layer):
        yield from _swiglu(name, place)
        return
    yield from table_rows(_GATE, name, place)
    for expert in range(c.n_routed_experts):
        yield from _swiglu(f"{name}experts.{expert}.", place + "experts.", f".{expert}")
    if c.n_shared_experts:
        yield from _swiglu(name + "shared_experts.", place + "shared_experts.")


def tensors(config: DeepseekV32Config) -> Iterator[PublishedTensor]:
    """Yields every tensor of a folder of this config, in the order in which they are written."""
    yield from table_rows({"embed_tokens.weight": ("embed_tokens", SAME)}, "model.", "")
    for layer in range(config.num_hidden_layers):
        name, place = f"model.layers.{layer}.", f"layers.{layer}."
        yield from table_rows(_LAYER, name, place)
        yield from table_rows(_ATTENTION, name + "self_attn.", place + "self_attn.")
        yield from table_rows(_AFTER_ATTENTION, name, place)
        yield from _mlp(config, layer, name + "mlp.", place + "mlp.")
    yield from table_rows({"norm.weight": "norm"}, "model.", "")
    if not config.tie_word_embeddings:
        yield from table_rows({"lm_head.weight": "lm_head"}, "", "")


def is_ignored(name: str, config: DeepseekV32Config) -> bool:
    """Whether the model does not use this tensor: multi-token prediction, a buffer, a tied head, a scale of a run."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        (layer is not None and int(layer.group(1)) >= config.num_hidden_layers)
        or name.endswith("rotary_emb.inv_freq")
        or is_run_time_scale(name)
        or (config.tie_word_embeddings and name == "lm_head.weight")
    )


def scale_names(name: str) -> tuple[str, ...]:
    """Possible names of the scales of an FP8 matrix, the published one first."""
    return name + "_scale_inv", name + "_scale"


_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)")


def parts(name: str, shape: Shape, config: DeepseekV32Config) -> list[StoredPart]:
    """The published tensors that a file's tensor holds: several if it is one of fused experts, else itself."""
    fused = _FUSED.fullmatch(name)
    if fused is None or len(shape) != 3 or shape[0] != config.n_routed_experts:
        return [StoredPart(name)]
    prefix, kind = fused.groups()
    experts, half = range(shape[0]), shape[1] // 2
    if kind == "down_proj":
        return [StoredPart(f"{prefix}{expert}.down_proj.weight", (expert,)) for expert in experts]
    rows = {"gate_proj": slice(0, half), "up_proj": slice(half, shape[1])}
    return [
        StoredPart(f"{prefix}{expert}.{part}.weight", (expert, own)) for expert in experts for part, own in rows.items()
    ]


FAMILY = PublishedFamily(
    model_types=("deepseek_v32", "deepseek_v3_2"),
    architectures=("DeepseekV32ForCausalLM",),
    config_type=DeepseekV32Config,
    read_config=read_config,
    write_config=write_config,
    tensors=tensors,
    is_ignored=is_ignored,
    scale_names=scale_names,
    parts=parts,
    fp4_experts=False,
)
