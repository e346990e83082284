"""`python -m sparse_mla_jax inspect`: tables, JSON, assembly, pictures, the whole decode step, and its rules."""

import dataclasses
import functools
import json

import jax
import pytest
from cdna_support import require_cdna
from support import published
from support.marks import slow

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.program import Argument
from sparse_mla_jax import __main__
from sparse_mla_jax.cases import catalogue, steps
from sparse_mla_jax.tools.inspect import kernels
from sparse_mla_jax.tools.inspect import steps as step_inspection
from sparse_mla_jax.tools.inspect.options import WITH_HEADS


def inspect(*arguments):
    return __main__.main(["inspect", *arguments])


@pytest.fixture
def measured_once(monkeypatch):
    """The command takes measurements that other tests have made by the same function."""

    def measure(case, kind, arch, compiler, heads, changes):
        assert changes is None
        return published.measured(case.name, kind if case.kinds else "", arch, compiler, heads=heads).measurement

    monkeypatch.setattr(kernels, "measure", measure)


@published.group("top_k")
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_table_of_one_kernel(arch, capsys, measured_once):
    require_cdna("triton")
    assert inspect("--kernel", "top_k", "--arch", arch) == 0
    out = capsys.readouterr().out
    assert "executed by our interpreter" in out and "nothing was timed" in out
    assert out.count(f"top_k   {arch}") == 3


def test_json_assembly_and_picture(tmp_path, capsys):
    require_cdna("triton")
    files = tmp_path / "kernel.s", tmp_path / "kernel.png"
    options = ["--kernel", "sparse_mla", "--arch", "gfx942", "--heads", "6", "--cache-dtype", "float8_e4m3fn"]
    assert inspect(*options, "--json", "--asm", str(files[0]), "--picture", str(files[1])) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kernel"], row["heads"], row["cache"], row["problems"]) == ("sparse_mla", 6, "float8_e4m3fn", [])
    assert row["wave_instructions"] == sum(row["by_class"].values()) > 0
    assert set(row["lower_bound_us"]) >= {"vector", "matrix"} and row["hbm_floor_us"] > 0
    annotated = files[0].read_text()
    assert "v_mfma" in annotated and "executed by our interpreter" in annotated
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_plan_with_other_fields(capsys):
    """What ships has 4 waves of 64 lanes for 2048 columns; the result is right with any."""
    require_cdna("triton")
    options = ["--kernel", "top_k", "--arch", "gfx942", "--json", "--plan"]
    assert inspect(*options, "num_warps=2, run=64") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["threads"], row["error"], row["problems"]) == (128, 0, [])
    for plan, message in (
        ("key_block=32", "--plan key_block: TopKPlan has block, num_warps, wave, groups, run, unroll"),
        ("num_warps", "'num_warps' is not FIELD=VALUE"),
        ("num_warps=x", "--plan num_warps=x: TopKPlan has a int there, 4"),
        ("num_warps=0", "does not fit top_k: integer division"),
    ):
        code = None
        try:
            code = inspect(*options, plan)
        except SystemExit as left:
            code = left.code
        assert code == 2 and message in capsys.readouterr().err
    assert inspect("--arch", "gfx942", "--plan", "num_warps=2") == 2
    assert "name the kernel with --kernel" in capsys.readouterr().err


