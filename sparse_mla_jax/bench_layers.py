"""Cases of what a layer does around attention: hyper-connections, norms and rotations, the output projection.

Sizes are those of DeepSeek-V4-Flash, or of DeepSeek-V3.2 where the name says so: a decode step of a few requests, and
the prefill of a long chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax import reference
from sparse_mla_jax.bench_work import Case, Work, nbytes, relative, sample, seed, take
from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32
from sparse_mla_jax.kernel_cases import FP8, finished_answer, finished_error, v32_hidden_parts, v32_query_parts
from sparse_mla_jax.layers.hyper_connections import join_streams, split_streams
from sparse_mla_jax.ops import hyper_connections
from sparse_mla_jax.ops.norm_rope import Part, norm_rope
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.rope import rope_frequencies

FLASH = DEEPSEEK_V4_FLASH
# Errors of what is rounded to bfloat16 (1.65e-3 by that alone), and of float32 results of products and of weights.
ROUNDED, EXACT = 2e-3, 2e-5


def _work(
    fn: Callable[..., Any],
    each: Callable[[int], tuple[Any, ...]],
    flops: int,
    error: Callable[[tuple[Any, ...], Any], float],
    bound: float,
) -> Work:
    """A case that reads all of its arguments once, and writes all of its results."""
    inputs = jax.eval_shape(lambda: each(0))
    return Work(fn, each, nbytes(inputs, jax.eval_shape(fn, *inputs)), flops, error, bound)


def _wide(*arrays: Any) -> tuple[np.ndarray, ...]:
    """The same values in float64, on the host."""
    return tuple(np.asarray(a).astype(np.float64) for a in arrays)


def _worst(got: Any, want: Any, allowed: tuple[float, ...]) -> float:
    """Largest error of several results over what is allowed of each."""
    return max(relative(a, b) / most for a, b, most in zip(got, want, allowed))


# --- hyper-connections -----------------------------------------------------------------------------------------------
_SPLIT: dict[str, Any] = {"iterations": FLASH.hc_sinkhorn_iters, "eps": FLASH.hc_eps, "norm_eps": FLASH.rms_norm_eps}
_MERGE: dict[str, Any] = {"eps": FLASH.hc_eps, "norm_eps": FLASH.rms_norm_eps}


def _mixing_inputs(sizes: Mapping[str, int], number: int, columns: int) -> tuple[Array, ...]:
    """(streams bfloat16 [T, n, D], base [columns], scale [3 or 1], weight of the norm [D])."""
    n = sizes["streams"]
    streams = jax.random.normal(seed(30, number), (sizes["tokens"], n, sizes["hidden"]), jnp.bfloat16)
    vectors = columns, 3 if columns > n else 1, sizes["hidden"]
    base, scale, norm = (jax.random.normal(seed(31 + i, number), (size,)) for i, size in enumerate(vectors))
    return streams, base, scale, 1 + 0.1 * norm


def _streams(sizes: Mapping[str, int], flavour: str, query: str, *, split: bool) -> Work:
    """The kernel: streams and their product with `fn`, in 32 parts as the layer leaves it, to what a sub-layer reads.

    `split` also gives the weights and matrices with which the sub-layer's output goes back.
    """
    del flavour, query
    tokens, n = sizes["tokens"], sizes["streams"]
    columns = n * (n + 2) if split else n

    def each(number):
        streams, *rest = _mixing_inputs(sizes, number, columns)
        return streams, jax.random.normal(seed(34, number), (32, tokens, columns)) / np.sqrt(32), *rest

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
    """All of a sub-layer's hyper-connection: the product, what the sub-layer reads, its output into mixed streams."""
    del flavour, query
    tokens, n, hidden = sizes["tokens"], sizes["streams"], sizes["hidden"]
    columns = n * (n + 2)

    def each(number):
        streams, base, scale, norm = _mixing_inputs(sizes, number, columns)
        matrix = jax.random.normal(seed(35, number), (n * hidden, columns)) / np.sqrt(n * hidden)
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


