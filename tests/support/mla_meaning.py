"""What the config.json of a family with latent attention asks for, beside DeepSeek-V3.2; see `config_meaning`.

The rules are those of Hugging Face transformers 5.24, written without a line of the library. The numbers of a
config.json that says nothing are the library's: `tests/families/test_families.py` compares them with published ones.
"""

import numpy as np

from sparse_mla_jax.config import from_hf
from sparse_mla_jax.ops.rope import rope_frequencies
from support.config_meaning import (
    NEUTRAL,
    Unsupported,
    check_neutral,
    check_quantization,
    demand,
    kinds_of,
    no_wild_numbers,
    plain,
    rotation,
    shared,
)

ARCHITECTURES = {
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "axk2": "AXK2ForCausalLM",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
    "dots3_note": "Dots3NoteForCausalLM",
}
COMPOSITE = ("hy_v4_vl", "mistral_large4", "dots3_note")
# Keys that some families have; those of others refuse them.
OWN = {
    "q_lora_rank": ("glm_moe_dsa", "hy_v4", "hy_v4_vl", "axk2", "dots3_note"),
    "hc_mult": ("hy_v4", "hy_v4_vl"),
    "hc_magnitude": ("hy_v4", "hy_v4_vl"),
    "hc_eps": ("hy_v4", "hy_v4_vl"),
    "swiglu_limit": ("hy_v4", "hy_v4_vl"),
    "gated_norm_rank": ("axk2",),
    "final_logit_softcapping": ("mistral_large4",),
    "no_rope_layers": ("mistral_large4",),
    "kv_source_layers": ("mistral_large4",),
    "sliding_window": ("dots3_note",),
    "shared_experts_intermediate_size": ("dots3_note",),
    "compress_ratios": (),
    "o_groups": (),
    "num_hash_layers": (),
}
FAMILY_NEUTRAL = {
    "mistral_large4": {"scoring_func": ["softmax"], "norm_topk_prob": [True]},
    **{name: {"scoring_func": ["sigmoid"], "topk_method": ["noaux_tc"]} for name in ARCHITECTURES if name[0] != "m"},
}
SWA = {"num_attention_heads": 64, "q_lora_rank": 1024, "kv_lora_rank": 1024, "qk_nope_head_dim": 192, "v_head_dim": 128}
SIZES = (*SWA, "qk_rope_head_dim")
# Norms whose epsilon is the model's, of the latents and of the index keys.
MODEL_EPS = {
    "hy_v4": ("index_norm_eps",),
    "hy_v4_vl": ("index_norm_eps", "latent_norm_eps"),
    "mistral_large4": ("latent_norm_eps",),
    "dots3_note": ("latent_norm_eps",),
}


def described(config):
    """Numbers of a loaded config, and what each of its layers is."""
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, bool | int | float | str)}
    del numbers["first_k_dense_replace"], numbers["quantize_index_query"]
    layers = [
        (layer.kind, layer.index_source, layer.kv_source, layer.is_moe, *(getattr(layer.sizes, one) for one in SIZES))
        for layer in config.layers
    ]
    ropes = [layer.sizes.rope for layer in config.layers]
    rotated = [layer.sizes for layer in config.layers if layer.sizes.qk_rope_head_dim]
    return {
        **numbers,
        "layers": layers,
        "frequencies": np.concatenate([rope_frequencies(size.rope, size.qk_rope_head_dim) for size in rotated]),
        "amplitudes": np.array([rope.attention_factor for rope in ropes]),
        "scales": np.array([layer.sizes.sm_scale for layer in config.layers]),
    }


def text_of(kind, data):
    """The fields of the text model."""
    text = data.get("text_config")
    demand(kind in COMPOSITE or text in (None, {}))
    demand(text is None or isinstance(text, dict))
    if not text:
        return data
    demand(text.get("model_type") in (None, kind, f"{kind}_text"))
    common = {"tie_word_embeddings", "quantization_config"}
    for name in OWN.keys() | {"hidden_size", "num_hidden_layers", *common}:
        demand(data.get(name) is None or (name in text and text[name] == data[name]) or name in common, name)
    return {**{name: data[name] for name in common if data.get(name) is not None}, **text}


