"""The config of a model: its dataclasses, presets, and reading one from a Hugging Face folder.

`from_hf` reads every family that `sparse_mla_jax.families` lists (config.json's model_type says which) and gives a
`Config`. The dataclasses themselves are in `sparse_mla_jax.shapes`, below the families that fill them.
"""

from __future__ import annotations

import json
import os
from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax.families.registry import read_config
from sparse_mla_jax.shapes import (
    DEEPSEEK_V4_FLASH,
    DEEPSEEK_V4_PRO,
    DEEPSEEK_V32,
    Config,
    DeepseekV4Config,
    DeepseekV32Config,
    RopeConfig,
)

__all__ = [
    "DEEPSEEK_V4_FLASH",
    "DEEPSEEK_V4_PRO",
    "DEEPSEEK_V32",
    "Config",
    "DeepseekV4Config",
    "DeepseekV32Config",
    "RopeConfig",
    "config_from_json",
    "from_hf",
    "load_config",
    "require",
]


def config_from_json(data: dict[str, Any]) -> Config:
    """Builds a config from the fields of a Hugging Face config.json, of the family that model_type names.

    Absent fields take DeepSeek-V3.2's values, or V4-Flash's where model_type is 'deepseek_v4'; without any rotary
    scaling RoPE is plain.

    Raises:
      ValueError: another architecture, a field of the wrong type, or sizes that do not fit together.
    """
    require(isinstance(data, dict), f"config.json holds a {type(data).__name__}; a JSON object is expected.")
    return read_config(data)


def load_config(folder: str | os.PathLike[str]) -> Config:
    """Reads `folder`/config.json.

    Raises:
      ValueError: no such folder or file, not JSON, or a model that this package does not know.
    """
    path = os.path.join(folder, "config.json")
    require(
        os.path.isdir(folder), f"model folder {os.fspath(folder)!r} does not exist; give a folder with config.json."
    )
    require(os.path.isfile(path), f"{os.fspath(folder)!r} has no config.json; give a Hugging Face model folder.")
    return _read_file(path)


def _read_file(path: str | os.PathLike[str]) -> Config:
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not valid JSON ({error}); fetch the file again.") from None
    return config_from_json(data)


def from_hf(source: str | os.PathLike[str] | dict[str, Any]) -> Config:
    """The config of a Hugging Face model: a folder, a path of a config.json, or the fields of one.

    DeepSeek-V3.2 and DeepSeek-V4, in the published spelling and in that of transformers 5.x.

    Args:
      source: a folder that holds config.json, that file, or its parsed contents.

    Returns:
      DeepseekV32Config or DeepseekV4Config.

    Raises:
      ValueError: nothing there, not JSON, another architecture, or fields that do not fit together.
    """
    if isinstance(source, dict):
        return config_from_json(source)
    return _read_file(source) if os.path.isfile(source) else load_config(source)
