"""Commands on several devices and in several processes: the same tokens, one line for what is wrong, and no hang."""

import dataclasses
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_models import SMALL
from support.marks import slow

from sparse_mla_jax.__main__ import main
from sparse_mla_jax.models import checkpoint, deepseek_v32
from sparse_mla_jax.serving.engine import Engine

pytestmark = pytest.mark.xdist_group("command line")

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    SMALL,
    vocab_size=300,
    num_hidden_layers=1,
    num_attention_heads=2,
    n_routed_experts=4,
    n_group=2,
    max_position_embeddings=8192,
)
# Seconds after which a process of a test is killed: many times what it takes.
LIMIT = 120
# Seconds in which a process notices that another has ended. It takes a tenth, and process 0 leaves a second later.
NOTICE = 20
PROMPT = "1 2 3 4 5"
GENERATE = [
    "--tokens",
    PROMPT,
    "--ignore-eos",
    "--temperature",
    "1",
    "--page-size",
    "16",
    "--cache-dtype",
    "float32",
    "--max-tokens",
    "8000",
]
TWO = ["--mesh", "tensor=2", "--distributed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, params) of a small random model, whose heads divide over two devices."""
    folder = tmp_path_factory.mktemp("model")
    params = deepseek_v32.init_params(jax.random.key(0), CONFIG)
    checkpoint.save_checkpoint(folder, CONFIG, params)
    return str(folder), params


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


class Processes:
    """Processes that run one command; all have ended when it is left.

    Args:
      command: what follows `python -m sparse_mla_jax`.
      devices: of each process.
      more: further options of each process.
      stdin: of process 0; the others have an empty one.
    """

    def __init__(self, *command, devices=(1, 1), more=((), ()), stdin=""):
        environment = {
            **os.environ,
            "JAX_COORDINATOR_ADDRESS": free_address(),
            "JAX_NUM_PROCESSES": str(len(devices)),
        }
        self.end = time.monotonic() + LIMIT
        self.started = [
            subprocess.Popen(
                [sys.executable, "-m", "sparse_mla_jax", *map(str, (*command, *own))],
                cwd=ROOT,
                env={**environment, "JAX_PROCESS_ID": str(number), "JAX_NUM_CPU_DEVICES": str(count)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number, (count, own) in enumerate(zip(devices, more, strict=True))
        ]
        for number, process in enumerate(self.started):
            process.stdin.write("" if number else stdin)
            process.stdin.close()
            process.stdin = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.started:
            process.kill()
            process.communicate()

    def results(self, seconds=None):
        """(exit code, stdout, stderr) of each process; fails with what they said if they take too long."""
        end = self.end if seconds is None else time.monotonic() + seconds
        try:
            said = [process.communicate(timeout=max(0.1, end - time.monotonic())) for process in self.started]
        except subprocess.TimeoutExpired:
            for process in self.started:
                process.kill()
            pytest.fail(f"not ended in time: {[process.communicate() for process in self.started]}")
        return [(process.returncode, *texts) for process, texts in zip(self.started, said)]

    def wait_for_tokens(self):
        """Waits until process 0 has written something, in the middle of its work."""
        ready = select.select([self.started[0].stdout], (), (), self.end - time.monotonic())[0]
        if not ready or not os.read(self.started[0].stdout.fileno(), 1):
            pytest.fail(f"no tokens: {self.results(1)}")


def check_one_line(text, *words):
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    assert all(word in text for word in words), text


# --- two processes. Each starts Python and jax: 3 s of processor time. The programs are compiled once for all tests of
# `generate`, whose sizes are the same, 10 s; then the cache of the run has them.


def test_two_processes_generate_the_tokens_of_one(model):
    """About 15 s: the tokens, that only process 0 reads stdin and prints, and that Gloo's lines are not among them."""
    engine = Engine(model[1], CONFIG, cache_dtype="float32", page_size=16, max_batch=1, max_context=64)
    request = engine.submit([int(word) for word in PROMPT.split()], max_tokens=12, temperature=1.0, ignore_eos=True)
    engine.run()
    stop = " ".join(map(str, request.tokens[-2:]))
    options = ["--tokens", "-", *GENERATE[2:], *TWO, "--stop-tokens", stop]
    with Processes("generate", model[0], *options, stdin=PROMPT) as started:
        first, second = started.results()
    assert first == (0, " ".join(map(str, request.tokens[:-2])) + " \n", "")
    assert second == (0, "", "")


@pytest.mark.parametrize(
    "ended_by", [signal.SIGKILL, slow(signal.SIGTERM), slow(signal.SIGINT)], ids=lambda number: number.name
)
def test_a_process_that_ends_ends_process_0(model, ended_by):
    """About 8 s, in the middle of thousands of tokens. SIGTERM is what a batch system sends."""
    with Processes("generate", model[0], *GENERATE, *TWO) as started:
        started.wait_for_tokens()
        started.started[1].send_signal(ended_by)
        first, second = started.results(NOTICE)
    assert first[0] == 1
    check_one_line(first[2], "one of them has ended")
    interrupted = ended_by == signal.SIGINT
    assert second == ((130, "", "interrupted\n") if interrupted else (-ended_by, "", ""))


@pytest.mark.slow
def test_process_0_that_ends_ends_the_others(model):
    """About 10 s. The runtime's client aborts the process if it is faster than the failing step."""
    with Processes("generate", model[0], *GENERATE, *TWO) as started:
        started.wait_for_tokens()
        started.started[0].kill()
        _, second = started.results(NOTICE)
    assert second[0] in (1, -signal.SIGABRT)
    assert "one of them has ended" in second[2] or "another task died" in second[2]


@pytest.mark.slow
def test_score_in_two_processes(model, tmp_path):
    """About 30 s. Four devices in two processes; the file is that of one process with one device."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 20)))
    command = ["score", model[0], "--tokens", tmp_path / "ids.npy", "--page-size", 4, "--output"]
    mesh = ["--mesh", "data=2,tensor=2", "--distributed"]
    with Processes(*command, tmp_path / "two.npy", *mesh, devices=(2, 2)) as started:
        first, second = started.results()
    assert first[0] == 0 and first[1].startswith("wrote float32 logits [2, 20, 300]") and first[2] == ""
    assert second == (0, "", "")
    assert main([str(word) for word in (*command, tmp_path / "one.npy")]) == 0
    np.testing.assert_allclose(np.load(tmp_path / "two.npy"), np.load(tmp_path / "one.npy"), atol=2e-5)


@pytest.mark.slow
def test_bench_in_two_processes(model):
    """About 30 s."""
    sizes = {"--batch": 2, "--context": 48, "--steps": 2, "--prefill-chunk": 16, "--page-size": 8}
    options = [word for pair in sizes.items() for word in pair]
    mesh = ["--mesh", "data=2,context=2", "--distributed", "--json"]
    with Processes("bench", model[0], *options, *mesh, devices=(2, 2)) as started:
        first, second = started.results()
    assert first[0] == 0 and first[2] == "" and second == (0, "", "")
    assert json.loads(first[1])["decode_tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--tokens", "-"], "the prompt is empty"),
        slow(["--tokens", "300"], "the model's vocabulary is 0..299"),
        slow(["--mesh", "tensor=1"], "the 2 processes have 2 together"),
        slow(["--mesh", "context=2", "--page-size", "0"], "page_size is 0"),
    ],
    ids=["stdin", "ids", "mesh", "pages"],
)
def test_what_is_refused_ends_all_processes(model, change, message):
    """About 4 s."""
    options = [*GENERATE, *TWO, *change]
    with Processes("generate", model[0], *options) as started:
        results = started.results()
    for code, out, err in results:
        assert (code, out) == (2, "")
        check_one_line(err, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        slow(
            {"more": ((), ("--dtype", "bfloat16"))},
            'option dtype is "float32" in process 0 and "bfloat16" in process 1',
        ),
        slow({"devices": (1, 2)}, "the processes have 1, 2 devices"),
    ],
    ids=["options", "devices"],
)
def test_processes_must_be_alike(model, change, message):
    """About 4 s."""
    with Processes("generate", model[0], *GENERATE, *TWO, **change) as started:
        for code, out, err in started.results():
            assert (code, out) == (2, "")
            check_one_line(err, message)


@pytest.mark.slow
def test_what_one_process_lacks_is_said_by_all(model, tmp_path):
    """About 8 s: a folder without weights, and another model under the same name."""
    empty = tmp_path / "model"
    empty.mkdir()
    config = json.loads((pathlib.Path(model[0]) / "config.json").read_text())
    for changed, message in (
        ({}, "process 1: "),
        ({"index_topk": 8}, f"the config's index_topk is {CONFIG.index_topk} in process 0"),
    ):
        (empty / "config.json").write_text(json.dumps(config | changed))
        options = [*GENERATE, *TWO]
        with Processes("generate", *options, more=((model[0],), (empty,))) as started:
            for code, out, err in started.results():
                assert (code, out) == (2, "")
                check_one_line(err, message)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.slow
def test_a_process_that_stays_alone(model, number):
    """About 5 s: it does not wait for ever, and the runtime's own time-out does not come first."""
    code = "import sys; from sparse_mla_jax.tools import processes; processes._JOIN_SECONDS = 2\n"
    code += "from sparse_mla_jax.__main__ import main; main()"
    place = ["--coordinator", free_address(), "--processes", "2", "--process", str(number)]
    ended = subprocess.run(
        [sys.executable, "-c", code, "generate", model[0], *GENERATE, *TWO, *place],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    check_one_line(ended.stderr, "have not found each other within 2 s")


# --- in this process


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mesh tensr=2", "'tensr=2' in it; sizes of the axes data, context, tensor are expected"),
        ("--mesh tensor=x", "tensor is 'x', a number of devices is expected"),
        ("--mesh tensor=0", "tensor is 0"),
        ("--mesh tensor=16", "has 16 devices; there are 8"),
        ("--mesh tensor=4", "num_attention_heads is 2. Sizes of tensor that divide it are 1, 2"),
        ("--coordinator a:1", "--coordinator can not be used without --distributed"),
        ("--processes 2 --process 0", "--processes and --process can not be used without --distributed"),
        ("--distributed", "--distributed is given without --mesh"),
        ("--distributed --mesh tensr=2", "'tensr=2' in it"),
        ("--distributed --mesh tensor=2 --coordinator a", "--coordinator is 'a'; the address of process 0 and a free"),
        ("--distributed --mesh tensor=2 --coordinator a:99999", "--coordinator is 'a:99999'"),
        ("--distributed --mesh tensor=2 --coordinator a:1 --processes 2 --process 2", "this is process 2 of 2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["generate", slow("score"), slow("bench")])
def test_what_is_refused(capsys, model, tmp_path, command, options, message):
    np.save(tmp_path / "ids.npy", np.zeros((2, 4), int))
    arguments = {
        "generate": ["--tokens", "1"],
        "score": ["--tokens", tmp_path / "ids.npy", "--output", tmp_path / "out.npy"],
        "bench": ["--context", "96"],
    }
    code = main([command, model[0], *map(str, arguments[command]), *options.split()])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    check_one_line(err, message)


def test_the_environment_is_checked(capsys, model, monkeypatch):
    command = ["generate", model[0], "--tokens", "1", "--mesh", "tensor=2", "--distributed"]
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    assert main(command) == 2
    check_one_line(capsys.readouterr().err, "JAX_NUM_PROCESSES is 'two'; a number is expected")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    assert main(command) == 2
    check_one_line(capsys.readouterr().err, "JAX_COORDINATOR_ADDRESS is 'host'")


def test_a_port_that_is_taken(capsys, model):
    """jax would crash."""
    with socket.create_server(("", 0)) as taken:
        options = ["--coordinator", f"localhost:{taken.getsockname()[1]}", "--processes", "2", "--process", "0"]
        assert main(["generate", model[0], "--tokens", "1", *TWO, *options]) == 2
    check_one_line(capsys.readouterr().err, "whose port can not be used (Address already in use)")


def test_a_place_that_nothing_says(capsys, model, monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert main(["generate", model[0], "--tokens", "1", "--mesh", "tensor=2", "--distributed"]) == 2
    check_one_line(capsys.readouterr().err, "Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID")


def test_kernels_have_no_mesh(capsys):
    assert main(["bench", "topk", "--mesh", "data=2"]) == 2
    check_one_line(capsys.readouterr().err, "--mesh belongs to `bench MODEL_DIR`")


@pytest.mark.slow
def test_generate_on_a_mesh_of_one_process(capsys, model):
    """About 10 s, programs for one and for four devices: the tokens of one device."""
    command = ["generate", model[0], *GENERATE, "--max-tokens", "6"]
    said = []
    for mesh in ([], ["--mesh", "tensor=2,context=2"]):
        assert main([*command, *mesh]) == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1] and said[0].err == "" and len(said[0].out.split()) == 6
