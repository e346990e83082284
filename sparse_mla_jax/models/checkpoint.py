"""Reads and writes Hugging Face folders: config.json, and safetensors with the published tensor names.

A table in `families` maps a model family's tensor names to our arrays. Shapes and types come from the model's
`param_specs` (`tensor_table`). `weight_files` reads folders and files, `quantized_weights` dequantises FP8 and FP4.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config, load_config
from sparse_mla_jax.families.registry import published_family
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.models.quantized_weights import FP4_GROUP, dequantize_blocks, dequantize_fp4, scale_shape
from sparse_mla_jax.models.tensor_table import Keys, Tensor, at, list_tensors, published_shapes
from sparse_mla_jax.models.weight_files import INDEX, SHARD, SINGLE, WeightFile, open_folder

__all__ = [
    "config_to_json",
    "dequantize_blocks",
    "dequantize_fp4",
    "load_checkpoint",
    "published_shapes",
    "save_checkpoint",
]

Params = dict[str, Any]

# numpy types by their safetensors names, for each kind of tensor: values, scales, integer tables, FP4.
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


def config_to_json(config: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that `load_config` and Hugging Face transformers (5.23) read.

    Options of a run (quantize_index_query) are not part of it.

    Raises:
      ValueError: rotary parameters that a published DeepSeek-V4 config can not express.
    """
    return published_family(config).write_config(config, dtype)


# --- reading


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _Form(NamedTuple):
    """The expected shape and types of a tensor in its file, and the name of its scales."""

    shape: tuple[int, ...]
    types: dict[str, Any]
    scale: str | None = None


