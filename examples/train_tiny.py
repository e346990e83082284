"""Trains a byte-level model of DeepSeek-V3.2's architecture on the Python standard library's own sources.

Everything of the architecture is there: latent attention with a query latent and one shared rotary key, the lightning
indexer, sigmoid routing over expert groups with a bias that balances load without a loss, a shared expert. Training
follows DSA's authors (arXiv:2512.02556): first dense attention, the indexer learning by the KL divergence to the main
attention's distribution, summed over heads; then (the last `1 - --switch` of the run) every query attends only to the
indexer's `index_topk` best keys, the language-model loss trains the main model alone and the KL over the selected keys
trains the indexer alone.

    python examples/train_tiny.py --pack out/corpus.npz                 # this interpreter's text, to train elsewhere
    python examples/train_tiny.py --probe --corpus out/corpus.npz       # tokens per second of several settings
    python examples/train_tiny.py --minutes 9 --out out/run             # the whole schedule in 9 minutes of wall clock
    python examples/train_tiny.py --minutes 9 --until 0.5 --out out/a   # or in two halves
    python examples/train_tiny.py --minutes 9 --resume out/a/*.npz --out out/b
    python examples/train_tiny.py --export out/b/params.npz examples/tiny_python
    python examples/train_tiny.py --minutes 1 --lr 1e-3 2e-3 4e-3       # a trial of each learning rate

--minutes counts from the start of the program, compilation included; the evaluation (about a minute with its
compilation on a GPU) comes after it. Learning rate, the switch to sparse attention and the load balancing are functions
of progress (0 to 1), and progress is a function of time, so a slow machine makes fewer steps of the same schedule.
Writes to --out: params.npz (float32), moments.npz (AdamW, bfloat16), model.safetensors and config.json (published
names, loadable by this package and by transformers), log.jsonl. The last line on stdout is JSON: held-out bits per byte
of the bfloat16-rounded weights, dense and sparse. Uninstalled: run from the repository's root with PYTHONPATH=.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from sparse_mla_jax import data
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config, config_from_json

START = time.monotonic()
HIDDEN = -1e30  # a finite minus infinity: gradients of masked entries stay zero, not NaN
TINY = 1e-30  # below every score that is not zero
LAYER = "model.layers.{}."
BIAS = "mlp.gate.e_score_correction_bias"
FLOAT32_SUFFIXES = ("norm.weight", "norm.bias", "e_score_correction_bias")
SEPARATOR = b"\0"

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 192,
    "index_head_dim": 32,
    "index_n_heads": 4,
    "index_topk": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "kv_lora_rank": 64,
    "layer_types": ["indexed_attention"] * 5,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "mlp_layer_types": ["dense"] + ["sparse"] * 4,
    "model_type": "deepseek_v32",
    "moe_intermediate_size": 64,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "output_router_logits": False,
    "pad_token_id": None,
    "q_lora_rank": 96,
    "qk_head_dim": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_type": "yarn",
    },
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 256,
}

Params = dict[str, Any]


class Options(NamedTuple):
    """What a compiled step depends on, besides the config."""

    batch: int = 16
    context: int = 2048
    steps_per_call: int = 20
    query_rows: int = 256  # rows of each sequence whose KL trains the indexer
    chunk: int = 512  # query rows whose attention is computed together
    attention: str = "xla"  # of the dense phase: xla or cudnn
    unroll: bool = False
    dtype: str = "bfloat16"
    library_share: float = 0.6  # windows from the library; the others from its tests
    weight_decay: float = 0.05


class Mode(NamedTuple):
    """How one forward pass computes."""

    sparse: bool
    dtype: Any
    chunk: int
    attention: str = "xla"
    unroll: bool = False
    exact: bool = False  # select by sorting, ties to the lower position, as the library does


# -------------------- the model


def linear(x: jax.Array, weight: jax.Array, mode: Mode, dtype: Any = None) -> jax.Array:
    """x[..., in] times weight[out, in]; operands in the compute type, sums in float32."""
    out = jnp.einsum(
        "...i,oi->...o", x.astype(mode.dtype), weight.astype(mode.dtype), preferred_element_type=jnp.float32
    )
    return out.astype(dtype or mode.dtype)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight + bias


def rope_table(config: DeepseekV32Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) float32[length, qk_rope_head_dim / 2] under YaRN."""
    rope, dim = config.rope, config.qk_rope_head_dim
    i = np.arange(dim // 2)
    base = rope.theta ** (-2.0 * i / dim)

    def turns(r: float) -> float:
        return dim * math.log(rope.original_max_position / (2 * math.pi * r)) / (2 * math.log(rope.theta))

    low, high = max(math.floor(turns(rope.beta_fast)), 0), min(math.ceil(turns(rope.beta_slow)), dim - 1)
    ramp = np.clip((i - low) / max(high - low, 1e-3), 0, 1)
    frequencies = base * (1 - ramp) + base / rope.factor * ramp
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array], interleaved: bool) -> jax.Array:
    """x[B, S, heads, dim] turned by the angle of each position; pairs (2i, 2i+1) or (i, i + dim/2)."""
    cos, sin = (part[:, None, :] for part in table)
    half = x.shape[-1] // 2
    y = x.astype(jnp.float32)
    a, b = (y[..., 0::2], y[..., 1::2]) if interleaved else (y[..., :half], y[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    out = jnp.stack(pair, -1).reshape(x.shape) if interleaved else jnp.concatenate(pair, -1)
    return out.astype(x.dtype)


def index_scores(q: jax.Array, k: jax.Array, weights: jax.Array) -> jax.Array:
    """float32[B, Q, K]: the head-weighted sum of relu(q[B, Q, heads, D] . k[B, K, D])."""
    dots = jnp.einsum("bqhd,bkd->bhqk", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bqh,bhqk->bqk", weights, jax.nn.relu(dots))


def threshold(scores: jax.Array, k: int, bits: int = 24) -> jax.Array:
    """The k-th largest of scores[..., K] along the last axis, rounded down to its first `bits` bits, as uint32 keys."""
    keys = sortable(scores)

    def add_bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.sum(keys >= candidate[..., None], axis=-1) >= k
        return jnp.where(enough, candidate, found)

    return lax.fori_loop(0, bits, add_bit, jnp.zeros(scores.shape[:-1], jnp.uint32))


def sortable(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of float32 x."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def select(scores: jax.Array, visible: jax.Array, k: int, exact: bool) -> jax.Array:
    """bool like `scores`[B, Q, K]: the k best visible keys of each query; no gradient."""
    if scores.shape[-1] <= k:
        return jnp.broadcast_to(visible, scores.shape)
    scores = jnp.where(visible, lax.stop_gradient(scores), -jnp.inf)
    if not exact:
        # Where every head's relu is zero keys tie by the thousand: as when sorting, the lower position goes first.
        scores = jnp.where(scores == 0, TINY * (2 - jnp.arange(scores.shape[-1]) / scores.shape[-1]), scores)
        return (sortable(scores) >= threshold(scores, k)[..., None]) & visible
    flat = scores.reshape(-1, scores.shape[-1])
    best = lax.top_k(flat, k)[1]
    chosen = jnp.zeros(flat.shape, bool).at[jnp.arange(len(flat))[:, None], best].set(True)
    return chosen.reshape(scores.shape) & visible


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sm_scale: float) -> jax.Array:
    """Attention of q[B, Q, H, D] over k[B, K, H, D], v[B, K, H, V] where mask[B or 1, Q, K]."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * sm_scale
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, HIDDEN), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v, preferred_element_type=jnp.float32).astype(q.dtype)


class Index(NamedTuple):
    """The indexer's queries [B, S, heads, D], keys [B, S, D] and head weights float32[B, S, heads]."""

    q: jax.Array
    k: jax.Array
    weights: jax.Array

    def scores(self, rows: Any, end: int) -> jax.Array:
        return index_scores(self.q[:, rows], self.k[:, :end], self.weights[:, rows])


def make_index(p: Params, x: jax.Array, u: jax.Array, table: Any, config: DeepseekV32Config, mode: Mode) -> Index:
    """The indexer's part of a layer, from detached inputs: the model is not trained through it."""
    x, u = lax.stop_gradient(x), lax.stop_gradient(u)
    heads, dim, rotated = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
    name = "self_attn.indexer."
    q = linear(u, p[name + "wq_b.weight"], mode).reshape(*x.shape[:2], heads, dim)
    k = layer_norm(linear(x, p[name + "wk.weight"], mode), p[name + "k_norm.weight"], p[name + "k_norm.bias"])
    k = k.astype(mode.dtype)[:, :, None]
    q = jnp.concatenate([rotate(q[..., :rotated], table, False), q[..., rotated:]], -1)
    k = jnp.concatenate([rotate(k[..., :rotated], table, False), k[..., rotated:]], -1)[:, :, 0]
    weights = linear(x, p[name + "weights_proj.weight"], mode, jnp.float32) * (heads * dim) ** -0.5
    return Index(q, k, weights)


def indexer_loss(
    index: Index, q: jax.Array, k: jax.Array, rows: jax.Array, config: DeepseekV32Config, mode: Mode
) -> dict[str, jax.Array]:
    """What the indexer learns, from the query rows given.

    kl: its divergence from the attention's distribution; mass: the share of the attention that it selects; zeros: the
    share of the rows whose worst selected key scores exactly 0, where only positions decide.
    """
    length = k.shape[1]
    visible = (jnp.arange(length) <= rows[:, None])[None]
    scores = index.scores(rows, length)
    selected = select(scores, visible, config.index_topk, mode.exact)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q[:, rows], k, preferred_element_type=jnp.float32) * config.sm_scale
    full = jax.nn.softmax(jnp.where(visible[:, None], logits, HIDDEN), axis=-1).mean(1)
    mass = jnp.sum(full * selected, -1).mean()
    worst = jnp.min(jnp.where(selected, scores, jnp.inf), -1)
    zeros = jnp.mean((worst == 0) & (rows >= config.index_topk), dtype=jnp.float32)
    if mode.sparse:
        target = jax.nn.softmax(jnp.where(selected[:, None], logits, HIDDEN), axis=-1).mean(1)
        mask = selected
    else:
        target, mask = full, jnp.broadcast_to(visible, scores.shape)
    target = lax.stop_gradient(target)
    predicted = jax.nn.log_softmax(jnp.where(mask, scores, HIDDEN), axis=-1)
    gap = jnp.log(jnp.maximum(target, 1e-30)) - predicted
    kl = jnp.sum(jnp.where(mask & (target > 0), target * gap, 0.0), -1).mean()
    return {"kl": kl, "mass": lax.stop_gradient(mass), "zeros": lax.stop_gradient(zeros)}


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, sm_scale: float) -> jax.Array:
    """Causal attention by cuDNN's fused kernel; values are padded to the width of the keys."""
    padded = jnp.pad(v, [(0, 0)] * 3 + [(0, q.shape[-1] - v.shape[-1])])
    out = jax.nn.dot_product_attention(q, k, padded, scale=sm_scale, is_causal=True, implementation="cudnn")
    return out[..., : v.shape[-1]]


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, index: Index, config: DeepseekV32Config, mode: Mode
) -> jax.Array:
    """Attention of every query, in blocks of query rows that never touch the keys above them."""
    if mode.attention == "cudnn" and not mode.sparse:
        return cudnn_attention(q, k, v, config.sm_scale)
    block = jax.checkpoint(functools.partial(attend, sm_scale=config.sm_scale))
    detached = lax.stop_gradient(index)
    outs = []
    for start in range(0, q.shape[1], mode.chunk):
        end = min(start + mode.chunk, q.shape[1])
        mask = (jnp.arange(end) <= jnp.arange(start, end)[:, None])[None]
        if mode.sparse:
            mask = select(detached.scores(slice(start, end), end), mask, config.index_topk, mode.exact)
        outs.append(block(q[:, start:end], k[:, :end], v[:, :end], mask))
    return jnp.concatenate(outs, 1)


