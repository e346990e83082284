"""Folders of safetensors files: finds the file of each tensor, and reads its bytes as an array of any type."""

from __future__ import annotations

import contextlib
import json
import os
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sparse_mla_jax._check import require
from sparse_mla_jax._folder import CONFIG, INDEX, SAVED, SHARD, SINGLE, find_file, find_weights

# A save moves its files within milliseconds; a reader that meets it begins again.
_ATTEMPTS = 40
_PAUSE = 0.05
# What safetensors itself reads at most.
_LONGEST_HEADER = 100_000_000
# Weights of formats that are not read, by the ends of their files' names.
_OTHER_FORMATS = {
    ".bin": "PyTorch's pickle format",
    ".pt": "PyTorch's pickle format",
    ".pth": "PyTorch's pickle format",
    ".gguf": "GGUF, the format of llama.cpp",
    ".msgpack": "Flax' format",
    ".h5": "Keras' format",
}


class WeightFile:
    """One open safetensors file; tensors are views of its bytes, in any type of numpy or ml_dtypes.

    The file stays the same one if another takes its name while it is read.

    Raises:
      ValueError: the file is truncated or has another format.
      OSError: the file can not be opened.
    """

    def __init__(self, path: str):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        try:
            with safe_open(path, framework="numpy"):  # validates header, offsets and total size
                pass
            with open(self._descriptor, "rb", closefd=False) as f:
                f.seek(0)
                size = int.from_bytes(f.read(8), "little")
                self.header: dict[str, Any] = json.loads(f.read(size), object_pairs_hook=_without_repetition)
        except (SafetensorError, ValueError) as error:
            raise ValueError(self._explain(str(error))) from None
        self.header_size = 8 + size
        self.header.pop("__metadata__", None)

    def _explain(self, reason: str) -> str:
        with open(self._descriptor, "rb", closefd=False) as f:
            f.seek(0)
            start, size = f.read(64), os.fstat(self._descriptor).st_size
        if start.startswith(b"version https://git-lfs"):
            return (
                f"{self.path} is a pointer of Git LFS in place of the weights; run `git lfs pull` in its folder, or"
                " fetch the file with `hf download`."
            )
        if "unknown variant" in reason:
            return (
                f"{self.path} holds a type of tensor that the installed safetensors does not know ({reason[:120]});"
                " install its newest release. If that does not know it either, fetch the file again."
            )
        promised = self._promised_size(size)
        if promised not in (None, size):
            reason = f"{size} bytes, of which its header promises {promised}"
        return f"{self.path} is truncated or not a safetensors file ({reason}); fetch the file again."

    def _promised_size(self, size: int) -> int | None:
        """The bytes that a file of `size` bytes should have by its header; None for a header that can not be read."""
        with open(self._descriptor, "rb", closefd=False) as f:
            f.seek(0)
            length = int.from_bytes(f.read(8), "little")
            try:
                header = json.loads(f.read(min(length, size, _LONGEST_HEADER)))
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                return 8 + length + max(ends)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
                return None

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
        with open(self._descriptor, "rb", closefd=False) as f:
            data = np.memmap(f, np.uint8, "r", offset=self.header_size + start, shape=(end - start,))
        return data.view(dtype).reshape(shape)


