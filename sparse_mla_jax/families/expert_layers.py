"""The fields of a config.json that say which layers have routed experts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax._json_fields import ConfigFields


def read_moe_layers(
    fields: ConfigFields, sizes: Mapping[str, Any], *, spread: bool, stated: bool, strict: bool
) -> dict[str, Any]:
    """first_k_dense_replace and mlp_layer_types, from either of them and moe_layer_freq.

    mlp_layer_types takes precedence, as in transformers, which saves all of them. A warning says so if they differ.

    Args:
      fields: of a config.json.
      sizes: the numbers that it gives, or their defaults.
      spread: whether the family has moe_layer_freq.
      stated: whether first_k_dense_replace is given.
      strict: refuse spellings that differ.

    Raises:
      ValueError: two spellings that differ, if they may not; or layers with experts in a model without.
    """
    layers, experts, first = (
        sizes[name] for name in ("num_hidden_layers", "n_routed_experts", "first_k_dense_replace")
    )
    frequency = _read_moe_frequency(fields, layers) if spread else None
    kinds = fields.read_names("mlp_layer_types", layers, ("dense", "sparse"))
    is_sparse = [experts > 0 and i >= first and (frequency is None or frequency[i]) for i in range(layers)]
    counted = ["sparse" if one else "dense" for one in is_sparse]
    if kinds is None:
        return {} if frequency is None else name_moe_layers(counted)
    differs = kinds != counted and (stated or frequency is not None)
    require(
        kinds == counted or (experts > 0 and not (strict and differs)),
        f"config field mlp_layer_types has {kinds.count('dense')} dense layers; first_k_dense_replace is {first} and"
        f" n_routed_experts {experts}. Set them alike.",
    )
    if differs:
        warnings.warn(
            "config field mlp_layer_types counts; first_k_dense_replace and moe_layer_freq say something else.",
            stacklevel=1,
        )
    return {} if kinds == counted and stated and frequency is None else name_moe_layers(kinds)


def name_moe_layers(kinds: Sequence[str]) -> dict[str, Any]:
    """The two fields of MlaConfig that say which layers have experts, for one kind per layer."""
    dense = kinds.count("dense")
    if "dense" in kinds[dense:]:
        return {"first_k_dense_replace": 0, "mlp_layer_types": tuple(kinds)}
    return {"first_k_dense_replace": dense, "mlp_layer_types": ()}


def _read_moe_frequency(fields: ConfigFields, layers: int) -> list[bool] | None:
    """Whether each layer may have experts by moe_layer_freq; None if it is absent or 1.

    A number f stands for every f-th layer, a list has 0 or 1 for each.
    """
    value = fields.raw("moe_layer_freq")
    if isinstance(value, list):
        return fields.read_flags("moe_layer_freq", layers)
    frequency = fields.read("moe_layer_freq", int, 1)
    require(frequency >= 1, f"config field moe_layer_freq is {frequency}; it must be at least 1. Mend config.json.")
    return None if frequency == 1 else [i % frequency == 0 for i in range(layers)]
