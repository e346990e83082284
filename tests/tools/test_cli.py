"""The command line: what it prints and writes, and one line with exit code 2 for everything that is wrong."""

import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from support.marks import slow

from sparse_mla_jax.__main__ import main
from sparse_mla_jax.config import DeepseekV32Config, RopeConfig
from sparse_mla_jax.models import checkpoint, deepseek_v32
from sparse_mla_jax.serving.engine import Engine
from sparse_mla_jax.serving.scoring import score
from sparse_mla_jax.tools.info import fp8_flavour

pytestmark = pytest.mark.xdist_group("command line")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = DeepseekV32Config(
    vocab_size=256,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    first_k_dense_replace=0,
    index_n_heads=2,
    index_head_dim=12,
    index_topk=9,
    max_position_embeddings=96,
    rope=RopeConfig(),
)


def save(folder, config):
    params = deepseek_v32.init_params(jax.random.key(0), config)
    checkpoint.save_checkpoint(folder, config, params)
    return params


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, params) of a small random byte-level model."""
    folder = tmp_path_factory.mktemp("model")
    return str(folder), save(folder, CONFIG)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with a vocabulary that is not bytes, and a context of 32 tokens."""
    folder = tmp_path_factory.mktemp("wide")
    save(folder, dataclasses.replace(CONFIG, vocab_size=300, max_position_embeddings=32))
    return str(folder)


@pytest.fixture
def ids(tmp_path):
    """A file of token ids [2, 20]."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (2, 20)))
    return str(path)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command line."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    code, out, err = run(capsys, *arguments)
    assert code == 2, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert out == ""
    return err


# --- score


@pytest.mark.parametrize(
    "options",
    [
        [],
        slow(["--prompt-length", 0]),
        ["--prompt-length", 13, "--chunk", 5],
        ["--prompt-length", 20, "--chunk", 99],
    ],
)
def test_score_equals_one_prefill(capsys, model, ids, tmp_path, options):
    folder, params = model
    output = tmp_path / "logits.npy"
    code, out, err = run(capsys, "score", folder, "--tokens", ids, "--output", output, "--page-size", 3, *options)
    assert (code, err) == (0, "") and "[2, 20, 256]" in out
    logits = np.load(output)
    assert logits.shape == (2, 20, 256) and logits.dtype == np.float32
    expected = score(params, CONFIG, np.load(ids), cache_dtype="float32")
    np.testing.assert_allclose(logits, expected, atol=2e-5)


# By default in test_model: the other ways to run the same checkpoint.
@pytest.mark.parametrize(
    "options", [slow(["--prompt-length", 0]), slow([]), ["--chunk", 23]], ids=["decode", "prefill", "chunks"]
)
def test_score_equals_the_published_implementation(capsys, fixtures, tmp_path, options):
    """The fixture's logits come from Hugging Face transformers' code in float64."""
    folder = fixtures / "deepseek_v32_tiny"
    expected = np.load(folder / "expected.npz")
    np.save(tmp_path / "ids.npy", expected["input_ids"])
    output = tmp_path / "logits"
    if not options or options[0] == "--chunk":
        options = [*options, "--prompt-length", int(expected["prompt_length"])]
    code, _, _ = run(capsys, "score", folder, "--tokens", tmp_path / "ids.npy", "--output", output, *options)
    assert code == 0
    assert np.abs(np.load(output) - expected["logits"]).max() <= 5e-5


def test_score_with_other_types(capsys, model, ids, tmp_path):
    output = tmp_path / "logits.npy"
    options = ["--dtype", "bfloat16", "--cache-dtype", "float8_e4m3fnuz", "--implementation", "xla"]
    code, _, _ = run(capsys, "score", model[0], "--tokens", ids, "--output", output, *options)
    logits = np.load(output)
    expected = score(model[1], CONFIG, np.load(ids), cache_dtype="float32")
    assert code == 0 and logits.dtype == np.float32
    # A router or an indexer may choose otherwise at a near tie, so single positions differ more than rounding does.
    assert 1e-4 < np.median(np.abs(logits - expected)) < 0.1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3)), "token_ids is float64[2, 3]; integer token ids [B, L]"),
        (np.zeros(3, int), "token_ids is int64[3]"),
        (np.zeros((2, 3, 1), int), "token_ids is int64[2, 3, 1]"),
        (np.zeros((0, 3), int), "token_ids is empty"),
        (np.zeros((2, 0), int), "token_ids is empty"),
        (np.array([[0, 256]]), "ids from 0 to 256; the model's vocabulary is 0..255"),
        (np.array([[-1, 5]]), "ids from -1 to 5"),
        (np.array([[2**40]]), "ids from 1099511627776"),
        (np.zeros((1, 97), int), "97 tokens a row; the model's positions end at 96"),
    ],
)
def test_score_refuses_ids(capsys, model, tmp_path, array, message):
    np.save(tmp_path / "ids.npy", array)
    error = refused(capsys, "score", model[0], "--tokens", tmp_path / "ids.npy", "--output", tmp_path / "out.npy")
    assert message in error
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-length", 21], "prompt_length is 21; token_ids has 20 tokens"),
        (["--prompt-length", -1], "prompt_length is -1"),
        (["--prompt-length", "x"], "invalid int value"),
        (["--chunk", 0], "chunk is 0"),
        (["--page-size", 0], "page_size is 0"),
        (["--page-size", -4], "page_size is -4"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--cache-dtype", "int8"], "invalid choice: 'int8'"),
        (["--implementation", "cuda"], "invalid choice: 'cuda'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_score_refuses_options(capsys, model, ids, tmp_path, options, message):
    assert message in refused(capsys, "score", model[0], "--tokens", ids, "--output", tmp_path / "o.npy", *options)


def test_score_refuses_files(capsys, model, ids, tmp_path):
    text, several, half = tmp_path / "text.npy", tmp_path / "several.npz", tmp_path / "half.npy"
    text.write_text("no array")
    np.savez(several, a=np.zeros(3), b=np.zeros(3))
    half.write_bytes(pathlib.Path(ids).read_bytes()[:150])
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    for path in (tmp_path / "missing.npy", tmp_path, text, several, half, pickled):
        assert "--tokens" in refused(capsys, "score", model[0], "--tokens", path, "--output", tmp_path / "o.npy")
    for path, message in ((tmp_path / "no" / "o.npy", "does not exist"), (tmp_path, "is a folder")):
        assert message in refused(capsys, "score", model[0], "--tokens", ids, "--output", path)


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs a folder that root can not write to")
def test_score_refuses_an_output_that_can_not_be_written(capsys, model, ids):
    refused(capsys, "score", model[0], "--tokens", ids, "--output", "/proc/version/o.npy")
    refused(capsys, "score", model[0], "--tokens", ids, "--output", "/proc/nothing_here.npy")


# --- folders


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model to break."""
    return shutil.copytree(model[0], tmp_path / "broken")