# --- output projection -----------------------------------------------------------------------------------------------
def _rotated(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Attention's result turned back and through the matrices of its groups, which no call finds in a cache."""
    del flavour, query
    tokens, heads, rank, groups = sizes["tokens"], sizes["heads"], sizes["o_rank"], FLASH.o_groups
    inner = heads // groups * FLASH.head_dim
    frequencies = rope_frequencies(FLASH.compress_rope, FLASH.qk_rope_head_dim)

    def each(number):
        out = jax.random.normal(seed(37, number), (tokens, heads, FLASH.head_dim), jnp.bfloat16)
        weight = jax.random.normal(seed(38, number), (groups, inner, rank), jnp.bfloat16)
        return out, weight, jax.random.randint(seed(39, number), (tokens,), 0, 1 << 17, jnp.int32)

    def fn(out, weight, positions, *, implementation=None):
        return rotated_projection(out, weight, positions, frequencies, implementation=implementation)

    def error(arguments, got):
        out, weight, positions = arguments
        some = sample(tokens)
        angles = take(positions, some).astype(np.float32)[:, None] * np.asarray(frequencies, np.float32)
        with jax.enable_x64(True):
            inputs = (jnp.asarray(x) for x in _wide(take(out, some), weight, angles))
            want = reference.rotated_projection(*inputs, dtype=jnp.float64)
            return relative(take(got, some), want)

    return _work(fn, each, 2 * tokens * groups * inner * rank, error, ROUNDED)


# --- norms and rotations ---------------------------------------------------------------------------------------------
def _v4_parts(form: str, heads: int, vector: Callable[[int], Array]) -> tuple[Part, ...]:
    """DeepSeek-V4's parts as its layer finishes them.

    "hidden": the query's low-rank form and the key, without what is only taken apart; "query": heads, divided by their
    root mean square, and indexer.
    """
    c = FLASH
    part = functools.partial(Part, dtype="bfloat16", interleaved=True)
    if form == "hidden":
        key = part(c.q_lora_rank, 1, c.head_dim, dtype="float32", weight=vector(c.head_dim), rotated=c.nope_dim)
        return part(0, 1, c.q_lora_rank, weight=vector(c.q_lora_rank)), key
    start, rotated = heads * c.head_dim, c.index_head_dim - c.qk_rope_head_dim
    return (
        part(0, heads, c.head_dim, weight=jnp.ones(c.head_dim), rotated=c.nope_dim),
        part(start, c.index_n_heads, c.index_head_dim, rotated=rotated),
    )


def _finished(sizes: Mapping[str, int], flavour: str, query: str, *, model: str, form: str) -> Work:
    """`norm_rope` of one projection of a layer: what stands between two of its products; cosines and sines included."""
    del flavour
    tokens, heads = sizes["tokens"], sizes.get("heads", 0)
    config = DEEPSEEK_V32 if model == "v32" else FLASH
    rope = config.rope if model == "v32" else FLASH.compress_rope
    frequencies = rope_frequencies(rope, config.qk_rope_head_dim)

    def parts(number):
        def vector(size):
            return 1 + 0.1 * jax.random.normal(seed(40 + size, number), (size,))

        if model == "v4":
            return _v4_parts(form, heads, vector)
        if form == "hidden":
            return v32_hidden_parts(vector, "bfloat16")
        factor = 1 + jax.random.uniform(seed(41, number), (tokens, config.index_n_heads)) if query in FP8 else None
        return v32_query_parts(heads, "bfloat16", query, factor)

    def each(number):
        mine = parts(number)
        width = max(part.start + part.columns for part in mine)
        # The sum of a product is float32; V3.2 rounds that of its queries before they are finished.
        dtype = jnp.bfloat16 if (model, form) == ("v32", "query") else jnp.float32
        positions = jax.random.randint(seed(42, number), (tokens,), 0, config.max_position_embeddings, jnp.int32)
        return jax.random.normal(seed(43, number), (tokens, width), dtype), mine, positions

    def fn(x, parts, positions, *, implementation=None):
        return norm_rope(x, parts, positions, frequencies, implementation=implementation)

    def error(arguments, got):
        x, mine, positions = arguments
        some, worst = sample(tokens), 0.0
        x, positions = take(x, some), take(positions, some)
        angles = positions.astype(np.float32)[:, None] * np.asarray(frequencies, np.float32)
        for part, result in zip(mine, got):
            if part.factor is not None:
                part = dataclasses.replace(part, factor=take(part.factor, some))
            result = jax.tree.map(lambda a: take(a, some), result)
            worst = max(worst, finished_error(part, result, finished_answer(x, part, angles)))
        return worst

    return _work(fn, each, 0, error, 1.0)


# --- the list --------------------------------------------------------------------------------------------------------
# A decode step of a few requests, and the prefill of a chunk.
_DECODE, _PREFILL = (32, 128), 4096


def streams_cases() -> Iterator[Case]:
    """Hyper-connections: the kernel by itself, all that surrounds a sub-layer, the sum that the output head reads."""
    forms: dict[str, Any] = {
        "split": functools.partial(_streams, split=True),
        "sublayer": _around,
        "merge": functools.partial(_streams, split=False),
    }
    for form, make in forms.items():
        for tokens in (1, *_DECODE, _PREFILL):
            sizes = {"tokens": tokens, "streams": FLASH.hc_mult, "hidden": FLASH.hidden_size}
            yield Case(f"streams-{form}-t{tokens}", "streams", sizes, make, ("",))


def projection_cases() -> Iterator[Case]:
    """What stands before and behind a layer's products: norms and rotations, and the inverse rotation into one."""
    for tokens in (*_DECODE, _PREFILL):
        sizes = {"tokens": tokens, "heads": FLASH.num_attention_heads, "o_rank": FLASH.o_lora_rank}
        yield Case(f"projection-rotated-t{tokens}", "projection", sizes, _rotated, ("",))
    for model, heads in (("v32", DEEPSEEK_V32.num_attention_heads), ("v4", FLASH.num_attention_heads)):
        for form in ("hidden", "query"):
            make = functools.partial(_finished, model=model, form=form)
            asks = model == "v32" and form == "query"
            for tokens in (*_DECODE, _PREFILL):
                sizes = {"tokens": tokens} | ({"heads": heads} if form == "query" else {})
                name = f"projection-norm-{model}-{form}-t{tokens}"
                yield Case(name, "projection", sizes, make, ("",), ("bfloat16", *FP8) if asks else ("",))
