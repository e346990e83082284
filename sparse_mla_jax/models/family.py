"""Dispatches to a model module by the config's type, and checks a caller's parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import DTYPES
from sparse_mla_jax.config import Config, DeepseekV4Config, MlaConfig
from sparse_mla_jax.models import deepseek_v4, mla
from sparse_mla_jax.models.common import Family
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.partition import (
    FusedPartition,
    check_divides,
    local_specs,
    partition_fused,
    partition_params,
)

_FAMILIES: dict[type, Family] = {MlaConfig: mla.FAMILY, DeepseekV4Config: deepseek_v4.FAMILY}


def family_of(config: Config) -> Family:
    """The functions of the model that this config describes.

    Raises:
      ValueError: not a config.
    """
    require(
        type(config) in _FAMILIES,
        f"config is a {type(config).__name__}; expected is one of {', '.join(kind.__name__ for kind in _FAMILIES)}."
        " Read one with sparse_mla_jax.config.from_hf.",
    )
    return _FAMILIES[type(config)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def check_params(params: Any, config: Config, dtype: Any = None, parallel: Parallel | None = None) -> Any:
    """Puts `params` on the device, matrices cast to `dtype` (None keeps their type); norms stay float32.

    Separate and fused parameters are accepted: from `fuse_projections`, or with `parallel` from `fuse_on_mesh`. Arrays
    that lie on several devices stay there.

    Raises:
      ValueError: a parameter is missing, surplus, or not of the shape that `config` requires; or parameters were fused
        for other devices.
    """
    if dtype is None:
        dtype = params["embed_tokens"].dtype if isinstance(params, dict) and "embed_tokens" in params else jnp.float32
    wanted = _check.dtype("dtype", dtype, DTYPES)
    given_tree: Any = jax.tree.structure(params)
    family = family_of(config)
    separate = specs = family.param_specs(config, wanted)
    fused: FusedPartition | None = None
    if given_tree != jax.tree.structure(specs):
        fused = partition_fused(family.fuse_projections, specs, parallel or Parallel())
        specs = fused.specs if given_tree == jax.tree.structure(fused.specs) else specs
    names = [{_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in (specs, params)]
    require(
        given_tree == jax.tree.structure(specs),
        f"params do not fit the config: missing {sorted(names[0] - names[1])[:5]}, surplus"
        f" {sorted(names[1] - names[0])[:5]}. Make them with init_params or load_checkpoint of the same config.",
    )

    def put(path: Any, spec: jax.ShapeDtypeStruct, leaf: Any) -> jax.Array:
        require(
            tuple(np.shape(leaf)) == spec.shape,
            f"params {_name(path)} has shape {tuple(np.shape(leaf))}; the config needs {spec.shape}.",
        )
        return jnp.asarray(leaf, spec.dtype)

    placed = jax.tree_util.tree_map_with_path(put, specs, params)
    if fused is not None:
        _check_fused(placed, separate, fused, parallel or Parallel())
    return placed


def _check_fused(params: Any, separate: Any, fused: FusedPartition, parallel: Parallel) -> None:
    """Raises ValueError for matrices that were fused for other devices.

    Their columns have another order, and may have the same shape: only where they lie tells.
    """
    known = {path for path, _ in jax.tree_util.tree_leaves_with_path(separate)}
    local = jax.tree.leaves(local_specs(fused.specs, fused.partition, parallel))
    for (path, leaf), part in zip(jax.tree_util.tree_leaves_with_path(params), local):
        there = leaf.sharding.shard_shape(leaf.shape)
        require(
            path in known or there == part.shape,
            f"params {_name(path)} has parts of shape {there} on each device; {part.shape} is expected, as one"
            f" device of {parallel} fuses it. Pass separate parameters, or fuse them with models.family.fuse_on_mesh.",
        )


def partition_model(params: Any, config: Config, parallel: Parallel) -> Any:
    """How a model's parameters, separate or fused on the mesh, lie on it: a pytree of PartitionSpec like `params`.

    Raises:
      ValueError: sizes of the config that do not divide; the message says which sizes do.
    """
    family = family_of(config)
    specs = family.param_specs(config, params["embed_tokens"].dtype)
    check_divides(config, specs, parallel)
    given: Any = jax.tree.structure(params)
    if given == jax.tree.structure(specs):
        return partition_params(specs, parallel)
    return partition_fused(family.fuse_projections, specs, parallel).partition


def fuse_on_mesh(params: Any, config: Config, mesh: Mesh, parallel: Parallel) -> Any:
    """`fuse_projections` on every device of a mesh, with its own columns and heads; the arguments may be given up.

    The result is not what one device would fuse: see `parallel.partition.partition_fused`.

    Raises:
      ValueError: as `partition_model`.
    """
    own = partition_model(params, config, parallel)
    family = family_of(config)
    specs = family.param_specs(config, params["embed_tokens"].dtype)
    fused = partition_fused(family.fuse_projections, specs, parallel).partition
    fuse = jax.shard_map(family.fuse_projections, mesh=mesh, in_specs=(own,), out_specs=fused)
    return jax.jit(fuse, donate_argnums=0)(params)


def matmul_precision(params: Any) -> Any:
    """A context manager: float32 models multiply in full float32 on every device, others at the default precision."""
    return jax.default_matmul_precision("highest" if params["embed_tokens"].dtype == jnp.float32 else None)
