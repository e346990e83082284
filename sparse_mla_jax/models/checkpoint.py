"""Hugging Face folders (config.json with safetensors, published tensor names) to parameters and back.

Published matrices are output-first ([out, in], as torch.nn.Linear keeps them), ours input-first. kv_b_proj is split in
two, what makes keys and what makes values, and a layer's experts are stacked.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_mla_jax.config import DeepseekV32Config, load_config, require
from sparse_mla_jax.models.deepseek_v32 import Params, param_specs

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SCALE_SUFFIX = "_scale_inv"
_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}

# --- names -----------------------------------------------------------------------------------------------------------


def published_shapes(config: DeepseekV32Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this config holds, in the order in which they are written."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, width: int) -> None:
        shapes[name + ".weight"] = (out, width)

    def swiglu(name: str, inner: int) -> None:
        linear(name + ".gate_proj", inner, c.hidden_size)
        linear(name + ".up_proj", inner, c.hidden_size)
        linear(name + ".down_proj", c.hidden_size, inner)

    linear("model.embed_tokens", c.vocab_size, c.hidden_size)
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (c.hidden_size,)
        attention = prefix + "self_attn."
        linear(attention + "q_a_proj", c.q_lora_rank, c.hidden_size)
        shapes[attention + "q_a_layernorm.weight"] = (c.q_lora_rank,)
        linear(attention + "q_b_proj", c.num_attention_heads * c.qk_head_dim, c.q_lora_rank)
        linear(attention + "kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size)
        shapes[attention + "kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        linear(attention + "kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        linear(attention + "o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim)
        linear(attention + "indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        linear(attention + "indexer.wk", c.index_head_dim, c.hidden_size)
        shapes[attention + "indexer.k_norm.weight"] = (c.index_head_dim,)
        shapes[attention + "indexer.k_norm.bias"] = (c.index_head_dim,)
        linear(attention + "indexer.weights_proj", c.index_n_heads, c.hidden_size)
        shapes[prefix + "post_attention_layernorm.weight"] = (c.hidden_size,)
        if not c.is_moe_layer(layer):
            swiglu(prefix + "mlp", c.intermediate_size)
            continue
        linear(prefix + "mlp.gate", c.n_routed_experts, c.hidden_size)
        shapes[prefix + "mlp.gate.e_score_correction_bias"] = (c.n_routed_experts,)
        for expert in range(c.n_routed_experts):
            swiglu(f"{prefix}mlp.experts.{expert}", c.moe_intermediate_size)
        if c.n_shared_experts:
            swiglu(prefix + "mlp.shared_experts", c.moe_intermediate_size * c.n_shared_experts)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        linear("lm_head", c.vocab_size, c.hidden_size)
    return shapes


def _ignored(name: str, config: DeepseekV32Config) -> bool:
    """Published tensors that this model has no use for: multi-token-prediction layers, derived buffers, tied heads."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return (
        (layer is not None and int(layer.group(1)) >= config.num_hidden_layers)
        or name.endswith("rotary_emb.inv_freq")
        or (config.tie_word_embeddings and name == "lm_head.weight")
    )


# --- files -----------------------------------------------------------------------------------------------------------


class _File:
    """One safetensors file, mapped; tensors of every type come as ml_dtypes views of its bytes."""

    def __init__(self, path: str):
        try:
            with safe_open(path, framework="numpy"):  # validates header, offsets and total size
                pass
            with open(path, "rb") as f:
                size = int.from_bytes(f.read(8), "little")
                self.header: dict[str, Any] = json.loads(f.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}); fetch the file again."
            ) from None
        self.path, self.header_size = path, 8 + size
        self.header.pop("__metadata__", None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.header[name]["shape"])

    def dtype(self, name: str) -> str:
        return self.header[name]["dtype"]

    def read(self, name: str) -> np.ndarray:
        kind = self.dtype(name)
        require(
            kind in _DTYPES,
            f"tensor {name} in {self.path} has type {kind}; supported are {', '.join(_DTYPES)}. Convert the folder.",
        )
        start, end = self.header[name]["data_offsets"]
        if start == end:
            return np.zeros(self.shape(name), _DTYPES[kind])
        data = np.memmap(self.path, np.uint8, "r", offset=self.header_size + start, shape=(end - start,))
        return data.view(_DTYPES[kind]).reshape(self.shape(name))


