"""What a config.json asks for, read by the rules of Hugging Face transformers 5.24 without a line of the library.

`meaning` gives numbers and arrays; `Unsupported` marks a config that asks for something that the library does not do,
or that has values which can not be: it must be refused.
"""

import dataclasses
import math

import numpy as np

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32

# Fields that may only have these values.
NEUTRAL = {
    "hidden_act": ["silu"],
    "mlp_bias": [False],
    "is_encoder_decoder": [False],
    "per_layer_config": [{}],
    "text_config": [{}],
    "topk_method": ["noaux_tc"],
}
NEUTRAL_V32 = {
    **NEUTRAL,
    "scoring_func": ["sigmoid"],
    "moe_layer_freq": [1],
    "index_topk_freq": [1],
    "partial_rotary_factor": [1.0],
}
NEUTRAL_V4 = {
    **NEUTRAL,
    "attention_bias": [False],
    "scoring_func": ["sqrtsoftplus"],
    "num_key_value_heads": [1],
    "n_group": [1],
    "topk_group": [1],
}
# Fields of one family only.
OF_V4 = ("o_groups", "o_lora_rank", "num_hash_layers", "swiglu_limit", "sliding_window", "hc_mult", "hc_eps")
OF_V32 = ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "first_k_dense_replace", "rope_interleave")
QUANTIZATION = {
    "quant_method": ["fp8", "compressed-tensors", "quark", "modelopt"],
    "fmt": ["e4m3", "e4m3fn", "e4m3fnuz"],
    "scale_fmt": ["ue8m0", "float", "float32"],
}
ORIGINAL = "original_max_position_embeddings"
RATES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


class Unsupported(Exception):
    """The config must be refused."""


def demand(condition, *reason):
    if not condition:
        raise Unsupported(*reason)


def meaning(data):
    """Name -> number, list or array, of a parsed config.json."""
    demand(isinstance(data, dict) and no_wild_numbers(data))
    kind = data.get("model_type", "deepseek_v32")
    demand(kind in ("deepseek_v32", "deepseek_v3_2", "deepseek_v4"), kind)
    architecture = "DeepseekV4ForCausalLM" if kind == "deepseek_v4" else "DeepseekV32ForCausalLM"
    demand((data.get("architectures") or [architecture]) == [architecture] * len(data.get("architectures") or [0]))
    check_quantization(data)
    return meaning_v4(data) if kind == "deepseek_v4" else meaning_v32(data)


def check_quantization(data):
    quantization = data.get("quantization_config")
    demand(quantization is None or isinstance(quantization, dict))
    for name, values in QUANTIZATION.items():
        demand((quantization or {}).get(name) in [None, *values], name)
    block = (quantization or {}).get("weight_block_size") or [1, 1]
    demand(isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block))


def no_wild_numbers(value):
    if isinstance(value, dict | list):
        return all(map(no_wild_numbers, value.values() if isinstance(value, dict) else value))
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 2**63


def is_same(value, other):
    return value == other and type(value) in (type(other), *([int] if isinstance(other, float) else []))


def check_neutral(data, table, foreign):
    for name, values in table.items():
        value = data.get(name)
        demand(value is None or any(is_same(value, one) for one in values), name)
    for name in foreign:
        demand(data.get(name) is None, name)


def sizes_of(data, preset, aliases):
    """Numbers and truth values under their own names: of the JSON type, and positive where transformers needs it."""
    found = {}
    for field in dataclasses.fields(preset):
        default, names = getattr(preset, field.name), [field.name, *aliases.get(field.name, [])]
        if isinstance(default, bool | int | float) and field.name != "quantize_index_query":
            given = [data[name] for name in names if name in data and (name == field.name or data[name] is not None)]
            given = [
                0 if value is None and "experts" in field.name and preset is DEEPSEEK_V32 else value for value in given
            ]
            for value in given:
                fits = (bool,) if isinstance(default, bool) else (int, float) if isinstance(default, float) else (int,)
                demand(
                    type(value) in fits and value == given[0] and (isinstance(value, bool) or value >= 0), field.name
                )
            value = given[0] if given else default
            found[field.name] = float(value) if isinstance(default, float) else value
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "index_topk"):
        demand(found[name] > 0)
    demand(found["num_hidden_layers"] <= 2000)
    return found


def kinds_of(data, name, layers, allowed):
    kinds = data.get(name)
    if kinds is not None:
        demand(isinstance(kinds, list) and len(kinds) == layers and all(kind in allowed for kind in kinds), name)
    return kinds


