"""Merges attention over disjoint parts of the keys that lie on different devices of a mesh axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mesh_axes import spread
from sparse_mla_jax import _check
from sparse_mla_jax.ops._axis import axis_size
from sparse_mla_jax.ops.attention import merge


def merge_across(out: Array, lse: Array, axis_name: str) -> tuple[Array, Array]:
    """`merge` of the parts that the devices of an axis have: every device has the whole result, the same on all.

    For use inside `jax.shard_map`. Each device passes its attention over its own keys, for all tokens and heads. The
    parts are merged in float32 in the order of the devices, so the same inputs give the same bits. Parts must exclude
    sinks (`apply_sinks` once, to the result). A part whose lse is not finite is empty and contributes nothing, whatever
    its out holds; if all are empty, the result is 0 and -inf.

    If H is a multiple of the n devices, each merges the heads H / n * i .. H / n * (i + 1) - 1 of device i. A device
    then receives 2 (n - 1) / n * T * H * (V * itemsize(out) + 4) bytes. Otherwise it receives all parts, in
    (n - 1) * T * H * (V * itemsize(out) + 4) bytes.

    Args:
      out: floating [T, H, V], of this device's keys.
      lse: floating [T, H], natural log-sum-exp of this device's keys; -inf for a row without keys.
      axis_name: a mesh axis of the enclosing `jax.shard_map` (static).

    Returns:
      (out [T, H, V] in out's dtype, lse float32 [T, H]), typed as the same on all devices of the axis.

    Raises:
      ValueError: types or shapes other than these, or an axis that does not exist here.
    """
    out = _check.array("out", out, jnp.floating, "T", "H", "V", hint="Of this device's keys.")
    lse = _check.floats("lse", lse, *out.shape[:2], hint="One for each row and head of out.")
    n = axis_size(axis_name)
    parts = spread((out, lse), frozenset([axis_name]))
    tokens, heads, _ = out.shape
    if heads % n:
        return merge(*(jax.lax.all_gather(x, axis_name, to="invarying") for x in parts))

    def exchange(x: Array) -> Array:
        """Own heads of every device's part: [n, T, H / n, ...] of [T, H, ...]."""
        by_device = x.reshape(tokens, n, heads // n, *x.shape[2:])
        return jax.lax.all_to_all(by_device, axis_name, split_axis=1, concat_axis=0)

    merged = merge(*(exchange(x) for x in parts))
    whole = [jax.lax.all_gather(x, axis_name, axis=1, tiled=True, to="invarying") for x in merged]
    return whole[0], whole[1]
