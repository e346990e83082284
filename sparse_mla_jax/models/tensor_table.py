"""The tensors that a published folder of a config holds: a family's table, joined with our arrays' shapes and types."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.config import Config
from sparse_mla_jax.families.published import Layout
from sparse_mla_jax.families.registry import published_family
from sparse_mla_jax.models.family import family_of

Keys = tuple[str | int, ...]


class Tensor(NamedTuple):
    """One published tensor.

    Attributes:
      name: the published name.
      keys: path of each of our arrays in the parameters, without the expert's number.
      expert: index into our arrays, which stack the experts; None if it is not an expert's tensor.
      layout: conversion between the tensor and our arrays.
      specs: shape and type of each of our arrays; of one expert if they stack experts.
    """

    name: str
    keys: tuple[Keys, ...]
    expert: int | None
    layout: Layout
    specs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        return self.layout.published_shape([spec.shape for spec in self.specs])

    @property
    def is_table(self) -> bool:
        """Whether it holds integers."""
        return self.specs[0].dtype == jnp.int32

    @property
    def stored_dtype(self) -> np.dtype:
        """The type in which it is saved: int64 for integer tables, otherwise that of our arrays."""
        return np.dtype(np.int64 if self.is_table else self.specs[0].dtype)


def list_tensors(config: Config, dtype: Any) -> list[Tensor]:
    """All tensors of a folder of this config with matrices of type `dtype`, in the order in which they are written."""
    specs = family_of(config).param_specs(config, dtype)
    tensors = []
    for row in published_family(config).tensors(config):
        places = [tuple(int(key) if key.isdigit() else key for key in place.split(".")) for place in row.places]
        *_, last = places[0]
        expert = last if isinstance(last, int) else None
        if expert is not None:
            places = [keys[:-1] for keys in places]
        found = [at(specs, keys) for keys in places]
        if expert is not None:
            found = [jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype) for stack in found]
        tensors.append(Tensor(row.name, tuple(places), expert, row.layout, tuple(found)))
    return tensors


def at(tree: Any, keys: Keys) -> Any:
    """The subtree at the path `keys` of a pytree of dicts and lists."""
    for key in keys:
        tree = tree[key]
    return tree


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder of this config, in the order in which they are written."""
    return {tensor.name: tensor.shape for tensor in list_tensors(config, jnp.float32)}