class StoredTensor(NamedTuple):
    """A tensor of a file, or a part of one.

    Attributes:
      file: the file.
      name: the name there.
      slices: the part, by numbers and slices with start and stop, for the first axes.
    """

    file: WeightFile
    name: str
    slices: tuple[int | slice, ...] = ()

    @property
    def label(self) -> str:
        """The name in messages, with the part: "experts.gate_up_proj[3, 0:20]"."""
        parts = [f"{i.start}:{i.stop}" if isinstance(i, slice) else str(i) for i in self.slices]
        return f"{self.name}[{', '.join(parts)}]" if parts else self.name

    @property
    def dtype(self) -> str:
        """Type by its safetensors name."""
        return self.file.dtype(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        whole = self.file.shape(self.name)
        kept = [i.stop - i.start for i in self.slices if isinstance(i, slice)]
        return (*kept, *whole[len(self.slices) :])

    def read(self, types: dict[str, Any]) -> np.ndarray:
        """The part as a view of the file; see `WeightFile.read`."""
        return self.file.read(self.name, types)[self.slices]


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Two entries of one name are an error, since readers would choose different ones."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _read_index(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as f:
            weight_map = json.load(f, object_pairs_hook=_without_repetition)["weight_map"]
        if not all(isinstance(file, str) and os.path.basename(file) == file for file in weight_map.values()):
            raise ValueError("weight_map names something that is not a file of the folder")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not an index of safetensors files ({reason}); fetch it again.") from None
    return weight_map


def open_folder(folder: str) -> dict[str, StoredTensor]:
    """The tensors of the folder's checkpoint by their names in the files.

    Raises:
      ValueError: no weights in the folder, an index that names a missing file or tensor, or a damaged file.
      OSError: a file can not be opened.
    """
    path = find_weights(folder)
    if path is None:
        raise ValueError(_explain_no_weights(folder))
    if os.path.basename(path) == SINGLE:
        file = WeightFile(path)
        return {name: StoredTensor(file, name) for name in file.header}
    weight_map = _read_index(path)
    paths = {name: find_file(folder, name) for name in sorted(set(weight_map.values()))}
    missing = [name for name in paths if not os.path.isfile(paths[name])]
    require(not missing, f"{path} names {name_some(missing)}, which is missing; fetch what is missing.")
    files = {name: WeightFile(paths[name]) for name in paths}
    for tensor, name in weight_map.items():
        require(
            tensor in files[name].header, f"{path} says that {name} holds {tensor}, but it does not; fetch both again."
        )
    return {tensor: StoredTensor(files[name], tensor) for tensor, name in weight_map.items()}


def _explain_no_weights(folder: str) -> str:
    """What to do with a folder that has neither weights nor an index."""
    for name in (SINGLE, INDEX):
        path = os.path.join(folder, name)
        if os.path.lexists(path):
            return f"{path} is no file, but a folder or a link to a file that is missing; fetch it again."
    names = sorted(os.listdir(folder))
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards:
        return f"{folder!r} has {name_some(shards)}, but no {INDEX}, which says what they hold; fetch it."
    text = f"{folder!r} has neither {SINGLE} nor {INDEX}"
    for name in names:
        kind = _OTHER_FORMATS.get(os.path.splitext(name)[1])
        if kind is not None:
            return f"{text}; {name} is {kind}, which is not read. Fetch or convert to safetensors."
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"{text}; it has {name_some(others)}. Give a folder with the names that Hugging Face publishes."
    return f"{text}; give a folder with safetensors weights."


def name_some(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- a folder that is being replaced


def _identify(folder: str) -> list[Any]:
    """What changes whenever a save changes the names of the folder's checkpoint."""
    saved = os.path.join(folder, SAVED)
    found: list[Any] = []
    with contextlib.suppress(FileNotFoundError):
        found.append(sorted(os.listdir(saved)))
    for name in (CONFIG, SINGLE, INDEX, os.path.join(SAVED, SINGLE), os.path.join(SAVED, INDEX)):
        try:
            status = os.stat(os.path.join(folder, name))
        except FileNotFoundError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return found


def read_unchanged[T](folder: str, read: Callable[[], T]) -> T:
    """What `read` returns for a checkpoint that no save replaced meanwhile; it is called again until that is so.

    Raises:
      ValueError, OSError: what `read` raises, or a folder that is replaced all the time.
    """
    for _ in range(_ATTEMPTS):
        before = _identify(folder)
        try:
            result = read()
        except (ValueError, OSError):
            if before == _identify(folder):
                raise
        else:
            if before == _identify(folder):
                return result
        time.sleep(_PAUSE)
    raise OSError(f"{folder!r} is being replaced again and again; wait until the program that saves there has ended.")
