"""The layers of dots3.note in its config.json: kinds, and sizes and rotation of those with sliding attention.

transformers (5.24) saves `layer_types`, `per_layer_config` with what differs in a layer, and `rope_parameters` with one
object for each kind. The file on the hub has `swa_*` and `swa_rope_theta`, and calls indexed layers "full_attention".
"""

from __future__ import annotations

import dataclasses

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields, read_shared
from sparse_mla_jax.families.index_sharing import INDEXED_NAMES
from sparse_mla_jax.families.rotary import ORIGINAL, read_rope, read_rotation
from sparse_mla_jax.mla_layer import FULL, INDEXED, SLIDING, AttentionSizes
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.shapes import RopeConfig

_SLIDING_THETA = 50000.0
# Sizes of sliding layers in the file on the hub, and their defaults.
_SLIDING_SIZES = {
    "num_attention_heads": 64,
    "q_lora_rank": 1024,
    "kv_lora_rank": 1024,
    "qk_nope_head_dim": 192,
    "v_head_dim": 128,
}
_SLIDING_HEAD = 256
SIZES = (*_SLIDING_SIZES, "qk_rope_head_dim")
KEYS = (
    *("use_dsa", "use_sliding_window", "sliding_window_size", "moe_shared_expert_intermediate_size"),
    *(f"swa_{name}" for name in (*SIZES, "head_dim", "num_key_value_heads", "rope_theta")),
)
_KINDS = (*INDEXED_NAMES, FULL, SLIDING)


def read_kinds(fields: ConfigFields, layers: int) -> list[str]:
    """The kind of each layer.

    Raises:
      ValueError: kinds that do not fit use_dsa or use_sliding_window.
    """
    types = fields.read_names("layer_types", layers, _KINDS)
    indexed, slides = fields.read("use_dsa", bool), fields.read("use_sliding_window", bool, True)
    kinds = types or [INDEXED if i < 2 or i % 4 == 1 else SLIDING for i in range(layers)]
    kinds = [INDEXED if kind in INDEXED_NAMES else kind for kind in kinds]
    if not _is_saved_form(fields):
        other = FULL if indexed is False else INDEXED
        kinds = [kind if kind == SLIDING else other for kind in kinds]
    contrary = {True: FULL, False: INDEXED}.get(indexed)
    require(
        contrary not in kinds,
        f"config field use_dsa is {indexed} and layer_types has {contrary!r}; the two say different things. Drop one.",
    )
    require(
        slides or SLIDING not in kinds,
        "config field use_sliding_window is False and layer_types has 'sliding_attention'; drop one.",
    )
    return kinds


def _is_saved_form(fields: ConfigFields) -> bool:
    """Whether transformers saved the file, in which "full_attention" has no indexer."""
    return fields.raw("per_layer_config") is not None or bool(_rope_by_kind(fields))


def _rope_by_kind(fields: ConfigFields) -> dict[str, ConfigFields]:
    """The objects of nested rope_parameters."""
    section = fields.section("rope_parameters")
    named = {kind: section.section(kind) for kind in _KINDS if section.has(kind)} if section else {}
    return {kind: part for kind, part in named.items() if part is not None}


# --- rotation


