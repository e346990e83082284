"""Registers the package's pytrees with `jax.export`, so that an exported step can take and return them."""

from __future__ import annotations

import json
from typing import Any

import jax.export
import jax.numpy as jnp
import numpy as np


def serializable[T: type](cls: T) -> T:
    """Class decorator: lets `jax.export` write a registered dataclass, under the name sparse_mla_jax.CLASS.

    Its static fields must be numbers, strings, None or dtypes.
    """
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"sparse_mla_jax.{cls.__name__}",
        serialize_auxdata=_write_static,
        deserialize_auxdata=_read_static,
    )
    return cls


def _write_static(values: Any) -> bytes:
    plain = [{"dtype": value.name} if isinstance(value, np.dtype) else value for value in values]
    return json.dumps(plain).encode()


def _read_static(written: bytes) -> Any:
    plain = json.loads(written.decode())
    return tuple(jnp.dtype(value["dtype"]) if isinstance(value, dict) else value for value in plain)
