"""All model families that this package reads and writes, by model_type of config.json and by config dataclass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields, check_json
from sparse_mla_jax.families import (
    axk2,
    deepseek_v4,
    deepseek_v32,
    dots3_note,
    glm_moe_dsa,
    hy_v4,
    hy_v4_vl,
    mistral_large4,
)
from sparse_mla_jax.families.fields import WITHOUT_EFFECT
from sparse_mla_jax.families.mla_fields import canonical
from sparse_mla_jax.families.published import PublishedFamily
from sparse_mla_jax.families.quantization import check_quantization
from sparse_mla_jax.shapes import Config, DeepseekV4Config, MlaConfig

FAMILIES = (
    deepseek_v32.FAMILY,
    deepseek_v4.FAMILY,
    glm_moe_dsa.FAMILY,
    hy_v4.FAMILY,
    hy_v4_vl.FAMILY,
    axk2.FAMILY,
    mistral_large4.FAMILY,
    dots3_note.FAMILY,
)
_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
# Fields of Hugging Face transformers that change any model, and the values under which they do not.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Sizes inside of it, which only composite models have.
_NO_TEXT: dict[str, tuple[Any, ...]] = {"text_config": ({},)}
# What a composite model says of all its parts.
_OF_ALL_PARTS = ("tie_word_embeddings", "quantization_config")


def mla_models() -> tuple[str, ...]:
    """The model_type of every family with latent attention."""
    return tuple(family.model_types[0] for family in FAMILIES if isinstance(family.defaults, MlaConfig))


def published_family(config: Config) -> PublishedFamily:
    """The family that `config.family` names, whose config.json describes this config.

    Raises:
      ValueError: not a config, or a family that is not listed.
    """
    require(
        isinstance(config, MlaConfig | DeepseekV4Config),
        f"config is a {type(config).__name__}; expected is one of MlaConfig, DeepseekV4Config. Read one"
        " with sparse_mla_jax.config.from_hf.",
    )
    family = next((family for family in FAMILIES if family.model_types[0] == config.family), None)
    if family is None or type(family.defaults) is not type(config):
        names = ", ".join(repr(one.model_types[0]) for one in FAMILIES if type(one.defaults) is type(config))
        raise ValueError(f"config field family is {shown(config.family)}; expected is one of {names}. Set it to one.")
    return family


def read_config(data: dict[str, Any]) -> Config:
    """The config of a parsed config.json. model_type names the family; without it, DeepSeek-V3.2.

    Warns once of fields that are not known, which are ignored.

    Raises:
      ValueError: a family that is not listed, or fields that it does not support.
    """
    check_json(data)
    kind = data.get("model_type", "deepseek_v32")
    known = ", ".join(repr(family.model_types[0]) for family in FAMILIES)
    require(
        isinstance(kind, str) and kind in _BY_MODEL_TYPE,
        f"config.json names model_type {shown(kind)}; this reader knows {known}. Give a folder of such a model.",
    )
    family, fields = _BY_MODEL_TYPE[kind], ConfigFields(data)
    text = _find_text(data, fields, family)
    config = family.read_config(text)
    check_quantization(text)
    _check_architectures(fields, family)
    for level in {id(one): one for one in (fields, text)}.values():
        level.require_values(_FIXED if level is fields and text is not fields else {**_FIXED, **_NO_TEXT})
        level.ignore(WITHOUT_EFFECT)
    _check_unused(fields, family)
    return config


def write_config(config: Config, dtype: Any) -> dict[str, Any]:
    """The fields of a config.json that `read_config` reads back.

    Raises:
      ValueError: the family's config.json has no field for something that the config says.
    """
    written = published_family(config).write_config(config, dtype)
    again = read_config(written)
    if isinstance(config, MlaConfig) and isinstance(again, MlaConfig):
        wanted, found = canonical(config), canonical(again)
        differing = [name for name in vars(wanted) if getattr(wanted, name) != getattr(found, name)]
        require(
            not differing,
            f"config field {', '.join(differing[:1])} is {shown(getattr(wanted, (differing or ['family'])[0]))}; a"
            f" config.json of model_type {config.family!r} can not say that. Use what the family has.",
        )
    return written


# --- composite models


def _find_text(data: Mapping[str, Any], fields: ConfigFields, family: PublishedFamily) -> ConfigFields:
    """The fields of the text model: those of text_config in a composite model, otherwise all.

    Raises:
      ValueError: another family inside, or fields that stand at both levels and differ.
    """
    if not family.composite:
        return fields
    fields.ignore(family.composite)
    shared = {name: data[name] for name in _OF_ALL_PARTS if fields.has(name)}
    text = fields.section("text_config", shared)
    if text is None:
        return fields
    fields.ignore(shared)
    inner = text.raw("model_type")
    require(
        inner in (None, *family.model_types),
        f"config field text_config.model_type is {shown(inner)}; {' or '.join(map(repr, family.model_types))} is"
        " expected. Use the config.json of one model.",
    )
    for name, own in data.items():
        if text.has(name) and own is not None and name not in ("model_type", "architectures", *WITHOUT_EFFECT):
            other = data["text_config"].get(name, own)
            require(
                own == other and type(own) is type(other),
                f"config fields {fields.full_name(name)} {shown(own)} and {text.full_name(name)} {shown(other)} differ;"
                " drop the wrong one.",
            )
            fields.ignore([name])
    return text


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
    short = [name.removeprefix("text_config.") for name in unused]
    for other in FAMILIES:
        foreign = next((name for name in short if name in other.keys), None)
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
