"""DeepSeek-V4: the keys of its config.json, the names of its tensors, and their quantisation formats.

The names are those of the files that DeepSeek publishes (V4-Flash, V4-Flash-Base, V4-Pro) and that its own inference
code reads: "layers.0.attn.wq_a.weight", without "model.". Files that Hugging Face transformers saves put "model." in
front and rename some; they are read too. The published wo_a is [g * r_o, in], with the rows of group i from i * r_o on;
ours is [g, in, r_o]. Our arrays stack the experts.

The type of a tensor tells its format:

* FP8: ".weight" is F8_E4M3 [out, in]. ".scale" has one scale per 128x128 values (quantization_config's
  weight_block_size), as F8_E8M0 (Flash, Pro) or F32 (Flash-Base).
* FP4, routed experts only: ".weight" is I8 [out, in / 2] (or the same bytes as U8, or as F4 [out, in]), two e2m1
  values per byte, the even column in the low half. ".scale" is F8_E8M0 [out, in / 32], one per 32 values of a row.

Converted files are read too: they call the scales "weight_scale_inv" (as V3.2 does) or "weight_scale", or store E8M0
as U8. Values are always multiplied by the scales, even if the name says "inv". tid2eid is I64; I32 and U32 are read
too. "mtp.*" (multi-token prediction) is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require
from sparse_mla_jax.families.fields import (
    COMMON_FIELDS,
    read_field,
    read_plain_fields,
    read_rope,
    write_plain_fields,
    write_yarn,
)
from sparse_mla_jax.families.published import (
    GROUPED,
    SAME,
    Places,
    PublishedFamily,
    PublishedTensor,
    Shape,
    StoredPart,
    is_run_time_scale,
    table_rows,
)
from sparse_mla_jax.shapes import DeepseekV4Config, RopeConfig

# --- config.json

# Values that the operators assume. A config.json may omit these keys, but may not have other values.
_FIXED = {
    "scoring_func": "sqrtsoftplus",
    "hidden_act": "silu",
    "num_key_value_heads": 1,
    "attention_bias": False,
    "mlp_bias": False,
}
_RATES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def read_config(data: dict[str, Any]) -> DeepseekV4Config:
    """Reads a config; each key may have its published name or the one of Hugging Face transformers (5.x)."""
    for name, value in _FIXED.items():
        require(
            data.get(name) in (None, value),
            f"config field {name} is {data.get(name)!r}; DeepSeek-V4 has {value!r}, which is all that is supported.",
        )
    fields = read_plain_fields(data, DeepseekV4Config)
    layers = fields.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)
    _read_rotated_width(data, fields)
    ratios = _read_ratios(data, layers)
    if ratios is not None:
        fields["compress_ratios"] = ratios
    _read_hash_layers(data, fields, layers)
    rope, compress_rope = _read_ropes(data)
    return DeepseekV4Config(**fields, rope=rope, compress_rope=compress_rope)


def _read_rotated_width(data: dict[str, Any], fields: dict[str, Any]) -> None:
    """Reads partial_rotary_factor, which transformers writes in place of qk_rope_head_dim."""
    rotated = read_field(data, "partial_rotary_factor", float)
    if rotated is None:
        return
    width = int(fields.get("head_dim", DeepseekV4Config.head_dim) * rotated)
    require(
        fields.setdefault("qk_rope_head_dim", width) == width,
        f"config field partial_rotary_factor is {rotated}, which rotates {width} dimensions of a head; "
        f"qk_rope_head_dim is {fields['qk_rope_head_dim']}. Set them alike.",
    )


def _read_hash_layers(data: dict[str, Any], fields: dict[str, Any], layers: int) -> None:
    """Reads mlp_layer_types, which transformers writes in place of num_hash_layers."""
    kinds = read_field(data, "mlp_layer_types", list)
    if kinds is None:
        return
    hashed = kinds.count("hash_moe")
    require(
        kinds == ["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        f"config field mlp_layer_types is {kinds!r}; {layers} entries are expected, 'hash_moe' of the first layers"
        " and then 'moe'.",
    )
    require(
        min(fields.get("num_hash_layers", hashed), layers) == hashed,
        f"config field mlp_layer_types names {hashed} layers 'hash_moe'; num_hash_layers is"
        f" {fields.get('num_hash_layers')}. Set them alike.",
    )
    fields["num_hash_layers"] = hashed


def _read_ratios(data: dict[str, Any], layers: int) -> tuple[int, ...] | None:
    """Compression ratio of each layer of the model, from compress_ratios, or from layer_types and compress_rates."""
    listed, kinds = read_field(data, "compress_ratios", list), read_field(data, "layer_types", list)
    if listed is not None:
        predictors = max(1, read_field(data, "num_nextn_predict_layers", int, 1))
        require(
            layers <= len(listed) <= layers + predictors,
            f"config field compress_ratios has {len(listed)} entries; num_hidden_layers is {layers}, and there may be"
            f" {predictors} more of multi-token-prediction layers.",
        )
        listed = tuple(listed[:layers])
    if kinds is None:
        return listed
    rates = {**_RATES, **read_field(data, "compress_rates", dict, {})}
    require(
        rates["sliding_attention"] in (0, 1)
        and rates["compressed_sparse_attention"] == 4
        and rates["heavily_compressed_attention"] not in (0, 1, 4),
        f"config field compress_rates is {data.get('compress_rates')!r}; expected are 4 for"
        " compressed_sparse_attention and another ratio above 1 for heavily_compressed_attention.",
    )
    require(
        all(kind in _RATES for kind in kinds) and len(kinds) >= layers,
        f"config field layer_types is {kinds!r}; {layers} entries are expected, each one of {', '.join(_RATES)}.",
    )
    ratios = tuple(rates[kind] for kind in kinds[:layers])
    require(
        listed is None or [max(1, ratio) for ratio in listed] == [max(1, ratio) for ratio in ratios],
        f"config fields compress_ratios {listed} and layer_types with compress_rates {ratios} differ; drop one.",
    )
    return ratios


def _read_ropes(data: dict[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Rotation of layers that do not compress, and of layers that do.

    Published files have rope_theta, compress_rope_theta, and rope_scaling, which applies to compressing layers only.
    Hugging Face transformers writes rope_parameters {"main": {...}, "compress": {...}}. Earlier versions wrote one set
    only, or the second one as compress_rope_parameters.
    """
    theta, compress_theta = data.get("rope_theta") or 10000.0, data.get("compress_rope_theta") or 160000.0
    parameters = read_field(data, "rope_parameters", dict) or read_field(data, "rope_scaling", dict, {})
    if "main" in parameters or "compress" in parameters:
        both = (parameters.get("main"), parameters.get("compress"))
        require(
            all(isinstance(one, dict) for one in both),
            f"config field rope_parameters is {parameters!r}; two objects, 'main' and 'compress', are expected.",
        )
        main, compress = both
    else:
        main = {"rope_theta": parameters.get("rope_theta", theta)}
        compress = read_field(data, "compress_rope_parameters", dict) or {**parameters, "rope_theta": compress_theta}
    ropes = read_rope(main, theta, 65536), read_rope(compress, compress_theta, 65536)
    factors = [one.get("attention_factor") for one in (main, compress)]
    require(
        all(factor in (None, 1.0) for factor in factors) and all(rope.softmax_factor == 1.0 for rope in ropes),
        f"config fields attention_factor {factors} and mscale_all_dim {[rope.mscale_all_dim for rope in ropes]} change"
        " the rotation's amplitude or the softmax scale; DeepSeek-V4 has neither. Set them to 1.0 and 0.",
    )
    return ropes


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
        **write_plain_fields(c),
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


