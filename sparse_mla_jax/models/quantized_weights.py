"""Dequantises published matrices: FP8 with one scale per block, FP4 with one scale per 32 values."""

from __future__ import annotations

import numpy as np

from sparse_mla_jax._check import require

FP4_GROUP = 32


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a matrix; blocks at the edges may be cut."""
    return tuple(-(-size // step) for size, step in zip(shape, block))


def dequantize_blocks(values: np.ndarray, scales: np.ndarray, block: tuple[int, int] = (128, 128)) -> np.ndarray:
    """values[out, in] times the scale of its block, float32; blocks at the edges may be cut.

    Args:
      values: [out, in], FP8.
      scales: [ceil(out / block[0]), ceil(in / block[1])], the checkpoint's weight_scale_inv.
      block: rows and columns that share a scale.

    Returns:
      float32[out, in].

    Raises:
      ValueError: scales of another shape.
    """
    expected = scale_shape(values.shape, block)
    require(scales.shape == expected, f"scales has shape {scales.shape}; {values.shape} values need {expected}.")
    rows, columns = np.arange(values.shape[0]) // block[0], np.arange(values.shape[1]) // block[1]
    return values.astype(np.float32) * scales.astype(np.float32)[rows][:, columns]


def dequantize_fp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """FP4 values, two per byte, times the scale of each 32 values of a row, float32 (exact up to over- and underflow).

    Args:
      packed: int8 or uint8 [out, in / 2]: e2m1 codes, the even column in the low four bits.
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
    return dequantize_blocks(values, scales, (1, FP4_GROUP))
