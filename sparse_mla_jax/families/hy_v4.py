"""Hy4-preview (hy_v4): the keys of its config.json and the names of its tensors.

Files are published in two spellings: those on the hub, which are written here, and what save_pretrained of transformers
(5.24) makes of them. The names of transformers' modules are read too. Experts are published fused; one by one, they are
read as well.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.index_sharing import name_types, read_indexer_types, read_older_types, write_indexer_types
from sparse_mla_jax.families.mla_tensors import ATTENTION, END, MlaNames, layer_table, scale_names
from sparse_mla_jax.families.published import Places, PublishedFamily
from sparse_mla_jax.families.skipped import PREDICTION
from sparse_mla_jax.shapes import MlaConfig, RopeConfig

# --- config.json

# Hy4 differs in these (`hy_v4_vl`), and so do other programs' descriptions of this model.
_ROTATION: dict[str, Any] = {"rope_interleave": False, "indexer_rope_interleave": False}
_MODEL_EPS = ("index_norm_eps",)

_DEFAULTS = MlaConfig(
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
    **_ROTATION,
)
KEYS = mla_fields.MlaKeys(
    _DEFAULTS,
    numbers=(
        *(name for name in mla_fields.NUMBERS if name != "first_k_dense_replace"),
        *("hc_mult", "hc_magnitude", "hc_eps", "swiglu_limit"),
    ),
    aliases={"n_routed_experts": ("num_local_experts",)},
    model_eps=_MODEL_EPS,
)


def read_config(fields: ConfigFields, keys: mla_fields.MlaKeys = KEYS) -> MlaConfig:
    """Reads a config with published names or those of Hugging Face transformers (5.x); `keys` are those of Hy4 too."""
    sizes = mla_fields.read_common(fields, keys)
    for name in ("hc_mult", "swiglu_limit"):
        require(
            sizes[name] > 0,
            f"config field {name} is {sizes[name]}; the model always has it, so it must be more than 0. Mend it.",
        )
    config = mla_fields.make_config(fields, keys, sizes, indexer_types=_read_indexers(fields, sizes))
    # Other programs' names of what mlp_layer_types says; the initial value of a weight.
    fields.require_values({"first_k_dense_replace": (config.first_k_dense_replace,)})
    fields.ignore(["learnable_sink_init"])
    return config


def _read_indexers(fields: ConfigFields, sizes: dict[str, Any]) -> tuple[str, ...]:
    layers = sizes["num_hidden_layers"]
    if fields.has("indexer_types"):
        return read_indexer_types(fields, layers)
    mla_fields.check_indexed_layers(fields, layers)
    default = ["full" if i == 0 or i % 4 == 1 else "shared" for i in range(layers)]
    older = read_older_types(fields, layers)
    require(
        older in (None, default),
        f"config fields index_topk_pattern and index_topk_freq name the kinds {shown(older)}; without indexer_types"
        " the model has an indexer in layers 0, 1, 5, 9 and so on. Give indexer_types.",
    )
    return name_types(default)


def write_config(config: MlaConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.24) and `read_config` both read."""
    return write_sizes(config, KEYS, FAMILY, dtype)


def write_sizes(config: MlaConfig, keys: mla_fields.MlaKeys, family: PublishedFamily, dtype: Any) -> dict[str, Any]:
    """The same for either model."""
    common = mla_fields.write_common(config, keys, family.architectures[0], dtype)
    del common["mlp_bias"]
    return {**common, **write_indexer_types(config)}


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


def describe_ignored(name: str, config: MlaConfig) -> str | None:
    """See `PublishedFamily`."""
    return PREDICTION if name.startswith("model.mtp_layers.") else NAMES.describe_ignored(name, config)


NAMES = MlaNames(
    end={**{f"model.hc_head.hc_head_{one}": f"hc_head.{one}" for one in _MIXING}, **END},
    layer=layer_table(
        _ATTENTION,
        further={f"{theirs}.hc_pre.hc_{one}": f"{ours}.{one}" for ours, theirs in _LAYERS.items() for one in _MIXING},
    ),
    spellings=_SPELLINGS,
)

FAMILY = PublishedFamily(
    model_types=("hy_v4",),
    architectures=("HYV4ForCausalLM",),
    defaults=KEYS.defaults,
    keys=KEYS.numbers,
    read_config=read_config,
    write_config=write_config,
    tensors=NAMES.tensors,
    describe_ignored=describe_ignored,
    scale_names=scale_names,
    parts=NAMES.parts,
    fused_experts=True,
)
