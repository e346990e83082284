"""Steps on many devices: a function of one device's arrays becomes a `Step` over an abstract mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from sparse_mla_jax.cases.steps import Step
from sparse_mla_jax.parallel.axes import Parallel


def abstract_mesh(parallel: Parallel) -> AbstractMesh:
    """The mesh of `parallel` without devices: for shapes, and for programs that are compiled for other machines."""
    return AbstractMesh(parallel.sizes, parallel.names, (AxisType.Auto,) * len(parallel.sizes))


def sharded_step(
    body: Callable[..., Any],
    args: tuple[Any, ...],
    in_specs: tuple[Any, ...],
    out_specs: Any,
    parallel: Parallel,
    donated: int = 2,
) -> Step:
    """A step whose every device runs `body` on its parts of the arguments, inside one `jax.shard_map`.

    Args:
      body: as `Step.fn`, on the arrays of one device.
      args: shapes of the whole arguments.
      in_specs: for every argument a jax.sharding.PartitionSpec per array, or a prefix of that pytree.
      out_specs: the same for the results.
      parallel: the mesh.
      donated: index of the argument that is updated in place.

    Returns:
      The step. Its shapes have a jax.sharding.NamedSharding over `abstract_mesh(parallel)`.
    """
    mesh = abstract_mesh(parallel)

    def placed(a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))

    specs = jax.tree.broadcast(in_specs, args)
    fn = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return Step(fn, jax.tree.map(placed, args, specs), donated)
