"""Runs a model's step on a mesh: one `jax.shard_map` around a function of (params, caches, inputs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.caches import partition_caches, place
from sparse_mla_jax.parallel.collectives import join_rows
from sparse_mla_jax.parallel.partition import partition_params

# A step on one device's part: (params, caches, inputs) -> (result, caches).
Body = Callable[[Any, Any, Any], tuple[Any, Any]]


def run_on_mesh(body: Body, params: Any, caches: Any, inputs: Any, *, mesh: Mesh, parallel: Parallel) -> Any:
    """`body` on every device of `mesh`, on its part of the arguments; call it inside your own `jax.jit`.

    Args:
      body: sees its own weights and pages, and the inputs of its group of "data".
      params: a model's parameters.
      caches: a model's caches, with the pages of all devices.
      inputs: pytree of arrays; their first axis is split over "data".
      mesh: has the axes of `parallel`.
      parallel: the axes, which `body` passes on.

    Returns:
      (result, caches): the rows of the groups one after the other, the same on all devices; and the caches, which lie
      as before.
    """
    data = parallel.axis("data")

    def step(params: Any, caches: Any, inputs: Any) -> tuple[Any, Any]:
        result, caches = body(params, caches, inputs)
        return jax.tree.map(lambda rows: join_rows(rows, data), result), caches

    own = partition_caches(caches, parallel)
    specs = partition_params(params, parallel), own, PartitionSpec(data)
    return jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), own))(params, caches, inputs)


def place_params(params: Any, mesh: Mesh, parallel: Parallel) -> Any:
    """Puts parameters on the devices of `mesh`, each of which keeps its part.

    Arrays that lie there already are not moved. To read weights that one device or process can not hold, use
    `models.shard_checkpoint`.
    """
    return jax.device_put(params, place(partition_params(params, parallel), mesh))


def create_on_mesh(create: Callable[[], Any], mesh: Mesh, parallel: Parallel) -> Any:
    """The caches that `create` makes, each device making its own part.

    create: makes caches with the pages of all devices, and the rings of all groups of "data".
    """
    shardings = place(partition_caches(jax.eval_shape(create), parallel), mesh)
    return jax.jit(create, out_shardings=shardings)()
