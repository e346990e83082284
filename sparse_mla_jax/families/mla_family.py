"""A family with latent attention (MLA) as a `PublishedFamily`: what follows from its keys and its names."""

from __future__ import annotations

import functools
from typing import Any

from sparse_mla_jax.families import mla_fields
from sparse_mla_jax.families.mla_tensors import MlaNames, scale_names
from sparse_mla_jax.families.published import PublishedFamily


def mla_family(
    keys: mla_fields.MlaKeys, names: MlaNames, *, further_keys: tuple[str, ...] = (), **own: Any
) -> PublishedFamily:
    """The exports of a family file.

    Args:
      keys: of its config.json.
      names: of its tensors.
      further_keys: names in config.json that the family reads itself, and others refuse by name.
      own: fields of `PublishedFamily` in place of those that follow from `keys` and `names`, and further ones.
    """
    common = {
        "model_types": (keys.defaults.family,),
        "architectures": keys.architectures,
        "defaults": keys.defaults,
        "keys": (*keys.numbers, *further_keys),
        "read_config": functools.partial(mla_fields.read_config, keys=keys),
        "write_config": functools.partial(mla_fields.write_config, keys=keys),
        "tensors": names.tensors,
        "describe_ignored": names.describe_ignored,
        "scale_names": scale_names,
        "parts": names.parts,
    }
    return PublishedFamily(**{**common, **own})