@pytest.mark.parametrize("command", ["score", "generate", "bench", "info"])
def test_every_command_refuses_a_folder_without_a_model(capsys, ids, tmp_path, command):
    options = {
        "score": ["--tokens", ids, "--output", tmp_path / "o.npy"],
        "generate": ["--prompt", "x"],
    }.get(command, [])
    assert "does not exist" in refused(capsys, command, tmp_path / "missing", *options)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(capsys, command, tmp_path / "empty", *options)
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "not valid JSON" in refused(capsys, command, tmp_path / "empty", *options)


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["bench", "--context", "96"]])
def test_half_a_safetensors_file(capsys, broken, command):
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert "safetensors" in refused(capsys, command[0], broken, *command[1:])
    weights.unlink()
    assert "safetensors" in refused(capsys, command[0], broken, *command[1:])


def test_index_topk_of_zero(capsys, broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"index_topk": 0}))
    assert "index_topk is 0; it must be at least 1" in refused(capsys, "generate", broken, "--prompt", "x")


# --- generate


@pytest.fixture
def expected(model):
    """The bytes that a prompt is continued with, by an engine of the command's sizes and so by its programs."""

    def tokens(prompt, max_tokens, **options):
        context = min(len(prompt) + max_tokens, CONFIG.max_position_embeddings)
        engine = Engine(model[1], CONFIG, max_batch=1, max_context=context, prefill_chunk=len(prompt))
        options["max_tokens"] = max_tokens
        request = engine.submit(prompt, **options)
        engine.run()
        return request.tokens

    return tokens


def test_generate_streams_text(capsys, model, expected):
    code, out, err = run(capsys, "generate", model[0], "--prompt", "def m", "--max-tokens", 20)
    assert (code, err) == (0, "")
    assert out == bytes(expected(b"def m", max_tokens=20)).decode("utf-8", "replace") + "\n"


