"""The files of a checkpoint in its folder, and their places while a save is not complete.

`save_checkpoint` writes a new checkpoint into a folder inside the model's folder. One rename, to
FOLDER/.saved-checkpoint, commits it. From then on a file in there takes precedence over the one of the same name in
FOLDER, until it has been moved to FOLDER. See `models.folder_replacement`.
"""

from __future__ import annotations

import os
import re

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SAVED = ".saved-checkpoint"


def find_file(folder: str | os.PathLike[str], name: str) -> str:
    """The path of a file of the folder's checkpoint. The file need not exist."""
    saved = os.path.join(folder, SAVED, name)
    return saved if os.path.exists(saved) else os.path.join(folder, name)


def find_weights(folder: str | os.PathLike[str]) -> str | None:
    """The path of model.safetensors or, without it, of the index of several files; None if there is neither."""
    for place in (os.path.join(folder, SAVED), folder):
        for name in (SINGLE, INDEX):
            path = os.path.join(place, name)
            if os.path.isfile(path):
                return path
    return None
