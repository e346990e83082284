"""The training script: its forward pass is the model, training learns, and files come back as they went out."""

import copy
import importlib.util
import json
import pathlib

import deepseek_v32_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from sparse_mla_jax import data
from sparse_mla_jax.config import config_from_json, load_config

pytestmark = [pytest.mark.xdist_group("train_tiny"), pytest.mark.usefixtures("quick_compile")]

ROOT = pathlib.Path(__file__).parent.parent


def load_script():
    spec = importlib.util.spec_from_file_location("train_tiny", ROOT / "examples" / "train_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train_tiny = load_script()


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
    params = train_tiny.init_params(config, seed)
    return {
        name: value + np.float32(0.1) * rng.normal(size=value.shape).astype(np.float32) if value.ndim == 1 else value
        for name, value in params.items()
    }


def read_folder(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 40 steps in two halves: (folder of the first, folder of the second, figures of both)."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.json").write_text(json.dumps(small_config()))
    text = np.frombuffer(b"".join(t for _, t in data.stdlib_sources(held_out=True))[:40000], np.uint8)
    corpus = train_tiny.Corpus(text, len(text) // 2, [("a.py", text[:500]), ("b.py", text[3000:3300])])
    train_tiny.save_corpus(corpus, str(folder / "corpus.npz"))
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


def test_checkpoints_keep_everything(trained):
    paths = [str(trained[0] / name) for name in ("params.npz", "moments.npz")]
    state, progress, config_json = train_tiny.load_state(paths)
    config = config_from_json(config_json)
    assert progress == 0.5 and int(state.step) == 30 and config == config_from_json(small_config())
    assert {n: v.shape for n, v in state.params.items()} == train_tiny.parameter_shapes(config)
    for tree in (state.mean, state.square):
        assert all(np.any(np.asarray(v)) for n, v in tree.items() if not n.endswith(train_tiny.BIAS))
    assert np.any(np.asarray(state.params["model.layers.1." + train_tiny.BIAS])), "the router's bias never moved"
    bare, _, _ = train_tiny.load_state([str(trained[0] / "params.npz")])
    assert not any(np.any(np.asarray(v)) for v in bare.mean.values())
    with pytest.raises(ValueError, match="params.npz is needed"):
        train_tiny.load_state([str(trained[0] / "moments.npz")])


def test_export_gives_the_same_folder_as_the_run(trained, tmp_path):
    train_tiny.main(["--export", str(trained[1] / "params.npz"), str(tmp_path)])
    assert (tmp_path / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()
    config = load_config(tmp_path)
    tensors = read_folder(tmp_path)
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in tensors
    state, _, _ = train_tiny.load_state([str(trained[1] / "params.npz")])
    rounded = train_tiny.rounded(state.params)
    np.testing.assert_array_equal(tensors["lm_head.weight"], rounded["lm_head.weight"])
    stacked = rounded["model.layers.1.mlp.experts.up_proj.weight"]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.experts.2.up_proj.weight"], stacked[2])
    assert tensors["model.layers.1." + train_tiny.BIAS].shape == (config.n_routed_experts,)


@pytest.mark.parametrize("sparse", [False, True])
def test_forward_is_the_oracle(sparse, tmp_path):
    config_json = small_config(n_group=2, topk_group=1)
    config = config_from_json(config_json)
    params = perturbed_params(config)
    train_tiny.export(params, config_json, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 256, (1, 70)).astype(np.int32)
    expected = oracle.model_logits(read_folder(tmp_path), config if sparse else config.dense(), tokens[0])
    rounded = train_tiny.rounded(params)
    for exact in (False, True):
        mode = train_tiny.Mode(sparse, jnp.float32, 32, exact=exact)
        logits, _ = jax.jit(lambda t, m=mode: train_tiny.forward(rounded, t, None, config, m))(tokens)
        np.testing.assert_allclose(logits[0], expected, atol=5e-5)


def test_bisection_selects_what_sorting_selects():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 5, 300)).astype(np.float32)
    scores[0, 1] = np.maximum(scores[0, 1], 0)  # a plateau of zeros that the threshold meets
    scores[0, 1, 100:] = 0
    scores[1, 2] = 0
    visible = jnp.asarray(np.arange(300) <= np.array([10, 150, 299, 40, 200])[:, None])[None]
    masks = [np.asarray(train_tiny.select(jnp.asarray(scores), visible, 40, exact)) for exact in (False, True)]
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0].sum(-1), np.broadcast_to([11, 40, 40, 40, 40], (2, 5)))


