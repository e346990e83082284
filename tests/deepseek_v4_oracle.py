"""DeepSeek-V4 in numpy float64 from published tensors, whole sequences at once, without a line of the library.

Written from the equations, token by token where they are recursive, so that it judges windows, compressors, caches,
selection and routing alike. Reads the config as a plain object with the published field names.
"""

import numpy as np
from deepseek_v32_oracle import frequencies, rms, rotate


def unit(x, eps=1e-6):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def turn_last(x, angles):
    width = 2 * angles.shape[-1]
    return np.concatenate([x[..., :-width], rotate(x[..., -width:], angles, True)], -1)


# --- streams ---------------------------------------------------------------------------------------------------------
def mixing(w, p, c, streams):
    """streams[L, n, D] -> what the sub-layer reads [L, D], its weights [L, n], the matrices [L, n, n]."""
    n, eps = streams.shape[1], c.hc_eps
    z = unit(streams.reshape(len(streams), n * streams.shape[2]), c.rms_norm_eps) @ w[p + "_fn"].T
    base, scale = w[p + "_base"], w[p + "_scale"]
    pre = sigmoid(scale[0] * z[:, :n] + base[:n]) + eps
    post = 2 * sigmoid(scale[1] * z[:, n : 2 * n] + base[n : 2 * n])
    m = softmax((scale[2] * z[:, 2 * n :] + base[2 * n :]).reshape(len(z), n, n), -1) + eps
    m = m / (m.sum(1, keepdims=True) + eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        m = m / (m.sum(2, keepdims=True) + eps)
        m = m / (m.sum(1, keepdims=True) + eps)
    return np.einsum("ln,lnd->ld", pre, streams), post, m


def mixed(streams, out, post, m):
    return post[:, :, None] * out[:, None, :] + np.einsum("lij,lid->ljd", m, streams)


# --- attention -------------------------------------------------------------------------------------------------------
def entries(w, p, x, ratio, dim, rope, eps):
    """Compressed entries [L // ratio, dim] of a whole sequence x[L, D]."""
    kv, gate, bias = x @ w[p + "wkv.weight"].T, x @ w[p + "wgate.weight"].T, w[p + "ape"]
    out = []
    for window in range(len(x) // ratio):
        now = slice(window * ratio, (window + 1) * ratio)
        values, scores = kv[now, -dim:], gate[now, -dim:] + bias[:, -dim:]
        if kv.shape[1] == 2 * dim and window:
            before = slice((window - 1) * ratio, window * ratio)
            values = np.concatenate([kv[before, :dim], values])
            scores = np.concatenate([gate[before, :dim] + bias[:, :dim], scores])
        out.append((softmax(scores, 0) * values).sum(0))
    pooled = rms(np.array(out).reshape(-1, dim), w[p + "norm.weight"], eps)
    return turn_last(pooled, np.arange(len(pooled))[:, None] * ratio * rope)


def chosen(w, p, c, x, u, ratio, rope, angles):
    """Per query the entries that the indexer takes."""
    length, heads, dim = len(x), c.index_n_heads, c.index_head_dim
    keys = entries(w, p + "compressor.", x, ratio, dim, rope, c.rms_norm_eps)
    q = turn_last((u @ w[p + "wq_b.weight"].T).reshape(length, heads, dim), angles)
    gate = x @ w[p + "weights_proj.weight"].T / np.sqrt(heads * dim)
    scores = np.einsum("thn,th->tn", np.maximum(np.einsum("thd,nd->thn", q, keys), 0), gate)
    return [np.argsort(-scores[t, : (t + 1) // ratio], kind="stable")[: c.index_topk] for t in range(length)]


def attention(w, p, c, x, ratio):
    length, heads, dim = len(x), c.num_attention_heads, c.head_dim
    rope = frequencies(c.compress_rope if ratio > 1 else c.rope, c.qk_rope_head_dim)
    angles = np.arange(length)[:, None] * rope
    u = rms(x @ w[p + "wq_a.weight"].T, w[p + "q_norm.weight"], c.rms_norm_eps)
    q = turn_last(unit((u @ w[p + "wq_b.weight"].T).reshape(length, heads, dim), c.rms_norm_eps), angles)
    kv = turn_last(rms(x @ w[p + "wkv.weight"].T, w[p + "kv_norm.weight"], c.rms_norm_eps), angles)
    far, rows = np.zeros((0, dim)), [[]] * length
    if ratio > 1:
        far = entries(w, p + "compressor.", x, ratio, dim, rope, c.rms_norm_eps)
        rows = [np.arange((t + 1) // ratio) for t in range(length)]
        if ratio == 4:
            rows = chosen(w, p + "indexer.", c, x, u, ratio, rope, angles)
    out = np.zeros((length, heads, dim))
    for t in range(length):
        keys = np.concatenate([kv[max(0, t - c.sliding_window + 1) : t + 1], far[np.asarray(rows[t], int)]])
        logits = np.concatenate([q[t] @ keys.T * dim**-0.5, w[p + "attn_sink"][:, None]], 1)
        out[t] = softmax(logits, -1)[:, :-1] @ keys
    out = turn_last(out, -angles).reshape(length, c.o_groups, -1)
    first = w[p + "wo_a.weight"].reshape(c.o_groups, c.o_lora_rank, -1)
    return np.einsum("tgi,goi->tgo", out, first).reshape(length, -1) @ w[p + "wo_b.weight"].T


# --- experts ---------------------------------------------------------------------------------------------------------
def expert(w, p, x, limit):
    gate = np.minimum(x @ w[p + "w1.weight"].T, limit)
    up = np.clip(x @ w[p + "w3.weight"].T, -limit, limit)
    return (gate * sigmoid(gate) * up) @ w[p + "w2.weight"].T


def experts(w, p, c, x, ids):
    score = np.sqrt(np.logaddexp(x @ w[p + "gate.weight"].T, 0))
    if p + "gate.tid2eid" in w:
        taken = w[p + "gate.tid2eid"][ids].astype(int)
    else:
        taken = np.argsort(-(score + w[p + "gate.bias"]), axis=-1, kind="stable")[:, : c.num_experts_per_tok]
    weights = np.take_along_axis(score, taken, -1)
    weights = weights / (weights.sum(-1, keepdims=True) if c.norm_topk_prob else 1) * c.routed_scaling_factor
    out = np.zeros_like(x)
    for number in range(c.n_routed_experts):
        share = (weights * (taken == number)).sum(-1, keepdims=True)
        out += share * expert(w, f"{p}experts.{number}.", x, c.swiglu_limit)
    return out + (expert(w, p + "shared_experts.", x, c.swiglu_limit) if c.n_shared_experts else 0)


def model_logits(tensors, c, ids):
    """ids[L] -> float64[L, V]."""
    w = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    streams = np.repeat(w["embed.weight"][ids][:, None], c.hc_mult, 1)
    for layer, ratio in enumerate(c.compress_ratios):
        p = f"layers.{layer}."
        x, post, m = mixing(w, p + "hc_attn", c, streams)
        out = attention(w, p + "attn.", c, rms(x, w[p + "attn_norm.weight"], c.rms_norm_eps), ratio)
        streams = mixed(streams, out, post, m)
        x, post, m = mixing(w, p + "hc_ffn", c, streams)
        out = experts(w, p + "ffn.", c, rms(x, w[p + "ffn_norm.weight"], c.rms_norm_eps), ids)
        streams = mixed(streams, out, post, m)
    z = unit(streams.reshape(len(ids), -1), c.rms_norm_eps) @ w["hc_head_fn"].T
    weights = sigmoid(w["hc_head_scale"] * z + w["hc_head_base"]) + c.hc_eps
    x = rms(np.einsum("ln,lnd->ld", weights, streams), w["norm.weight"], c.rms_norm_eps)
    return x @ w["embed.weight" if c.tie_word_embeddings else "head.weight"].T
