"""Programs for many GPUs, compiled without one: what each device runs, and what the devices exchange."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.marks import slow

from pallas_kernels import _call, cdna, targets
from pallas_kernels.cdna import collectives, compiler, container, hlo_text, lowering, worker, xla_rocm
from pallas_kernels.cdna.program import MEMORY, Program
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.topk import top_k

HEADS, LATENT, ROPE, TOKENS, COLUMNS, WIDTH = 16, 64, 16, 8, 256, 512


def abstract(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def placed(mesh, spec, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


# --- a step that attends ---------------------------------------------------------------------------------------------
def attend(scores, q, cache, weight):
    """Selects by tokens, gathers the selection, attends by heads, and sums over them."""
    rows = jax.lax.all_gather(top_k(scores, 8, implementation="triton"), "tensor", tiled=True)
    out = sparse_mla(q, cache, rows, sm_scale=0.1, value_dim=LATENT, implementation="triton")
    return jax.lax.psum(out.reshape(out.shape[0], -1) @ weight, "tensor")


SPECS = (P(("data", "tensor")), P("data", "tensor"), P("data"), P("tensor"))


def attending(mesh):
    """The step on a mesh with axes data and tensor, and its shapes; every group has a cache of its own."""
    data = mesh.shape["data"]
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(
            data * COLUMNS // 64, 64, latent_dim=LATENT, rope_dim=ROPE, group_size=LATENT, dtype="bfloat16"
        )
    )
    args = (
        placed(mesh, SPECS[0], data * TOKENS, COLUMNS),
        placed(mesh, SPECS[1], data * TOKENS, HEADS, LATENT + ROPE, dtype=jnp.bfloat16),
        jax.tree.map(lambda a: placed(mesh, SPECS[2], *a.shape, dtype=a.dtype), cache),
        placed(mesh, SPECS[3], HEADS * LATENT, WIDTH, dtype=jnp.bfloat16),
    )
    return jax.shard_map(attend, in_specs=SPECS, out_specs=P("data")), args


@functools.cache
def compiled(arch, data):
    fn, args = attending(abstract(data=data, tensor=8))
    return cdna.compile(fn, *args, arch=arch)


@pytest.mark.parametrize(("arch", "data"), [("gfx942", 1), ("gfx942", 8), slow("gfx950", 1), slow("gfx950", 8)])
def test_a_step_on_a_machine_and_on_eight(arch, data):
    """Two seconds, unless the cache has them: XLA compiles two kernels and a matrix product."""
    require_cdna("xla")
    program = compiled(arch, data)
    assert program.devices == 8 * data
    assert sorted(k.name for k in program.pallas_kernels) == ["sparse_mla", "top_k"]
    (select,) = (k for k in program.pallas_kernels if k.name == "top_k")
    assert select.arguments[0].shape == (TOKENS // 8, COLUMNS)
    gather, reduce = cdna.collectives_of(program)
    groups = tuple(tuple(range(8 * i, 8 * i + 8)) for i in range(data))
    assert (gather.kind, gather.groups, gather.times) == ("all-gather", groups, 1)
    assert [(a.dtype, a.shape) for a in (*gather.operands, *gather.results)] == [("int32", (1, 8)), ("int32", (8, 8))]
    assert (gather.operand_bytes, gather.result_bytes, gather.sent_bytes) == (32, 256, 224)
    assert (reduce.kind, reduce.groups, reduce.times) == ("all-reduce", groups, 1)
    assert (reduce.results[0].shape, reduce.result_bytes) == ((TOKENS, WIDTH), 2 * TOKENS * WIDTH)
    assert reduce.sent_bytes == 2 * 7 * reduce.operand_bytes // 8
    # One device has an eighth of the heads and of the scores, and its group's cache.
    given = 4 * COLUMNS + 2 * (TOKENS * HEADS * (LATENT + ROPE) + HEADS * LATENT * WIDTH) // 8
    assert program.argument_bytes == given + 2 * COLUMNS * (LATENT + ROPE)
    assert program.output_bytes == 2 * TOKENS * WIDTH
    assert program.memory_bytes == program.argument_bytes + program.output_bytes + program.temporary_bytes
    assert program.memory_bytes < MEMORY[arch]
    assert program.library_calls == program.copies == ()


def test_every_collective_of_the_executable_is_found():
    """All kinds, several arrays in one, in loops: as many are read from the text as XLA will launch.

    Five seconds: this needs the executable, which the cache does not keep.
    """
    require_cdna("xla")
    mesh = abstract(tensor=8)

    def step(x, cache, ragged):
        total = jax.lax.psum(x, "tensor")
        part = jax.lax.psum_scatter(total.reshape(-1, 8), "tensor", scatter_dimension=0, tiled=True)
        moved = jax.lax.ppermute(
            jax.lax.all_to_all(part, "tensor", 0, 1, tiled=True), "tensor", [(i, (i + 1) % 8) for i in range(8)]
        )
        both = jax.lax.all_gather((moved, jnp.cos(part)), "tensor", tiled=True)

        def body(c, _):
            return c + jax.lax.psum(jnp.sin(c), "tensor"), None

        looped, _ = jax.lax.scan(body, x, None, length=37)
        looped = jax.lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (body(c[0], None)[0],), (looped,))
        ones = jnp.ones(8, jnp.int32)
        place = jnp.arange(8, dtype=jnp.int32)
        sent = jax.lax.ragged_all_to_all(
            ragged, jnp.zeros_like(ragged), place, ones, jax.lax.axis_index("tensor") * ones, ones, axis_name="tensor"
        )
        return both, looped, cache.at[3].set(1.0), sent

    shapes = [placed(mesh, P("tensor"), *shape) for shape in ((64, 512), (800, 64), (64, 16))]
    fn = jax.shard_map(step, in_specs=P("tensor"), out_specs=P("tensor"))
    text = lowering.lower(fn, *shapes, arch="gfx942", donate_argnums=1).as_text()
    made = worker.request("gfx942", "xla", "module", text, None)
    program = compiler.read_executable(made, "gfx942", "XLA:ROCm")
    found = cdna.collectives_of(program)
    assert {one.kind for one in found} == set(collectives.KINDS) - {"collective-broadcast"}
    steps = container.gpu_executable(made["executable"]).messages(13)
    assert len(found) == sum(kind in compiler._COLLECTIVES for kind, _, _ in compiler._steps(steps))
    times = [one.times for one in found if one.kind == "all-reduce"]
    assert sorted(times, key=str) == [1, 37, None]
    assert any(len(one.results) == 2 for one in found if one.kind == "all-gather")
    (permuted,) = (one for one in found if one.kind == "collective-permute")
    assert permuted.groups == tuple((i, (i + 1) % 8) for i in range(8))
    assert program.in_place == (1,)


@pytest.mark.parametrize("form", ["devices", "axes", "told", "lowered"])
def test_the_mesh_may_be_one_of_devices(form):
    """Whichever way the mesh is given, the program is the same."""
    require_cdna("xla")
    mesh = abstract(data=1, tensor=8)
    if form == "devices":
        mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    fn, args = attending(mesh)
    if form == "told":
        fn = jax.shard_map(attend, mesh=mesh, in_specs=SPECS, out_specs=P("data"))
    if form == "lowered":
        text = lowering.lower(fn, *args, arch="gfx942").as_text()
        program = cdna.compile_lowered(text, arch="gfx942")
    else:
        program = cdna.compile(fn, *args, arch="gfx942")
    assert program == compiled("gfx942", 1)


def test_a_mesh_of_one_device_and_arrays_without_a_place():
    require_cdna("xla")
    mesh = abstract(tensor=1)
    scores = placed(mesh, P("tensor"), 4, COLUMNS)

    def step(scores, offset):
        return top_k(scores, 8, implementation="triton") + offset

    fn = jax.shard_map(step, in_specs=(P("tensor"), P()), out_specs=P("tensor"))
    program = cdna.compile(fn, scores, jax.ShapeDtypeStruct((8,), jnp.int32), arch="gfx942")
    assert (program.devices, [k.name for k in program.pallas_kernels]) == (1, ["top_k"])
    assert cdna.collectives_of(program) == ()


def test_an_output_without_a_place_stays_divided():
    """As jax compiles it: XLA chooses where it lies, and gathers nothing."""
    require_cdna("xla")
    x = placed(abstract(tensor=8), P("tensor"), 64, 128)
    text = lowering.lower(lambda x: jnp.sin(x) + 1.0, x, arch="gfx942").as_text()
    made = worker.request("gfx942", "xla", "module", text, None)
    program = compiler.read_executable(made, "gfx942", "XLA:ROCm")
    assert (program.output_bytes, cdna.collectives_of(program)) == (4 * 8 * 128, ())


def test_triton_compiles_the_kernels_of_a_device():
    require_cdna("triton")
    fn, args = attending(abstract(data=2, tensor=8))
    program = cdna.compile(fn, *args, arch="gfx942", compiler="triton")
    assert (program.devices, program.memory_bytes) == (16, None)
    assert {k.name for k in program.kernels} == {"sparse_mla", "top_k"}
    with pytest.raises(ValueError, match="has kernels alone; compile it with 'xla'"):
        cdna.collectives_of(program)


def test_meshes_that_are_refused(monkeypatch):
    monkeypatch.setattr(compiler, "_check", lambda *_: None)
    one, other = abstract(tensor=8), abstract(tensor=2)
    with pytest.raises(ValueError, match="arguments lie on two meshes"):
        cdna.compile(lambda x, y: x, placed(one, P(), 8), placed(other, P(), 8), arch="gfx942")
    with pytest.raises(ValueError, match="the program runs on 12 devices; expected at most 8"):
        cdna.compile(lambda x: x + 1, placed(abstract(tensor=12), P("tensor"), 12), arch="gfx942")
    assert [xla_rocm.topology(n) for n in (1, 2, 8, 16, 64)] == ["1x1x1", "1x1x2", "1x1x8", "1x2x8", "1x8x8"]


def test_a_program_for_a_mesh_is_lowered_for_named_machines():
    """`lower_for` finds a mesh with another device in use; the kernel compares with a constant, whose type has it."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def kernel(x, o):
        positive = x[pl.program_id(0)] >= 0
        _call.store(o.at[jnp.arange(64)], _call.load(x.at[jnp.arange(64)]), mask=positive)

    def body(target, x):
        return _call.call(kernel, x, out_shape=jax.ShapeDtypeStruct((64,), x.dtype), grid=(1,), name="k", target=target)

    fn = jax.shard_map(lambda x: targets.by_target(body, x), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    with targets.lower_for("cpu", "rocm:gfx942", "cuda"):
        traced = jax.jit(fn).trace(placed(mesh, P("x"), 128))
        calls = lowering.calls_in(traced.lower(lowering_platforms=("cpu", "rocm", "cuda")))
    assert [call.inputs for call in calls] == [(((64,), np.dtype("float32")),)] * 2


# --- kernels as machine code on virtual devices ----------------------------------------------------------------------
@pytest.mark.parametrize(("arch", "devices"), [("gfx942", 2), slow("gfx950", 2), slow("gfx942", 8)])
def test_every_device_executes_its_kernels(arch, devices):
    """Three seconds: the interpreter runs the kernels of all devices one after the other, with collectives between."""
    require_cdna("triton")
    rng = np.random.default_rng(1)
    tokens, heads = devices, 2 * devices
    scores = jnp.asarray(rng.standard_normal((tokens, 128)), jnp.float32)
    q = jnp.asarray(rng.standard_normal((tokens, heads, LATENT + ROPE)), jnp.bfloat16)
    cache = PagedKVCache.create(2, 64, latent_dim=LATENT, rope_dim=ROPE, group_size=LATENT, dtype="bfloat16")
    cache = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), cache)

    def step(scores, q, cache, over=None):
        rows = top_k(scores, 8, implementation="triton")
        rows = rows if over is None else jax.lax.all_gather(rows, over, tiled=True)
        out = sparse_mla(q, cache, rows, sm_scale=0.1, value_dim=LATENT, implementation="triton")
        total = out.astype(jnp.float32).sum(1)
        return rows, out, total if over is None else jax.lax.psum(total, over)

    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    specs = (P("x"), P(None, "x"), P())
    spread = jax.shard_map(
        functools.partial(step, over="x"), mesh=mesh, in_specs=specs, out_specs=(P("x"), P(None, "x"), P())
    )
    with cdna.device(arch) as machine:
        rows, out, total = jax.block_until_ready(jax.jit(spread)(scores, q, cache))
        launches = len(machine.launches)
        alone = jax.block_until_ready(jax.jit(step)(scores, q, cache))
    assert launches == 2 * devices
    for number in range(devices):
        np.testing.assert_array_equal(rows[number * tokens : (number + 1) * tokens], alone[0])
    np.testing.assert_array_equal(np.asarray(out), np.asarray(alone[1]))
    np.testing.assert_allclose(total, alone[2], rtol=1e-5, atol=1e-5)