@published.group("top_k")
def test_a_broken_rule_is_named_and_fails(monkeypatch, capsys):
    good = published.measured("top_k", "", "gfx942").measurement
    kernel = good.launch.kernel
    bad_kernel = dataclasses.replace(
        kernel, resources=dataclasses.replace(kernel.resources, vgpr_spills=3, scratch=16, lds=1 << 20)
    )
    bad = dataclasses.replace(good, error=1.0, launch=dataclasses.replace(good.launch, kernel=bad_kernel))
    monkeypatch.setattr(kernels, "measure", lambda *_: bad)
    assert inspect("--kernel", "top_k", "--arch", "gfx942") == 1
    errors = capsys.readouterr().err
    for part in ("error 1.00e+00 above", "3 vector", "16 bytes of scratch", "1048576 bytes of LDS"):
        assert part in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "nothing"], "kernel is 'nothing'"),
        (["--kernel", "sparse_mla", "--heads", "0"], "heads is 0"),
        (["--kernel", "sparse_mla_v4", "--cache-dtype", "float32"], "cache is 'float32'"),
        (["--step", "--context", "100"], "context is 100"),
        (["--step", "--layers", "0"], "layers is 0"),
    ],
)
def test_bad_options(arguments, message, capsys):
    require_cdna("triton")
    assert inspect(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "--asm", "x"], "--asm is an option of `inspect` without --step"),
        (["--step", "--kernel", "top_k"], "--kernel is an option of `inspect` without --step"),
        (["--step", "--compiler", "both"], "--compiler is an option of"),
        (["--batch", "3"], "--batch is an option of `inspect` with --step"),
        (["--step", "--layers", "1000000000"], "--layers is 1000000000; deepseek_v32 has 61"),
        (["--step", "--heads", "1000000000"], "--heads is 1000000000; deepseek_v32 has 128"),
        (["--step", "--batch", "1000000000000"], "2**31"),
        (["--kernel", "norm_rope_query", "--heads", "1000000000"], "heads is 1000000000; between 1 and 1024"),
        (["--kernel", "top_k", "--heads", "3"], "kernel top_k has no query heads"),
        (["--kernel", "cache_write", "--heads", "3"], "kernel cache_write has no query heads"),
        (["--kernel", "top_k", "--cache-dtype", "float32"], "kernel top_k has no cache"),
        (["--kernel", "top_k", "--asm", ""], "--asm is empty"),
        (["--kernel", "top_k", "--picture", "no/x.png"], "does not exist; make it first"),
        (["--kernel", "top_k", "--picture", "x.nonsense"], "is no picture"),
    ],
)
def test_options_that_do_not_fit(arguments, message, capsys, monkeypatch):
    """Told before any kernel is compiled, whether or not there is a compiler."""
    monkeypatch.setattr(toolchain, "available", lambda compiler: None)
    assert inspect(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--kernel", "top_k"], ["--step"]])
def test_without_a_compiler(options, capsys, monkeypatch):
    monkeypatch.setattr(toolchain, "available", lambda compiler: f"{compiler} is not installed: pip install it")
    assert inspect(*options) == 2
    assert capsys.readouterr().err.endswith(" is not installed: pip install it\n")


@pytest.mark.slow
def test_heads_are_checked_for_the_kernels_that_have_them():
    """Those whose problem does not depend on the number have none to choose."""
    for case in catalogue.KERNEL_CASES:
        kind = case.kinds[0] if case.kinds else ""
        chosen = [jax.tree.map(lambda x: x.shape, case.build(kind, heads).args) for heads in (None, 3)]
        assert (chosen[0] != chosen[1]) == (case.name in WITH_HEADS), case.name


# --- the decode step -------------------------------------------------------------------------------------------------
# By default the command compiles for gfx942, see below.
@pytest.fixture(scope="module", params=[slow("gfx942"), "gfx950"])
def compiled_step(request):
    require_cdna("xla")
    from pallas_kernels import cdna

    step = steps.decode_step(layers=1)
    return step, cdna.compile(step.fn, *step.args, arch=request.param, donate_argnums=step.donated)


def test_the_step_at_published_sizes_copies_no_cache(compiled_step):
    step, program = compiled_step
    names = [k.name.removesuffix("__1") for k in program.pallas_kernels]
    # The queries need no cache: releases of XLA launch their kernel before the write or after it.
    assert [name for name in names if name != "norm_rope"] == [
        *("cache_write", "paged_indexer_logits", "top_k", "sparse_mla", "merge_splits")
    ]
    assert names[0] == "norm_rope" and names.count("norm_rope") == 2
    assert step_inspection.cache_copies(step, program) == []
    assert program.in_place == tuple(range(step.first_cache, step.first_cache + len(step.caches)))
    row = step_inspection.summary(step, program)
    assert row["launches"] <= 30 and row["temporary_bytes"] < 64 << 20
    assert "copies of a cache: none" in step_inspection.report(row)
    assert all(k["spills"] == k["scratch"] == 0 for k in row["kernels"] if k["origin"] == "pallas")


@pytest.mark.parametrize("quantize", [slow(False), True])
def test_launches_of_an_attention_layer(quantize):
    """At published sizes 14 around the products, of which 3 are the step's: its metadata, and cosines."""
    require_cdna("xla")
    from pallas_kernels import cdna

    config = dataclasses.replace(steps.published_config(heads=16, layers=1), quantize_index_query=quantize)
    step = steps.layer_step(config, batch=64, context=32768, cache_dtype="float8_e4m3fn", implementation="triton")
    program = cdna.compile(step.fn, *step.args, arch="gfx950", donate_argnums=step.donated)
    row = step_inspection.summary(step, program)
    assert row["launches_of_products"] == 5 and row["launches"] - row["launches_of_products"] <= 14
    assert row["cache_copies"] == row["copies"] == []
    assert all(k["spills"] == k["scratch"] == 0 for k in row["kernels"] if k["origin"] == "pallas")


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("step-v4-ratio4-b128", 38),
        pytest.param("step-v4-ratio128-b128", 32, marks=pytest.mark.slow),
        pytest.param("step-v4-window-b128", 21, marks=pytest.mark.slow),
    ],
)
def test_launches_of_a_v4_layer(name, most):
    """DeepSeek-V4-Flash's layers without experts, as `bench` times them; metadata and both mixings included."""
    require_cdna("xla")
    from pallas_kernels import cdna

    work = catalogue.build(catalogue.case(name), "float8_e4m3fn")
    step = steps.Step(functools.partial(work.fn, implementation="triton"), jax.eval_shape(work.arguments), donated=0)
    row = step_inspection.summary(step, cdna.compile(step.fn, *step.args, arch="gfx950", donate_argnums=0))
    assert row["launches"] <= most and row["launches_of_products"] == 5 and row["temporary_bytes"] < 64 << 20
    assert row["cache_copies"] == row["copies"] == row["library_calls"] == []
    assert all(k["spills"] == k["scratch"] == 0 for k in row["kernels"] if k["origin"] == "pallas")


