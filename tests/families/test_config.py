"""config.py: the published config.json of both families, every spelling, and every refusal."""

import json

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
        ({"rope_parameters": {"rope_type": "linear"}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": None}}, "rope_parameters.factor is null"),
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
        ({"rope_scaling": {**YARN, "mscale_all_dim": 1.0, "mscale": 1.0}}, "mscale_all_dim"),
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
