"""Random checkpoints of every family of latent attention: published names and shapes, from a config.json alone."""

import re

import numpy as np
from mla_oracle_config import read

SWIGLU = ("gate_proj", "up_proj", "down_proj")


def swiglu_shapes(prefix, hidden, inner):
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return {f"{prefix}{name}.weight": size for name, size in zip(SWIGLU, sizes)}


def linear(name, outputs, inputs, bias=False):
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def attention_shapes(c, number, one):
    hidden, heads, out = c.hidden_size, one.heads, {}
    gate = one.dv if c.family == "axk2" else 0
    if c.family == "mistral_large4":
        out |= linear("q_proj", heads * (one.dn + one.dr), hidden)
        out |= {f"ssmax_scaling.{name}": (heads,) for name in "sb"}
    else:
        out |= linear("q_a_proj", one.q_rank, hidden, c.attention_bias)
        out["q_a_layernorm.weight"] = (one.q_rank,)
        out |= linear("q_b_proj", heads * (one.dn + one.dr + gate), one.q_rank * (2 if gate else 1))
    if one.source == number:
        out |= linear("kv_a_proj_with_mqa", one.rank + one.dr, hidden, c.attention_bias)
        out["kv_a_layernorm.weight"] = (one.rank,)
    out |= linear("kv_b_proj", heads * (one.dn + one.dv), one.rank)
    out |= linear("o_proj", hidden, heads * one.dv, c.attention_bias)
    if c.family == "dots3_note":
        out |= {"k_rope_only_layernorm.weight": (one.dr,), **linear("g_proj", heads, hidden)}
    if c.family.startswith("hy_v4"):
        out |= {"learnable_sink_param": (heads,), **linear("linear_gate", heads * one.dv, hidden)}
    if one.full and one.kind == "indexed_attention":
        out |= {f"indexer.{name}": shape for name, shape in indexer_shapes(c, one).items()}
    return out


def indexer_shapes(c, one):
    hidden, heads, width = c.hidden_size, c.index_n_heads, c.index_head_dim
    own = c.family == "mistral_large4"
    out = linear("wq_b", heads * width, hidden if own else one.q_rank)
    out |= linear("wk", width, hidden) | linear("weights_proj", heads, hidden)
    out |= {f"k_norm.{name}": (width,) for name in ("weight", "bias")}
    if own:
        out |= {f"q_input_norm.{name}": (hidden,) for name in ("weight", "bias")}
        out |= {f"ssmax_scaling.{name}": (heads,) for name in "sb"}
    return out


def mlp_shapes(c, one):
    if not one.sparse:
        return swiglu_shapes("", c.hidden_size, c.intermediate_size)
    hidden, inner, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    out = {"gate.weight": (experts, hidden)}
    if c.family != "mistral_large4":
        out["gate.e_score_correction_bias"] = (experts,)
    if c.n_shared_experts:
        alias = getattr(c, "moe_shared_expert_intermediate_size", inner)
        own = getattr(c, "shared_experts_intermediate_size", alias)
        out |= swiglu_shapes("shared_experts.", hidden, own * c.n_shared_experts)
    if c.family.startswith("hy_v4"):
        return {**out, "experts.gate_up_proj": (experts, 2 * inner, hidden),
                "experts.down_proj": (experts, hidden, inner)}  # fmt: skip
    for number in range(experts):
        out |= swiglu_shapes(f"experts.{number}.", hidden, inner)
    return out


def norm_shapes(c, name, gated):
    if not gated:
        return {f"{name}.weight": (c.hidden_size,)}
    shapes = linear(f"{name}.W_down", c.gated_norm_rank, c.hidden_size)
    return {
        f"{name}.norm.weight": (c.hidden_size,),
        **shapes,
        **linear(f"{name}.W_up", c.hidden_size, c.gated_norm_rank),
    }


