"""The config of a model: dataclasses, presets, and reading one from a Hugging Face folder.

`from_hf` reads every model family in `sparse_mla_jax.families`; model_type in config.json names the family. The
dataclasses are defined in `sparse_mla_jax.shapes`, which the families import.
"""

from __future__ import annotations

import json
import os
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._folder import CONFIG, find_file
from sparse_mla_jax.families.registry import read_config
from sparse_mla_jax.shapes import (
    DEEPSEEK_V4_FLASH,
    DEEPSEEK_V4_PRO,
    DEEPSEEK_V32,
    Config,
    DeepseekV4Config,
    DeepseekV32Config,
    MlaConfig,
    RopeConfig,
)

__all__ = [
    "DEEPSEEK_V4_FLASH",
    "DEEPSEEK_V4_PRO",
    "DEEPSEEK_V32",
    "Config",
    "DeepseekV4Config",
    "DeepseekV32Config",
    "MlaConfig",
    "RopeConfig",
    "config_from_json",
    "default_config",
    "from_hf",
    "load_config",
    "require",
]


def config_from_json(data: dict[str, Any]) -> Config:
    """Builds a config from the fields of a Hugging Face config.json; model_type names the family.

    Absent fields take the values of the family's published model; without model_type, DeepSeek-V3.2's. RoPE is plain if
    there is no rotary scaling. A field that is neither supported nor known to have no effect is reported in one
    UserWarning.

    Raises:
      ValueError: another architecture, a field of the wrong type or out of range, a field that asks for something that
        is not supported, or sizes that do not fit together.
    """
    require(isinstance(data, dict), f"config.json holds a {type(data).__name__}; a JSON object is expected.")
    return read_config(data)


def load_config(folder: str | os.PathLike[str]) -> Config:
    """Reads `folder`/config.json.

    Raises:
      ValueError: no such folder or file, not JSON, a model family or a field that this package does not support, or a
        value that can not be.
    """
    path = find_file(folder, CONFIG)
    require(
        os.path.isdir(folder), f"model folder {os.fspath(folder)!r} does not exist; give a folder with config.json."
    )
    require(os.path.isfile(path), f"{os.fspath(folder)!r} has no config.json; give a Hugging Face model folder.")
    return config_from_json(read_json(path))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The contents of a JSON file of a model folder.

    Raises:
      ValueError: not JSON, a field that occurs twice, or nesting that is too deep.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, object_pairs_hook=_refuse_repeats)
    except RecursionError:
        raise ValueError(f"{os.fspath(path)} is nested too deeply; fetch the file again.") from None
    except ValueError as error:
        # Not JSON, not UTF-8, or an integer of more than 4300 digits.
        raise ValueError(f"{os.fspath(path)} is not valid JSON ({error}); fetch the file again.") from None


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Of two fields with one name, Python would silently take the last."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        require(name not in fields, f"it has the field {shown(name)} twice")
        fields[name] = value
    return fields


def default_config(model_type: str) -> Config:
    """The config of a family's published model: what a config.json with nothing but this model_type means.

    Raises:
      ValueError: a model_type that this package does not read.
    """
    return config_from_json({"model_type": model_type})


def from_hf(source: str | os.PathLike[str] | dict[str, Any]) -> Config:
    """The config of a Hugging Face model from a folder, the path of a config.json, or its fields.

    Reads every family of `sparse_mla_jax.families`, with the field names of the published files and those of
    transformers 5.x.

    Args:
      source: a folder with config.json, the path of that file, or its parsed contents.

    Returns:
      DeepseekV4Config for DeepSeek-V4, MlaConfig for all others.

    Raises:
      ValueError: no such file, not JSON, another architecture, or fields that do not fit together.
    """
    if isinstance(source, dict):
        return config_from_json(source)
    return config_from_json(read_json(source)) if os.path.isfile(source) else load_config(source)
