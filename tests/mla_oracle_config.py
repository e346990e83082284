"""A config.json of any family of latent attention, read without a line of the library: what `mla_oracle` computes."""

import math
from types import SimpleNamespace

import numpy as np

BASE = {
    "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "index_topk": 2048, "index_topk_freq": 1,
    "index_skip_topk_offset": 2, "rope_theta": 1e4, "attention_bias": False,
}  # fmt: skip
HY = {"routed_scaling_factor": 2.827, "hc_mult": 4, "hc_magnitude": 2.0, "hc_eps": 1e-6, "swiglu_limit": 10.0}
# What a config.json that leaves a key out means, where a family differs from BASE.
DEFAULTS = {
    "deepseek_v32": {
        "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
    },
    "glm_moe_dsa": {"routed_scaling_factor": 2.5, "first_k_dense_replace": 3},
    "hy_v4": HY,
    "hy_v4_vl": HY,
    "axk2": {"rms_norm_eps": 1e-6, "routed_scaling_factor": 2.5, "gated_norm_rank": 16},
    "mistral_large4": {"final_logit_softcapping": 30.0, "no_rope_layer_interval": 4},
    "dots3_note": {"sliding_window": 512, "rope_theta": 8e7},
}  # fmt: skip
# Main rope interleaved, index rope interleaved, index rope on the last dims, eps of the latent norms and of k_norm;
# None: rms_norm_eps.
STYLES = {
    "deepseek_v32": (True, False, False, 1e-6, 1e-6),
    "glm_moe_dsa": (True, True, False, 1e-6, 1e-6),
    "hy_v4": (False, False, True, 1e-6, None),
    "hy_v4_vl": (True, True, True, None, None),
    "axk2": (True, False, False, 1e-6, 1e-6),
    "mistral_large4": (True, True, False, None, 1e-6),
    "dots3_note": (True, True, False, None, 1e-6),
}
MISTRAL_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2048.0, "original_max_position_embeddings": 512,
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
}  # fmt: skip
SLIDING = {
    "num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024, "head_dim": 256, "qk_nope_head_dim": 192,
    "v_head_dim": 128,
}  # fmt: skip
LEGACY_KEYS = ("swa_", "sliding_window_size", "use_dsa", "use_sliding_window", "moe_shared_expert_intermediate_size")


def merged(data):
    """(family, fields): the text model's fields, its defaults filled in."""
    text = dict(data.get("text_config") or data)
    family = next(name for name in ("hy_v4_vl", *DEFAULTS) if text["model_type"] in (name, name + "_text"))
    text.setdefault("tie_word_embeddings", data.get("tie_word_embeddings", False))
    for old, new in (("num_local_experts", "n_routed_experts"), ("num_experts", "n_routed_experts"),
                     ("sliding_window_size", "sliding_window")):  # fmt: skip
        if text.get(old) is not None:
            text.setdefault(new, text[old])
    optional = ("n_group", "topk_group", "final_logit_softcapping")
    known = {key: value for key, value in text.items() if value is not None or key in optional}
    return family, {**BASE, **DEFAULTS[family], **known}


def rotation(family, c, kind=None):
    """Theta, type and the numbers of YaRN, for one kind of layer where they differ by kind."""
    rope = c.get("rope_parameters")
    if rope and isinstance(next(iter(rope.values())), dict):
        rope = rope.get(kind) or {}
    elif rope is None and family == "mistral_large4" and not c.get("rope_scaling"):
        rope = MISTRAL_YARN
    rope = dict(rope or c.get("rope_scaling") or {})
    theta = c.get("swa_rope_theta", 5e4) if kind == "sliding_attention" else c["rope_theta"]
    rope["rope_theta"] = rope.get("rope_theta", theta)
    rope["type"] = rope.get("rope_type", rope.get("type", "default"))
    return rope


