"""config.py: the published config.json of both families, every spelling, and every refusal."""

import dataclasses
import json
import math

import pytest

from sparse_mla_jax.config import (
    DEEPSEEK_V4_FLASH,
    DEEPSEEK_V4_PRO,
    DEEPSEEK_V32,
    DeepseekV4Config,
    DeepseekV32Config,
    RopeConfig,
    config_from_json,
    from_hf,
    load_config,
)


def test_presets_are_the_published_sizes():
    config = DEEPSEEK_V32
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (7168, 61, 128)
    assert (config.kv_lora_rank, config.kv_group_size, config.index_topk) == (512, 128, 2048)
    assert config.num_moe_layers == 58 and config.is_moe_layer(3) and not config.is_moe_layer(2)
    assert config.sm_scale == pytest.approx(0.135234, abs=1e-6)


def test_fixture_config(fixtures):
    config = load_config(fixtures / "deepseek_v32_tiny")
    assert config.rope == RopeConfig(factor=40.0, mscale_all_dim=1.0)
    assert (config.index_n_heads, config.index_topk, config.first_k_dense_replace) == (32, 16, 1)
    assert config.kv_group_size == 64


def test_both_rope_spellings_agree():
    yarn = {
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale_all_dim": 1.0,
    }
    new = config_from_json({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, **yarn}})
    old = config_from_json({"rope_theta": 5000.0, "rope_scaling": {"type": "yarn", **yarn}})
    assert new == old and new.rope.theta == 5000.0
    assert config_from_json({"rope_parameters": None}).rope == RopeConfig()


def test_the_published_file_is_the_preset(fixtures):
    """A field that is not known would warn, which is an error in these tests."""
    assert from_hf(fixtures / "configs" / "deepseek_v32_config.json") == DEEPSEEK_V32


ORIGINAL = "original_max_position_embeddings"
# Values with which these fields say what the code does.
NEUTRAL = {
    "hidden_act": "silu",
    "attention_bias": False,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
    "layer_types": ["indexed_attention"] * 61,
    "indexer_types": ["full"] * 61,
    "index_topk_pattern": "F" * 61,
    "index_topk_freq": 1,
    "num_key_value_heads": 128,
    "qk_head_dim": 192,
    "num_experts": 256,
    "num_local_experts": 256,
    "rope_interleave": True,
    "indexer_rope_interleave": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_fields_that_say_what_the_code_does_change_nothing(name):
    plain = config_from_json({})
    assert config_from_json({name: NEUTRAL[name]}) == plain
    # null says nothing, but of a size or a truth value it says something that can not be.
    assert "interleave" in name or config_from_json({name: None}) == plain


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is only 'silu'"),
        ({"attention_bias": 0}, "attention_bias is 0"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"mlp_layer_types": ["sparse"] * 61, "first_k_dense_replace": 3}, "mlp_layer_types has 0 dense layers"),
        ({"mlp_layer_types": ["dense"] * 60}, "mlp_layer_types has 60 entries"),
        ({"layer_types": ["full_attention"] * 61}, "layer_types has an entry 'full_attention'"),
        ({"layer_types": ["indexed_attention"] * 60 + [None]}, "layer_types has an entry null"),
        ({"indexer_types": ["full"] * 60 + ["shared"]}, "indexer_types has an entry 'shared'"),
        ({"index_topk_pattern": "F" * 60 + "S"}, "index_topk_pattern"),
        ({"index_topk_freq": 4}, "index_topk_freq is 4"),
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"n_group": None}, "n_group is null"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"n_routed_experts": 256, "num_experts": 64}, "mean the same and differ"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"3": {"index_topk": 4}}}, "per_layer_config"),
        ({"text_config": {"hidden_size": 4}}, "text_config"),
        ({"hc_mult": 4}, "hc_mult belongs to model_type 'deepseek_v4'"),
        ({"architectures": ["GlmMoeDsaForCausalLM"]}, "architectures names"),
        ({"model_type": []}, r"model_type \[\]"),
        ({"rope_parameters": {"rope_type": "default", "factor": 4}}, "rope_parameters.factor is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention is not supported"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "rope_theta 100000.0 differ"),
        ({"rope_theta": None}, "rope_theta is null"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, ORIGINAL: None}}, "original_max_position_embeddings is null"),
        ({ORIGINAL: 64, "rope_scaling": {"type": "yarn", "factor": 4, ORIGINAL: 32}}, "embeddings 32 differ"),
        ({"rope_theta": 1}, "theta is 1.0; it must be at least 2.0"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
        ({"quantization_config": {"fmt": "e5m2"}}, "quantization_config.fmt is 'e5m2'"),
        ({"quantization_config": {"weight_block_size": [128]}}, "weight_block_size is"),
        ({"quantization_config": {"weight_block_size": [128, 0]}}, "weight_block_size is"),
    ],
)
def test_a_field_that_asks_for_something_else_is_refused(data, word):
    with pytest.raises(ValueError, match=word):
        config_from_json(data)


