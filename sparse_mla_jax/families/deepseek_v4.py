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
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from sparse_mla_jax._check import require, shown
from sparse_mla_jax.families.fields import COMMON_FIELDS, ConfigFields, read_sizes, write_sizes
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
from sparse_mla_jax.families.rotary import (
    DEFAULT_THETA,
    ORIGINAL,
    merge_spellings,
    read_rotation,
    read_shared,
    write_yarn,
)
from sparse_mla_jax.shapes import DeepseekV4Config, RopeConfig

# --- config.json

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
_COMPRESS_THETA = 160000.0


def read_config(fields: ConfigFields) -> DeepseekV4Config:
    """Reads a config; each key may have its published name or the one of Hugging Face transformers (5.x)."""
    fields.require_values(_FIXED)
    sizes = read_sizes(fields, DeepseekV4Config, aliases=_ALIASES)
    layers = sizes.get("num_hidden_layers", DeepseekV4Config.num_hidden_layers)
    ratios = _read_ratios(fields, layers)
    if ratios is not None:
        sizes["compress_ratios"] = ratios
    _read_hash_layers(fields, sizes, layers)
    sections = _rope_sections(fields)
    _read_rotated_width([fields, *sections.values()], sizes)
    context = sizes.get("max_position_embeddings", DeepseekV4Config.max_position_embeddings)
    rope, compress_rope = _read_ropes(fields, sections, context)
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
        listed is None or [_compression(ratio) for ratio in listed] == [_compression(ratio) for ratio in ratios],
        f"config fields compress_ratios {shown(listed)} and layer_types with compress_rates {shown(ratios)} differ;"
        " drop one.",
    )
    return ratios


def _compression(ratio: Any) -> Any:
    """The ratio, with 0 and 1 alike: neither compresses."""
    return 0 if ratio == 1 else ratio


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


def _rope_sections(fields: ConfigFields) -> dict[str, ConfigFields]:
    """The objects that describe rotations, by name; 'main' and 'compress' in place of a rope_parameters with both."""
    names = ("rope_parameters", "rope_scaling", "compress_rope_parameters")
    sections = {name: section for name in names if (section := fields.section(name))}
    parameters = sections.get("rope_parameters")
    if parameters and (parameters.has("main") or parameters.has("compress")):
        for name in ("main", "compress"):
            part = parameters.section(name)
            require(
                part is not None,
                f"config field rope_parameters has no field {name}; two objects, 'main' and 'compress', are expected."
                " Mend config.json.",
            )
            if part is not None:
                sections[name] = part
        sections.pop("rope_parameters").refuse_unused("stands beside 'main' and 'compress' without effect. Drop it.")
    return sections


def _read_ropes(fields: ConfigFields, sections: dict[str, ConfigFields], context: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotation of layers that do not compress, and of layers that do; `context` is max_position_embeddings.

    Published files have rope_theta, compress_rope_theta, and rope_scaling, which applies to compressing layers only.
    Hugging Face transformers writes rope_parameters {"main": {...}, "compress": {...}}. Earlier versions wrote one set
    only, or the second one as compress_rope_parameters. Transformers takes the amplitude 1 where the two objects do not
    stand, and YaRN's own where they stand without attention_factor.
    """
    compressing = {name: section for name, section in sections.items() if name != "main"}
    # The theta of a set that is the only one is that of the other layers.
    own = [section for name, section in compressing.items() if name.startswith("compress")]
    others = [section for name, section in sections.items() if not name.startswith("compress")]
    theta = read_shared(float, DEFAULT_THETA, *((place, "rope_theta") for place in (fields, *others)))
    places = [(fields, "compress_rope_theta"), *((place, "rope_theta") for place in own)]
    compress_theta = read_shared(float, _COMPRESS_THETA, *places)
    original = read_shared(int, context, *((place, ORIGINAL) for place in (fields, *compressing.values())))
    main = RopeConfig(theta=theta)
    if "main" in sections:
        main = read_rotation(sections["main"], theta, read_shared(int, context, (sections["main"], ORIGINAL)))
    ropes = {
        name: read_rotation(section, compress_theta, original, amplitude=None if name == "compress" else 1.0)
        for name, section in compressing.items()
    }
    return main, merge_spellings(ropes, RopeConfig(theta=compress_theta))


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
    architectures=("DeepseekV4ForCausalLM",),
    config_type=DeepseekV4Config,
    read_config=read_config,
    write_config=write_config,
    tensors=tensors,
    is_ignored=is_ignored,
    scale_names=scale_names,
    parts=parts,
    fp4_experts=True,
)
