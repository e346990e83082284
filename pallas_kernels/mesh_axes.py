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