def test_fp8_of_other_programs():
    """compressed-tensors and Quark describe weights in a group; activations and caches have no effect."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
    packed = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    quark = {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}
    for right in (packed, quark):
        assert config_from_json({"quantization_config": right}) == config_from_json({})
    group["weights"] = {**weights, "num_bits": 4}
    quark["global_quant_config"] = {"weight": {"dtype": "fp4"}}
    for wrong, word in ((packed, "group_0.weights.num_bits is 4"), (quark, "weight.dtype is 'fp4'")):
        with pytest.raises(ValueError, match=word):
            config_from_json({"quantization_config": wrong})


def test_unknown_fields_are_reported_once_and_by_name():
    with pytest.warns(UserWarning) as reports:
        config = config_from_json({"a_new_gate": True, "a_new_size": 3, "nothing": None, "rope_parameters": None})
    (report,) = reports
    assert "a_new_gate, a_new_size. " in str(report.message) and "nothing" not in str(report.message)
    assert config == config_from_json({})


def test_other_ways_to_count_experts_and_layers():
    assert config_from_json({"num_experts": 64}).n_routed_experts == 64
    assert config_from_json({"num_local_experts": 64, "n_routed_experts": 64}).n_routed_experts == 64
    assert config_from_json({"n_routed_experts": None, "n_shared_experts": None}).num_moe_layers == 0
    kinds = {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2}
    config = config_from_json(kinds)
    assert (config.first_k_dense_replace, config.mlp_layer_types) == (1, ())
    mixed = config_from_json({**kinds, "mlp_layer_types": ["sparse", "dense"]})
    assert [mixed.is_moe_layer(layer) for layer in (0, 1)] == [True, False]


@pytest.mark.parametrize(
    ("change", "amplitude", "softmax"),
    [
        ({}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale": 1.0}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale_all_dim": 1.0}, 0.1 * math.log(40) + 1, (0.1 * math.log(40) + 1) ** 2),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, (0.1 * math.log(40) + 1) ** 2),
        ({"mscale": 0.7, "mscale_all_dim": 1.0}, (0.07 * math.log(40) + 1) / (0.1 * math.log(40) + 1), 1.368888**2),
        ({"attention_factor": 1.3, "mscale": 1.0}, 1.3, 1.0),
        ({"attention_factor": None, "beta_fast": None, "truncate": True}, 0.1 * math.log(40) + 1, 1.0),
    ],
)
def test_amplitude_and_softmax_scale_of_yarn(change, amplitude, softmax):
    """The rules of transformers 5.24, _compute_yarn_parameters and yarn_apply_mscale."""
    yarn = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, **change}
    rope = config_from_json({"rope_parameters": yarn}).rope
    assert rope.attention_factor == pytest.approx(amplitude, rel=1e-12)
    assert rope.softmax_factor == pytest.approx(softmax, rel=1e-6)


def test_the_original_context_is_the_model_s_where_yarn_names_none():
    """As in transformers, RotaryEmbeddingConfigMixin.standardize_rope_params; a field at the top level counts too."""
    data = {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4}}
    assert config_from_json(data).rope.original_max_position == 512
    assert config_from_json({**data, ORIGINAL: 64}).rope.original_max_position == 64


def test_two_spellings_of_a_rotation_must_agree():
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    both = {"rope_parameters": {"rope_type": "yarn", **yarn}, "rope_scaling": {"type": "yarn", **yarn}}
    assert config_from_json(both).rope == DEEPSEEK_V32.rope
    both["rope_parameters"] = {"rope_type": "default"}
    with pytest.raises(ValueError, match=r"differ: they make factor 1.0 and 40.0"):
        config_from_json(both)


def test_plain_rope_leaves_the_softmax_scale_alone():
    config = config_from_json({"qk_nope_head_dim": 48, "qk_rope_head_dim": 16})
    assert config.sm_scale == 64**-0.5


def test_configs_are_hashable_and_dense_is_a_copy():
    assert hash(DEEPSEEK_V32) == hash(DeepseekV32Config())
    assert DEEPSEEK_V32.dense().index_topk == 2**31 - 1 and DEEPSEEK_V32.index_topk == 2048


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"index_topk": 0}, "index_topk"),
        ({"hidden_size": "7168"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"index_head_dim": 32}, "index_head_dim"),
        ({"n_group": 7}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok"),
        ({"model_type": "llama"}, "llama"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, "rope_parameters.factor is null"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
        ([], "JSON object"),
    ],
)
def test_refusals_name_the_field(data, word):
    with pytest.raises(ValueError, match=word):
        config_from_json(data)


def test_folders_without_a_readable_config(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "absent")
    with pytest.raises(ValueError, match="no config.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1})[:-1])
    with pytest.raises(ValueError, match="not valid JSON"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "field a is nested more than 32 deep"),
        ('{"index_topk": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"index_topk": ' + "9" * 400 + "}", "index_topk is 99999"),
        ('{"index_topk": 8, "index_topk": 9}', "the field 'index_topk' twice"),
        ('{"rms_norm_eps": NaN}', "rms_norm_eps is nan"),
        ('{"initializer_range": NaN}', "initializer_range is nan"),
        ('{"rope_theta": 1e999}', "rope_theta is inf"),
        ("[]", "a JSON object is expected"),
        ("7", "a JSON object is expected"),
    ],
    ids=lambda value: value[:24],
)
def test_files_that_are_no_config(tmp_path, text, word):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=word) as refusal:
        load_config(tmp_path)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000; it must be at most 1024"),
        ({"num_hidden_layers": 1000, "n_routed_experts": 1024}, "make 1024000 experts"),
        ({"hidden_size": 7168.0}, "an integer is expected"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; true or false"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps is 1e-300"),
        ({"routed_scaling_factor": float("inf")}, "at most"),
        ({"routed_scaling_factor": -1.0}, "at least"),
        ({"index_topk": 2**31}, "index_topk is 2147483648"),
        ({"index_topk": 10**5000}, "index_topk is int that is too long to print"),
        ({"rope": 4}, "rope is 4; a RopeConfig is expected"),
    ],
)
def test_the_dataclass_checks_every_value(change, word):
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(DEEPSEEK_V32, **change)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"factor": 0.5}, "factor is 0.5; it must be at least 1.0"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"original_max_position": 0}, "original_max_position is 0"),
        ({"beta_fast": 1.0, "beta_slow": 2.0}, "less than beta_slow"),
        ({"mscale_all_dim": -1.0}, "mscale_all_dim is -1.0"),
        ({"attention_factor": 0.0}, "attention_factor is 0.0"),
    ],
)
def test_a_rotation_checks_every_value(change, word):
    with pytest.raises(ValueError, match=word):
        RopeConfig(**change)


# --- DeepSeek-V4 -----------------------------------------------------------------------------------------------------
YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1}
TINY = {
    "model_type": "deepseek_v4",
    "num_hidden_layers": 4,
    "compress_ratios": [0, 4, 128, 4],
    "num_hash_layers": 2,
    "rope_theta": 5000,
    "compress_rope_theta": 80000,
    "rope_scaling": YARN,
}

MAIN = {"rope_type": "default", "rope_theta": 5000}


def without(data, *names):
    return {name: value for name, value in data.items() if name not in names}


def test_v4_presets_are_the_published_files(fixtures):
    flash = from_hf(fixtures / "configs" / "deepseek_v4_flash_config.json")
    pro = from_hf(str(fixtures / "configs" / "deepseek_v4_pro_config.json"))
    assert flash == DEEPSEEK_V4_FLASH == DeepseekV4Config() and pro == DEEPSEEK_V4_PRO
    assert hash(flash) == hash(DEEPSEEK_V4_FLASH) != hash(pro)
    for config, sliding, four, many in ((flash, 2, 21, 20), (pro, 0, 30, 31)):
        ratios = [config.compress_ratio(layer) for layer in range(config.num_hidden_layers)]
        assert (ratios.count(0), ratios.count(4), ratios.count(128)) == (sliding, four, many)
        assert (config.nope_dim, config.kv_group_size, config.sm_scale) == (448, 64, 512**-0.5)
        assert config.rope == RopeConfig()
        assert config.compress_rope == RopeConfig(theta=160000.0, factor=16.0, original_max_position=65536)
    assert (pro.hidden_size, pro.num_attention_heads, pro.n_routed_experts, pro.index_topk) == (7168, 128, 384, 1024)


def test_v4_as_transformers_saves_it(fixtures):
    folder = fixtures / "deepseek_v4_tiny"
    assert from_hf(folder / "hf_config.json") == from_hf(folder / "config.json")


def test_v4_layers(fixtures):
    config = load_config(fixtures / "deepseek_v4_tiny")
    assert isinstance(config, DeepseekV4Config) and config.compress_ratios == (0, 4, 8, 4)
    assert [config.compress_ratio(layer) for layer in range(4)] == [0, 4, 8, 4]
    assert [config.has_indexer(layer) for layer in range(4)] == [False, True, False, True]
    assert [config.is_hash_layer(layer) for layer in range(4)] == [True, False, False, False]
    assert all(config.is_moe_layer(layer) for layer in range(4))
    assert [config.layer_rope(layer).theta for layer in range(4)] == [1e4, 1.6e5, 1.6e5, 1.6e5]
    assert [config.compressor_overlap(ratio) for ratio in (0, 4, 8, 128)] == [False, True, False, False]
    assert (config.nope_dim, config.kv_group_size, config.sm_scale) == (32, 32, 64**-0.5)


def test_a_published_ratio_of_1_compresses_nothing():
    config = config_from_json({**TINY, "compress_ratios": [1, 4, 128, 0, 0]})
    assert config.compress_ratios == (1, 4, 128, 0)
    assert config.compress_ratio(0) == 0 and config.layer_rope(0) == config.rope and not config.has_indexer(0)


@pytest.mark.parametrize(("predictors", "entries", "good"), [(1, 5, True), (0, 5, True), (3, 7, True), (1, 6, False)])
def test_entries_of_multi_token_prediction_are_cut(predictors, entries, good):
    data = {**TINY, "num_nextn_predict_layers": predictors, "compress_ratios": [0, 4, 128, 4, 0, 0, 0][:entries]}
    if good:
        assert config_from_json(data).compress_ratios == (0, 4, 128, 4)
    else:
        with pytest.raises(ValueError, match="compress_ratios has 6 entries"):
            config_from_json(data)


def test_the_spelling_of_transformers_says_the_same():
    published = config_from_json({**TINY, "head_dim": 32, "qk_rope_head_dim": 8})
    transformers = {
        "model_type": "deepseek_v4",
        "num_hidden_layers": 4,
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.25},
            "compress": {**YARN, "rope_type": "yarn", "rope_theta": 80000, "attention_factor": 1.0},
        },
    }
    assert config_from_json(transformers) == published
    for window in (0, 1):  # both say that a layer does not compress
        listed = {"num_hash_layers": 2, "compress_ratios": [window, 4, 128, 4, 0], "qk_rope_head_dim": 8}
        assert config_from_json({**transformers, **listed}) == published
    other = {**transformers, "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}}
    assert config_from_json(other).compress_ratios == (0, 4, 16, 4)
    assert config_from_json(without(transformers, "compress_rates")) == published
    earlier = {
        **TINY,
        "rope_parameters": {**YARN, "rope_theta": 5000},
        "compress_rope_parameters": {**YARN, "rope_theta": 80000},
    }
    for data in (earlier, without(earlier, "compress_rope_parameters", "rope_scaling", "rope_theta")):
        read = config_from_json(data)
        assert (read.rope, read.compress_rope) == (published.rope, published.compress_rope)


def test_rounded_partial_rotary_factor():
    """transformers stores 16 / 48 as 0.3333333333333333; qk_rope_head_dim, where it stands, is exact."""
    data = {**TINY, "head_dim": 48, "partial_rotary_factor": 1 / 3}
    assert config_from_json(data).qk_rope_head_dim == 16
    assert config_from_json({**data, "partial_rotary_factor": 0.333, "qk_rope_head_dim": 16}).qk_rope_head_dim == 16


def test_other_names_of_v4():
    named = config_from_json({**TINY, "num_local_experts": 64, "intermediate_size": 96, "compress_rate_hca": 128})
    assert (named.n_routed_experts, named.moe_intermediate_size) == (64, 96)


def test_without_scaling_v4_rotates_plainly_everywhere():
    config = config_from_json(without(TINY, "rope_scaling"))
    assert (config.rope, config.compress_rope) == (RopeConfig(theta=5000.0), RopeConfig(theta=80000.0))


def test_from_hf_takes_folders_files_and_fields(fixtures):
    folder = fixtures / "deepseek_v4_tiny"
    fields = json.loads((folder / "config.json").read_text())
    assert from_hf(folder) == from_hf(str(folder / "config.json")) == from_hf(fields) == load_config(folder)
    assert from_hf(fixtures / "deepseek_v32_tiny") == load_config(fixtures / "deepseek_v32_tiny")
    with pytest.raises(ValueError, match="does not exist"):
        from_hf(folder / "nothing.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"num_hash_layers": -1}, "num_hash_layers is -1"),
        ({"swiglu_limit": "10"}, "swiglu_limit"),
        ({"head_dim": 64}, "less than head_dim"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ({"index_head_dim": 32}, "index_head_dim is 32"),
        ({"o_groups": 7}, "o_groups is 7"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257"),
        ({"compress_ratios": [0, 4, 128]}, "has 3 entries"),
        ({"compress_ratios": [0, 4, 128, -4]}, "at least 0"),
        ({"compress_ratios": [0, 4, 128, 4.0]}, "at least 0"),
        ({"compress_ratios": "4"}, "compress_ratios is '4'"),
        ({"compress_ratios": None}, "compress_ratios has 43 entries"),
        ({"layer_types": ["sliding_attention"] * 4}, "differ"),
        ({"compress_ratios": None, "layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"compress_ratios": None, "layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4, "compress_rates": {"compressed_sparse_attention": 8}}, "rates"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "mlp_layer_types"),
        ({"mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]}, "num_hash_layers is 2"),
        ({"qk_rope_head_dim": 64, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear"}}, "linear"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_parameters": {"main": {"rope_theta": 1.0}}}, "'main' and 'compress'"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.3}}, "attention_factor"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ({"rope_scaling": {**YARN, "attention_factor": 1.3}}, "attention_factor 1.3"),
        ({"rope_scaling": None, "rope_parameters": {"main": MAIN, "compress": YARN}}, "attention_factor 1.27"),
        ({"rope_parameters": {"main": MAIN, "compress": YARN, "factor": 4}}, "rope_parameters.factor stands beside"),
        ({"compress_rope_theta": 8, "rope_parameters": {"main": MAIN, "compress": MAIN}}, "compress.rope_theta 5000.0"),
        ({"partial_rotary_factor": 1e308}, "partial_rotary_factor is 1e"),
        ({"compress_rates": {"heavily_compressed_attention": None}}, "heavily_compressed_attention is null"),
        ({"compress_rates": {"another": 4}}, "compress_rates.another is no kind"),
        ({"compress_rate_csa": 8}, "compress_rates makes"),
        ({"mlp_layer_types": ["hash_moe", None, "moe", "moe"]}, "mlp_layer_types has an entry null"),
        ({"n_group": 8}, "n_group is 8"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"kv_lora_rank": 512}, "kv_lora_rank belongs to model_type 'deepseek_v32'"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"swiglu_limit": 0.0}, "swiglu_limit is 0.0"),
        ({"sliding_window": 10**8}, "sliding_window is 100000000; it must be at most"),
        ({"hc_sinkhorn_iters": 10**9}, "hc_sinkhorn_iters"),
        ({"compress_ratios": [0, 4, 128, 10**9]}, "compress_ratios"),
    ],
)
def test_v4_refusals_name_the_field(change, word):
    with pytest.raises(ValueError, match=word):
        config_from_json({**TINY, **change})


def test_v4_refuses_what_is_no_tuple():
    with pytest.raises(ValueError, match="a tuple of integers"):
        DeepseekV4Config(compress_ratios=[0] * 43)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="43 entries; num_hidden_layers is 42"):
        DeepseekV4Config(num_hidden_layers=42)
