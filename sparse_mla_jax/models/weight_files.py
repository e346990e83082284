"""Folders of safetensors files: finds the file of each tensor, and reads its bytes as an array of any type."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_mla_jax._check import require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class WeightFile:
    """One safetensors file, memory-mapped; tensors are views of its bytes, in any type of numpy or ml_dtypes.

    Raises:
      ValueError: the file is truncated or has another format.
    """

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
        """Shape of a tensor, from the header."""
        return tuple(self.header[name]["shape"])

    def dtype(self, name: str) -> str:
        """Type of a tensor, by its safetensors name: "F32", "BF16", "F8_E4M3", ..."""
        return self.header[name]["dtype"]

    def read(self, name: str, types: dict[str, Any]) -> np.ndarray:
        """Reads a tensor in the numpy type that `types` gives for its safetensors type; F4 as bytes [..., N / 2]."""
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


def open_folder(folder: str) -> dict[str, WeightFile]:
    """The file of each tensor of the folder.

    Raises:
      ValueError: no weights in the folder, an index that names a missing file or tensor, or a damaged file.
    """
    single, index = os.path.join(folder, SINGLE), os.path.join(folder, INDEX)
    if os.path.isfile(single):
        file = WeightFile(single)
        return dict.fromkeys(file.header, file)
    require(
        os.path.isfile(index),
        f"{folder!r} has neither {SINGLE} nor {INDEX}; give a folder with safetensors weights.",
    )
    weight_map = _read_index(index)
    for name in sorted(set(weight_map.values())):
        require(os.path.isfile(os.path.join(folder, name)), f"{index} names {name}, which is missing; fetch that file.")
    files = {name: WeightFile(os.path.join(folder, name)) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        require(
            tensor in files[name].header, f"{index} says that {name} holds {tensor}, but it does not; fetch both again."
        )
    return {tensor: files[name] for tensor, name in weight_map.items()}