def meaning_v32(data):
    check_neutral(data, NEUTRAL_V32, [*OF_V4, "compress_ratios"])
    data = {name: value for name, value in data.items() if name != "attention_bias" or value is not None}
    c = sizes_of(data, DEEPSEEK_V32, {"n_routed_experts": ["num_experts", "num_local_experts"]})
    layers, dim = c["num_hidden_layers"], c["qk_rope_head_dim"]
    kinds_of(data, "layer_types", layers, ["indexed_attention", "deepseek_sparse_attention"])
    kinds_of(data, "indexer_types", layers, ["full"])
    demand(data.get("index_topk_pattern") in (None, "F" * layers, ["full"] * layers))
    demand(data.get("num_key_value_heads") in (None, c["num_attention_heads"]))
    first = c.pop("first_k_dense_replace")
    dense = [not c["n_routed_experts"] or layer < first for layer in range(layers)]
    kinds = kinds_of(data, "mlp_layer_types", layers, ["dense", "sparse"])
    if kinds is not None:
        stated = "first_k_dense_replace" in data
        demand(not stated or dense == [kind == "dense" for kind in kinds])
        dense = [kind == "dense" for kind in kinds]
    sections = [data[name] for name in ("rope_parameters", "rope_scaling") if data.get(name)]
    theta = shared([(place, "rope_theta") for place in (data, *sections)], 10000.0)
    original = shared([(place, ORIGINAL) for place in (data, *sections)], c["max_position_embeddings"])
    ropes = [rotation(section, theta, original, dim, None) for section in sections] or [plain(theta, dim)]
    frequencies, amplitude, softmax = ropes[0]
    for other in ropes[1:]:
        demand(np.array_equal(frequencies, other[0]) and (amplitude, softmax) == other[1:])
    scale = (c["qk_nope_head_dim"] + dim) ** -0.5 * softmax
    return {**c, "dense": dense, "frequencies": frequencies, "amplitude": amplitude, "scale": scale}


def described_v32(config):
    """The same of a loaded config."""
    from sparse_mla_jax.ops.rope import rope_frequencies

    c = {name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, bool | int | float)}
    del c["first_k_dense_replace"], c["quantize_index_query"]
    return {
        **c,
        "dense": [not config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)],
        "frequencies": rope_frequencies(config.rope, config.qk_rope_head_dim),
        "amplitude": config.rope.attention_factor,
        "scale": config.sm_scale,
    }


def meaning_v4(data):
    check_neutral(data, NEUTRAL_V4, OF_V32)
    aliases = {"n_routed_experts": ["num_local_experts"], "moe_intermediate_size": ["intermediate_size"]}
    c = sizes_of(data, DEEPSEEK_V4_FLASH, aliases)
    layers = c["num_hidden_layers"]
    first = c.pop("num_hash_layers")
    hashed = [layer < first for layer in range(layers)]
    kinds = kinds_of(data, "mlp_layer_types", layers, ["hash_moe", "moe"])
    if kinds is not None:
        demand("num_hash_layers" not in data or hashed == [kind == "hash_moe" for kind in kinds])
        hashed = [kind == "hash_moe" for kind in kinds]
    factor = data.get("partial_rotary_factor")
    if factor is not None:
        demand(type(factor) in (int, float))
        if "qk_rope_head_dim" in data:
            demand(abs(c["head_dim"] * factor - c["qk_rope_head_dim"]) < 1)
        else:
            c["qk_rope_head_dim"] = int(c["head_dim"] * factor)
    return {**c, "hashed": hashed, "ratios": ratios_of(data, layers), **ropes_of(data, c)}


def ratios_of(data, layers):
    """Tokens of a compressed entry per layer, 0 for none."""
    listed, kinds = data.get("compress_ratios"), kinds_of(data, "layer_types", layers, RATES)
    rates = data.get("compress_rates") or {}
    demand(isinstance(rates, dict))
    rates = {kind: rate for kind, rate in rates.items() if kind in RATES or rate is not None}
    demand(all(kind in RATES and type(rate) is int for kind, rate in rates.items()))
    rates = {**RATES, **rates}
    if listed is not None:
        demand(isinstance(listed, list) and all(type(ratio) is int and ratio >= 0 for ratio in listed[:layers]))
        demand(len(listed) >= layers)
        listed = [ratio if ratio > 1 else 0 for ratio in listed[:layers]]
    if kinds is not None:
        named = [rates[kind] if rates[kind] > 1 else 0 for kind in kinds]
        demand(listed is None or listed == named)
        listed = named
    if listed is None:
        listed = [ratio if ratio > 1 else 0 for ratio in DEEPSEEK_V4_FLASH.compress_ratios]
        demand(len(listed) == layers)
    return listed


