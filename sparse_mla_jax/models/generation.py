"""What a model folder says about generating text: the ids that end a sequence."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._folder import find_file
from sparse_mla_jax.config import read_json


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a folder says about generating text.

    Attributes:
      eos_token_ids: ids that end a sequence, without repetitions; empty if the folder names none.
    """

    eos_token_ids: tuple[int, ...] = ()


def load_generation_defaults(folder: str | os.PathLike[str]) -> GenerationDefaults:
    """Reads `eos_token_id`, a number or a list, from generation_config.json and config.json of a folder.

    As in Hugging Face transformers, generation_config.json takes precedence. config.json is asked if the other file
    does not exist, or has no such field, or null. Sampling options of generation_config.json are not read.

    Raises:
      ValueError: a file that is not a JSON object, or an `eos_token_id` that is not made of numbers of at least 0.
    """
    for name in ("generation_config.json", "config.json"):
        path = find_file(folder, name)
        value = _read_object(path).get("eos_token_id") if os.path.isfile(path) else None
        if value is not None:
            return GenerationDefaults(_token_ids(path, value))
    return GenerationDefaults()


def _read_object(path: str) -> dict[str, Any]:
    data = read_json(path)
    require(isinstance(data, dict), f"{path} holds a {type(data).__name__}; a JSON object is expected.")
    return data


def _token_ids(path: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [value]
    require(
        all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids),
        f"eos_token_id in {path} is {shown(value)}; a token id or a list of token ids is expected. Mend the file.",
    )
    return tuple(dict.fromkeys(ids))
