"""The fields of a config.json that families of latent attention (MLA) with routed experts share.

A family says in an `MlaKeys` what its config.json may hold; `read_common` reads that, `make_config` adds the rotation
and what the family reads itself, and `write_config` writes all of it. Two spellings of one model give equal configs: a
per-layer tuple that says what its default says is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._json_fields import ConfigFields, read_sizes, write_sizes
from sparse_mla_jax.families.expert_layers import name_moe_layers, read_moe_layers
from sparse_mla_jax.families.fields import COMMON_FIELDS
from sparse_mla_jax.families.index_sharing import read_own_indexers
from sparse_mla_jax.families.rotary import read_rope, write_rope
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.shapes import RopeConfig

# Numbers and truth values that the config.json of every family has.
NUMBERS = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor"),
    *("norm_topk_prob", "first_k_dense_replace", "index_n_heads", "index_head_dim", "index_topk", "rms_norm_eps"),
    *("max_position_embeddings", "tie_word_embeddings", "attention_bias"),
    *("rope_interleave", "indexer_rope_interleave"),
)
# Hugging Face transformers has no such fields: each family always rotates in one way, which is not written.
_ROTATION = ("rope_interleave", "indexer_rope_interleave")
# Values under which these fields change nothing.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "per_layer_config": ({},),
}
ONE_MOE_LAYER_IN_1: dict[str, tuple[Any, ...]] = {"moe_layer_freq": (1,)}
# DeepSeek's own code writes null for a model without experts.
NULLS = {"n_routed_experts": 0, "n_shared_experts": 0, "attention_bias": False}


@dataclasses.dataclass(frozen=True)
class MlaKeys:
    """What the config.json of a family may hold, and what it means.

    Attributes:
      defaults: what absent fields mean, and the constants of the family.
      architectures: class names of Hugging Face transformers, the one that is written first.
      numbers: published names of numbers and truth values.
      aliases: other names of them.
      nulls: what null means, of numbers in which it means something.
      fixed: values under which further fields change nothing.
      model_eps: the epsilons that are rms_norm_eps.
      is_strict: whether mlp_layer_types and first_k_dense_replace must agree; otherwise the former counts.
      has_moe_frequency: whether moe_layer_freq spreads the layers with experts.
      has_head_dim: whether head_dim follows from the other widths; false: it has no effect.
      read_indexers: (fields, number of layers) -> indexer_types of MlaConfig.
      unwritten: fields that the family's class in transformers does not have.
    """

    defaults: MlaConfig
    architectures: tuple[str, ...]
    numbers: tuple[str, ...] = NUMBERS
    aliases: Mapping[str, Sequence[str]] = dataclasses.field(
        # Names that Hugging Face transformers reads too.
        default_factory=lambda: {"n_routed_experts": ("num_experts", "num_local_experts")}
    )
    nulls: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NULLS)
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=lambda: {**FIXED, **ONE_MOE_LAYER_IN_1})
    model_eps: tuple[str, ...] = ()
    is_strict: bool = False
    has_moe_frequency: bool = False
    has_head_dim: bool = True
    read_indexers: Callable[[ConfigFields, int], tuple[str, ...]] = read_own_indexers
    unwritten: tuple[str, ...] = ("indexer_types",)


def read_common(fields: ConfigFields, keys: MlaKeys) -> dict[str, Any]:
    """The numbers of a config.json, those that it leaves out included, and which layers have experts and indexers."""
    found = read_sizes(fields, MlaConfig, keys.numbers, aliases=keys.aliases, nulls=keys.nulls)
    fields.require_values(keys.fixed)
    # Check ranges first: what follows makes lists of one entry per layer.
    dataclasses.replace(keys.defaults, **found)
    sizes = {name: getattr(keys.defaults, name) for name in (*NUMBERS, *keys.numbers)} | found
    stated = "first_k_dense_replace" in found
    layers = read_moe_layers(fields, sizes, spread=keys.has_moe_frequency, stated=stated, strict=keys.is_strict)
    types = keys.read_indexers(fields, sizes["num_hidden_layers"])
    return {**sizes, **layers, "indexer_types": types, **{name: sizes["rms_norm_eps"] for name in keys.model_eps}}


def make_config(fields: ConfigFields, keys: MlaKeys, sizes: Mapping[str, Any], **own: Any) -> MlaConfig:
    """The config of these sizes; `own` are fields that the family read itself."""
    if "rope" not in own:
        own["rope"] = read_rope(fields, sizes["max_position_embeddings"], keys.defaults.rope)
    config = dataclasses.replace(keys.defaults, **{**sizes, **own})
    derived: dict[str, tuple[Any, ...]] = {
        "num_key_value_heads": (config.num_attention_heads,),
        "qk_head_dim": (config.qk_head_dim,),
        "head_dim": tuple(dict.fromkeys((config.qk_rope_head_dim, config.qk_head_dim))),
    }
    if not keys.has_head_dim:
        del derived["head_dim"]
        fields.ignore(["head_dim"])
    fields.require_values(derived)
    return config


def read_config(fields: ConfigFields, *, keys: MlaKeys) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x)."""
    return make_config(fields, keys, read_common(fields, keys))


def write_config(config: MlaConfig, dtype: Any = jnp.float32, *, keys: MlaKeys) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    c = config
    unwritten = {*keys.unwritten, *(name for name in _ROTATION if getattr(c, name) == getattr(keys.defaults, name))}
    if c.mlp_layer_types:
        unwritten.add("first_k_dense_replace")
    written = {
        "architectures": [keys.architectures[0]],
        "model_type": c.family,
        "dtype": str(jnp.dtype(dtype)),
        **COMMON_FIELDS,
        "mlp_bias": False,
        "pad_token_id": None,
        **write_sizes(c, keys.numbers),
        "num_key_value_heads": c.num_attention_heads,
        "head_dim": c.qk_rope_head_dim,
        "qk_head_dim": c.qk_head_dim,
        "layer_types": [layer.kind for layer in c.layers],
        "mlp_layer_types": ["sparse" if layer.is_moe else "dense" for layer in c.layers],
        "indexer_types": ["full" if layer.has_indexer else "shared" for layer in c.layers],
        "rope_parameters": write_rope(c.rope),
    }
    return {name: value for name, value in written.items() if name not in unwritten}


def wrap_text(text: Mapping[str, Any], model_types: Sequence[str]) -> dict[str, Any]:
    """The config.json of a model that has its sizes in `text_config`."""
    outside = ("architectures", "dtype")
    inside = {name: value for name, value in text.items() if name not in outside}
    return {
        **{name: text[name] for name in outside},
        "model_type": model_types[0],
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {**inside, "model_type": model_types[1]},
    }


def canonical(config: MlaConfig) -> MlaConfig:
    """The config with one spelling of what can be said in several ways, and without options of a run."""
    kinds = ["sparse" if layer.is_moe else "dense" for layer in config.layers]
    sizes = tuple(dataclasses.replace(one, rope=_plain_if_unscaled(one.rope)) for one in config.layer_sizes)
    rope = _plain_if_unscaled(config.rope)
    moe = name_moe_layers(kinds)
    return dataclasses.replace(config, rope=rope, layer_sizes=sizes, quantize_index_query=False, **moe)


def _plain_if_unscaled(rope: RopeConfig) -> RopeConfig:
    return RopeConfig(theta=rope.theta) if rope.factor == rope.attention_factor == 1.0 else rope
