"""Seeded mutations of published config.json files: each one is refused, or means what transformers reads in it."""

import copy
import json
import random
import warnings

import numpy as np
import pytest
from support.config_meaning import Unsupported, described_v4, described_v32, meaning
from support.mla_meaning import ARCHITECTURES, described, meaning_or_refusal

from sparse_mla_jax.config import load_config

BASES = (
    "configs/deepseek_v32_config.json",
    "configs/deepseek_v4_flash_config.json",
    "configs/deepseek_v4_pro_config.json",
    "deepseek_v32_tiny/config.json",
    "deepseek_v4_tiny/config.json",
    "deepseek_v4_tiny/hf_config.json",
    "glm_moe_dsa_tiny/config_freq.json",
    "hy_v4_tiny/config.json",
    "hy_v4_vl_tiny/config.json",
    "axk2_tiny/config.json",
    "mistral_large4_tiny/config_legacy.json",
    "dots3_note_tiny/config.json",
    "dots3_note_tiny/config_legacy.json",
)
# Fields with values that are right in some family, many of them not in the files.
FURTHER = {
    "hidden_act": ["silu", "gelu"],
    "scoring_func": ["sigmoid", "softmax", "sqrtsoftplus"],
    "topk_method": ["noaux_tc", "greedy"],
    "moe_layer_freq": [1, 2],
    "architectures": [["DeepseekV32ForCausalLM"], ["DeepseekV4ForCausalLM"], ["GlmMoeDsaForCausalLM"]],
    "layer_types": [["indexed_attention"] * 3, ["deepseek_sparse_attention"] * 61, ["full_attention"] * 3],
    "mlp_layer_types": [["dense", "sparse", "sparse"], ["sparse"] * 3, ["moe"] * 4, ["dense"] * 3 + ["sparse"] * 58],
    "rope_interleave": [False, True],
    "indexer_rope_interleave": [True, False],
    "indexer_types": [["full"] * 3, ["full"] * 61, ["full", "shared", "shared"]],
    "index_topk_pattern": ["FFF", "FSS", "F" * 61],
    "index_topk_freq": [1, 4],
    "index_skip_topk_offset": [3],
    "num_experts": [8, 64, 256],
    "num_local_experts": [8, 64, 256],
    "partial_rotary_factor": [1.0, 0.5, 0.125],
    "per_layer_config": [{}, {"0": {"head_dim": 3}}],
    "text_config": [{}, {"hidden_size": 3}],
    "is_encoder_decoder": [False, True],
    "intermediate_size": [64, 2048],
    "compress_ratios": [[0, 4, 128, 4]],
    "hc_mult": [4],
    "kv_lora_rank": [512],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "yarn", "factor": 40.0}],
    "rope_scaling": [{"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096}, {"type": "linear"}],
    "rope_theta": [10000, 5000.0],
    "compress_rope_parameters": [{"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536}],
    "quantization_config": [{"quant_method": "awq"}, {"weight_block_size": [64, 64]}, "fp8", [1]],
    "router_jitter_noise": [0.1],
    "a_new_field": [1, "x", {"y": 2}],
    "attention_gate": [True],
}
NEW = ("a_new_field", "attention_gate")
IN_ROPE = {
    "attention_factor": [1.0, 1.3],
    "mscale": [1.0, 0.7],
    "mscale_all_dim": [0.0, 1.0, 0.7],
    "rope_type": ["yarn", "default", "linear", "llama3"],
    "truncate": [True, False],
    "rope_theta": [10000, 160000, 7.0],
    "short_factor": [[1.0]],
    "beta_fast": [32, 64, 1],
}
ANYTHING = (
    *(None, True, False, 0, -1, 1, 2, 3, 0.5, 1e-6, -0.0, 2**31 - 1, 2**31, 2**63, 10**8, 10**400, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "4", "silu", "yarn", [], [1], [[1]], {}, {"a": 1}, {"a": None}),
)


def pick(rng, values):
    """One of the values, as a copy that later mutations may change."""
    return copy.deepcopy(rng.choice(values))


def variants(rng, value):
    """A value near to this one, or anything."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or rng.random() < 0.4:
        return pick(rng, ANYTHING)
    return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value), [value]])


def mutate(rng, data):
    """One change in place."""
    nested = [name for name, value in data.items() if isinstance(value, dict)]
    lists = [name for name, value in data.items() if isinstance(value, list) and value]
    choice = rng.random()
    if choice < 0.38 or not (nested and lists):
        name = rng.choice(list(data) or ["hidden_size"])
        data[name] = variants(rng, data.get(name))
    elif choice < 0.46:
        data.pop(rng.choice(list(data)))
    elif choice < 0.66:
        section = data[rng.choice(nested)]
        section = section.get(rng.choice(["main", "compress"]), section)
        name = rng.choice([*section, *IN_ROPE]) if isinstance(section, dict) else None
        if name is not None:
            section[name] = pick(rng, IN_ROPE[name]) if name in IN_ROPE else variants(rng, section[name])
    elif choice < 0.74:
        entries = data[rng.choice(lists)]
        entries[rng.randrange(len(entries))] = pick(rng, [*ANYTHING, *entries])
    else:
        name = rng.choice(list(FURTHER))
        data[name] = pick(rng, FURTHER[name] if rng.random() < 0.8 else ANYTHING)


def damage(rng, text):
    """The text with a part cut out, doubled or replaced."""
    start = rng.randrange(len(text))
    end = min(len(text), start + rng.choice([1, 3, 40]))
    return text[:start] + rng.choice(["", text[start:end] * 2, "[" * 100_000, "9" * 5000, '{"a":' * 2000]) + text[end:]


def check(text, path, known):
    """Whether the text loads; it may do so only with the right meaning, and with no report of a field in `known`."""
    path.write_text(text)
    with warnings.catch_warnings(record=True) as reports:
        warnings.simplefilter("always")
        try:
            config = load_config(path.parent)
        except ValueError as error:
            message = str(error)
            assert message and "\n" not in message and len(message) < 1000, message
            return False
    try:
        data = json.loads(text)
        kind = str(data.get("model_type")).removesuffix("_text")
        expected = meaning_or_refusal(kind, data) if kind in ARCHITECTURES else meaning(data)
    except Unsupported as reason:
        raise AssertionError(f"accepted, but not supported: {reason}") from None
    described_as = {"deepseek_v32": described_v32, "deepseek_v4": described_v4}
    found = described_as.get(config.family, described)(config)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray | float):
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-38, err_msg=name)
        else:
            assert type(found[name]) is type(value) and found[name] == value, name
    # One may say which of two spellings counts.
    messages = [str(report.message) for report in reports if " count" not in str(report.message)]
    assert len(messages) <= 1, messages
    said = " ".join(messages)
    for name in NEW:
        assert data.get(name) is None or name in said, name
    # Fields of the published file are known. Those that a mutation puts into an object need not be.
    assert not said or data.keys() - known or "." in said, said
    return True


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(BASES)))
def test_mutations(fixtures, tmp_path, seed):
    rng = random.Random(seed)
    loaded = 0
    for number in range(500):
        base = json.loads((fixtures / BASES[seed]).read_text())
        data = copy.deepcopy(base)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            text = data.get("text_config")
            mutate(rng, text if isinstance(text, dict) and text and rng.random() < 0.7 else data)
        text = json.dumps(data)
        text = damage(rng, text) if rng.random() < 0.1 else text
        try:
            loaded += check(text, tmp_path / "config.json", base.keys())
        except Exception as error:
            changes = {name: data.get(name, "dropped") for name in data | base if data.get(name) != base.get(name)}
            pytest.fail(f"mutation {number}: {type(error).__name__}: {error}\n{changes}\n{text[:1000]}")
    # Enough of them are right: the others are refused for their own faults.
    assert loaded >= 100