def amplitude(factor, a):
    return 0.1 * a * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(rope, dim):
    """(float64[dim / 2], amplitude of cos and sin, factor of the softmax's scale)."""
    theta = rope["rope_theta"]
    base = theta ** (-np.arange(0, dim, 2) / dim)
    if rope["type"] != "yarn":
        return base, 1.0, 1.0
    factor, length = rope["factor"], rope["original_max_position_embeddings"]

    def correction(rotations):
        return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(correction(rope.get("beta_fast") or 32)), 0)
    high = min(math.ceil(correction(rope.get("beta_slow") or 1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 1e-3), 0, 1)
    some, every = rope.get("mscale"), rope.get("mscale_all_dim")
    turn = rope.get("attention_factor")
    if turn is None:
        turn = amplitude(factor, some) / amplitude(factor, every) if some and every else amplitude(factor, 1)
    scale = amplitude(factor, every) ** 2 if every else 1.0
    return base * (1 - ramp) + base / factor * ramp, turn, scale


def full_indexers(family, c):
    """bool per layer: it has an indexer of its own."""
    count = c["num_hidden_layers"]
    if family in ("deepseek_v32", "axk2", "dots3_note"):
        return [True] * count
    pattern = c.get("indexer_types")
    if pattern is None and family.startswith("hy_v4"):
        return [i == 0 or i % 4 == 1 for i in range(count)]
    pattern = pattern or c.get("index_topk_pattern")
    if pattern is not None:
        return [one in ("full", "F") for one in pattern]
    return [max(i - c["index_skip_topk_offset"] + 1, 0) % c["index_topk_freq"] == 0 for i in range(count)]


def sparse_layers(family, c):
    """bool per layer: its MLP is a mixture of experts."""
    if c.get("mlp_layer_types"):
        return [kind == "sparse" for kind in c["mlp_layer_types"]]
    frequency, first = c["moe_layer_freq"], c["first_k_dense_replace"]
    if family.startswith("hy_v4"):
        first, frequency = 1, 1
    if isinstance(frequency, list):
        return [bool(one) and i >= first for i, one in enumerate(frequency)]
    return [i >= first and i % frequency == 0 for i in range(c["num_hidden_layers"])]


def layer_kinds(family, c):
    count = c["num_hidden_layers"]
    if family != "dots3_note":
        return ["indexed_attention"] * count
    legacy = any(key.startswith(LEGACY_KEYS) for key in c)
    kinds = c.get("layer_types")
    if kinds is None:
        kinds = ["indexed_attention" if i < 2 or i % 4 == 1 else "sliding_attention" for i in range(count)]
    dense = "full_attention" if c.get("use_dsa") is False or not legacy else "indexed_attention"
    chosen = "full_attention" if c.get("use_dsa") is False else "indexed_attention"
    names = {"full_attention": dense, "indexed_attention": chosen, "deepseek_sparse_attention": chosen}
    return [names.get(kind, kind) for kind in kinds]


def own_sizes(family, c, number, kind):
    """The fields of one layer: dots3_note's layers differ in them."""
    if family != "dots3_note":
        return c
    if "per_layer_config" in c:
        return {**c, **c["per_layer_config"].get(str(number), {})}
    if kind != "sliding_attention":
        return c
    own = {key: c.get("swa_" + key, value) for key, value in SLIDING.items()}
    own["qk_rope_head_dim"] = c.get("swa_qk_rope_head_dim", own["head_dim"] - own["qk_nope_head_dim"])
    return {**c, **own}


def read_layers(family, c):
    count = c["num_hidden_layers"]
    full, sparse, kinds = full_indexers(family, c), sparse_layers(family, c), layer_kinds(family, c)
    turning = c.get("no_rope_layers")
    if turning is None:
        interval = c.get("no_rope_layer_interval", count + 1)
        turning = [(i + 1) % interval != 0 for i in range(count)]
    sources = c.get("kv_source_layers") or list(range(count))
    layers = []
    for i, kind in enumerate(kinds):
        own = own_sizes(family, c, i, kind)
        dn, dr = own["qk_nope_head_dim"], own["qk_rope_head_dim"]
        turns, angle, scale = frequencies(rotation(family, c, kind), dr)
        scale = (1.0 if family == "dots3_note" else scale) / math.sqrt(dn + dr)
        one = SimpleNamespace(
            kind=kind, heads=own["num_attention_heads"], rank=own["kv_lora_rank"], dv=own["v_head_dim"], scale=scale,
            q_rank=own.get("q_lora_rank"), sparse=sparse[i], full=full[i], source=sources[i], rope=bool(turning[i]),
            frequencies=turns, amplitude=angle,
        )  # fmt: skip
        one.dn, one.dr = (dn, dr) if one.rope else (dn + dr, 0)
        layers.append(one)
    return layers


def read(data):
    """Everything that `mla_oracle` asks for, from the fields of a config.json."""
    family, c = merged(data)
    main, index, last, latent_eps, index_eps = STYLES[family]
    out = SimpleNamespace(**c)
    out.family, out.layers = family, read_layers(family, c)
    out.interleaved, out.index_interleaved, out.index_last = main, index, last
    out.latent_eps, out.index_eps = latent_eps or c["rms_norm_eps"], index_eps or c["rms_norm_eps"]
    if c["n_group"] is None:
        out.n_group = out.topk_group = 1
    return out
