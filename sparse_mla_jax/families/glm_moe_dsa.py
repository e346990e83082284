"""GLM-5 (glm_moe_dsa): DeepSeek-V3.2's keys and names, with indexers that layers may share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.index_sharing import read_indexer_types, write_indexer_types
from sparse_mla_jax.families.mla_tensors import MlaNames, scale_names
from sparse_mla_jax.families.published import PublishedFamily
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

KEYS = mla_fields.MlaKeys(
    MlaConfig(
        family="glm_moe_dsa",
        vocab_size=154880,
        hidden_size=6144,
        intermediate_size=12288,
        num_hidden_layers=78,
        num_attention_heads=64,
        q_lora_rank=2048,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_group=1,
        topk_group=1,
        index_n_heads=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=202752,
        indexer_rope_interleave=True,
        rope=RopeConfig(),
    )
)


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x)."""
    sizes = mla_fields.read_common(fields, KEYS)
    types = read_indexer_types(fields, sizes["num_hidden_layers"])
    return mla_fields.make_config(fields, KEYS, sizes, indexer_types=types)


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    common = mla_fields.write_common(config, KEYS, FAMILY.architectures[0], dtype)
    return {**common, **write_indexer_types(config)}


NAMES = MlaNames()

FAMILY = PublishedFamily(
    model_types=("glm_moe_dsa",),
    architectures=("GlmMoeDsaForCausalLM",),
    defaults=KEYS.defaults,
    keys=KEYS.numbers,
    read_config=read_config,
    write_config=write_config,
    tensors=NAMES.tensors,
    describe_ignored=NAMES.describe_ignored,
    scale_names=scale_names,
    parts=NAMES.parts,
)