# --- tensors

_ATTENTION: Places = {
    "wq_a.weight": "q_a_proj",
    "q_norm.weight": "q_a_layernorm",
    "wq_b.weight": "q_b_proj",
    "wkv.weight": "kv_proj",
    "kv_norm.weight": "kv_layernorm",
    "attn_sink": "sinks",
    "wo_a.weight": ("o_a_proj", GROUPED),
    "wo_b.weight": "o_b_proj",
}
_COMPRESSOR: Places = {
    "wkv.weight": "kv_proj",
    "wgate.weight": "gate_proj",
    "ape": ("position_bias", SAME),
    "norm.weight": "norm",
}
_INDEXER: Places = {"wq_b.weight": "wq_b", "weights_proj.weight": "weights_proj"}
_MIXING: Places = {"_fn": "fn", "_base": "base", "_scale": "scale"}
_BIAS: Places = {"bias": "e_score_correction_bias"}
_HASH: Places = {"tid2eid": ("token_experts", SAME)}
_SWIGLU = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def _swiglu(name: str, place: str, expert: str = "") -> Iterator[PublishedTensor]:
    return table_rows({f"{theirs}.weight": ours + expert for theirs, ours in _SWIGLU.items()}, name, place)


def _attention(c: DeepseekV4Config, layer: int, name: str, place: str) -> Iterator[PublishedTensor]:
    yield from table_rows(_ATTENTION, name, place)
    if c.compress_ratio(layer):
        yield from table_rows(_COMPRESSOR, name + "compressor.", place + "compressor.")
    if c.has_indexer(layer):
        yield from table_rows(_INDEXER, name + "indexer.", place + "indexer.")
        yield from table_rows(_COMPRESSOR, name + "indexer.compressor.", place + "indexer.compressor.")


