"""Every family: the spellings of its config.json and of its tensors' names, its defaults, and what it refuses."""

import contextlib
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.fixtures import FIXTURES

from sparse_mla_jax.config import MlaConfig, RopeConfig, from_hf, load_config
from sparse_mla_jax.families.registry import FAMILIES, published_family
from sparse_mla_jax.models.checkpoint import (
    config_to_json,
    load_checkpoint,
    published_shapes,
    save_checkpoint,
    skipped_tensors,
)

TINY = sorted(folder.name for folder in FIXTURES.glob("*_tiny"))
GLM, HY, HY_VL, AXK2, MISTRAL, DOTS3 = (
    f"{name}_tiny" for name in ("glm_moe_dsa", "hy_v4", "hy_v4_vl", "axk2", "mistral_large4", "dots3_note")
)


def read(name, file="config.json", drop=(), **change):
    """The fields of a fixture's config.json; changes are made where the model's sizes stand."""
    data = json.loads((FIXTURES / name / file).read_text())
    place = data.get("text_config", data)
    place.update(change)
    for one in drop:
        place.pop(one)
    return data


# --- config.json -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TINY)
def test_every_spelling_of_a_fixture_is_one_config(name):
    configs = {path.name: from_hf(path) for path in (FIXTURES / name).glob("*config*.json")}
    config = configs["config.json"]
    assert set(configs.values()) == {config}
    assert from_hf(config_to_json(config)) == config
    assert name == f"{config.family}_tiny" and published_family(config).model_types[0] == config.family
    # None of the per-layer tuples says what it would say empty.
    assert not isinstance(config, MlaConfig) or set(config.mlp_layer_types) != {"sparse"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
def test_a_config_json_that_says_nothing(family):
    """What it means is written, and read back; each of the family's model types means the same."""
    configs = {from_hf({"model_type": model_type}) for model_type in family.model_types}
    (config,) = configs
    assert from_hf(config_to_json(config)) == config
    for name in family.keys:
        if hasattr(config, name) and isinstance(getattr(config, name), int | float):
            assert getattr(config, name) == getattr(family.defaults, name), name


def test_sizes_of_the_published_models():
    """A few numbers of each, from transformers' config classes."""
    glm, hy, vl, axk2, mistral, dots3 = (from_hf({"model_type": name[:-5]}) for name in
                                         (GLM, HY, HY_VL, AXK2, MISTRAL, DOTS3))  # fmt: skip
    assert (glm.hidden_size, glm.num_hidden_layers, glm.num_moe_layers, glm.rope) == (6144, 78, 75, RopeConfig())
    assert (glm.rms_norm_eps, glm.latent_norm_eps, glm.indexer_rope_interleave, glm.indexer_types) == (
        1e-5,
        1e-6,
        True,
        (),
    )
    assert (hy.rope_interleave, hy.indexer_rope_interleave, hy.index_norm_eps, hy.latent_norm_eps) == (
        *(False, False, 1e-5, 1e-6),
    )
    assert (vl.rope_interleave, vl.indexer_rope_interleave, vl.index_norm_eps, vl.latent_norm_eps) == (
        *(True, True, 1e-5, 1e-5),
    )
    assert [i for i, kind in enumerate(hy.indexer_types) if kind == "full"] == [0, 1, 5, 9, 13, 17, 21, 25, 29, 33]
    assert (hy.hidden_size, vl.hidden_size, hy.hc_mult, hy.swiglu_limit, hy.num_moe_layers) == (2816, 6144, 4, 10.0, 33)
    assert (axk2.gated_norm_rank, axk2.attention_gate, axk2.q_lora_rank, axk2.n_group) == (16, "latent", 384, 1)
    assert (axk2.rope_interleave, axk2.indexer_rope_interleave, axk2.num_moe_layers) == (True, False, 47)
    yarn = RopeConfig(factor=2048.0, original_max_position=512)
    assert (mistral.q_lora_rank, mistral.final_logit_softcapping, mistral.rope) == (0, 30.0, yarn)
    assert [layer.sizes.qk_rope_head_dim for layer in mistral.layers[:8]] == [64, 64, 64, 0] * 2
    assert mistral.layer(3).sizes.qk_nope_head_dim == 128 and mistral.scoring_func == "softmax"
    assert [layer.is_sliding for layer in dots3.layers[:10]] == [i >= 2 and i % 4 != 1 for i in range(10)]
    sliding, indexed = dots3.layer(2).sizes, dots3.layer(1).sizes
    assert (sliding.num_attention_heads, sliding.kv_lora_rank, sliding.qk_nope_head_dim) == (64, 1024, 192)
    assert (sliding.rope.theta, indexed.rope.theta, indexed.num_attention_heads) == (5e4, 8e7, 128)
    assert (dots3.sliding_window, dots3.shared_width, dots3.latent_norm_eps) == (512, 1536, 1e-5)


def test_epsilons_that_are_the_model_s():
    """Of the latents' norms and of the index keys'; the others are constants of the family."""
    names = [family.model_types[0] for family in FAMILIES if isinstance(family.defaults, MlaConfig)]
    configs = [from_hf({"model_type": name, "rms_norm_eps": 1e-3}) for name in names]
    assert {one.family: (one.latent_norm_eps, one.index_norm_eps) for one in configs} == {
        **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "axk2"), (1e-6, 1e-6)),
        **dict.fromkeys(("mistral_large4", "dots3_note"), (1e-3, 1e-6)),
        "hy_v4": (1e-6, 1e-3),
        "hy_v4_vl": (1e-3, 1e-3),
    }


