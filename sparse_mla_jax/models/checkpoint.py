"""Reads and writes Hugging Face folders: config.json, and safetensors with the published tensor names.

A table in `families` maps a model family's tensor names to our arrays. Shapes and types come from the model's
`param_specs` (`tensor_table`). `weight_files` reads folders and files, `tensor_forms` checks what they hold,
`quantized_weights` dequantises FP8 and FP4, and `folder_replacement` puts a new checkpoint in the place of an old one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import DTYPES
from sparse_mla_jax._folder import CONFIG, INDEX, SINGLE, find_file
from sparse_mla_jax.config import Config, load_config
from sparse_mla_jax.families.registry import write_config
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.models.folder_replacement import replace_checkpoint
from sparse_mla_jax.models.quantized_weights import Block, dequantize_blocks, dequantize_fp4, read_block_size
from sparse_mla_jax.models.tensor_forms import Form, check_forms, count_skipped
from sparse_mla_jax.models.tensor_table import Keys, Tensor, at, keys_of, list_tensors, published_shapes
from sparse_mla_jax.models.weight_files import open_folder, read_unchanged

__all__ = [
    "OpenCheckpoint",
    "config_to_json",
    "dequantize_blocks",
    "dequantize_fp4",
    "load_checkpoint",
    "open_checkpoint",
    "published_shapes",
    "save_checkpoint",
    "skipped_tensors",
]

Params = dict[str, Any]


def config_to_json(config: Config, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The fields of a config.json that `load_config` and Hugging Face transformers (5.23) read.

    Options of a run (quantize_index_query) are not part of it.

    Raises:
      ValueError: the family's config.json has no field for something that the config says.
    """
    return write_config(config, dtype)


# --- reading


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


def _read_block_size(folder: str) -> Block:
    with open(find_file(folder, CONFIG), encoding="utf-8") as f:
        data = json.load(f)
    # A composite model has it beside its parts or in the text model.
    inner = data.get("text_config") or {}
    return read_block_size(data.get("quantization_config", inner.get("quantization_config")))


class OpenCheckpoint(NamedTuple):
    """A model folder whose headers are checked; its weights are not read yet.

    Attributes:
      config: the model's shapes.
      dtype: of the matrices.
      tensors: the published tensors that the model needs, one for each matrix of an expert.
      forms: how the files hold each of them, by its published name.
    """

    config: Config
    dtype: np.dtype
    tensors: list[Tensor]
    forms: dict[str, Form]

    @property
    def specs(self) -> Params:
        """The shapes and types of the parameters."""
        return family_of(self.config).param_specs(self.config, self.dtype)

    def read(self, tensor: Tensor, rows: slice | None = None) -> np.ndarray:
        """A tensor as a view of its file, or dequantised; only `rows` of a quantised one are filled (see `Form`).

        Raises:
          ValueError: a table that names an expert that does not exist.
        """
        form = self.forms[tensor.name]
        value = form.read(self.dtype, rows)
        if tensor.is_table:
            _check_table(form.values.label, value, self.config)
        return value


def open_checkpoint(folder: str | os.PathLike[str], dtype: Any, *, progress: bool) -> OpenCheckpoint:
    """Reads config.json and the headers of the weights; arguments and errors as of `load_checkpoint`."""
    folder, dtype = os.fspath(folder), _check.dtype("dtype", dtype, DTYPES)
    config, block, stored = read_unchanged(
        folder, lambda: (load_config(folder), _read_block_size(folder), open_folder(folder))
    )
    tensors = list_tensors(config, dtype, single_experts=True)
    forms = check_forms(stored, tensors, config, block, folder)
    if progress and (counts := count_skipped(stored, config)):
        _report_skipped(counts)
    return OpenCheckpoint(config, dtype, tensors, forms)


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
    return jax.tree_util.tree_map_with_path(lambda path, spec: arrays[keys_of(path)], specs)


def skipped_tensors(folder: str | os.PathLike[str]) -> dict[str, int]:
    """How many tensors of a folder the model does not use, by what they are; `load_checkpoint` skips them.

    The words follow "12 tensors of": "multi-token prediction", "the vision tower", "rotary buffers", and others.

    Raises:
      ValueError: no such folder or file, or a truncated or corrupt file.
      OSError: a file that can not be opened.
    """
    folder = os.fspath(folder)
    return count_skipped(*read_unchanged(folder, lambda: (open_folder(folder), load_config(folder))))


def _report_skipped(counts: dict[str, int]) -> None:
    """One line on stderr, above any progress bar."""
    (kind, number), *others = counts.items()
    first = f"skipped: {number} {'tensor' if number == 1 else 'tensors'} of {kind}"
    tqdm.write(", ".join([first, *(f"{number} of {kind}" for kind, number in others)]), file=sys.stderr)