def test_generate_samples_and_reads_files(capsys, model, expected, tmp_path):
    (tmp_path / "prompt").write_bytes(b"\xff\x00def")
    np.save(tmp_path / "prompt.npy", np.frombuffer(b"\xff\x00def", np.uint8))
    options = ["--max-tokens", 15, "--temperature", 1.0, "--top-p", 0.9, "--seed", 5]
    wanted = expected(b"\xff\x00def", max_tokens=15, temperature=1.0, top_p=0.9, seed=5)
    for name in ("prompt", "prompt.npy"):
        code, out, _ = run(capsys, "generate", model[0], "--prompt-file", tmp_path / name, *options)
        assert code == 0 and out == bytes(wanted).decode("utf-8", "replace") + "\n"


def test_generate_stops(capsys, model, expected):
    tokens = expected(b"abcde", max_tokens=30, temperature=1.3, seed=1)
    # A stop sequence of ASCII bytes that a command line can hold.
    at = next(i for i, token in enumerate(tokens) if 32 < token < 127)
    arguments = ["--prompt", "abcde", "--max-tokens", 30, "--temperature", 1.3, "--seed", 1, "--stop", chr(tokens[at])]
    code, out, _ = run(capsys, "generate", model[0], *arguments)
    assert code == 0 and out == bytes(tokens[:at]).decode("utf-8", "replace") + "\n"


IDS = " ".join(["97,98"] * 13)
WIDE = ["--page-size", 16, "--ignore-eos"]


def test_generate_prints_ids_of_a_larger_vocabulary(capsys, wide):
    code, out, _ = run(capsys, "generate", wide, "--tokens", IDS, "--max-tokens", 5, *WIDE)
    assert code == 0
    assert len([int(token) for token in out.split()]) == 5


def test_generate_is_cut_at_the_context(capsys, wide):
    code, out, _ = run(capsys, "generate", wide, "--tokens", IDS, "--max-tokens", 50, *WIDE)
    assert code == 0 and len(out.split()) == 6


