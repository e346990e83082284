"""GLM-5 (glm_moe_dsa): DeepSeek-V3.2's keys and names, with indexers that layers may share."""

from __future__ import annotations

from sparse_mla_jax.families.index_sharing import read_indexer_types
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_fields import MlaKeys
from sparse_mla_jax.families.mla_tensors import MlaNames
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

KEYS = MlaKeys(
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
    ),
    ("GlmMoeDsaForCausalLM",),
    read_indexers=read_indexer_types,
    unwritten=(),
)

FAMILY = mla_family(KEYS, MlaNames())
