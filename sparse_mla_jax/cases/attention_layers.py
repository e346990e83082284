"""Cases of attention layers: DeepSeek-V3.2 and V4, one token per request, at the end of a full context."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax.cases.answers import relative
from sparse_mla_jax.cases.case import Case, Work
from sparse_mla_jax.cases.inputs import (
    PAGE,
    QUERIES,
    ROPE,
    VALUE_DIM,
    filled,
    index_cache,
    kv_cache,
    nbytes,
    permutation,
    seed,
)
from sparse_mla_jax.cases.steps import layer_step, layers_step, published_config
from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32, DeepseekV4Config, DeepseekV32Config
from sparse_mla_jax.layers.compressed_attention import LayerCaches, compressed_attention_step
from sparse_mla_jax.layers.hyper_connections import join_streams, split_streams
from sparse_mla_jax.layers.mla import fuse_projections
from sparse_mla_jax.metadata import StepMetadata, decode_metadata
from sparse_mla_jax.models import deepseek_v4
from sparse_mla_jax.ops.compressor import CompressorState


def _v32_config(sizes: Mapping[str, int], query: str) -> DeepseekV32Config:

    return dataclasses.replace(
        published_config(heads=sizes["heads"], layers=sizes["layers"]),
        hidden_size=sizes["hidden"],
        q_lora_rank=sizes["q_rank"],
        index_topk=sizes["k"],
        quantize_index_query=query not in ("", "bfloat16"),
    )


@functools.partial(jax.jit, static_argnames="config")
def _v32_params(key: Array, config: DeepseekV32Config) -> Any:
    """Fused weights of one attention layer. Feed-forward weights are never made."""
    from sparse_mla_jax.models.deepseek_v32 import init_params

    one = dataclasses.replace(config, num_hidden_layers=1, n_routed_experts=0)
    return fuse_projections(init_params(key, one, jnp.bfloat16)["layers"][0]["self_attn"])


def _v32_step(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Attention layers of DeepSeek-V3.2, one token per request, at the end of a full context.

    Several layers run in one program, each with its own weights and caches. There is no memory to make those twice, so
    only the finiteness of the result is checked.
    """
    batch, context, layers = sizes["batch"], sizes["context"], sizes["layers"]
    config, slots, single = _v32_config(sizes, query), batch * context, layers == 1
    build_step = layer_step if single else layers_step
    steps = {
        name: build_step(config, batch=batch, context=context, cache_dtype=jnp.dtype(flavour), implementation=name)
        for name in (None, "triton", "xla", "reference")
    }

    def shared():
        params = tuple(_v32_params(seed(15, n), config) for n in range(layers))
        return params if single else (params,)

    def state():
        caches = tuple(
            (kv_cache("v32", flavour, slots), index_cache(flavour, slots, config.index_head_dim)) for _ in range(layers)
        )
        return caches if single else (caches,)

    def each(number):
        pages = permutation(seed(16, number), slots // PAGE)
        hidden = jax.random.normal(seed(17, number), (batch, config.hidden_size), jnp.bfloat16)
        return hidden, jnp.full(batch, context, jnp.int32), pages.reshape(batch, -1)

    def fn(caches, params, hidden, seq_lens, table, *, implementation=None):
        out, caches = steps[implementation].fn(params, hidden, caches, seq_lens, table)
        return caches, out

    def error(arguments, got):
        if not single:
            return 0.0 if np.isfinite(np.asarray(got[1]).astype(np.float32)).all() else math.inf
        other = "reference" if jax.default_backend() == "cpu" else "xla"
        want = jax.jit(functools.partial(fn, implementation=other))(*arguments)
        return relative(got[1], want[1])

    weights = jax.eval_shape(shared)
    caches = jax.eval_shape(lambda: (kv_cache("v32", flavour, PAGE), index_cache(flavour, PAGE, config.index_head_dim)))
    latent, index = (c.bytes_per_token for c in caches)
    visible = min(config.index_topk, context)
    read = batch * layers * (visible * latent + context * index)
    size = nbytes(weights, jax.eval_shape(lambda: each(0))) + read + 2 * batch * config.hidden_size
    scored = config.index_n_heads * config.index_head_dim * context
    attended = config.num_attention_heads * visible * (512 + ROPE + VALUE_DIM)
    products = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    flops = 2 * batch * (layers * (scored + attended) + products)
    # One differently selected key changes a row by a few per cent. With FP8 queries, more keys differ.
    bound = 4e-2 if config.quantize_index_query else 2e-2
    return Work(fn, each, size, flops, error, bound, shared, state, has_bodies=single, replays=single)


# Ratios of the kinds of layers: window only; entries chosen by an indexer; all entries.
KINDS = (0, 4, 128)


# Smallest sizes for embeddings and experts: they are never made, but tracing them at full size takes time.
_NO_EXPERTS: dict[str, Any] = {
    "vocab_size": 1,
    "moe_intermediate_size": 1,
    "n_routed_experts": 1,
    "n_shared_experts": 0,
    "num_experts_per_tok": 1,
    "num_hash_layers": 0,
}


def _v4_config(sizes: Mapping[str, int]) -> DeepseekV4Config:
    """DeepSeek-V4-Flash with one layer of each of KINDS."""
    return dataclasses.replace(
        DEEPSEEK_V4_FLASH,
        num_hidden_layers=len(KINDS),
        compress_ratios=KINDS,
        num_attention_heads=sizes["heads"],
        hidden_size=sizes["hidden"],
        q_lora_rank=sizes["q_rank"],
        o_lora_rank=sizes["o_rank"],
        index_topk=sizes["index_k"],
        **_NO_EXPERTS,
    )


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _v4_params(key: Array, config: DeepseekV4Config, kind: int) -> Any:
    """Fused weights of one layer, without its experts."""
    from sparse_mla_jax.layers.compressed_attention import fuse_projections

    params = deepseek_v4.init_params(key, config, jnp.bfloat16)["layers"][kind]
    params = {**params, "self_attn": fuse_projections(params["self_attn"])}
    return {name: weights for name, weights in params.items() if name != "mlp"}


@functools.partial(jax.jit, static_argnames=("config", "kind", "flavour", "batch", "pages", "page_size"))
def _v4_caches(config: DeepseekV4Config, kind: int, flavour: str, batch: int, pages: int, page_size: int) -> Any:
    """Caches of one layer for `batch` requests: random keys, random compressor states."""
    caches = deepseek_v4.create_caches(config, pages, page_size, num_requests=batch, dtype=jnp.dtype(flavour))[kind]

    def random(part: Any) -> Any:
        if isinstance(part, CompressorState):
            return CompressorState(*(jax.random.normal(seed(51 + i), part.kv.shape, jnp.float32) for i in range(2)))
        # page_size is a number, not a cache.
        return part if isinstance(part, int) else filled(part)

    parts = {field.name: getattr(caches, field.name) for field in dataclasses.fields(caches)}
    return dataclasses.replace(caches, **{name: random(part) for name, part in parts.items() if part is not None})


@functools.partial(jax.jit, static_argnames=("config", "kind", "implementation"))
def _v4_layer(
    params: Any,
    streams: Array,
    caches: LayerCaches,
    metadata: StepMetadata,
    config: DeepseekV4Config,
    kind: int,
    implementation: str | None,
) -> tuple[Array, LayerCaches]:
    """Both sub-layers with their hyper-connections; in place of its experts, the second returns its input.

    A separate function, so that all layers of a kind are traced and lowered once.
    """
    options: dict[str, Any] = {"config": config, "implementation": implementation}
    normed, weights = split_streams(params["attn_hc"], streams, norm=params["input_layernorm"], **options)
    out, caches = compressed_attention_step(params["self_attn"], normed, caches, metadata, layer=kind, **options)
    streams = join_streams(streams, out, weights)
    normed, weights = split_streams(params["ffn_hc"], streams, norm=params["post_attention_layernorm"], **options)
    return join_streams(streams, normed, weights), caches


def _v4_moved(sizes: Mapping[str, int], config: DeepseekV4Config, kind: int, caches: LayerCaches) -> tuple[int, int]:
    """(bytes of the caches, operations of the scores and of attention) of one layer's step."""
    batch, entries = sizes["batch"], sizes["context"] // max(KINDS[kind], 1)
    # All keys of the window are read, and the new one is written.
    size, seen, flops = batch * (config.sliding_window + 1) * caches.window.bytes_per_token, config.sliding_window, 0
    if caches.compressed is not None:
        chosen = entries if caches.index is None else min(entries, config.index_topk)
        size, seen = size + batch * chosen * caches.compressed.bytes_per_token, seen + chosen
    if caches.index is not None:
        size += batch * entries * caches.index.bytes_per_token
        flops += 2 * batch * entries * config.index_n_heads * config.index_head_dim
    for state in (caches.state, caches.index_state):
        if state is not None:
            # Every request writes a row. Those that close a window read all rows, or half if windows overlap.
            rows = batch + -(-batch // KINDS[kind]) * KINDS[kind]
            size += rows * state.bytes_per_request // state.kv.shape[1]
    return size, flops + 2 * batch * config.num_attention_heads * seen * (2 * config.head_dim)


def _v4_step(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Layers of DeepSeek-V4-Flash without their experts, one token per request, at the end of a long context.

    Runs one layer of the ratio in `sizes`, or the last `layers` of the model in one program, each with its own weights
    and caches. There is no memory to make those twice, so only the finiteness of several layers' result is checked.
    Requests are at consecutive positions, so that in every layer one of `ratio` requests closes an entry.
    """
    del query
    batch, context, single = sizes["batch"], sizes["context"], "ratio" in sizes
    ratios = (sizes["ratio"],) if single else DEEPSEEK_V4_FLASH.compress_ratios[-sizes["layers"] :]
    config, kinds = _v4_config(sizes), tuple(KINDS.index(ratio) for ratio in ratios)
    page_size = min(256, context)
    pages = batch * context // page_size

    def shared():
        return (tuple(_v4_params(seed(53, n), config, kind) for n, kind in enumerate(kinds)),)

    def state():
        return (tuple(_v4_caches(config, kind, flavour, batch, pages, page_size) for kind in kinds),)

    def each(number):
        # As small as attention's result on random keys, so that an error of attention shows in the output.
        streams = jax.random.normal(seed(54, number), (batch, config.hc_mult, config.hidden_size), jnp.float32) / 16
        table = permutation(seed(55, number), pages).reshape(batch, -1)
        return streams.astype(jnp.bfloat16), context - jnp.arange(batch, dtype=jnp.int32), table

    def fn(caches, params, streams, seq_lens, table, *, implementation=None):
        metadata, after = decode_metadata(seq_lens, table, page_size=page_size), []
        for kind, weights, cache in zip(kinds, params, caches):
            streams, cache = _v4_layer(weights, streams, cache, metadata, config, kind, implementation)
            after.append(cache)
        return tuple(after), streams

    def error(arguments, got):
        if not single:
            return 0.0 if np.isfinite(np.asarray(got[1]).astype(np.float32)).all() else math.inf
        other = "reference" if jax.default_backend() == "cpu" else "xla"
        want = jax.jit(functools.partial(fn, implementation=other))(*arguments)
        return relative(got[1], want[1])

    weights, (caches,) = jax.eval_shape(shared), jax.eval_shape(state)
    moved = [_v4_moved(sizes, config, kind, cache) for kind, cache in zip(kinds, caches)]
    inputs = jax.eval_shape(lambda: each(0))
    size = nbytes(weights, inputs, inputs[0]) + sum(size for size, _ in moved)
    products = 2 * batch * sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
    # One differently selected entry changes its row.
    bound = 2e-2 if 4 in ratios else 1e-2
    flops = products + sum(flops for _, flops in moved)
    return Work(fn, each, size, flops, error, bound, shared, state, has_bodies=single, replays=single)


def _v32_cases() -> Iterator[Case]:
    config = DEEPSEEK_V32
    sizes = {
        "batch": 64,
        "heads": 16,
        "context": 32768,
        "k": config.index_topk,
        "hidden": config.hidden_size,
        "q_rank": config.q_lora_rank,
    }
    yield Case("step-v32-attention-b64-h16", "step", sizes | {"layers": 1}, _v32_step, queries=QUERIES)
    # All layers of the published model: 101 GB of caches.
    every = sizes | {"layers": config.num_hidden_layers}
    yield Case("step-v32-attention-b64-h16-61-layers", "step", every, _v32_step, queries=QUERIES)


def _v4_cases() -> Iterator[Case]:
    config = DEEPSEEK_V4_FLASH
    sizes = {
        "heads": config.num_attention_heads,
        "context": 131072,
        "index_k": config.index_topk,
        "hidden": config.hidden_size,
        "q_rank": config.q_lora_rank,
        "o_rank": config.o_lora_rank,
    }
    for ratio in KINDS:
        name = f"ratio{ratio}" if ratio else "window"
        for batch in (32, 128):
            yield Case(f"step-v4-{name}-b{batch}", "step", sizes | {"batch": batch, "ratio": ratio}, _v4_step)
    # All layers of the published model: 64 GB of caches for 128 requests.
    for batch in (32, 128):
        every = sizes | {"batch": batch, "layers": config.num_hidden_layers}
        yield Case(f"step-v4-b{batch}-{config.num_hidden_layers}-layers", "step", every, _v4_step)


def step_cases() -> Iterator[Case]:
    """One attention layer, and all layers of a model."""
    yield from _v32_cases()
    yield from _v4_cases()
