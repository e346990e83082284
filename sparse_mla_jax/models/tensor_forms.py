"""The form in which a folder's files hold each tensor: plain, FP8 or FP4. All are checked by the files' headers."""

from __future__ import annotations

import collections
import re
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.families.foreign_names import explain_missing, explain_surplus
from sparse_mla_jax.families.registry import published_family
from sparse_mla_jax.models.quantized_weights import (
    FP4_GROUP,
    FP8_TYPES,
    Block,
    dequantize_blocks,
    dequantize_fp4,
    scale_block,
    scale_shape,
)
from sparse_mla_jax.models.tensor_table import Tensor
from sparse_mla_jax.models.weight_files import StoredTensor, name_some

# numpy types by their safetensors names, for each kind of tensor: values, scales, integer tables, FP4.
_FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    **FP8_TYPES,
}
_SCALES: dict[str, Any] = {**_FLOATS, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "U8": ml_dtypes.float8_e8m0fnu}
_TABLES: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "U32": np.uint32}
_FP4: dict[str, Any] = {"I8": np.uint8, "U8": np.uint8, "F4": np.uint8}
# Types of other quantised formats.
_PACKED = ("I8", "U8", "I16", "I32", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E5M2FNUZ")

# Values of a matrix that are dequantised at a time: 16 MB of float32, and some times that while it is done.
_CHUNK = 2**22


class Form(NamedTuple):
    """How the files hold a tensor.

    Attributes:
      values: the tensor, or its quantised values.
      types: numpy types by safetensors names.
      scale: the scales of quantised values.
      block: rows and columns that share a scale.
    """

    values: StoredTensor
    types: dict[str, Any]
    scale: StoredTensor | None = None
    block: Block = (1, 1)

    def read(self, dtype: Any, rows: slice | None = None) -> np.ndarray:
        """The tensor as a view of its file, or dequantised to `dtype`, some rows at a time.

        Args:
          dtype: of a matrix that is quantised.
          rows: the rows that are needed, None: all. Others of a quantised matrix have any value; they take no memory.
        """
        values = self.values.read(self.types)
        if self.scale is None:
            return values
        start, stop = (0, values.shape[0]) if rows is None else (rows.start, rows.stop)
        step = max(1, _CHUNK // max(1, values.shape[1]))
        done = np.empty(self.shape, dtype)
        for first in range(start, stop, step):
            some = slice(first, min(first + step, stop))
            done[some] = self._dequantize(values[some], some)
        return done

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor; a byte of FP4 has two values."""
        shape = self.values.shape
        return (*shape[:-1], 2 * shape[-1]) if self.types is _FP4 and self.values.dtype != "F4" else shape

    def _dequantize(self, values: np.ndarray, rows: slice) -> np.ndarray:
        """float32 of the given rows of the values."""
        # The scales are those of an expert's fused matrix, of which the values may be some rows.
        part = next((part for part in self.values.slices if isinstance(part, slice)), slice(0, 0))
        rows = slice(part.start + rows.start, part.start + rows.stop)
        assert self.scale is not None
        scales = self.scale.read(_SCALES)
        if self.types is _FP4:
            return dequantize_fp4(values, scales, rows)
        whole = _whole_shape(self.values)
        return dequantize_blocks(values, scales.reshape(scale_shape(whole, self.block)), self.block, rows)


def _whole_shape(values: StoredTensor) -> tuple[int, ...]:
    """Shape of the matrix that the scales belong to: of all rows of one expert where experts are fused."""
    whole = values.file.shape(values.name)
    return whole[1:] if values.slices else whole


def check_forms(
    stored: dict[str, StoredTensor], tensors: list[Tensor], config: Config, block: Block, folder: str
) -> dict[str, Form]:
    """The form of every tensor by its published name. Checks all headers before any tensor is read.

    Args:
      stored: the tensors of the files by their names there.
      tensors: the tensors that the model needs.
      config: the model's config.
      block: rows and columns that share a scale in matrices with scales of blocks.
      folder: for messages.

    Raises:
      ValueError: a tensor is missing, surplus, or of another shape or type.
    """
    published = _by_published_name(stored, config, folder)
    _check_names(published, tensors, config, folder)
    forms = {tensor.name: _find_form(tensor, published, config, block, folder) for tensor in tensors}
    scales = {form.scale.name for form in forms.values() if form.scale is not None}
    ignored = published_family(config).describe_ignored
    for name, one in published.items():
        if name not in forms and one.name not in scales and ignored(name, config) is None:
            raise ValueError(
                f"{folder!r} holds tensor {one.label}, which has no use beside {_owner(name, forms, config)}. Fetch"
                " both again, or drop the one that does not belong to the other."
            )
    for form in forms.values():
        _check_type(form.values, form.types)
        if form.scale is not None:
            _check_type(form.scale, _SCALES)
    return forms


def count_skipped(stored: dict[str, StoredTensor], config: Config) -> dict[str, int]:
    """How many tensors of the files the model does not use, by what they are."""
    family = published_family(config)
    found: collections.Counter[str] = collections.Counter()
    for name, one in stored.items():
        kind = family.describe_ignored(family.parts(name, one.shape, config)[0].name, config)
        if kind is not None:
            found[kind] += 1
    return dict(found)


def _by_published_name(stored: dict[str, StoredTensor], config: Config, folder: str) -> dict[str, StoredTensor]:
    published: dict[str, StoredTensor] = {}
    for name, one in stored.items():
        for part in published_family(config).parts(name, one.shape, config):
            require(
                part.name not in published,
                f"{folder!r} holds tensors {published.get(part.name, one).label} and {one.label}, which are both"
                f" {part.name}. Fetch the folder again, or drop the one that is not the model's.",
            )
            published[part.name] = StoredTensor(one.file, one.name, part.slices)
    return published


# --- names


def _check_names(published: dict[str, StoredTensor], tensors: list[Tensor], config: Config, folder: str) -> None:
    """Raises ValueError unless every tensor is there, and nothing beside but scales and what the model ignores."""
    family = published_family(config)
    expected = {tensor.name for tensor in tensors}
    missing = [tensor.name for tensor in tensors if tensor.name not in published]
    if family.fused_experts and not any(_EXPERT.search(one.name) for one in published.values()):
        missing = list(dict.fromkeys(_EXPERT.sub(_name_fused, name) for name in missing))
    known = expected | {scale for name in expected for scale in family.scale_names(name)}
    surplus = sorted(
        {
            one.label
            for name, one in published.items()
            if name not in known and family.describe_ignored(name, config) is None
        }
    )
    reason = explain_surplus(surplus, family.model_types)
    require(reason is None, f"{folder!r} holds tensor {reason}")
    if missing:
        reason = explain_missing(missing, [one.name for one in published.values()])
        reason = reason or "Fetch all files, and the config.json that belongs to them."
        # Few names where both lists are long: the first of each tell what is wrong.
        most = 2 if surplus else 5
        instead = f", and holds {name_some(surplus, most)}" if surplus else ""
        raise ValueError(
            f"{folder!r} lacks tensor {name_some(missing, most)}{instead}; config.json promises it. {reason}"
        )
    require(
        not surplus,
        f"{folder!r} holds tensor {name_some(surplus)}, for which config.json has no place; use the config.json that"
        " belongs to these weights.",
    )


_EXPERT = re.compile(r"(\bexperts\.)\d+\.(gate|up|down)_proj\.weight$")


def _name_fused(expert: re.Match[str]) -> str:
    """The published name of the fused experts that a matrix of one expert belongs to."""
    return f"{expert.group(1)}{'down_proj' if expert.group(2) == 'down' else 'gate_up_proj'}"


def _owner(scale: str, forms: dict[str, Form], config: Config) -> str:
    """The tensor, with its type and scales, that a surplus scale would belong to."""
    names = published_family(config).scale_names
    form = next(form for name, form in forms.items() if scale in names(name))
    beside = "without scales" if form.scale is None else f"with scales {form.scale.label}"
    return f"{form.values.label} ({form.values.dtype}, {beside})"


# --- forms


def _find_form(tensor: Tensor, published: dict[str, StoredTensor], config: Config, block: Block, folder: str) -> Form:
    """The form of a tensor, told by its safetensors type. Checks the shapes of its values and scales."""
    family, shape, values = published_family(config), tensor.shape, published[tensor.name]
    is_fp4 = values.dtype in _FP4 and family.fp4_experts and tensor.expert is not None
    is_fp8 = values.dtype in FP8_TYPES and len(shape) == 2
    if not (is_fp4 or is_fp8):
        # A wrong type is the reason of a wrong shape where several values are packed into one.
        types = _TABLES if tensor.is_table else _FLOATS
        _check_type(values, types)
        _check_shape(values, shape)
        return Form(values, types)
    kind, names = "FP4" if is_fp4 else "FP8", family.scale_names(tensor.name)
    scale = next((published[name] for name in names if name in published), None)
    if scale is None:
        if values.slices:
            names = tuple(values.name + end for end in ("_scale_inv", "_scale"))
        raise ValueError(f"{kind} tensor {values.label} has no {' or '.join(names)} in {folder!r}; fetch all files.")
    whole = _whole_shape(values)
    if is_fp4:
        require(shape[1] % 2 == 0, f"tensor {values.label} is FP4, two values to a byte, with {shape[1]} to a row.")
        _check_shape(values, shape if values.dtype == "F4" else (shape[0], shape[1] // 2))
        _check_shape(scale, scale_shape((whole[0], shape[1]), (1, FP4_GROUP)))
        return Form(values, _FP4, scale)
    _check_shape(values, shape)
    found = scale_block((whole[0], whole[1]), scale.shape, block)
    if found is None:
        raise ValueError(
            f"tensor {scale.label} has shape {list(scale.shape)}; the scales of a matrix {list(whole)} are"
            f" {list(scale_shape(whole, block))} for blocks of {block[0]}x{block[1]}, [{whole[0]}, 1] for rows, or"
            " [] for all. Use the config.json that belongs to these weights (weight_block_size)."
        )
    return Form(values, _FLOATS, scale, found)


def _check_shape(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    require(
        stored.shape == shape,
        f"tensor {stored.label} has shape {list(stored.shape)}; config.json makes it {list(shape)}. Use the config.json"
        " that belongs to these weights.",
    )


def _check_type(stored: StoredTensor, types: dict[str, Any]) -> None:
    remedy = (
        "It is quantised in a way that is not read: use the model's BF16 or FP8 files, or dequantise the folder with"
        " the program that wrote it."
        if stored.dtype in _PACKED and types is _FLOATS
        else "Fetch the file again, or convert the tensor to one of them."
    )
    require(
        stored.dtype in types,
        f"tensor {stored.label} in {stored.file.path} has type {stored.dtype}; supported are {', '.join(types)}."
        f" {remedy}",
    )
