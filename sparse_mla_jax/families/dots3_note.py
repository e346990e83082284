"""dots3.note (dots3_note), text: the keys of its config.json and the names of its tensors. Towers are skipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import dots3_layers, mla_fields
from sparse_mla_jax.families.index_sharing import check_own_indexers
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_tensors import ATTENTION, MlaNames, layer_table
from sparse_mla_jax.families.published import Places
from sparse_mla_jax.families.rotary import write_rope
from sparse_mla_jax.families.skipped import AUDIO, PREDICTION, VISION
from sparse_mla_jax.mla_layer import INDEXED
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# --- config.json

KEYS = mla_fields.MlaKeys(
    MlaConfig(
        family="dots3_note",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        moe_intermediate_size=1536,
        num_hidden_layers=46,
        q_lora_rank=1024,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        rms_norm_eps=1e-5,
        max_position_embeddings=524288,
        indexer_rope_interleave=True,
        rope=RopeConfig(theta=8e7),
        sliding_window=512,
        attention_gate="head",
        latent_scaling=True,
        rope_key_norm=True,
        latent_norm_eps=1e-5,
        shared_experts_intermediate_size=1536,
    ),
    ("Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration"),
    numbers=(*mla_fields.NUMBERS, "sliding_window", "shared_experts_intermediate_size"),
    aliases={
        "n_routed_experts": ("num_local_experts",),
        "sliding_window": ("sliding_window_size",),
        "shared_experts_intermediate_size": ("moe_shared_expert_intermediate_size",),
    },
    fixed={name: values for name, values in mla_fields.FIXED.items() if name != "per_layer_config"},
    model_eps=("latent_norm_eps",),
    has_moe_frequency=True,
    # The rotated width is qk_rope_head_dim; head_dim may be another one.
    has_head_dim=False,
    read_indexers=check_own_indexers,
    # Its readers take mlp_layer_types in place of first_k_dense_replace.
    unwritten=("indexer_types", "qk_head_dim", "first_k_dense_replace"),
)


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads a config as transformers (5.24) saves it, or as the hub has it."""
    sizes = mla_fields.read_common(fields, KEYS)
    kinds = dots3_layers.read_kinds(fields, sizes["num_hidden_layers"])
    ropes = dots3_layers.read_ropes(fields, sizes["max_position_embeddings"], KEYS.defaults.rope)
    types = () if set(kinds) == {INDEXED} else tuple(kinds)
    main = ropes[next((kind for kind in kinds if kind != dots3_layers.SLIDING), dots3_layers.SLIDING)]
    config = mla_fields.make_config(fields, KEYS, sizes, rope=main, layer_types=types)
    return dataclasses.replace(config, layer_sizes=dots3_layers.read_layer_sizes(fields, config, kinds, ropes))


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    common = mla_fields.write_config(config, dtype, keys=KEYS)
    return {**common, "model_type": "dots3_note_text", **_write_layers(config)}


def _write_layers(config: MlaConfig) -> dict[str, Any]:
    """The fields that say how layers differ, as transformers (5.24) saves them."""
    changes: dict[str, Any] = {}
    ropes: dict[str, Any] = {}
    for layer in config.layers:
        sizes = layer.sizes
        own = {name: getattr(sizes, name) for name in dots3_layers.SIZES}
        differing = {name: value for name, value in own.items() if value != getattr(config, name)}
        if "num_attention_heads" in differing:
            differing["num_key_value_heads"] = sizes.num_attention_heads
        if differing or layer.is_sliding:
            # Without an entry, readers would take the sizes that sliding layers have by default.
            heads = {"num_attention_heads": sizes.num_attention_heads}
            changes[str(layer.number)] = {**heads, **differing, "head_dim": sizes.qk_head_dim}
        rotated = {"partial_rotary_factor": sizes.qk_rope_head_dim / sizes.qk_head_dim}
        ropes.setdefault(layer.kind, {**write_rope(sizes.rope), **rotated})
    return {"per_layer_config": changes, "rope_parameters": ropes, "head_dim": config.qk_head_dim}


# --- tensors

_ATTENTION: Places = {
    **ATTENTION,
    "k_rope_only_layernorm.weight": "k_rope_layernorm",
    "g_proj.weight": "output_gate",
}
NAMES = MlaNames(
    layer=layer_table(_ATTENTION),
    spellings=((r"^model\.language_model\.", "model."), (r"^language_model\.", "")),
    skipped=(
        (r"model\.mtp\.", PREDICTION),
        (r"(model\.)?(vision|visual|image)\w*\.", VISION),
        (r"(model\.)?audio\w*\.", AUDIO),
    ),
)

FAMILY = mla_family(
    KEYS,
    NAMES,
    model_types=("dots3_note", "dots3_note_text"),
    further_keys=dots3_layers.KEYS,
    read_config=read_config,
    write_config=write_config,
    composite=("vision_config", "audio_config", "image_token_id", "video_token_id", "audio_token_id"),
)
