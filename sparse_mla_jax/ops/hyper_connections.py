"""Manifold-constrained hyper-connections: the input of a sub-layer from n residual streams, and the mixing weights.

Takes the streams and their matrix product with `fn`. Gives the sub-layer's input, the weights with which its output is
added to the streams, and a doubly stochastic mixing matrix per token: one launch on a GPU. Independent
hyper-connections (Hy4) have no matrix. T tokens, n streams, D values of a stream. Sources: mHC (arXiv:2512.24880),
hyper-connections (arXiv:2409.19606); formulas and constants are DeepSeek-V4's and Hy4's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import hyper_connections as kernel
from pallas_kernels.plans.hyper_connections import HyperConnectionPlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import describe, require
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import check_implementation, dispatch, with_plan


def split(
    streams: Array,
    product: Array,
    base: Array,
    scale: Array,
    *,
    iterations: int | None,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    magnitude: float = 2.0,
    writes_eps: float = 0.0,
    norm: Array | None = None,
    implementation: str | None = None,
    plan: HyperConnectionPlan | None = None,
    config: HyperConnectionPlan | None = None,
) -> tuple[Array, Array, Array | None]:
    """The sub-layer's input, the weights of its output, and the matrix that mixes the streams, if there is one.

    With z = product / rms(all n * D values of the token), float32 throughout:

        input = sum_i (sigmoid(scale[0] z_i + base_i) + eps) streams_i
        weight_j = magnitude sigmoid(scale[1] z_(n+j) + base_(n+j)) + writes_eps, of the output added to stream j
        mixing = doubly_stochastic(last n * n columns of scale[2] z + base, row by row)

    A token's results do not depend on other tokens.

    Args:
      streams: floating [T, n, D].
      product: float32 [T, O], flat(streams) @ fn, without a norm; or [S, T, O], whose sum over S is that product (from
        a matrix product split over its inner dimension). O is n * (n + 2), or 2 * n without a matrix.
      base: floating [O].
      scale: floating [3], or [2] without a matrix.
      iterations: of Sinkhorn's normalisation, at least 1 (static). None: no matrix, as in Hy4, whose streams are never
        mixed.
      eps: added to the weights of the input, to the matrix entries and to the sums by which they are divided.
      norm_eps: added to mean squares, here and in `norm`.
      magnitude, writes_eps: factor and summand of the output's weights (static).
      norm: [D] weight of an RMS norm of the input, applied before rounding; None for no norm.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      (input [T, D] in streams.dtype, weights float32 [T, n], mixing float32 [T, n, n] or None).

    Raises:
      ValueError: types or shapes other than these, iterations below 1, or an implementation that does not support
        the case.
    """
    implementation, plan = with_plan(implementation, plan, config, HyperConnectionPlan)
    arrays = _as_arrays(streams, product, base, scale, norm, factors=2 if iterations is None else 3)
    streams, product, base, scale, norm = arrays
    if iterations is not None:
        hint = "The first division by columns is one, so pass at least 1, or None for no matrix."
        iterations = _check.size("iterations", iterations, hint=hint)
    tokens, n, width = streams.shape
    if tokens == 0:
        check_implementation(implementation)
        mixing = None if iterations is None else jnp.zeros((0, n, n))
        return jnp.zeros((0, width), streams.dtype), jnp.zeros((0, n)), mixing
    constants: dict[str, Any] = {"iterations": iterations, "eps": eps, "norm_eps": norm_eps}
    constants |= {"magnitude": magnitude, "writes_eps": writes_eps}

    def reference_body() -> tuple[Array, ...]:
        joined, *weights = reference.split_streams(streams, product.sum(0), base, scale, norm, **constants)
        return joined.astype(streams.dtype), *weights

    joined, writes, *mixings = dispatch(
        "split_streams",
        implementation,
        {
            "triton": lambda: with_derivative_of(
                partial(_xla_split, **constants), partial(kernel.split, plan=plan, **constants), *arrays
            ),
            "xla": lambda: _xla_split(*arrays, **constants),
            "reference": reference_body,
        },
    )
    return joined, writes, mixings[0] if mixings else None


def merge(
    streams: Array,
    product: Array,
    base: Array,
    scale: Array,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    norm: Array | None = None,
    implementation: str | None = None,
    plan: HyperConnectionPlan | None = None,
    config: HyperConnectionPlan | None = None,
) -> Array:
    """The weighted sum of the streams, as the output head reads it: the first result of `split`.

    Args:
      streams: floating [T, n, D].
      product: float32 [T, n] or [S, T, n], see `split`.
      base: floating [n].
      scale: floating [1].
      eps, norm_eps, norm, implementation, plan, config: as in `split`.

    Returns:
      [T, D] in streams.dtype.

    Raises:
      ValueError: types or shapes other than these, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, HyperConnectionPlan)
    arrays = _as_arrays(streams, product, base, scale, norm, factors=1)
    streams, product, base, scale, norm = arrays
    if streams.shape[0] == 0:
        check_implementation(implementation)
        return jnp.zeros((0, streams.shape[2]), streams.dtype)
    constants: dict[str, Any] = {"eps": eps, "norm_eps": norm_eps}

    def kernel_body(*arrays: Any) -> Array:
        return kernel.split(*arrays, iterations=None, plan=plan, **constants)[0]

    def xla_body(streams: Array, product: Array, base: Array, scale: Array, norm: Array | None) -> Array:
        return _read(streams, _normed(streams, product, norm_eps), base, scale[0], norm, **constants)

    def reference_body() -> Array:
        return reference.merge_streams(streams, product.sum(0), base, scale, norm, **constants).astype(streams.dtype)

    return dispatch(
        "merge_streams",
        implementation,
        {
            "triton": lambda: with_derivative_of(xla_body, kernel_body, *arrays),
            "xla": lambda: xla_body(*arrays),
            "reference": reference_body,
        },
    )


