"""Interpret mode inside `jax.shard_map` with its default check.

JAX's interpreter of Pallas kernels mixes its own loop counters with the kernel's arrays, and the check of `shard_map`
refuses that: counters are the same on all devices, arrays vary. The interpreter is correct all the same, because every
device runs it on its own arrays. So a primitive hides it: outside, results vary as the operands do; inside, the arrays
carry no axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

_interpret = Primitive("interpret_kernel")
_interpret.multiple_results = True


def interpret_on_each_device(run: Callable[..., Any], arrays: Sequence[jax.Array], out_shape: Any) -> Any:
    """Runs a kernel in interpret mode on arrays that vary over axes of a mesh.

    Args:
      run: the kernel's `pallas_call` in interpret mode.
      arrays: its operands; all of them vary over the same axes.
      out_shape: pytree of jax.ShapeDtypeStruct that state these axes.

    Returns:
      The results of `run`, varying over these axes; a tuple for a list, as `pallas_call` returns.
    """
    leaves, tree = jax.tree.flatten(tuple(out_shape) if isinstance(out_shape, list) else out_shape)
    outs = _interpret.bind(*arrays, run=lambda *xs: jax.tree.leaves(run(*xs)), outs=tuple(leaves))
    return jax.tree.unflatten(tree, outs)


@_interpret.def_abstract_eval
def _result_types(*avals, run, outs):
    del run
    # An operand's type knows the mesh, which `outs` do not.
    mesh = avals[0].sharding.mesh

    def type_of(out):
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(out.shape)))
        return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

    return [type_of(out) for out in outs]


def _lower(ctx, *operands, run, outs):
    del outs
    plain = {
        name: [aval.update(manual_axis_type=ManualAxisType()) for aval in getattr(ctx, name)]
        for name in ("avals_in", "avals_out")
    }
    return mlir.lower_fun(run, multiple_results=True)(ctx.replace(**plain), *operands)


def _batch(arrays, axes, *, run, outs):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes) if axis is not None)
    batched = [jax.ShapeDtypeStruct((size, *o.shape), o.dtype, manual_axis_type=o.manual_axis_type) for o in outs]
    results = _interpret.bind(*arrays, run=jax.vmap(run, in_axes=tuple(axes)), outs=tuple(batched))
    return results, [0] * len(results)


mlir.register_lowering(_interpret, _lower, platform="cpu")
batching.primitive_batchers[_interpret] = _batch