def numbers_of(kind, data, base):
    """Numbers and truth values under their own names."""
    aliases = {"n_routed_experts": ["num_local_experts"]}
    if kind in ("glm_moe_dsa", "mistral_large4"):
        aliases["n_routed_experts"].append("num_experts")
    if kind == "dots3_note":
        aliases["sliding_window"] = ["sliding_window_size"]
        aliases["shared_experts_intermediate_size"] = ["moe_shared_expert_intermediate_size"]
    nulls = {"n_routed_experts": 0, "n_shared_experts": 0, "attention_bias": False}
    nulls |= {"n_group": 1, "topk_group": 1} if kind == "axk2" else {"final_logit_softcapping": 0.0}
    found = {}
    for name, default in base.items():
        given = [data[one] for one in aliases.get(name, []) if data.get(one) is not None]
        given += [data[name]] if name in data else []
        given = [nulls.get(name) if value is None else value for value in given]
        for value in given:
            fits = (int, float) if isinstance(default, float) else (type(default),)
            demand(type(value) in fits and value == given[0], name)
        found[name] = type(default)(given[0]) if given else default
    return {**found, **{name: found["rms_norm_eps"] for name in MODEL_EPS.get(kind, ())}}


def experts_of(kind, data, layers, experts, default):
    """Whether each layer has experts."""
    first = data.get("first_k_dense_replace")
    frequency = data.get("moe_layer_freq")
    frequency = 1 if frequency is None else frequency
    spread = kind in ("axk2", "dots3_note")
    demand(spread or frequency == 1)
    demand(first is None or type(first) is int or kind.startswith("hy"))
    # Hy4 does not read it.
    first = default if first is None or kind.startswith("hy") else first
    each = frequency if isinstance(frequency, list) else [int(i % max(frequency, 1) == 0) for i in range(layers)]
    demand(len(each) == layers)
    counted = [experts > 0 and i >= first and each[i] == 1 for i in range(layers)]
    kinds = kinds_of(data, "mlp_layer_types", layers, ["dense", "sparse"])
    if kinds is None:
        return counted
    listed = [one == "sparse" for one in kinds]
    demand(listed == counted or experts, "mlp_layer_types")
    return listed


def indexers_of(kind, data, layers):
    """Whether each layer has an indexer of its own, where layers have an index."""
    types = kinds_of(data, "indexer_types", layers, ["full", "shared"])
    pattern, frequency = data.get("index_topk_pattern"), data.get("index_topk_freq")
    offset = data.get("index_skip_topk_offset")
    offset = 2 if offset is None else offset
    older = None
    if kind.startswith("hy"):
        # It does not read the older fields.
        return [one == "full" for one in types] if types else [i == 0 or i % 4 == 1 for i in range(layers)]
    if pattern is not None:
        demand(len(pattern) == layers and all(one in ("F", "S", "full", "shared") for one in pattern))
        older = [one[0] in "Ff" for one in pattern]
    elif frequency is not None:
        demand(type(frequency) is int and frequency > 0 and type(offset) is int)
        older = [max(i - offset + 1, 0) % frequency == 0 for i in range(layers)]
    if kind in ("axk2", "dots3_note"):
        demand(older in (None, [True] * layers) or frequency == 1)
        demand(types is None or "shared" not in types)
        return [True] * layers
    return (older or [True] * layers) if types is None else [one == "full" for one in types]


