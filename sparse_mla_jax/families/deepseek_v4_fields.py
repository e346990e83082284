"""The config.json of DeepSeek-V4 in all its spellings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields, read_sizes, write_sizes
from sparse_mla_jax.families.deepseek_v4_rotation import read_ropes, rope_sections
from sparse_mla_jax.families.fields import COMMON_FIELDS
from sparse_mla_jax.families.rotary import write_yarn
from sparse_mla_jax.shapes import DeepseekV4Config

# Values under which these fields change nothing.
_FIXED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "hidden_act": ("silu",),
    "num_key_value_heads": (1,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "n_group": (1,),
    "topk_group": (1,),
    "per_layer_config": ({},),
    # The tensors' types tell how they are quantised.
    "expert_dtype": ("fp4", "fp8", "bf16", "bfloat16", "float32"),
}
# Other names of our fields, which Hugging Face transformers reads too.
_ALIASES = {"n_routed_experts": ("num_local_experts",), "moe_intermediate_size": ("intermediate_size",)}
_RATES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
# An earlier spelling of compress_rates.
_RATE_FIELDS = {
    "compress_rate_csa": "compressed_sparse_attention",
    "compress_rate_hca": "heavily_compressed_attention",
}


def read_config(fields: ConfigFields) -> DeepseekV4Config:
    """Reads a config; each key may have its published name or the one of Hugging Face transformers (5.x)."""
    fields.require_values(_FIXED)
    sizes = read_sizes(fields, DeepseekV4Config, aliases=_ALIASES)
    layers = sizes.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)
    ratios = _read_ratios(fields, layers)
    if ratios is not None:
        sizes["compress_ratios"] = ratios
    _read_hash_layers(fields, sizes, layers)
    sections = rope_sections(fields)
    _read_rotated_width([fields, *sections.values()], sizes)
    context = sizes.get("max_position_embeddings", DeepseekV4Config.max_position_embeddings)
    rope, compress_rope = read_ropes(fields, sections, context)
    return DeepseekV4Config(**sizes, rope=rope, compress_rope=compress_rope)


def _read_rotated_width(places: Sequence[ConfigFields], sizes: dict[str, Any]) -> None:
    """Reads partial_rotary_factor, which transformers writes in place of qk_rope_head_dim.

    It is the quotient of that and head_dim, rounded: qk_rope_head_dim takes precedence.
    """
    head_dim = sizes.get("head_dim", DeepseekV4Config.head_dim)
    for place in places:
        rotated = place.read("partial_rotary_factor", float)
        if rotated is None:
            continue
        name, width = place.full_name("partial_rotary_factor"), head_dim * rotated
        require(0 < rotated <= 1, f"config field {name} is {rotated}; more than 0 and at most 1 is expected. Mend it.")
        require(
            abs(sizes.setdefault("qk_rope_head_dim", int(width + 1e-6)) - width) < 1,
            f"config field {name} is {rotated}, which rotates {width} dimensions of a head;"
            f" qk_rope_head_dim is {sizes['qk_rope_head_dim']}. Set them alike.",
        )


def _read_hash_layers(fields: ConfigFields, sizes: dict[str, Any], layers: int) -> None:
    """Reads mlp_layer_types, which transformers writes in place of num_hash_layers."""
    kinds = fields.read_names("mlp_layer_types", layers, ("hash_moe", "moe"))
    if kinds is None:
        return
    hashed = kinds.count("hash_moe")
    require(
        "hash_moe" not in kinds[hashed:],
        "config field mlp_layer_types has a 'hash_moe' after a 'moe'; supported are 'hash_moe' of the first layers and"
        " then 'moe'. Use such a model.",
    )
    stated = sizes.get("num_hash_layers", hashed)
    require(
        min(stated, layers) == hashed,
        f"config field mlp_layer_types names {hashed} layers 'hash_moe'; num_hash_layers is {stated}. Set them alike.",
    )
    sizes["num_hash_layers"] = hashed


def _read_ratios(fields: ConfigFields, layers: int) -> tuple[int, ...] | None:
    """Compression ratio of each layer of the model, from compress_ratios, or from layer_types and compress_rates."""
    listed = fields.read("compress_ratios", list)
    if listed is not None:
        predictors = max(1, fields.read("num_nextn_predict_layers", int, 1))
        require(
            layers <= len(listed) <= layers + predictors,
            f"config field compress_ratios has {len(listed)} entries; num_hidden_layers is {layers}, and there may be"
            f" {predictors} more of multi-token-prediction layers.",
        )
        listed = tuple(listed[:layers])
    rates = _read_rates(fields)
    kinds = fields.read_names("layer_types", layers, tuple(_RATES))
    if kinds is None:
        return listed
    ratios = tuple(rates[kind] for kind in kinds)
    require(
        # Neither 0 nor 1 compresses.
        listed is None or all(a == b or (a in (0, 1) and b in (0, 1)) for a, b in zip(listed, ratios)),
        f"config fields compress_ratios {shown(listed)} and layer_types with compress_rates {shown(ratios)} differ;"
        " drop one.",
    )
    return ratios


def _read_rates(fields: ConfigFields) -> dict[str, int]:
    """Compression ratio of each kind of layer."""
    rates, section = dict(_RATES), fields.section("compress_rates")
    places = [(section, kind, kind) for kind in _RATES] if section else []
    for place, name, kind in [*places, *((fields, name, kind) for name, kind in _RATE_FIELDS.items())]:
        if place.has(name) or place.is_null(name):
            rates[kind] = place.read_required(name, int)
    if section:
        section.refuse_unused(f"is no kind of layer that is supported; those are {', '.join(_RATES)}.")
    require(
        rates["sliding_attention"] in (0, 1)
        and rates["compressed_sparse_attention"] == 4
        and rates["heavily_compressed_attention"] not in (0, 1, 4),
        f"config field compress_rates makes {rates}; expected are 4 for compressed_sparse_attention and another ratio"
        " above 1 for heavily_compressed_attention. Mend config.json.",
    )
    return rates


def write_config(config: DeepseekV4Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json with the published names.

    Raises:
      ValueError: a rotation that the published fields can not express.
    """
    c = config
    require(
        c.rope.factor == 1.0,
        f"config field rope has factor {c.rope.factor}; layers that do not compress rotate without scaling in published"
        " files. Set it to 1.",
    )
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": str(jnp.dtype(dtype)),
        **write_sizes(c),
        "compress_ratios": list(c.compress_ratios),
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": 1,
        "rope_theta": c.rope.theta,
        "compress_rope_theta": c.compress_rope.theta,
        "rope_scaling": None if c.compress_rope.factor == 1.0 else {"type": "yarn", **write_yarn(c.compress_rope)},
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        **COMMON_FIELDS,
    }
