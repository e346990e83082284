"""Routed experts on many devices: each has whole experts, and tokens go to them.

Device q of the product of the expert axes (in the order of the mesh) has the experts from q E_local on. Tokens differ
between devices of "data" alone. Over "context" and "tensor" each device computes its own experts for all tokens it
has, and results are summed. Over "data" tokens go where their experts are and their results come back, between devices
of the same "context" and "tensor" coordinates: a token crosses once for each device that has experts of it.

T tokens, D values of a token, k experts of a token, E experts, E_local of one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mesh_axes import spread, varying
from sparse_mla_jax._check import require
from sparse_mla_jax.parallel.axes import Parallel, divisors
from sparse_mla_jax.parallel.collectives import Slices, exchange_rows, gather_rows, scatter_sum, swap_rows

# Experts of one device: (x[T, D], weights float32[T, w], ids int32[T, w]) to float32[T, D]. Pairs of id E_local are of
# another device.
type Compute = Callable[[Array, Array, Array], Array]

# Where XLA has `ragged_all_to_all` and JAX names the platform. Elsewhere all tokens go to all devices.
RAGGED_PLATFORMS = ("cuda", "rocm")


def local_experts(num_experts: int, parallel: Parallel) -> int:
    """Experts of one device.

    Raises:
      ValueError: devices do not divide experts.
    """
    devices = parallel.expert
    product = " x ".join(f"{kind}={getattr(parallel, kind)}" for kind in parallel.experts)
    require(
        num_experts % devices == 0,
        f"parallel spreads {num_experts} experts over {devices} devices ({product}); expected a product that divides"
        f" {num_experts}: {divisors(num_experts)}. Change sizes, or Parallel.experts: () splits columns.",
    )
    return num_experts // devices


def partial_axes(parallel: Parallel) -> tuple[str, ...]:
    """Axes over which results of `own_experts` are still to be summed: "tensor", and "context" if it has experts."""
    return parallel.present("tensor", *(kind for kind in parallel.experts if kind != "data"))


def counted_once(x: Array, parallel: Parallel) -> Array:
    """`x`, a sum's part over "tensor" and the same over "context", so that a sum over `partial_axes` counts it once."""
    context = parallel.axis("context")
    if context is None or context not in partial_axes(parallel):
        return x
    return jnp.where(jax.lax.axis_index(context) == 0, x, jnp.zeros_like(x))


def own_experts(
    compute: Compute, x: Array, weights: Array, ids: Array, *, parallel: Parallel, num_experts: int
) -> Array:
    """What this device's experts add to its tokens, for use inside `jax.shard_map`.

    No token is dropped, and weights are those of the router. Where the backend has `ragged_all_to_all` (GPUs of NVIDIA
    and AMD), tokens go to the devices that have experts of theirs; its buffers have room for all tokens of all devices
    of "data". On other platforms all tokens go to all of these devices.

    If experts are spread and "tensor" is not among their axes, devices along it have the same experts: each computes
    every tensor-th token. If "context" is not among them, devices along it compute the same.

    Args:
      compute: this device's experts.
      x: [T, D], the same on all devices of "context" and "tensor".
      weights: float32[T, k].
      ids: int32[T, k], in [0, E).
      parallel: the axes.
      num_experts: E.

    Returns:
      float32[T, D], to be summed over `partial_axes`. It was rounded to x.dtype if it crossed devices.

    Raises:
      ValueError: devices do not divide experts.
    """
    count = local_experts(num_experts, parallel)
    numbers = _numbers(ids, count, parallel)
    data = parallel.axis("data") if "data" in parallel.experts else None
    if data is None:
        return compute(x, *_own_pairs(weights, numbers, 0, count))
    x, weights, numbers = spread((x, weights, numbers), frozenset({data}))
    ways = [functools.partial(way, compute, axis=data, count=count) for way in (_all_tokens, _ragged)]
    return jax.lax.platform_dependent(x, weights, numbers, default=ways[0], **dict.fromkeys(RAGGED_PLATFORMS, ways[1]))


