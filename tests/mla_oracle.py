"""Every family of latent attention in numpy float64 from published tensors, without a line of the library.

Written from the equations, keys and values expanded, one sequence at once: it judges absorption, caches, selection,
routing and the reading of config.json alike. Names are those of the hub.
"""

import math

import numpy as np
from deepseek_v32_oracle import rms, rotate
from mla_oracle_config import read

MISTRAL_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "lerope": "model.lerope",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn",
    "wq": "q_proj", "wkv_a_with_mqa": "kv_a_proj_with_mqa", "wkv_b": "kv_b_proj", "wo": "o_proj",
    "kv_a_norm": "kv_a_layernorm", "feed_forward": "mlp", "gate": "mlp.gate", "experts": "mlp.experts",
    "shared_experts": "mlp.shared_experts", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj",
}  # fmt: skip


def from_mistral(name):
    """Another family's name of a tensor of mistral_large4."""
    parts = name.split(".")
    prefix = ["model"] if parts[0] == "layers" else []
    return ".".join([*prefix, *(MISTRAL_NAMES.get(part, part) for part in parts)])


def sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


class Oracle:
    """One model; `margins` collects (where, relative distance of rank k to rank k + 1) of every choice."""

    def __init__(self, tensors, data):
        self.c = read(data)
        rename = from_mistral if self.c.family == "mistral_large4" else str
        self.w = {rename(name): np.asarray(value, np.float64) for name, value in tensors.items()}
        self.margins = []

    def linear(self, name, x):
        out = x @ self.w[name + ".weight"].T
        return out + self.w[name + ".bias"] if name + ".bias" in self.w else out

    def top(self, scores, count, where):
        """Ids of the `count` largest of scores[N], the earlier id where two are equal."""
        order = np.argsort(-scores, kind="stable")
        if 0 < count < len(scores):
            first, second = scores[order[count - 1]], scores[order[count]]
            if np.isfinite(second):
                largest = np.abs(scores[np.isfinite(scores)]).max()
                self.margins.append((where, (first - second) / largest if largest else 0.0))
        return order[:count]

    # --- attention ---------------------------------------------------------------------------------------------------
    def turn(self, one, x, interleaved):
        angles = np.arange(len(x))[:, None] * one.frequencies
        return rotate(x, angles, interleaved, one.amplitude)

    def turn_index(self, one, x):
        """x[L, ..., D_I] with its first or last d_r dims rotated; on a NoPE layer, x."""
        dr, interleaved = one.dr, self.c.index_interleaved
        if not dr:
            return x
        if self.c.index_last:
            return np.concatenate([x[..., :-dr], self.turn(one, x[..., -dr:], interleaved)], -1)
        return np.concatenate([self.turn(one, x[..., :dr], interleaved), x[..., dr:]], -1)

    def layer_norm(self, name, x, eps):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def positions(self, name, q):
        """mistral_large4: q[L, H, d] of each head times s ln(t + 1) + b."""
        if name + ".ssmax_scaling.s" not in self.w:
            return q
        logs = np.log(np.arange(len(q)) + 1.0)[:, None]
        return q * (self.w[name + ".ssmax_scaling.s"] * logs + self.w[name + ".ssmax_scaling.b"])[..., None]

    def choose(self, p, one, x, u):
        """bool[L, L]: key j is among the index_topk best of query t, j <= t."""
        c, length = self.c, len(x)
        if c.family == "mistral_large4":
            u = self.layer_norm(p + "q_input_norm", x, 1e-6)
        q = self.linear(p + "wq_b", u).reshape(length, c.index_n_heads, c.index_head_dim)
        q = self.positions(p[:-1], self.turn_index(one, q))
        k = self.turn_index(one, self.layer_norm(p + "k_norm", self.linear(p + "wk", x), c.index_eps))
        gate = self.linear(p + "weights_proj", x) / math.sqrt(c.index_n_heads * c.index_head_dim)
        scores = np.einsum("thn,th->tn", np.maximum(np.einsum("thd,nd->thn", q, k), 0), gate)
        mask = np.zeros((length, length), bool)
        for t in range(length):
            mask[t, self.top(scores[t, : t + 1], c.index_topk, f"{p} row {t}")] = True
        return mask

    def visible(self, p, one, x, u, state):
        """bool[L, L]: what each query attends to; an indexer's choice stays in `state` for the layers above."""
        rows = np.arange(len(x))
        causal = rows[:, None] >= rows
        if one.kind == "full_attention":
            return causal
        if one.kind == "sliding_attention":
            return causal & (rows[:, None] - rows < self.c.sliding_window)
        if one.full:
            state["choice"] = self.choose(p + "indexer.", one, x, u)
        return state["choice"]

    def queries(self, p, one, x):
        """(q [L, H, d_n + d_r] before rotation, u or None, gate [L, H, d_v or 1] or None)."""
        c, length = self.c, len(x)
        if c.family == "mistral_large4":
            return self.linear(p + "q_proj", x).reshape(length, one.heads, -1), None, None
        raw = self.linear(p + "q_a_proj", x)
        u = rms(raw, self.w[p + "q_a_layernorm.weight"], c.latent_eps)
        if c.family == "dots3_note":
            u = u * math.sqrt(c.hidden_size / one.q_rank)
        q = self.linear(p + "q_b_proj", np.concatenate([u, raw], -1) if c.family == "axk2" else u)
        q, gate = q.reshape(length, one.heads, -1), None
        if c.family == "axk2":
            q, gate = q[..., : one.dn + one.dr], q[..., one.dn + one.dr :]
        if c.family.startswith("hy_v4"):
            gate = self.linear(p + "linear_gate", x).reshape(length, one.heads, one.dv)
        if c.family == "dots3_note":
            gate = self.linear(p + "g_proj", x)[..., None]
        return q, u, gate

    def latents(self, p, one, x):
        """(C [L, R] normed, P [L, d_r] rotated)."""
        c = self.c
        z = self.linear(p + "kv_a_proj_with_mqa", x)
        latent = rms(z[:, : one.rank], self.w[p + "kv_a_layernorm.weight"], c.latent_eps)
        key = z[:, one.rank :]
        if c.family == "dots3_note":
            latent = latent * math.sqrt(c.hidden_size / one.rank)
            key = rms(key, self.w[p + "k_rope_only_layernorm.weight"], c.rms_norm_eps)
        return latent, self.turn(one, key, c.interleaved) if one.dr else key

    def attention(self, number, x, state):
        p, one, length = f"model.layers.{number}.self_attn.", self.c.layers[number], len(x)
        if one.source == number:
            state[number] = self.latents(p, one, x)
        latent, shared_key = state[one.source]
        q, u, gate = self.queries(p, one, x)
        if one.dr:
            q = np.concatenate([q[..., : one.dn], self.turn(one, q[..., one.dn :], self.c.interleaved)], -1)
        q = self.positions(p[:-1], q)
        kv = self.linear(p + "kv_b_proj", latent).reshape(length, one.heads, one.dn + one.dv)
        logits = np.einsum("thd,shd->hts", q[..., : one.dn], kv[..., : one.dn])
        logits += np.einsum("thd,sd->hts", q[..., one.dn :], shared_key)
        logits = np.where(self.visible(p, one, x, u, state), logits * one.scale, -np.inf)
        sink = self.w.get(p + "learnable_sink_param", np.full(one.heads, -np.inf))[:, None, None]
        most = np.maximum(logits.max(-1, keepdims=True), sink)
        weights = np.exp(logits - most)
        weights /= weights.sum(-1, keepdims=True) + np.exp(sink - most)
        out = np.einsum("hts,shd->thd", weights, kv[..., one.dn :])
        if gate is not None:
            out = out * sigmoid(gate)
        return self.linear(p + "o_proj", out.reshape(length, -1))

    # --- MLPs --------------------------------------------------------------------------------------------------------
    def swiglu(self, p, x):
        gate, up = self.linear(p + "gate_proj", x), self.linear(p + "up_proj", x)
        return self.linear(p + "down_proj", gate * sigmoid(gate) * up)

    def expert(self, p, number, x):
        if p + "experts.gate_up_proj" not in self.w:
            return self.swiglu(f"{p}experts.{number}.", x)
        gate, up = np.split(self.w[p + "experts.gate_up_proj"][number] @ x, 2)
        limit = self.c.swiglu_limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return self.w[p + "experts.down_proj"][number] @ (gate * sigmoid(gate) * up)

    def mixture(self, p, x):
        c = self.c
        out = np.zeros_like(x)
        if p + "shared_experts.gate_proj.weight" in self.w:
            out += self.swiglu(p + "shared_experts.", x)
        scores = self.linear(p + "gate", x)
        if c.family == "mistral_large4":
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores = choice = scores / scores.sum(-1, keepdims=True)
        else:
            scores = sigmoid(scores)
            choice = scores + self.w[p + "gate.e_score_correction_bias"]
        divide = c.norm_topk_prob or c.family == "mistral_large4"
        for t, row in enumerate(choice.reshape(len(x), c.n_group, -1)):
            groups = self.top(np.sort(row, -1)[:, -2:].sum(-1), c.topk_group, f"{p} groups {t}")
            kept = np.full_like(row, 0.0 if c.family == "axk2" else -np.inf)
            kept[groups] = row[groups]
            ids = self.top(kept.ravel(), c.num_experts_per_tok, f"{p} experts {t}")
            weights = scores[t, ids] / (scores[t, ids].sum() if divide else 1) * c.routed_scaling_factor
            out[t] += sum(weight * self.expert(p, e, x[t]) for weight, e in zip(weights, ids))
        return out

    # --- residual streams --------------------------------------------------------------------------------------------
    def norm(self, name, x):
        """A layer's norm; axk2's has a gate where the checkpoint has the tensors of one."""
        if name + ".W_down.weight" not in self.w:
            return rms(x, self.w[name + ".weight"], self.c.rms_norm_eps)
        y = rms(x, self.w[name + ".norm.weight"], self.c.rms_norm_eps)
        low = self.linear(name + ".W_down", y)
        return y * sigmoid(self.linear(name + ".W_up", low * sigmoid(low)))

    def mix(self, p, streams):
        """z [L, rows of fn] of streams [L, n, D]."""
        flat = streams.reshape(len(streams), -1)
        return flat @ self.w[p + "fn"].T / np.sqrt((flat**2).mean(-1, keepdims=True) + self.c.rms_norm_eps)

    def with_residual(self, p, hidden, sub_layer):
        """hidden [L, D], or [L, n, D] for hyper-connections, after a sub-layer of [L, D]."""
        c = self.c
        if not c.family.startswith("hy_v4"):
            return hidden + sub_layer(hidden)
        n, z, base, scale = c.hc_mult, self.mix(p, hidden), self.w[p + "base"], self.w[p + "scale"]
        before = sigmoid(scale[0] * z[:, :n] + base[:n]) + c.hc_eps
        after = c.hc_magnitude * sigmoid(scale[1] * z[:, n:] + base[n:]) + c.hc_eps
        out = sub_layer(np.einsum("tn,tnd->td", before, hidden))
        return hidden + after[..., None] * out[:, None]

    def layer(self, number, hidden, state):
        p = f"model.layers.{number}."

        def attend(x):
            return self.attention(number, self.norm(p + "input_layernorm", x), state)

        def transform(x):
            x = self.norm(p + "post_attention_layernorm", x)
            return self.mixture(p + "mlp.", x) if self.c.layers[number].sparse else self.swiglu(p + "mlp.", x)

        hidden = self.with_residual(p + "hc_attn_layer.hc_pre.hc_", hidden, attend)
        return self.with_residual(p + "hc_mlp_layer.hc_pre.hc_", hidden, transform)

    def logits(self, token_ids):
        """float64[L, V] for one sequence of ids [L]."""
        c, hidden, state = self.c, self.w["model.embed_tokens.weight"][token_ids], {}
        if "model.lerope.alpha" in self.w:
            for one in c.layers:
                one.frequencies = one.frequencies * np.exp(self.w["model.lerope.alpha"])
        hyper = c.family.startswith("hy_v4")
        if hyper:
            hidden = np.repeat(hidden[:, None], c.hc_mult, 1)
        for number in range(c.num_hidden_layers):
            hidden = self.layer(number, hidden, state)
        if hyper:
            p = "model.hc_head.hc_head_"
            gate = sigmoid(self.w[p + "scale"] * self.mix(p, hidden) + self.w[p + "base"]) + c.hc_eps
            hidden = np.einsum("tn,tnd->td", gate, hidden)
        head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
        logits = rms(hidden, self.w["model.norm.weight"], c.rms_norm_eps) @ self.w[head].T
        cap = getattr(c, "final_logit_softcapping", None) if c.family == "mistral_large4" else None
        return cap * np.tanh(logits / cap) if cap else logits


def model_logits(tensors, data, token_ids):
    """float64[L, V] for one sequence of ids [L]; tensors by their published names, the fields of config.json."""
    return Oracle(tensors, data).logits(np.asarray(token_ids))
