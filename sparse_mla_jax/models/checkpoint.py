"""Hugging Face folders (config.json with safetensors, published tensor names) to parameters and back.

This file knows folders, files, types, quantised forms and shards. What the tensors of a model family are called, and
how our arrays are made of them, is in `checkpoint_v32` and `checkpoint_v4`, each with these functions:

    published_shapes(config), ignored(name, config)          which tensors there are, and which may be there besides
    scale_names(name), may_be_fp4(name), is_table(name)      what a quantised matrix and its scales look like
    param_specs(config, dtype), read_layer(get, number, config), read_rest(get, config)        published to ours
    publish(params, config), stored_dtype(name, shape, dtype), config_to_json(config, dtype)   and back
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config, DeepseekV4Config, load_config
from sparse_mla_jax.models import checkpoint_v4, checkpoint_v32

Params = dict[str, Any]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# What safetensors files call types, by what a tensor holds.
_FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_SCALES: dict[str, Any] = {**_FLOATS, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "U8": ml_dtypes.float8_e8m0fnu}
_TABLES: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "U32": np.uint32}
_FP4: dict[str, Any] = {"I8": np.uint8, "U8": np.uint8, "F4": np.uint8}
_FP4_GROUP = 32


def _family(config: Config) -> Any:
    """The module that knows the published names of this config's family."""
    return checkpoint_v4 if isinstance(config, DeepseekV4Config) else checkpoint_v32


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this config holds, in the order in which they are written."""
    return _family(config).published_shapes(config)


def config_to_json(config: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that `load_config` reads back, as Hugging Face transformers (5.23) does.

    Choices of the run (quantize_index_query) are no field of it.

    Raises:
      ValueError: a rotation that the published spelling of DeepSeek-V4 can not say.
    """
    return _family(config).config_to_json(config, dtype)


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

    def read(self, name: str, types: dict[str, Any]) -> np.ndarray:
        """Its bytes as `types` reads them; of F4, two values to a byte, [..., N / 2] bytes."""
        dtype, shape = types[self.dtype(name)], self.shape(name)
        if self.dtype(name) == "F4":
            shape = (*shape[:-1], shape[-1] // 2)
        start, end = self.header[name]["data_offsets"]
        if start == end:
            return np.zeros(shape, dtype)
        data = np.memmap(self.path, np.uint8, "r", offset=self.header_size + start, shape=(end - start,))
        return data.view(dtype).reshape(shape)


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


def _check_tensors(files: dict[str, _File], config: Config, block: tuple[int, int], folder: str) -> dict[str, str]:
    """Names every tensor that is missing, surplus, or of another shape or type, before anything is read.

    Returns:
      The quantised matrices, each with the name of its scales.
    """
    family, wanted = _family(config), published_shapes(config)
    missing = [name for name in wanted if name not in files]
    require(not missing, f"{folder!r} lacks tensor {_some(missing)}; config.json promises it. Fetch all files.")
    types, scales = {}, {}
    for name, shape in list(wanted.items()):
        types[name] = _TABLES if family.is_table(name) else _FLOATS
        kind = files[name].dtype(name)
        packed = kind in _FP4 and family.may_be_fp4(name)
        if not (packed or (kind == "F8_E4M3" and len(shape) == 2)):
            continue
        names = family.scale_names(name)
        scale = next((one for one in names if one in files), None)
        if scale is None:
            form = "FP4" if packed else "FP8"
            raise ValueError(f"{form} tensor {name} has no {' or '.join(names)} in {folder!r}; fetch all files.")
        if packed:
            require(shape[1] % 2 == 0, f"tensor {name} is FP4, two values to a byte, with {shape[1]} to a row.")
            types[name] = _FP4
            wanted[name] = shape if kind == "F4" else (shape[0], shape[1] // 2)
        scales[name], types[scale] = scale, _SCALES
        wanted[scale] = _scale_shape(shape, (1, _FP4_GROUP) if packed else block)
    surplus = sorted(name for name in files if name not in wanted and not family.ignored(name, config))
    require(
        not surplus,
        f"{folder!r} holds tensor {_some(surplus)}, for which config.json has no place; use the config.json that"
        " belongs to these weights.",
    )
    for name, shape in wanted.items():
        file = files[name]
        require(
            file.dtype(name) in types[name],
            f"tensor {name} in {file.path} has type {file.dtype(name)}; supported are {', '.join(types[name])}. Convert"
            " the folder.",
        )
        require(
            file.shape(name) == shape,
            f"tensor {name} has shape {list(file.shape(name))}; config.json makes it {list(shape)}. Use the"
            " config.json that belongs to these weights.",
        )
    return scales


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


def dequantize_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """FP4 values, two to a byte, times the scale of every 32 of a row, float32 (exact but for over- and underflow).

    Args:
      packed: int8 or uint8 [out, in / 2]: e2m1 codes, that of the even column in the low four bits.
      scales: [out, ceil(in / 32)], E8M0 or any floating type; the last group of a row may be cut.

    Returns:
      float32[out, in].

    Raises:
      ValueError: scales of another shape, or packed is not bytes of two axes.
    """
    require(
        packed.dtype in (np.int8, np.uint8) and packed.ndim == 2,
        f"packed is {packed.dtype}{list(packed.shape)}; expected int8 or uint8 [out, in / 2]. View it as bytes.",
    )
    # The sixteen e2m1 codes: sign, two bits of exponent (bias 1), one of mantissa.
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    data = packed.view(np.uint8)
    values = codes[np.stack([data & 15, data >> 4], axis=-1)].reshape(data.shape[0], 2 * data.shape[1])
    return dequantize_blocks(values, scales, (1, _FP4_GROUP))


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
) -> tuple[Config, Params]:
    """Reads config.json and the weights beside it, of DeepSeek-V3.2 or DeepSeek-V4.

    One model.safetensors, or several with model.safetensors.index.json. FP8 (e4m3fn) matrices are dequantised by their
    128x128 blocks (`weight_scale_inv`, or V4's `scale`), V4's FP4 experts by their groups of 32; `checkpoint_v4` lists
    its forms. Tensors of multi-token-prediction layers and rotary buffers are skipped.

    Args:
      folder: a Hugging Face model folder.
      dtype: float32 or bfloat16, of the matrices; norms, biases and what else is small are float32 always (see
        `param_specs` of the family).
      progress: show a progress bar on stderr, if that is a terminal.

    Returns:
      (config, params), arrays on the default device.

    Raises:
      ValueError: no such folder or file, a truncated or corrupt file, a tensor that is missing, surplus, of another
        shape or type than config.json promises; the message names it.
    """
    folder, dtype = os.fspath(folder), _check_dtype(dtype)
    config = load_config(folder)
    family, block, files = _family(config), _block_size(folder), _open_folder(folder)
    scales = _check_tensors(files, config, block, folder)
    specs = family.param_specs(config, dtype)
    disable = not progress or not sys.stderr.isatty()
    with tqdm(total=len(published_shapes(config)), desc="weights", unit="tensor", disable=disable) as bar:

        def get(name: str) -> np.ndarray:
            bar.update()
            file, scale = files[name], scales.get(name)
            if scale is None:
                return file.read(name, _TABLES if family.is_table(name) else _FLOATS)
            factors = files[scale].read(scale, _SCALES)
            if file.dtype(name) in _FP4:
                return dequantize_fp4(file.read(name, _FP4), factors).astype(dtype)
            return dequantize_blocks(file.read(name, _FLOATS), factors, block).astype(dtype)

        def put(spec: Any, value: Any) -> jax.Array:
            if isinstance(value, list):  # a stack, one of which at a time is converted
                stack = np.empty(spec.shape, spec.dtype)
                for number, one in enumerate(value):
                    stack[number] = one
                value = stack
            # A copy: jax on a CPU would else share memory with the mapped file.
            return jnp.array(np.asarray(value, spec.dtype))

        layers = []
        for number, layer_specs in enumerate(specs.pop("layers")):
            layers.append(jax.tree.map(put, layer_specs, family.read_layer(get, number, config)))
        params = jax.tree.map(put, specs, family.read_rest(get, config))
    return config, {**params, "layers": layers}


# --- writing ---------------------------------------------------------------------------------------------------------


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


def _check_params(params: Params, config: Config) -> None:
    specs = _family(config).param_specs(config)
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
    config: Config,
    params: Params,
    *,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    extra: dict[str, Any] | None = None,
    progress: bool = False,
) -> None:
    """Writes a folder in the published naming, which `load_checkpoint` and Hugging Face transformers both read.

    What is float32 always (norms, biases, ...) is written as float32. Weights that an earlier call left there are
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

    family, shapes = _family(config), published_shapes(config)
    stored = {name: family.stored_dtype(name, shape, dtype) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) * stored[name].itemsize for name, shape in shapes.items()}
    shards = _plan_shards(sizes, max_shard_bytes)
    single = len(shards) == 1
    files = [_SINGLE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    tensors = family.publish(params, config)
    disable = not progress or not sys.stderr.isatty()
    for file, names in zip(tqdm(files, desc="writing", unit="file", disable=disable), shards):
        held = {
            name: np.ascontiguousarray(value, stored[name]) for name, value in itertools.islice(tensors, len(names))
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
