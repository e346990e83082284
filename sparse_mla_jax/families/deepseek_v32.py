"""DeepSeek-V3.2: the keys of its config.json and the names of its tensors. Other families have most of both too."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.mla_tensors import MlaNames, scale_names
from sparse_mla_jax.families.published import PublishedFamily
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# YaRN is in the published file; without it, the rotation is plain.
KEYS = mla_fields.MlaKeys(MlaConfig(rope=RopeConfig()))


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x)."""
    sizes = mla_fields.read_common(fields, KEYS)
    mla_fields.check_indexed_layers(fields, sizes["num_hidden_layers"])
    mla_fields.check_own_indexers(fields, sizes["num_hidden_layers"])
    return mla_fields.make_config(fields, KEYS, sizes)


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    return mla_fields.write_common(config, KEYS, FAMILY.architectures[0], dtype)


NAMES = MlaNames()

FAMILY = PublishedFamily(
    model_types=("deepseek_v32", "deepseek_v3_2"),
    architectures=("DeepseekV32ForCausalLM",),
    defaults=KEYS.defaults,
    keys=KEYS.numbers,
    read_config=read_config,
    write_config=write_config,
    tensors=NAMES.tensors,
    describe_ignored=NAMES.describe_ignored,
    scale_names=scale_names,
    parts=NAMES.parts,
)