SAME = {
    "GLM: frequency 1": (GLM, {"indexer_types": ["full"] * 4}, {"indexer_types": None, "index_topk_freq": 1}),
    "GLM: pattern of letters": (GLM, {}, {"indexer_types": None, "index_topk_pattern": "FFSS"}),
    "GLM: pattern of words": (
        GLM, {}, {"indexer_types": None, "index_topk_pattern": ["full", "full", "shared", "shared"]},
    ),
    "GLM: indexer_types wins": (GLM, {}, {"index_topk_pattern": "FFFF", "index_topk_freq": 1}),
    "GLM: older rotation": (
        GLM, {}, {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "default"}},
    ),
    "GLM: experts": (GLM, {}, {"num_experts": 8, "num_local_experts": 8}),
    "GLM: sparse attention": (GLM, {}, {"layer_types": ["deepseek_sparse_attention"] * 4}),
    "HY: frequency": (HY, {"indexer_types": ["full", "full", "shared", "shared"]},
                      {"indexer_types": None, "index_topk_freq": 4}),
    "HY: dense layers": (HY, {}, {"mlp_layer_types": None, "first_k_dense_replace": 1}),
    "axk2: dense layers": (AXK2, {}, {"mlp_layer_types": None, "first_k_dense_replace": 1, "moe_layer_freq": 1}),
    "axk2: every second": (
        AXK2, {"mlp_layer_types": ["dense", "dense", "sparse"]}, {"mlp_layer_types": None, "moe_layer_freq": 2},
    ),
    "axk2: no groups": (AXK2, {}, {"n_group": 1, "topk_group": 1}),
    "mistral: interval": (MISTRAL, {}, {"no_rope_layers": None, "no_rope_layer_interval": 4}),
    "mistral: own latents": (MISTRAL, {"kv_source_layers": [0, 1, 2, 3, 4]}, {"kv_source_layers": None}),
    "dots3: list of layers": (DOTS3, {}, {"mlp_layer_types": None, "moe_layer_freq": [0, 1, 1, 1]}),
    "dots3: repeated sizes": (
        DOTS3, {}, {"use_dsa": True, "swa_rope_theta": 5e4, "rope_theta": 8e7, "use_sliding_window": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_two_spellings_are_one_config(case):
    name, one, other = SAME[case]
    assert from_hf(read(name, **one)) == from_hf(read(name, **other))


def test_dots3_without_index():
    """use_dsa false: layers that would choose keys see all of them; a saved file says so in layer_types."""
    dense = from_hf(read(DOTS3, "config_legacy.json", use_dsa=False))
    assert [layer.kind for layer in dense.layers] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert from_hf(config_to_json(dense)) == dense
    parts = read(DOTS3)["rope_parameters"]
    ropes = {"full_attention": parts["indexed_attention"], "sliding_attention": parts["sliding_attention"]}
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert from_hf(read(DOTS3, layer_types=kinds, rope_parameters=ropes)) == dense


def test_dots3_writes_the_rotation_of_its_layers():
    """Of the layers that there are, and with their own widths, which may be none of the top level's."""
    config = from_hf(read(DOTS3, "config_legacy.json", swa_qk_rope_head_dim=8))
    ropes = config_to_json(config)["rope_parameters"]
    factors = {kind: rope["partial_rotary_factor"] for kind, rope in ropes.items()}
    assert factors == {"indexed_attention": 16 / 40, "sliding_attention": 8 / 56}
    config = from_hf(read(DOTS3, "config_legacy.json", layer_types=["sliding_attention"] * 4, rope_theta=300.0))
    assert from_hf(config_to_json(config)) == config and config.rope.theta == 5e4


def test_keys_that_stand_at_both_levels():
    data = read(MISTRAL)
    assert from_hf({**data, "tie_word_embeddings": False, "vocab_size": 256}) == from_hf(data)
    with pytest.raises(ValueError, match=r"vocab_size 255 and text_config.vocab_size 256 differ"):
        from_hf({**data, "vocab_size": 255})
    with pytest.raises(ValueError, match=r"tie_word_embeddings True and text_config.tie_word_embeddings False"):
        from_hf({**data, "tie_word_embeddings": True})
    del data["text_config"]["tie_word_embeddings"]
    assert from_hf({**data, "tie_word_embeddings": True}).tie_word_embeddings
    with pytest.raises(ValueError, match=r"text_config.model_type is 'hy_v4_vl_text'"):
        from_hf(read(MISTRAL, model_type="hy_v4_vl_text"))
    # The text model by itself, and a field outside that only stands there.
    assert from_hf(data["text_config"]).family == "mistral_large4"
    del data["text_config"]["vocab_size"]
    with pytest.raises(ValueError, match="vocab_size belongs to"):
        from_hf({**data, "vocab_size": 256})


REFUSED = [
    (GLM, {"indexer_types": ["shared", "full", "full", "full"]}, "'shared' in layer 0"),
    (GLM, {"indexer_types": None, "index_topk_pattern": "FFS"}, "4 letters, F or S"),
    (GLM, {"indexer_types": None, "index_topk_freq": 0}, "index_topk_freq is 0"),
    (GLM, {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (GLM, {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers is 2147483647"),
    (GLM, {"gated_norm_rank": 4}, "gated_norm_rank belongs to model_type 'axk2'; 'glm_moe_dsa' has nothing like it"),
    (GLM, {"text_config": {"hidden_size": 4}}, "text_config"),
    (GLM, {"per_layer_config": {"1": {}}}, "per_layer_config is"),
    (HY, {"swiglu_limit": 0}, "swiglu_limit is 0"),
    (HY, {"hc_mult": 0}, "hc_mult is 0"),
    (HY, {"vision_config": {}, "kv_source_layers": [0]}, "kv_source_layers belongs to model_type 'mistral_large4'"),
    (HY_VL, {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 4, 4]}}, "mrope_section is"),
    (AXK2, {"n_group": 2}, "give both, or neither"),
    (AXK2, {"indexer_types": ["full", "shared", "shared"]}, "indexer_types has an entry 'shared'"),
    (MISTRAL, {"rope_parameters": None, "rope_theta": 5e5}, "rope_theta stands alone"),
    (MISTRAL, {"q_lora_rank": 64}, "q_lora_rank belongs to"),
    (MISTRAL, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported is only 'softmax'"),
    (MISTRAL, {"no_rope_layers": [1, 1, 1, 0, 2]}, "no_rope_layers is no list of 5"),
    (MISTRAL, {"kv_source_layers": [0, 1, 2, 4, 4]}, "kv_source_layers is"),
    (MISTRAL, {"kv_source_layers": [0, 1, 0, 3, 4]}, "nearest layer before it"),
    (DOTS3, {"indexer_types": ["full", "full", "shared", "shared"]}, "indexer_types has an entry 'shared'"),
    (DOTS3, {"use_dsa": False}, "use_dsa is False and layer_types has 'indexed_attention'"),
    (DOTS3, {"use_sliding_window": False}, "use_sliding_window is False"),
    (DOTS3, {"per_layer_config": {"4": {}}}, "per_layer_config.'4' names no layer"),
    (DOTS3, {"per_layer_config": {"2": {"hidden_size": 3}}}, "per_layer_config.2.hidden_size is not supported"),
    (DOTS3, {"swa_kv_lora_rank": 96}, "both give the sizes of layers"),
    (DOTS3, {"rope_theta": 7.0}, "rope_theta 7.0 and rope_parameters"),
]  # fmt: skip


# What transformers saves beside the fields that count.
OUTRANKED = [
    (HY, {"first_k_dense_replace": 3}, "has no effect"),
    (HY, {"index_topk_freq": 2, "index_topk_pattern": "FFFF"}, "has no effect"),
    (AXK2, {"moe_layer_freq": 2}, "mlp_layer_types counts"),
    (GLM, {"first_k_dense_replace": 3}, "mlp_layer_types counts"),
    (GLM, {"index_topk_pattern": "FFFF"}, None),
]


@pytest.mark.parametrize(("name", "change", "message"), OUTRANKED)
def test_fields_that_others_outrank(name, change, message):
    with pytest.warns(UserWarning, match=message) if message else contextlib.nullcontext():
        assert from_hf(read(name, **change)) == from_hf(read(name))


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refusals_name_the_field(name, change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(read(name, **change))


def test_a_family_that_is_none():
    with pytest.raises(
        ValueError, match="config field family is 'glm5_next'; expected is one of 'deepseek_v32', 'glm_"
    ):
        published_family(MlaConfig(family="glm5_next"))


# --- names of tensors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TINY)
def test_published_names(fixtures, tmp_path, name):
    """Names and shapes are the fixture's, but for what is skipped; a saved folder has every byte of them."""
    folder = fixtures / name
    stored = load_file(folder / "model.safetensors")
    shapes, skipped = published_shapes(load_config(folder)), skipped_tensors(folder)
    assert shapes.keys() <= stored.keys() and len(stored) - len(shapes) == sum(skipped.values())
    assert shapes == {tensor: stored[tensor].shape for tensor in shapes}
    config, params = load_checkpoint(folder, progress=False)
    save_checkpoint(tmp_path, config, params)
    saved = load_file(tmp_path / "model.safetensors")
    assert load_config(tmp_path) == config and saved.keys() == shapes.keys()
    assert all(value.tobytes() == stored[tensor].tobytes() for tensor, value in saved.items())


def hy_modules(name):
    """The name of the parameter in transformers' module of Hy4, see the specification of its checkpoints."""
    name = re.sub(r"hc_(attn|mlp)_layer\.hc_pre\.hc_", lambda m: {"attn": "attn", "mlp": "ffn"}[m[1]] + "_hc.", name)
    name = name.replace("hc_head.hc_head_", "hc_head.hc_").replace("learnable_sink_param", "sinks")
    return name.replace("self_attn.linear_gate", "self_attn.gate_proj")


def single_experts(tensors):
    """The tensors with one for each matrix of an expert."""
    found = {}
    for name, value in tensors.items():
        prefix, kind = name.rpartition(".")[::2]
        for expert, matrix in enumerate(value) if prefix.endswith(".experts") else ():
            halves = np.split(matrix, 2) if kind == "gate_up_proj" else [matrix]
            for part, half in zip(("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",), halves):
                found[f"{prefix}.{expert}.{part}.weight"] = half
        if not prefix.endswith(".experts"):
            found[name] = value
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def saved_names(name):
    """What save_pretrained of transformers calls the tensors of a fixture."""
    return json.loads((FIXTURES / name / "names_save_pretrained.json").read_text())


def renamed(rename):
    return lambda tensors: {rename(name): value for name, value in tensors.items()}


SPELLINGS = {
    "HY saved": (HY, renamed(lambda name: saved_names(HY).get(name, name))),
    "HY modules": (HY, renamed(hy_modules)),
    "HY one by one": (HY, single_experts),
    "HY VL saved": (HY_VL, renamed(lambda name: saved_names(HY_VL).get(name, name))),
    "HY VL modules": (HY_VL, renamed(lambda name: re.sub("^model.", "model.language_model.", hy_modules(name)))),
    "axk2 modules": (AXK2, renamed(lambda name: name.replace("q_b_proj", "q_gate_proj"))),
    "dots3 composite": (DOTS3, renamed(lambda name: re.sub("^model.", "model.language_model.", name))),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_other_spellings_of_names(fixtures, tmp_path, case):
    name, respell = SPELLINGS[case]
    tensors = load_file(fixtures / name / "model.safetensors")
    other = respell(tensors)
    assert len(other.keys() - tensors.keys()) > 2
    save_file(other, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read(name)))
    expected = load_checkpoint(fixtures / name, progress=False)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path, progress=False), expected)


ONE = np.zeros(2, np.float32)
SKIPPED = {
    GLM: {
        "model.layers.4.eh_proj.weight": "multi-token prediction",
        "model.layers.2.self_attn.indexer.wk.weight": "indexers of layers that use another's selection",
    },
    HY: {
        "model.mtp_layers.0.eh_proj.weight": "multi-token prediction",
        "model.layers.2.self_attn.indexer.wk.weight": "indexers of layers that use another's selection",
    },
    AXK2: {"model.layers.0.self_attn.rotary_emb.inv_freq": "rotary buffers"},
    MISTRAL: {
        "mtp_dspark.norm.weight": "multi-token prediction",
        "layers.2.attention.indexer.wk.weight": "indexers of layers that use another's selection",
        "patch_merger.other": "the vision tower",
    },
    DOTS3: {
        "model.mtp.head.weight": "multi-token prediction",
        "model.language_model.mtp.norm.weight": "multi-token prediction",
        "model.layers.4.norm.weight": "multi-token prediction",
        "vision_tower.patch.weight": "the vision tower",
        "model.audio_tower.conv.weight": "the audio tower",
    },
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_skipped(fixtures, tmp_path, name):
    tensors = load_file(fixtures / name / "model.safetensors")
    before = skipped_tensors(fixtures / name)
    save_file({**tensors, **dict.fromkeys(SKIPPED[name], ONE)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read(name)))
    found = skipped_tensors(tmp_path)
    kinds = list(SKIPPED[name].values())
    assert {kind: found[kind] - before.get(kind, 0) for kind in found} == {kind: kinds.count(kind) for kind in found}
    load_checkpoint(tmp_path, progress=False)


def test_missing_experts_have_the_name_that_is_published(fixtures, tmp_path):
    tensors = load_file(fixtures / HY / "model.safetensors")
    save_file({n: v for n, v in tensors.items() if "experts.gate_up" not in n}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read(HY)))
    with pytest.raises(ValueError, match=r"lacks tensor model.layers.1.mlp.experts.gate_up_proj, "):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [HY, AXK2, MISTRAL, DOTS3])
def test_biases_and_tied_heads(tmp_path, name):
    """Tensors that the fixtures do not have."""
    config = dataclasses.replace(load_config(FIXTURES / name), attention_bias=True, tie_word_embeddings=True)
    shapes = published_shapes(config)
    names = ("wkv_a_with_mqa", "wo") if name == MISTRAL else ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
    assert all(any(tensor.endswith(f".{one}.bias") for tensor in shapes) for one in names)
    assert not any(tensor in shapes for tensor in ("lm_head.weight", "output.weight"))
    assert from_hf(config_to_json(config)) == config