def load_checkpoint(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, progress: bool = True
) -> tuple[Config, Params]:
    """Reads config.json and the weights of a model folder of one of the families in `sparse_mla_jax.families`.

    The weights are one model.safetensors, or several files with model.safetensors.index.json. FP8 matrices (e4m3fn or
    e4m3fnuz) are multiplied by their scales (`weight_scale_inv`, `weight_scale`, or V4's `scale`), one for each block
    (128x128, or the size in quantization_config), for each row, or for the matrix. V4's FP4 experts have one for each
    32 values; see `families.deepseek_v4`. The experts of a layer may be fused, also FP8 with `gate_up_proj_scale_inv`
    or `gate_up_proj_scale`, and names may be those of transformers. Skipped are multi-token-prediction layers, towers
    of other inputs, rotary buffers, indexers of layers that use another's selection, and the scales with which other
    engines round activations and caches (`input_scale`, `k_scale`, `v_scale`); see `skipped_tensors`.

    While another process saves into the folder, the old or the new checkpoint is read, never parts of both.

    Args:
      folder: a Hugging Face model folder.
      dtype: float32 or bfloat16, of the matrices; norms, biases and other small weights are always float32 (see
        `param_specs` of the family).
      progress: show a progress bar on stderr, if that is a terminal, and in one line there what was skipped, if
        anything.

    Returns:
      (config, params), arrays on the default device.

    Raises:
      ValueError: no such folder or file, a truncated or corrupt file, or a tensor that is missing, surplus, or of
        another shape or type than config.json requires; the message names it.
      OSError: a file that can not be opened.
    """
    opened = open_checkpoint(folder, dtype, progress=progress)
    disable = not progress or not sys.stderr.isatty()
    with tqdm(total=len(opened.tensors), desc="weights", unit="tensor", disable=disable) as bar:

        def read(tensor: Tensor) -> np.ndarray:
            bar.update()
            return opened.read(tensor)

        return opened.config, _build_params(opened.specs, opened.tensors, read)


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


class _Plan(NamedTuple):
    """The files of a checkpoint to be written: names of weight files with their tensors, and texts of the others."""

    weights: dict[str, list[str]]
    texts: dict[str, str]
    num_bytes: int


def _plan_files(
    config: Config, tensors: list[Tensor], dtype: Any, max_shard_bytes: int, extra: dict[str, Any] | None
) -> _Plan:
    sizes = {tensor.name: math.prod(tensor.shape) * tensor.stored_dtype.itemsize for tensor in tensors}
    shards = _plan_shards(sizes, max_shard_bytes)
    single = len(shards) == 1
    files = [SINGLE if single else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    texts = {CONFIG: _to_json({**config_to_json(config, dtype), **(extra or {})})}
    if not single:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        texts[INDEX] = _to_json({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    # Beside its bytes, a tensor has about 100 characters in the header of its file.
    num_bytes = sum(sizes.values()) + 100 * len(sizes) + sum(len(text) for text in texts.values())
    return _Plan(dict(zip(files, shards)), texts, num_bytes)


def _to_json(data: dict[str, Any]) -> str:
    try:
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"extra can not be written to config.json ({error}); expected are numbers, texts, lists and dicts."
        ) from None


def _write_files(staging: str, plan: _Plan, written: Iterator[tuple[str, np.ndarray]], progress: bool) -> None:
    disable = not progress or not sys.stderr.isatty()
    for file, names in tqdm(plan.weights.items(), desc="writing", unit="file", disable=disable):
        # No variable keeps the arrays of a file while those of the next one are made.
        save_file(dict(itertools.islice(written, len(names))), os.path.join(staging, file), metadata={"format": "pt"})
    for file, text in plan.texts.items():
        with open(os.path.join(staging, file), "w", encoding="utf-8") as f:
            f.write(text)


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

    Weights that are always float32 (norms, biases, ...) are written as float32.

    config.json and the old weights of the folder are replaced in one step; other files stay. The new files lie beside
    the old ones until then, so both need room. If the process is killed or fails, `load_checkpoint` finds the old
    checkpoint or the new one, whole; see `models.folder_replacement`. Several processes may save into one folder: the
    last one to finish wins.

    Args:
      folder: made if it does not exist.
      config: the model's shapes.
      params: the parameters' pytree.
      dtype: float32 or bfloat16, of the matrices; None means the type of embed_tokens.
      max_shard_bytes: most bytes of a file, unless a single tensor is larger.
      extra: further fields of config.json, such as {"eos_token_id": 0}.
      progress: show a progress bar on stderr, if that is a terminal.

    Raises:
      ValueError: params that do not fit config, another dtype, max_shard_bytes below 1, extra fields that JSON can not
        express.
      OSError: the files could not be written: no room, no permission. The folder is as it was. The message says how
        many bytes are needed.
    """
    _check_params(params, config)
    require(max_shard_bytes >= 1, f"max_shard_bytes is {max_shard_bytes}; a positive number of bytes is expected.")
    dtype = params["embed_tokens"].dtype if dtype is None else dtype
    folder, dtype = os.fspath(folder), _check.dtype("dtype", dtype, DTYPES)
    tensors = list_tensors(config, dtype)
    plan = _plan_files(config, tensors, dtype, max_shard_bytes, extra)
    with replace_checkpoint(folder, plan.num_bytes) as staging:
        _write_files(staging, plan, _publish(params, tensors), progress)