# --- the text of a program -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh[a=2,b=2], device_ids=(3,1,2,0) {b}, x", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]<=[2,2]T(1,0)) {'b'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_replica_groups(text, groups):
    assert collectives.replica_groups(f", channel_id=1, {text}", 8) == tuple(map(tuple, groups))


PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%p), replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
}

%condition (c: (s32[], bf16[6])) -> pred[] {
  %c = (s32[], bf16[6]{0}) parameter(0)
  ROOT %going = pred[] constant(true)
}

%body (s: (s32[], bf16[6])) -> (s32[], bf16[6]) {
  %s = (s32[], bf16[6]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[6]{0} get-tuple-element(%s), index=1
  %moved = bf16[6]{0} all-to-all(%x), replica_groups={{0,1},{2,3}}, metadata={op_name="jit(step)/a }, body=%none"}
  ROOT %next = (s32[], bf16[6]{0}) tuple(%i, %moved)
}

ENTRY %main (x: bf16[6], y: f32[8], z: f8e4m3fn[3,2]) -> f32[2] {
  %x = bf16[6]{0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %z = f8e4m3fn[3,2]{1,0:S(1)} parameter(2)
  %table = s32[2]{0} constant({1, 2})
  %kernel = f32[8]{0} custom-call(%y), custom_call_target="own", backend_config={ir = "body=%x [(\\22 all-reduce(%y)"}
  %start = ((bf16[6]{0}, f8e4m3fn[3,2]{1,0}), (bf16[24]{0}, /*index=1*/f8e4m3fn[12,2]{1,0})) all-gather-start(%x, %z), replica_groups=mesh['t'=4] {'t'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %done = (bf16[24]{0}, f8e4m3fn[12,2]{1,0}) all-gather-done(%start)
  %sent = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{2,3}}
  %received = f32[8]{0} collective-permute-done(%sent)
  %reduced = (f32[8]{0}, f32[8]{0}) all-reduce-start(%y, %received), replica_groups={{0,1,2,3}}, to_apply=%add
  %async = ((f32[8]{0}), f32[2]{0}, s32[]) async-start(%y), calls=%inner
  %zero = s32[] constant(0)
  %initial = (s32[], bf16[6]{0}) tuple(%zero, %x)
  %loop = (s32[], bf16[6]{0}) while(%initial), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %again = (s32[], bf16[6]{0}) while(%loop), condition=%condition, body=%body
  ROOT %out = f32[2]{0} async-done(%async)
}
"""  # noqa: E501 - as XLA prints it


def program_of(text):
    return Program("gfx942", "XLA:ROCm", (), hlo=text, devices=4)


def test_collectives_of_a_text():
    found = collectives.collectives_of(program_of(PROGRAM))
    shown = [(c.kind, c.operand_bytes, c.result_bytes, c.sent_bytes, c.group_size, c.times, c.origin) for c in found]
    assert shown == [
        ("all-gather", 18, 72, 54, 4, 1, "jit(step)/gather"),
        ("collective-permute", 32, 32, 32, 2, 1, ""),
        ("all-reduce", 64, 64, 96, 4, 1, ""),
        ("reduce-scatter", 32, 8, 24, 4, 1, ""),
        ("all-to-all", 12, 12, 6, 2, 5, "jit(step)/a }, body=%none"),
        ("all-to-all", 12, 12, 6, 2, None, "jit(step)/a }, body=%none"),
    ]
    assert [(a.dtype, a.shape) for a in found[0].results] == [("bfloat16", (24,)), ("float8_e4m3fn", (12, 2))]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ENTRY %main", "%main", "no computation that it starts with"),
        ("body=%body, backend", "body=%other, backend", "calls other, which its text does not hold"),
        ("replica_groups={{0,1},{2,3}}", "replica_groups=all", "replica groups 'all, metadata="),
        ("f8e4m3fn", "weird", "an array of weird, which is not known here"),
        ("f32[2]{0} async-done(%async)", "f32[2]{0}", "has no form that is known here"),
        ("all-gather-done(%start)", "all-gather-done(%start", "a bracket is not closed"),
    ],
)
def test_texts_of_another_form_are_refused(before, after, message):
    """Rather than leaving a collective out."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        collectives.collectives_of(program_of(PROGRAM.replace(before, after)))


@pytest.mark.parametrize(
    ("name", "dtype", "nbytes"),
    [
        ("pred[3]", "bool", 3),
        ("s4[3]", "int4", 2),
        ("c64[2]", "complex64", 16),
        ("f8e8m0fnu[5]", "float8_e8m0fnu", 5),
        ("bf16[<=4,2]", "bfloat16", 16),
        ("f32[]", "float32", 4),
        ("u32[0,3]", "uint32", 0),
    ],
)
def test_arrays_of_a_type(name, dtype, nbytes):
    (array,) = hlo_text.arrays_in(name)
    assert (array.dtype, array.nbytes) == (dtype, nbytes)
    assert json.dumps(array.shape)