def _form(tensor: Tensor, files: dict[str, WeightFile], config: Config, folder: str) -> _Form:
    """The expected form of a tensor of the folder: plain, FP8 or FP4, told by its safetensors type."""
    family, name, shape = published_family(config), tensor.name, tensor.shape
    kind = files[name].dtype(name)
    packed = kind in _FP4 and family.fp4_experts and tensor.expert is not None
    if not (packed or (kind == "F8_E4M3" and len(shape) == 2)):
        return _Form(shape, _TABLES if tensor.is_table else _FLOATS)
    names = family.scale_names(name)
    scale = next((one for one in names if one in files), None)
    form = "FP4" if packed else "FP8"
    require(scale is not None, f"{form} tensor {name} has no {' or '.join(names)} in {folder!r}; fetch all files.")
    if not packed:
        return _Form(shape, _FLOATS, scale)
    require(shape[1] % 2 == 0, f"tensor {name} is FP4, two values to a byte, with {shape[1]} to a row.")
    return _Form(shape if kind == "F4" else (shape[0], shape[1] // 2), _FP4, scale)


def _check_tensors(
    files: dict[str, WeightFile], tensors: list[Tensor], config: Config, block: tuple[int, int], folder: str
) -> dict[str, _Form]:
    """The expected form of every tensor, scales included. Checks all headers before any tensor is read.

    Raises:
      ValueError: a tensor is missing, surplus, or of another shape or type.
    """
    missing = [tensor.name for tensor in tensors if tensor.name not in files]
    require(not missing, f"{folder!r} lacks tensor {_name_some(missing)}; config.json promises it. Fetch all files.")
    forms = {tensor.name: _form(tensor, files, config, folder) for tensor in tensors}
    for tensor in tensors:
        form = forms[tensor.name]
        if form.scale is not None:
            scales = scale_shape(tensor.shape, (1, FP4_GROUP) if form.types is _FP4 else block)
            forms[form.scale] = _Form(scales, _SCALES)
    is_ignored = published_family(config).is_ignored
    surplus = sorted(name for name in files if name not in forms and not is_ignored(name, config))
    require(
        not surplus,
        f"{folder!r} holds tensor {_name_some(surplus)}, for which config.json has no place; use the config.json that"
        " belongs to these weights.",
    )
    for name, form in forms.items():
        file = files[name]
        require(
            file.dtype(name) in form.types,
            f"tensor {name} in {file.path} has type {file.dtype(name)}; supported are {', '.join(form.types)}. Convert"
            " the folder.",
        )
        require(
            file.shape(name) == form.shape,
            f"tensor {name} has shape {list(file.shape(name))}; config.json makes it {list(form.shape)}. Use the"
            " config.json that belongs to these weights.",
        )
    return forms


def _read_block_size(folder: str) -> tuple[int, int]:
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


def _check_table(name: str, table: np.ndarray, config: Any) -> None:
    """Raises ValueError if a table of token ids names an expert that does not exist."""
    if not table.size:
        return
    low, high = int(table.min()), int(table.max())
    require(
        low >= 0 and high < config.n_routed_experts,
        f"tensor {name} names experts {low} to {high}; there are {config.n_routed_experts} (n_routed_experts). Fetch"
        " the file again.",
    )


def _build_params(specs: Any, tensors: list[Tensor], read: Callable[[Tensor], np.ndarray]) -> Params:
    """Reads the tensors into a pytree of device arrays like `specs`; experts are stacked on the host first."""
    stacks: dict[Keys, np.ndarray] = {}
    arrays: dict[Keys, jax.Array] = {}
    for tensor in tensors:
        values = tensor.layout.read(read(tensor), [spec.shape for spec in tensor.specs])
        for keys, spec, value in zip(tensor.keys, tensor.specs, values):
            if tensor.expert is None:
                # Copy: jax on a CPU would otherwise share memory with the mapped file.
                arrays[keys] = jnp.array(np.asarray(value, spec.dtype))
                continue
            if keys not in stacks:
                stacks[keys] = np.empty(at(specs, keys).shape, spec.dtype)
            stacks[keys][tensor.expert] = value
            if tensor.expert == len(stacks[keys]) - 1:
                arrays[keys] = jnp.array(stacks.pop(keys))
    return jax.tree_util.tree_map_with_path(lambda path, spec: arrays[_keys(path)], specs)


def _keys(path: Any) -> Keys:
    return tuple(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in path)


def load_checkpoint(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, progress: bool = True
) -> tuple[Config, Params]:
    """Reads config.json and the weights of a folder of DeepSeek-V3.2 or DeepSeek-V4.

    The weights are one model.safetensors, or several files with model.safetensors.index.json. FP8 (e4m3fn) matrices
    are dequantised by their 128x128 blocks (`weight_scale_inv`, or V4's `scale`), V4's FP4 experts by groups of 32
    values; see `families.deepseek_v4`. Multi-token-prediction layers and rotary buffers are skipped.

    Args:
      folder: a Hugging Face model folder.
      dtype: float32 or bfloat16, of the matrices; norms, biases and other small weights are always float32 (see
        `param_specs` of the family).
      progress: show a progress bar on stderr, if that is a terminal.

    Returns:
      (config, params), arrays on the default device.

    Raises:
      ValueError: no such folder or file, a truncated or corrupt file, or a tensor that is missing, surplus, or of
        another shape or type than config.json requires; the message names it.
    """
    folder, dtype = os.fspath(folder), _check_dtype(dtype)
    config = load_config(folder)
    block, files, tensors = _read_block_size(folder), open_folder(folder), list_tensors(config, dtype)
    forms = _check_tensors(files, tensors, config, block, folder)
    disable = not progress or not sys.stderr.isatty()
    with tqdm(total=len(tensors), desc="weights", unit="tensor", disable=disable) as bar:

        def read(tensor: Tensor) -> np.ndarray:
            bar.update()
            name, form = tensor.name, forms[tensor.name]
            value = files[name].read(name, form.types)
            if form.scale is None:
                if tensor.is_table:
                    _check_table(name, value, config)
                return value
            scales = files[form.scale].read(form.scale, _SCALES)
            wide = dequantize_fp4(value, scales) if form.types is _FP4 else dequantize_blocks(value, scales, block)
            return wide.astype(dtype)

        return config, _build_params(family_of(config).param_specs(config, dtype), tensors, read)


# --- writing


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
    specs = family_of(config).param_specs(config)
    given: Any = jax.tree.structure(params)
    expected: Any = jax.tree.structure(specs)
    require(given == expected, f"params has the structure {given}; config makes it {expected}.")
    for (path, spec), value in zip(jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(params)):
        name = jax.tree_util.keystr(path)
        require(value.shape == spec.shape, f"params{name} has shape {value.shape}; config makes it {spec.shape}.")


def _publish(params: Params, tensors: list[Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields published names with arrays in the type in which they are saved, one at a time."""
    for tensor in tensors:
        arrays = [np.asarray(at(params, keys)) for keys in tensor.keys]
        if tensor.expert is not None:
            arrays = [stack[tensor.expert] for stack in arrays]
        yield tensor.name, np.ascontiguousarray(tensor.layout.write(arrays), tensor.stored_dtype)


def _replace_json(path: str, data: dict[str, Any]) -> None:
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, sort_keys=True)
        f.write("\n")
    os.replace(path + ".part", path)


def _replace_weights(folder: str, files: list[str]) -> None:
    """Replaces the folder's weight files by the newly written ones (FILE.part)."""
    for old in os.listdir(folder):
        if old in (SINGLE, INDEX) or SHARD.fullmatch(old):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, old))
    for file in files:
        os.replace(os.path.join(folder, file + ".part"), os.path.join(folder, file))


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
    """Writes a folder with the published names, which `load_checkpoint` and Hugging Face transformers both read.

    Weights that are always float32 (norms, biases, ...) are written as float32. The folder's old weights are replaced.

    Args:
      folder: made if it does not exist.
      config: the model's shapes.
      params: the parameters' pytree.
      dtype: float32 or bfloat16, of the matrices; None means the type of embed_tokens.
      max_shard_bytes: most bytes of a file, unless a single tensor is larger.
      extra: further fields of config.json, such as {"eos_token_id": 0}.
      progress: show a progress bar on stderr, if that is a terminal.

    Raises:
      ValueError: params that do not fit config, another dtype, max_shard_bytes below 1.
    """
    _check_params(params, config)
    require(max_shard_bytes >= 1, f"max_shard_bytes is {max_shard_bytes}; a positive number of bytes is expected.")
    folder, dtype = os.fspath(folder), _check_dtype(params["embed_tokens"].dtype if dtype is None else dtype)
    os.makedirs(folder, exist_ok=True)

    tensors = list_tensors(config, dtype)
    sizes = {tensor.name: math.prod(tensor.shape) * tensor.stored_dtype.itemsize for tensor in tensors}
    shards = _plan_shards(sizes, max_shard_bytes)
    single = len(shards) == 1
    files = [SINGLE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    written = _publish(params, tensors)
    disable = not progress or not sys.stderr.isatty()
    for file, names in zip(tqdm(files, desc="writing", unit="file", disable=disable), shards):
        held = dict(itertools.islice(written, len(names)))
        save_file(held, os.path.join(folder, file + ".part"), metadata={"format": "pt"})
    _replace_weights(folder, files)
    if not single:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _replace_json(os.path.join(folder, INDEX), index)
    _replace_json(os.path.join(folder, "config.json"), {**config_to_json(config, dtype), **(extra or {})})