def ropes_of(data, c):
    """Frequencies of layers that do not compress and of those that do; nothing changes the amplitude."""
    dim, context = c["qk_rope_head_dim"], c["max_position_embeddings"]
    sections = {n: data[n] for n in ("rope_parameters", "rope_scaling", "compress_rope_parameters") if data.get(n)}
    demand(all(isinstance(section, dict) for section in sections.values()))
    nested = sections.get("rope_parameters", {})
    main = None
    if nested.get("main") is not None or nested.get("compress") is not None:
        demand(all(isinstance(nested.get(name), dict) and nested[name] for name in ("main", "compress")))
        demand(all(value is None for name, value in nested.items() if name not in ("main", "compress")))
        main, sections["compress"] = nested["main"], nested["compress"]
        del sections["rope_parameters"]
    of_main = [section for name, section in sections.items() if not name.startswith("compress")]
    of_compress = [section for name, section in sections.items() if name.startswith("compress")]
    theta = shared([(place, "rope_theta") for place in (data, *of_main, *([main] if main else []))], 10000.0)
    compress_theta = shared(
        [(data, "compress_rope_theta"), *((place, "rope_theta") for place in of_compress)], 160000.0
    )
    original = shared([(place, ORIGINAL) for place in (data, *sections.values())], context)
    amplitudes = {name: None if name == "compress" else 1.0 for name in sections}
    ropes = [rotation(sections[name], compress_theta, original, dim, amplitudes[name]) for name in sections]
    ropes = ropes or [plain(compress_theta, dim)]
    ropes.append(rotation(main, theta, main.get(ORIGINAL, context), dim, None) if main else plain(theta, dim))
    demand(all((amplitude, softmax) == (1.0, 1.0) for _, amplitude, softmax in ropes))
    demand(all(np.array_equal(ropes[0][0], rope[0]) for rope in ropes[:-1]))
    return {"frequencies": ropes[-1][0], "compress_frequencies": ropes[0][0]}


def described_v4(config):
    """The same of a loaded config."""
    from sparse_mla_jax.ops.rope import rope_frequencies

    c = {name: value for name, value in dataclasses.asdict(config).items() if isinstance(value, bool | int | float)}
    del c["num_hash_layers"]
    layers = range(config.num_hidden_layers)
    return {
        **c,
        "hashed": [config.is_hash_layer(layer) for layer in layers],
        "ratios": [config.compress_ratio(layer) for layer in layers],
        "frequencies": rope_frequencies(config.rope, config.qk_rope_head_dim),
        "compress_frequencies": rope_frequencies(config.compress_rope, config.qk_rope_head_dim),
    }


# --- rotation


def shared(places, default):
    """A number that may stand in several places, which must agree."""
    given = []
    for place, name in places:
        demand(isinstance(place, dict))
        if name in place:
            demand(type(place[name]) in ((int,) if name == ORIGINAL else (int, float)) and place[name] >= 1)
            given.append(place[name])
    demand(len(set(given)) <= 1)
    return given[0] if given else default


def plain(theta, dim):
    return theta ** (-np.arange(0, dim, 2) / dim), 1.0, 1.0


def rotation(section, theta, original, dim, amplitude):
    """(frequencies, amplitude of cosines and sines, factor of the softmax scale) of one object."""
    section = {name: value for name, value in section.items() if value is not None}
    kinds = {section[name] for name in ("rope_type", "type") if isinstance(section.get(name), str)}
    demand(all(isinstance(section.get(name, ""), str) for name in ("rope_type", "type")) and len(kinds) <= 1)
    kind = kinds.pop() if kinds else "default"
    numbers = {name: value for name, value in section.items() if name not in ("rope_type", "type", "truncate")}
    demand(all(type(value) in (int, float) for value in numbers.values()))
    if kind == "default":
        demand(set(numbers) <= {"rope_theta", "partial_rotary_factor", ORIGINAL})
        return plain(theta, dim)
    known = {"rope_theta", "partial_rotary_factor", "factor", ORIGINAL, "beta_fast"}
    known |= {"beta_slow", "mscale", "mscale_all_dim", "attention_factor"}
    demand(kind == "yarn" and set(numbers) <= known and section.get("truncate", True) is True)
    demand("factor" in numbers)
    factor = numbers["factor"]
    fast, slow = numbers.get("beta_fast", 32), numbers.get("beta_slow", 1)
    demand(factor >= 1 and original > 0 and fast >= slow > 0)

    def m(scale):
        return 0.1 * scale * math.log(factor) + 1

    def pair(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    mscale, all_dim = numbers.get("mscale"), numbers.get("mscale_all_dim")
    if amplitude is None:
        amplitude = m(mscale) / m(all_dim) if mscale and all_dim else m(1)
    amplitude = numbers.get("attention_factor", amplitude)
    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    base = plain(theta, dim)[0]
    return base * (1 - ramp) + base / factor * ramp, amplitude, m(all_dim) ** 2 if all_dim else 1.0
