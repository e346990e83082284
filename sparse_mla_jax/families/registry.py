"""All model families that this package reads and writes, by model_type of config.json and by config dataclass."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax.families import deepseek_v4, deepseek_v32
from sparse_mla_jax.families.fields import WITHOUT_EFFECT, ConfigFields, check_json
from sparse_mla_jax.families.published import PublishedFamily
from sparse_mla_jax.families.quantization import check_quantization
from sparse_mla_jax.shapes import Config

FAMILIES = (deepseek_v32.FAMILY, deepseek_v4.FAMILY)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_BY_CONFIG_TYPE = {family.config_type: family for family in FAMILIES}
# Fields of Hugging Face transformers that change any model, and the values under which they do not.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "per_layer_config": ({},),
    # A composite model, whose sizes are inside.
    "text_config": ({},),
}


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

    Warns once of fields that are not known, which are ignored.

    Raises:
      ValueError: a family that is not listed, or fields that it does not support.
    """
    check_json(data)
    kind = data.get("model_type", "deepseek_v32")
    known = " and ".join(repr(family.model_types[0]) for family in FAMILIES)
    require(
        isinstance(kind, str) and kind in _BY_MODEL_TYPE,
        f"config.json names model_type {shown(kind)}; this reader knows {known}. Give a folder of such a model.",
    )
    family, fields = _BY_MODEL_TYPE[kind], ConfigFields(data)
    config = family.read_config(fields)
    check_quantization(fields)
    _check_architectures(fields, family)
    fields.require_values(_FIXED)
    fields.ignore(WITHOUT_EFFECT)
    _check_unused(fields, family)
    return config


def _check_architectures(fields: ConfigFields, family: PublishedFamily) -> None:
    wrong = [name for name in fields.read("architectures", list, []) if name not in family.architectures]
    require(
        not wrong,
        f"config field architectures names {shown(wrong[:1])}; model_type {family.model_types[0]!r} supports"
        f" {' or '.join(family.architectures)}. Correct the one that misstates the weights.",
    )


def _check_unused(fields: ConfigFields, family: PublishedFamily) -> None:
    """Refuses fields of other families, and warns of fields that no family has."""
    unused = list(fields.unused())
    for other in FAMILIES:
        names = {field.name for field in dataclasses.fields(other.config_type)}
        foreign = next((name for name in unused if name in names), None)
        require(
            foreign is None,
            f"config field {foreign} belongs to model_type {other.model_types[0]!r}; {family.model_types[0]!r} has"
            " nothing like it. Correct model_type, or drop the field.",
        )
    if unused:
        more = f" and {len(unused) - 8} more" if len(unused) > 8 else ""
        # One place for all calls, so that Python shows the same warning once.
        warnings.warn(
            f"config.json has fields that are not known here and have no effect: {', '.join(unused[:8])}{more}. The"
            " results are wrong if the model needs one of them; otherwise drop them.",
            stacklevel=1,
        )
