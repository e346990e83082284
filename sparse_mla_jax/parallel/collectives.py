"""What crosses devices inside a step: each function is one collective of JAX, and says how many bytes it moves.

Bytes are those that a device sends, n devices on the axis, by the ring algorithms of NCCL and RCCL. A function does
nothing where its axes have one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import Array


def sum_over(x: Array, axes: Sequence[str]) -> Array:
    """The sum of x over the devices of `axes`, in x's type: 2 (n - 1) / n times x's bytes."""
    return jax.lax.psum(x, tuple(axes)) if axes else x


def join_rows(x: Array, axis: str | None) -> Array:
    """The rows [R, ...] of every device, one device after the other: [n R, ...]; n - 1 times x's bytes."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=0, tiled=True, to="invarying")


def join_columns(x: Array, axis: str | None) -> Array:
    """The columns [..., C] of every device, one device after the other: [..., n C]; n - 1 times x's bytes."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True, to="invarying")
