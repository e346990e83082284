"""The fields of a config.json that say which layers share another layer's selection of keys."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.mla_layer import INDEXED
from sparse_mla_jax.mla_shapes import INDEXER_TYPES

INDEXED_NAMES = (INDEXED, "deepseek_sparse_attention")


def read_own_indexers(fields: ConfigFields, layers: int) -> tuple[str, ...]:
    """As `check_own_indexers`, in a model whose layers all have an index."""
    fields.read_names("layer_types", layers, INDEXED_NAMES)
    return check_own_indexers(fields, layers)


def check_own_indexers(fields: ConfigFields, layers: int) -> tuple[str, ...]:
    """Requires, in all spellings of it, that every layer with an index has an indexer of its own: ().

    Raises:
      ValueError: a layer that shares another layer's selection.
    """
    fields.read_names("indexer_types", layers, ("full",))
    pattern = fields.raw("index_topk_pattern")
    if isinstance(pattern, list):
        fields.read_names("index_topk_pattern", layers, ("full",))
    else:
        fields.require_values({"index_topk_pattern": ("F" * layers,)})
    fields.require_values({"index_topk_freq": (1,)})
    # With a frequency of 1 every layer has its own indexer, wherever counting starts.
    fields.ignore(["index_skip_topk_offset"])
    return ()


def read_indexer_types(fields: ConfigFields, layers: int) -> tuple[str, ...]:
    """Per layer "full" or "shared"; empty if every layer has an indexer of its own.

    `indexer_types` takes precedence over the older `index_topk_pattern`, and that over `index_topk_freq`.

    Raises:
      ValueError: lists of another length, or other entries.
    """
    fields.read_names("layer_types", layers, INDEXED_NAMES)
    types = fields.read_names("indexer_types", layers, INDEXER_TYPES)
    older = read_older_types(fields, layers)
    return name_types(older or ["full"] * layers if types is None else types)


def read_older_types(fields: ConfigFields, layers: int) -> list[str] | None:
    """What index_topk_pattern or index_topk_freq says; None if neither is there."""
    pattern, frequency = fields.raw("index_topk_pattern"), fields.read("index_topk_freq", int)
    # Layer `offset` - 1 is the first one after which layers share.
    offset = fields.read("index_skip_topk_offset", int, 2)
    if isinstance(pattern, str):
        letters = {"F": "full", "S": "shared"}
        require(
            len(pattern) == layers and set(pattern) <= letters.keys(),
            f"config field {fields.full_name('index_topk_pattern')} is {shown(pattern)}; {layers} letters, F or S, are"
            " expected, one for each of num_hidden_layers. Mend config.json.",
        )
        return [letters[letter] for letter in pattern]
    if pattern is not None:
        return fields.read_names("index_topk_pattern", layers, INDEXER_TYPES)
    if frequency is None:
        return None
    require(
        frequency >= 1,
        f"config field {fields.full_name('index_topk_freq')} is {frequency}; it must be at least 1. Mend config.json.",
    )
    return ["full" if max(i - offset + 1, 0) % frequency == 0 else "shared" for i in range(layers)]


def name_types(types: Sequence[str]) -> tuple[str, ...]:
    """The field indexer_types of MlaConfig for one kind per layer."""
    return tuple(types) if "shared" in types else ()
