"""The mesh axes over which an array varies inside `jax.shard_map`, and marking arrays as varying.

With the default check of `jax.shard_map` (`check_vma=True`), the type of an array names the axes over which its value
differs between devices. Operands of one operation must agree, and the result of a kernel must state its own.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import ManualAxisType


def axes_of(*trees: Any) -> frozenset:
    """Names of the axes over which any array of these pytrees varies; empty outside of `jax.shard_map`."""
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(trees)))


def varying(x: Any, *like: Any) -> Any:
    """Marks the pytree `x` as varying over the axes of `like`; a loop's initial carry needs it."""
    return spread(x, axes_of(*like))


def spread(x: Any, axes: frozenset) -> Any:
    """Marks every array of the pytree `x` as varying over `axes` too."""

    def mark(leaf):
        missing = tuple(sorted(axes - axes_of(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, x) if axes else x


def declare(shapes: Any, axes: frozenset) -> Any:
    """The pytree of jax.ShapeDtypeStruct with `axes` as those over which the arrays vary."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=ManualAxisType(varying=axes)), shapes
    )


def explicit_axes() -> frozenset:
    """Axes of type Explicit (`jax.make_mesh`'s default) of the mesh in use; none inside `jax.shard_map`."""
    return frozenset(jax.sharding.get_abstract_mesh().explicit_axes)


def on_shards(body: Any, args: Any, in_specs: Any, out_specs: Any) -> Any:
    """Runs `body(*args)` on every device's shards in a mesh with Explicit axes, where no kernel can be called.

    Args:
      body: a function of arrays, the same on every device.
      args: tuple of pytrees; arrays that lie otherwise are moved to `in_specs` first.
      in_specs: pytree of PartitionSpec, one per array of `args`.
      out_specs: pytree of PartitionSpec or a prefix of it, for the results.
    """
    placed = jax.tree.map(jax.sharding.reshard, args, in_specs)
    run = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, axis_names=explicit_axes())
    return run(*placed)
