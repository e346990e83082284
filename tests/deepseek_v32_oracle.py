"""The whole model in numpy float64 from published tensors, keys and values expanded, without a line of the library.

Written from the equations, so that it judges layout, absorption, caches, selection and routing alike. Reads the config
as a plain object with the published field names.
"""

import math

import numpy as np


def rms(x, weight, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def frequencies(rope, dim):
    base = rope.theta ** (-np.arange(0, dim, 2) / dim)
    if rope.factor == 1:
        return base

    def correction(rotations):
        return dim * math.log(rope.original_max_position / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

    low = max(math.floor(correction(rope.beta_fast)), 0)
    high = min(math.ceil(correction(rope.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return base * (1 - ramp) + base / rope.factor * ramp


def rotate(x, angles, interleaved, amplitude=1.0):
    """x[L, ..., dim] by angles[L, dim // 2], times the amplitude."""
    turn = amplitude * np.exp(1j * angles).reshape(len(x), *[1] * (x.ndim - 2), -1)
    half = x.shape[-1] // 2
    pairs = x[..., 0::2] + 1j * x[..., 1::2] if interleaved else x[..., :half] + 1j * x[..., half:]
    pairs = pairs * turn
    if interleaved:
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    return np.concatenate([pairs.real, pairs.imag], -1)


def selected(w, p, c, x, u, angles):
    """bool[L, L]: key j is among the index_topk best of query i, j <= i."""
    length, dr, pairs = len(x), c.qk_rope_head_dim, (c.indexer_rope_interleave, c.rope.attention_factor)
    q = (u @ w[p + "wq_b.weight"].T).reshape(length, c.index_n_heads, c.index_head_dim)
    k = x @ w[p + "wk.weight"].T
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * w[p + "k_norm.weight"] + w[p + "k_norm.bias"]
    q = np.concatenate([rotate(q[..., :dr], angles, *pairs), q[..., dr:]], -1)
    k = np.concatenate([rotate(k[..., :dr], angles, *pairs), k[..., dr:]], -1)
    gate = x @ w[p + "weights_proj.weight"].T / math.sqrt(c.index_n_heads * c.index_head_dim)
    scores = np.einsum("thn,th->tn", np.maximum(np.einsum("thd,nd->thn", q, k), 0), gate)
    mask = np.zeros((length, length), bool)
    for t in range(length):
        mask[t, np.argsort(-scores[t, : t + 1], kind="stable")[: c.index_topk]] = True
    return mask


def attention(w, p, c, x):
    length, heads, dn, dr, rank = len(x), c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    angles = np.arange(length)[:, None] * frequencies(c.rope, dr)
    u = rms(x @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"])
    q = (u @ w[p + "q_b_proj.weight"].T).reshape(length, heads, dn + dr)
    z = x @ w[p + "kv_a_proj_with_mqa.weight"].T
    kv = rms(z[:, :rank], w[p + "kv_a_layernorm.weight"]) @ w[p + "kv_b_proj.weight"].T
    kv = kv.reshape(length, heads, dn + c.v_head_dim)
    logits = np.einsum("thd,shd->hts", q[..., :dn], kv[..., :dn])
    pairs = (c.rope_interleave, c.rope.attention_factor)
    logits += np.einsum("thd,sd->hts", rotate(q[..., dn:], angles, *pairs), rotate(z[:, rank:], angles, *pairs))
    mscale = 1 if c.rope.factor == 1 else 0.1 * c.rope.mscale_all_dim * math.log(c.rope.factor) + 1
    logits *= mscale**2 / math.sqrt(dn + dr)
    logits = np.where(selected(w, p + "indexer.", c, x, u, angles), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, kv[..., dn:]).reshape(length, -1) @ w[p + "o_proj.weight"].T


def swiglu(w, p, x):
    gate = x @ w[p + "gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[p + "up_proj.weight"].T)) @ w[p + "down_proj.weight"].T


def mixture(w, p, c, x):
    out = swiglu(w, p + "shared_experts.", x) if c.n_shared_experts else np.zeros_like(x)
    scores = 1 / (1 + np.exp(-(x @ w[p + "gate.weight"].T)))
    choice = scores + w[p + "gate.e_score_correction_bias"]
    choice = choice.reshape(len(x), c.n_group, c.n_routed_experts // c.n_group)
    for t in range(len(x)):
        best = np.argsort(-np.sort(choice[t], -1)[:, -2:].sum(-1), kind="stable")[: c.topk_group]
        alive = np.full_like(choice[t], -np.inf)
        alive[best] = choice[t][best]
        ids = np.argsort(-alive.ravel(), kind="stable")[: c.num_experts_per_tok]
        weights = scores[t, ids] / (scores[t, ids].sum() if c.norm_topk_prob else 1) * c.routed_scaling_factor
        out[t] += sum(a * swiglu(w, f"{p}experts.{e}.", x[t]) for a, e in zip(weights, ids))
    return out


def model_logits(tensors, config, token_ids):
    """float64[L, V] for one sequence of ids [L]; tensors by their published names."""
    c, w = config, {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    h = w["model.embed_tokens.weight"][token_ids]
    for layer in range(c.num_hidden_layers):
        p = f"model.layers.{layer}."
        h = h + attention(w, p + "self_attn.", c, rms(h, w[p + "input_layernorm.weight"], c.rms_norm_eps))
        x = rms(h, w[p + "post_attention_layernorm.weight"], c.rms_norm_eps)
        sparse = c.n_routed_experts and layer >= c.first_k_dense_replace
        h = h + (mixture(w, p + "mlp.", c, x) if sparse else swiglu(w, p + "mlp.", x))
    head = w["model.embed_tokens.weight"] if c.tie_word_embeddings else w["lm_head.weight"]
    return rms(h, w["model.norm.weight"], c.rms_norm_eps) @ head.T


def random_tensors(shapes, seed):
    """Random published tensors, scaled so that every part of the model matters."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        noise = rng.normal(size=shape)
        if len(shape) == 2:
            return (noise * shape[-1] ** -0.5).astype(np.float32)
        return (noise * 0.1 + (not name.endswith("bias"))).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}
