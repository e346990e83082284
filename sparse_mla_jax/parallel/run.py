"""Runs a model's step on a mesh: one `jax.shard_map` around a function of (params, caches, inputs)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.caches import partition_caches, place
from sparse_mla_jax.parallel.collectives import join_rows


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a model runs.

    Attributes:
      mesh: has the axes of `parallel`.
      parallel: the axes.
      params: pytree of PartitionSpec, how the parameters lie on it.
    """

    mesh: Mesh
    parallel: Parallel
    params: Any


# A step on one device's part: (params, caches, inputs) -> (result, caches).
Body = Callable[[Any, Any, Any], tuple[Any, Any]]


def run_on_mesh(body: Body, where: Where, params: Any, caches: Any, inputs: Any) -> tuple[Any, Any]:
    """`body` on every device of `mesh`, on its part of the arguments; call it inside your own `jax.jit`.

    Args:
      body: sees its own weights and pages, and the inputs of its group of "data".
      where: the mesh, and how the parameters lie on it.
      params: a model's parameters.
      caches: a model's caches, with the pages of all devices.
      inputs: pytree of arrays; their first axis is split over "data".

    Returns:
      (result, caches): the rows of the groups one after the other, the same on all devices; and the caches, which lie
      as before.
    """
    data = where.parallel.axis("data")

    def step(params: Any, caches: Any, inputs: Any) -> tuple[Any, Any]:
        result, caches = body(params, caches, inputs)
        return jax.tree.map(lambda rows: join_rows(rows, data), result), caches

    own = partition_caches(caches, where.parallel)
    specs = where.params, own, PartitionSpec(data)
    return jax.shard_map(step, mesh=where.mesh, in_specs=specs, out_specs=(PartitionSpec(), own))(
        params, caches, inputs
    )


def place_params(params: Any, where: Where) -> Any:
    """Puts parameters on the devices of a mesh, each of which keeps its part.

    Arrays that lie there already are not moved. To read weights that one device or process can not hold, use
    `models.sharded_checkpoint.shard_checkpoint`.
    """
    return jax.device_put(params, place(where.params, where.mesh))


def create_on_mesh(create: Callable[[], Any], where: Where) -> Any:
    """The caches of a mesh, of which every device makes its own part.

    create: makes the caches of one device: its pages, and the rings of its group of "data". Only these must fit int32.
    """
    own = partition_caches(jax.eval_shape(create), where.parallel)
    return jax.jit(jax.shard_map(create, mesh=where.mesh, in_specs=(), out_specs=own))()
