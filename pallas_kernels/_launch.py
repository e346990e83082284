"""A primitive around `pallas_call`, for two places where JAX can not lower a bare one.

* Interpret mode inside `jax.shard_map` with its default check: JAX's interpreter mixes its own loop counters, the same
  on all devices, with the kernel's arrays, which vary, and the check refuses that. The interpreter is right all the
  same: every device runs it on its own arrays. Around the primitive results vary as the operands do; inside it, arrays
  carry no axes.
* A program for several platforms (`jax.export`): JAX lowers a kernel for all of them wherever it stands. The primitive
  is lowered for the platform of its own target alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

from pallas_kernels.targets import HOST, Target, on_abstract_device

_launch = Primitive("launch_kernel")
_launch.multiple_results = True


def launch(run: Callable[..., Any], arrays: Sequence[jax.Array], out_shape: Any, target: Target) -> Any:
    """Runs a kernel behind the primitive.

    Args:
      run: the kernel's `pallas_call`.
      arrays: its operands; all of them vary over the same axes.
      out_shape: pytree of jax.ShapeDtypeStruct that state these axes.
      target: the machine that `run` is made for.

    Returns:
      The results of `run`, varying over these axes; a tuple for a list, as `pallas_call` returns.
    """
    leaves, tree = jax.tree.flatten(tuple(out_shape) if isinstance(out_shape, list) else out_shape)
    outs = _launch.bind(*arrays, run=lambda *xs: jax.tree.leaves(run(*xs)), outs=tuple(leaves), target=target)
    return jax.tree.unflatten(tree, outs)


@_launch.def_abstract_eval
def _result_types(*avals, run, outs, target):
    del run, target
    # An operand's type knows the mesh, which `outs` do not.
    mesh = avals[0].sharding.mesh

    def type_of(out):
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(out.shape)))
        return avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, sharding=sharding)

    return [type_of(out) for out in outs]


@_launch.def_impl
def _run(*arrays, run, outs, target):
    del outs, target
    return jax.jit(run)(*arrays)


def _lower(ctx, *operands, run, outs, target):
    del outs
    module = ctx.module_context.replace(platforms=(target.platform,))
    with contextlib.nullcontext() if target == HOST else on_abstract_device(target):

        def plain(aval):
            if target == HOST:
                return aval.update(manual_axis_type=ManualAxisType())
            # The mesh in use has another device now, and types must agree with it.
            sharding = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*[None] * aval.ndim))
            return aval.update(manual_axis_type=ManualAxisType(), sharding=sharding)

        types = {name: list(map(plain, getattr(ctx, name))) for name in ("avals_in", "avals_out")}
        lowered = mlir.lower_fun(run, multiple_results=True)
        return lowered(ctx.replace(module_context=module, platforms=None, **types), *operands)


def _batch(arrays, axes, *, run, outs, target):
    size = next(x.shape[axis] for x, axis in zip(arrays, axes) if axis is not None)
    batched = tuple(jax.ShapeDtypeStruct((size, *o.shape), o.dtype, manual_axis_type=o.manual_axis_type) for o in outs)
    results = _launch.bind(*arrays, run=jax.vmap(run, in_axes=tuple(axes)), outs=batched, target=target)
    return results, [0] * len(results)


mlir.register_lowering(_launch, _lower)
batching.primitive_batchers[_launch] = _batch