def _numbers(ids: Array, count: int, parallel: Parallel) -> Array:
    """int32[T, k]: the number of an expert among those of the devices along "data"; -1 if it is not for this device.

    Devices along "data" that have the same other coordinates have `count` experts each, numbered from the first's on.
    """
    others = tuple(kind for kind in parallel.experts if kind != "data")
    inner = math.prod(getattr(parallel, kind) for kind in others)
    device = ids // count
    own = jnp.ones(ids.shape, bool)
    if inner > 1:
        own = device % inner == jax.lax.axis_index(parallel.present(*others))
    tensor = parallel.axis("tensor")
    if tensor is not None and "tensor" not in others:
        token = jnp.arange(ids.shape[0], dtype=jnp.int32)
        own &= (token % parallel.tensor == jax.lax.axis_index(tensor))[:, None]
    return jnp.where(own, device // inner * count + ids % count, -1)


def _own_pairs(weights: Array, numbers: Array, first: Array | int, count: int) -> tuple[Array, Array]:
    """(weights, ids) of the experts from `first` on: [T, min(k, count)], weight 0 and id `count` for other pairs."""
    ids = numbers - first
    own = (ids >= 0) & (ids < count)
    weights, ids = jnp.where(own, weights, 0), jnp.where(own, ids, count)
    if count >= ids.shape[1]:
        return weights, ids
    # A token has no more experts here than there are: the others' pairs, which come last, are left out.
    order = jnp.argsort(ids, axis=1, stable=True)[:, :count]
    return jnp.take_along_axis(weights, order, axis=1), jnp.take_along_axis(ids, order, axis=1)


def _all_tokens(compute: Compute, x: Array, weights: Array, numbers: Array, *, axis: str, count: int) -> Array:
    """All tokens go to all devices of the axis; the sums of results come back."""
    rows, weights, numbers = (gather_rows(part, axis) for part in (x, weights, numbers))
    out = compute(rows, *_own_pairs(weights, numbers, jax.lax.axis_index(axis) * count, count))
    return scatter_sum(out.astype(x.dtype), axis).astype(jnp.float32)


class _Journeys(NamedTuple):
    """Which tokens go where, for n devices of the axis and m = min(k, n).

    Attributes:
      token: int32[T m], tokens ordered by the device they go to, then by themselves; from the last one on any token.
      there: the slices with which they go; the rows of device j arrive from row j T on.
      back: the slices with which results return to the places that tokens came from.
      place: int32[T, m], places of a token in `token`, by ascending device; -1 for none.
    """

    token: Array
    there: Slices
    back: Slices
    place: Array


def _journeys(numbers: Array, axis: str, count: int) -> _Journeys:
    """Exchanges sizes between devices; everything else follows from the device's own tokens."""
    tokens, k = numbers.shape
    devices = jax.lax.axis_size(axis)
    most = min(k, devices)
    each = jnp.arange(devices, dtype=jnp.int32)
    # A division rounds -1 down to -1: no device.
    goes = (numbers // count)[:, :, None] == each
    goes = goes.any(axis=1)
    sizes = goes.sum(axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    token = jnp.argsort(~goes.T.reshape(-1), stable=True)[: tokens * most].astype(jnp.int32) % tokens
    theirs = swap_rows(jnp.stack([sizes, starts], axis=1), axis)
    arrive = varying(each * tokens, sizes)
    own = jnp.full_like(sizes, tokens) * jax.lax.axis_index(axis)
    place = jnp.where(goes, starts + jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1, -1)
    order = jnp.argsort(~goes, axis=1, stable=True)[:, :most]
    return _Journeys(
        token,
        Slices(starts, sizes, own, theirs[:, 0]),
        Slices(arrive, theirs[:, 0], theirs[:, 1], sizes),
        jnp.take_along_axis(place, order, axis=1),
    )


def _ragged(compute: Compute, x: Array, weights: Array, numbers: Array, *, axis: str, count: int) -> Array:
    """Tokens go to the devices of the axis that have experts of theirs, once to each; results come back."""
    k, devices = numbers.shape[1], jax.lax.axis_size(axis)
    plan = _journeys(numbers, axis, count)
    room = (devices * x.shape[0],)
    x, weights, numbers = (varying(part, numbers) for part in (x, weights, numbers))
    rows = x[plan.token]
    # Numbers of experts are exact in float32, far below 2**24, and so share a message with weights.
    pairs = jnp.concatenate([weights, numbers.astype(jnp.float32)], axis=1)[plan.token]

    def arrived(sent: Array, fill: int) -> Array:
        empty = varying(jnp.full(room + sent.shape[1:], fill, sent.dtype), sent)
        return exchange_rows(sent, empty, plan.there, axis)

    rows, pairs = arrived(rows, 0), arrived(pairs, -1)
    own = _own_pairs(pairs[:, :k], pairs[:, k:].astype(jnp.int32), jax.lax.axis_index(axis) * count, count)
    out = compute(rows, *own).astype(x.dtype)
    empty = varying(jnp.zeros((plan.token.shape[0], x.shape[1]), x.dtype), out)
    returned = exchange_rows(out, empty, plan.back, axis)
    # Adds in the order of devices: the sum does not depend on which message came first.
    terms = jnp.where((plan.place >= 0)[:, :, None], returned[jnp.maximum(plan.place, 0)], 0)
    return terms.astype(jnp.float32).sum(axis=1)


class ExpertTraffic(NamedTuple):
    """Bytes that one device sends in one layer, see `expert_traffic`.

    Attributes:
      summed: sum of the results over `partial_axes`.
      dense: all tokens to all devices of "data" and the sums back.
      ragged: tokens to their experts' devices and results back, if every token's experts are drawn at random.
      ragged_most: the same if every token has experts on as many other devices as it can.
    """

    summed: float
    dense: float
    ragged: float
    ragged_most: float


def expert_traffic(
    parallel: Parallel, *, tokens: int, hidden: int, num_experts: int, k: int, itemsize: int
) -> ExpertTraffic:
    """Bytes that one device sends in one layer with routed experts, for `tokens` tokens of each group of "data".

    With n = data (1 if experts are not spread over it), s devices of `partial_axes`, D = hidden, b = itemsize and
    m = 8 k bytes of weights and ids: summed 2 T D b (s - 1) / s; dense (n - 1) T (2 D b + m); ragged
    (n - 1) (T p (2 D b + m) + 8), p = 1 - C(E - E_local, k) / C(E, k) being the probability that a device has an expert
    of a token. If "tensor" has no experts, T / tensor takes the place of T in ragged.

    Args:
      parallel: the axes.
      tokens: T, rows of `x` on a device.
      hidden: D.
      num_experts: E.
      k: experts of a token.
      itemsize: bytes of a value of `x`.

    Raises:
      ValueError: devices do not divide experts.
    """
    count = local_experts(num_experts, parallel)
    summing = math.prod(getattr(parallel, kind) for kind in {"tensor", *parallel.experts} - {"data"})
    others = (parallel.data if "data" in parallel.experts else 1) - 1
    row = 2 * hidden * itemsize + 8 * k
    share = tokens / (1 if "tensor" in parallel.experts else parallel.tensor)
    chosen = 1 - math.comb(num_experts - count, k) / math.comb(num_experts, k)
    sizes = 8 * others
    return ExpertTraffic(
        summed=2 * tokens * hidden * itemsize * (summing - 1) / summing,
        dense=float(others * tokens * row),
        ragged=others * share * chosen * row + sizes,
        ragged_most=min(others, k) * share * row + sizes,
    )
