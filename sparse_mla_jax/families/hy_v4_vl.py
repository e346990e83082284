"""The text model of Hy4 (hy_v4_vl): Hy4-preview's keys in `text_config`, and its names; the vision tower is skipped."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import hy_v4, mla_fields
from sparse_mla_jax.families.skipped import VISION
from sparse_mla_jax.shapes import MlaConfig

# Other than in Hy4-preview.
_ROTATION: dict[str, Any] = {"rope_interleave": True, "indexer_rope_interleave": True}
_MODEL_EPS = ("index_norm_eps", "latent_norm_eps")

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
        **_ROTATION,
    ),
    model_eps=_MODEL_EPS,
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
    text = hy_v4.write_sizes(config, KEYS, FAMILY, dtype)
    half, small = config.qk_rope_head_dim // 2, config.qk_rope_head_dim // 8
    text["rope_parameters"]["mrope_section"] = [half - 2 * small, small, small]
    return mla_fields.wrap_text(text, FAMILY.model_types)


def describe_ignored(name: str, config: MlaConfig) -> str | None:
    """See `PublishedFamily`."""
    tower = name.startswith(("vit.", "model.vit.", "model.visual."))
    return VISION if tower else hy_v4.describe_ignored(name, config)


FAMILY = hy_v4.FAMILY._replace(
    model_types=("hy_v4_vl", "hy_v4_vl_text"),
    architectures=("HYV4VLForConditionalGeneration",),
    defaults=KEYS.defaults,
    read_config=read_config,
    write_config=write_config,
    describe_ignored=describe_ignored,
    composite=(
        *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        *("image_start_token_id", "image_end_token_id", "image_newline_token_id"),
    ),
)
