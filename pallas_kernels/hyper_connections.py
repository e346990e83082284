"""Splits n residual streams into a sub-layer's input and the weights of its output; merges streams before the head.

One program handles one token, or a few. It holds the streams of a token in registers, computes their root mean square,
sums them with the token's weights and may normalise the sum, all in one pass over memory. The mixing matrices of a
program's tokens form one tile, so Sinkhorn's iteration stays in registers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels._call import call, load, store_masked, sum_in_order
from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.hyper_connections import HyperConnectionPlan, hyper_connection_plan
from pallas_kernels.targets import Target, by_target
from pallas_kernels.tiles import power_of_two

_TYPES = ("bfloat16", "float32")
_LOWEST = float(np.finfo(np.float32).min)
# Limits: a token's padded values fit the registers of a program; a mixing matrix fits a wave.
MOST_VALUES, MOST_STREAMS = 2**16, 16


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes: tokens T, streams n of width D, partial sums S of the product, its columns O."""

    tokens: int
    streams: int
    width: int
    parts: int
    columns: int


@dataclasses.dataclass(frozen=True)
class _Constants:
    """Static numbers of the formulas; see `split`."""

    iterations: int | None
    eps: float
    norm_eps: float
    magnitude: float
    writes_eps: float


# --- arithmetic
def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _entry(ref, sizes: _Sizes, token: Array, column: int) -> Array:
    """One entry of the product, float32 scalar: adds its S partial sums."""
    part = jnp.arange(power_of_two(sizes.parts), dtype=jnp.int32)
    view = ref.at[part * sizes.tokens + token, jnp.full_like(part, column)]
    full = part.shape[0] == sizes.parts
    return jnp.sum(load(view) if full else load(view, mask=part < sizes.parts, other=0.0), axis=0)


def _entries(ref, sizes: _Sizes, token: Array, column: Array) -> Array:
    """Entries of the product at the index tiles `token` and `column`: adds S partial sums each."""
    # Add the partial sums one by one. A reduction over a [parts, ...] tile would spread the rows over waves, for this
    # tile and all later ones.
    parts = [load(ref.at[part * sizes.tokens + token, column]) for part in range(sizes.parts)]
    return functools.reduce(jnp.add, parts)


def _sinkhorn(logits: Array, exists: Array, column: Array, iterations: int, eps: float, target: Target) -> Array:
    """Sinkhorn's normalisation: scales exp(logits)[b, rows, columns] to rows and columns of sum 1; padding is 0.

    exists, column: entries and columns that are not padding. Logits of padded rows must be finite.
    """
    total = functools.partial(sum_in_order, target=target)
    logits = jnp.where(column, logits, _LOWEST)
    weights = jnp.where(column, jnp.exp(logits - jnp.max(logits, axis=2)[:, :, None]), 0.0)
    mixing = jnp.where(exists, weights / total(weights, 2)[:, :, None] + eps, 0.0)

    def by_columns(mixing: Array) -> Array:
        return mixing / (total(mixing, 1)[:, None, :] + eps)

    def once(_: Any, mixing: Array) -> Array:
        return by_columns(mixing / (total(mixing, 2)[:, :, None] + eps))

    return lax.fori_loop(0, iterations - 1, once, by_columns(mixing))


# --- kernel
def _row(refs, sizes: _Sizes, token: Array, eps: float, norm_eps: float, target: Target) -> Array:
    """Stores the sub-layer's input of one token; returns the reciprocal root mean square of its streams."""
    streams_ref, product_ref, base_ref, scale_ref, norm_ref, joined_ref = refs
    n, width = sizes.streams, sizes.width
    column = jnp.arange(power_of_two(width), dtype=jnp.int32)
    exists = None if column.shape[0] == width else column < width

    def row(ref, *at):
        view = ref.at[at]
        values = load(view) if exists is None else load(view, mask=exists, other=0)
        return values.astype(jnp.float32)

    here = jnp.full_like(column, token)
    streams = [row(streams_ref, here, i * width + column) for i in range(n)]
    squares = functools.reduce(jnp.add, [x * x for x in streams])
    scale = lax.rsqrt(jnp.sum(squares, axis=0) * (1.0 / (n * width)) + norm_eps)

    def weight(i: int) -> Array:
        return _sigmoid(_entry(product_ref, sizes, token, i) * scale * scale_ref[0] + base_ref[i]) + eps

    joined = functools.reduce(jnp.add, [weight(i) * x for i, x in enumerate(streams)])
    if norm_ref is not None:
        mean = jnp.sum(joined * joined, axis=0) * (1.0 / width)
        joined = joined * lax.rsqrt(mean + norm_eps) * row(norm_ref, column)
    store_masked(joined_ref, (here, column), joined.astype(joined_ref.dtype), exists, target)
    return scale


