import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from deepseek_v32_oracle import random_tensors
from safetensors.numpy import load_file
from small_models import SMALL, random_params, write_folder

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32, RopeConfig, from_hf, load_config
from sparse_mla_jax.families.registry import published_family
from sparse_mla_jax.models import deepseek_v32 as model
from sparse_mla_jax.models.checkpoint import (
    config_to_json,
    dequantize_blocks,
    load_checkpoint,
    published_shapes,
    save_checkpoint,
    skipped_tensors,
)

CONFIG = dataclasses.replace(SMALL, num_hidden_layers=3, first_k_dense_replace=1, vocab_size=11, hidden_size=20)
VARIANTS = {
    "usual": CONFIG,
    "tied, plain rope, two shared": dataclasses.replace(
        CONFIG, tie_word_embeddings=True, rope=RopeConfig(theta=500.0), n_shared_experts=2
    ),
    "dense only": dataclasses.replace(CONFIG, n_routed_experts=0, n_shared_experts=0),
    "no dense layer, no shared expert": dataclasses.replace(CONFIG, first_k_dense_replace=0, n_shared_experts=0),
}
GATE = "model.layers.1.mlp.gate.weight"


@pytest.fixture
def tensors():
    return random_tensors(published_shapes(CONFIG), 0)


@pytest.fixture
def folder(tmp_path, tensors):
    write_folder(tmp_path / "model", CONFIG, tensors)
    return tmp_path / "model"


def load_folder(folder, tensors, **extra):
    write_folder(folder, CONFIG, tensors, **extra)
    return load_checkpoint(folder)


# --- what is read ----------------------------------------------------------------------------------------------------
def test_layout(folder, tensors):
    """Each of our arrays from the published one, by its meaning."""
    config, params = load_checkpoint(folder)
    assert config == CONFIG
    jax.tree.map(
        lambda spec, a: (a.shape, a.dtype) == (spec.shape, spec.dtype) or 1 / 0, model.param_specs(config), params
    )
    attention, p = params["layers"][2]["self_attn"], "model.layers.2.self_attn."
    heads, dn, dv, dr = 6, 10, 7, 6
    for h in range(heads):
        rows = tensors[p + "kv_b_proj.weight"][h * (dn + dv) : (h + 1) * (dn + dv)]
        np.testing.assert_array_equal(attention["kv_b_k"][h], rows[:dn])
        np.testing.assert_array_equal(attention["kv_b_v"][h], rows[dn:].T)
        rows = tensors[p + "q_b_proj.weight"][h * (dn + dr) : (h + 1) * (dn + dr)]
        np.testing.assert_array_equal(attention["q_b_proj"][:, h], rows.T)
        columns = tensors[p + "o_proj.weight"][:, h * dv : (h + 1) * dv]
        np.testing.assert_array_equal(attention["o_proj"][h], columns.T)
    for h in range(3):
        rows = tensors[p + "indexer.wq_b.weight"][h * 12 : (h + 1) * 12]
        np.testing.assert_array_equal(attention["indexer"]["wq_b"][:, h], rows.T)
    mlp = params["layers"][1]["mlp"]
    np.testing.assert_array_equal(
        mlp["experts"]["down_proj"][4], tensors["model.layers.1.mlp.experts.4.down_proj.weight"].T
    )
    np.testing.assert_array_equal(mlp["gate"]["weight"], tensors[GATE].T)
    np.testing.assert_array_equal(params["lm_head"], tensors["lm_head.weight"].T)


def test_published_names_are_the_fixture_s(fixtures):
    path = fixtures / "deepseek_v32_tiny"
    expected = {name: value.shape for name, value in load_file(path / "model.safetensors").items()}
    assert published_shapes(load_config(path)) == expected


def test_config_is_the_fixture_s(fixtures):
    """Every field that transformers wrote is there and equal, but for its version and what is said outright."""
    path = fixtures / "deepseek_v32_tiny"
    published = json.loads((path / "config.json").read_text())
    ours = config_to_json(load_config(path))
    assert ours["rope_parameters"].pop("attention_factor") == 1.0
    for name in ("transformers_version", "output_router_logits"):
        published.pop(name)
    assert ours == published


def test_bfloat16_keeps_norms_and_bias_wide(folder, tensors):
    _, params = load_checkpoint(folder, dtype=jnp.bfloat16)
    layer = params["layers"][1]
    assert layer["mlp"]["experts"]["up_proj"].dtype == params["embed_tokens"].dtype == jnp.bfloat16
    wide = {
        "post_attention_layernorm.weight": layer["post_attention_layernorm"],
        "self_attn.q_a_layernorm.weight": layer["self_attn"]["q_a_layernorm"],
        "self_attn.indexer.k_norm.bias": layer["self_attn"]["indexer"]["k_norm"]["bias"],
        "mlp.gate.e_score_correction_bias": layer["mlp"]["gate"]["e_score_correction_bias"],
    }
    for name, value in wide.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, tensors["model.layers.1." + name])