def read_ropes(fields: ConfigFields, context: int, default: RopeConfig) -> dict[str, RopeConfig]:
    """The rotation of each kind of layer. The softmax scale never depends on it, other than in DeepSeek-V3.2.

    Args:
      fields: of a config.json.
      context: max_position_embeddings.
      default: of layers that do not slide.

    Raises:
      ValueError: kinds that are missing, or spellings that differ.
    """
    parts = _rope_by_kind(fields)
    sliding = RopeConfig(theta=fields.read("swa_rope_theta", float, _SLIDING_THETA))
    if not parts:
        main = _without_mscale(read_rope(fields, context, default))
        return {INDEXED: main, FULL: main, SLIDING: sliding}
    outer = fields.section("rope_parameters")
    assert outer is not None
    outer.refuse_unused("stands beside one object for each kind of layer without effect. Drop it.")
    ropes = {}
    for kind, part in parts.items():
        own = INDEXED if kind in INDEXED_NAMES else kind
        # The rotated width is qk_rope_head_dim; the factor refers to a head_dim that may be another one.
        part.ignore(["partial_rotary_factor"])
        theta = read_shared(float, sliding.theta if own == SLIDING else default.theta, (part, "rope_theta"))
        rope = read_rotation(part, theta, read_shared(int, context, (part, ORIGINAL)))
        ropes[own] = _without_mscale(rope)
    main = ropes.get(INDEXED, ropes.get(FULL, default))
    for name, theta in (("rope_theta", main.theta), ("swa_rope_theta", ropes.get(SLIDING, sliding).theta)):
        given = fields.read(name, float, theta)
        require(
            given == theta,
            f"config fields {name} {given} and rope_parameters, which makes it {theta}, differ; drop the wrong one.",
        )
    return {INDEXED: main, FULL: main, SLIDING: sliding} | ropes


def _without_mscale(rope: RopeConfig) -> RopeConfig:
    return dataclasses.replace(rope, mscale_all_dim=0.0)


# --- sizes


def read_layer_sizes(
    fields: ConfigFields, config: MlaConfig, kinds: list[str], ropes: dict[str, RopeConfig]
) -> tuple[AttentionSizes, ...]:
    """The sizes of each layer; empty if all have those of the config.

    Raises:
      ValueError: sizes of layers that do not exist, or two spellings of them.
    """
    common = dataclasses.replace(config, layer_types=(), layer_sizes=()).layer(0).sizes
    saved = fields.raw("per_layer_config") is not None
    given = [
        name for name in fields.names() if name.startswith("swa_") and name != "swa_rope_theta" and fields.has(name)
    ]
    require(
        not (saved and given),
        f"config fields per_layer_config and {shown(given[:1])} both give the sizes of layers; drop one.",
    )
    changes = _read_changes(fields, len(kinds), common.num_attention_heads) if saved else {}
    sliding = {} if saved or SLIDING not in kinds else _read_sliding_sizes(fields, config)
    if SLIDING not in kinds:
        fields.ignore(given)
    sizes = []
    for number, kind in enumerate(kinds):
        own = changes.get(number, {}) if saved else sliding if kind == SLIDING else {}
        sizes.append(dataclasses.replace(common, rope=ropes[kind], **own))
    return () if all(one == common for one in sizes) else tuple(sizes)


def _read_changes(fields: ConfigFields, layers: int, heads: int) -> dict[int, dict[str, int]]:
    """per_layer_config: numbers of layers as strings, and what differs there."""
    section = fields.section("per_layer_config")
    changes = {}
    for name in section.names() if section else []:
        require(
            name.isdecimal() and name.isascii() and len(name) < 8 and int(name) < layers,
            f"config field per_layer_config.{shown(name)} names no layer; numbers below {layers} (num_hidden_layers)"
            " are expected. Mend config.json.",
        )
        part = section.section(name) if section else None
        if part is None:
            continue
        own = {size: part.read(size, int) for size in SIZES if part.has(size)}
        part.ignore(["head_dim"])
        part.require_values({"num_key_value_heads": (own.get("num_attention_heads", heads),)})
        part.refuse_unused("is not supported: layers may differ in heads, ranks and widths only.")
        changes[int(name)] = own
    return changes


def _read_sliding_sizes(fields: ConfigFields, config: MlaConfig) -> dict[str, int]:
    """swa_* of the file on the hub."""
    own = {name: fields.read(f"swa_{name}", int, default) for name, default in _SLIDING_SIZES.items()}
    head = fields.read("swa_head_dim", int, _SLIDING_HEAD)
    own["qk_rope_head_dim"] = fields.read("swa_qk_rope_head_dim", int, head - own["qk_nope_head_dim"])
    fields.require_values({"swa_num_key_value_heads": (own["num_attention_heads"],)})
    return own
