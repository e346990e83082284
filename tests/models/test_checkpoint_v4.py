"""models/checkpoint.py with families.deepseek_v4: DeepSeek-V4's names, layout, quantised forms, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_models import random_params

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO, DeepseekV4Config, RopeConfig, load_config
from sparse_mla_jax.models import params_v4
from sparse_mla_jax.models.checkpoint import (
    config_to_json,
    dequantize_fp4,
    load_checkpoint,
    published_shapes,
    save_checkpoint,
)

# No width is a multiple of another's block, so that quantised blocks are cut at edges.
CONFIG = DeepseekV4Config(
    vocab_size=11,
    hidden_size=20,
    moe_intermediate_size=38,
    num_hidden_layers=4,
    num_attention_heads=6,
    head_dim=10,
    qk_rope_head_dim=6,
    q_lora_rank=21,
    o_groups=3,
    o_lora_rank=5,
    n_routed_experts=5,
    num_experts_per_tok=2,
    num_hash_layers=1,
    sliding_window=4,
    index_n_heads=3,
    index_head_dim=8,
    index_topk=2,
    hc_mult=3,
    compress_ratios=(0, 4, 7, 4),
)
VARIANTS = {
    "usual": CONFIG,
    "tied, two shared, no hash layer": dataclasses.replace(
        CONFIG, tie_word_embeddings=True, n_shared_experts=2, num_hash_layers=0
    ),
    "no shared expert, plain rope, all hash layers": dataclasses.replace(
        CONFIG, n_shared_experts=0, num_hash_layers=9, rope=RopeConfig(theta=7.0), compress_rope=RopeConfig(theta=9.0)
    ),
    "sliding windows only": dataclasses.replace(CONFIG, compress_ratios=(0, 1, 0, 0)),
}
EXPERT = "layers.2.ffn.experts.3.w2"
WQ_B = "layers.1.attn.wq_b"
TABLE = "layers.0.ffn.gate.tid2eid"
# Every other quantised matrix of DeepSeek's files; those of routed experts apart.
FP8 = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_a", "attn.wo_b", "indexer.wq_b", "shared_experts.w1",
       "shared_experts.w2", "shared_experts.w3")  # fmt: skip
TYPES = {
    "float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0", "int64": "I64",
    "int32": "I32", "uint32": "U32", "int8": "I8", "uint8": "U8",
}  # fmt: skip


def write_folder(folder, tensors, config=CONFIG, types=None, **extra):
    """Writes a folder byte by byte: `types` renames the type of a tensor ("F4" doubles its last axis)."""
    header, data = {}, b""
    for name, value in tensors.items():
        kind, shape = (types or {}).get(name, TYPES[value.dtype.name]), list(value.shape)
        if kind == "F4":
            shape[-1] *= 2
        end = len(data) + value.nbytes
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), end]}
        data += np.ascontiguousarray(value).tobytes()
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps({**config_to_json(config), **extra}))
    return folder


def load(folder, tensors, **options):
    return load_checkpoint(write_folder(folder, tensors, **options))[1]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in published_shapes(CONFIG).items()}
    values[TABLE] = rng.integers(0, 5, (11, 2))
    return values


# --- names and layout ------------------------------------------------------------------------------------------------
def test_published_names_are_the_fixture_s(fixtures):
    path = fixtures / "deepseek_v4_tiny"
    expected = {name: value.shape for name, value in load_file(path / "model.safetensors").items()}
    assert published_shapes(load_config(path)) == expected


def test_published_shapes_are_those_of_flash():
    """Shapes of the published files; 34223 of their 69187 tensors are neither scales nor of mtp.0."""
    shapes = published_shapes(DEEPSEEK_V4_FLASH)
    quantised = 43 * (5 + 3 + 3 * 256) + 21
    assert len(shapes) == 34223 == 69187 - quantised - 1575
    expected = {
        "embed.weight": (129280, 4096),
        "head.weight": (129280, 4096),
        "hc_head_fn": (4, 16384),
        "layers.2.ffn.gate.tid2eid": (129280, 6),
        "layers.3.ffn.gate.bias": (256,),
        "layers.0.attn.wq_b.weight": (32768, 1024),
        "layers.0.attn.wkv.weight": (512, 4096),
        "layers.0.attn.wo_a.weight": (8192, 4096),
        "layers.0.attn.wo_b.weight": (4096, 8192),
        "layers.0.hc_attn_fn": (24, 16384),
        "layers.42.ffn.experts.255.w1.weight": (2048, 4096),
        "layers.42.ffn.experts.255.w2.weight": (4096, 2048),
        "layers.42.ffn.shared_experts.w3.weight": (2048, 4096),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.2.attn.compressor.wgate.weight": (1024, 4096),
        "layers.2.attn.indexer.compressor.ape": (4, 256),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 4096),
        "layers.2.attn.indexer.compressor.norm.weight": (128,),
        "layers.2.attn.indexer.weights_proj.weight": (64, 4096),
        "layers.2.attn.indexer.wq_b.weight": (8192, 1024),
        "layers.3.attn.compressor.ape": (128, 512),
        "layers.3.attn.compressor.wkv.weight": (512, 4096),
        "layers.3.attn.compressor.norm.weight": (512,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert "layers.1.attn.compressor.ape" not in shapes and "layers.3.attn.indexer.wq_b.weight" not in shapes
    assert published_shapes(DEEPSEEK_V4_PRO)["layers.60.attn.wo_a.weight"] == (16384, 4096)


def test_layout(tmp_path, tensors):
    """Each of our arrays from the published one, by its meaning."""
    config, params = load_checkpoint(write_folder(tmp_path / "model", tensors))
    assert config == CONFIG
    specs = params_v4.param_specs(CONFIG)
    jax.tree.map(lambda spec, a: (a.shape, a.dtype) == (spec.shape, spec.dtype) or 1 / 0, specs, params)
    p, layer = "layers.1.attn.", params["layers"][1]
    attention = layer["self_attn"]
    for head in range(6):
        np.testing.assert_array_equal(
            attention["q_b_proj"][:, head], tensors[p + "wq_b.weight"][head * 10 : head * 10 + 10].T
        )
    for group in range(3):
        rows = tensors[p + "wo_a.weight"][group * 5 : group * 5 + 5]
        np.testing.assert_array_equal(attention["o_a_proj"][group], rows.T)
    for head in range(3):
        rows = tensors[p + "indexer.wq_b.weight"][head * 8 : head * 8 + 8]
        np.testing.assert_array_equal(attention["indexer"]["wq_b"][:, head], rows.T)
    pairs = [
        (attention["q_a_proj"], p + "wq_a.weight"),
        (attention["kv_proj"], p + "wkv.weight"),
        (attention["o_b_proj"], p + "wo_b.weight"),
        (attention["compressor"]["kv_proj"], p + "compressor.wkv.weight"),
        (attention["compressor"]["gate_proj"], p + "compressor.wgate.weight"),
        (attention["indexer"]["weights_proj"], p + "indexer.weights_proj.weight"),
        (attention["indexer"]["compressor"]["gate_proj"], p + "indexer.compressor.wgate.weight"),
        (layer["attn_hc"]["fn"], "layers.1.hc_attn_fn"),
        (layer["ffn_hc"]["fn"], "layers.1.hc_ffn_fn"),
        (params["hc_head"]["fn"], "hc_head_fn"),
        (params["lm_head"], "head.weight"),
        (layer["mlp"]["gate"]["weight"], "layers.1.ffn.gate.weight"),
        (layer["mlp"]["experts"]["gate_proj"][4], "layers.1.ffn.experts.4.w1.weight"),
        (layer["mlp"]["experts"]["up_proj"][3], "layers.1.ffn.experts.3.w3.weight"),
        (layer["mlp"]["experts"]["down_proj"][0], "layers.1.ffn.experts.0.w2.weight"),
        (layer["mlp"]["shared_experts"]["down_proj"], "layers.1.ffn.shared_experts.w2.weight"),
    ]
    for ours, name in pairs:
        np.testing.assert_array_equal(ours, tensors[name].T, err_msg=name)
    pairs = [
        (params["embed_tokens"], "embed.weight"),
        (params["norm"], "norm.weight"),
        (params["hc_head"]["base"], "hc_head_base"),
        (layer["attn_hc"]["scale"], "layers.1.hc_attn_scale"),
        (layer["ffn_hc"]["base"], "layers.1.hc_ffn_base"),
        (layer["input_layernorm"], "layers.1.attn_norm.weight"),
        (layer["post_attention_layernorm"], "layers.1.ffn_norm.weight"),
        (attention["q_a_layernorm"], p + "q_norm.weight"),
        (attention["kv_layernorm"], p + "kv_norm.weight"),
        (attention["sinks"], p + "attn_sink"),
        (attention["compressor"]["position_bias"], p + "compressor.ape"),
        (attention["compressor"]["norm"], p + "compressor.norm.weight"),
        (attention["indexer"]["compressor"]["position_bias"], p + "indexer.compressor.ape"),
        (layer["mlp"]["gate"]["e_score_correction_bias"], "layers.1.ffn.gate.bias"),
        (params["layers"][0]["mlp"]["gate"]["token_experts"], TABLE),
    ]
    for ours, name in pairs:
        np.testing.assert_array_equal(ours, tensors[name], err_msg=name)
    assert "compressor" not in params["layers"][0]["self_attn"] and "indexer" not in params["layers"][2]["self_attn"]


def test_bfloat16_keeps_what_is_small_wide(tmp_path, tensors):
    """As published: matrices BF16; and norms that are BF16 in the file are float32 here."""
    stored = {
        name: value.astype(ml_dtypes.bfloat16) if name.endswith(".weight") else value for name, value in tensors.items()
    }
    _, params = load_checkpoint(write_folder(tmp_path / "model", stored), dtype=jnp.bfloat16)
    layer = params["layers"][1]
    wide = jax.tree.leaves([layer["attn_hc"], layer["ffn_hc"], params["hc_head"], params["norm"]])
    wide += [layer["self_attn"][name] for name in ("q_a_layernorm", "kv_layernorm", "sinks")]
    wide += [layer["self_attn"]["compressor"][name] for name in ("norm", "position_bias")]
    wide += [layer["input_layernorm"], layer["mlp"]["gate"]["e_score_correction_bias"]]
    assert {value.dtype for value in wide} == {jnp.dtype("float32")}
    narrow = [layer["self_attn"]["compressor"]["kv_proj"], layer["mlp"]["gate"]["weight"], params["embed_tokens"]]
    narrow += jax.tree.leaves(layer["mlp"]["experts"])
    assert {value.dtype for value in narrow} == {jnp.dtype("bfloat16")}
    assert params["layers"][0]["mlp"]["gate"]["token_experts"].dtype == jnp.int32
    np.testing.assert_array_equal(layer["attn_hc"]["fn"], tensors["layers.1.hc_attn_fn"].T)


def test_multi_token_prediction_is_skipped(tmp_path, tensors):
    extra = {
        "mtp.0.e_proj.weight": np.zeros((2, 2), ml_dtypes.float8_e4m3fn),
        "mtp.0.ffn.experts.0.w1.weight": np.zeros((2, 2), np.int8),
        "layers.4.attn.wq_a.weight": np.zeros((2, 2), np.float32),
    }
    same(load(tmp_path / "more", {**tensors, **extra}), load(tmp_path / "plain", tensors))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_table_types(tmp_path, tensors, dtype):
    table = load(tmp_path / "model", {**tensors, TABLE: tensors[TABLE].astype(dtype)})["layers"][0]["mlp"]["gate"]
    assert table["token_experts"].dtype == jnp.int32
    np.testing.assert_array_equal(table["token_experts"], tensors[TABLE])


# --- quantised forms -------------------------------------------------------------------------------------------------
def powers(codes):
    """E8M0 by its definition."""
    return 2.0 ** (codes.astype(np.float64) - 127)


def quantise_fp8(rng, shape, block, form):
    """FP8 values, stored scales in a form of the wild, and what they stand for, element by element."""
    values = rng.normal(size=shape).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    codes = rng.integers(117, 127, [-(-n // b) for n, b in zip(shape, block)]).astype(np.uint8)
    scales, stored = powers(codes).astype(np.float32), codes
    if form == "F32":
        stored = scales = rng.uniform(0.01, 0.1, codes.shape).astype(np.float32)
    elif form == "F8_E8M0":
        stored = codes.view(ml_dtypes.float8_e8m0fnu)
    expected = np.array(
        [[float(values[i, j]) * scales[i // block[0], j // block[1]] for j in range(shape[1])] for i in range(shape[0])]
    )
    return values, stored, expected.astype(np.float32)


def quantise_fp4(rng, shape):
    """Packed FP4, E8M0 scales, and what they stand for."""
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    exponents = rng.integers(117, 127, (shape[0], -(-shape[1] // 32))).astype(np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    for column in range(shape[1]):
        expected[:, column] *= powers(exponents[:, column // 32])
    return codes[:, 0::2] | codes[:, 1::2] << 4, exponents, expected.astype(np.float32)


# Flash-Base's scales, Flash's, and those of converted files: (type, what ".weight" becomes)
SPELLINGS = [("F32", ".scale"), ("F8_E8M0", ".scale"), ("U8", ".weight_scale"), ("F32", ".weight_scale_inv")]


@pytest.mark.parametrize("block", [(128, 128), (4, 6)])
@pytest.mark.parametrize(("form", "suffix"), SPELLINGS)
def test_fp8_folder(tmp_path, tensors, form, suffix, block):
    """As in Flash-Base: all projections and experts FP8."""
    rng, stored, expected = np.random.default_rng(0), dict(tensors), dict(tensors)
    names = [name for name in tensors if name[: -len(".weight")].endswith(FP8) or ".experts." in name]
    for name in names:
        stored[name], scale, expected[name] = quantise_fp8(rng, tensors[name].shape, block, form)
        stored[name.replace(".weight", suffix)] = scale
    assert len(names) == 4 * (5 + 3 + 15) + 2
    extra = {} if block == (128, 128) else {"quantization_config": {"weight_block_size": list(block)}}
    same(load(tmp_path / "fp8", stored, **extra), load(tmp_path / "plain", expected))


@pytest.mark.parametrize("kind", ["I8", "U8", "F4"])
@pytest.mark.parametrize("suffix", [".scale", ".weight_scale"])
def test_fp4_folder(tmp_path, tensors, kind, suffix):
    """As in Flash: routed experts FP4, shared ones FP8; rows of 20 and 38 values end in a cut group."""
    rng, stored, expected, types = np.random.default_rng(0), dict(tensors), dict(tensors), {}
    for name in tensors:
        if ".ffn.experts." in name:
            packed, scale, expected[name] = quantise_fp4(rng, tensors[name].shape)
            stored[name], types[name] = packed, kind
            stored[name.replace(".weight", suffix)] = scale.view(ml_dtypes.float8_e8m0fnu)
        elif "shared_experts" in name:
            stored[name], scale, expected[name] = quantise_fp8(rng, tensors[name].shape, (128, 128), "F8_E8M0")
            stored[name.replace(".weight", ".scale")] = scale
    assert len(types) == 4 * 15 and stored[EXPERT + ".weight"].shape == (20, 19)
    assert stored[EXPERT + suffix].shape == (20, 2)
    fp4 = load(tmp_path / "fp4", stored, types=types)
    same(fp4, load(tmp_path / "plain", expected))
    _, narrow = load_checkpoint(tmp_path / "fp4", dtype=jnp.bfloat16)
    experts = narrow["layers"][2]["mlp"]["experts"]
    for name, wide in fp4["layers"][2]["mlp"]["experts"].items():  # FP4 times a power of two is a bfloat16
        np.testing.assert_array_equal(np.asarray(experts[name], np.float32), wide)


def test_dequantize_fp4_decodes_every_code():
    packed = np.array([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], np.uint8)
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for view in (packed, packed.view(np.int8)):
        out = dequantize_fp4(view, np.array([[4.0]], np.float32))
        np.testing.assert_array_equal(out, 4 * np.array([values + [-v for v in values]]))
    ends = np.array([[0, 254]], np.uint8).view(ml_dtypes.float8_e8m0fnu)
    out = dequantize_fp4(np.full((1, 17), 0x22, np.uint8), ends)
    assert out.shape == (1, 34) and (out[0, :32] == np.float32(2.0**-127)).all() and (out[0, 32:] == 2.0**127).all()
    with pytest.raises(ValueError, match=r"scales has shape \(1, 1\)"):
        dequantize_fp4(np.zeros((1, 17), np.uint8), ends[:, :1])
    for bad in (np.zeros((1, 17), np.float32), np.zeros(17, np.uint8)):
        with pytest.raises(ValueError, match="packed is"):
            dequantize_fp4(bad, ends)


def fp4_expert(tensors):
    packed, scale, _ = quantise_fp4(np.random.default_rng(0), tensors[EXPERT + ".weight"].shape)
    return {**tensors, EXPERT + ".weight": packed, EXPERT + ".scale": scale.view(ml_dtypes.float8_e8m0fnu)}


def fp8_matrix(tensors):
    values, scale, _ = quantise_fp8(np.random.default_rng(0), tensors[WQ_B + ".weight"].shape, (128, 128), "F8_E8M0")
    return {**tensors, WQ_B + ".weight": values, WQ_B + ".scale": scale}


BAD = {
    "no scale": (fp4_expert, {EXPERT + ".scale": None}, f"FP4 tensor {EXPERT}.weight has no {EXPERT}.scale or "),
    "no fp8 scale": (fp8_matrix, {WQ_B + ".scale": None}, f"FP8 tensor {WQ_B}.weight has no {WQ_B}.scale or "),
    "two scales": (
        fp8_matrix,
        {WQ_B + ".weight_scale_inv": np.ones((1, 1), np.float32)},
        f"holds tensor {WQ_B}.weight_",
    ),
    "a scale to plain values": (dict, {WQ_B + ".scale": np.ones((1, 1), np.float32)}, f"holds tensor {WQ_B}.scale"),
    "scales of blocks": (
        fp4_expert,
        {EXPERT + ".scale": np.ones((1, 1), np.float32)},
        rf"tensor {EXPERT}.scale has shape \[1, 1\]; config.json makes it \[20, 2\]",
    ),
    "scales of no float": (
        fp4_expert,
        {EXPERT + ".scale": np.ones((20, 2), np.int32)},
        rf"tensor {EXPERT}.scale .* has type I32",
    ),
    "half of a row": (
        fp4_expert,
        {EXPERT + ".weight": np.zeros((20, 38), np.int8)},
        rf"tensor {EXPERT}.weight has shape \[20, 38\]; config.json makes it \[20, 19\]",
    ),
    "fp4 elsewhere": (
        dict,
        {"layers.2.ffn.shared_experts.w2.weight": np.zeros((20, 19), np.int8)},
        "shared_experts.w2.weight in .* has type I8",
    ),
    "a table of floats": (dict, {TABLE: np.zeros((11, 2), np.float32)}, f"{TABLE} in .* has type F32"),
    "no such expert": (dict, {TABLE: np.full((11, 2), 5)}, f"{TABLE} names experts 5 to 5; there are 5"),
    "no expert": (dict, {TABLE: np.full((11, 2), -1)}, f"{TABLE} names experts -1 to -1"),
    "missing": (
        dict,
        {"layers.3.attn.indexer.compressor.ape": None},
        "lacks tensor layers.3.attn.indexer.compressor.ape",
    ),
    "surplus": (
        dict,
        {"layers.0.attn.compressor.ape": np.zeros(1, np.float32)},
        "holds tensor layers.0.attn.compressor",
    ),
    "another shape": (
        dict,
        {"layers.0.attn.wo_a.weight": np.zeros((20, 15), np.float32)},
        r"wo_a.weight has shape \[20, 15\]; config.json makes it \[15, 20\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_name_the_tensor(tmp_path, tensors, case):
    make, change, message = BAD[case]
    stored = {name: value for name, value in {**make(tensors), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model", stored)


def test_fp4_rows_of_odd_width(tmp_path):
    config = dataclasses.replace(CONFIG, moe_intermediate_size=33)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in published_shapes(config).items()}
    tensors[TABLE] = np.zeros((11, 2), np.int64)
    tensors[EXPERT + ".weight"], tensors[EXPERT + ".scale"] = np.zeros((20, 16), np.int8), np.ones((20, 2), np.float32)
    with pytest.raises(ValueError, match=f"tensor {EXPERT}.weight is FP4, two values to a byte, with 33 to a row"):
        load(tmp_path / "model", tensors, config=config)


# --- round trip ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(tmp_path, name, dtype):
    config = VARIANTS[name]
    params = random_params(params_v4.param_specs(config, dtype), config.n_routed_experts)
    for target, shard_bytes in (("one", 10**9), ("many", 5000)):
        save_checkpoint(tmp_path / target, config, params, max_shard_bytes=shard_bytes)
        loaded, again = load_checkpoint(tmp_path / target, dtype=dtype)
        assert loaded == config
        assert jax.tree.structure(again) == jax.tree.structure(params)
        for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
            assert before.dtype == after.dtype and before.tobytes() == after.tobytes()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 4


def test_fixture_round_trip(tmp_path, fixtures):
    """Every byte of every tensor that another program wrote comes back, and every field of its config.json."""
    source = fixtures / "deepseek_v4_tiny"
    save_checkpoint(tmp_path, *load_checkpoint(source), max_shard_bytes=10**6)
    saved = {}
    for path in tmp_path.glob("*.safetensors"):
        saved |= load_file(path)
    expected = load_file(source / "model.safetensors")
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype and saved[name].tobytes() == value.tobytes(), name
    config = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((source / "config.json").read_text())
    assert {name: config[name] for name in published} == published


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_config_survives(fixtures, name):
    published = json.loads((fixtures / "configs" / f"deepseek_v4_{name}_config.json").read_text())
    ours = config_to_json(DEEPSEEK_V4_FLASH if name == "flash" else DEEPSEEK_V4_PRO, jnp.bfloat16)
    # Not ours: how their files are quantised, who wrote them, and multi-token prediction.
    for field in ("quantization_config", "expert_dtype", "transformers_version", "num_nextn_predict_layers"):
        published.pop(field, None)
    published["compress_ratios"].pop()
    assert {field: ours.get(field) for field in published} == published


def test_a_rotation_that_published_files_can_not_say(tmp_path):
    config = dataclasses.replace(CONFIG, rope=RopeConfig(factor=2.0))
    with pytest.raises(ValueError, match=r"rope has factor 2.0"):
        config_to_json(config)


# --- random weights --------------------------------------------------------------------------------------------------
def test_random_weights():
    params = params_v4.init_params(jax.random.key(0), CONFIG)
    table = np.sort(np.asarray(params["layers"][0]["mlp"]["gate"]["token_experts"]))
    assert table.dtype == np.int32 and table.min() >= 0 and table.max() < 5 and (np.diff(table) > 0).all()
    assert len(np.unique(table, axis=0)) > 1
    layer = params["layers"][1]
    for norm in (params["norm"], layer["self_attn"]["compressor"]["norm"], layer["attn_hc"]["scale"]):
        assert (norm == 1).all()
    for bias in (
        layer["attn_hc"]["base"],
        layer["self_attn"]["sinks"],
        layer["self_attn"]["compressor"]["position_bias"],
    ):
        assert (bias == 0).all()
    wide = params_v4.init_params(jax.random.key(0), dataclasses.replace(CONFIG, hidden_size=400, q_lora_rank=300))
    own = wide["layers"][1]
    assert np.std(own["self_attn"]["kv_proj"]) == pytest.approx(400**-0.5, rel=0.1)
    assert np.std(own["self_attn"]["q_b_proj"]) == pytest.approx(300**-0.5, rel=0.1)
    assert np.std(own["mlp"]["experts"]["gate_proj"]) == pytest.approx(400**-0.5, rel=0.1)
    assert np.std(own["attn_hc"]["fn"]) == pytest.approx(0.1 * 1200**-0.5, rel=0.1)
