"""The fields of a config.json that all families of latent attention (MLA) with routed experts share."""

from __future__ import annotations

from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax.families.fields import ConfigFields
from sparse_mla_jax.shapes import DeepseekV32Config

# Other names of our fields, which Hugging Face transformers reads too.
ALIASES = {"n_routed_experts": ("num_experts", "num_local_experts")}
# DeepSeek's own code writes null for a model without experts.
NULLS = {"n_routed_experts": 0, "n_shared_experts": 0}
# Values under which these fields change nothing.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
}
_INDEXED = ("indexed_attention", "deepseek_sparse_attention")


def read_dense_layers(fields: ConfigFields, sizes: dict[str, Any]) -> None:
    """Reads mlp_layer_types, another spelling of first_k_dense_replace, into `sizes`.

    Raises:
      ValueError: dense layers after sparse ones, or two spellings that differ.
    """
    layers = sizes.get("num_hidden_layers", DeepseekV32Config.num_hidden_layers)
    kinds = fields.read_names("mlp_layer_types", layers, ("dense", "sparse"))
    if kinds is None:
        return
    dense = kinds.count("dense")
    require(
        "dense" not in kinds[dense:],
        "config field mlp_layer_types has a dense layer after a sparse one; supported are dense layers first, then"
        " sparse ones. Use such a model.",
    )
    stated = sizes.setdefault("first_k_dense_replace", dense)
    experts = sizes.get("n_routed_experts", DeepseekV32Config.n_routed_experts)
    require(
        dense == (min(stated, layers) if experts else layers),
        f"config field mlp_layer_types has {dense} dense layers; first_k_dense_replace is {stated} and n_routed_experts"
        f" {experts}. Set them alike.",
    )


def check_indexed_layers(fields: ConfigFields, layers: int) -> None:
    """Requires that every layer has an indexer of its own, in all spellings of it.

    Raises:
      ValueError: a layer without indexer, or one that shares another layer's selection.
    """
    fields.read_names("layer_types", layers, _INDEXED)
    fields.read_names("indexer_types", layers, ("full",))
    pattern = fields.raw("index_topk_pattern")
    if isinstance(pattern, list):
        fields.read_names("index_topk_pattern", layers, ("full",))
    else:
        fields.require_values({"index_topk_pattern": ("F" * layers,)})
    fields.require_values({"index_topk_freq": (1,)})
    # With a frequency of 1 every layer has its own indexer, wherever counting starts.
    fields.ignore(["index_skip_topk_offset"])


def check_derived(fields: ConfigFields, config: DeepseekV32Config) -> None:
    """Requires that fields which follow from others have the values that follow.

    Raises:
      ValueError: another value.
    """
    c = config
    fields.require_values(
        {
            "num_key_value_heads": (c.num_attention_heads,),
            "qk_head_dim": (c.qk_head_dim,),
            "head_dim": tuple(dict.fromkeys((c.qk_rope_head_dim, c.qk_head_dim))),
        }
    )
