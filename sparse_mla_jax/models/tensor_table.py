"""A family's table of tensors joined with the shapes and types of our arrays: what a folder of a config holds."""

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
      keys: where each of our arrays lies in the parameters, without an expert's number.
      expert: its number in the stacks that ours are, or None.
      specs: shape and type of each of our arrays; of one expert, where they are stacks.
    """

    name: str
    keys: tuple[Keys, ...]
    expert: int | None
    layout: Layout
    specs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As published."""
        return self.layout.published_shape([spec.shape for spec in self.specs])

    @property
    def is_table(self) -> bool:
        """Whether it holds integers."""
        return self.specs[0].dtype == jnp.int32

    @property
    def stored_dtype(self) -> np.dtype:
        """The type in which it is written; what is float32 always is so in files too."""
        return np.dtype(np.int64 if self.is_table else self.specs[0].dtype)


def list_tensors(config: Config, dtype: Any) -> list[Tensor]:
    """Every tensor of a folder of this config whose matrices are `dtype`, in the order in which they are written."""
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
    """What lies there in a pytree of dicts and lists."""
    for key in keys:
        tree = tree[key]
    return tree


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a folder of this config holds, in the order in which they are written."""
    return {tensor.name: tensor.shape for tensor in list_tensors(config, jnp.float32)}
