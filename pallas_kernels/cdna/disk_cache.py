"""Caches compiled code on disk, under a hash of all inputs of its compilation."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import pickle
import tempfile
from typing import Any

from pallas_kernels.cdna import toolchain

# Increase this number whenever the meaning of stored values changes.
FORMAT = 1


def key_of(**ingredients: Any) -> str:
    """Hash of IR, options and versions; the ingredients must be serializable as JSON."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **ingredients}, sort_keys=True).encode()).hexdigest()


def _path(key: str, folder: pathlib.Path | None) -> pathlib.Path:
    return (folder or toolchain.default_cache()) / "code" / f"{key}.pickle"


def read(key: str, folder: pathlib.Path | None = None) -> Any:
    """The value stored under `key`; None if nothing is stored or the file is damaged."""
    path = _path(key, folder)
    try:
        stored, value = pickle.loads(path.read_bytes())
    except Exception:
        # The file is absent, truncated or from another version: the caller compiles again.
        return None
    return value if stored == key else None


def write(key: str, value: Any, folder: pathlib.Path | None = None) -> None:
    """Stores `value`; does nothing if the folder is not writable."""
    path = _path(key, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            pickle.dump((key, value), file)
        # Rename atomically: a reader never sees a partial file, even with several writers.
        os.replace(temporary, path)
    except OSError:
        return
