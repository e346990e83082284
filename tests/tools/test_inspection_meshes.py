"""`inspect --step --mesh`: what the devices of a step exchange, their memory, and what a step must not do."""

import functools
import json

import jax
import jax.numpy as jnp
import pytest
from cdna_support import require_cdna
from jax.sharding import PartitionSpec as P
from support.marks import slow

from pallas_kernels.cdna import toolchain
from sparse_mla_jax import __main__
from sparse_mla_jax.cases.sharded import sharded_step
from sparse_mla_jax.metadata import decode_metadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache, write
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.tools.inspect import meshes, steps

HEADS, LATENT, ROPE, WIDTH, BATCH, PAGES, PAGE = 16, 64, 16, 256, 4, 8, 64
KEY = LATENT + ROPE


def body(params, hidden, caches, seq_lens, page_table, *, fault=None):
    """One layer of attention: heads are divided over "tensor", requests over "data"."""
    (cache,) = caches
    metadata = decode_metadata(seq_lens, page_table, page_size=PAGE)
    latent = hidden @ params["key"]
    cache = write(cache, latent[:, :LATENT], latent[:, LATENT:], metadata.slots, implementation="triton")
    q = (hidden @ params["query"]).reshape(hidden.shape[0], -1, KEY)
    rows = page_table[:, :1] * PAGE + jnp.arange(16, dtype=jnp.int32)
    out = sparse_mla(q, cache, rows, sm_scale=0.1, value_dim=LATENT, implementation="triton")
    out = out.reshape(out.shape[0], -1)
    result = jax.lax.psum(out @ params["out"], "tensor")
    if fault == "gathers":
        weight = jax.lax.all_gather(params["out"], "tensor", to="invarying", tiled=True)
        row = jnp.arange(PAGES * PAGE)[None] * (1.0 + jax.lax.axis_index("tensor"))
        scores = jax.lax.all_gather(jnp.sin(row), "tensor", to="invarying", tiled=True)
        result = result + (jnp.tanh(weight[:BATCH]) + jnp.tanh(scores[:BATCH, :WIDTH])).astype(result.dtype)
    if fault == "cache":
        cache = jax.tree.map(lambda a: jnp.roll(a, 1, 1), cache)
    return result, (cache,)


def step_of(parallel, fault=None):
    bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    groups = parallel.data
    params = {
        "key": bfloat16((WIDTH, KEY)),
        "query": bfloat16((WIDTH, HEADS * KEY)),
        "out": bfloat16((HEADS * LATENT, WIDTH)),
    }
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            groups * BATCH * PAGES, PAGE, latent_dim=LATENT, rope_dim=ROPE, group_size=LATENT, dtype="bfloat16"
        )
    )
    args = (
        params,
        bfloat16((groups * BATCH, WIDTH)),
        (cache,),
        jax.ShapeDtypeStruct((groups * BATCH,), jnp.int32),
        jax.ShapeDtypeStruct((groups * BATCH, PAGES), jnp.int32),
    )
    group = P(parallel.axis("data"))
    specs = {"key": P(), "query": P(None, "tensor"), "out": P("tensor")}
    return sharded_step(
        functools.partial(body, fault=fault), args, (specs, group, group, group, group), group, parallel
    )


@pytest.fixture
def inspect(monkeypatch):
    """The command, whose step has a fault or none."""

    def command(*options, fault=None):
        asked = []

        def sharded_decode_step(parallel, **given):
            asked.append({"parallel": parallel, **given})
            return step_of(parallel, fault)

        monkeypatch.setattr(steps, "sharded_decode_step", sharded_decode_step)
        code = __main__.main(["inspect", "--step", "--arch", "gfx942", *options])
        (given,) = asked
        return code, given

    return command


def test_report_of_a_mesh(inspect, capsys):
    """Five seconds, unless the cache has it: XLA:ROCm compiles two kernels and three matrix products."""
    require_cdna("xla")
    code, given = inspect("--mesh", "tensor=8")
    out = capsys.readouterr().out
    assert (code, given["parallel"], given["heads"]) == (0, Parallel(tensor=8), 128)
    assert "mesh data=1, context=1, tensor=8: 8 devices" in out and "(fits)" in out
    assert "copies of a cache: none" in out and "gathers of weights or of rows of scores: none" in out
    assert "all-reduce  bfloat16[4, 256]  tensor      1           1      2048       2048        3584" in out


