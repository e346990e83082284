"""DeepSeek-V4's published tensor names, and how each of our arrays is made of one of them and back.

The names are those of the files that DeepSeek publishes (V4-Flash, V4-Flash-Base, V4-Pro) and that its own inference
code reads: "layers.0.attn.wq_a.weight", without "model."; what Hugging Face transformers saves itself is named
otherwise and is not read. Published matrices are output-first ([out, in]), ours input-first; wo_a is [g * r_o, in], the
rows of group i from i * r_o on, ours [g, in, r_o]; experts are stacked.

Quantised forms, told apart by the type of each tensor:

* FP8: ".weight" F8_E4M3 [out, in] with a scale for every 128x128 values (quantization_config's weight_block_size),
  ".scale" beside it, F8_E8M0 (Flash, Pro) or F32 (Flash-Base).
* FP4, routed experts only: ".weight" I8 [out, in / 2] (U8, or F4 [out, in], hold the same bytes), two e2m1 values to a
  byte, the even one in the low half; ".scale" F8_E8M0 [out, in / 32], one for every 32 values of a row.

Converted files call the scales "weight_scale_inv" (as V3.2 does) or "weight_scale", or keep E8M0 as U8; these are read
too. Values are multiplied by scales, whatever the name says. tid2eid is I64 (I32 and U32 are read too). "mtp.*"
(multi-token prediction) is skipped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV4Config, RopeConfig
from sparse_mla_jax.models.params_v4 import Params, layer_shapes, rest_shapes
from sparse_mla_jax.models.params_v4 import param_specs as param_specs

Get = Callable[[str], np.ndarray]
Path = tuple[Any, ...]
Shape = tuple[int, ...]

_ROUTED = re.compile(r"layers\.\d+\.ffn\.experts\.\d+\.w[123]\.weight")
_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# --- names -----------------------------------------------------------------------------------------------------------


def _compressor_names(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    yield name + ".wkv.weight", (*path, "kv_proj")
    yield name + ".wgate.weight", (*path, "gate_proj")
    yield name + ".ape", (*path, "position_bias")
    yield name + ".norm.weight", (*path, "norm")


def _mixing_names(name: str, path: str) -> Iterator[tuple[str, Path]]:
    for part in ("fn", "base", "scale"):
        yield f"{name}_{part}", (path, part)


def _layer_names(c: DeepseekV4Config, layer: int) -> Iterator[tuple[str, Path]]:
    """Published names inside the layer, and where each lies in our layer; an expert's path ends with its number."""
    yield from _mixing_names("hc_attn", "attn_hc")
    yield "attn_norm.weight", ("input_layernorm",)
    for theirs, ours in (
        ("wq_a.weight", "q_a_proj"),
        ("q_norm.weight", "q_a_layernorm"),
        ("wq_b.weight", "q_b_proj"),
        ("wkv.weight", "kv_proj"),
        ("kv_norm.weight", "kv_layernorm"),
        ("attn_sink", "sinks"),
        ("wo_a.weight", "o_a_proj"),
        ("wo_b.weight", "o_b_proj"),
    ):
        yield "attn." + theirs, ("self_attn", ours)
    if c.compress_ratio(layer):
        yield from _compressor_names("attn.compressor", ("self_attn", "compressor"))
    if c.has_indexer(layer):
        path = ("self_attn", "indexer")
        yield "attn.indexer.wq_b.weight", (*path, "wq_b")
        yield "attn.indexer.weights_proj.weight", (*path, "weights_proj")
        yield from _compressor_names("attn.indexer.compressor", (*path, "compressor"))
    yield from _mixing_names("hc_ffn", "ffn_hc")
    yield "ffn_norm.weight", ("post_attention_layernorm",)
    yield "ffn.gate.weight", ("mlp", "gate", "weight")
    if c.is_hash_layer(layer):
        yield "ffn.gate.tid2eid", ("mlp", "gate", "token_experts")
    else:
        yield "ffn.gate.bias", ("mlp", "gate", "e_score_correction_bias")
    for expert in range(c.n_routed_experts):
        for theirs, ours in _EXPERT.items():
            yield f"ffn.experts.{expert}.{theirs}.weight", ("mlp", "experts", ours, expert)
    if c.n_shared_experts:
        for theirs, ours in _EXPERT.items():
            yield f"ffn.shared_experts.{theirs}.weight", ("mlp", "shared_experts", ours)


def _layer(c: DeepseekV4Config, layer: int) -> Iterator[tuple[str, Path, Shape]]:
    """Name, place in our layer and our shape of every tensor of a layer."""
    shapes = layer_shapes(c, layer)
    for name, path in _layer_names(c, layer):
        yield f"layers.{layer}.{name}", path, _at(shapes, path)


def _rest(c: DeepseekV4Config) -> Iterator[tuple[str, Path, Shape]]:
    shapes = rest_shapes(c)
    names = [("embed.weight", ("embed_tokens",)), ("norm.weight", ("norm",)), *_mixing_names("hc_head", "hc_head")]
    if not c.tie_word_embeddings:
        names.append(("head.weight", ("lm_head",)))
    for name, path in names:
        yield name, path, _at(shapes, path)


def _at(tree: Any, path: Path) -> Any:
    """What lies there in a tree of shapes or of arrays; an expert of a stack by its number."""
    for key in path:
        tree = tree[1:] if isinstance(tree, tuple) else tree[key]
    return tree


def _same(name: str) -> bool:
    """Whether a tensor of several axes has our layout as published."""
    return name.endswith((".ape", "tid2eid")) or name == "embed.weight"