def test_token_ids_in_every_form(capsys, wide, tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", np.array([97, 98] * 13, np.uint16))
    (tmp_path / "ids.txt").write_text("97, 98\n" * 13)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"97 98 " * 13)))
    forms = [("--tokens", IDS), ("--tokens", tmp_path / "ids.txt"), ("--tokens", tmp_path / "ids.npy")]
    forms += [("--prompt-file", tmp_path / "ids.npy"), ("--tokens", "-")]
    answers = {run(capsys, "generate", wide, *form, "--max-tokens", 5, *WIDE) for form in forms}
    ((code, out, err),) = answers
    assert (code, err) == (0, "") and len(out.split()) == 5
    # A stop sequence of ids ends it.
    first = out.split()[0]
    options = ["--max-tokens", 5, *WIDE, "--stop-tokens", "1 2", "--stop-tokens", first]
    assert run(capsys, "generate", wide, "--tokens", IDS, *options) == (0, "\n", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "ab"], "--prompt is text, and .* has a vocabulary of 300 tokens that are not bytes.* --tokens"),
        (["--prompt-file", "-"], "--prompt-file is text.* pass them with --tokens"),
        (["--tokens", "1", "--stop", "x"], "--stop is text.* pass them with --stop-tokens"),
        (["--tokens", "300"], "token id 300; the model's vocabulary is 0..299"),
        (["--tokens", "1 2 x"], "neither token ids, as in 1 2 3, nor a file"),
        (["--tokens", "-1"], "token id -1"),
        (["--tokens", "1 -"], "--tokens holds '-'; token ids"),
        (["--tokens", "9" * 40], "--tokens holds '9999"),
        (["--tokens", ""], "--tokens is empty"),
        (["--tokens", "/"], "--tokens '/' is not a file"),
        (["--tokens", "0 " * 32], "the prompt has 32 tokens; the model's context is 32"),
        (["--tokens", "1", "--prompt", "x"], "not allowed with"),
        (["--tokens", "1", "--stop-tokens", ""], "--stop-tokens is empty"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_generate_refuses_text_and_ids(capsys, wide, options, message):
    assert re.search(message, refused(capsys, "generate", wide, *options))


def test_generate_refuses_files_of_ids(capsys, wide, tmp_path):
    (tmp_path / "binary").write_bytes(b"1 2 \xff")
    (tmp_path / "words").write_text("1 two")
    for name, array in (("s", np.int64(3)), ("f", np.zeros(3)), ("two", np.zeros((1, 2), int))):
        np.save(tmp_path / f"{name}.npy", array)
        message = "a flat array of integer token ids is expected"
        assert message in refused(capsys, "generate", wide, "--tokens", tmp_path / f"{name}.npy")
    header = (tmp_path / "f.npy").read_bytes()
    (tmp_path / "huge.npy").write_bytes(header.replace(b"(3,), }", b"(99999999999999,), }"))
    assert "not a readable .npy file" in refused(capsys, "generate", wide, "--tokens", tmp_path / "huge.npy")
    assert "other bytes than digits" in refused(capsys, "generate", wide, "--tokens", tmp_path / "binary")
    assert "holds 'two'" in refused(capsys, "generate", wide, "--tokens", tmp_path / "words")
    assert "--tokens holds '\\x00" in refused(capsys, "generate", wide, "--tokens", "/dev/zero")


def test_a_tokenizer_in_the_folder_means_that_bytes_are_no_ids(capsys, broken):
    (broken / "tokenizer.json").write_text("{}")
    error = refused(capsys, "generate", broken, "--prompt", "x")
    assert "a vocabulary of 256 tokens that are not bytes. Tokenizers are not supported yet" in error


def test_generate_ends_at_the_ids_of_the_folder(capsys, broken, expected):
    free = expected(b"abcde", max_tokens=30, temperature=1.3, seed=1)
    arguments = ["generate", broken, "--prompt", "abcde", "--max-tokens", 30, "--temperature", 1.3, "--seed", 1]

    def text(tokens):
        return bytes(tokens).decode("utf-8", "replace") + "\n"

    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"eos_token_id": free[9]}))
    assert run(capsys, *arguments)[1] == text(free[: free.index(free[9])])
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[5], free[4]]}))
    assert run(capsys, *arguments)[1] == text(free[: min(free.index(free[5]), free.index(free[4]))])
    assert run(capsys, *arguments, "--ignore-eos")[1] == text(free)
    (broken / "generation_config.json").write_text('{"eos_token_id": 256}')
    assert "eos_token_id of " in refused(capsys, *arguments)
    (broken / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "is 'x'; a token id or a list of token ids" in refused(capsys, *arguments)


def test_generate_shows_that_it_compiles(capsys, model, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run(capsys, "generate", model[0], "--prompt", "def m", "--max-tokens", 20)[0] == 0
    assert re.search(r"compiling: +0%.* 0/2 ", sys.stderr.getvalue())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a" * 96], "the prompt has 96 tokens; the model's context is 96"),
        (["--prompt-file", "/nowhere/at/all"], "is not a file"),
        ([], "one of the arguments --prompt --prompt-file --tokens is required"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt", "a", "--max-tokens", 0], "--max-tokens is 0"),
        (["--prompt", "a", "--temperature", -1], "temperature is -1"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-p", 0], "top_p is 0"),
        (["--prompt", "a", "--seed", -1], "seed is -1"),
        (["--prompt", "a", "--stop", ""], "stop holds an empty sequence"),
        (["--prompt-file", ""], "--prompt-file is empty"),
        (["--prompt-file", "/dev/zero"], "the prompt has more than 96 tokens"),
        (["--prompt", "a", "--page-size", 10**9], "an engine of 1 pages of 1000000000 tokens"),
        (["--prompt", "a", "--page-size", 0], "page_size is 0"),
    ],
    ids=str,
)
def test_generate_refuses(capsys, model, options, message):
    assert message in refused(capsys, "generate", model[0], *options)


def test_generate_refuses_ids(capsys, model, wide, tmp_path):
    for array in (np.array([[1, 2]]), np.array([0.5]), np.array([1, 256]), np.int64(3)):
        np.save(tmp_path / "p.npy", array)
        assert "prompt" in refused(capsys, "generate", model[0], "--prompt-file", tmp_path / "p.npy")


# --- bench, info, the rest


def test_bench(capsys, model):
    arguments = [
        "bench",
        model[0],
        "--batch",
        4,
        "--context",
        64,
        "--steps",
        4,
        "--prefill-chunk",
        16,
        "--page-size",
        8,
    ]
    code, out, _ = run(capsys, *arguments, "--json")
    report = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert report["decode_tokens_per_second"] > 0 and report["milliseconds_per_step"] > 0
    assert (report["batch"], report["context"], report["steps"]) == (4, 64, 4)
    assert report["prompt_length"] > 20
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "decode_tokens_per_second" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", 0], "--batch is 0"),
        (["--steps", 0], "--steps is 0"),
        (["--batch", 10**7, "--prefill-chunk", 10**9, "--page-size", 1000], "slots are int32"),
        (["--json", ""], "--json is empty"),
        (["--page-size", 0], "--page-size is 0"),
        (["--context", 97], "--context is 97; the model's context is 96"),
        (["--context", 20], "Raise --context or lower --steps"),
        (["--batch", 10**9], "the prefill of 1000000000 prompts"),
    ],
)
def test_bench_refuses(capsys, model, options, message):
    options = options if "--context" in options else [*options, "--context", 96]
    assert message in refused(capsys, "bench", model[0], *options)


