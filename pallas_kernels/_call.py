"""Calls Pallas' Triton backend. No other file of this package imports `jax.experimental.pallas.triton`.

`call` runs a kernel as machine code on a GPU and in interpret mode on a CPU. Inside `pallas_kernels.cdna.device` it
runs CDNA machine code in this project's interpreter. The choice is made per lowering platform, so a CPU host can lower
for `cuda` or `rocm`. JAX has deprecated the backend. Without it `call` raises NotImplementedError, and the dispatcher
of every operator falls back to its XLA body.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
from jax.experimental import pallas as pl

from pallas_kernels._launch import launch
from pallas_kernels.mesh_axes import axes_of, declare, spread
from pallas_kernels.targets import HOST, Target, executor, named_targets

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:  # pragma: no cover - no supported release of jax lacks it
    pltriton = None  # type: ignore[assignment]


# This backend computes offsets in 32 bits, counted in elements: in a larger array they would wrap.
MAX_ELEMENTS = 2**31 - 1


def load(ref, *, mask=None, other=None):
    """Loads `ref`, a `.at[...]` view of a kernel argument. Lanes with a False `mask` load nothing and give `other`."""
    return pltriton.load(ref, mask=mask, other=other)


def store(ref, value, *, mask=None) -> None:
    """Stores `value` at the view `ref` where `mask`. Use `store_masked` if masked and other lanes share an address."""
    pltriton.store(ref, value, mask=mask)


def store_masked(ref, index: Sequence[jax.Array], value: jax.Array, mask: jax.Array | None, target: Target) -> None:
    """Stores `value` at `ref[*index]` where `mask`, everywhere if it is None. The mask and the last index broadcast.

    In interpret mode a masked lane writes the old value back: its last index must point past the end of the axis.
    """
    if mask is not None and target == HOST:
        index = (*index[:-1], jax.numpy.where(mask, index[-1], ref.shape[-1]))
    store(ref.at[tuple(index)], value, mask=mask)


def sum_in_order(x: jax.Array, axis: int, target: Target) -> jax.Array:
    """Sums x over a short axis; the bits of the result do not depend on the other axes.

    XLA:CPU chooses the order of additions by the whole shape, so interpret mode adds one slice after the other.
    """
    if target != HOST:
        return jax.numpy.sum(x, axis=axis)
    slices = [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return functools.reduce(jax.numpy.add, slices)


def barrier(target: Target) -> None:
    """Makes the stores of a program so far visible to all its waves."""
    # Interpret mode has no waves, and no rule for a barrier.
    if target != HOST:
        pltriton.debug_barrier()


def call(
    kernel: Callable[..., None],
    *arrays: jax.Array,
    out_shape: Any,
    grid: Sequence[int],
    name: str,
    target: Target,
    num_warps: int = 4,
    num_stages: int = 1,
    input_output_aliases: Mapping[int, int] | None = None,
) -> Any:
    """Runs `kernel(*input_refs, *output_refs)` over `grid`; each ref covers its whole array.

    Args:
      kernel: a function of refs that calls `load`, computes on arrays, and calls `store`.
      *arrays: inputs, each smaller than 2**31 elements.
      out_shape: pytree of jax.ShapeDtypeStruct.
      grid: programs per axis, all at least 1.
      name: name of the kernel in profilers and code objects.
      target: the machine that it runs on, see `pallas_kernels.targets`.
      num_warps: waves per program, a power of two, at most 16 (1024 threads if a wave has 64).
      num_stages: software pipelining depth of loops.
      input_output_aliases: number of an input -> number of the output that is written in place of it.

    Raises:
      NotImplementedError: this jax has no Pallas Triton backend, or an array needs 64-bit offsets.
    """
    if pltriton is None:
        raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
    for number, array in enumerate([*arrays, *jax.tree.leaves(out_shape)]):
        if math.prod(array.shape) > MAX_ELEMENTS:
            raise NotImplementedError(
                f"kernel {name}: array {number} has shape {tuple(array.shape)}, at least 2**31 elements, which 32-bit"
                " offsets can not address; use smaller caches (one array set per layer) or implementation='xla'"
            )

    axes = axes_of(arrays)
    arrays, out_shape = spread(arrays, axes), declare(out_shape, axes)
    run = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=tuple(grid),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=dict(input_output_aliases or {}),
        interpret=target == HOST,
        name=name,
    )
    if executor.value is not None:
        return spread(executor.value.call(run, arrays, out_shape), axes)
    if named_targets() or (axes and target == HOST):
        return launch(run, arrays, out_shape, target)
    return run(*arrays)
