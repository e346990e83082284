"""The training script: its forward pass is the model, training learns, and files come back as they went out."""

import copy
import json
import pathlib
import sys

import deepseek_v32_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from sparse_mla_jax.config import config_from_json, load_config
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.tools.text import HELD_OUT, stdlib_sources

# As for a script that is run: its folder comes first.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))

import tiny_model
import tiny_training
import train_tiny

pytestmark = pytest.mark.xdist_group("train_tiny")
BIAS = "e_score_correction_bias"


def small_config(**changes):
    config = copy.deepcopy(train_tiny.CONFIG)
    config |= {
        "hidden_size": 48,
        "intermediate_size": 64,
        "kv_lora_rank": 24,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_attention_heads": 3,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 3,
        "q_lora_rank": 32,
        "index_topk": 16,
    }
    return config | changes


def perturbed_params(config, seed=0):
    """Initial weights with norms and biases that matter."""
    rng = np.random.default_rng(seed)

    def perturb(value):
        return value + np.float32(0.1) * rng.normal(size=value.shape).astype(np.float32) if value.ndim == 1 else value

    return jax.tree.map(perturb, tiny_training.init_params(config, seed))


def read_folder(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 steps in two halves: (folder of the first, folder of the second, figures of both)."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.json").write_text(json.dumps(small_config()))
    text = np.frombuffer(b"".join(t for _, t in stdlib_sources(held_out=True))[:40000], np.uint8)
    corpus = tiny_training.Corpus(text, len(text) // 2, [("a.py", text[:500]), ("b.py", text[3000:3300])])
    tiny_training.save_corpus(corpus, str(folder / "corpus.npz"))
    common = ["--corpus", str(folder / "corpus.npz"), "--context", "64", "--batch", "4", "--chunk", "32"]
    common += [
        "--query-rows",
        "16",
        "--steps-per-call",
        "5",
        "--evaluate-every",
        "0",
        "--switch",
        "0.5",
        "--lr",
        "1e-2",
    ]
    first = ["--steps", "30", "--until", "0.5", "--config", str(folder / "config.json"), "--out", str(folder / "a")]
    second = ["--steps", "10", "--out", str(folder / "b"), "--resume"]
    figures = [train_tiny.main(common + first)]
    figures.append(train_tiny.main(common + second + [str(folder / "a" / f"{x}.npz") for x in ("moments", "params")]))
    return folder / "a", folder / "b", figures


def test_training_learns_in_both_phases_and_resumes(trained):
    a, b, (first, second) = trained
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    assert logs[0][0]["ce"] - logs[0][-1]["ce"] > 0.5 and logs[1][-1]["ce"] < logs[0][-1]["ce"] + 0.1
    assert not logs[0][-1]["sparse"] and all(entry["sparse"] for entry in logs[1])
    assert (first["steps"], first["progress"], second["steps"], second["progress"]) == (30, 0.5, 10, 1.0)
    assert logs[1][-1]["step"] == 40 and logs[1][0]["mass"] > 0.3
    assert second["windows"] == 500 // 64 + 300 // 64
    assert second["dense_bpb"] < 7 and second["sparse_bpb"] < 7


def moments_of(state):
    """AdamW's means and squares by the names of their places."""
    leaves = {tiny_training.name_of(path): value for path, value in jax.tree_util.tree_leaves_with_path(state.moments)}
    return {name: np.asarray(value) for name, value in leaves.items() if ".mu." in name or ".nu." in name}


def test_checkpoints_keep_everything(trained):
    paths = [str(trained[0] / name) for name in ("params.npz", "moments.npz")]
    state, progress, config_json = tiny_training.load_state(paths)
    config = config_from_json(config_json)
    assert progress == 0.5 and int(state.step) == 30 and config == config_from_json(small_config())
    specs = deepseek_v32.param_specs(config)
    assert jax.tree.map(lambda v: (v.shape, v.dtype), state.params) == jax.tree.map(lambda v: (v.shape, v.dtype), specs)
    moments = moments_of(state)
    assert len(moments) == 2 * len(jax.tree.leaves(specs))
    assert all(np.any(value) for name, value in moments.items() if not name.endswith(BIAS))
    assert np.any(state.params["layers"][1]["mlp"]["gate"][BIAS]), "the router's bias never moved"
    bare, _, _ = tiny_training.load_state([str(trained[0] / "params.npz")])
    assert moments_of(bare).keys() == moments.keys() and not any(np.any(value) for value in moments_of(bare).values())
    with pytest.raises(ValueError, match="params.npz is needed"):
        tiny_training.load_state([str(trained[0] / "moments.npz")])


def test_export_gives_the_same_folder_as_the_run(trained, tmp_path):
    train_tiny.main(["--export", str(trained[1] / "params.npz"), str(tmp_path)])
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()
    config = load_config(tmp_path)
    tensors = read_folder(tmp_path)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in tensors
    state, _, _ = tiny_training.load_state([str(trained[1] / "params.npz")])
    rounded = tiny_training.rounded(state.params, config)
    np.testing.assert_array_equal(tensors["lm_head.weight"], rounded["lm_head"].T)
    stacked = rounded["layers"][1]["mlp"]["experts"]["up_proj"]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], stacked[2].T)
    assert tensors["model.layers.1.mlp.gate." + BIAS].shape == (config.n_routed_experts,)
    loaded = load_checkpoint(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


@pytest.mark.parametrize("sparse", [False, True])
def test_forward_is_the_oracle(sparse, tmp_path):
    config_json = small_config(n_group=2, topk_group=1)
    config = config_from_json(config_json)
    params = perturbed_params(config)
    tiny_training.export(params, config_json, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 256, (1, 70)).astype(np.int32)
    expected = oracle.model_logits(read_folder(tmp_path), config if sparse else config.dense(), tokens[0])
    rounded = tiny_training.rounded(params, config)
    for exact in (False, True):
        mode = tiny_model.Mode(sparse, jnp.float32, 32, exact=exact)
        logits, _ = jax.jit(lambda t, m=mode: tiny_model.forward(rounded, t, None, config, m))(tokens)
        np.testing.assert_allclose(logits[0], expected, atol=5e-5)


def test_bisection_selects_what_sorting_selects():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 5, 300)).astype(np.float32)
    scores[0, 1] = np.maximum(scores[0, 1], 0)  # a plateau of zeros that the threshold meets
    scores[0, 1, 100:] = 0
    scores[1, 2] = 0
    visible = jnp.asarray(np.arange(300) <= np.array([10, 150, 299, 40, 200])[:, None])[None]
    masks = [np.asarray(tiny_model.select(jnp.asarray(scores), visible, 40, exact)) for exact in (False, True)]
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0].sum(-1), np.broadcast_to([11, 40, 40, 40, 40], (2, 5)))


