"""The tensors that a published folder of a config holds: a family's table, joined with our arrays' shapes and types."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.families.published import FUSED_DOWN, FUSED_GATE_UP, Layout, PublishedTensor
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


def list_tensors(config: Config, dtype: Any, *, single_experts: bool = False) -> list[Tensor]:
    """All tensors of a folder of this config with matrices of type `dtype`, in the order in which they are written.

    Args:
      config: the model's shapes.
      dtype: of the matrices.
      single_experts: one tensor for each matrix of an expert, also in a family that writes them fused.

    Raises:
      ValueError: the family has no name for one of the model's parameters.
    """
    family, specs = published_family(config), family_of(config).param_specs(config, dtype)
    rows = [(row, *_parse_places(row.places)) for row in family.tensors(config)]
    tensors = [tensor for row in rows if (tensor := _join(*row, specs)) is not None]
    _check_cover(tensors, specs, family.model_types[0])
    return _fuse_experts(tensors, specs) if family.fused_experts and not single_experts else tensors


def _parse_places(places: tuple[str, ...]) -> tuple[list[Keys], int | None]:
    """Paths of our arrays, and the index at their end if they stack experts."""
    keys = [tuple(int(key) if key.isdecimal() else key for key in place.split(".")) for place in places]
    last = keys[0][-1]
    return ([one[:-1] for one in keys], last) if isinstance(last, int) else (keys, None)


def _join(row: PublishedTensor, keys: list[Keys], expert: int | None, specs: Any) -> Tensor | None:
    """A row of the table with the shapes of its places; None if the parameters have none of them."""
    found = [_leaf(specs, one) for one in keys]
    if None in found:
        require(
            not any(found), f"the table of names gives {row.name} the places {row.places}, of which some do not exist."
        )
        return None
    shapes = [spec if expert is None else jax.ShapeDtypeStruct(spec.shape[1:], spec.dtype) for spec in found if spec]
    return Tensor(row.name, tuple(keys), expert, row.layout, tuple(shapes))


def _leaf(specs: Any, keys: Keys) -> jax.ShapeDtypeStruct | None:
    """The spec at a path, or None if the parameters have no array there."""
    for key in keys:
        if isinstance(specs, dict) if isinstance(key, str) else isinstance(specs, list):
            specs = specs.get(key) if isinstance(specs, dict) else specs[key]
        else:
            return None
    return specs if isinstance(specs, jax.ShapeDtypeStruct) else None


def _check_cover(tensors: list[Tensor], specs: Any, family: str) -> None:
    """Requires that every array of the parameters has one tensor, or one for each of its experts."""
    counts = collections.Counter((keys, tensor.expert) for tensor in tensors for keys in tensor.keys)
    stacked = {keys for keys, expert in counts if expert is not None}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs):
        keys = keys_of(path)
        experts = range(spec.shape[0]) if keys in stacked else [None]
        name = ".".join(map(str, keys))
        require(
            all(counts.pop((keys, expert), 0) == 1 for expert in experts),
            f"parameters {name} have no place, or several, in a folder of family {family!r}, which has no such model."
            " Give config.family the family that the model has.",
        )


def _fuse_experts(tensors: list[Tensor], specs: Any) -> list[Tensor]:
    """The table with two tensors for all experts of a layer in place of three for each."""
    fused = []
    for tensor in tensors:
        if tensor.expert is None:
            fused.append(tensor)
        elif tensor.expert == 0 and tensor.keys[0][-1] != "up_proj":
            prefix, (*place, kind) = tensor.name.partition("experts.")[0] + "experts.", tensor.keys[0]
            both = kind == "gate_proj"
            keys = tuple((*place, one) for one in (("gate_proj", "up_proj") if both else (kind,)))
            name, layout = ("gate_up_proj", FUSED_GATE_UP) if both else (str(kind), FUSED_DOWN)
            fused.append(Tensor(prefix + name, keys, None, layout, tuple(at(specs, one) for one in keys)))
    return fused


def keys_of(path: Any) -> Keys:
    """A path of `jax.tree_util` as `Keys`."""
    return tuple(key.key if isinstance(key, jax.tree_util.DictKey) else key.idx for key in path)


def at(tree: Any, keys: Keys) -> Any:
    """The subtree at the path `keys` of a pytree of dicts and lists."""
    for key in keys:
        tree = tree[key]
    return tree


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a folder of this config, in the order in which they are written."""
    return {tensor.name: tensor.shape for tensor in list_tensors(config, jnp.float32)}
