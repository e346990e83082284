"""DeepSeek-V3.2 as training needs it: whole sequences, no caches, differentiable; parameters as the library has them.

Besides logits a pass gives what the indexer learns from: it is trained by the KL divergence to the main attention's
distribution, summed over heads, and the main model is not trained through it (arXiv:2512.02556).

B sequences, S positions, Q queries, K keys, H heads, E experts, V values of a byte.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.moe import matmul, swiglu
from sparse_mla_jax.layers.norm import layer_norm, rms_norm
from sparse_mla_jax.ops.rope import rope_frequencies, rotate
from sparse_mla_jax.ops.router import biased_grouped_topk

HIDDEN = -1e30  # a finite minus infinity: gradients of masked entries stay zero, not NaN
TINY = 1e-30  # below every score that is not zero

Params = dict[str, Any]
Aux = dict[str, jax.Array]


class Mode(NamedTuple):
    """How one forward pass computes."""

    sparse: bool
    dtype: Any
    chunk: int  # query rows whose attention is computed together
    attention: str = "xla"  # of the dense phase: xla or cudnn
    exact: bool = False  # select by sorting, ties to the lower position, as the library does


def linear(x: jax.Array, weight: jax.Array, mode: Mode, dtype: Any = None) -> jax.Array:
    """x[..., in] times weight[in, ...]; operands in the compute type, sums in float32."""
    return matmul(x.astype(mode.dtype), weight.astype(mode.dtype)).astype(dtype or mode.dtype)


# --- selection


def sortable(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of float32 x."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def threshold(scores: jax.Array, k: int, bits: int = 24) -> jax.Array:
    """The k-th largest of scores[..., K] along the last axis, rounded down to its first `bits` bits, as uint32 keys."""
    keys = sortable(scores)

    def add_bit(i, found):
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.sum(keys >= candidate[..., None], axis=-1) >= k
        return jnp.where(enough, candidate, found)

    return lax.fori_loop(0, bits, add_bit, jnp.zeros(scores.shape[:-1], jnp.uint32))


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


# --- the indexer


class Index(NamedTuple):
    """The indexer's queries [B, S, heads, D], keys [B, S, D] and head weights float32[B, S, heads]."""

    q: jax.Array
    k: jax.Array
    weights: jax.Array

    def scores(self, rows: Any, end: int) -> jax.Array:
        """float32[B, Q, K]: the head-weighted sum of relu(q . k) of these query rows over the keys before `end`."""
        dots = jnp.einsum("bqhd,bkd->bhqk", self.q[:, rows], self.k[:, :end], preferred_element_type=jnp.float32)
        return jnp.einsum("bqh,bhqk->bqk", self.weights[:, rows], jax.nn.relu(dots))


def make_index(p: Params, x: jax.Array, u: jax.Array, turn: Any, config: DeepseekV32Config, mode: Mode) -> Index:
    """The indexer's part of a layer, from detached inputs: the model is not trained through it."""
    x, u, rotated = lax.stop_gradient(x), lax.stop_gradient(u), config.qk_rope_head_dim
    q = linear(u, p["wq_b"], mode)
    k = layer_norm(linear(x, p["wk"], mode), p["k_norm"]["weight"], p["k_norm"]["bias"])[:, :, None]
    q, k = (jnp.concatenate([turn(a[..., :rotated], interleaved=False), a[..., rotated:]], -1) for a in (q, k))
    weights = linear(x, p["weights_proj"], mode, jnp.float32) * (config.index_n_heads * config.index_head_dim) ** -0.5
    return Index(q, k[:, :, 0], weights)


def indexer_loss(
    index: Index, q: jax.Array, k: jax.Array, rows: jax.Array, config: DeepseekV32Config, mode: Mode
) -> Aux:
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
    target, mask = full, jnp.broadcast_to(visible, scores.shape)
    if mode.sparse:
        target = jax.nn.softmax(jnp.where(selected[:, None], logits, HIDDEN), axis=-1).mean(1)
        mask = selected
    target = lax.stop_gradient(target)
    predicted = jax.nn.log_softmax(jnp.where(mask, scores, HIDDEN), axis=-1)
    gap = jnp.log(jnp.maximum(target, 1e-30)) - predicted
    kl = jnp.sum(jnp.where(mask & (target > 0), target * gap, 0.0), -1).mean()
    return {"kl": kl, "mass": lax.stop_gradient(mass), "zeros": lax.stop_gradient(zeros)}


