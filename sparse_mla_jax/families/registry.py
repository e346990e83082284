"""All model families that this package reads and writes, by model_type of config.json and by config dataclass."""

from __future__ import annotations

from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax.families import deepseek_v4, deepseek_v32
from sparse_mla_jax.families.published import PublishedFamily
from sparse_mla_jax.shapes import Config

FAMILIES = (deepseek_v32.FAMILY, deepseek_v4.FAMILY)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_BY_CONFIG_TYPE = {family.config_type: family for family in FAMILIES}


def published_family(config: Config) -> PublishedFamily:
    """The family whose config.json fills this dataclass.

    Raises:
      ValueError: not a config.
    """
    require(
        type(config) in _BY_CONFIG_TYPE,
        f"config is a {type(config).__name__}; expected is one of"
        f" {', '.join(kind.__name__ for kind in _BY_CONFIG_TYPE)}. Read one with sparse_mla_jax.config.from_hf.",
    )
    return _BY_CONFIG_TYPE[type(config)]


def read_config(data: dict[str, Any]) -> Config:
    """The config of a parsed config.json. model_type names the family; without it, DeepSeek-V3.2.

    Raises:
      ValueError: a family that is not listed, or fields that it does not support.
    """
    kind = data.get("model_type", "deepseek_v32")
    known = " and ".join(repr(family.model_types[0]) for family in FAMILIES)
    require(
        kind in _BY_MODEL_TYPE,
        f"config.json names model_type {kind!r}; this reader knows {known}. Give a folder of such a model.",
    )
    return _BY_MODEL_TYPE[kind].read_config(data)