# The first layers of each family that show what it has: a shared selection, no rotation, a window.
FAMILIES = {"glm_moe_dsa": 2, "hy_v4": 3, "axk2": 2, "mistral_large4": 4, "dots3_note": 3}


@pytest.mark.slow
@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("model", FAMILIES)
def test_steps_of_families_at_published_sizes(model, heads):
    """Two programs, a minute each. The most launches were 158 for four layers with embedding and head (Mistral)."""
    require_cdna("xla")
    from pallas_kernels import cdna

    step = steps.decode_step(model=model, layers=FAMILIES[model], heads=heads)
    for arch in cdna.ARCHITECTURES:
        row = step_inspection.summary(step, cdna.compile(step.fn, *step.args, arch=arch, donate_argnums=step.donated))
        assert row["cache_copies"] == [] and row["launches"] <= 10 + 45 * FAMILIES[model]
        assert all(k["spills"] == k["scratch"] == 0 for k in row["kernels"] if k["origin"] == "pallas")


def test_copies_of_a_cache_are_found(compiled_step):
    step, program = compiled_step
    array = step.caches[0]
    flat = (array.shape[0] * array.shape[1], *array.shape[2:])
    writer = dataclasses.replace(program.kernels[0], arguments=(Argument(flat, array.dtype, "output"),))
    size = writer.arguments[0].nbytes
    for broken, words in (
        (dataclasses.replace(program, in_place=program.in_place[1:]), "not updated in place"),
        (dataclasses.replace(program, kernels=(*program.kernels, writer)), "writes a new uint32"),
        (dataclasses.replace(program, copies=((size, "device to device: copy.1"),)), f"{size} bytes copied"),
    ):
        (found,) = step_inspection.cache_copies(step, broken)
        assert words in found


def test_step_command(capsys):
    require_cdna("xla")
    options = ["--step", "--arch", "gfx942", "--batch", "2", "--context", "4096", "--layers", "1"]
    assert inspect(*options) == 0
    assert "copies of a cache: none" in capsys.readouterr().out
    assert inspect(*options, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["launches_of_pallas_kernels"] == 7 and row["cache_copies"] == []