def attention(
    p: Params, x: jax.Array, table: Any, rows: jax.Array | None, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The attention sub-layer on normed x [B, S, D]: (output, what the indexer learns from)."""
    c, eps = config, config.rms_norm_eps
    batch, length, _ = x.shape
    u = rms_norm(linear(x, p["self_attn.q_a_proj.weight"], mode), p["self_attn.q_a_layernorm.weight"], eps)
    q = linear(u, p["self_attn.q_b_proj.weight"], mode).reshape(batch, length, c.num_attention_heads, c.qk_head_dim)
    q = jnp.concatenate([q[..., : c.qk_nope_head_dim], rotate(q[..., c.qk_nope_head_dim :], table, True)], -1)
    latent = linear(x, p["self_attn.kv_a_proj_with_mqa.weight"], mode)
    shared = rotate(latent[..., None, c.kv_lora_rank :], table, True)
    z = rms_norm(latent[..., : c.kv_lora_rank], p["self_attn.kv_a_layernorm.weight"], eps)
    expanded = linear(z, p["self_attn.kv_b_proj.weight"], mode).reshape(batch, length, c.num_attention_heads, -1)
    k = jnp.concatenate(
        [expanded[..., : c.qk_nope_head_dim], jnp.broadcast_to(shared, (*q.shape[:3], c.qk_rope_head_dim))], -1
    )
    v = expanded[..., c.qk_nope_head_dim :]
    index = make_index(p, x, u, table, c, mode)
    out = causal_attention(q, k, v, index, c, mode).reshape(batch, length, -1)
    aux = {}
    if rows is not None:
        aux = indexer_loss(index, lax.stop_gradient(q), lax.stop_gradient(k), rows, c, mode)
    return linear(out, p["self_attn.o_proj.weight"], mode, jnp.float32), aux


def swiglu(p: Params, prefix: str, x: jax.Array, mode: Mode) -> jax.Array:
    gate = linear(x, p[prefix + "gate_proj.weight"], mode)
    hidden = jax.nn.silu(gate) * linear(x, p[prefix + "up_proj.weight"], mode)
    return linear(hidden, p[prefix + "down_proj.weight"], mode, jnp.float32)


def route(p: Params, x: jax.Array, config: DeepseekV32Config) -> tuple[jax.Array, jax.Array]:
    """(float32 weight of every expert, zero where not chosen, [T, E]; share of the tokens of every expert [E])."""
    c = config
    logits = jnp.einsum("ti,ei->te", x.astype(jnp.float32), p["mlp.gate.weight"], precision=lax.Precision.HIGHEST)
    scores = jax.nn.sigmoid(logits)
    choice = lax.stop_gradient(scores + p[BIAS])
    groups = choice.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
    strength = lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1)
    kept = jnp.any(lax.top_k(strength, c.topk_group)[1][..., None] == jnp.arange(c.n_group), axis=1)
    alive = jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice.shape)
    best = lax.top_k(alive, c.num_experts_per_tok)[1]
    chosen = jnp.any(best[..., None] == jnp.arange(c.n_routed_experts), axis=1)
    weights = jnp.where(chosen, scores, 0.0)
    if c.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * c.routed_scaling_factor, chosen.mean(0, dtype=jnp.float32)


def mixture(p: Params, x: jax.Array, config: DeepseekV32Config, mode: Mode) -> tuple[jax.Array, jax.Array]:
    """All experts as one wide SwiGLU whose hidden values the router scales: (output, load[E])."""
    flat = x.reshape(-1, x.shape[-1])
    weights, load = route(p, flat, config)
    gate, up, down = (p[f"mlp.experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
    experts, inner, _ = gate.shape
    hidden = jax.nn.silu(linear(flat, gate.reshape(experts * inner, -1), mode))
    hidden = hidden * linear(flat, up.reshape(experts * inner, -1), mode)
    hidden = hidden.reshape(-1, experts, inner) * weights[..., None].astype(mode.dtype)
    wide_down = down.transpose(1, 0, 2).reshape(down.shape[1], -1)
    out = linear(hidden.reshape(-1, experts * inner), wide_down, mode, jnp.float32)
    if config.n_shared_experts:
        out = out + swiglu(p, "mlp.shared_experts.", flat, mode)
    return out.reshape(x.shape), load


def layer_params(params: Params, layer: int) -> Params:
    prefix = LAYER.format(layer)
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}


def forward(
    params: Params, tokens: jax.Array, rows: jax.Array | None, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits float32[B, S, V] after every token, and per layer: kl, mass (given query rows), load[E] (MoE layers)."""
    one_hot = jax.nn.one_hot(tokens, config.vocab_size, dtype=mode.dtype)  # a scatter-free gradient
    h = linear(one_hot, params["model.embed_tokens.weight"].T, mode, jnp.float32)
    cos, sin = rope_table(config, tokens.shape[1])
    table = (jnp.asarray(cos), jnp.asarray(sin))

    def layer(moe: bool, h: jax.Array, p: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = rms_norm(h, p["input_layernorm.weight"], config.rms_norm_eps)
        out, aux = attention(p, x, table, rows, config, mode)
        h = h + out
        x = rms_norm(h, p["post_attention_layernorm.weight"], config.rms_norm_eps)
        if not moe:
            return h + swiglu(p, "mlp.", x, mode), aux
        out, aux["load"] = mixture(p, x, config, mode)
        return h + out, aux

    collected: dict[str, list[jax.Array]] = {}
    for moe in (False, True):
        numbers = [i for i in range(config.num_hidden_layers) if config.is_moe_layer(i) is moe]
        if not numbers:
            continue
        layers = [layer_params(params, i) for i in numbers]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        h, aux = lax.scan(functools.partial(layer, moe), h, stacked, unroll=mode.unroll)
        for name, value in aux.items():
            collected.setdefault(name, []).append(value)
    h = rms_norm(h, params["model.norm.weight"], config.rms_norm_eps)
    return linear(h, params["lm_head.weight"], mode, jnp.float32), {
        name: jnp.concatenate(values) for name, values in collected.items()
    }


def parameter_shapes(config: DeepseekV32Config) -> dict[str, tuple[int, ...]]:
    """Published names; the experts of a layer as one array [E, out, in]."""
    c = config
    heads, wide = c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim
    attention = {
        "q_a_proj.weight": (c.q_lora_rank, c.hidden_size),
        "q_a_layernorm.weight": (c.q_lora_rank,),
        "q_b_proj.weight": (heads * c.qk_head_dim, c.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "kv_a_layernorm.weight": (c.kv_lora_rank,),
        "kv_b_proj.weight": (heads * wide, c.kv_lora_rank),
        "o_proj.weight": (c.hidden_size, heads * c.v_head_dim),
        "indexer.wq_b.weight": (c.index_n_heads * c.index_head_dim, c.q_lora_rank),
        "indexer.wk.weight": (c.index_head_dim, c.hidden_size),
        "indexer.k_norm.weight": (c.index_head_dim,),
        "indexer.k_norm.bias": (c.index_head_dim,),
        "indexer.weights_proj.weight": (c.index_n_heads, c.hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "model.norm.weight": (c.hidden_size,),
        "lm_head.weight": (c.vocab_size, c.hidden_size),
    }

    def add_mlp(prefix: str, inner: int, lead: tuple[int, ...] = ()) -> None:
        for part in ("gate", "up"):
            shapes[f"{prefix}{part}_proj.weight"] = (*lead, inner, c.hidden_size)
        shapes[f"{prefix}down_proj.weight"] = (*lead, c.hidden_size, inner)

    for i in range(c.num_hidden_layers):
        prefix = LAYER.format(i)
        shapes |= {prefix + "self_attn." + name: shape for name, shape in attention.items()}
        shapes |= {prefix + name + "_layernorm.weight": (c.hidden_size,) for name in ("input", "post_attention")}
        if not c.is_moe_layer(i):
            add_mlp(prefix + "mlp.", c.intermediate_size)
            continue
        shapes[prefix + "mlp.gate.weight"] = (c.n_routed_experts, c.hidden_size)
        shapes[prefix + BIAS] = (c.n_routed_experts,)
        add_mlp(prefix + "mlp.experts.", c.moe_intermediate_size, (c.n_routed_experts,))
        if c.n_shared_experts:
            add_mlp(prefix + "mlp.shared_experts.", c.moe_intermediate_size * c.n_shared_experts)
    return shapes


def init_params(config: DeepseekV32Config, seed: int) -> Params:
    """Float32 arrays: unit variance through every matrix, the writers to the residual stream scaled down by depth."""
    rng = np.random.default_rng(seed)
    depth = (2 * config.num_hidden_layers) ** -0.5

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
        std = 0.5 if "embed_tokens" in name else shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std *= depth
        if name == "lm_head.weight" or name.endswith("gate.weight"):
            std *= 0.5
        return (rng.normal(size=shape) * std).astype(np.float32)

    return {name: draw(name, shape) for name, shape in parameter_shapes(config).items()}


# -------------------- the training


class Corpus(NamedTuple):
    """Training bytes, library first, then its tests from `boundary` on; held-out files by name."""

    train: np.ndarray
    boundary: int
    held_out: list[tuple[str, np.ndarray]]


def make_corpus() -> Corpus:
    """The corpus of the running interpreter."""
    library: list[bytes] = []
    tests: list[bytes] = []
    for name, text in data.stdlib_sources(held_out=False):
        is_test = {"test", "tests", "idle_test"} & set(name.split("/"))
        (tests if is_test else library).append(text + SEPARATOR)
    head, tail = b"".join(library), b"".join(tests)
    held_out = [(name, np.frombuffer(text, np.uint8)) for name, text in data.stdlib_sources(held_out=True)]
    return Corpus(np.frombuffer(head + tail, np.uint8), len(head), held_out)


def save_corpus(corpus: Corpus, path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    held_out = {f"held_out/{name}": text for name, text in corpus.held_out}
    np.savez_compressed(path, train=corpus.train, boundary=np.int64(corpus.boundary), **held_out)  # type: ignore[arg-type]


def load_corpus(path: str) -> Corpus:
    with np.load(path) as file:
        held_out = [(n.removeprefix("held_out/"), file[n]) for n in file.files if n.startswith("held_out/")]
        return Corpus(file["train"], int(file["boundary"]), held_out)


def held_out_windows(corpus: Corpus, length: int) -> np.ndarray:
    """int32[N, length]: every whole window of every held-out file, without overlap."""
    windows = [t[i : i + length] for _, t in corpus.held_out for i in range(0, len(t) - length + 1, length)]
    require(len(windows) > 0, f"the held-out modules have no window of {length} bytes; give a shorter context.")
    return np.stack(windows).astype(np.int32)


class State(NamedTuple):
    params: Params
    mean: Params
    square: Params
    step: jax.Array


def new_state(config: DeepseekV32Config, seed: int) -> State:
    params = {name: jnp.asarray(value) for name, value in init_params(config, seed).items()}
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    return State(params, zeros, {name: jnp.zeros_like(value) for name, value in params.items()}, jnp.int32(0))


def sample(key: jax.Array, corpus: jax.Array, boundary: jax.Array, options: Options) -> jax.Array:
    """uint8[batch, context + 1]: windows at random places of the library or of its tests."""
    length = options.context + 1
    which, where = jax.random.split(key)
    library = jax.random.uniform(which, (options.batch,)) < options.library_share
    last = corpus.shape[0] - length
    split = jnp.clip(boundary, 0, last)
    low = jnp.where(library | (split >= last), 0, split)
    high = jnp.where(library, jnp.maximum(jnp.minimum(boundary - length, last), 0), last)
    starts = jnp.clip(jax.random.randint(where, (options.batch,), low, high + 1), 0, last)
    return jax.vmap(lambda start: lax.dynamic_slice(corpus, (start,), (length,)))(starts)


def loss_fn(
    params: Params, tokens: jax.Array, rows: jax.Array, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Next-byte cross entropy plus the indexers' KL: disjoint parameters learn from the two."""
    logits, aux = forward(params, tokens[:, :-1], rows, config, mode)
    ce = cross_entropy(logits, tokens[:, 1:]).mean()
    return ce + aux["kl"].sum(), aux | {"ce": ce}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.sum(logits * hot, -1)


def global_norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in tree.values()), start=jnp.float32(0)))


def adamw(state: State, grads: Params, lr: jax.Array, options: Options) -> State:
    """One AdamW step (betas 0.9, 0.95); gradients that are not finite change nothing."""
    indexer = {name for name in grads if ".indexer." in name}
    norms = {part: global_norm({n: g for n, g in grads.items() if (n in indexer) is part}) for part in (True, False)}
    finite = jnp.isfinite(norms[True] + norms[False])
    step = state.step + 1
    t = step.astype(jnp.float32)
    params, mean, square = {}, {}, {}
    for name, g in grads.items():
        g = jnp.where(finite, g * jnp.minimum(1.0, 1.0 / (norms[name in indexer] + 1e-9)), 0.0)
        mean[name] = 0.9 * state.mean[name] + 0.1 * g
        square[name] = 0.95 * state.square[name] + 0.05 * g * g
        update = mean[name] / (1 - 0.9**t) / (jnp.sqrt(square[name] / (1 - 0.95**t)) + 1e-8)
        decay = options.weight_decay if g.ndim > 1 else 0.0
        params[name] = state.params[name] - jnp.where(finite, lr, 0.0) * (update + decay * state.params[name])
    return State(params, mean, square, step)


def balance(params: Params, load: jax.Array, speed: jax.Array, config: DeepseekV32Config) -> Params:
    """Moves every expert's bias against its load (arXiv:2408.15664); load[MoE layers, E]."""
    moved = dict(params)
    for row, layer in enumerate(i for i in range(config.num_hidden_layers) if config.is_moe_layer(i)):
        name = LAYER.format(layer) + BIAS
        moved[name] = params[name] + speed * jnp.sign(load[row].mean() - load[row])
    return moved


def train_call(
    state: State,
    corpus: jax.Array,
    boundary: jax.Array,
    schedule: jax.Array,
    key: jax.Array,
    *,
    config: DeepseekV32Config,
    options: Options,
    sparse: bool,
) -> tuple[State, dict[str, jax.Array]]:
    """`steps_per_call` steps; schedule = float32[4]: peak rate, progress, progress per step, warm-up start (step)."""
    mode = Mode(sparse, jnp.dtype(options.dtype), options.chunk, options.attention, options.unroll)
    peak, progress, pace, warm = schedule

    def one(state: State, i: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        place, query = jax.random.split(jax.random.fold_in(key, state.step))
        tokens = sample(place, corpus, boundary, options).astype(jnp.int32)
        rows = jax.random.permutation(query, options.context)[: options.query_rows]
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, rows, config, mode)
        now = progress + pace * i
        rate = peak * learning_rate(now) * jnp.clip((state.step + 1 - warm) / 100.0, 0.01, 1.0)
        new = adamw(state, grads, rate, options)
        report = {name: aux[name].mean() for name in ("ce", "kl", "mass", "zeros")} | {"norm": global_norm(grads)}
        if "load" in aux:
            speed = 1e-3 * jnp.clip((1 - now) / 0.2, 0.0, 1.0)
            new = new._replace(params=balance(new.params, aux["load"], speed, config))
            report["peak_load"] = (aux["load"].max(-1) / aux["load"].mean(-1)).max()
        return new, report

    state, reports = lax.scan(one, state, jnp.arange(options.steps_per_call, dtype=jnp.float32))
    return state, jax.tree.map(jnp.mean, reports)


def learning_rate(progress: jax.Array) -> jax.Array:
    """Share of the peak rate: level, then linear to zero over the last 70 %."""
    return jnp.clip((1 - progress) / 0.7, 0.0, 1.0)


@functools.partial(jax.jit, static_argnames=("config", "sparse", "chunk"))
def window_loss(
    params: Params, tokens: jax.Array, *, config: DeepseekV32Config, sparse: bool, chunk: int = 512
) -> jax.Array:
    """Mean cross entropy (nats per byte) of each window [B, S] given its own beginning, in float32, selection exact."""
    with jax.default_matmul_precision("highest"):
        logits, _ = forward(params, tokens, None, config, Mode(sparse, jnp.float32, chunk, exact=True))
    return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean(-1)


def evaluate(params: Params, windows: np.ndarray, config: DeepseekV32Config, sparse: bool, batch: int = 8) -> float:
    """Mean bits per byte over windows[N, S]."""
    total = 0.0
    for i in range(0, len(windows), batch):
        part = windows[i : i + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), part.shape[1]), np.int32)])
        total += float(np.asarray(window_loss(params, padded, config=config, sparse=sparse))[: len(part)].sum())
    return total / len(windows) / math.log(2)