@pytest.mark.parametrize("sparse", [False, True])
def test_each_part_learns_from_its_own_loss(sparse):
    config = config_from_json(small_config())
    params = {name: jnp.asarray(value) for name, value in perturbed_params(config).items()}
    tokens = np.random.default_rng(2).integers(0, 256, (2, 65)).astype(np.int32)
    mode = train_tiny.Mode(sparse, jnp.float32, 32)

    def part(params, name):
        aux = train_tiny.loss_fn(params, tokens, jnp.arange(20, 60, 2), config, mode)[1]
        return aux[name].sum()

    for name, learns_indexer in (("ce", False), ("kl", True)):
        for parameter, gradient in jax.jit(jax.grad(part), static_argnums=1)(params, name).items():
            moved = bool(jnp.any(gradient != 0))
            expected = (".indexer." in parameter) is learns_indexer and not parameter.endswith(train_tiny.BIAS)
            assert moved is expected, (parameter, name)


def test_balancing_raises_the_bias_of_idle_experts():
    config = config_from_json(small_config())
    params = train_tiny.init_params(config, 0)
    load = jnp.asarray([[0.9, 0.1, 0.375, 0.375, 0.375, 0.375, 0.375, 0.125]])
    bias = train_tiny.balance(params, load, jnp.float32(0.1), config)["model.layers.1." + train_tiny.BIAS]
    assert bias[0] < 0 < bias[1]


def test_windows_come_from_everywhere_and_no_further():
    options = train_tiny.Options(batch=20000, context=7, library_share=0.25)
    corpus = jnp.arange(200, dtype=jnp.uint8)
    windows = np.asarray(train_tiny.sample(jax.random.key(0), corpus, jnp.int32(100), options))
    assert windows.shape == (20000, 8) and np.all(np.diff(windows.astype(int), axis=1) == 1)
    starts = windows[:, 0]
    assert set(range(0, 93)) <= set(starts.tolist()) and starts.max() == 192
    assert 0.2 < (starts < 100).mean() < 0.3
    assert not set(range(93, 100)) & set(starts.tolist()), "a window spans library and tests"
    everything = train_tiny.sample(jax.random.key(0), corpus, jnp.int32(200), options)
    assert np.all(np.diff(np.asarray(everything).astype(int), axis=1) == 1)


def test_held_out_modules_never_enter_the_training_data():
    corpus = train_tiny.make_corpus()
    assert [name for name, _ in corpus.held_out] == [f"{module}.py" for module in data.HELD_OUT]
    text = corpus.train.tobytes()
    for _, source in corpus.held_out:
        for start in range(len(source) // 4, len(source) - 160, max(160, len(source) // 8)):
            assert source[start : start + 160].tobytes() not in text
    assert 0 < corpus.boundary <= len(text)
    windows = train_tiny.held_out_windows(corpus, 2048)
    assert len(windows) >= 20 and windows.dtype == np.int32
    np.testing.assert_array_equal(windows[0], corpus.held_out[0][1][:2048])


def test_shipped_model_fits_eight_megabytes():
    params = train_tiny.init_params(config_from_json(train_tiny.CONFIG), 0)
    tensors = train_tiny.published_tensors(params)
    assert sum(array.nbytes for array in tensors.values()) < 7.9e6
    assert 4 * sum(value.size for value in params.values()) < 16 * 2**20, "a checkpoint file outgrows 16 MiB"
