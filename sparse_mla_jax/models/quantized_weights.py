"""Dequantises published matrices: FP8 with scales of blocks, rows or the whole matrix, FP4 with scales of 32 values.

Values are multiplied by their scales, whatever the scales are called: `weight_scale_inv` (DeepSeek), `weight_scale`
(compressed-tensors, Quark, ModelOpt), `scale` (DeepSeek-V4).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.families.quantization import read_block

FP4_GROUP = 32
# numpy types by their safetensors names. F8_E4M3FNUZ is the type of AMD's gfx942.
FP8_TYPES: dict[str, Any] = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz}

Block = tuple[int, int]


def read_block_size(quantization: Any) -> Block:
    """Rows and columns that share a scale, from quantization_config; 128x128 where it does not say.

    DeepSeek writes `weight_block_size`, compressed-tensors `block_structure` in each of its `config_groups`, as a list
    or as "128x128".

    Raises:
      ValueError: something else than two positive integers, or groups that differ.
    """
    quantization = {} if quantization is None else quantization
    require(
        isinstance(quantization, dict),
        f"config field quantization_config is {quantization!r}; a JSON object is expected. Mend config.json.",
    )
    found = {"weight_block_size": quantization.get("weight_block_size")}
    groups = quantization.get("config_groups")
    for name, group in (groups if isinstance(groups, dict) else {}).items():
        weights = group.get("weights") if isinstance(group, dict) else None
        found[f"block_structure of {name}"] = weights.get("block_structure") if isinstance(weights, dict) else None
    sizes = {name: block for name, value in found.items() if (block := read_block(name, value)) is not None}
    require(
        len(set(sizes.values())) <= 1,
        f"config fields {' and '.join(sizes)} differ: {list(map(list, sizes.values()))}; one size of block is expected"
        " for all matrices. Dequantise the folder with the program that wrote it.",
    )
    return next(iter(sizes.values()), (128, 128))


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a matrix; blocks at the edges may be cut."""
    return tuple(-(-size // step) for size, step in zip(shape, block))


def scale_block(shape: tuple[int, ...], scales: tuple[int, ...], block: Block) -> Block | None:
    """Rows and columns that share a scale, told by the shape of the scales; None if they do not fit the matrix.

    Args:
      shape: [out, in], of the matrix.
      scales: scale_shape(shape, block) for blocks, [out, 1] or [out] for one scale per row, [], [1] or [1, 1] for one
        scale of the whole matrix. Where two of them are the same shape, they mean the same.
      block: the size of blocks.
    """
    rows, columns = shape
    if scales == scale_shape(shape, block):
        return block
    if scales in ((rows, 1), (rows,)):
        return 1, columns
    return (rows, columns) if scales in ((), (1,), (1, 1)) else None


def dequantize_blocks(
    values: np.ndarray, scales: np.ndarray, block: Block = (128, 128), rows: slice | None = None
) -> np.ndarray:
    """values[out, in] times the scale of its block, float32; blocks at the edges may be cut.

    Args:
      values: [out, in], FP8.
      scales: [ceil(out / block[0]), ceil(in / block[1])], the checkpoint's weight_scale_inv; of all rows if `rows` is
        given.
      block: rows and columns that share a scale.
      rows: which rows of a larger matrix the values are; None: all.

    Returns:
      float32[out, in].

    Raises:
      ValueError: scales of another shape.
    """
    if rows is None:
        expected = scale_shape(values.shape, block)
        require(scales.shape == expected, f"scales has shape {scales.shape}; {values.shape} values need {expected}.")
    first = rows.start if rows is not None else 0
    down, across = (first + np.arange(values.shape[0])) // block[0], np.arange(values.shape[1]) // block[1]
    return _widen(values) * scales.astype(np.float32)[down][:, across]


def _widen(values: np.ndarray) -> np.ndarray:
    """The values in float32."""
    if values.dtype.itemsize > 1:
        return values.astype(np.float32)
    # A table of all bytes takes a quarter of the time of a cast from FP8.
    table = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32)
    return table[values.view(np.uint8)]


def dequantize_fp4(packed: np.ndarray, scales: np.ndarray, rows: slice | None = None) -> np.ndarray:
    """FP4 values, two per byte, times the scale of each 32 values of a row, float32 (exact up to over- and underflow).

    Args:
      packed: int8 or uint8 [out, in / 2]: e2m1 codes, the even column in the low four bits.
      scales: [out, ceil(in / 32)], E8M0 or any floating type; the last group of a row may be cut.
      rows: which rows of a larger matrix the values are; None: all.

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
    return dequantize_blocks(values, scales, (1, FP4_GROUP), rows)
