"""Cases of the operators around attention: norms and rotations, the output projection.

Sizes are those of DeepSeek-V4-Flash, or of DeepSeek-V3.2 if the name says so: decode steps of a few requests, and the
prefill of a long chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax import reference
from sparse_mla_jax._check import require
from sparse_mla_jax.cases.answers import (
    finished_answer,
    finished_error,
    relative,
)
from sparse_mla_jax.cases.case import FP8, Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    COMPRESSOR_FREQUENCIES,
    nbytes,
    sample,
    seed,
    take,
    v32_hidden_parts,
    v32_query_parts,
)
from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32, DeepseekV32Config
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.rope import rope_frequencies

FLASH = DEEPSEEK_V4_FLASH
# Bounds: of results rounded to bfloat16 (the rounding alone is 1.65e-3), and of float32 results.
ROUNDED, EXACT = 2e-3, 2e-5


def _work(
    fn: Callable[..., Any],
    each: Callable[[int], tuple[Any, ...]],
    flops: int,
    error: Callable[[tuple[Any, ...], Any], float],
    bound: float,
) -> Work:
    """The Work of a function that reads all of its arguments and writes all of its results once."""
    inputs = jax.eval_shape(lambda: each(0))
    return Work(fn, each, nbytes(inputs, jax.eval_shape(fn, *inputs)), flops, error, bound)


def _wide(*arrays: Any) -> tuple[np.ndarray, ...]:
    """Copies arrays to the host as float64."""
    return tuple(np.asarray(a).astype(np.float64) for a in arrays)


def _worst(got: Any, want: Any, allowed: tuple[float, ...]) -> float:
    """Largest error of several results over the bound of each."""
    return max(relative(a, b) / most for a, b, most in zip(got, want, allowed))


# --- output projection
def _rotated(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """`rotated_projection`; every call has its own weights, so that no cache holds them."""
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


# --- norms and rotations
def _v4_parts(form: str, heads: int, vector: Callable[[int], Array]) -> tuple[Section, ...]:
    """Sections that DeepSeek-V4's layer finishes.

    "hidden": the query latent and the key, without the sections that `norm_rope` does not change. "query": the
    RMS-normed heads and the indexer's queries.
    """
    c = FLASH
    part = functools.partial(Section, dtype="bfloat16", interleaved=True)
    if form == "hidden":
        key = part(c.q_lora_rank, 1, c.head_dim, dtype="float32", weight=vector(c.head_dim), rotated=c.nope_dim)
        return part(0, 1, c.q_lora_rank, weight=vector(c.q_lora_rank)), key
    start, rotated = heads * c.head_dim, c.index_head_dim - c.qk_rope_head_dim
    return (
        part(0, heads, c.head_dim, weight=jnp.ones(c.head_dim, jnp.float32), rotated=c.nope_dim),
        part(start, c.index_n_heads, c.index_head_dim, rotated=rotated),
    )


def _finished(sizes: Mapping[str, int], flavour: str, query: str, *, model: str, form: str) -> Work:
    """`norm_rope` of one projection of a layer, cosines and sines included."""
    del flavour
    tokens, heads = sizes["tokens"], sizes.get("heads", 0)
    config = DEEPSEEK_V32 if model == "v32" else FLASH
    rope = config.rope if model == "v32" else FLASH.compress_rope
    frequencies = rope_frequencies(rope, config.qk_rope_head_dim)

    def parts(number):
        def vector(size):
            return 1 + 0.1 * jax.random.normal(seed(40 + size, number), (size,), jnp.float32)

        if model == "v4":
            return _v4_parts(form, heads, vector)
        if form == "hidden":
            return v32_hidden_parts(vector, "bfloat16")
        factor = (
            1 + jax.random.uniform(seed(41, number), (tokens, config.index_n_heads), jnp.float32)
            if query in FP8
            else None
        )
        return v32_query_parts(heads, "bfloat16", query, factor)

    def each(number):
        mine = parts(number)
        width = max(part.start + part.columns for part in mine)
        # Products are float32, but V3.2 rounds the product for its queries before `norm_rope`.
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
            per_head = {name: getattr(part, name) for name in ("factor", "gain")}
            part = dataclasses.replace(part, **{k: a if a is None else take(a, some) for k, a in per_head.items()})
            result = jax.tree.map(lambda a: take(a, some), result)
            worst = max(worst, finished_error(part, result, finished_answer(x, part, angles)))
        return worst

    return _work(fn, each, 0, error, 1.0)


# --- the list
# Tokens: decode steps of a few requests, and the prefill of a chunk.
_DECODE, _PREFILL = (32, 128), 4096


def projection_cases() -> Iterator[Case]:
    """Norms and rotations between a layer's matrix products, and the output projection with its inverse rotation."""
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