def test_ignored_tensors(tmp_path, tensors):
    """The multi-token-prediction layer and rotary buffers of the published files have no place and no error."""
    extra = {
        "model.layers.3.eh_proj.weight": np.zeros((2, 2), np.float32),
        "model.layers.3.self_attn.q_a_proj.weight": np.zeros((2, 2), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32),
    }
    load_folder(tmp_path / "model", {**tensors, **extra})


# --- fp8 weights -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (256, 64), (300, 384)])
def test_dequantize_blocks(shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.random((-(-shape[0] // 128), -(-shape[1] // 128))).astype(np.float32)
    out = dequantize_blocks(values, scales)
    for row, column in zip(rng.integers(0, shape[0], 50), rng.integers(0, shape[1], 50)):
        assert out[row, column] == np.float32(values[row, column]) * scales[row // 128, column // 128]
    with pytest.raises(ValueError, match="scales has shape"):
        dequantize_blocks(values, scales[:, :0])


@pytest.mark.parametrize("block", [(128, 128), (4, 6)])
def test_fp8_folder(tmp_path, tensors, block):
    """Linear weights as FP8 blocks with scales, the rest as published; experts and kv_b_proj among them."""
    rng, stored, expected = np.random.default_rng(0), {}, {}
    for name, value in tensors.items():
        stored[name] = expected[name] = value
        if name.endswith("_proj.weight") and "weights_proj" not in name:
            scales = rng.uniform(0.01, 0.1, [-(-n // b) for n, b in zip(value.shape, block)]).astype(np.float32)
            stored[name] = (value * 20).astype(ml_dtypes.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
            expected[name] = dequantize_blocks(stored[name], scales, block)
    assert len(stored) > len(tensors) + 20
    extra = {} if block == (128, 128) else {"quantization_config": {"weight_block_size": list(block)}}
    quantised = load_folder(tmp_path / "fp8", stored, **extra)[1]
    plain = load_folder(tmp_path / "plain", expected)[1]
    jax.tree.map(np.testing.assert_array_equal, quantised, plain)
    name = "model.layers.2.mlp.experts.3.up_proj.weight_scale_inv"
    del stored[name]
    with pytest.raises(ValueError, match=f"FP8 tensor .* has no {name}"):
        load_folder(tmp_path / "fp8", stored, **extra)
    stored[name] = np.zeros((5, 5), np.float32)
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \[5, 5\]"):
        load_folder(tmp_path / "fp8", stored, **extra)


# --- round trip ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, name, dtype):
    config = VARIANTS[name]
    params = random_params(model.param_specs(config, dtype))
    for target, shard_bytes in (("one", 10**9), ("many", 2000), ("each", 1)):
        save_checkpoint(tmp_path / target, config, params, max_shard_bytes=shard_bytes)
        loaded, again = load_checkpoint(tmp_path / target, dtype=dtype)
        assert loaded == config
        for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
            assert before.dtype == after.dtype and before.tobytes() == after.tobytes()
    files = sorted(p.name for p in (tmp_path / "many").iterdir())
    assert files[0] == "config.json" and files[-1] == "model.safetensors.index.json" and len(files) > 4
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(published_shapes(config))
    save_checkpoint(tmp_path / "again", config, load_checkpoint(tmp_path / "one", dtype=dtype)[1])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()


def test_fixture_round_trip(tmp_path, fixtures):
    """Every byte of every tensor that another program wrote comes back."""
    source = fixtures / "deepseek_v32_tiny"
    save_checkpoint(tmp_path, *load_checkpoint(source), max_shard_bytes=10**6)
    saved = {}
    for path in tmp_path.glob("*.safetensors"):
        saved |= load_file(path)
    expected = load_file(source / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and saved[name].tobytes() == value.tobytes(), name


def test_saving_replaces_what_was_there(tmp_path):
    params = random_params(model.param_specs(CONFIG))
    save_checkpoint(tmp_path, CONFIG, params, max_shard_bytes=2000)
    save_checkpoint(tmp_path, CONFIG, params, dtype=jnp.bfloat16, extra={"eos_token_id": 7})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 7)
    save_checkpoint(tmp_path, CONFIG, params, max_shard_bytes=2000)
    assert not (tmp_path / "model.safetensors").exists()
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path)[1], params)


def test_choices_of_the_run_are_not_written(tmp_path):
    """How index queries are held is no field of a published config.json: a folder says what the model is."""
    quantized = dataclasses.replace(CONFIG, quantize_index_query=True)
    save_checkpoint(tmp_path, quantized, random_params(model.param_specs(CONFIG)))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == config_to_json(CONFIG) and "quantize_index_query" not in written
    assert load_config(tmp_path) == CONFIG


# The ways of rotating that transformers knows are not written.
OTHER_PAIRS = dataclasses.replace(DEEPSEEK_V32, rope_interleave=False, indexer_rope_interleave=True)


@pytest.mark.parametrize("config", [OTHER_PAIRS, DEEPSEEK_V4_FLASH], ids=lambda config: type(config).__name__)
def test_every_published_field_is_written(config):
    written = config_to_json(config)
    assert set(published_family(config).keys) <= written.keys() and "quantize_index_query" not in written
    assert from_hf(written) == config


def test_what_a_family_s_config_json_can_not_say_is_not_saved(tmp_path):
    """Rather than a folder that reads as another model."""
    gated = dataclasses.replace(CONFIG, attention_gate="head")
    with pytest.raises(
        ValueError, match="attention_gate is 'head'; a config.json of model_type 'deepseek_v32' can not"
    ):
        config_to_json(gated)
    with pytest.raises(ValueError, match="self_attn.output_gate have no place.*family 'deepseek_v32'"):
        save_checkpoint(tmp_path, gated, random_params(model.param_specs(gated)))


def test_loaded_arrays_do_not_share_the_file(folder):
    _, params = load_checkpoint(folder)
    before = np.array(params["embed_tokens"])
    path = folder / "model.safetensors"
    with open(path, "r+b") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
        f.seek(header)
        f.write(b"\xff" * (path.stat().st_size - header))
    np.testing.assert_array_equal(params["embed_tokens"], before)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# --- errors ----------------------------------------------------------------------------------------------------------
def test_missing_tensor(tmp_path, tensors):
    del tensors[GATE]
    with pytest.raises(ValueError, match=f"lacks tensor {GATE}"):
        load_folder(tmp_path / "model", tensors)


def test_surplus_tensor(tmp_path, tensors):
    tensors["model.layers.1.mlp.experts.9.up_proj.weight"] = np.zeros((20, 20), np.float32)
    with pytest.raises(ValueError, match=r"holds tensor model.layers.1.mlp.experts.9.up_proj.weight"):
        load_folder(tmp_path / "model", tensors)


@pytest.mark.parametrize("shape", [(20, 9), (9, 21), (180,)])
def test_wrong_shape(tmp_path, tensors, shape):
    tensors[GATE] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=rf"tensor {GATE} has shape \[.*config.json makes it \[9, 20\]"):
        load_folder(tmp_path / "model", tensors)


def test_wrong_type(tmp_path, tensors):
    tensors[GATE] = np.zeros((9, 20), np.int32)
    with pytest.raises(ValueError, match=rf"tensor {GATE} .* has type I32"):
        load_folder(tmp_path / "model", tensors)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "junk", [b"\xff" * 64, b"{}", b"\x08\0\0\0\0\0\0\0[1, 2,3]", b"<html>404 Not Found</html>" * 9]
)
def test_corrupt_file(folder, junk):
    (folder / "model.safetensors").write_bytes(junk)
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_checkpoint(folder)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_checkpoint(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_checkpoint(folder)


def test_bad_index(tmp_path):
    save_checkpoint(tmp_path, CONFIG, random_params(model.param_specs(CONFIG)), max_shard_bytes=8000)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first = good["weight_map"][GATE]

    def attempt(text, message):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)

    for text in ("{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../a.safetensors"}}'):
        attempt(text, "is not an index of safetensors files")
    weight_map = {**good["weight_map"], GATE: "model-99999-of-99999.safetensors"}
    attempt(json.dumps({"weight_map": weight_map}), r"names model-99999-of-99999.safetensors, which is missing")
    other = next(file for file in good["weight_map"].values() if file != first)
    attempt(json.dumps({"weight_map": {**good["weight_map"], GATE: other}}), f"says that {other} holds {GATE}")
    index.write_text(json.dumps(good))
    load_checkpoint(tmp_path)


def test_bad_arguments(tmp_path, folder):
    with pytest.raises(ValueError, match="dtype is float16"):
        load_checkpoint(folder, dtype=jnp.float16)
    params = random_params(model.param_specs(CONFIG))
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        save_checkpoint(tmp_path / "out", CONFIG, params, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"params\['embed_tokens'\] has shape \(11, 20\)"):
        save_checkpoint(tmp_path / "out", dataclasses.replace(CONFIG, vocab_size=12), params)
    with pytest.raises(ValueError, match="structure"):
        save_checkpoint(tmp_path / "out", dataclasses.replace(CONFIG, num_hidden_layers=2), params)
    assert not (tmp_path / "out").exists()


def test_progress_is_quiet_off_a_terminal(folder, capfd):
    load_checkpoint(folder, progress=True)
    assert capfd.readouterr() == ("", "")


def test_what_was_skipped_is_said_in_one_line(tmp_path, tensors, capfd):
    extra = {f"model.layers.{number}.eh_proj.weight": np.zeros(2, np.float32) for number in (3, 4)}
    write_folder(tmp_path / "m", CONFIG, {**tensors, **extra})
    assert skipped_tensors(tmp_path / "m") == {"multi-token prediction": 2}
    load_checkpoint(tmp_path / "m", progress=False)
    assert capfd.readouterr() == ("", "")
    load_checkpoint(tmp_path / "m")
    assert capfd.readouterr() == ("", "skipped: 2 tensors of multi-token prediction\n")
