"""What crosses devices inside `jax.shard_map`: named functions over JAX's own collectives, with the bytes they move.

Bytes are those that one of n devices sends in a ring, for b bytes of its own argument. On one host with links between
all pairs of devices the number is the same and the time is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import Array

from pallas_kernels.mesh_axes import axes_of
from sparse_mla_jax._check import require


class Slices(NamedTuple):
    """Rows that cross devices: entry i of each int32[n] concerns the device with index i along the axis.

    Attributes:
      input_offsets: row of the argument from which on rows are sent to device i.
      send_sizes: how many.
      output_offsets: row of device i's result at which they arrive.
      recv_sizes: how many rows arrive from device i.
    """

    input_offsets: Array
    send_sizes: Array
    output_offsets: Array
    recv_sizes: Array


def sum_over(x: Array, axes: Sequence[str]) -> Array:
    """The sum of `x` over all devices of these axes, typed as the same on all of them; `x` itself without axes.

    Sends 2 b (n - 1) / n bytes. It adds in the type of `x`: a model in float32 adds in float32, one in bfloat16 rounds
    to bfloat16 before the sum and after it, as serving engines do. That halves the bytes, and the error of n rounded
    terms is of the order of the rounding of the result, which follows anyway.

    Args:
      x: any shape, different on these devices.
      axes: names of mesh axes, n devices together.

    Raises:
      ValueError: `jax.shard_map` knows (with its default check) that `x` is the same on all devices of an axis.
    """
    if not axes:
        return x
    known = axes_of(jax.lax.axis_index(tuple(axes))) - axes_of(x)
    require(
        not known,
        f"x is the same on all devices of {sorted(known)}, and a sum would count it once for each; expected are parts"
        " that differ. Split the weights over the axis, or leave it out.",
    )
    return jax.lax.psum(x, tuple(axes))


def gather_rows(x: Array, axis: str) -> Array:
    """Rows [T, ...] of every device, one after the other by its index: [n T, ...]. Sends b (n - 1) bytes."""
    return jax.lax.all_gather(x, axis, axis=0, tiled=True)


def scatter_sum(x: Array, axis: str) -> Array:
    """The sum of [n T, ...] over devices, of which each keeps its own [T, ...]. Sends b (n - 1) / n bytes.

    It adds in the type of `x`, see `sum_over`.
    """
    return jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)


def swap_rows(x: Array, axis: str) -> Array:
    """Row i of [n, ...] goes to device i, row j of the result came from device j. Sends b (n - 1) / n bytes."""
    return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)


def exchange_rows(x: Array, result: Array, slices: Slices, axis: str) -> Array:
    """Sends slices of the rows of `x`, and writes those that arrive into `result`. Sends the rows for other devices.

    XLA has it on GPUs and TPUs, not on CPUs.

    Args:
      x: [N, ...].
      result: [M, ...]: what stands where no row arrives.
      slices: of `x` and of the results.
      axis: name of a mesh axis.

    Returns:
      [M, ...].
    """
    return jax.lax.ragged_all_to_all(x, result, *slices, axis_name=axis)


def join_rows(x: Array, axis: str | None) -> Array:
    """The rows [R, ...] of every device, one after the other by its index: [n R, ...], typed as the same on all.

    Sends b (n - 1) bytes; `x` itself without an axis.
    """
    return x if axis is None else jax.lax.all_gather(x, axis, axis=0, tiled=True, to="invarying")


def join_columns(x: Array, axis: str | None) -> Array:
    """The columns [..., C] of every device, one after the other by its index: [..., n C], typed as the same on all.

    Sends b (n - 1) bytes; `x` itself without an axis.
    """
    return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True, to="invarying")