def model_shapes(data):
    """Hub names (DeepSeek's for mistral_large4) and shapes of all tensors of a config.json."""
    c = read(data)
    n, hidden = getattr(c, "hc_mult", 0), c.hidden_size
    out = {"model.embed_tokens.weight": (c.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = (c.vocab_size, hidden)
    if c.family == "mistral_large4":
        out["model.lerope.alpha"] = (c.qk_rope_head_dim // 2,)
    if n:
        out |= {f"model.hc_head.hc_head_{k}": v for k, v in (("fn", (n, n * hidden)), ("base", (n,)), ("scale", (1,)))}
    gated = c.family == "axk2"
    for number, one in enumerate(c.layers):
        p = f"model.layers.{number}."
        parts = {"self_attn.": attention_shapes(c, number, one), "mlp.": mlp_shapes(c, one)}
        out |= {p + prefix + name: shape for prefix, part in parts.items() for name, shape in part.items()}
        out |= norm_shapes(c, p + "input_layernorm", gated)
        out |= norm_shapes(c, p + "post_attention_layernorm", gated and one.sparse)
        for kind in ("attn", "mlp") if n else ():
            sizes = (("fn", (2 * n, n * hidden)), ("base", (2 * n,)), ("scale", (2,)))
            out |= {f"{p}hc_{kind}_layer.hc_pre.hc_{name}": shape for name, shape in sizes}
    return out


# Mean and deviation of vectors, by the end of their name; of matrices, the factor of 1 / sqrt(inputs).
VECTORS = {
    "e_score_correction_bias": (0.0, 0.15), "bias": (0.1, 0.3), "alpha": (0.0, 0.4), "base": (-0.3, 0.7),
    "ssmax_scaling.s": (0.1, 0.4), "ssmax_scaling.b": (0.6, 0.6), "learnable_sink_param": (0.7, 1.0),
    "weight": (1.0, 0.3), "scale": (0.8, 0.5),
}  # fmt: skip
GAINS = {
    "embed_tokens.weight": 1.5, "q_b_proj.weight": 2.0, "q_proj.weight": 1.5, "mlp.gate.weight": 1.5,
    "W_up.weight": 3.0, "W_down.weight": 2.0, "gate_up_proj": 1.5, "gate_proj.weight": 1.5,
}  # fmt: skip


def draw(data, seed, vectors=None):
    """float32 tensors by hub names; every part of the model matters. `vectors` replaces entries of VECTORS."""
    rng, known = np.random.default_rng(seed), VECTORS | (vectors or {})
    out = {}
    for name, shape in model_shapes(data).items():
        noise = rng.normal(size=shape)
        if len(shape) == 1:
            mean, deviation = next(value for end, value in known.items() if name.endswith(end))
            noise = mean + deviation * noise
        else:
            noise *= next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0) * shape[-1] ** -0.5
        out[name] = noise.astype(np.float32)
    return out


# --- spellings -------------------------------------------------------------------------------------------------------
MISTRAL = (
    (r"^model\.embed_tokens", "tok_embeddings"), (r"^model\.norm\.", "norm."), (r"^lm_head", "output"),
    (r"^model\.lerope", "lerope"), (r"^model\.", ""), (r"input_layernorm", "attention_norm"),
    (r"post_attention_layernorm", "ffn_norm"), (r"self_attn\.", "attention."), (r"attention\.q_proj", "attention.wq"),
    (r"kv_a_proj_with_mqa", "wkv_a_with_mqa"), (r"kv_b_proj", "wkv_b"), (r"\.o_proj", ".wo"),
    (r"kv_a_layernorm", "kv_a_norm"), (r"mlp\.(gate\.|experts|shared_experts)", r"\1"), (r"mlp\.", "feed_forward."),
    (r"gate_proj", "w1"), (r"up_proj", "w3"), (r"down_proj", "w2"),
)  # fmt: skip
SAVED = (
    (r"\.hc_(attn|mlp)_layer\.hc_pre\.", r".hc_pre.hc_\1_layer."), (r"^model\.hc_head\.", "model.hc_pre.hc_head."),
    (r"(mlp\.|shared_experts\.)gate_proj\.", r"\1linear_gate."),
)  # fmt: skip
MODULES = (
    (r"\.hc_attn_layer\.hc_pre\.hc_", ".attn_hc."), (r"\.hc_mlp_layer\.hc_pre\.hc_", ".ffn_hc."),
    (r"hc_head\.hc_head_", "hc_head.hc_"), (r"learnable_sink_param", "sinks"),
    (r"self_attn\.linear_gate", "self_attn.gate_proj"),
)  # fmt: skip
SPELLINGS = {
    "hub": (), "mistral": MISTRAL, "saved": SAVED, "modules": MODULES,
    "axk2 modules": ((r"\.q_b_proj\.", ".q_gate_proj."),),
    "saved VL": (*SAVED, (r"^model\.hc_pre\.hc_head", "model.hc_head.hc_pre")),
    "language_model": ((r"^model\.", "model.language_model."),),
}  # fmt: skip


def rename(tensors, spelling):
    out = {}
    for name, value in tensors.items():
        for pattern, replacement in SPELLINGS[spelling]:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def split_experts(tensors):
    """Fused experts as one matrix each."""
    out = {}
    for name, value in tensors.items():
        prefix, _, kind = name.rpartition("experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            out[name] = value
            continue
        for number, matrix in enumerate(value):
            parts = (
                dict(zip(("gate_proj", "up_proj"), np.split(matrix, 2))) if kind == "gate_up_proj" else {kind: matrix}
            )
            out |= {f"{prefix}experts.{number}.{one}.weight": np.ascontiguousarray(part) for one, part in parts.items()}
    return out


def fuse_experts(tensors):
    """Experts of one matrix each as two tensors of a layer."""
    out, found = {}, {}
    swiglu = ("w1", "w3", "w2") if "tok_embeddings.weight" in tensors else SWIGLU
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\bexperts\.)(\d+)\.(\w+)\.weight", name)
        if match is None:
            out[name] = value
        else:
            found.setdefault(match[1], {})[match[3], int(match[2])] = value
    for prefix, parts in found.items():
        gate, up, down = (np.stack([parts[one, e] for e in range(len(parts) // 3)]) for one in swiglu)
        out |= {f"{prefix}gate_up_proj": np.concatenate([gate, up], 1), f"{prefix}down_proj": down}
    return out
