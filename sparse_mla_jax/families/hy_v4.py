"""Hy4-preview (hy_v4): the keys of its config.json and the names of its tensors.

Files are published in two spellings: those on the hub, which are written here, and what save_pretrained of transformers
(5.24) makes of them. The names of transformers' modules are read too. Experts are published fused; one by one, they are
read as well.
"""

from __future__ import annotations

import warnings

from sparse_mla_jax._check import require
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.index_sharing import (
    INDEXED_NAMES,
    name_types,
    read_indexer_types,
    read_older_types,
)
from sparse_mla_jax.families.mla_family import mla_family
from sparse_mla_jax.families.mla_tensors import ATTENTION, END, MlaNames, layer_table
from sparse_mla_jax.families.published import Places
from sparse_mla_jax.families.skipped import PREDICTION
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# --- config.json


def _read_indexers(fields: ConfigFields, layers: int) -> tuple[str, ...]:
    if fields.has("indexer_types"):
        return read_indexer_types(fields, layers)
    fields.read_names("layer_types", layers, INDEXED_NAMES)
    default = ["full" if i == 0 or i % 4 == 1 else "shared" for i in range(layers)]
    return name_types(default)


# `hy_v4_vl` differs in the rotation and the epsilons, and so do other programs' descriptions of this model.
KEYS = mla_fields.MlaKeys(
    MlaConfig(
        family="hy_v4",
        vocab_size=120832,
        hidden_size=2816,
        intermediate_size=6912,
        moe_intermediate_size=768,
        num_hidden_layers=34,
        num_attention_heads=32,
        qk_nope_head_dim=192,
        v_head_dim=256,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        first_k_dense_replace=1,
        index_n_heads=16,
        rms_norm_eps=1e-5,
        index_norm_eps=1e-5,
        max_position_embeddings=262144,
        rope=RopeConfig(),
        attention_gate="value",
        attention_sinks=True,
        indexer_rope_last=True,
        hc_mult=4,
        swiglu_limit=10.0,
        float32_head=True,
        rope_interleave=False,
    ),
    ("HYV4ForCausalLM",),
    numbers=(
        *(name for name in mla_fields.NUMBERS if name != "first_k_dense_replace"),
        *("hc_mult", "hc_magnitude", "hc_eps", "swiglu_limit"),
    ),
    aliases={"n_routed_experts": ("num_local_experts",)},
    model_eps=("index_norm_eps",),
    read_indexers=_read_indexers,
    unwritten=("mlp_bias",),
)


def read_config(fields: ConfigFields, keys: mla_fields.MlaKeys = KEYS) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x); `keys` are those of Hy4 too."""
    sizes = mla_fields.read_common(fields, keys)
    for name in ("hc_mult", "swiglu_limit"):
        require(
            sizes[name] > 0,
            f"config field {name} is {sizes[name]}; the model always has it, so it must be more than 0. Mend it.",
        )
    config = mla_fields.make_config(fields, keys, sizes)
    # The initial value of a weight.
    fields.ignore(["learnable_sink_init"])
    # Only other families read these, as in transformers.
    older = read_older_types(fields, config.num_hidden_layers)
    first = fields.read("first_k_dense_replace", int, config.first_k_dense_replace)
    if first != config.first_k_dense_replace or (older and name_types(older) != config.indexer_types):
        warnings.warn(
            "config fields indexer_types and mlp_layer_types count; first_k_dense_replace, index_topk_pattern or"
            " index_topk_freq says something else and has no effect in this family.",
            stacklevel=1,
        )
    return config


# --- tensors

_MIXING = ("fn", "base", "scale")
_LAYERS = {"attn_hc": "hc_attn_layer", "ffn_hc": "hc_mlp_layer"}
_ATTENTION: Places = {
    **ATTENTION,
    "linear_gate.weight": "output_gate",
    "learnable_sink_param": "sinks",
}
_SPELLINGS = (
    # As save_pretrained writes them.
    (r"^model\.language_model\.", "model."),
    (r"\.hc_pre\.(hc_(?:attn|mlp)_layer)\.hc_", r".\1.hc_pre.hc_"),
    (r"^model\.(?:hc_pre\.hc_head|hc_head\.hc_pre)\.", "model.hc_head."),
    (r"(\.mlp\.(?:shared_experts\.)?)linear_gate\.", r"\1gate_proj."),
    # As transformers' modules are called.
    (r"\.attn_hc\.(fn|base|scale)$", r".hc_attn_layer.hc_pre.hc_\1"),
    (r"\.ffn_hc\.(fn|base|scale)$", r".hc_mlp_layer.hc_pre.hc_\1"),
    (r"^model\.hc_head\.hc_(fn|base|scale)$", r"model.hc_head.hc_head_\1"),
    (r"\.self_attn\.sinks$", ".self_attn.learnable_sink_param"),
    (r"\.self_attn\.gate_proj\.", ".self_attn.linear_gate."),
)


NAMES = MlaNames(
    end={**{f"model.hc_head.hc_head_{one}": f"hc_head.{one}" for one in _MIXING}, **END},
    layer=layer_table(
        _ATTENTION,
        further={f"{theirs}.hc_pre.hc_{one}": f"{ours}.{one}" for ours, theirs in _LAYERS.items() for one in _MIXING},
    ),
    spellings=_SPELLINGS,
    skipped=((r"model\.mtp_layers\.", PREDICTION),),
)

FAMILY = mla_family(KEYS, NAMES, read_config=read_config, fused_experts=True)