def _kernel_rotated_projection(kind: str, heads: int | None) -> KernelProblem:
    """One group of eight heads of 448 + 64, five tokens, the first 64 of its columns."""
    del kind, heads
    rng = np.random.default_rng(7)
    out, weight = (jnp.asarray(rng.standard_normal(n), jnp.bfloat16) for n in ((5, 8, 512), (1, 4096, 64)))
    positions = jnp.asarray([0, 1, 4095, 70000, 163839], jnp.int32)
    angles = np.asarray(positions.astype(jnp.float32)[:, None] * jnp.asarray(COMPRESSOR_FREQUENCIES))
    with jax.enable_x64(True):
        want = np.asarray(reference.rotated_projection(out, weight, jnp.asarray(angles), dtype=jnp.float64))

    def fn(out, weight, positions, *, implementation="triton", plan=None):
        return rotated_projection(
            out, weight, positions, COMPRESSOR_FREQUENCIES, implementation=implementation, plan=plan
        )

    args = (out, weight, positions)
    # Rounding the result to bfloat16 alone is 1.65e-3.
    return KernelProblem(fn, args, lambda got: relative(got, want), 2e-3, nbytes(args) + 2 * want.size)


def _kernel_finished(x: Array, parts: Sequence[Section]) -> KernelProblem:
    """`norm_rope` on two tokens, one of them the last of V3.2's longest context, with V3.2's 32 frequencies."""
    c, positions = DeepseekV32Config(), jnp.asarray([7, 163839], jnp.int32)
    frequencies = rope_frequencies(c.rope, c.qk_rope_head_dim)
    angles = np.asarray(positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies))
    want = [finished_answer(x, part, angles) for part in parts]

    def fn(x, parts, positions, *, implementation="triton", plan=None):
        return norm_rope(x, parts, positions, frequencies, implementation=implementation, plan=plan)

    def error(got):
        return max(finished_error(part, mine, exact) for part, mine, exact in zip(parts, got, want))

    args = (x, tuple(parts), positions)
    return KernelProblem(fn, args, error, 1.0, nbytes(args, jax.eval_shape(fn, *args)))


def _kernel_from_hidden(kind: str, heads: int | None) -> KernelProblem:
    del kind, heads
    rng = np.random.default_rng(8)
    parts = v32_hidden_parts(lambda n: jnp.asarray(1 + 0.1 * rng.standard_normal(n), jnp.float32), "bfloat16")
    return _kernel_finished(jnp.asarray(rng.standard_normal((2, 2304)), jnp.float32), parts)


def _kernel_from_q_latent(kind: str, heads: int | None) -> KernelProblem:
    rng = np.random.default_rng(9)
    heads = 16 if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    dtype = "float32" if kind == "float32" else "bfloat16"
    factor = jnp.asarray(1 + rng.random((2, 64)), jnp.float32) if kind in FP8 else None
    x = jnp.asarray(rng.standard_normal((2, 64 * 128 + heads * 192)), dtype)
    return _kernel_finished(x, v32_query_parts(heads, dtype, kind, factor))


def _kernel_query(
    kind: str,
    heads: int | None,
    *,
    usual_heads: int,
    nope: int,
    index_heads: int,
    index_rotated: int = 0,
    interleaved: bool = True,
    gain: bool = False,
) -> KernelProblem:
    """Queries of nope + 64 values and the indexer's of 128, of two tokens; with `gain` both times one per head."""
    rng = np.random.default_rng(10)
    heads = usual_heads if heads is None else heads
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    dtype = "float32" if kind == "float32" else "bfloat16"
    factor = jnp.asarray(1 + rng.random((2, index_heads)), jnp.float32) if kind in FP8 else None
    # Of both signs, as a learned scale times the logarithm of the position is.
    gains = [jnp.asarray(3 * rng.standard_normal((2, n)), jnp.float32) if gain else None for n in (heads, index_heads)]
    part = functools.partial(Section, interleaved=interleaved)
    parts = (
        part(index_heads * 128, heads, nope + 64, dtype, rotated=nope, gain=gains[0]),
        part(0, index_heads, 128, kind, rotated=index_rotated, factor=factor, gain=gains[1]),
    )
    x = jnp.asarray(rng.standard_normal((2, index_heads * 128 + heads * (nope + 64))), dtype)
    return _kernel_finished(x, parts)


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "rotated_projection",
        "DeepSeek-V4: 5 tokens, a group of 8 heads of 448 + 64 values turned back, 64 columns",
        _kernel_rotated_projection,
        kinds=(),
    ),
    KernelCase(
        "norm_rope",
        "DeepSeek-V3.2: 2 tokens, all of the input's product: query form of 1536, latent of 512, keys of 64 and 128",
        _kernel_from_hidden,
        kinds=(),
    ),
    KernelCase(
        "norm_rope_query",
        "DeepSeek-V3.2: 2 tokens, 16 query heads of 128 + 64 values, 64 indexer heads of 128 in the type of the cache",
        _kernel_from_q_latent,
    ),
    KernelCase(
        "norm_rope_query_gain",
        "Mistral Large 4: 2 tokens, 64 query heads of 64 + 64 and 32 indexer heads of 128, a gain for every head",
        functools.partial(_kernel_query, usual_heads=64, nope=64, index_heads=32, gain=True),
    ),
    KernelCase(
        "norm_rope_query_halves",
        "Hy4-preview: 2 tokens, 32 query heads of 192 + 64 and 16 indexer heads of 64 + 64, rotated in halves",
        functools.partial(_kernel_query, usual_heads=32, nope=192, index_heads=16, index_rotated=64, interleaved=False),
    ),
    KernelCase(
        "norm_rope_query_pairs",
        "GLM-5: 2 tokens, 64 query heads of 192 + 64 and 32 indexer heads of 128, rotated in neighbouring pairs",
        functools.partial(_kernel_query, usual_heads=64, nope=192, index_heads=32),
    ),
)