def _published_shape(name: str, shape: Shape) -> Shape:
    if len(shape) == 1 or _same(name):
        return shape
    if name.endswith(".wo_a.weight"):
        groups, width, rank = shape
        return groups * rank, width
    return math.prod(shape[1:]), shape[0]


def published_shapes(config: DeepseekV4Config) -> dict[str, Shape]:
    """Name and shape of every tensor that a folder of this config holds, in the order in which they are written."""
    entries = [entry for layer in range(config.num_hidden_layers) for entry in _layer(config, layer)]
    return {name: _published_shape(name, shape) for name, _, shape in (*entries, *_rest(config))}


def ignored(name: str, config: DeepseekV4Config) -> bool:
    """Published tensors that this model has no use for: multi-token prediction, layers past the last, tied heads."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return (
        name.startswith("mtp.")
        or (layer is not None and int(layer.group(1)) >= config.num_hidden_layers)
        or (config.tie_word_embeddings and name == "head.weight")
    )


def scale_names(name: str) -> tuple[str, ...]:
    """What the scales of a quantised matrix may be called, the published name first."""
    return name.removesuffix(".weight") + ".scale", name + "_scale_inv", name + "_scale"


def may_be_fp4(name: str) -> bool:
    """Whether a tensor may hold FP4 values: those of routed experts may."""
    return _ROUTED.fullmatch(name) is not None


def is_table(name: str) -> bool:
    """Whether a tensor holds integers."""
    return name.endswith(".tid2eid")


def stored_dtype(name: str, shape: Shape, dtype: Any) -> np.dtype:
    """The type in which a tensor is written where matrices are `dtype`."""
    if is_table(name):
        return np.dtype(np.int64)
    wide = len(shape) == 1 or name.endswith((".ape", "_fn"))
    return np.dtype(np.float32) if wide else np.dtype(dtype)


# --- reading ---------------------------------------------------------------------------------------------------------


def _ours(name: str, value: np.ndarray, shape: Shape) -> np.ndarray:
    """A published tensor in our layout; a view."""
    if len(shape) == 1 or _same(name):
        return value
    if name.endswith(".wo_a.weight"):
        groups, width, rank = shape
        return value.reshape(groups, rank, width).transpose(0, 2, 1)
    return value.T.reshape(shape)


def _read(get: Get, entries: Iterator[tuple[str, Path, Shape]]) -> Params:
    params: Params = {}
    for name, path, shape in entries:
        value, stacked = _ours(name, get(name), shape), isinstance(path[-1], int)
        node = params
        for key in path[: -2 if stacked else -1]:
            node = node.setdefault(key, {})
        if stacked:
            node.setdefault(path[-2], []).append(value)
        else:
            node[path[-1]] = value
    return params


def read_layer(get: Get, number: int, config: DeepseekV4Config) -> Params:
    """Layer `number` from its published tensors; experts come as lists.

    Raises:
      ValueError: a table of token ids names an expert that there is not.
    """
    params = _read(get, _layer(config, number))
    table = params["mlp"]["gate"].get("token_experts")
    if table is not None and table.size:
        low, high = int(table.min()), int(table.max())
        require(
            low >= 0 and high < config.n_routed_experts,
            f"tensor layers.{number}.ffn.gate.tid2eid names experts {low} to {high}; there are"
            f" {config.n_routed_experts} (n_routed_experts). Fetch the file again.",
        )
    return params


def read_rest(get: Get, config: DeepseekV4Config) -> Params:
    """What lies outside the layers."""
    return _read(get, _rest(config))


# --- writing ---------------------------------------------------------------------------------------------------------


def _theirs(name: str, value: np.ndarray) -> np.ndarray:
    """The inverse of _ours."""
    if value.ndim == 1 or _same(name):
        return value
    if name.endswith(".wo_a.weight"):
        return value.transpose(0, 2, 1).reshape(-1, value.shape[1])
    return value.reshape(value.shape[0], -1).T


def publish(params: Params, config: DeepseekV4Config) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and arrays, in the order of `published_shapes`; one layer at a time is on the host."""
    for number, on_device in enumerate(params["layers"]):
        layer = jax.tree.map(np.asarray, on_device)
        for name, path, _ in _layer(config, number):
            yield name, _theirs(name, _at(layer, path))
    for name, path, _ in _rest(config):
        yield name, _theirs(name, np.asarray(_at(params, path)))


def config_to_json(config: DeepseekV4Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json in the published spelling."""
    c = config
    names = (
        "vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim"
        " q_lora_rank o_groups o_lora_rank n_routed_experts n_shared_experts num_experts_per_tok routed_scaling_factor"
        " norm_topk_prob num_hash_layers swiglu_limit sliding_window index_n_heads index_head_dim index_topk hc_mult"
        " hc_sinkhorn_iters hc_eps rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    require(
        c.rope.factor == 1.0,
        f"config field rope has factor {c.rope.factor}; layers that do not compress rotate without scaling in published"
        " files. Set it to 1.",
    )
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": str(jnp.dtype(dtype)),
        **{name: getattr(c, name) for name in names.split()},
        "compress_ratios": list(c.compress_ratios),
        "num_nextn_predict_layers": 0,
        "num_key_value_heads": 1,
        "rope_theta": c.rope.theta,
        "compress_rope_theta": c.compress_rope.theta,
        "rope_scaling": _scaling_to_json(c.compress_rope),
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _scaling_to_json(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.factor == 1.0:
        return None
    return {
        "type": "yarn",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