def kinds_of_dots3(data, layers):
    """The kind of each layer of dots3.note."""
    names = ["indexed_attention", "deepseek_sparse_attention", "full_attention", "sliding_attention"]
    kinds = kinds_of(data, "layer_types", layers, names)
    kinds = kinds or ["indexed_attention" if i < 2 or i % 4 == 1 else "sliding_attention" for i in range(layers)]
    kinds = ["indexed_attention" if kind == names[1] else kind for kind in kinds]
    nested = isinstance(data.get("rope_parameters"), dict) and any(data["rope_parameters"].get(name) for name in names)
    if data.get("per_layer_config") is None and not nested:
        other = "full_attention" if data.get("use_dsa") is False else "indexed_attention"
        kinds = [kind if kind == "sliding_attention" else other for kind in kinds]
    demand({True: names[2], False: names[0]}.get(data.get("use_dsa")) not in kinds)
    return kinds


def sizes_of_dots3(data, c, kinds):
    """Heads, ranks and widths of each layer of dots3.note."""
    own = {name: c[name] for name in SIZES}
    per_layer = data.get("per_layer_config")
    if per_layer is not None:
        demand(isinstance(per_layer, dict) and all(int(number) < len(kinds) for number in per_layer))
        changes = {int(number): change or {} for number, change in per_layer.items()}
        return [{name: changes.get(i, {}).get(name) or own[name] for name in SIZES} for i in range(len(kinds))]
    swa = {name: data[f"swa_{name}"] if data.get(f"swa_{name}") is not None else SWA[name] for name in SWA}
    head = 256 if data.get("swa_head_dim") is None else data["swa_head_dim"]
    given = data.get("swa_qk_rope_head_dim")
    swa["qk_rope_head_dim"] = head - swa["qk_nope_head_dim"] if given is None else given
    return [swa if kind == "sliding_attention" else own for kind in kinds]


def ropes_of_dots3(data, c, kinds, sizes):
    """Frequencies, amplitude and 1 for each layer: the softmax scale does not depend on the rotation."""
    nested = data.get("rope_parameters")
    nested = nested if isinstance(nested, dict) and any(isinstance(one, dict) for one in nested.values()) else None
    ropes = []
    for kind, size in zip(kinds, sizes):
        dim, context = size["qk_rope_head_dim"], c["max_position_embeddings"]
        if nested is None and kind != "sliding_attention":
            ropes.append(rope_of(data, c, dim, 8e7)[0])
            continue
        default = 5e4 if kind == "sliding_attention" else 8e7
        if nested is None:
            given = data.get("swa_rope_theta")
            ropes.append(plain(default if given is None else given, dim))
            continue
        part = nested.get(kind) or nested.get("deepseek_sparse_attention") or {}
        if not part and kind == "sliding_attention":
            given = data.get("swa_rope_theta")
            default = default if given is None else given
        if not part and kind != "sliding_attention":
            other = "indexed_attention" if kind == "full_attention" else "full_attention"
            part = nested.get(other) or {}
        theta = shared([(part, "rope_theta")], default)
        original = shared([(part, "original_max_position_embeddings")], context)
        ropes.append(rotation(part, theta, original, dim, None) if part else plain(theta, dim))
    return [(frequencies, amplitude, 1.0) for frequencies, amplitude, _ in ropes]


def rope_of(data, c, dim, theta, yarn=None):
    """The rotation of a model that has one, in all spellings."""
    sections = [data[name] for name in ("rope_parameters", "rope_scaling") if data.get(name)]
    places = (data, *sections)
    theta = shared([(place, "rope_theta") for place in places], theta)
    context = c["max_position_embeddings"]
    original = shared([(place, "original_max_position_embeddings") for place in places], context)
    sections = [{name: value for name, value in one.items() if name != "mrope_section"} for one in sections]
    if not sections and yarn:
        return [rotation(yarn, theta, yarn["original_max_position_embeddings"], dim, None)]
    ropes = [rotation(one, theta, original, dim, None) for one in sections] or [plain(theta, dim)]
    for other in ropes[1:]:
        demand(np.array_equal(ropes[0][0], other[0]) and ropes[0][1:] == other[1:])
    return ropes


