"""Decode steps of models on a mesh, as shapes: what each device of a cluster would run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from sparse_mla_jax._check import require, size
from sparse_mla_jax.cases.steps import PAGE_SIZE, Step, published_config
from sparse_mla_jax.models import mla
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.caches import partition_caches
from sparse_mla_jax.parallel.partition import check_divides, partition_fused
from sparse_mla_jax.parallel.run import Where, run_on_mesh


def mesh_decode_step(
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

    Returns:
      The step; its arguments are shapes of the whole mesh, with the shardings that they have there.

    Raises:
      ValueError: as `decode_step`; sizes that do not divide over the mesh.
    """
    config = published_config(heads=heads, layers=layers, model=model)
    specs = mla.param_specs(config, jnp.bfloat16)
    check_divides(config, specs, parallel)
    fused = partition_fused(mla.fuse_projections, specs, parallel)
    caches = _caches(config, parallel, batch, context, cache_dtype)
    mesh = AbstractMesh(parallel.sizes, parallel.names, axis_types=(AxisType.Auto,) * 3)
    where = Where(mesh, parallel, fused.partition)

    def body(params: Any, caches: Any, inputs: Any) -> tuple[Any, Any]:
        token_ids, seq_lens, page_table = inputs
        scores, caches = mla.decode(
            params,
            token_ids,
            caches,
            seq_lens,
            page_table,
            config=config,
            implementation="triton",
            parallel=parallel,
        )
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    def step(params: Any, token_ids: Any, caches: Any, seq_lens: Any, page_table: Any) -> tuple[Any, Any]:
        return run_on_mesh(body, where, params, caches, (token_ids, seq_lens, page_table))

    def place(shapes: Any, partition: Any) -> Any:
        def one(shape: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(one, shapes, partition)

    rows, data = batch * parallel.data, PartitionSpec(parallel.axis("data"))
    per_sequence = place(jax.ShapeDtypeStruct((rows,), jnp.int32), data)
    table = place(jax.ShapeDtypeStruct((rows, context // PAGE_SIZE), jnp.int32), data)
    params = place(fused.specs, fused.partition)
    return Step(step, (params, per_sequence, place(caches, partition_caches(caches, parallel)), per_sequence, table))


def _caches(config: Any, parallel: Parallel, batch: int, context: int, dtype: Any) -> Any:
    """Shapes of the caches of all devices."""
    batch, context, cycle = size("batch", batch), size("context", context), PAGE_SIZE * parallel.context
    require(
        context % cycle == 0,
        f"context is {context}; a multiple of {cycle} is expected, the page size {PAGE_SIZE} times context="
        f"{parallel.context}.",
    )
    rows = batch * parallel.data
    return jax.eval_shape(
        lambda: mla.create_caches(
            config, rows * context // PAGE_SIZE, PAGE_SIZE, num_requests=rows, dtype=jnp.dtype(dtype)
        )
    )
