"""How caches lie on a mesh: pages over "data" and "context", what a running request has besides over "data".

The arrays of a mesh have the pages of all its devices one after the other: page i of the device (d, c) of the axes
"data" and "context" is page (d * context + c) * pages + i. A step inside `jax.shard_map` sees its own pages, from 0 on.
Over "tensor" all devices have the same caches.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_mla_jax.layers.compressed_attention import LayerCaches
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState
from sparse_mla_jax.ops.window import WindowCache
from sparse_mla_jax.parallel.axes import Parallel


def _first_axis(parallel: Parallel, *kinds: str) -> PartitionSpec:
    """The first axis over these axes of the mesh, written as jax writes it: a step gives what it takes."""
    names = parallel.present(*kinds)
    return PartitionSpec(names) if names else PartitionSpec()


def partition_caches(caches: Any, parallel: Parallel) -> Any:
    """A pytree of PartitionSpec like `caches`, those of a model or of one layer.

    Args:
      caches: from a model's `create_caches`; arrays or `jax.ShapeDtypeStruct`.
      parallel: the axes.

    Raises:
      ValueError: something else than this library's caches.
    """
    pages, requests = _first_axis(parallel, "data", "context"), _first_axis(parallel, "data")

    def spread(tree: Any, spec: PartitionSpec) -> Any:
        return jax.tree.map(lambda _: spec, tree)

    def visit(one: Any) -> Any:
        if isinstance(one, WindowCache | CompressorState):
            return spread(one, requests)
        if isinstance(one, LayerCaches):
            parts = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
            window, page_size = spread(parts.pop("window"), requests), parts.pop("page_size")
            return LayerCaches(window, page_size=page_size, **{name: visit(part) for name, part in parts.items()})
        if isinstance(one, PagedKVCache | PagedIndexCache):
            return spread(one, pages)
        if one is None:
            return None
        if isinstance(one, tuple):
            return tuple(visit(part) for part in one)
        raise ValueError(
            f"caches has a {type(one).__name__}; expected are the caches that a model's create_caches makes."
        )

    return visit(caches)


def place(specs: Any, mesh: Mesh) -> Any:
    """A pytree of NamedSharding from one of PartitionSpec."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