def _weights(refs, sizes: _Sizes, first: Array, scales: Array, constants: _Constants, target: Target) -> None:
    """Stores the output weights, and mixing matrices if there are any, of the tokens from `first` on.

    scales: reciprocal root mean squares of the tokens [b], a scalar for one token.
    """
    product_ref, base_ref, scale_ref, writes_ref, *mixing_refs = refs
    n, side = sizes.streams, power_of_two(sizes.streams)
    block = 1 if scales.ndim == 0 else scales.shape[0]
    # Padding repeats the last token and stores the same bits.
    token = jnp.minimum(first + jnp.arange(block, dtype=jnp.int32), sizes.tokens - 1)
    stream = jnp.arange(side, dtype=jnp.int32)

    def logits(token: Array, column: Array, scale: Array, number: int) -> Array:
        product = _entries(product_ref, sizes, token, column)
        return product * scale * scale_ref[number] + load(base_ref.at[column])

    def put(ref, token: Array, at: Array, exists: Array, values: Array) -> None:
        store_masked(ref, (token, at), values, None if side == n else exists, target)

    at, column = jnp.broadcast_arrays(token[:, None], stream[None, :])
    exists = column < n
    values = logits(at, jnp.where(exists, n + column, n), scales if block == 1 else scales[:, None], 1)
    writes = constants.magnitude * _sigmoid(values)
    put(writes_ref, at, column, exists, writes + constants.writes_eps if constants.writes_eps else writes)
    if constants.iterations is None:
        return

    shape = (block, side, side)
    at, row, column = (
        jnp.broadcast_to(x, shape) for x in (token[:, None, None], stream[None, :, None], stream[None, None, :])
    )
    exists, entry = (row < n) & (column < n), row * n + column
    values = logits(at, 2 * n + jnp.where(exists, entry, 0), scales if block == 1 else scales[:, None, None], 2)
    mixing = _sinkhorn(values, exists, column < n, constants.iterations, constants.eps, target)
    put(mixing_refs[0], at, entry, exists, mixing)


def _kernel(*refs, sizes: _Sizes, constants: _Constants, normed: bool, plan: HyperConnectionPlan, target: Target):
    """Grid (ceil(tokens / plan.tokens),). refs: streams, product, base, scale, norm if given, results.

    Results: joined [T, D], then writes [T, n] and mixing [T, n * n] if the product has columns for them.
    """
    eps, norm_eps = constants.eps, constants.norm_eps
    if not normed:
        refs = (*refs[:4], None, *refs[4:])
    first = pl.program_id(0) * plan.tokens
    if plan.tokens == 1:
        scales = _row(refs[:6], sizes, first, eps, norm_eps, target)
    else:
        number = jnp.arange(plan.tokens, dtype=jnp.int32)

        def once(i, scales):
            token = jnp.minimum(first + i, sizes.tokens - 1)
            return jnp.where(number == i, _row(refs[:6], sizes, token, eps, norm_eps, target), scales)

        scales = lax.fori_loop(0, plan.tokens, once, jnp.zeros(plan.tokens, jnp.float32))
    if sizes.columns > sizes.streams:
        _weights([*refs[1:4], *refs[6:]], sizes, first, scales, constants, target)


# --- launch
def split(
    streams: Array,
    product: Array,
    base: Array,
    scale: Array,
    norm: Array | None,
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
    magnitude: float = 2.0,
    writes_eps: float = 0.0,
    plan: HyperConnectionPlan | None = None,
) -> list[Array]:
    """Returns joined [T, D] in streams.dtype, and as far as asked writes float32 [T, n] and mixing float32 [T, n, n].

    Args:
      streams: bfloat16 or float32 [T, n, D], T at least 1.
      product: float32 [S, T, O]; its sum over S is flat(streams) @ fn. O is n for joined only, 2 * n with writes, and
        n * (n + 2) with mixing too.
      base: float32 [O].
      scale: float32 [1], [2] or [3].
      norm: [D], weight of an RMS norm of the weighted sum; None: no norm.
      iterations: of Sinkhorn's normalisation; None without mixing.
      eps, norm_eps: epsilons of the weights and of the norms.
      magnitude, writes_eps: the writes are magnitude * sigmoid(...) + writes_eps.
      plan: None for the heuristic plan.

    Raises:
      NotImplementedError: types that the kernel does not support, or a token with more values than registers hold.
    """
    tokens, n, width = streams.shape
    if streams.dtype.name not in _TYPES:
        raise NotImplementedError(f"streams are {streams.dtype}; the kernel reads {', '.join(_TYPES)}")
    if n > MOST_STREAMS or n * power_of_two(width) > MOST_VALUES:
        raise NotImplementedError(
            f"{n} streams of {width} values; a program holds {MOST_STREAMS} streams and {MOST_VALUES} values at most"
        )
    sizes = _Sizes(tokens, n, width, product.shape[0], product.shape[2])
    constants = _Constants(iterations, eps, norm_eps, magnitude, writes_eps)
    more = [] if sizes.columns == n else [n] if iterations is None else [n, n * n]

    def run(target, *arrays):
        chosen = choose_plan("split_streams", plan, hyper_connection_plan, tokens=tokens, width=width, target=target)
        out = [jax.ShapeDtypeStruct((tokens, width), streams.dtype)]
        out += [jax.ShapeDtypeStruct((tokens, k), jnp.float32) for k in more]
        given = dict(sizes=sizes, constants=constants, normed=norm is not None, plan=chosen, target=target)
        return call(
            functools.partial(_kernel, **given),
            *arrays,
            out_shape=out,
            grid=(-(-tokens // chosen.tokens),),
            name="split_streams" if more else "merge_streams",
            target=target,
            num_warps=chosen.num_warps,
        )

    flat = streams.reshape(tokens, n * width), product.reshape(-1, product.shape[2])
    joined, *rest = by_target(run, *flat, base, scale, *([] if norm is None else [norm]))
    return [joined, *rest[:1], *(mixing.reshape(tokens, n, n) for mixing in rest[1:])]
