"""The rotary parameters of a config.json: `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta`.

YaRN multiplies cosines and sines by an amplitude. Its rule is that of Hugging Face transformers 5: `attention_factor`
if it is given; else m(mscale) / m(mscale_all_dim) if both are given and not 0; else m(1), with
m(a) = 0.1 a ln(factor) + 1. (DeepSeek's own code has other values where only one of the two is given; its published
files give both.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields, read_shared
from sparse_mla_jax.shapes import RopeConfig

DEFAULT_THETA = 10000.0
PLAIN = RopeConfig()
ORIGINAL = "original_max_position_embeddings"


def read_rope(fields: ConfigFields, context: int, default: RopeConfig = PLAIN) -> RopeConfig:
    """The rotation of a model that has one.

    Args:
      fields: of a config.json.
      context: max_position_embeddings, the original context where YaRN does not name it.
      default: the rotation if the config describes none; its theta if the config gives none.

    Raises:
      ValueError: a scaling that is not supported, or two spellings that differ.
    """
    found = {name: fields.section(name) for name in ("rope_parameters", "rope_scaling")}
    sections = {name: section for name, section in found.items() if section is not None}
    places = [fields, *sections.values()]
    require(
        bool(sections) or default.factor == 1.0 or not fields.has("rope_theta"),
        "config field rope_theta stands alone; without rope_parameters this model has YaRN with constants of its own."
        " Give rope_parameters.",
    )
    theta = read_shared(float, default.theta, *((place, "rope_theta") for place in places))
    original = read_shared(int, context, *((place, ORIGINAL) for place in places))
    for place in places:
        # The rotated width is qk_rope_head_dim, never a part of it.
        place.require_values({"partial_rotary_factor": (1.0,)})
    ropes = {name: read_rotation(section, theta, original) for name, section in sections.items()}
    return merge_spellings(ropes, dataclasses.replace(default, theta=theta))


def merge_spellings(ropes: Mapping[str, RopeConfig], default: RopeConfig) -> RopeConfig:
    """The one rotation that all spellings of it mean; `default` without any.

    Raises:
      ValueError: two of them differ.
    """
    for name in (field.name for field in dataclasses.fields(RopeConfig)):
        values = {spelling: getattr(rope, name) for spelling, rope in ropes.items()}
        require(
            len(set(values.values())) <= 1,
            f"config fields {' and '.join(ropes)} mean the same and differ: they make {name}"
            f" {' and '.join(map(str, values.values()))}. Drop the wrong one.",
        )
    return next(iter(ropes.values()), default)


def read_rotation(section: ConfigFields, theta: float, original: int, amplitude: float | None = None) -> RopeConfig:
    """One set of rotary parameters. The caller has read those that may stand elsewhere: see `read_rope`.

    Args:
      section: the object in config.json.
      theta: base of the frequencies.
      original: YaRN's original_max_position_embeddings.
      amplitude: of YaRN without attention_factor in a family that has no mscale; None: from mscale and mscale_all_dim.

    Raises:
      ValueError: a scaling or a field that is not supported.
    """
    kinds = {section.read("rope_type", str), section.read("type", str)} - {None}
    name = section.full_name("rope_type")
    require(
        len(kinds) <= 1, f"config field {name} and type differ ({' and '.join(map(shown, sorted(kinds)))}); drop one."
    )
    kind = next(iter(kinds), "default")
    require(
        kind in ("default", "yarn"),
        f"config field {name} is {shown(kind)}; supported are 'default' and 'yarn'. Convert the model or open an"
        " issue.",
    )
    rope = RopeConfig(theta=theta) if kind == "default" else _read_yarn(section, theta, original, amplitude)
    section.refuse_unused(
        f"is not supported with rope_type {shown(kind)}. Drop it if the model was trained without it, or correct"
        " rope_type."
    )
    return rope


def _read_yarn(section: ConfigFields, theta: float, original: int, amplitude: float | None) -> RopeConfig:
    section.require_values({"truncate": (True,)})
    rope = RopeConfig(
        theta=theta,
        factor=section.read_required("factor", float),
        original_max_position=original,
        beta_fast=section.read("beta_fast", float, 32.0),
        beta_slow=section.read("beta_slow", float, 1.0),
        mscale_all_dim=section.read("mscale_all_dim", float, 0.0),
    )
    if amplitude is None:
        amplitude = _amplitude(rope, section.read("mscale", float, 0.0))
    else:
        section.require_values({"mscale": (0.0,)})
    return dataclasses.replace(rope, attention_factor=section.read("attention_factor", float, amplitude))


def _amplitude(rope: RopeConfig, mscale: float) -> float:
    """The factor of cosines and sines that YaRN has without attention_factor."""

    def m(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0

    return m(mscale) / m(rope.mscale_all_dim) if mscale and rope.mscale_all_dim else m(1.0)


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The `rope_parameters` of a model with one rotation, as Hugging Face transformers 5 writes them."""
    if rope.factor == 1.0 and rope.attention_factor == 1.0:
        return {"rope_theta": rope.theta, "rope_type": "default"}
    scale = {"mscale": rope.mscale_all_dim, "mscale_all_dim": rope.mscale_all_dim} if rope.mscale_all_dim else {}
    # Write the amplitude of cosines and sines explicitly: without mscale, readers differ.
    amplitude = {"attention_factor": float(rope.attention_factor)}
    return {"rope_theta": rope.theta, "rope_type": "yarn", **write_yarn(rope), **scale, **amplitude}


def write_yarn(rope: RopeConfig) -> dict[str, Any]:
    """The fields of YaRN that published files and transformers share."""
    return {
        "factor": rope.factor,
        ORIGINAL: rope.original_max_position,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
