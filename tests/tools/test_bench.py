"""The kernel benchmark on a CPU: its shapes at full size as shapes only, its harness on shrunk ones."""

import copy
import dataclasses
import functools
import json
import pathlib
import re
import runpy
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.marks import slow

from sparse_mla_jax.__main__ import main
from sparse_mla_jax.cases import answers, catalogue, indexer, inputs, topk
from sparse_mla_jax.cases.case import FP8
from sparse_mla_jax.cases.catalogue import AREAS, CASES
from sparse_mla_jax.tools import output
from sparse_mla_jax.tools.bench import device_timing, report
from sparse_mla_jax.tools.bench import run as bench

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "readme_table.py"
SETTINGS = bench.Settings(
    repeats=2, shrink=True, peers=False, implementation=None, ceilings=device_timing.Ceilings(100.0, 1.0)
)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of `bench`."""
    try:
        code = main(["bench", *map(str, arguments)])
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line that a refused command prints."""
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


# --- the list


def test_the_list_is_sane():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.area for case in CASES} == set(AREAS)
    for case in CASES:
        assert case.name.startswith(f"{case.area}-")
        assert None in (case.reach, case.floor) or case.reach <= case.floor
        assert {*case.parts, *([case.at_most[1]] if case.at_most else [])} <= set(names)
        assert list(case.variants())
    without = {"topk", "projection", "streams"}
    assert all(case.flavours == ("",) if case.area in without else set(FP8) <= set(case.flavours) for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_traces_at_full_size(case):
    flavour, query = next(case.variants())
    work = catalogue.build(case, flavour, query)
    shapes = jax.eval_shape(work.arguments)
    out = jax.eval_shape(functools.partial(work.fn, implementation="xla"), *shapes)
    # Nothing is counted that is not there: outputs and what differs between calls are moved in any case.
    state = jax.eval_shape(work.state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out[: len(state)] if state else ()) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    fresh = () if state else out
    assert inputs.nbytes(fresh) < work.bytes < 2e9 * case.sizes.get("layers", 1)


@pytest.mark.parametrize(
    ("name", "size", "flops"),
    [
        ("topk-32x32768", 32 * (32768 + 2048) * 4, 0),
        ("topk-64x131072-length4096", 64 * (4096 + 2048) * 4, 0),
        # A row: 512 values, 4 scales, 64 of rope; its slot. Queries and results in bfloat16.
        (
            "decode-v32-b32-h16-k2048",
            32 * 2048 * (512 + 16 + 128 + 4) + 2 * 32 * 16 * (576 + 512),
            2 * 32 * 16 * 2048 * (576 + 512),
        ),
        (
            "decode-v4-b1-h128-k2048",
            2048 * (448 + 7 + 128 + 4) + 2 * 128 * (512 + 512),
            2 * 128 * 2048 * (512 + 512),
        ),
        # A chunk's ring and all entries, once; slots of every token's keys.
        (
            "prefill-v4-t2048-h64-w128-k512",
            (127 + 2048 + 8192) * (448 + 7 + 128) + 4 * 2048 * 640 + 2 * 2048 * 64 * (512 + 512),
            2 * 2048 * 64 * 640 * (512 + 512),
        ),
        (
            "projection-rotated-t32",
            2 * (32 * 64 * 512 + 8 * 4096 * 1024 + 32 * 8 * 1024) + 32 * 4,
            2 * 32 * 8 * 4096 * 1024,
        ),
        ("projection-norm-v32-query-t32", 32 * (2 * 2 * (64 * 128 + 128 * 192) + 4), 0),
        (
            "streams-sublayer-t128",
            2 * 128 * 4096 * (4 + 1 + 1 + 4) + 4 * (4 * 4096 * 24 + 24 + 3 + 4096),
            2 * 128 * 4 * 4096 * 24,
        ),
        ("indexer-2048x32768", None, 2 * 2048 * 32768 * 64 * 128),
        (
            "indexer-paged-64x65536",
            64 * 65536 * (128 + 4 + 4) + 64 * (64 * 128 * 2 + 64 * 4 + 1024 * 4 + 8),
            2 * 64 * 65536 * 64 * 128,
        ),
    ],
)
def test_bytes_and_flops(name, size, flops):
    case = catalogue.case(name)
    work = catalogue.build(case, *next(case.variants()))
    assert work.flops == flops and size in (None, work.bytes)


def test_targets():
    case = catalogue.case("indexer-2048x32768")
    assert case.reach == pytest.approx(1099.5, abs=0.1) and case.floor == pytest.approx(case.reach / 0.45)
    assert catalogue.case("topk-256x131072").floor == pytest.approx(95.2)
    assert catalogue.case("topk-1024x8192").floor == pytest.approx(30.8)
    assert [bench.verdict(us, 9, 14) for us in (9, 14, 14.1)] == ["reach", "pass", "FAIL"]
    assert (bench.verdict(1, None, None), bench.verdict(6, 5, None)) == ("", "FAIL")


@pytest.mark.parametrize("seed", range(20))
def test_the_answer_of_top_k(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.standard_normal(rng.integers(1, 60)), 1).astype(np.float32)
    k = int(rng.integers(1, 50))
    want = np.sort(np.argsort(-scores, kind="stable")[:k])
    np.testing.assert_array_equal(answers.selected(scores, k), want)


def test_slots_are_distinct_and_of_ones_own():
    make = jax.jit(lambda own: inputs.random_slots(inputs.seed(1), 4, 20, 1024, own=own), static_argnums=0)
    for own in (True, False):
        slots = np.asarray(make(own))
        assert all(len(set(row)) == 20 for row in slots) and slots.min() >= 0 and slots.max() < 1024
        assert not own or len(set(slots.ravel())) == 80


# --- the harness


# By default two of each area, of one kernel each, and of the steps both families.
@pytest.mark.parametrize(
    ("name", "flavour", "query"),
    [
        ("topk-32x8192", "", ""),
        slow("topk-64x131072-length4096", "", ""),
        slow("topk-64x32768-plateau", "", ""),
        slow("indexer-1024x8192", FP8[0], "bfloat16"),
        ("indexer-paged-8x16384", FP8[1], FP8[1]),
        ("indexer-select-64x65536", FP8[0], "bfloat16"),
        ("decode-v4-b128-h16-k2048-ragged", FP8[0], ""),
        slow("prefill-t1024-h16-k2048", "bfloat16", ""),
        slow("decode-v4-b128-h64-w128-k256-of-8192", FP8[1], ""),
        ("prefill-v4-t2048-h64-w128-k512", FP8[0], ""),
        slow("prefill-v4-t2048-h64-w128-all-of-256", FP8[1], ""),
        ("cache-v4-t128", FP8[0], ""),
        ("cache-compress-4-b128", FP8[0], ""),
        ("projection-rotated-t32", "", ""),
        slow("projection-norm-v32-hidden-t32", "", ""),
        ("projection-norm-v32-query-t32", "", FP8[1]),
        slow("projection-norm-v32-query-t32", "", "bfloat16"),
        ("projection-norm-v4-hidden-t32", "", ""),
        slow("projection-norm-v4-query-t32", "", ""),
        ("streams-split-t32", "", ""),
        slow("streams-merge-t1", "", ""),
        ("streams-sublayer-t32", "", ""),
        ("step-v32-attention-b64-h16", FP8[1], ""),
        slow("step-v4-ratio4-b32", FP8[0], ""),  # the layers of the next case in small
        ("step-v4-b128-43-layers", FP8[1], ""),
    ],
)
def test_a_shrunk_case_is_right(monkeypatch, name, flavour, query):
    case, seen, build = catalogue.case(name), [], catalogue.build

    def recorded(*args, **kwargs):
        work = build(*args, **kwargs)

        def error(arguments, out):
            seen.append((work, arguments, out))
            return work.error(arguments, out)

        return dataclasses.replace(work, error=error)

    monkeypatch.setattr(catalogue, "build", recorded)
    row = bench.measure(case, flavour, query, SETTINGS)
    assert row["failure"] is None and row["error"] <= row["error_bound"] and row["us"] > 0
    assert row["in_place"] is (True if case.area in ("cache", "step") else None)
    assert (row["reach"], row["floor"], row["verdict"]) == (None, None, "")
    json.dumps(row)
    ((work, arguments, out),) = seen
    if case.area not in ("cache", "step"):
        leaves, tree = jax.tree.flatten(out)
        for i, leaf in enumerate(leaves):
            other, missing = np.array(leaf), np.array(leaf)
            other.flat[0] = -other.flat[0] - 1
            missing[-1] = np.nan if missing.dtype.kind != "i" else -1
            for spoiled in (other, missing) if case.area != "topk" else (other,):
                got = tree.unflatten([*leaves[:i], spoiled, *leaves[i + 1 :]])
                assert not work.error(arguments, got) <= work.bound


def test_a_wrong_result_is_a_failure(monkeypatch):
    top_k = topk.top_k
    monkeypatch.setattr(topk, "top_k", lambda *a, **k: top_k(*a, **k).at[0, 0].add(1))
    row = bench.measure(catalogue.case("topk-1x8192"), "", "", SETTINGS)
    assert row["failure"] == "wrong: error 1 above 0" and row["us"] > 0


def test_a_write_elsewhere_is_caught():
    work = catalogue.build(catalogue.case("cache-v32-t128"), FP8[1], shrink=True)
    arguments, write = work.arguments(), jax.jit(work.fn)
    *rows, slots = arguments[2:]
    good = write(*arguments)
    assert work.error(arguments, good) <= work.bound
    elsewhere = write(*arguments[:2], *rows, (slots + 1) % 1024)
    doubled = write(*arguments[:2], 2 * rows[0], rows[1], 2 * rows[2], slots)
    everywhere = dataclasses.replace(good[0], scale=good[0].scale * 2)
    for bad in [(elsewhere[0], good[1]), (good[0], elsewhere[1]), (doubled[0], good[1]), (everywhere, good[1])]:
        assert not work.error(arguments, bad) <= work.bound
    assert not work.error(arguments, (good[0], doubled[1])) <= work.bound


def test_donated_caches_that_are_copied(monkeypatch):
    jit = jax.jit
    monkeypatch.setattr(bench.jax, "jit", lambda fn, donate_argnums=(), **options: jit(fn, **options))
    row = bench.measure(catalogue.case("cache-v32-t128"), FP8[1], "", SETTINGS)
    assert row["in_place"] is False and "were copied" in row["failure"]


def test_one_failure_stops_no_other(capsys, monkeypatch, tmp_path):
    measure = bench.measure

    def fails(case, *rest):
        if case.name == "topk-1x8192":
            raise RuntimeError("kernel\nbroke")
        if case.name == "topk-1x32768":
            raise bench.NotSupported("k is too large")
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", fails)
    file = tmp_path / "run.json"
    code, out, err = run(capsys, "topk", "--case", "topk-1x", "--repeats", 1, "--no-peers", "--json", file)
    assert code == 1 and "topk-1x8192: RuntimeError: kernel broke" in err
    assert "not supported: k is too large" in out and "RuntimeError: kernel broke" in out
    rows = json.loads(file.read_text())["results"]
    assert [row["us"] is None for row in rows] == [True, True, False]


def test_a_missed_target_fails(capsys, monkeypatch):
    """A time above its floor, one above a reach without a floor, and a ratio to another case."""
    measure = bench.measure
    targets = {
        "topk-64x32768": {"reach": 1e-9, "floor": 2e-9, "verdict": "FAIL"},
        "topk-64x32768-up": {"at_most": (1e-9, "topk-64x32768")},
        "topk-64x32768-down": {"reach": 1e9, "floor": 2e9, "verdict": "reach"},
        "topk-64x32768-plateau": {"reach": 3e-9, "verdict": "FAIL"},
    }
    monkeypatch.setattr(bench, "measure", lambda case, *rest: measure(case, *rest) | targets.get(case.name, {}))
    code, out, err = run(capsys, "topk", "--case", "64x32768", "--repeats", 1, "--no-peers")
    missed = [line for line in err.splitlines() if "FAIL" in line]
    assert code == 1 and "FAIL" in out and len(missed) == 3
    assert re.fullmatch(r"topk-64x32768: FAIL, \S+ us above 2.0e-09 us", missed[0])
    assert re.fullmatch(r"topk-64x32768-up: FAIL, \S+ x topk-64x32768, above 1e-09 x", missed[1])
    assert re.fullmatch(r"topk-64x32768-plateau: FAIL, \S+ us above 3.0e-09 us", missed[2])


def test_refusals_of_the_library_are_not_failures(monkeypatch):
    def refuses(*args, **kwargs):
        raise ValueError("no FP8 queries")

    monkeypatch.setattr(indexer, "indexer_scores", refuses)
    with pytest.raises(bench.NotSupported, match="no FP8 queries"):
        bench.measure(catalogue.case("indexer-1024x8192"), FP8[0], FP8[0], SETTINGS)


# --- the command


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """(folder, document) of a small run, peers included."""
    folder = tmp_path_factory.mktemp("bench")
    code = main(
        [
            *("bench", "topk", "--case", "64x32768", "--repeats", "2"),
            *("--json", str(folder / "run.json"), "--plot", str(folder / "bench.png")),
        ]
    )
    assert code == 0
    return folder, json.loads((folder / "run.json").read_text())


def test_json_round_trip(document):
    folder, found = document
    assert report.load(str(folder / "run.json")) == found
    assert found["method"] == "wall clock" and found["shrunk"] and found["repeats"] == 2
    assert found["machine"]["device"] and found["machine"]["jax"] == jax.__version__
    assert min(found["ceilings"].values()) > 0
    assert len(found["results"]) == 6
    for row in found["results"]:
        assert row["error"] == 0 and row["peers"]["lax_top_k"] > 0 and "xla" not in row["peers"]
        assert row["percent_of_ceiling"] == pytest.approx(100 * row["gbps"] / found["ceilings"]["read_gbps"])
    assert (folder / "bench.png").stat().st_size > 10_000


def test_json_on_standard_output(capsys):
    code, out, _ = run(capsys, "topk", "--case", "k512", "--repeats", 1, "--no-peers", "--json")
    assert code == 0 and out.count("\n") == 1
    assert [row["case"] for row in json.loads(out)["results"]] == ["topk-32x32768-k512"]


def test_what_is_asked_for():
    assert len(bench.variants(None, None, None)) == sum(len(list(case.variants())) for case in CASES)
    found = bench.variants("indexer", "paged-1x", FP8[1])
    assert [query for _, _, query in found] == ["bfloat16", FP8[1]] and {kind for _, kind, _ in found} == {FP8[1]}
    # What has no cache is in every flavour.
    assert len(bench.variants("topk", None, "bfloat16")) == len(bench.variants("topk", None, None))
    found = bench.variants(None, None, "bfloat16")
    assert {case.area for case, _, _ in found} == {"topk", "prefill", "projection", "streams"}
    found = bench.variants("projection", "v32-query-t32", None)
    assert [(kind, query) for _, kind, query in found] == [("", "bfloat16"), ("", FP8[0]), ("", FP8[1])]


def test_implementation_is_timed_beside_xla(capsys):
    options = ("--case", "topk-1x8192", "--repeats", 1, "--implementation", "reference", "--json")
    (row,) = json.loads(run(capsys, "topk", *options)[1])["results"]
    assert row["peers"]["xla"] > 0


def test_compare(capsys, document, tmp_path):
    _, found = document
    old = copy.deepcopy(found)
    for row, factor in zip(old["results"], (0.5, 1, 1 / 1.05, 2, 1, 1)):
        row["us"] *= factor
    old["results"][4]["us"] = None
    old["results"][5]["sizes"]["rows"] = 99
    old["machine"]["device"] = "another"
    text = report.report(found, old)
    lines = {line.split()[0]: line for line in text.split("\n") if line.startswith("topk-")}
    assert [("slower" in lines[row["case"]]) for row in found["results"]] == [True, False, False, False, False, False]
    assert "2.00  slower" in lines[found["results"][0]["case"]]
    assert text.endswith(f"slower than 1.1 times the earlier run: {found['results'][0]['case']} 2.00 x")
    assert "another machine: another" in text
    assert "earlier" not in report.report(found)
    # Slower is no failure.
    old["results"] = [row | {"us": 1e-9} for row in found["results"]]
    (tmp_path / "old.json").write_text(json.dumps(old))
    options = ("--case", "64x32768-up", "--repeats", 1, "--no-peers", "--compare", tmp_path / "old.json")
    code, out, _ = run(capsys, "topk", *options)
    assert code == 0 and "slower" in out


def test_relations_and_parts():
    def row(name, us, flavour="", query="", at_most=None):
        return {"case": name, "us": us, "flavour": flavour, "query": query, "at_most": at_most}

    rows = [
        row("topk-64x32768", 10.0),
        row("topk-64x32768-up", 31.0, at_most=(3.0, "topk-64x32768")),
        row("topk-64x65536", 20.0),
        row("indexer-paged-64x65536", 150.0, "a", "q"),
        row("indexer-paged-64x65536", 140.0, "b", "q"),
        row("indexer-select-64x65536", 165.0, "b", "q"),
        row("indexer-select-64x65536", None, "a", "q"),
    ]
    bench.relate(rows)
    assert rows[1]["relation"] == {"to": "topk-64x32768", "ratio": 3.1, "at_most": 3.0, "verdict": "FAIL"}
    assert rows[5]["parts_us"] == 160.0 and rows[0]["parts_us"] is None


def test_the_readme_table(capsys, document):
    folder, found = document
    script = runpy.run_path(str(SCRIPT))
    assert script["main"]([str(folder / "run.json")]) == 0
    head, empty, *lines = capsys.readouterr().out.strip().split("\n")
    assert "shrunk sizes" in head and empty == ""
    assert len(lines) == 2 + 6 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| topk-64x32768 |  | ") and "lax.top_k µs" in lines[0]
    assert script["main"]([str(folder / "run.json"), "--area", "decode"]) == 2
    assert "no case was timed" in capsys.readouterr().err
    assert script["main"]([str(folder / "bench.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    wrong = copy.deepcopy(found)
    wrong["results"][0]["failure"] = "wrong: error 1"
    assert "(wrong)" in report.markdown(wrong, text="64x32768")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nonsense"], "no area"),
        (["topk", "--case", "nonsense"], "names are topk-1x8192"),
        (["decode", "--flavour", "bfloat16"], "is taken by none"),
        (["decode", "--flavour", "int8"], "invalid choice"),
        (["topk", "--repeats", 0], "--repeats is 0"),
        (["topk", "--batch", 2], "--batch belongs to `bench MODEL_DIR`"),
        (["--cache-dtype", "float32"], "--cache-dtype belongs to `bench MODEL_DIR`"),
        (["--distributed"], "--distributed belongs to `bench MODEL_DIR`"),
        (["--process", "0"], "--process belongs to `bench MODEL_DIR`"),
        (["examples/tiny_python", "--case", "topk"], "--case belongs to `bench [AREA]`"),
        (["examples/tiny_python", "--no-peers"], "--peers belongs to `bench [AREA]`"),
        (["--json", "examples"], "is a folder"),
        (["topk", "--json", "missing/folder/x.json"], "does not exist"),
        (["topk", "--plot", "missing/folder/x.png"], "does not exist"),
        (["topk", "--plot", "picture.nonsense"], "ends in one of"),
        (["topk", "--compare", "missing.json"], "is not a file"),
        (["topk", "--compare", "pyproject.toml"], "not valid JSON"),
        (["topk", "--compare", "benchmarks/cdna_counts.json"], "does not hold kernel times"),
        (["topk", "--json", ""], "--json is empty"),
        (["topk", "--plot", ""], "--plot is empty"),
        (["topk", "--compare", ""], "is not a file"),
    ],
)
def test_bad_options(capsys, monkeypatch, options, message):
    monkeypatch.chdir(SCRIPT.parents[1])
    assert message in refused(capsys, *options)


@pytest.mark.parametrize(
    "change",
    [{"machine": 3}, {"results": {}}, {"results": [1]}, {"results": [{}]}, {"us": "x"}, {"sizes": None}],
    ids=str,
)
def test_documents_that_can_not_be_compared(capsys, document, tmp_path, change):
    found = copy.deepcopy(document[1])
    if not set(change) <= set(found):
        found["results"][0] |= change
    (tmp_path / "old.json").write_text(json.dumps(found | change))
    assert "does not hold kernel times" in refused(capsys, "topk", "--compare", tmp_path / "old.json")


def test_plot_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setattr(output, "has_matplotlib", lambda: False)
    assert "pip install 'sparse-mla-jax[plot]'" in refused(capsys, "topk", "--plot", "x.png")


# --- timing


class Counters:
    """CUPTI's extension: every call of the counted function launches `kernels`."""

    def __init__(self, kernels):
        self.kernels, self.started, self.calls, self.finished = kernels, None, 0, 0

    def _cupti_init(self):
        self.started = self.calls

    def _cupti_get_timings(self, finalize):
        self.finished += 1
        return [kernel for call in range(self.started, self.calls) for kernel in self.kernels(call)]

    def counted(self, x):
        self.calls += 1
        return jnp.asarray(x)


@pytest.fixture
def counters(monkeypatch):
    """Makes `time_calls` read counters that launch what a function says."""
    profiler = pytest.importorskip("jax.experimental.mosaic.gpu.profiler")

    def install(kernels):
        made = Counters(kernels)
        monkeypatch.setattr(profiler, "mosaic_gpu_lib", types.SimpleNamespace(_mosaic_gpu_ext=made))
        monkeypatch.setattr(device_timing, "method", lambda: device_timing.CUPTI)
        monkeypatch.setattr(device_timing, "L2_BYTES", 1 << 10)
        return made

    device_timing._twice_the_cache.cache_clear()
    yield install
    device_timing._twice_the_cache.cache_clear()


def test_times_are_the_devices(counters):
    made = counters(lambda call: [("a", 1e-3 * call), ("b", 0.5), ("a", 0.0)])
    timing = device_timing.time_calls(made.counted, [(0,), (1,)], calls=5)
    # Call 0 is not timed; calls 1 to 5 take 501 .. 505 us.
    assert (timing.microseconds, timing.low, timing.high) == pytest.approx((503, 501, 505))
    assert [(k.name, k.launches) for k in timing.kernels] == [("b", 1), ("a", 2)]
    assert timing.kernels[1].microseconds == pytest.approx(3) and timing.launches == 3
    assert (timing.method, made.finished, made.calls) == (device_timing.CUPTI, 1, 11)


def test_calls_that_differ_in_their_kernels(counters):
    made = counters(lambda call: [("loop", 1e-3)] * (1 + call % 2))
    timing = device_timing.time_calls(made.counted, [(0,)], calls=4)
    # Once all together, in vain; then one by one, each after a call that is not timed.
    assert made.finished == 5 and timing.calls == 4 and timing.kernels[0].name == "loop"


def test_no_kernel_is_an_error(counters):
    made = counters(lambda call: [])
    with pytest.raises(RuntimeError, match="no kernel"):
        device_timing.time_calls(made.counted, [(0,)], calls=2)


def test_sets_rotate_and_the_state_moves_on():
    seen = []

    def fn(state, x):
        seen.append((int(state), x))
        return jnp.asarray(state + 1), x

    timing = device_timing.time_calls(fn, [(0,), (1,), (2,)], calls=4, state=(jnp.int32(0),))
    assert seen == [(i, i % 3) for i in range(9)] and timing.method == "wall clock"
    assert timing.kernels == () and timing.low <= timing.microseconds <= timing.high


@pytest.mark.parametrize(
    ("touched", "held", "calls", "wanted"),
    [
        (device_timing.L2_BYTES, 1, 30, 3),
        (10 * device_timing.L2_BYTES, 1, 30, 2),
        (1000, 1000, 30, 31),
        (1000, 30 << 30, 30, 1),
        (0, 0, 3, 4),
    ],
)
def test_number_of_sets(touched, held, calls, wanted):
    assert device_timing.number_of_sets(touched, held, calls) == wanted


def test_percent_of_the_nearer_ceiling():
    assert device_timing.Ceilings(4000, 800).percent(1000, 400) == 50
    with pytest.raises(ValueError, match="calls is 0"):
        device_timing.time_calls(lambda: 0, [()], calls=0)
    with pytest.raises(ValueError, match="sets is empty"):
        device_timing.time_calls(lambda: 0, [], calls=1)


def test_peers_that_fail_are_named(monkeypatch):
    settings = bench.Settings(1, True, True, None, device_timing.Ceilings(1, 1))
    monkeypatch.setattr(bench, "method", lambda: device_timing.CUPTI)
    monkeypatch.setattr(bench, "torch_topk", lambda *a, **k: "torch has no CUDA")
    monkeypatch.setattr(bench, "PEER_BYTES", -1)
    row = bench.measure(catalogue.case("topk-1x8192"), "", "", settings)
    assert row["peers"] == {"lax_top_k": "needs 0 GiB", "torch_topk": "torch has no CUDA"}
    assert row["failure"] is None and "-" in report.area_table([row])
    monkeypatch.undo()
    # Without torch there is no entry.
    monkeypatch.setattr(bench, "method", lambda: device_timing.CUPTI)
    monkeypatch.setitem(sys.modules, "torch", None)
    row = bench.measure(catalogue.case("topk-1x8192"), "", "", settings)
    assert set(row["peers"]) == {"lax_top_k"}


def test_kernels_of_a_step_are_listed(document):
    found = copy.deepcopy(document[1])
    row = found["results"][0]
    row |= {"area": "step", "launches": 3, "kernels": [{"name": "fusion_1", "launches": 3, "us": 12.3}]}
    text = report.report(found)
    assert "3 launches" in text and "fusion_1" in text and "12.3" in text


def test_layers_and_transfers_of_a_step_are_reported(document):
    row = copy.deepcopy(document[1]["results"][0])
    row |= {"area": "step", "us": 300.0, "wall_us": 320.0, "launches": 90, "kernels": [], "host_transfers": []}
    row["sizes"] = {"batch": 4, "layers": 10}
    line = report.kernel_table(row).split("\n")[0]
    assert "80.0 us a token; 9.00 launches and 30.0 us a layer; host transfers: none" in line
    row["host_transfers"] = ["while.3"]
    assert report.kernel_table(row).split("\n")[0].endswith("host transfers: while.3")


def test_what_needs_the_host_is_found():
    def harmless(x):
        return jnp.sort(jax.lax.fori_loop(0, 20, lambda i, x: x * 1.5 + 1, x))

    def unknown(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1000, lambda x: x * 2, x)

    def branches(x):
        return jax.lax.cond(x.sum() > 3, lambda x: jnp.sort(x) * 2, lambda x: jnp.cumsum(x) + 1, x)

    def calls(x):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    found = [
        bench.host_transfers(jax.jit(f).lower(jnp.ones(4, jnp.float32)).compile().as_text())
        for f in (harmless, unknown, calls, branches)
    ]
    assert [len(names) for names in found] == [0, 1, 1, 1], found
    assert found[1][0].startswith("while") and "callback" in found[2][0]
    message = "  %done = (f32[4], u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true"
    assert bench.host_transfers(message) == ["done"]