# --- attention


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, sm_scale: float) -> jax.Array:
    """Attention of q[B, Q, H, D] over k[B, K, H, D], v[B, K, H, V] where mask[B or 1, Q, K]."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * sm_scale
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], logits, HIDDEN), axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, v, preferred_element_type=jnp.float32).astype(q.dtype)


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
    p: Params, x: jax.Array, rows: jax.Array | None, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, Aux]:
    """The attention sub-layer on normed x [B, S, D]: (output, what the indexer learns from)."""
    c, nope, rank = config, config.qk_nope_head_dim, config.kv_lora_rank
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    turn = functools.partial(rotate, positions=positions, frequencies=rope_frequencies(c.rope, c.qk_rope_head_dim))
    u = rms_norm(linear(x, p["q_a_proj"], mode), p["q_a_layernorm"])
    q = linear(u, p["q_b_proj"], mode)
    q = jnp.concatenate([q[..., :nope], turn(q[..., nope:], interleaved=True)], -1)
    latent = linear(x, p["kv_a_proj_with_mqa"], mode)
    shared = turn(latent[..., None, rank:], interleaved=True)
    z = rms_norm(latent[..., :rank], p["kv_a_layernorm"])
    k = linear(z, p["kv_b_k"].transpose(2, 0, 1), mode)
    k = jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:3], c.qk_rope_head_dim))], -1)
    v = linear(z, p["kv_b_v"].transpose(1, 0, 2), mode)
    index = make_index(p["indexer"], x, u, turn, c, mode)
    out = causal_attention(q, k, v, index, c, mode)
    aux = {}
    if rows is not None:
        aux = indexer_loss(index, lax.stop_gradient(q), lax.stop_gradient(k), rows, c, mode)
    return linear(out.reshape(*x.shape[:2], -1), p["o_proj"].reshape(-1, x.shape[2]), mode, jnp.float32), aux


# --- feed-forward layers


def feed_forward(p: Params, x: jax.Array, mode: Mode) -> jax.Array:
    """float32[..., D]: SwiGLU in the compute type."""
    return swiglu({name: weight.astype(mode.dtype) for name, weight in p.items()}, x.astype(mode.dtype))


def mixture(p: Params, x: jax.Array, config: DeepseekV32Config, mode: Mode) -> tuple[jax.Array, jax.Array]:
    """All experts as one wide SwiGLU whose hidden values the router scales: (output, load[E])."""
    c, flat = config, x.reshape(-1, x.shape[-1])
    weights, ids = biased_grouped_topk(
        jnp.dot(flat, p["gate"]["weight"], precision=lax.Precision.HIGHEST),
        p["gate"]["e_score_correction_bias"],
        num_groups=c.n_group,
        groups_kept=c.topk_group,
        k=c.num_experts_per_tok,
        scale=c.routed_scaling_factor,
        renormalize=c.norm_topk_prob,
    )
    chosen = jax.nn.one_hot(ids, c.n_routed_experts)
    share = jnp.einsum("tk,tke->te", weights, chosen)
    gate, up, down = (p["experts"][f"{part}_proj"] for part in ("gate", "up", "down"))
    hidden = jax.nn.silu(linear(flat, gate.transpose(1, 0, 2), mode)) * linear(flat, up.transpose(1, 0, 2), mode)
    hidden = hidden * share[..., None].astype(mode.dtype)
    out = linear(hidden.reshape(len(flat), -1), down.reshape(-1, down.shape[2]), mode, jnp.float32)
    if c.n_shared_experts:
        out = out + feed_forward(p["shared_experts"], flat, mode)
    return out.reshape(x.shape), chosen.sum(1).mean(0)


# --- the model


def forward(
    params: Params, tokens: jax.Array, rows: jax.Array | None, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, Aux]:
    """Logits float32[B, S, V] after every token, and per layer: kl, mass (given query rows), load[E] (MoE layers)."""
    one_hot = jax.nn.one_hot(tokens, config.vocab_size, dtype=mode.dtype)  # a scatter-free gradient
    h = linear(one_hot, params["embed_tokens"], mode, jnp.float32)
    eps = config.rms_norm_eps

    def layer(moe: bool, h: jax.Array, p: Params) -> tuple[jax.Array, Aux]:
        out, aux = attention(p["self_attn"], rms_norm(h, p["input_layernorm"], eps=eps), rows, config, mode)
        h = h + out
        x = rms_norm(h, p["post_attention_layernorm"], eps=eps)
        if not moe:
            return h + feed_forward(p["mlp"], x, mode), aux
        out, aux["load"] = mixture(p["mlp"], x, config, mode)
        return h + out, aux

    collected: dict[str, list[jax.Array]] = {}
    for moe in (False, True):
        layers = [p for i, p in enumerate(params["layers"]) if config.is_moe_layer(i) is moe]
        if not layers:
            continue
        h, aux = lax.scan(functools.partial(layer, moe), h, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers))
        for name, value in aux.items():
            collected.setdefault(name, []).append(value)
    h = rms_norm(h, params["norm"], eps=eps)
    return linear(h, params["lm_head"], mode, jnp.float32), {
        name: jnp.concatenate(values) for name, values in collected.items()
    }


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Nats of targets[...] under logits[..., V]."""
    hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.sum(logits * hot, -1)


def loss_fn(
    params: Params, tokens: jax.Array, rows: jax.Array, config: DeepseekV32Config, mode: Mode
) -> tuple[jax.Array, Aux]:
    """Next-byte cross entropy plus the indexers' KL: disjoint parameters learn from the two."""
    logits, aux = forward(params, tokens[:, :-1], rows, config, mode)
    ce = cross_entropy(logits, tokens[:, 1:]).mean()
    return ce + aux["kl"].sum(), aux | {"ce": ce}
