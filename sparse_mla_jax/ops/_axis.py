"""The mesh axis that an operator inside `jax.shard_map` is told to use."""

from __future__ import annotations

from typing import Any

import jax

from sparse_mla_jax._check import require, shown


def axis_size(axis_name: Any) -> int:
    """Devices of a mesh axis of the enclosing `jax.shard_map`.

    Raises:
      ValueError: not a name, or no axis of that name here.
    """
    require(isinstance(axis_name, str), f"axis_name is {shown(axis_name)}; expected the name of one mesh axis.")
    try:
        return jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            f"axis_name is {axis_name!r}; no mesh axis of that name is in use here. Call this inside jax.shard_map over"
            " a mesh that has the axis."
        ) from error
