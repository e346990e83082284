"""Compiled code kept on disk, by a hash of everything that it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import pickle
import tempfile
from typing import Any

from pallas_kernels.cdna import toolchain

# Raised whenever what is stored changes its meaning.
FORMAT = 1


def key_of(**ingredients: Any) -> str:
    """Hash of IR, options and versions; the ingredients must be JSON."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **ingredients}, sort_keys=True).encode()).hexdigest()


def _path(key: str, folder: pathlib.Path | None) -> pathlib.Path:
    return (folder or toolchain.default_cache()) / "code" / f"{key}.pickle"


def read(key: str, folder: pathlib.Path | None = None) -> Any:
    """What was stored under `key`; None when nothing was, or when the file is damaged."""
    path = _path(key, folder)
    try:
        stored, value = pickle.loads(path.read_bytes())
    except Exception:
        # Absent, cut short, or of another version: it will be made again.
        return None
    return value if stored == key else None


def write(key: str, value: Any, folder: pathlib.Path | None = None) -> None:
    """Stores `value`; a folder that can not be written to only means that nothing is kept."""
    path = _path(key, folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            pickle.dump((key, value), file)
        # Whole or not at all, whoever else writes.
        os.replace(temporary, path)
    except OSError:
        return