# -------------------- the files


def save_state(state: State, progress: float, config_json: dict[str, Any], folder: pathlib.Path) -> None:
    """params.npz (float32, with the config and the progress) and moments.npz (bfloat16 bits), whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"step": np.int64(state.step), "progress": np.float64(progress), "config": np.array(json.dumps(config_json))}
    params = {f"params/{n}": np.asarray(v, np.float32) for n, v in state.params.items()} | meta
    moments = {
        f"{part}/{name}": np.asarray(value).astype(ml_dtypes.bfloat16).view(np.uint16)
        for part, tree in (("mean", state.mean), ("square", state.square))
        for name, value in tree.items()
    }
    for name, arrays in (("params", params), ("moments", moments)):
        partial = folder / f"{name}.partial.npz"
        np.savez(partial, **arrays)
        os.replace(partial, folder / f"{name}.npz")


def load_state(paths: list[str]) -> tuple[State, float, dict[str, Any]]:
    """(state, progress, config.json's fields) from params.npz and, if given, moments.npz, in any order."""
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as file:
            arrays |= {name: file[name] for name in file.files}
    require("step" in arrays, f"--resume got {paths}; params.npz is needed (moments.npz may be added).")
    params = {n.removeprefix("params/"): jnp.asarray(v) for n, v in arrays.items() if n.startswith("params/")}

    def moments(part: str) -> Params:
        stored = {name: arrays.get(f"{part}/{name}") for name in params}
        return {
            name: jnp.zeros_like(params[name]) if v is None else jnp.asarray(v.view(ml_dtypes.bfloat16), jnp.float32)
            for name, v in stored.items()
        }

    state = State(params, moments("mean"), moments("square"), jnp.int32(arrays["step"]))
    return state, float(arrays["progress"]), json.loads(str(arrays["config"]))


def published_tensors(params: Params) -> dict[str, np.ndarray]:
    """Tensors as published: one per expert, bfloat16, with norms and router biases in float32."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in params.items():
        array = np.asarray(value, np.float32)
        if not name.endswith(FLOAT32_SUFFIXES):
            array = array.astype(ml_dtypes.bfloat16)
        if ".experts." in name:
            head, tail = name.split(".experts.")
            tensors |= {f"{head}.experts.{e}.{tail}": array[e] for e in range(len(array))}
        else:
            tensors[name] = array
    return tensors


def rounded(params: Params) -> Params:
    """The weights that the exported folder holds, as float32."""
    return {
        name: value if name.endswith(FLOAT32_SUFFIXES) else jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32)
        for name, value in params.items()
    }


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """The safetensors format: length of the header, the header (JSON), the arrays' bytes, widest type first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        array = tensors[name]
        start, end = end, end + array.nbytes
        kind = {"float32": "F32", "bfloat16": "BF16"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def export(params: Params, config_json: dict[str, Any], folder: pathlib.Path) -> int:
    """Writes config.json and model.safetensors; returns the weights' size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json, indent=1, sort_keys=True) + "\n")
    write_safetensors(folder / "model.safetensors", published_tensors(params))
    return (folder / "model.safetensors").stat().st_size


# -------------------- the run


def minutes_used() -> float:
    return (time.monotonic() - START) / 60


def say(text: str) -> None:
    print(f"[{60 * minutes_used():6.1f} s] {text}", flush=True)


class Trainer:
    """Compiled programs over a corpus that lies on the device."""

    def __init__(self, config: DeepseekV32Config, options: Options, corpus: Corpus, seed: int):
        require(
            len(corpus.train) > options.context + 1,
            f"the training text has {len(corpus.train)} bytes; at least context + 2 are needed.",
        )
        self.config, self.options, self.seed = config, options, seed
        self.corpus = jnp.asarray(corpus.train)
        self.boundary = jnp.int32(corpus.boundary)
        self.windows = held_out_windows(corpus, options.context)
        self.key = jax.random.key(seed)
        self.programs: dict[bool, Any] = {}

    def program(self, sparse: bool) -> Any:
        """The compiled call of a phase."""
        if sparse not in self.programs:
            began = time.monotonic()
            call = functools.partial(train_call, config=self.config, options=self.options, sparse=sparse)
            state = jax.eval_shape(functools.partial(new_state, self.config, self.seed))
            lowered = jax.jit(call, donate_argnums=0).lower(
                state, self.corpus, self.boundary, jax.ShapeDtypeStruct((4,), jnp.float32), self.key
            )
            self.programs[sparse] = lowered.compile()
            say(f"{'sparse' if sparse else 'dense'} phase compiled in {time.monotonic() - began:.0f} s")
        return self.programs[sparse]

    def call(self, state: State, sparse: bool, schedule: tuple[float, ...]) -> tuple[State, dict[str, float]]:
        values = jnp.asarray(schedule, jnp.float32)
        state, report = self.program(sparse)(state, self.corpus, self.boundary, values, self.key)
        return state, {name: float(value) for name, value in report.items()}  # waits for the device

    def bits(self, params: Params, sparse: bool, most: int | None = None) -> float:
        """Held-out bits per byte of the weights as exported; `most` windows, spread over the modules."""
        windows = self.windows
        if most is not None and most < len(windows):
            windows = windows[np.linspace(0, len(windows) - 1, most).astype(int)]
        return evaluate(rounded(params), windows, self.config, sparse)


class Plan(NamedTuple):
    """What a run does with its time."""

    lr: float
    deadline: float  # time.monotonic() at which training ends
    start: float = 0.0  # progress at the beginning
    until: float = 1.0
    switch: float = 0.65
    max_steps: int | None = None
    save_every: float = 120.0
    evaluate_every: float = 60.0


def train(
    trainer: Trainer, state: State, plan: Plan, config_json: dict[str, Any], out: pathlib.Path | None
) -> tuple[State, float, int, float]:
    """Trains until the deadline: (state, progress, steps made, seconds of training)."""
    options = trainer.options
    tokens_per_call = options.batch * options.context * options.steps_per_call
    first = int(state.step)
    if plan.start < plan.switch:
        trainer.program(False)
    if plan.until > plan.switch:
        trainer.program(True)
    if plan.evaluate_every < math.inf:
        for sparse in (False, True):
            trainer.bits(state.params, sparse, 8)
        say("evaluation compiled")
    began = now = saved = evaluated = spoken = time.monotonic()
    budget = max(plan.deadline - began, 1e-3)
    spent: dict[bool, float] = {}
    progress, calls = plan.start, 0
    while progress < plan.until:
        sparse = progress >= plan.switch
        last = spent.get(sparse, 0.0)
        if plan.max_steps is None:
            share = (plan.until - plan.start) * last / budget
        else:
            share = (plan.until - plan.start) * options.steps_per_call / plan.max_steps
        share = min(share, plan.until - progress)
        pace = share / options.steps_per_call
        state, report = trainer.call(state, sparse, (plan.lr, progress, pace, first))
        before, now = now, time.monotonic()
        calls += 1
        spent[sparse] = now - before
        if plan.max_steps is None:
            done = (now - began) / budget
        else:
            done = calls * options.steps_per_call / plan.max_steps
        progress = min(plan.until, plan.start + (plan.until - plan.start) * done)
        if now - spoken > 5 or calls == 1 or progress >= plan.until:
            spoken = now
            report |= {"step": int(state.step), "progress": progress, "tokens_per_s": tokens_per_call / spent[sparse]}
            tell(report, sparse, out)
        if now - evaluated > plan.evaluate_every:
            bits = trainer.bits(state.params, sparse, 24)
            evaluated = time.monotonic()
            say(f"held-out bits per byte (24 windows, {'sparse' if sparse else 'dense'}): {bits:.4f}")
        if out is not None and now - saved > plan.save_every:
            save_state(state, progress, config_json, out)
            saved = time.monotonic()
        now = time.monotonic()
        if plan.max_steps is None and now >= plan.deadline:
            progress = plan.until
    return state, progress, int(state.step) - first, time.monotonic() - began


def tell(report: dict[str, float], sparse: bool, out: pathlib.Path | None) -> None:
    """One line for people, one for programs."""
    say(
        f"{'sparse' if sparse else 'dense '} step {report['step']:6d} progress {report['progress']:.3f} "
        f"train bpb {report['ce'] / math.log(2):.4f} "
        f"kl {report['kl']:.4f} mass {report['mass']:.4f} zeros {report['zeros']:.3f} "
        f"norm {report['norm']:.2f} peak load {report.get('peak_load', 1.0):.2f} "
        f"{report['tokens_per_s'] / 1e3:.0f}k tokens/s"
    )
    if not math.isfinite(report["ce"]):
        raise SystemExit("the loss is not finite: lower --lr")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(report | {"sparse": sparse, "seconds": 60 * minutes_used()}) + "\n")


def choose_attention(options: Options, config: DeepseekV32Config) -> str:
    """cuDNN's fused kernel where it runs here and agrees with the plain one, forward and backward."""
    if jax.default_backend() != "gpu" or options.dtype != "bfloat16":
        return "xla"
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, options.context, config.num_attention_heads, d) for d in (config.qk_head_dim,) * 2]
    shapes.append((*shapes[0][:3], config.v_head_dim))
    q, k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    mask = jnp.tril(jnp.ones((options.context, options.context), bool))[None]

    def total(f: Any, *args: jax.Array) -> jax.Array:
        return jnp.sum(f(*args, sm_scale=config.sm_scale).astype(jnp.float32) ** 2)

    try:
        results = [
            jax.jit(jax.grad(functools.partial(total, f), argnums=(0, 1, 2)))(q, k, v)
            for f in (cudnn_attention, lambda q, k, v, sm_scale: attend(q, k, v, mask, sm_scale))
        ]
        gap = max(
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
            for a, b in zip(*results, strict=True)
        )
    except Exception as error:  # any failure of an optional library means the plain path
        say(f"cuDNN attention does not run here ({type(error).__name__}: {str(error)[:200]}); plain attention instead")
        return "xla"
    say(f"cuDNN attention agrees with the plain one to {gap:.4f}")
    return "cudnn" if gap < 0.02 else "xla"