def ropes_of_mistral(data, c, layers):
    """Whether each layer rotates."""
    flags, interval = data.get("no_rope_layers"), data.get("no_rope_layer_interval")
    interval = 4 if interval is None else interval
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(layers)]
    demand(isinstance(flags, list) and len(flags) == layers and all(type(one) is int for one in flags))
    return [one == 1 for one in flags]


def meaning_mla(kind, data):
    """The same as `described`, of a parsed config.json."""
    demand((data.get("architectures") or [ARCHITECTURES[kind]]) == [ARCHITECTURES[kind]])
    data = text_of(kind, data)
    neutral = {**NEUTRAL, **FAMILY_NEUTRAL[kind]}
    for name in ("text_config", *(["per_layer_config"] if kind == "dots3_note" else [])):
        neutral.pop(name)
    if kind == "mistral_large4":
        neutral.pop("topk_method")
    foreign = [name for name, families in OWN.items() if kind not in families]
    check_neutral(data, neutral, foreign)
    data = {name: value for name, value in data.items() if name not in foreign}
    default = from_hf({"model_type": kind})
    base = described(default)
    numbers = {name: value for name, value in base.items() if isinstance(value, bool | int | float)}
    c = numbers_of(kind, data, numbers)
    layers = c["num_hidden_layers"]
    demand(0 < layers < 2000)
    demand(not kind.startswith("hy") or min(c["hc_mult"], c["swiglu_limit"]) > 0)
    moe = experts_of(kind, data, layers, c["n_routed_experts"], default.first_k_dense_replace)
    dots3 = kind == "dots3_note"
    kinds = kinds_of_dots3(data, layers) if dots3 else ["indexed_attention"] * layers
    if not dots3:
        kinds_of(data, "layer_types", layers, ["indexed_attention", "deepseek_sparse_attention"])
    full = indexers_of(kind, data, layers)
    sources = data.get("kv_source_layers")
    sources = list(range(layers)) if sources is None else sources
    sizes = sizes_of_dots3(data, c, kinds) if dots3 else [{name: c[name] for name in SIZES}] * layers
    if kind == "mistral_large4":
        rotates = ropes_of_mistral(data, c, layers)
        bare = {**sizes[0], "qk_rope_head_dim": 0, "qk_nope_head_dim": c["qk_nope_head_dim"] + c["qk_rope_head_dim"]}
        sizes = [size if one else bare for size, one in zip(sizes, rotates)]
    yarn = {"rope_type": "yarn", "factor": 2048, "original_max_position_embeddings": 512, "attention_factor": 1.0}
    yarn = yarn if kind == "mistral_large4" else None
    if dots3:
        ropes = ropes_of_dots3(data, c, kinds, sizes)
    else:
        one = rope_of(data, c, c["qk_rope_head_dim"], 1e4, yarn)[0]
        ropes = [one if size["qk_rope_head_dim"] else (np.zeros(0), *one[1:]) for size in sizes]
    index = [max((j for j in range(i + 1) if full[j]), default=-1) for i in range(layers)]
    demand(min(index) >= 0)
    widths = [size["qk_nope_head_dim"] + size["qk_rope_head_dim"] for size in sizes]
    return {
        **{name: value for name, value in base.items() if isinstance(value, str)},
        **c,
        "layers": [
            (kinds[i], index[i] if kinds[i][0] == "i" else None, sources[i], moe[i], *sizes[i].values())
            for i in range(layers)
        ],
        "frequencies": np.concatenate([rope[0] for rope in ropes]),
        "amplitudes": np.array([rope[1] for rope in ropes]),
        "scales": np.array([width**-0.5 * rope[2] for width, rope in zip(widths, ropes)]),
    }


def meaning_or_refusal(kind, data):
    """`meaning_mla`, in which a value of another type is one that must be refused."""
    demand(no_wild_numbers(data))
    check_quantization(data)
    try:
        return meaning_mla(kind, data)
    except (TypeError, AttributeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise Unsupported(repr(error)) from error
