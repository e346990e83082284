"""The one door to Pallas' Triton backend: nothing else here imports `jax.experimental.pallas.triton`.

`call` runs a kernel as machine code on a GPU and in interpret mode on a CPU (within `pallas_kernels.cdna.device` as
CDNA machine code in our interpreter); which is decided per lowering platform, so that a CPU host can lower for `cuda`
or `rocm`. The backend is deprecated upstream: without it `call` raises NotImplementedError, which the dispatcher of
every operator answers with its XLA body.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.extend
from jax.experimental import pallas as pl

from pallas_kernels.targets import HOST, Target, executor

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:  # pragma: no cover - no supported release of jax lacks it
    pltriton = None  # type: ignore[assignment]


# Pointer arithmetic in this backend is 32-bit in elements: a larger array would be read at wrapped addresses.
MAX_ELEMENTS = 2**31 - 1


def load(ref, *, mask=None, other=None):
    """Reads `ref`, a `.at[...]` view of a kernel argument; lanes with a False `mask` are not read and give `other`."""
    return pltriton.load(ref, mask=mask, other=other)


def store(ref, value, *, mask=None) -> None:
    """Writes `value` at the view `ref` where `mask`; see `store_masked` for masks of lanes that share an address."""
    pltriton.store(ref, value, mask=mask)


def store_masked(ref, index: Sequence[jax.Array], value: jax.Array, mask: jax.Array | None, target: Target) -> None:
    """Writes `value` at `ref[*index]` where `mask`; everywhere if it is None. Mask and last index broadcast.

    Interpret mode writes old values back through masked lanes: there they point past the end of the last axis.
    """
    if mask is not None and target == HOST:
        index = (*index[:-1], jax.numpy.where(mask, index[-1], ref.shape[-1]))
    store(ref.at[tuple(index)], value, mask=mask)


def sum_in_order(x: jax.Array, axis: int, target: Target) -> jax.Array:
    """The sum over a short axis, with bits that do not depend on the other axes.

    XLA:CPU adds in an order that follows from the whole shape: in interpret mode the addends are added one by one.
    """
    if target != HOST:
        return jax.numpy.sum(x, axis=axis)
    slices = [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]
    return functools.reduce(jax.numpy.add, slices)


def barrier(target: Target) -> None:
    """What the program wrote before is seen by all its waves afterwards."""
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
    """Runs `kernel(*input_refs, *output_refs)` over `grid`; every ref is the whole array.

    Args:
      kernel: a function of refs; arithmetic on arrays, `load` and `store` at the edges.
      *arrays: inputs, each smaller than 2**31 elements.
      out_shape: pytree of jax.ShapeDtypeStruct.
      grid: programs per axis, all at least 1.
      name: what profilers and code objects call the kernel.
      target: what it runs on, see `pallas_kernels.targets`.
      num_warps: waves of a program, a power of two, at most 16 (1024 threads of a wave-64 machine).
      num_stages: software pipelining depth of loops.
      input_output_aliases: input number to output number, for outputs written in place.

    Raises:
      NotImplementedError: Pallas' Triton backend is gone from this jax, or an array needs 64-bit offsets.
    """
    if pltriton is None:
        raise NotImplementedError("this jax has no Pallas Triton backend; use implementation='xla'")
    for number, array in enumerate([*arrays, *jax.tree.leaves(out_shape)]):
        if math.prod(array.shape) > MAX_ELEMENTS:
            raise NotImplementedError(
                f"kernel {name}: array {number} has shape {tuple(array.shape)}, at least 2**31 elements, which 32-bit"
                " offsets can not address; use smaller caches (one array set per layer) or implementation='xla'"
            )

    run = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=tuple(grid),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=dict(input_output_aliases or {}),
        interpret=target == HOST,
        name=name,
    )
    chosen = executor.value
    return run(*arrays) if chosen is None else chosen.call(run, arrays, out_shape)
