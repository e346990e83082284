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

from sparse_mla_jax._json_fields import plain_types
from sparse_mla_jax.families.deepseek_v4_fields import read_config, write_config
from sparse_mla_jax.families.mla_tensors import SWIGLU_123, split_experts, swiglu_rows
from sparse_mla_jax.families.published import (
    GROUPED,
    SAME,
    Places,
    PublishedFamily,
    PublishedTensor,
    Shape,
    StoredPart,
    table_rows,
)
from sparse_mla_jax.families.skipped import PREDICTION, describe_common
from sparse_mla_jax.shapes import DeepseekV4Config

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


def _attention(c: DeepseekV4Config, layer: int, name: str, place: str) -> Iterator[PublishedTensor]:
    yield from table_rows(_ATTENTION, name, place)
    if c.compress_ratio(layer):
        yield from table_rows(_COMPRESSOR, name + "compressor.", place + "compressor.")
    if c.has_indexer(layer):
        yield from table_rows(_INDEXER, name + "indexer.", place + "indexer.")
        yield from table_rows(_COMPRESSOR, name + "indexer.compressor.", place + "indexer.compressor.")


def _experts(c: DeepseekV4Config, layer: int, name: str, place: str) -> Iterator[PublishedTensor]:
    choice = _HASH if c.is_hash_layer(layer) else _BIAS
    yield from table_rows({"weight": "weight", **choice}, name + "gate.", place + "gate.")
    for expert in range(c.n_routed_experts):
        yield from swiglu_rows(SWIGLU_123, f"{name}experts.{expert}.", place + "experts.", f".{expert}")
    if c.n_shared_experts:
        yield from swiglu_rows(SWIGLU_123, name + "shared_experts.", place + "shared_experts.")


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


def describe_ignored(name: str, config: DeepseekV4Config) -> str | None:
    """See `PublishedFamily`."""
    return PREDICTION if name.startswith("mtp.") else describe_common(name, config, "head.weight")


def scale_names(name: str) -> tuple[str, ...]:
    """Possible names of the scales of a quantised matrix, the published one first."""
    return name.removesuffix(".weight") + ".scale", name + "_scale_inv", name + "_scale"


# Names of transformers (5.24) after their "model.", and ours: as save_pretrained writes them, then as its modules are
# called. The rules apply in order.
_SPELLINGS = (
    (r"^embed_tokens\.", "embed."),
    (r"^hc_head\.hc_", "hc_head_"),
    (r"^(layers\.\d+\.attn\.)norm\.", r"\1kv_norm."),
    (r"^(layers\.\d+\.)input_layernorm\.", r"\1attn_norm."),
    (r"^(layers\.\d+\.)post_attention_layernorm\.", r"\1ffn_norm."),
    (r"^(layers\.\d+\.)(attn|ffn)_hc\.(fn|base|scale)$", r"\1hc_\2_\3"),
    (r"^(layers\.\d+\.)self_attn\.compressor\.indexer\.(?:scorer\.)?weights_proj\.", r"\1attn.indexer.weights_proj."),
    (r"^(layers\.\d+\.)self_attn\.compressor\.indexer\.q_b_proj\.", r"\1attn.indexer.wq_b."),
    (r"^(layers\.\d+\.)self_attn\.compressor\.indexer\.", r"\1attn.indexer.compressor."),
    (r"^(layers\.\d+\.)self_attn\.", r"\1attn."),
    (r"^(layers\.\d+\.attn\..*compressor\.)kv_norm\.", r"\1norm."),
    (r"^(layers\.\d+\.attn\..*compressor\.)position_bias$", r"\1ape"),
    (r"^(layers\.\d+\.attn\..*compressor\.)gate_proj\.", r"\1wgate."),
    (r"^(layers\.\d+\.attn\.)sinks$", r"\1attn_sink"),
    (r"^(layers\.\d+\.attn\.)q_a_norm\.", r"\1q_norm."),
    (r"^(layers\.\d+\.attn\.(?:.*\.)?)kv_proj\.", r"\1wkv."),
    (r"^(layers\.\d+\.attn\.)([qo])_([ab])_proj\.", r"\1w\2_\3."),
    (r"^(layers\.\d+\.)mlp\.", r"\1ffn."),
    (r"^(layers\.\d+\.ffn\.gate\.)e_score_correction_bias$", r"\1bias"),
    (r"^(layers\.\d+\.ffn\.(?:shared_experts|experts\.\d+)\.)gate_proj\.", r"\1w1."),
    (r"^(layers\.\d+\.ffn\.(?:shared_experts|experts\.\d+)\.)down_proj\.", r"\1w2."),
    (r"^(layers\.\d+\.ffn\.(?:shared_experts|experts\.\d+)\.)up_proj\.", r"\1w3."),
)


def parts(name: str, shape: Shape, config: DeepseekV4Config) -> list[StoredPart]:
    """The published tensors that a file's tensor holds: see `PublishedFamily`."""
    if name == "lm_head.weight":
        return [StoredPart("head.weight")]
    if name.startswith("model."):
        name = name.removeprefix("model.")
        for saved, published in _SPELLINGS:
            name = re.sub(saved, published, name)
    return split_experts(name, shape, config.n_routed_experts, SWIGLU_123)


FAMILY = PublishedFamily(
    model_types=("deepseek_v4",),
    architectures=("DeepseekV4ForCausalLM",),
    defaults=DeepseekV4Config(),
    keys=(*plain_types(DeepseekV4Config), "compress_ratios"),
    read_config=read_config,
    write_config=write_config,
    tensors=tensors,
    describe_ignored=describe_ignored,
    scale_names=scale_names,
    parts=parts,
    fp4_experts=True,
)
