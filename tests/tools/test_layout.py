"""`info --mesh`: what a model costs on devices that are not here."""

import json
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from sparse_mla_jax.config import DEEPSEEK_V4_PRO, DEEPSEEK_V32, load_config
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.parallel.axes import make_mesh, parse_parallel
from sparse_mla_jax.parallel.caches import partition_caches, place
from sparse_mla_jax.parallel.partition import partition_params
from sparse_mla_jax.parallel.traffic import StepSize, step_traffic, sum_by_axes
from sparse_mla_jax.tools.command_line import run_command
from sparse_mla_jax.tools.layout import (
    USABLE,
    CacheCost,
    Load,
    cache_cost,
    describe_layout,
    parse_bytes,
    published_model,
    room,
    weight_bytes,
)

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "many-devices.md").read_text()
layouts = runpy.run_path(str(ROOT / "benchmarks" / "layouts.py"))
FP8 = "float8_e4m3fn"


def info(capsys, *arguments):
    """(exit code, report or None, standard error) of `info --json`."""
    code = run_command(["info", "--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


# --- bytes
@pytest.mark.parametrize(
    ("text", "number"),
    [("192GiB", 192 << 30), ("141GB", 141 * 10**9), ("1000", 1000), (" 1.5 kib ", 1536), ("2B", 2), ("1tb", 10**12)],
)
def test_parse_bytes(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1e9", "12 PB", "0", "0.1", "1GB1", "٣GB"])
def test_bytes_that_are_none(text):
    with pytest.raises(ValueError, match="memory is "):
        parse_bytes(text)


def own_bytes(tree, partition, mesh):
    """Bytes of a shard of every array, as JAX splits it."""
    shards = jax.tree.map(
        lambda s, where: math.prod(where.shard_shape(s.shape)) * s.dtype.itemsize, tree, place(partition, mesh)
    )
    return sum(jax.tree.leaves(shards))


@pytest.mark.parametrize("sizes", ["data=2,context=2,tensor=2", "context=4,experts=context"])
@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4", "dots3_note"])
def test_bytes_are_those_that_a_device_holds(fixtures, name, sizes):
    config, parallel = load_config(fixtures / f"{name}_tiny"), parse_parallel(sizes)
    family, mesh = family_of(config), make_mesh(parallel)
    specs = family.param_specs(config, jnp.bfloat16)
    held = own_bytes(specs, partition_params(specs, parallel), mesh)
    assert weight_bytes(config, parallel, "bfloat16") == held
    cost = cache_cost(config, parallel, FP8)
    # Three pages and two requests for every device.
    pages, rows = 3 * parallel.data * parallel.context, 2 * parallel.data
    caches = jax.eval_shape(lambda: family.create_caches(config, pages, cost.page_size, num_requests=rows, dtype=FP8))
    assert own_bytes(caches, partition_caches(caches, parallel), mesh) == 3 * cost.page + 2 * cost.per_request
    assert cost.per_token == cost.page / cost.page_size / parallel.context
    assert cost.per_token == family.bytes_per_token(caches, cost.page_size) / parallel.context
    assert cost.per_request == family.bytes_per_request(caches)


# --- what fits
def test_room():
    """Pages of 4 tokens and 100 bytes on 2 devices of "context"; a request of 9 tokens takes 2 pages of each."""
    cost = CacheCost(page=100, page_size=4, per_token=12.5, per_request=10)
    parallel, load = parse_parallel("data=3,context=2"), Load(batch=5, context=9)
    # 900 bytes without the reserve, 300 of weights, 50 of the rings of 5 requests.
    memory = int(1000 / 0.9 * USABLE)
    assert room(memory, 300, cost, parallel, load) == (5 * 4 * 2 * 3, 600 // 210 * 3, 0)
    assert room(memory, 875, cost, parallel, load) == (0, 0, 25)


def test_a_model_without_pages_has_room_for_requests():
    cost = CacheCost(page=0, page_size=64, per_token=0.0, per_request=10)
    assert room(1000, 0, cost, parse_parallel(""), Load(batch=1, context=9)) == (0, 90, 0)


def test_published_sizes():
    """DeepSeek-V3.2 in bfloat16 on eight devices: experts, heads and vocabulary are split, the rest is not."""
    assert published_model("deepseek_v32") == DEEPSEEK_V32
    assert published_model("deepseek_v4_pro") == DEEPSEEK_V4_PRO
    parallel = parse_parallel("tensor=8")
    found = describe_layout(DEEPSEEK_V32, parallel, Load(64, 131072), parse_bytes("192GiB"))
    whole = weight_bytes(DEEPSEEK_V32, parse_parallel(""), "bfloat16")
    assert whole / 8 < found["weights of a device, bfloat16"] < whole / 8 * 1.03
    # 512 + 64 values with 4 scales in FP8 and bfloat16, 128 index keys with a scale, in 61 layers.
    assert found["cache bytes of a device per token, float8_e4m3fnuz"] == 61 * (512 + 64 * 2 + 16 + 128 + 4)
    left = found["left for weights and caches, given memory"] - found["weights of a device, bfloat16"]
    fits = found["tokens that fit, bfloat16, float8_e4m3fnuz caches, given memory"]
    assert fits == left // (48068 * 64) * 64
    assert found["requests that fit, bfloat16, float8_e4m3fnuz caches, given memory"] == fits // 131072


# --- the command
def test_report(capsys, fixtures):
    folder, sizes = fixtures / "deepseek_v32_tiny", "data=2,tensor=2"
    code, report, _ = info(capsys, folder, "--mesh", sizes, "--batch", 3, "--context", 100)
    config, parallel = load_config(folder), parse_parallel(sizes)
    assert code == 0 and report["mesh"] == "data=2, context=1, tensor=2"
    assert report["experts"] == "over data x tensor"
    assert report["weights of a device, float32"] == weight_bytes(config, parallel, "float32")
    # A page table has whole pages.
    sums = sum_by_axes(step_traffic(config, parallel, StepSize(tokens=3, context=128)))
    assert set(sums) == {"data", "tensor"}
    for axis, (launches, sent) in sums.items():
        assert report[f"collectives of a step over {axis}"] == launches
        expected = round(sent / 3 / config.num_hidden_layers, 1)
        assert report[f"bytes sent per token and layer over {axis}"] == expected
    for machine in ("MI300X (Infinity Fabric)", "MI355X (Infinity Fabric)", "H200 (NVLink 4)"):
        assert report[f"ms of a step's collectives, {machine}"] > 0
        assert report[f"tokens that fit, bfloat16, float8_e4m3fnuz caches, {machine.split()[0]}"] > 0


def test_report_of_a_published_model(capsys):
    """More devices than there are here, and less memory than weights."""
    code, report, _ = info(capsys, "--model", "axk2", "--mesh", "tensor=8,data=8", "--device-memory", "1GB")
    assert code == 0 and report["family"] == "axk2" and "skipped" not in report
    kind = "bfloat16, float8_e4m3fnuz caches, given memory"
    assert report[f"tokens that fit, {kind}"] == report[f"requests that fit, {kind}"] == 0
    missing = report["weights of a device, bfloat16"] - report["left for weights and caches, given memory"]
    assert report[f"bytes missing in a device, {kind}"] == missing > 0


def test_one_device_has_no_collectives(capsys, fixtures):
    report = info(capsys, fixtures / "deepseek_v32_tiny", "--mesh", "tensor=1")[1]
    assert not [name for name in report if "collectives" in name or "sent" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--mesh", "tensor=3"], "tensor=3 does not divide this model: num_attention_heads is 4"),
        (["MODEL", "--mesh", "data=3"], "the experts lie over 3 devices"),
        (["MODEL", "--mesh", "heads=2"], "mesh is 'heads=2'"),
        (["MODEL", "--mesh", "tensor=2", "--device-memory", "much"], "memory is 'much'"),
        (["MODEL", "--mesh", "tensor=2", "--batch", "0"], "batch is 0"),
        (["MODEL", "--mesh", "tensor=2", "--context", "0"], "context is 0"),
        (["MODEL", "--batch", "2", "--device-memory", "1GB"], "--batch and --device-memory given without --mesh"),
        (["--mesh", "tensor=2"], "--mesh is given without a model"),
        (["MODEL", "--model", "axk2"], "--model axk2 is given with a model folder"),
        (["--model", "llama"], "model_type 'llama'"),
    ],
)
def test_refusals(capsys, fixtures, arguments, message):
    folder = fixtures / "deepseek_v32_tiny"
    code, report, err = info(capsys, *(folder if word == "MODEL" else word for word in arguments))
    assert (code, report) == (2, None) and message in err and err.count("\n") == 1


# --- the page
@pytest.mark.parametrize("name", ["traffic", "purposes"])
def test_the_page_shows_the_tables(name):
    """docs/many-devices.md has what `python benchmarks/layouts.py` prints."""
    assert layouts[name]() in PAGE


@pytest.mark.parametrize("title", [*layouts["MODELS"]][:1])
def test_the_page_shows_what_fits(title):
    assert set(layouts["memory"]([title]).splitlines()) <= set(PAGE.splitlines())


@pytest.mark.slow
def test_the_page_shows_what_fits_of_all_models():
    """Ten seconds: the shapes of nine models on four meshes."""
    assert layouts["memory"]() in PAGE