def doubly_stochastic(logits: Array, *, iterations: int, eps: float) -> Array:
    """exp(logits)[..., n, n] scaled to rows and columns of sum 1 by Sinkhorn's iteration (float32, XLA).

    Args:
      logits: [..., n, n].
      iterations: divisions by rows and by columns; the first division by rows is a softmax.
      eps: added to the entries once and to every sum.

    Returns:
      float32[..., n, n]; columns sum to 1 (up to eps), rows nearly.

    Raises:
      ValueError: iterations below 1, or logits whose last two axes differ.
    """
    iterations = _check.size("iterations", iterations)
    logits = _check.floats("logits", logits, ..., "n", "n")
    require(logits.shape[-1] == logits.shape[-2], f"logits is {describe(logits)}; expected [..., n, n].")
    mixing = jax.nn.softmax(logits, axis=-1) + eps
    mixing = mixing / (mixing.sum(axis=-2, keepdims=True) + eps)

    def once(_: Array, mixing: Array) -> Array:
        mixing = mixing / (mixing.sum(axis=-1, keepdims=True) + eps)
        return mixing / (mixing.sum(axis=-2, keepdims=True) + eps)

    # Keep the loop: unrolled, it becomes one fusion that XLA compiles for half a minute.
    return jax.lax.fori_loop(0, iterations - 1, once, mixing)


# --- validation
def _as_arrays(
    streams: Array, product: Array, base: Array, scale: Array, norm: Array | None, *, factors: int
) -> tuple[Array, Array, Array, Array, Array | None]:
    """The arguments as arrays that fit together: product as [S, T, O], base and scale[factors] as float32."""
    streams = _check.array("streams", streams, jnp.floating, "T", "n", "D")
    product = _check.array("product", product, jnp.floating, ...)
    tokens, n, width = streams.shape
    require(min(n, width) >= 1, f"streams is {describe(streams)}; expected n and D of at least 1.")
    columns = (n, 2 * n, n * (n + 2))[factors - 1]
    fits = product.shape == (tokens, columns) or (product.ndim == 3 and product.shape[1:] == (tokens, columns))
    fits = fits and (product.ndim == 2 or product.shape[0] >= 1)
    require(
        fits and product.dtype == jnp.float32,
        f"product is {describe(product)}; streams {list(streams.shape)} need"
        f" float32[{tokens}, {columns}], or parts [S, {tokens}, {columns}]: flat(streams) @ fn in float32.",
    )
    hint = f"Give the weights of this sub-layer, whose streams are {list(streams.shape)}."
    base = _check.floats("base", base, columns, hint=hint)
    scale = _check.floats("scale", scale, factors, hint=hint)
    norm = None if norm is None else _check.array("norm", norm, jnp.floating, width, hint=hint)
    return streams, product if product.ndim == 3 else product[None], base, scale, norm


# --- XLA body
def _normed(streams: Array, product: Array, norm_eps: float) -> Array:
    """z float32 [T, O]: the summed product, divided by the root mean square of the token's streams."""
    wide = streams.astype(jnp.float32)
    return product.sum(0) * jax.lax.rsqrt(jnp.mean(wide * wide, axis=(1, 2)) + norm_eps)[:, None]


def _read(
    streams: Array, z: Array, base: Array, scale: Array, norm: Array | None, *, eps: float, norm_eps: float
) -> Array:
    """The weighted sum of the streams, then the norm if given: [T, D] in streams.dtype."""
    weights = jax.nn.sigmoid(z * scale + base) + eps
    # Elementwise instead of a matrix product: n is 4.
    joined = jnp.sum(weights[:, :, None] * streams.astype(jnp.float32), axis=1)
    if norm is not None:
        mean = jnp.mean(joined * joined, axis=-1, keepdims=True)
        joined = joined * jax.lax.rsqrt(mean + norm_eps) * norm.astype(jnp.float32)
    return joined.astype(streams.dtype)


def _xla_split(
    streams: Array,
    product: Array,
    base: Array,
    scale: Array,
    norm: Array | None,
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
    magnitude: float,
    writes_eps: float,
) -> tuple[Array, ...]:
    n = streams.shape[1]
    z = _normed(streams, product, norm_eps)
    joined = _read(streams, z[:, :n], base[:n], scale[0], norm, eps=eps, norm_eps=norm_eps)
    writes = magnitude * jax.nn.sigmoid(z[:, n : 2 * n] * scale[1] + base[n : 2 * n]) + writes_eps
    if iterations is None:
        return joined, writes
    logits = z[:, 2 * n :] * scale[2] + base[2 * n :]
    return joined, writes, doubly_stochastic(logits.reshape(-1, n, n), iterations=iterations, eps=eps)
