"""Mistral Large 4 (mistral_large4), text: the keys of its `text_config` and the names of its tensors.

The names are Mistral's own, which save_pretrained of transformers (5.24) writes too. Vision is skipped.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.index_sharing import read_indexer_types
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_tensors import INDEXER, SWIGLU_123, MlaNames, under
from sparse_mla_jax.families.published import KEYS_AND_VALUES, SAME, Places, transposed
from sparse_mla_jax.families.skipped import PREDICTION, VISION
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# --- config.json

KEYS = mla_fields.MlaKeys(
    MlaConfig(
        family="mistral_large4",
        vocab_size=204800,
        hidden_size=6144,
        intermediate_size=24576,
        moe_intermediate_size=6144,
        num_hidden_layers=72,
        num_attention_heads=64,
        q_lora_rank=0,
        qk_nope_head_dim=64,
        n_routed_experts=128,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        first_k_dense_replace=1,
        index_n_heads=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=1048576,
        indexer_rope_interleave=True,
        rope=RopeConfig(factor=2048.0, original_max_position=512),
        scoring_func="softmax",
        latent_norm_eps=1e-5,
        learned_rope=True,
        query_position_scale=True,
        index_query_from_hidden=True,
        final_logit_softcapping=30.0,
    ),
    ("MistralLarge4ForConditionalGeneration",),
    numbers=(
        *(name for name in mla_fields.NUMBERS if name not in ("q_lora_rank", "norm_topk_prob")),
        "final_logit_softcapping",
    ),
    nulls={**mla_fields.NULLS, "final_logit_softcapping": 0.0},
    fixed={
        **{name: values for name, values in mla_fields.FIXED.items() if name != "topk_method"},
        **mla_fields.ONE_MOE_LAYER_IN_1,
        "scoring_func": ("softmax",),
        "norm_topk_prob": (True,),
    },
    model_eps=("latent_norm_eps",),
    read_indexers=read_indexer_types,
    unwritten=("mlp_bias",),
)
_ROPE_INTERVAL = 4


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads the fields of a `text_config`."""
    sizes = mla_fields.read_common(fields, KEYS)
    layers = sizes["num_hidden_layers"]
    return mla_fields.make_config(
        fields,
        KEYS,
        sizes,
        rope_layers=_read_rope_layers(fields, layers),
        kv_source_layers=_read_sources(fields, layers),
    )


def _read_rope_layers(fields: ConfigFields, layers: int) -> tuple[bool, ...]:
    """no_rope_layers, in which 1 stands for a layer that rotates, or the older no_rope_layer_interval."""
    interval = fields.read("no_rope_layer_interval", int, _ROPE_INTERVAL)
    require(
        interval >= 1, f"config field no_rope_layer_interval is {interval}; it must be at least 1. Mend config.json."
    )
    rotates = [(i + 1) % interval != 0 for i in range(layers)]
    if fields.has("no_rope_layers"):
        rotates = fields.read_flags("no_rope_layers", layers)
    return () if all(rotates) else tuple(rotates)


def _read_sources(fields: ConfigFields, layers: int) -> tuple[int, ...]:
    sources = fields.read("kv_source_layers", list, list(range(layers)))
    require(
        len(sources) == layers and all(type(one) is int and 0 <= one <= i for i, one in enumerate(sources)),
        f"config field kv_source_layers is {shown(sources)}; {layers} numbers of layers are expected, each its own or"
        " an earlier one. Mend config.json.",
    )
    return () if sources == list(range(layers)) else tuple(sources)


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    c = config
    rotates = c.rope_layers or (True,) * c.num_hidden_layers
    text = {
        **mla_fields.write_config(c, dtype, keys=KEYS),
        "no_rope_layers": [int(one) for one in rotates],
        "kv_source_layers": [layer.kv_source for layer in c.layers],
        "final_logit_softcapping": c.final_logit_softcapping or None,
    }
    return mla_fields.wrap_text(text, FAMILY.model_types)


# --- tensors

_SCALE: Places = {"s": "scale", "b": "bias"}
_ATTENTION: Places = {
    "wq.weight": "q_proj",
    "wkv_a_with_mqa.weight": "kv_a_proj_with_mqa",
    "wkv_a_with_mqa.bias": "kv_a_proj_with_mqa_bias",
    "kv_a_norm.weight": "kv_a_layernorm",
    "wkv_b.weight": ("kv_b_k kv_b_v", KEYS_AND_VALUES),
    "wo.weight": ("o_proj", transposed(inputs=2)),
    "wo.bias": "o_proj_bias",
    **under(_SCALE, "ssmax_scaling.", "query_scale."),
    **under(INDEXER, "indexer.", "indexer."),
    **{f"indexer.q_input_norm.{one}": f"indexer.q_norm.{one}" for one in ("weight", "bias")},
    **under(_SCALE, "indexer.ssmax_scaling.", "indexer.query_scale."),
}
NAMES = MlaNames(
    top={"tok_embeddings.weight": ("embed_tokens", SAME), "lerope.alpha": "rope_alpha"},
    end={"norm.weight": "norm", "output.weight": "lm_head"},
    layer={
        "attention_norm.weight": "input_layernorm",
        "ffn_norm.weight": "post_attention_layernorm",
        "gate.weight": "mlp.gate.weight",
        **under(_ATTENTION, "attention.", "self_attn."),
    },
    layers="layers.",
    dense="feed_forward.",
    shared="shared_experts.",
    experts="experts.",
    swiglu=SWIGLU_123,
    head="output.weight",
    skipped=(
        (r"mtp_dspark\.", PREDICTION),
        (r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\.", VISION),
    ),
)

FAMILY = mla_family(
    KEYS,
    NAMES,
    model_types=("mistral_large4", "mistral_large4_text"),
    further_keys=("no_rope_layers", "kv_source_layers"),
    read_config=read_config,
    write_config=write_config,
    composite=(
        *("vision_config", "image_token_index", "spatial_merge_size", "vision_feature_layer", "projector_hidden_act"),
        *("multimodal_projector_bias",),
    ),
)
