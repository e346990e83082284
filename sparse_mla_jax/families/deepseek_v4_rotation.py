"""The two rotations in the config.json of DeepSeek-V4."""

from __future__ import annotations

from sparse_mla_jax._check import require
from sparse_mla_jax._json_fields import ConfigFields, read_shared
from sparse_mla_jax.families.rotary import DEFAULT_THETA, ORIGINAL, merge_spellings, read_rotation
from sparse_mla_jax.shapes import RopeConfig

_COMPRESS_THETA = 160000.0


def rope_sections(fields: ConfigFields) -> dict[str, ConfigFields]:
    """The objects that describe rotations, by name; 'main' and 'compress' in place of a rope_parameters with both."""
    names = ("rope_parameters", "rope_scaling", "compress_rope_parameters")
    sections = {name: section for name in names if (section := fields.section(name))}
    parameters = sections.get("rope_parameters")
    if parameters and (parameters.has("main") or parameters.has("compress")):
        for name in ("main", "compress"):
            part = parameters.section(name)
            require(
                part is not None,
                f"config field rope_parameters has no field {name}; two objects, 'main' and 'compress', are expected."
                " Mend config.json.",
            )
            if part is not None:
                sections[name] = part
        sections.pop("rope_parameters").refuse_unused("stands beside 'main' and 'compress' without effect. Drop it.")
    return sections


def read_ropes(fields: ConfigFields, sections: dict[str, ConfigFields], context: int) -> tuple[RopeConfig, RopeConfig]:
    """Rotation of layers that do not compress, and of layers that do; `context` is max_position_embeddings.

    Published files have rope_theta, compress_rope_theta, and rope_scaling, which applies to compressing layers only.
    Hugging Face transformers writes rope_parameters {"main": {...}, "compress": {...}}. Earlier versions wrote one set
    only, or the second one as compress_rope_parameters. Transformers takes the amplitude 1 where the two objects do not
    stand, and YaRN's own where they stand without attention_factor.
    """
    compressing = {name: section for name, section in sections.items() if name != "main"}
    # The theta of a set that is the only one is that of the other layers.
    own = [section for name, section in compressing.items() if name.startswith("compress")]
    others = [section for name, section in sections.items() if not name.startswith("compress")]
    theta = read_shared(float, DEFAULT_THETA, *((place, "rope_theta") for place in (fields, *others)))
    places = [(fields, "compress_rope_theta"), *((place, "rope_theta") for place in own)]
    compress_theta = read_shared(float, _COMPRESS_THETA, *places)
    original = read_shared(int, context, *((place, ORIGINAL) for place in (fields, *compressing.values())))
    main = RopeConfig(theta=theta)
    if "main" in sections:
        main = read_rotation(sections["main"], theta, read_shared(int, context, (sections["main"], ORIGINAL)))
    ropes = {
        name: read_rotation(section, compress_theta, original, amplitude=None if name == "compress" else 1.0)
        for name, section in compressing.items()
    }
    return main, merge_spellings(ropes, RopeConfig(theta=compress_theta))