def probe(config: DeepseekV32Config, options: Options, corpus: Corpus, deadline: float) -> None:
    """Tokens per second and peak memory of several settings, until the deadline."""
    fused = choose_attention(options, config)
    settings: list[tuple[bool, dict[str, Any]]] = [
        (False, {"attention": fused}),
        (True, {}),
        (False, {"attention": fused, "batch": 2 * options.batch}),
        (True, {"chunk": options.chunk // 2}),
        (False, {"attention": fused, "unroll": True}),
        (True, {"batch": 2 * options.batch}),
        (False, {"attention": "xla"}),
        (False, {"attention": fused, "batch": max(1, options.batch // 2)}),
    ]
    for sparse, change in settings:
        if time.monotonic() > deadline:
            break
        tried = options._replace(**change)
        try:
            trainer = Trainer(config, tried, corpus, 0)
            state = new_state(config, 0)
            seconds = []
            for _ in range(4):
                began = time.monotonic()
                state, report = trainer.call(state, sparse, (1e-3, 0.0, 0.0, 0))
                seconds.append(time.monotonic() - began)
        except Exception as error:  # out of memory, say: the next setting may fit
            say(f"{change}: {type(error).__name__}: {str(error)[:200]}")
            continue
        step = min(seconds[1:]) / tried.steps_per_call
        memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        say(
            f"PROBE {'sparse' if sparse else 'dense'} batch {tried.batch} attention {tried.attention} chunk "
            f"{tried.chunk} unroll {tried.unroll}: {1e3 * step:.1f} ms per step, "
            f"{tried.batch * tried.context / step / 1e3:.0f}k tokens/s, "
            f"peak so far {memory:.1f} GiB, ce {report['ce']:.3f}"
        )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock until training ends (per trial)")
    parser.add_argument("--steps", type=int, help="number of steps instead of --minutes")
    parser.add_argument("--out", help="folder for checkpoint, weights and log")
    parser.add_argument("--resume", nargs="+", metavar="FILE", help="params.npz and moments.npz of an earlier run")
    parser.add_argument("--start", type=float, help="progress to begin at (default: 0, or where the resumed run ended)")
    parser.add_argument("--until", type=float, default=1.0, help="progress to end at")
    parser.add_argument("--switch", type=float, default=0.65, help="progress at which attention becomes sparse")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3], help="peak rate; several: a trial of each")
    parser.add_argument("--corpus", help="file of --pack; default: this interpreter's library")
    parser.add_argument("--pack", metavar="FILE", help="only write this interpreter's corpus to FILE")
    parser.add_argument("--export", nargs=2, metavar=("PARAMS", "FOLDER"), help="only write a model folder")
    parser.add_argument("--probe", action="store_true", help="only measure throughput, for at most --minutes")
    parser.add_argument("--config", help="config.json of another model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=float, default=60.0, help="seconds between held-out figures; 0: never")
    for name, default in Options()._asdict().items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true")
        elif name in ("attention", "dtype"):
            choices = ["auto", "xla", "cudnn"] if name == "attention" else ["auto", "bfloat16", "float32"]
            parser.add_argument(option, choices=choices, default="auto")
        else:
            parser.add_argument(option, type=type(default), default=default)
    return parser.parse_args(arguments)


def make_options(arguments: argparse.Namespace, config: DeepseekV32Config) -> Options:
    options = Options(**{name: getattr(arguments, name) for name in Options._fields})
    if options.dtype == "auto":
        options = options._replace(dtype="bfloat16" if jax.default_backend() == "gpu" else "float32")
    if options.attention == "auto" and not arguments.probe:
        options = options._replace(attention=choose_attention(options, config))
    return options


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains, saves, evaluates; returns the figures of the last trial."""
    config_json = json.loads(pathlib.Path(arguments.config).read_text()) if arguments.config else CONFIG
    resumed = load_state(arguments.resume) if arguments.resume else None
    if resumed is not None:
        config_json = resumed[2]
    config = config_from_json(config_json)
    size = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size / 1e6:.3f} M parameters")
    options = make_options(arguments, config)
    corpus = load_corpus(arguments.corpus) if arguments.corpus else make_corpus()
    say(
        f"{len(corpus.train) / 1e6:.1f} MB to train on, {sum(len(t) for _, t in corpus.held_out) / 1e3:.0f} kB held out"
    )
    if arguments.probe:
        probe(config, options, corpus, START + 60 * arguments.minutes)
        return {}
    trainer = Trainer(config, options, corpus, arguments.seed)
    out = pathlib.Path(arguments.out) if arguments.out else None
    result: dict[str, float] = {}
    for trial, lr in enumerate(arguments.lr):
        state, progress, _ = resumed or (new_state(config, arguments.seed), 0.0, None)
        start = progress if arguments.start is None else arguments.start
        origin = START if trial == 0 else time.monotonic()
        plan = Plan(
            lr=lr,
            deadline=origin + 60 * arguments.minutes,
            start=start,
            until=arguments.until,
            switch=arguments.switch,
            max_steps=arguments.steps,
            evaluate_every=arguments.evaluate_every or math.inf,
        )
        if resumed is not None:
            state = jax.tree.map(jnp.array, state)  # donation must not eat what the next trial starts from
        state, progress, steps, seconds = train(trainer, state, plan, config_json, out)
        if out is not None:
            save_state(state, progress, config_json, out)
            weights = export(state.params, config_json, out)
            say(f"saved to {out}: weights {weights / 1e6:.2f} MB")
        result = {
            "lr": lr,
            "dense_bpb": trainer.bits(state.params, False),
            "sparse_bpb": trainer.bits(state.params, True),
            "steps": steps,
            "tokens": steps * options.batch * options.context,
            "seconds": round(seconds, 1),
            "progress": progress,
            "windows": len(trainer.windows),
        }
        print(json.dumps(result), flush=True)
    return result


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parsed = parse(arguments)
    if parsed.pack:
        save_corpus(make_corpus(), parsed.pack)
        return {}
    if parsed.export:
        state, _, config_json = load_state([parsed.export[0]])
        size = export(state.params, config_json, pathlib.Path(parsed.export[1]))
        print(f"{parsed.export[1]}: config.json and model.safetensors, {size} bytes")
        return {}
    return run(parsed)


if __name__ == "__main__":
    main()
