"""A.X-K2 (axk2): the keys of its config.json and the names of its tensors."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_tensors import ATTENTION, NORMS, MlaNames, layer_table
from sparse_mla_jax.families.published import QUERY_AND_GATE, Places
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

KEYS = mla_fields.MlaKeys(
    MlaConfig(
        family="axk2",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=5120,
        moe_intermediate_size=512,
        num_hidden_layers=48,
        num_attention_heads=32,
        q_lora_rank=384,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=128,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        index_n_heads=16,
        max_position_embeddings=131072,
        rope=RopeConfig(),
        gated_norm_rank=16,
        attention_gate="latent",
        excluded_experts_lose=False,
    ),
    ("AXK2ForCausalLM",),
    numbers=(*mla_fields.NUMBERS, "gated_norm_rank"),
    aliases={"n_routed_experts": ("num_local_experts",)},
    nulls={**mla_fields.NULLS, "n_group": 1, "topk_group": 1},
    fixed=mla_fields.FIXED,
    has_moe_frequency=True,
    # Its readers take mlp_layer_types in place of first_k_dense_replace.
    unwritten=("indexer_types", "mlp_bias", "first_k_dense_replace"),
)


def read_config(fields: ConfigFields) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x)."""
    sizes = mla_fields.read_common(fields, KEYS)
    require(
        fields.has("n_group") == fields.has("topk_group"),
        "config fields n_group and topk_group: one of them is null or absent; give both, or neither for no groups.",
    )
    return mla_fields.make_config(fields, KEYS, sizes)


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    groups = {"n_group": None, "topk_group": None} if config.n_group == 1 else {}
    return {**mla_fields.write_config(config, dtype, keys=KEYS), **groups}


def _gated(norm: str) -> Places:
    names = {"norm.weight": "weight", "W_down.weight": "down", "W_up.weight": "up"}
    return {f"{norm}.{theirs}": f"{norm}.{ours}" for theirs, ours in names.items()}


NAMES = MlaNames(
    layer=layer_table(
        {**ATTENTION, "q_b_proj.weight": ("q_b_proj output_gate", QUERY_AND_GATE)},
        {**NORMS, **_gated("input_layernorm"), **_gated("post_attention_layernorm")},
    ),
    # The name of transformers' module.
    spellings=((r"\.q_gate_proj\.", ".q_b_proj."),),
)

FAMILY = mla_family(KEYS, NAMES, read_config=read_config, write_config=write_config)