def test_info(capsys, model):
    code, out, _ = run(capsys, "info", model[0])
    assert code == 0
    for word in ("backend", "cpu", "fp8", "implementation of sparse_mla", "xla", "jaxlib", "cache bytes per token"):
        assert word in out
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0 and json.loads(out)["jax"] == jax.__version__


def test_info_counts_the_bytes_of_the_caches(capsys, model):
    report = json.loads(run(capsys, "info", model[0], "--json")[1])
    engine = Engine(model[1], CONFIG, max_batch=1, max_context=32)
    assert report["cache bytes per token, float8_e4m3fnuz"] == engine.bytes_per_token
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(model[1]))
    assert report["bytes of weights, float32"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model[1]))


def test_info_describes_layers_and_what_is_skipped(capsys, fixtures):
    report = json.loads(run(capsys, "info", fixtures / "mistral_large4_tiny", "--json")[1])
    assert report["family"] == "mistral_large4" and report["skipped"] == "15 tensors of the vision tower"
    assert report["layer 2"] == "attends to chosen keys, selection of layer 1, latents of layer 1, experts"
    assert report["layer 3"] == "attends to chosen keys, own indexer, no rotation, experts"
    report = json.loads(run(capsys, "info", fixtures / "dots3_note_tiny", "--json")[1])
    assert report["layers 2-3"] == "attends to the last 16 keys, 2 heads, latents of 96, experts"
    assert report["cache bytes per request, float32"] > 0 and report["skipped"] == "nothing"


@pytest.mark.parametrize(
    ("backend", "device", "architecture", "flavour"),
    [
        ("gpu", "AMD Instinct MI300X", "gfx942", "float8_e4m3fnuz"),
        ("gpu", "AMD Instinct MI355X", "gfx950", "float8_e4m3fn"),
        ("gpu", "NVIDIA H200", "9.0", "float8_e4m3fn"),
        ("cpu", "cpu", "x86_64", "both"),
    ],
)
def test_fp8_flavour(backend, device, architecture, flavour):
    assert fp8_flavour(backend, device, architecture).split(",")[0] == flavour


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["score"]])
def test_usage_errors(capsys, arguments):
    refused(capsys, *arguments)


def test_a_failing_device_is_one_line(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED:\n out of memory")

    monkeypatch.setattr("sparse_mla_jax.tools.info.describe_device", broken)
    code, _, err = run(capsys, "info")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", [["info"], ["generate", "MODEL", "--prompt", "x"]])
def test_a_platform_that_is_not_here(model, command):
    """JAX answers one without a plugin with an assertion of its own."""
    command = [model[0] if word == "MODEL" else word for word in command]
    process = subprocess.run(
        [sys.executable, "-m", "sparse_mla_jax", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "rocm"},
        timeout=120,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in process.stderr
    assert "JAX_PLATFORMS=cpu" in process.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["--version"]])
def test_help_is_quick(arguments):
    """It imports neither jax nor numpy."""
    code = f"import sys; sys.argv[1:] = {arguments!r}\nfrom sparse_mla_jax.__main__ import main\n"
    code += "try: main()\nexcept SystemExit as left: assert not left.code\n"
    code += "assert not {'jax', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout


def test_an_argument_with_a_line_break_is_one_line(capsys, model):
    assert "unrecognized arguments: --no such" in refused(capsys, "info", model[0], "--no\nsuch")
