"""Steps on many devices: a function of one device's arrays becomes a `Step` over an abstract mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sparse_mla_jax._check import require, size
from sparse_mla_jax.cases.steps import PAGE_SIZE, Step, published_config
from sparse_mla_jax.models import mla
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.caches import partition_caches
from sparse_mla_jax.parallel.collectives import join_rows
from sparse_mla_jax.parallel.partition import check_divides, partition_fused


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


def sharded_decode_step(
    parallel: Parallel,
    *,
    heads: int = 128,
    batch: int = 64,
    context: int = 32768,
    layers: int = 2,
    cache_dtype: Any = jnp.float8_e4m3fnuz,
    model: str = "deepseek_v32",
) -> Step:
    """`cases.steps.decode_step` on the mesh of `parallel`, for `compile`.

    Args:
      parallel: the sizes of the mesh.
      heads: attention heads of the model, of which a device has its part.
      batch: sequences of each group of "data".
      context: tokens that the caches of a sequence can hold, a multiple of 64 for each device of "context".
      layers, cache_dtype, model: as in `decode_step`.

    Raises:
      ValueError: as `decode_step`; sizes that do not divide over the mesh.
    """
    config = published_config(heads=heads, layers=layers, model=model)
    specs = mla.param_specs(config, jnp.bfloat16)
    check_divides(config, specs, parallel)
    fused = partition_fused(mla.fuse_projections, specs, parallel)
    caches = _caches(config, parallel, batch, context, cache_dtype)

    def body(params: Any, token_ids: Any, caches: Any, seq_lens: Any, page_table: Any) -> tuple[Any, Any]:
        options: dict[str, Any] = {"config": config, "implementation": "triton", "parallel": parallel}
        scores, caches = mla.decode(params, token_ids, caches, seq_lens, page_table, **options)
        return join_rows(jnp.argmax(scores, axis=-1).astype(jnp.int32), parallel.axis("data")), caches

    rows, data = batch * parallel.data, PartitionSpec(parallel.axis("data"))
    per_sequence = jax.ShapeDtypeStruct((rows,), jnp.int32)
    table = jax.ShapeDtypeStruct((rows, context // PAGE_SIZE), jnp.int32)
    pages = partition_caches(caches, parallel)
    args = fused.specs, per_sequence, caches, per_sequence, table
    return sharded_step(body, args, (fused.partition, data, pages, data, data), (PartitionSpec(), pages), parallel)


def _caches(config: Any, parallel: Parallel, batch: int, context: int, dtype: Any) -> Any:
    """Shapes of the caches of all devices."""
    batch, context, cycle = size("batch", batch), size("context", context), PAGE_SIZE * parallel.context
    require(
        context % cycle == 0,
        f"context is {context}; a multiple of {cycle} is expected, the page size {PAGE_SIZE} times context="
        f"{parallel.context}.",
    )
    rows = batch * parallel.data
    pages = rows * context // PAGE_SIZE
    return jax.eval_shape(
        lambda: mla.create_caches(config, pages, PAGE_SIZE, num_requests=rows, dtype=jnp.dtype(dtype))
    )
