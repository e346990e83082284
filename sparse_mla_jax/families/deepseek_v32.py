"""DeepSeek-V3.2: the keys of its config.json and the names of its tensors. Other families have most of both too."""

from __future__ import annotations

from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_fields import MlaKeys
from sparse_mla_jax.families.mla_tensors import MlaNames
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# YaRN is in the published file; without it, the rotation is plain.
KEYS = MlaKeys(MlaConfig(rope=RopeConfig()), ("DeepseekV32ForCausalLM",), is_strict=True)

FAMILY = mla_family(KEYS, MlaNames(), model_types=("deepseek_v32", "deepseek_v3_2"))
