"""Reads and writes the fields of a config.json that the families share: numbers, truth values, rotary parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax.shapes import RopeConfig

# Fields of every published config.json that our models do not use.
COMMON_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def read_field(data: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """`data[name]` as `kind`, or `default` if it is absent or null.

    Raises:
      ValueError: a value of another type.
    """
    value = data.get(name)
    if value is None:
        return default
    wanted = (int, float) if kind is float else kind
    require(
        isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)),
        f"config field {name} is {value!r}; a {kind.__name__} is expected. Mend config.json.",
    )
    return kind(value)


def _plain_types(config_type: Any) -> dict[str, type]:
    """The dataclass's fields that are numbers or truth values, with their types."""
    types = {field.name: type(field.default) for field in dataclasses.fields(config_type)}
    return {name: kind for name, kind in types.items() if kind in (int, float, bool)}


def read_plain_fields(data: dict[str, Any], config_type: type) -> dict[str, Any]:
    """The dataclass's numbers and truth values that `data` contains, under the same names.

    Raises:
      ValueError: a value of another type.
    """
    kinds = _plain_types(config_type).items()
    return {name: read_field(data, name, kind) for name, kind in kinds if data.get(name) is not None}


def write_plain_fields(config: Any) -> dict[str, Any]:
    """The inverse of `read_plain_fields`, without the option of a run, quantize_index_query."""
    return {name: getattr(config, name) for name in _plain_types(config) if name != "quantize_index_query"}


def read_rope(parameters: dict[str, Any], theta: Any, original: int = 4096) -> RopeConfig:
    """Reads one set of rotary parameters; their own rope_theta takes precedence over `theta`.

    Raises:
      ValueError: a scaling that is not supported.
    """
    theta = float(parameters.get("rope_theta", theta))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    require(
        kind == "yarn",
        f"config field rope_type is {kind!r}; supported are 'default' and 'yarn'. Convert the model or open an issue.",
    )
    mscale, mscale_all_dim = (float(parameters.get(name) or 0.0) for name in ("mscale", "mscale_all_dim"))
    require(
        mscale_all_dim in (0.0, mscale) or "mscale" not in parameters,
        f"config fields mscale {mscale} and mscale_all_dim {mscale_all_dim} differ; cosines and sines would have to be"
        " scaled, which no DeepSeek model of this family asks for. Set them equal.",
    )
    return RopeConfig(
        theta=theta,
        factor=float(parameters.get("factor", 1.0)),
        original_max_position=int(parameters.get("original_max_position_embeddings", original)),
        beta_fast=float(parameters.get("beta_fast", 32.0)),
        beta_slow=float(parameters.get("beta_slow", 1.0)),
        mscale_all_dim=mscale_all_dim,
    )


def write_yarn(rope: RopeConfig) -> dict[str, Any]:
    """The fields of YaRN that published files and transformers share."""
    return {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