def _experts(c: DeepseekV4Config, layer: int, name: str, place: str) -> Iterator[PublishedTensor]:
    yield from table_rows({"weight": "weight"}, name + "gate.", place + "gate.")
    table: Places = (
        {"tid2eid": ("token_experts", SAME)} if c.is_hash_layer(layer) else {"bias": "e_score_correction_bias"}
    )
    yield from table_rows(table, name + "gate.", place + "gate.")
    for expert in range(c.n_routed_experts):
        yield from _swiglu(f"{name}experts.{expert}.", place + "experts.", f".{expert}")
    if c.n_shared_experts:
        yield from _swiglu(name + "shared_experts.", place + "shared_experts.")


def tensors(config: DeepseekV4Config) -> Iterator[PublishedTensor]:
    """Yields every tensor of a folder of this config, in the order in which they are written."""
    for layer in range(config.num_hidden_layers):
        name, place = f"layers.{layer}.", f"layers.{layer}."
        yield from table_rows(_MIXING, name + "hc_attn", place + "attn_hc.")
        yield from table_rows({"attn_norm.weight": "input_layernorm"}, name, place)
        yield from _attention(config, layer, name + "attn.", place + "self_attn.")
        yield from table_rows(_MIXING, name + "hc_ffn", place + "ffn_hc.")
        yield from table_rows({"ffn_norm.weight": "post_attention_layernorm"}, name, place)
        yield from _experts(config, layer, name + "ffn.", place + "mlp.")
    yield from table_rows({"embed.weight": ("embed_tokens", SAME), "norm.weight": "norm"}, "", "")
    yield from table_rows(_MIXING, "hc_head", "hc_head.")
    if not config.tie_word_embeddings:
        yield from table_rows({"head.weight": "lm_head"}, "", "")


def is_ignored(name: str, config: DeepseekV4Config) -> bool:
    """Whether the model does not use this tensor: multi-token prediction, a tied head, a scale of a run."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return (
        name.startswith("mtp.")
        or is_run_time_scale(name)
        or (layer is not None and int(layer.group(1)) >= config.num_hidden_layers)
        or (config.tie_word_embeddings and name == "head.weight")
    )


def scale_names(name: str) -> tuple[str, ...]:
    """Possible names of the scales of a quantised matrix, the published one first."""
    return name.removesuffix(".weight") + ".scale", name + "_scale_inv", name + "_scale"


# Names of transformers (5.24) after their "model.", and ours.
_SAVED_NAMES = (
    (r"embed_tokens\.", "embed."),
    (r"hc_head\.hc_", "hc_head_"),
    (r"(layers\.\d+\.attn\.)norm\.", r"\1kv_norm."),
)


def parts(name: str, shape: Shape, config: DeepseekV4Config) -> list[StoredPart]:
    """The published tensor that a file has under this name: the published one, or that of transformers."""
    del shape, config
    if not name.startswith("model."):
        return [StoredPart(name)]
    published = name.removeprefix("model.")
    for saved, ours in _SAVED_NAMES:
        published = re.sub(f"^{saved}", ours, published)
    return [StoredPart(published)]


FAMILY = PublishedFamily(
    model_types=("deepseek_v4",),
    config_type=DeepseekV4Config,
    read_config=read_config,
    write_config=write_config,
    tensors=tensors,
    is_ignored=is_ignored,
    scale_names=scale_names,
    parts=parts,
    fp4_experts=True,
)