@pytest.mark.parametrize("sparse", [False, True])
def test_each_part_learns_from_its_own_loss(sparse):
    config = config_from_json(small_config())
    params = perturbed_params(config)
    tokens = np.random.default_rng(2).integers(0, 256, (2, 65)).astype(np.int32)
    mode = tiny_model.Mode(sparse, jnp.float32, 32)

    def part(params, name):
        aux = tiny_model.loss_fn(params, tokens, jnp.arange(20, 60, 2), config, mode)[1]
        return aux[name].sum()

    for name, learns_indexer in (("ce", False), ("kl", True)):
        gradients = jax.jit(jax.grad(part), static_argnums=1)(params, name)
        for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
            parameter, moved = tiny_training.name_of(path), bool(jnp.any(gradient != 0))
            expected = (".indexer." in parameter) is learns_indexer and not parameter.endswith(BIAS)
            assert moved is expected, (parameter, name)


def test_balancing_raises_the_bias_of_idle_experts():
    config = config_from_json(small_config())
    params = tiny_training.init_params(config, 0)
    load = jnp.asarray([[0.9, 0.1, 0.375, 0.375, 0.375, 0.375, 0.375, 0.125]])
    bias = tiny_training.balance(params, load, jnp.float32(0.1), config)["layers"][1]["mlp"]["gate"][BIAS]
    assert bias[0] < 0 < bias[1]


def test_windows_come_from_everywhere_and_no_further():
    options = tiny_training.Options(batch=20000, context=7, library_share=0.25)
    corpus = jnp.arange(200, dtype=jnp.uint8)
    windows = np.asarray(tiny_training.sample(jax.random.key(0), corpus, jnp.int32(100), options))
    assert windows.shape == (20000, 8) and np.all(np.diff(windows.astype(int), axis=1) == 1)
    starts = windows[:, 0]
    assert set(range(0, 93)) <= set(starts.tolist()) and starts.max() == 192
    assert 0.2 < (starts < 100).mean() < 0.3
    assert not set(range(93, 100)) & set(starts.tolist()), "a window spans library and tests"
    everything = tiny_training.sample(jax.random.key(0), corpus, jnp.int32(200), options)
    assert np.all(np.diff(np.asarray(everything).astype(int), axis=1) == 1)


def test_held_out_modules_never_enter_the_training_data():
    corpus = tiny_training.make_corpus()
    assert [name for name, _ in corpus.held_out] == [f"{module}.py" for module in HELD_OUT]
    text = corpus.train.tobytes()
    for _, source in corpus.held_out:
        for start in range(len(source) // 4, len(source) - 160, max(160, len(source) // 8)):
            assert source[start : start + 160].tobytes() not in text
    assert 0 < corpus.boundary <= len(text)
    windows = tiny_training.held_out_windows(corpus, 2048)
    assert len(windows) >= 20 and windows.dtype == np.int32
    np.testing.assert_array_equal(windows[0], corpus.held_out[0][1][:2048])


def test_shipped_model_fits_eight_megabytes():
    specs = jax.tree.leaves(deepseek_v32.param_specs(config_from_json(train_tiny.CONFIG), "bfloat16"))
    assert sum(spec.size * spec.dtype.itemsize for spec in specs) < 7.9e6
    assert 4 * sum(spec.size for spec in specs) < 16 * 2**20, "a checkpoint file outgrows 16 MiB"
