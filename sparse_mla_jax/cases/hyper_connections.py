"""Cases of hyper-connections: splitting and merging residual streams."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax import reference
from sparse_mla_jax.cases.answers import (
    relative,
)
from sparse_mla_jax.cases.case import Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    nbytes,
    sample,
    seed,
    take,
)
from sparse_mla_jax.cases.projections import _DECODE, _PREFILL, EXACT, FLASH, ROUNDED, _wide, _work, _worst
from sparse_mla_jax.layers.hyper_connections import join_streams, split_streams
from sparse_mla_jax.ops import hyper_connections

_SPLIT: dict[str, Any] = {"iterations": FLASH.hc_sinkhorn_iters, "eps": FLASH.hc_eps, "norm_eps": FLASH.rms_norm_eps}


_MERGE: dict[str, Any] = {"eps": FLASH.hc_eps, "norm_eps": FLASH.rms_norm_eps}


def _mixing_inputs(sizes: Mapping[str, int], number: int, columns: int) -> tuple[Array, ...]:
    """(streams bfloat16 [T, n, D], base [columns], scale [3 or 1], weight of the norm [D])."""
    n = sizes["streams"]
    streams = jax.random.normal(seed(30, number), (sizes["tokens"], n, sizes["hidden"]), jnp.bfloat16)
    vectors = columns, 3 if columns > n else 1, sizes["hidden"]
    base, scale, norm = (
        jax.random.normal(seed(31 + i, number), (size,), jnp.float32) for i, size in enumerate(vectors)
    )
    return streams, base, scale, 1 + 0.1 * norm


def _streams(sizes: Mapping[str, int], flavour: str, query: str, *, split: bool) -> Work:
    """The kernel: the sub-layer's input from the streams and their product with `fn`, in 32 splits as in the layer.

    `split`: also the weights and the mixing matrices.
    """
    del flavour, query
    tokens, n = sizes["tokens"], sizes["streams"]
    columns = n * (n + 2) if split else n

    def each(number):
        streams, *rest = _mixing_inputs(sizes, number, columns)
        return streams, jax.random.normal(seed(34, number), (32, tokens, columns), jnp.float32) / 32**0.5, *rest

    def fn(streams, product, base, scale, norm, *, implementation=None):
        op, how = (hyper_connections.split, _SPLIT) if split else (hyper_connections.merge, _MERGE)
        return op(streams, product, base, scale, norm=norm, implementation=implementation, **how)

    def error(arguments, got):
        streams, product, base, scale, norm = arguments
        some = sample(tokens)
        wide = _wide(take(streams, some), np.asarray(product)[:, some].astype(np.float64).sum(0), base, scale, norm)
        with jax.enable_x64(True):
            inputs = [jnp.asarray(x) for x in wide]
            if not split:
                joined = reference.merge_streams(*inputs, **_MERGE, dtype=jnp.float64)
                return relative(take(got, some), joined) / ROUNDED
            want = reference.split_streams(*inputs, **_SPLIT, dtype=jnp.float64)
            return _worst([take(x, some) for x in got], want, (ROUNDED, EXACT, EXACT))

    return _work(fn, each, 0, error, 1.0)


def _around(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """A whole hyper-connection: the product with `fn`, the sub-layer's input, and its output added to mixed streams."""
    del flavour, query
    tokens, n, hidden = sizes["tokens"], sizes["streams"], sizes["hidden"]
    columns = n * (n + 2)

    def each(number):
        streams, base, scale, norm = _mixing_inputs(sizes, number, columns)
        matrix = jax.random.normal(seed(35, number), (n * hidden, columns), jnp.float32) / (n * hidden) ** 0.5
        out = jax.random.normal(seed(36, number), (tokens, hidden), jnp.bfloat16)
        return {"fn": matrix, "base": base, "scale": scale}, streams, out, norm

    def fn(params, streams, out, norm, *, implementation=None):
        joined, weights = split_streams(params, streams, config=FLASH, norm=norm, implementation=implementation)
        return joined, join_streams(streams, out, weights)

    def error(arguments, got):
        params, streams, out, norm = arguments
        some = sample(tokens)
        matrix, base, scale, norm, wide, out = _wide(
            *(params[name] for name in ("fn", "base", "scale")), norm, *(take(x, some) for x in (streams, out))
        )
        with jax.enable_x64(True):
            inputs = (jnp.asarray(x) for x in (wide, wide.reshape(len(some), -1) @ matrix, base, scale, norm))
            joined, writes, mixing = map(np.asarray, reference.split_streams(*inputs, **_SPLIT, dtype=jnp.float64))
        mixed = writes[:, :, None] * out[:, None] + np.einsum("tij,tid->tjd", mixing, wide)
        return _worst([take(x, some) for x in got], (joined, mixed), (ROUNDED, ROUNDED))

    return _work(fn, each, 2 * tokens * n * hidden * columns, error, 1.0)


