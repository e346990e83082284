"""config.py: the published config.json, both spellings of RoPE, and every refusal."""

import json

import pytest

from sparse_mla_jax.config import DEEPSEEK_V32, DeepseekV32Config, RopeConfig, config_from_json, load_config


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
        ({"rope_parameters": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 1.0}}, "mscale"),
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
