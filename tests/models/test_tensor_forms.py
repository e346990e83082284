"""What a folder may hold in place of plain published tensors: scales of all kinds, other names; and what is refused."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from deepseek_v32_oracle import random_tensors
from safetensors.numpy import load_file, save_file
from small_models import random_params, write_folder

from sparse_mla_jax.config import DeepseekV4Config, DeepseekV32Config
from sparse_mla_jax.models.checkpoint import load_checkpoint, published_shapes, save_checkpoint
from sparse_mla_jax.models.params_v4 import param_specs
from sparse_mla_jax.models.quantized_weights import read_block_size, scale_block

CONFIG = DeepseekV32Config(
    vocab_size=11,
    hidden_size=20,
    intermediate_size=6,
    moe_intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=9,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=6,
    v_head_dim=4,
    n_routed_experts=3,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
)
MATRIX = "model.layers.0.self_attn.q_a_proj"
EXPERTS = "model.layers.1.mlp.experts."
FN, FNUZ = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz


@pytest.fixture
def tensors():
    return random_tensors(published_shapes(CONFIG), 0)


def load(folder, tensors, **extra):
    write_folder(folder, CONFIG, tensors, **extra)
    return load_checkpoint(folder)[1]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- scales ----------------------------------------------------------------------------------------------------------
# The shape of the scales of a matrix [rows, columns] with blocks of 4x6, and the one that belongs to an element.
SCALES = {
    "matrix []": (lambda rows, columns: (), lambda i, j: ()),
    "matrix [1]": (lambda rows, columns: (1,), lambda i, j: (0,)),
    "matrix [1, 1]": (lambda rows, columns: (1, 1), lambda i, j: (0, 0)),
    "rows [out, 1]": (lambda rows, columns: (rows, 1), lambda i, j: (i, 0)),
    "rows [out]": (lambda rows, columns: (rows,), lambda i, j: (i,)),
    "blocks": (lambda rows, columns: (-(-rows // 4), -(-columns // 6)), lambda i, j: (i // 4, j // 6)),
}


@pytest.mark.parametrize("kind", [FN, FNUZ], ids=["fn", "fnuz"])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_fp8_matrices(tmp_path, tensors, kind, scales, suffix):
    """Every matrix of the layers in FP8: its values times its scales, element by element."""
    shape, element = SCALES[scales]
    rng, stored, expected = np.random.default_rng(0), dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight") and "weights_proj" not in name]:
        rows, columns = tensors[name].shape
        stored[name] = (tensors[name] * 20).astype(kind)
        scale = stored[name + suffix] = rng.uniform(0.01, 0.1, shape(rows, columns)).astype(np.float32)
        expected[name] = np.array(
            [[np.float32(stored[name][i, j]) * scale[element(i, j)] for j in range(columns)] for i in range(rows)]
        )
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 6]}
    same(load(tmp_path / "fp8", stored, quantization_config=quantization), load(tmp_path / "plain", expected))


def test_fnuz_is_not_fn(tmp_path, tensors):
    """The same byte is half as much, and 0x80 is NaN."""
    stored = np.full((9, 20), 0x40, np.uint8)
    stored[0, 0] = 0x80
    values = {kind: load(tmp_path / "m", {**tensors, MATRIX + ".weight": stored.view(kind),
                         MATRIX + ".weight_scale": np.full((), 3, np.float32)})["layers"][0]["self_attn"]["q_a_proj"]
              for kind in (FN, FNUZ)}  # fmt: skip
    assert values[FN][1, 1] == 6 and values[FNUZ][1, 1] == 3
    assert values[FN][0, 0] == 0 and np.isnan(values[FNUZ][0, 0])


def test_scale_block_fits_a_shape_only_if_it_means_one_thing():
    assert scale_block((300, 256), (3, 2), (128, 128)) == (128, 128)
    assert scale_block((300, 256), (300, 1), (128, 128)) == (1, 256)
    assert scale_block((300, 256), (1, 1), (128, 128)) == (300, 256)
    for shape in ((256,), (1, 256), (2, 3), (3, 1), (1, 1, 1), (300, 2), (0,)):
        assert scale_block((300, 256), shape, (128, 128)) is None, shape


@pytest.mark.parametrize(
    ("quantization", "size"),
    [
        (None, (128, 128)),
        ({}, (128, 128)),
        ({"quant_method": "fp8", "weight_block_size": [32, 64]}, (32, 64)),
        ({"config_groups": {"group_0": {"weights": {"block_structure": [64, 32]}}}}, (64, 32)),
        ({"config_groups": {"group_0": {"weights": {"block_structure": "64x32"}}}}, (64, 32)),
        ({"config_groups": {"group_0": {"weights": {"strategy": "channel", "block_structure": None}}}}, (128, 128)),
    ],
)
def test_block_size(quantization, size):
    assert read_block_size(quantization) == size


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ([], r"quantization_config is \[\]; a JSON object"),
        ({"weight_block_size": [0, 1]}, r"weight_block_size is \[0, 1\]; two positive integers"),
        ({"weight_block_size": [True, 1]}, "weight_block_size is"),
        ({"weight_block_size": [1.0, 1]}, "weight_block_size is"),
        ({"weight_block_size": "128"}, "weight_block_size is"),
        ({"config_groups": {"a": {"weights": {"block_structure": "64"}}}}, "block_structure of a is '64'"),
        (
            {"weight_block_size": [1, 2], "config_groups": {"a": {"weights": {"block_structure": [2, 1]}}}},
            r"weight_block_size and block_structure of a differ: \[\[1, 2\], \[2, 1\]\]",
        ),
    ],
)
def test_bad_block_sizes(quantization, message):
    with pytest.raises(ValueError, match=message):
        read_block_size(quantization)


def test_scales_of_activations_and_caches_change_nothing(tmp_path, tensors):
    """Static scales of other engines (ModelOpt, Quark, compressed-tensors): not of the weights."""
    one = np.full((), 7, np.float32)
    extra = {
        MATRIX + ".input_scale": one,
        EXPERTS + "0.up_proj.input_scale": one,
        "model.layers.0.self_attn.k_scale": one,
        "model.layers.0.self_attn.attn.v_scale": one,
        "model.layers.1.self_attn.kv_b_proj.output_scale": one,
        "model.layers.1.self_attn.q_scale": one,
    }
    same(load(tmp_path / "more", {**tensors, **extra}), load(tmp_path / "plain", tensors))


# --- other names -----------------------------------------------------------------------------------------------------
def fuse(tensors, dtype=np.float32):
    """Experts as transformers' module has them: [E, 2 I, D], gate rows first, and [E, D, I]."""
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    halves = [[tensors[f"{EXPERTS}{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(3)]
    fused[EXPERTS + "gate_up_proj"] = np.stack([np.concatenate(half) for half in halves]).astype(dtype)
    fused[EXPERTS + "down_proj"] = np.stack([tensors[f"{EXPERTS}{e}.down_proj.weight"] for e in range(3)]).astype(dtype)
    return fused


def test_fused_experts(tmp_path, tensors):
    assert len(fuse(tensors)) == len(tensors) - 3 * 3 + 2
    same(load(tmp_path / "fused", fuse(tensors)), load(tmp_path / "plain", tensors))


FUSED_SCALES = {
    "blocks": lambda rows, columns: (3, -(-rows // 4), -(-columns // 6)),
    "rows": lambda rows, columns: (3, rows, 1),
    "experts": lambda rows, columns: (3,),
    "experts [E, 1, 1]": lambda rows, columns: (3, 1, 1),
    "all": lambda rows, columns: (),
}


@pytest.mark.parametrize("scales", FUSED_SCALES)
@pytest.mark.parametrize("suffix", ["_scale", "_scale_inv"])
def test_fused_fp8_experts(tmp_path, tensors, scales, suffix):
    """The gate's 7 rows end within a block of 4."""
    rng, stored = np.random.default_rng(0), fuse(tensors)
    expected = dict(stored)
    for name in (EXPERTS + "gate_up_proj", EXPERTS + "down_proj"):
        shape = stored[name].shape
        values = stored[name] = (stored[name] * 20).astype(FN)
        scale = stored[name + suffix] = rng.uniform(0.01, 0.1, FUSED_SCALES[scales](*shape[1:])).astype(np.float32)
        if scales == "blocks":
            scale = scale.repeat(4, 1)[:, : shape[1]].repeat(6, 2)[..., : shape[2]]
        scale = scale if scale.ndim != 1 else scale[:, None, None]
        expected[name] = values.astype(np.float32) * scale
    quantization = {"quant_method": "fp8", "weight_block_size": [4, 6]}
    same(load(tmp_path / "fp8", stored, quantization_config=quantization), load(tmp_path / "plain", expected))


V4 = DeepseekV4Config(
    vocab_size=11,
    hidden_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=12,
    qk_rope_head_dim=4,
    q_lora_rank=8,
    o_groups=1,
    o_lora_rank=8,
    n_routed_experts=2,
    num_experts_per_tok=1,
    num_hash_layers=1,
    index_n_heads=1,
    index_head_dim=8,
    hc_mult=2,
    compress_ratios=(0, 4, 128),
)


def test_v4_as_transformers_saves_it(tmp_path):
    """Its names, as save_pretrained of transformers 5.24 writes them; the head keeps its own."""
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "head"}
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}
    names |= {f"hc_head_{part}": f"model.hc_head.hc_{part}" for part in ("fn", "base", "scale")}
    names |= {f"layers.{i}.attn.kv_norm.weight": f"model.layers.{i}.attn.norm.weight" for i in range(3)}
    save_checkpoint(tmp_path / "ours", V4, random_params(param_specs(V4), V4.n_routed_experts))
    os.mkdir(tmp_path / "theirs")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert names.keys() < stored.keys()
    stored = {names.get(name, "model." + name): value for name, value in stored.items()}
    save_file(stored, tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    same(load_checkpoint(tmp_path / "theirs"), load_checkpoint(tmp_path / "ours"))
    stored["layers.0.attn.wq_a.weight"] = stored["model.layers.0.attn.wq_a.weight"]
    save_file(stored, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"holds tensors .*wq_a.weight and .*wq_a.weight, which are both layers.0.attn"
    ):
        load_checkpoint(tmp_path / "theirs")


# --- refused, with the remedy that helps -----------------------------------------------------------------------------
def replaced(tensors, without, **new):
    """The tensors, those whose names contain `without` replaced by `new` ones, named by what follows the matrix."""
    kept = {name: value for name, value in tensors.items() if without is None or without not in name}
    return {**kept, **{f"{MATRIX}.{name.replace('__', '.')}": value for name, value in new.items()}}


W = MATRIX + ".weight"
DEQUANTISE = "Use the model's BF16 or FP8 files, or dequantise"
BYTES, ONE, EIGHT = np.zeros((9, 10), np.uint8), np.ones((), np.float32), np.zeros((9, 20), FN)
REFUSED = {
    "AWQ": (lambda t: replaced(t, W, qweight=BYTES, qzeros=BYTES, scales=BYTES), f"AWQ. {DEQUANTISE}"),
    "GPTQ": (lambda t: replaced(t, W, qweight=BYTES, g_idx=BYTES), f"GPTQ or AWQ. {DEQUANTISE}"),
    "bitsandbytes": (lambda t: replaced(t, None, weight__absmax=ONE), f"absmax, .* bitsandbytes. {DEQUANTISE}"),
    "packed": (lambda t: replaced(t, W, weight_packed=BYTES, weight_shape=BYTES), f"compressed-tensors. {DEQUANTISE}"),
    "NVFP4": (lambda t: replaced(t, W, weight=BYTES, weight_scale_2=ONE), f"NVFP4 weights of ModelOpt. {DEQUANTISE}"),
    "MXFP4": (lambda t: replaced(t, W, weight=BYTES, weight_scale=BYTES), "has type U8.*use the model's BF16 or FP8"),
    "INT8": (lambda t: replaced(t, W, weight=EIGHT.view(np.int8), weight_scale=ONE), "has type I8.*BF16 or FP8 files"),
    "E5M2": (lambda t: {**t, W: EIGHT.astype(ml_dtypes.float8_e5m2)}, "type F8_E5M2; .*F8_E4M3FNUZ. It is quantised"),
    "no scales": (lambda t: {**t, W: EIGHT}, "has no .*weight_scale_inv or .*weight_scale in"),
    "two scales": (
        lambda t: replaced(t, W, weight=EIGHT, weight_scale=ONE, weight_scale_inv=ONE),
        r"weight_scale, which has no use beside .*weight \(F8_E4M3, with scales .*weight_scale_inv\)",
    ),
    "scales of plain": (lambda t: replaced(t, None, weight_scale=ONE), r"no use beside .*weight \(F32, without sc"),
    "odd scales": (
        lambda t: replaced(t, W, weight=EIGHT, weight_scale=np.ones((9, 2), np.float32)),
        r"weight_scale has shape \[9, 2\]; .* \[9, 20\] are \[1, 1\] for blocks of 128x128, \[9, 1\] for rows, or \[\]",
    ),
    "fused FP8 without scales": (lambda t: fuse(t, FN), r"gate_up_proj\[0, 0:7\] has no .*gate_up_proj_scale_inv or"),
    "odd scales of fused": (
        lambda t: {**fuse(t, FN), EXPERTS + "gate_up_proj_scale_inv": np.ones((3, 5, 5), np.float32)},
        r"gate_up_proj_scale_inv\[0\] has shape \[5, 5\]; the scales of a matrix \[14, 20\] are \[1, 1\] for blocks",
    ),
    "fused, transposed": (
        lambda t: {**fuse(t), EXPERTS + "gate_up_proj": np.zeros((3, 20, 14), np.float32)},
        r"gate_up_proj\[0, 0:10\] has shape \[10, 14\]; config.json makes it \[7, 20\]",
    ),
    "fused, fewer": (lambda t: {**fuse(t), EXPERTS + "down_proj": np.zeros((2, 20, 7), "f")}, "holds .*down_p"),
    "fused and not": (lambda t: {**t, **fuse(t)}, r"holds tensors .*, which are both .*experts.0"),
    "LoRA": (lambda t: {f"base.{W}": np.ones(1)[:0], f"{MATRIX}.lora_A.weight": BYTES}, "LoRA adapter. Merge it"),
    "wrapped": (lambda t: {f"module.{n}": v for n, v in t.items()}, "save the model that the wrapper 'module' holds"),
    "no head": (lambda t: replaced(t, "lm_head"), "lacks tensor lm_head.weight; .*Set tie_word_embeddings to true"),
    "base model": (
        lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != "lm_head.weight"},
        r"It has embed_tokens.weight: save the model with its head \(AutoModelForCausalLM\)",
    ),
    "no indexer": (lambda t: replaced(t, ".indexer."), "No layer has an indexer: DeepSeek-V3"),
    "shared indexer": (lambda t: replaced(t, "0.self_attn.indexer."), "shares indexers between .*indexer_types"),
    "one missing": (lambda t: replaced(t, W), f"lacks tensor {W}; config.json promises it. Fetch all files"),
    "one renamed": (lambda t: replaced(t, W, wait=ONE), f"lacks tensor {W}, and holds {MATRIX}.wait; config.json"),
    "inference code": (
        lambda t: {"embed.weight": ONE, "layers.0.attn.wq_a.weight": ONE},
        "DeepSeek's own inference code. Use the files before its convert.py",
    ),
    "V4": (lambda t: {"layers.0.attn.attn_sink": ONE}, "a model of type 'deepseek_v4' has.*Use the config.json that"),
    "hy_v4": (lambda t: {**t, "model.layers.0.self_attn.learnable_sink_param": ONE}, "a model of type 'hy_v4' has"),
    "axk2": (lambda t: {**t, "model.layers.0.input_layernorm.W_up.weight": ONE}, "a model of type 'axk2' has"),
    "mistral": (lambda t: {"layers.0.attention.wq.weight": ONE}, "a model of type 'mistral_large4' has"),
    "dots3": (lambda t: {**t, "model.layers.0.self_attn.k_rope_only_layernorm.weight": ONE}, "type 'dots3_note' has"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_the_message_names_the_remedy_that_helps(tmp_path, tensors, case):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m", change(tensors))


V4_MODULES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "hc_attn_": "attn_hc.",
    "hc_ffn_": "ffn_hc.", "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.compressor.": "self_attn.compressor.indexer.", "attn.compressor.": "self_attn.compressor.",
    "attn.attn_sink": "self_attn.sinks", "attn.q_norm": "self_attn.q_a_norm", "attn.wq_a": "self_attn.q_a_proj",
    "attn.wq_b": "self_attn.q_b_proj", "attn.wo_a": "self_attn.o_a_proj", "attn.wo_b": "self_attn.o_b_proj",
    "attn.wkv": "self_attn.kv_proj", "attn.kv_norm": "self_attn.kv_norm", "ffn.gate.bias":
    "mlp.gate.e_score_correction_bias", "ffn.gate.": "mlp.gate.", "ffn.shared_experts.w1":
    "mlp.shared_experts.gate_proj", "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}  # fmt: skip
V4_IN_COMPRESSOR = {"wkv.": "kv_proj.", "wgate.": "gate_proj.", "ape": "position_bias", "norm.": "kv_norm."}
V4_ELSEWHERE = {
    "head.weight": "lm_head.weight",
    "embed.weight": "model.embed_tokens.weight",
    "hc_head_": "model.hc_head.hc_",
}


def name_v4_module(name):
    """The name of the parameter of transformers' module (5.24) that a published tensor becomes."""
    for ours, theirs in V4_ELSEWHERE.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if not name.startswith("layers."):
        return "model." + name
    prefix, rest = name[:9], name[9:]
    ours = next(one for one in V4_MODULES if rest.startswith(one))
    end = rest.removeprefix(ours)
    if ours.endswith("compressor."):
        start = next(one for one in V4_IN_COMPRESSOR if end.startswith(one))
        end = V4_IN_COMPRESSOR[start] + end.removeprefix(start)
    return f"model.{prefix}{V4_MODULES[ours]}{end}"


def test_v4_as_its_modules_are_called(tmp_path):
    """A state dict of transformers' modules, which save_pretrained would have renamed."""
    params = random_params(param_specs(V4), V4.n_routed_experts)
    save_checkpoint(tmp_path / "m", V4, params)
    stored, named = load_file(tmp_path / "m" / "model.safetensors"), {}
    for layer in range(3):
        experts = [{part: stored.pop(f"layers.{layer}.ffn.experts.{e}.{part}.weight") for part in ("w1", "w2", "w3")}
                   for e in range(2)]  # fmt: skip
        halves = [np.concatenate([one["w1"], one["w3"]]) for one in experts]
        named[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.stack(halves)
        named[f"model.layers.{layer}.mlp.experts.down_proj"] = np.stack([one["w2"] for one in experts])
    named |= {name_v4_module(name): value for name, value in stored.items()}
    assert not named.keys() & stored.keys()
    save_file(named, tmp_path / "m" / "model.safetensors")
    same(load_checkpoint(tmp_path / "m")[1], params)


# --- files -----------------------------------------------------------------------------------------------------------
SINGLE = "model.safetensors"
FILES = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "unknown type": (None, "holds a type of tensor that the installed safetensors does not know.*newest release"),
}


def test_bytes_that_are_missing(tmp_path, tensors):
    write_folder(tmp_path / "m", CONFIG, tensors)
    path = tmp_path / "m" / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=rf"{len(data) - 7} bytes, of which its header promises {len(data)}\); fetch"):
        load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_something_else(tmp_path, tensors, case):
    content, message = FILES[case]
    write_folder(tmp_path / "m", CONFIG, tensors)
    path = tmp_path / "m" / SINGLE
    path.write_bytes(content or path.read_bytes().replace(b'"F32"', b'"F99"', 1))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "m")


def test_twice_the_same_name(tmp_path, tensors):
    """Readers choose different ones of two entries: in a header, and in an index."""
    write_folder(tmp_path / "m", CONFIG, tensors)
    path = tmp_path / "m" / SINGLE
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size].decode().rstrip(), data[8 + size :]
    entry = json.dumps({**json.loads(header)[W], "dtype": "I32"})
    again = (f'{{"{W}":{entry},' + header[1:]).encode()
    path.write_bytes(len(again).to_bytes(8, "little") + again + rest)
    with pytest.raises(ValueError, match=r"not a safetensors file \(a name occurs twice\)"):
        load_checkpoint(tmp_path / "m")
    os.remove(path)
    (tmp_path / "m" / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"{W}": "a", "{W}": "b"}}}}')
    with pytest.raises(ValueError, match=r"not an index of safetensors files .*a name occurs twice"):
        load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is PyTorch's pickle format, which is not read. Fetch or convert to"),
        ("model.gguf", "model.gguf is GGUF, the format of llama.cpp"),
        ("consolidated.safetensors", "it has consolidated.safetensors. Give a folder with the names"),
        (
            "model-00001-of-00002.safetensors",
            "has model-00001-of-00002.safetensors, but no model.safetensors.index.json",
        ),
    ],
)
def test_folders_without_weights_of_ours(tmp_path, tensors, name, message):
    write_folder(tmp_path / "m", CONFIG, tensors)
    os.rename(tmp_path / "m" / SINGLE, tmp_path / "m" / name)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "m")


def test_a_link_to_nothing(tmp_path, tensors):
    """As in a cache of the hub whose blobs were removed."""
    write_folder(tmp_path / "m", CONFIG, tensors)
    os.remove(tmp_path / "m" / SINGLE)
    os.symlink("../blob", tmp_path / "m" / SINGLE)
    with pytest.raises(
        ValueError, match=r"model.safetensors is no file, but a folder or a link to .* missing; fetch it"
    ):
        load_checkpoint(tmp_path / "m")


def test_a_file_that_may_not_be_read(tmp_path, tensors, monkeypatch):
    """Not called damaged: permission is the remedy."""
    write_folder(tmp_path / "m", CONFIG, tensors)

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="model.safetensors"):
        load_checkpoint(tmp_path / "m")