@pytest.mark.slow
def test_numbers_of_eight_machines(inspect, capsys):
    """As long as the one before: what a machine of eight runs, eight times."""
    require_cdna("xla")
    code, given = inspect("--mesh", "data=8,tensor=8", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert (code, given["parallel"]) == (0, Parallel(data=8, tensor=8))
    assert (row["mesh"], row["devices"]) == ({"data": 8, "context": 1, "tensor": 8}, 64)
    assert row["collectives"] == [
        {
            "kind": "all-reduce",
            "results": "bfloat16[4, 256]",
            "axes": "tensor",
            "times": 1,
            "operand_bytes": 2048,
            "result_bytes": 2048,
            "sent_bytes": 3584,
            "count": 1,
        }
    ]
    # The cache of a group, updated in place.
    assert row["cache_bytes"] == row["alias_bytes"] == 2 * BATCH * PAGES * PAGE * KEY
    parts = [row[f"{part}_bytes"] for part in ("argument", "output", "temporary", "alias")]
    assert row["memory_bytes"] == sum(parts[:3]) - parts[3]
    assert sorted(k["name"] for k in row["kernels"] if k["origin"] == "pallas") == ["cache_write", "sparse_mla"]
    assert meshes.mesh_problems(row) == []
    small = row | {"memory_of_device": 1000}
    (problem,) = meshes.mesh_problems(small)
    assert problem == f"one device needs {row['memory_bytes']} bytes and has 1000"
    assert "(does not fit)" in meshes.mesh_report(small)


@pytest.mark.parametrize(
    ("fault", "options", "messages"),
    [
        (
            "gathers",
            [],
            [
                "bfloat16[1024, 256], which may be a divided weight",
                "makes float32[8, 512], 16384 bytes, more than 8191",
            ],
        ),
        slow("gathers", ["--most-gathered", "16384"], ["bfloat16[1024, 256], which may be a divided weight"]),
        slow("cache", [], ["writes a new bfloat16"]),
    ],
)
def test_what_a_step_must_not_do(fault, options, messages, inspect, capsys):
    """Five seconds, as the report."""
    require_cdna("xla")
    code, _ = inspect("--mesh", "tensor=8", *options, fault=fault)
    errors = capsys.readouterr().err
    assert code == 1
    for message in messages:
        assert message in errors
    assert ("more than" in errors) == any("more than" in message for message in messages)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], "tensor"),
        ([[0, 4], [1, 5], [6, 2], [3, 7]], "data"),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], "context"),
        ([[0, 1, 4, 5], [2, 3, 6, 7]], "data+tensor"),
        ([list(range(8))], "data+context+tensor"),
        ([[0, 1], [1, 2]], "2 groups of 2"),
    ],
)
def test_axes_of_groups(groups, axes):
    assert meshes.axes_of_groups(tuple(map(tuple, groups)), Parallel(2, 2, 2)) == axes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "tensor=8"], "--mesh is an option of `inspect` with --step"),
        (["--most-gathered", "8"], "--most-gathered is an option of `inspect` with --step"),
        (["--step", "--most-gathered", "8"], "name the mesh with --mesh"),
        (["--step", "--mesh", "tensor=8", "--most-gathered", "-1"], "--most-gathered is -1"),
        (["--step", "--mesh", "sideways=2"], "sizes of the axes data, context, tensor are expected"),
        (["--step", "--mesh", "tensor=3"], "does not divide"),
        (["--step", "--mesh", "context=3"], "a multiple of 192 is expected"),
    ],
)
def test_options_that_do_not_fit(options, message, capsys, monkeypatch):
    monkeypatch.setattr(toolchain, "available", lambda compiler: None)
    assert __main__.main(["inspect", *options]) == 2
    assert message in capsys.readouterr().err
