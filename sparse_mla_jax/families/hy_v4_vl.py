"""The text model of Hy4 (hy_v4_vl): Hy4-preview's keys in `text_config`, and its names; the vision tower is skipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import hy_v4, mla_fields
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.skipped import VISION
from sparse_mla_jax.shapes import MlaConfig

KEYS = dataclasses.replace(
    hy_v4.KEYS,
    defaults=dataclasses.replace(
        hy_v4.KEYS.defaults,
        family="hy_v4_vl",
        hidden_size=6144,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=78,
        num_attention_heads=64,
        q_lora_rank=2048,
        index_n_heads=32,
        latent_norm_eps=1e-5,
        # Other than in Hy4-preview.
        rope_interleave=True,
        indexer_rope_interleave=True,
    ),
    architectures=("HYV4VLForConditionalGeneration",),
    model_eps=("index_norm_eps", "latent_norm_eps"),
)


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads the fields of a `text_config`."""
    sections = {name: fields.section(name) for name in ("rope_parameters", "rope_scaling")}
    axes = {name: section.read("mrope_section", list) for name, section in sections.items() if section}
    config = hy_v4.read_config(fields, KEYS)
    half = config.qk_rope_head_dim // 2
    for name, sizes in axes.items():
        # A text token has the same position on all axes, so their sizes do not matter.
        require(
            sizes is None or (all(type(size) is int and size >= 0 for size in sizes) and sum(sizes) == half),
            f"config field {name}.mrope_section is {shown(sizes)}; sizes that sum to {half}, half of qk_rope_head_dim,"
            " are expected. Mend config.json.",
        )
    return config


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    text = mla_fields.write_config(config, dtype, keys=KEYS)
    half, small = config.qk_rope_head_dim // 2, config.qk_rope_head_dim // 8
    text["rope_parameters"]["mrope_section"] = [half - 2 * small, small, small]
    return mla_fields.wrap_text(text, FAMILY.model_types)


NAMES = dataclasses.replace(
    hy_v4.NAMES, skipped=(*hy_v4.NAMES.skipped, (r"(model\.)?vit\.", VISION), (r"model\.visual\.", VISION))
)

FAMILY = mla_family(
    KEYS,
    NAMES,
    model_types=("hy_v4_vl", "hy_v4_vl_text"),
    read_config=read_config,
    write_config=write_config,
    fused_experts=True,
    composite=(
        *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        *("image_start_token_id", "image_end_token_id", "image_newline_token_id"),
    ),
)