def _read_index(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as f:
            weight_map = json.load(f)["weight_map"]
        if not all(isinstance(file, str) and os.path.basename(file) == file for file in weight_map.values()):
            raise ValueError("weight_map names something that is not a file of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not an index of safetensors files ({reason}); fetch it again.") from None
    return weight_map


def _open_folder(folder: str) -> dict[str, _File]:
    """Which file holds each tensor of the folder."""
    single, index = os.path.join(folder, _SINGLE), os.path.join(folder, _INDEX)
    if os.path.isfile(single):
        file = _File(single)
        return dict.fromkeys(file.header, file)
    require(
        os.path.isfile(index),
        f"{folder!r} has neither {_SINGLE} nor {_INDEX}; give a folder with safetensors weights.",
    )
    weight_map = _read_index(index)
    for name in sorted(set(weight_map.values())):
        require(os.path.isfile(os.path.join(folder, name)), f"{index} names {name}, which is missing; fetch that file.")
    files = {name: _File(os.path.join(folder, name)) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        require(
            tensor in files[name].header, f"{index} says that {name} holds {tensor}, but it does not; fetch both again."
        )
    return {tensor: files[name] for tensor, name in weight_map.items()}


# --- reading ---------------------------------------------------------------------------------------------------------


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-size // step) for size, step in zip(shape, block))


def _check_tensors(files: dict[str, _File], config: DeepseekV32Config, block: tuple[int, int], folder: str) -> None:
    """Names every tensor that is missing, surplus or of another shape, before anything is read."""
    wanted = published_shapes(config)
    missing = [name for name in wanted if name not in files]
    require(not missing, f"{folder!r} lacks tensor {_some(missing)}; config.json promises it. Fetch all files.")
    for name, shape in list(wanted.items()):
        if files[name].dtype(name).startswith("F8") and len(shape) == 2:
            scale = name + _SCALE_SUFFIX
            require(scale in files, f"FP8 tensor {name} has no {scale} in {folder!r}; fetch all files.")
            wanted[scale] = _scale_shape(shape, block)
    surplus = sorted(name for name in files if name not in wanted and not _ignored(name, config))
    require(
        not surplus,
        f"{folder!r} holds tensor {_some(surplus)}, for which config.json has no place; use the config.json that"
        " belongs to these weights.",
    )
    for name, shape in wanted.items():
        require(
            files[name].shape(name) == shape,
            f"tensor {name} has shape {list(files[name].shape(name))}; config.json makes it {list(shape)}. Use the"
            " config.json that belongs to these weights.",
        )


def dequantize_blocks(values: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """values[out, in] times the scale of its block, float32; blocks at the edges may be cut.

    Args:
      values: [out, in], FP8.
      scales: [ceil(out / block[0]), ceil(in / block[1])], what the checkpoint calls weight_scale_inv.
      block: rows and columns that share a scale.

    Returns:
      float32[out, in].

    Raises:
      ValueError: scales of another shape.
    """
    expected = _scale_shape(values.shape, block)
    require(scales.shape == expected, f"scales has shape {scales.shape}; {values.shape} values need {expected}.")
    rows, columns = np.arange(values.shape[0]) // block[0], np.arange(values.shape[1]) // block[1]
    return values.astype(np.float32) * scales.astype(np.float32)[rows][:, columns]


Get = Callable[[str], np.ndarray]


def _read_attention(get: Get, prefix: str, c: DeepseekV32Config) -> Params:
    heads, indexer = c.num_attention_heads, prefix + "indexer."
    kv_b = get(prefix + "kv_b_proj.weight").reshape(heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    return {
        "q_a_proj": get(prefix + "q_a_proj.weight").T,
        "q_a_layernorm": get(prefix + "q_a_layernorm.weight"),
        "q_b_proj": get(prefix + "q_b_proj.weight").T.reshape(c.q_lora_rank, heads, c.qk_head_dim),
        "kv_a_proj_with_mqa": get(prefix + "kv_a_proj_with_mqa.weight").T,
        "kv_a_layernorm": get(prefix + "kv_a_layernorm.weight"),
        "kv_b_k": kv_b[:, : c.qk_nope_head_dim],
        "kv_b_v": kv_b[:, c.qk_nope_head_dim :].transpose(0, 2, 1),
        "o_proj": get(prefix + "o_proj.weight").T.reshape(heads, c.v_head_dim, c.hidden_size),
        "indexer": {
            "wq_b": get(indexer + "wq_b.weight").T.reshape(c.q_lora_rank, c.index_n_heads, c.index_head_dim),
            "wk": get(indexer + "wk.weight").T,
            "k_norm": {"weight": get(indexer + "k_norm.weight"), "bias": get(indexer + "k_norm.bias")},
            "weights_proj": get(indexer + "weights_proj.weight").T,
        },
    }


def _read_swiglu(get: Get, prefix: str) -> Params:
    return {name: get(f"{prefix}{name}.weight").T for name in ("gate_proj", "up_proj", "down_proj")}


def _read_mlp(get: Get, prefix: str, layer: int, c: DeepseekV32Config) -> Params:
    if not c.is_moe_layer(layer):
        return _read_swiglu(get, prefix)
    experts = [_read_swiglu(get, f"{prefix}experts.{expert}.") for expert in range(c.n_routed_experts)]
    params: Params = {
        "gate": {
            "weight": get(prefix + "gate.weight").T,
            "e_score_correction_bias": get(prefix + "gate.e_score_correction_bias"),
        },
        "experts": {name: np.stack([expert[name] for expert in experts]) for name in experts[0]},
    }
    if c.n_shared_experts:
        params["shared_experts"] = _read_swiglu(get, prefix + "shared_experts.")
    return params


def _block_size(folder: str) -> tuple[int, int]:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
        quantization = json.load(f).get("quantization_config") or {}
    block = quantization.get("weight_block_size") or (128, 128)
    require(
        isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block),
        f"config field weight_block_size is {block!r}; two positive integers are expected. Mend config.json.",
    )
    return block[0], block[1]


def _check_dtype(dtype: Any) -> Any:
    known = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}
    name = str(jnp.dtype(dtype))
    require(name in known, f"dtype is {name}; float32 or bfloat16 is expected.")
    return known[name]


def load_checkpoint(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, progress: bool = True
) -> tuple[DeepseekV32Config, Params]:
    """Reads config.json and the weights beside it.

    One model.safetensors, or several with model.safetensors.index.json. FP8 (e4m3fn) matrices are dequantised by
    their 128x128 `weight_scale_inv` blocks. Tensors of multi-token-prediction layers and rotary buffers are skipped.

    Args:
      folder: a Hugging Face model folder.
      dtype: float32 or bfloat16, of the matrices; norms and e_score_correction_bias are float32 always.
      progress: show a progress bar on stderr, if that is a terminal.

    Returns:
      (config, params), arrays on the default device.

    Raises:
      ValueError: no such folder or file, a truncated or corrupt file, a tensor that is missing, surplus, of another
        shape or type than config.json promises; the message names it.
    """
    folder, dtype = os.fspath(folder), _check_dtype(dtype)
    config = load_config(folder)
    block = _block_size(folder)
    files = _open_folder(folder)
    _check_tensors(files, config, block, folder)
    specs = param_specs(config, dtype)
    disable = not progress or not sys.stderr.isatty()
    with tqdm(total=len(published_shapes(config)), desc="weights", unit="tensor", disable=disable) as bar:

        def get(name: str) -> np.ndarray:
            values = files[name].read(name)
            bar.update()
            if values.dtype == ml_dtypes.float8_e4m3fn:
                scale = name + _SCALE_SUFFIX
                return dequantize_blocks(values, files[scale].read(scale), block)
            return values

        # A copy: jax on a CPU would else share memory with the mapped file.
        def put(specs: Any, values: Any) -> Any:
            return jax.tree.map(lambda spec, value: jnp.array(np.asarray(value, spec.dtype)), specs, values)

        params: Params = {"embed_tokens": put(specs["embed_tokens"], get("model.embed_tokens.weight")), "layers": []}
        for number, spec in enumerate(specs["layers"]):
            prefix = f"model.layers.{number}."
            layer = {
                "input_layernorm": get(prefix + "input_layernorm.weight"),
                "self_attn": _read_attention(get, prefix + "self_attn.", config),
                "post_attention_layernorm": get(prefix + "post_attention_layernorm.weight"),
                "mlp": _read_mlp(get, prefix + "mlp.", number, config),
            }
            params["layers"].append(put(spec, layer))
        params["norm"] = put(specs["norm"], get("model.norm.weight"))
        if not config.tie_word_embeddings:
            params["lm_head"] = put(specs["lm_head"], get("lm_head.weight").T)
    return config, params


# --- writing ---------------------------------------------------------------------------------------------------------


def config_to_json(config: DeepseekV32Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that Hugging Face transformers (5.23) and `load_config` both read."""
    c = config
    rope: dict[str, Any] = {"rope_theta": c.rope.theta, "rope_type": "default"}
    if c.rope.factor != 1.0:
        rope = {
            "rope_type": "yarn",
            "rope_theta": c.rope.theta,
            "factor": c.rope.factor,
            "original_max_position_embeddings": c.rope.original_max_position,
            "beta_fast": c.rope.beta_fast,
            "beta_slow": c.rope.beta_slow,
            "mscale": c.rope.mscale_all_dim,
            "mscale_all_dim": c.rope.mscale_all_dim,
            # Cosines and sines carry no amplitude; said outright, because without mscale the reader would add one.
            "attention_factor": 1.0,
        }
    names = (
        "vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads"
        " q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts"
        " num_experts_per_tok n_group topk_group routed_scaling_factor norm_topk_prob first_k_dense_replace"
        " index_n_heads index_head_dim index_topk rms_norm_eps max_position_embeddings tie_word_embeddings"
    )
    kinds = ["sparse" if c.is_moe_layer(layer) else "dense" for layer in range(c.num_hidden_layers)]
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "dtype": str(jnp.dtype(dtype)),
        **{name: getattr(c, name) for name in names.split()},
        "num_key_value_heads": c.num_attention_heads,
        "head_dim": c.qk_rope_head_dim,
        "qk_head_dim": c.qk_head_dim,
        "layer_types": ["indexed_attention"] * c.num_hidden_layers,
        "mlp_layer_types": kinds,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def _publish_swiglu(prefix: str, params: Params) -> Iterator[tuple[str, Any]]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        yield f"{prefix}{name}.weight", params[name].T


def _publish_attention(prefix: str, p: Params) -> Iterator[tuple[str, Any]]:
    yield prefix + "q_a_proj.weight", p["q_a_proj"].T
    yield prefix + "q_a_layernorm.weight", p["q_a_layernorm"]
    yield prefix + "q_b_proj.weight", p["q_b_proj"].reshape(p["q_b_proj"].shape[0], -1).T
    yield prefix + "kv_a_proj_with_mqa.weight", p["kv_a_proj_with_mqa"].T
    yield prefix + "kv_a_layernorm.weight", p["kv_a_layernorm"]
    both = np.concatenate([p["kv_b_k"], p["kv_b_v"].transpose(0, 2, 1)], axis=1)
    yield prefix + "kv_b_proj.weight", both.reshape(-1, both.shape[-1])
    yield prefix + "o_proj.weight", p["o_proj"].reshape(-1, p["o_proj"].shape[-1]).T
    indexer = p["indexer"]
    yield prefix + "indexer.wq_b.weight", indexer["wq_b"].reshape(indexer["wq_b"].shape[0], -1).T
    yield prefix + "indexer.wk.weight", indexer["wk"].T
    yield prefix + "indexer.k_norm.weight", indexer["k_norm"]["weight"]
    yield prefix + "indexer.k_norm.bias", indexer["k_norm"]["bias"]
    yield prefix + "indexer.weights_proj.weight", indexer["weights_proj"].T


def _publish(params: Params, config: DeepseekV32Config) -> Iterator[tuple[str, np.ndarray]]:
    """Published names and arrays, in the order of `published_shapes`; one layer at a time is on the host."""
    yield "model.embed_tokens.weight", np.asarray(params["embed_tokens"])
    for number, on_device in enumerate(params["layers"]):
        layer, prefix = jax.tree.map(np.asarray, on_device), f"model.layers.{number}."
        mlp, mlp_prefix = layer["mlp"], prefix + "mlp."
        yield prefix + "input_layernorm.weight", layer["input_layernorm"]
        yield from _publish_attention(prefix + "self_attn.", layer["self_attn"])
        yield prefix + "post_attention_layernorm.weight", layer["post_attention_layernorm"]
        if not config.is_moe_layer(number):
            yield from _publish_swiglu(mlp_prefix, mlp)
            continue
        yield mlp_prefix + "gate.weight", mlp["gate"]["weight"].T
        yield mlp_prefix + "gate.e_score_correction_bias", mlp["gate"]["e_score_correction_bias"]
        for expert in range(config.n_routed_experts):
            own = {name: stack[expert] for name, stack in mlp["experts"].items()}
            yield from _publish_swiglu(f"{mlp_prefix}experts.{expert}.", own)
        if config.n_shared_experts:
            yield from _publish_swiglu(mlp_prefix + "shared_experts.", mlp["shared_experts"])
    yield "model.norm.weight", np.asarray(params["norm"])
    if not config.tie_word_embeddings:
        yield "lm_head.weight", np.asarray(params["lm_head"]).T


def _plan_shards(sizes: dict[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _check_params(params: Params, config: DeepseekV32Config) -> None:
    specs = param_specs(config)
    given: Any = jax.tree.structure(params)
    expected: Any = jax.tree.structure(specs)
    require(given == expected, f"params has the structure {given}; config makes it {expected}.")
    for (path, spec), value in zip(jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(params)):
        name = jax.tree_util.keystr(path)
        require(value.shape == spec.shape, f"params{name} has shape {value.shape}; config makes it {spec.shape}.")


def _replace_json(path: str, data: dict[str, Any]) -> None:
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, sort_keys=True)
        f.write("\n")
    os.replace(path + ".part", path)


def save_checkpoint(
    folder: str | os.PathLike[str],
    config: DeepseekV32Config,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    extra: dict[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Writes a folder in the published naming, which `load_checkpoint` and Hugging Face transformers both read.

    Norms and e_score_correction_bias are written as float32. Weights that an earlier call left there are
    replaced.

    Args:
      folder: made if it does not exist.
      config: the model's shapes.
      params: the parameters' pytree.
      dtype: float32 or bfloat16, of the matrices; None keeps the type that embed_tokens has.
      max_shard_bytes: a file holds no more than this, unless one tensor alone does.
      extra: further fields of config.json, say {"eos_token_id": 0}.
      progress: show a progress bar on stderr, if that is a terminal.

    Raises:
      ValueError: params that do not fit config, another dtype, max_shard_bytes below 1.
    """
    _check_params(params, config)
    require(max_shard_bytes >= 1, f"max_shard_bytes is {max_shard_bytes}; a positive number of bytes is expected.")
    folder, dtype = os.fspath(folder), _check_dtype(params["embed_tokens"].dtype if dtype is None else dtype)
    os.makedirs(folder, exist_ok=True)

    def stored(name: str) -> Any:  # vectors are norms and biases
        return np.dtype(np.float32) if len(shapes[name]) == 1 else dtype

    shapes = published_shapes(config)
    sizes = {name: math.prod(shape) * stored(name).itemsize for name, shape in shapes.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    single = len(shards) == 1
    files = [_SINGLE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    tensors = _publish(params, config)
    disable = not progress or not sys.stderr.isatty()
    for file, names in zip(tqdm(files, desc="writing", unit="file", disable=disable), shards):
        held = {
            name: np.ascontiguousarray(value, stored(name)) for name, value in itertools.islice(tensors, len(names))
        }
        save_file(held, os.path.join(folder, file + ".part"), metadata={"format": "pt"})
    for old in os.listdir(folder):
        if old in (_SINGLE, _INDEX) or _SHARD.fullmatch(old):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, old))
    for file in files:
        os.replace(os.path.join(folder, file + ".part"), os.path.join(folder, file))
    if not single:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _replace_json(os.path.join(folder, _INDEX), index)
    _replace_json(os.path.join(folder, "config.json"), {**config_to_json(config, dtype), **(extra or {})})