def streams_cases() -> Iterator[Case]:
    """Hyper-connections: the kernel alone, a whole hyper-connection, and the merge before the output head."""
    forms: dict[str, Any] = {
        "split": functools.partial(_streams, split=True),
        "sublayer": _around,
        "merge": functools.partial(_streams, split=False),
    }
    for form, make in forms.items():
        for tokens in (1, *_DECODE, _PREFILL):
            sizes = {"tokens": tokens, "streams": FLASH.hc_mult, "hidden": FLASH.hidden_size}
            yield Case(f"streams-{form}-t{tokens}", "streams", sizes, make, ("",))


def _kernel_split_streams(kind: str, heads: int | None, *, width: int, iterations: int | None) -> KernelProblem:
    """Two tokens of four streams, bfloat16, with the product in 32 splits as in the layer; None: no matrix."""
    del kind, heads
    rng = np.random.default_rng(6)
    columns, factors = (8, 2) if iterations is None else (24, 3)
    shapes = (2, 4, width), (32, 2, columns), (columns,), (factors,), (width,)
    streams, product, base, scale, norm = (jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes)
    args = (streams.astype(jnp.bfloat16), product / math.sqrt(32), base, scale, norm)
    constants: Any = dict(iterations=iterations, eps=1e-6, norm_eps=1e-6)
    if iterations is None:
        constants |= dict(writes_eps=1e-6)
    with jax.enable_x64(True):
        wide, parts, *weights = (jnp.asarray(np.asarray(x, np.float64)) for x in args)
        results = reference.split_streams(wide, parts.sum(0), *weights, **constants, dtype=jnp.float64)
        want = [np.asarray(x) for x in results]

    def fn(streams, product, base, scale, norm, *, implementation="triton", plan=None):
        return hyper_connections.split(
            streams, product, base, scale, norm=norm, implementation=implementation, plan=plan, **constants
        )

    def error(got):
        """Largest error of a result over its bound."""
        allowed = (2e-3, 1e-6, 1e-6)[: len(want)]
        return max(relative(a, b) / most for a, b, most in zip(jax.tree.leaves(got), want, allowed, strict=True))

    return KernelProblem(fn, args, error, 1.0, nbytes(args) + 2 * want[0].size + 4 * sum(x.size for x in want[1:]))


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "split_streams",
        "DeepSeek-V4: 2 tokens of 4 streams of 4096, product in 32 parts, 20 iterations, norm",
        functools.partial(_kernel_split_streams, width=4096, iterations=20),
        kinds=(),
    ),
    KernelCase(
        "split_streams_independent",
        "Hy4-preview: 2 tokens of 4 streams of 2816, product in 32 parts, no matrix, norm",
        functools.partial(_kernel_split_streams, width=2816, iterations=None),
        kinds=(),
    ),
    KernelCase(
        "split_streams_independent_wide",
        "Hy4: 2 tokens of 4 streams of 6144, product in 32 parts, no matrix, norm",
        functools.partial(_kernel_split_streams, width=6144, iterations=None),
        kinds=(),
    ),
)
