"""Compiling without a GPU: programs and what is known about them, caches, worker processes, missing tools, devices.

Kernels compute with whole numbers, so that results do not depend on the order of a sum.
"""

import concurrent.futures
import ctypes
import dataclasses
import functools
import gc
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from jax.experimental import pallas as pl
from support import containers as files

from pallas_kernels import _call, _primitives, cdna, targets
from pallas_kernels.cdna import (
    code_object,
    compiler,
    container,
    disk_cache,
    execution,
    lowering,
    rocm_stubs,
    toolchain,
    worker,
)
from pallas_kernels.cdna.program import LDS_BYTES, MAX_THREADS, Argument

COMPILED = [(arch, made_by) for made_by in cdna.COMPILERS for arch in cdna.ARCHITECTURES]
ARCH = cdna.ARCHITECTURES[0]
COLUMNS = 512


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def whole(*shape):
    return np.random.default_rng(shape).integers(-9, 9, shape).astype(np.float32)


# --- programs under test ---------------------------------------------------------------------------------------------
def launch(kernel, x, out=None, **how):
    """One Pallas kernel on whichever target the program is lowered for."""

    def body(target, x):
        out_shape = jax.ShapeDtypeStruct(x.shape, x.dtype) if out is None else out
        return _call.call(kernel, x, **{"out_shape": out_shape, "grid": (1,), "name": "kernel", **how}, target=target)

    return targets.by_target(body, x)


def row_minus_sum(x, o):
    """A sum over four waves, which needs LDS."""
    at = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)
    row = _call.load(x.at[at])
    _call.store(o.at[at], row - jnp.sum(row))


def centred(x, name="row_minus_sum", num_warps=4, num_stages=1):
    how = {"num_warps": num_warps, "num_stages": num_stages, "grid": (x.size // COLUMNS,)}
    return launch(row_minus_sum, x, name=name, **how)


def surrounded(x, y):
    """A kernel between fusions of XLA, which can not be moved to its other side."""
    middle = centred(jnp.cos(x) + y)
    return jnp.sin(middle) * y, middle.sum()


SIZES = (floats(3 * COLUMNS), floats(3 * COLUMNS))


def times(factor):
    """Kernels of equal names and different code."""

    def kernel(x, o):
        at = pl.program_id(0) * 64 + jnp.arange(64)
        _call.store(o.at[at], _call.load(x.at[at]) * factor)

    return kernel


def namesakes(x, y):
    return tuple(
        launch(times(f), v, name="same", num_warps=1, grid=(v.size // 64,)) for f, v in ((2.0, x), (3.0, y), (5.0, x))
    )


def first_half(x, o):
    at = jnp.arange(64)
    _call.store(o.at[at], _call.load(x.at[at]) + 1.0)


def in_place(x):
    return launch(first_half, x, name="first_half", num_warps=1, input_output_aliases={0: 0})


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compile` with a cache of this module's own; what it returned is remembered."""
    cache = tmp_path_factory.mktemp("compiled")

    @functools.cache
    def made(fn, *args, arch=ARCH, compiler="triton", **how):
        require_cdna(compiler)
        return cdna.compile(fn, *args, arch=arch, compiler=compiler, cache=cache, **how)

    return made


@pytest.fixture
def fresh():
    """Forgets what is kept in memory, so that the folder counts."""
    compiler._in_memory.cache_clear()
    yield
    compiler._in_memory.cache_clear()


# --- programs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("arch", "made_by"), COMPILED)
def test_a_kernel_between_fusions(compiled, arch, made_by):
    program = compiled(surrounded, *SIZES, arch=arch, compiler=made_by)
    assert (program.arch, program.compiler) == (arch, toolchain.compiler_name(made_by))
    (ours,) = program.pallas_kernels
    assert (ours.name, ours.grid, ours.block, ours.threads) == ("row_minus_sum", (3, 1, 1), (256, 1, 1), 256)
    array = ((3 * COLUMNS,), np.dtype("float32"))
    assert ours.arguments == (Argument(*array, "input"), Argument(*array, "output"))
    assert ours.arguments[0].nbytes == 4 * 3 * COLUMNS
    assert ours.resources.lds >= 4 * 4  # a partial sum of each wave
    for kernel in program.kernels:
        assert kernel.arch == arch and kernel.compiler == program.compiler
        assert kernel.code_object[:4] == b"\x7fELF" and kernel.name in code_object.descriptors(kernel.code_object)
        assert f"amdhsa--{arch}" in kernel.assembly and f"\n{kernel.name}:\n" in kernel.assembly
        assert "s_endpgm" in kernel.assembly and kernel.threads <= MAX_THREADS and kernel.threads % 64 == 0
        r = kernel.resources
        assert 0 < r.vgprs <= 512 and 0 <= r.agprs <= r.vgprs and 0 < r.sgprs <= 112 and 1 <= r.occupancy <= 8
        assert r.lds <= LDS_BYTES[arch] and (r.vgpr_spills, r.sgpr_spills, r.scratch) == (0, 0, 0)
    if made_by == "triton":
        assert program.kernels == (ours,) and program.hlo == ""
        assert program.temporary_bytes is program.in_place is program.copies is None
        return
    origins = [k.origin for k in program.kernels]
    assert origins[0] == origins[-1] == "xla" and origins.count("pallas") == 1
    # The intermediate array that the kernel reads, and no more than what it writes beside it.
    assert 4 * 3 * COLUMNS <= program.temporary_bytes <= 3 * 4 * 3 * COLUMNS
    assert (program.in_place, program.copies, program.library_calls) == ((), (), ())
    assert "row_minus_sum" in program.hlo and lowering.CUSTOM_CALL in program.hlo


@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_both_compilers_compute_the_same(compiled, arch):
    x = whole(3 * COLUMNS)
    expected = (x.reshape(3, -1) - x.reshape(3, -1).sum(1, keepdims=True)).ravel()
    for made_by in cdna.COMPILERS:
        (kernel,) = compiled(surrounded, *SIZES, arch=arch, compiler=made_by).pallas_kernels
        result = cdna.execute(kernel, [x])
        np.testing.assert_array_equal(result.outputs[0], expected, err_msg=made_by)
        assert result.counts.by_opcode()["s_endpgm"] == 3 * 4  # three workgroups of four waves


@pytest.mark.parametrize(("arch", "made_by"), COMPILED)
def test_kernels_of_the_same_name(compiled, arch, made_by):
    program = compiled(namesakes, floats(128), floats(256), arch=arch, compiler=made_by)
    found = []
    for kernel in program.kernels:
        (size,) = kernel.arguments[0].shape
        assert kernel.origin == "pallas" and kernel.name.startswith("same") and kernel.grid == (size // 64, 1, 1)
        found.append((size, float(cdna.execute(kernel, [np.ones(size, np.float32)]).outputs[0][size - 1])))
    # What does not depend on one another is launched in the order that XLA likes.
    expected = [(128, 2.0), (256, 3.0), (128, 5.0)]
    assert found == expected if made_by == "triton" else sorted(found) == sorted(expected)


@pytest.mark.parametrize("donated", [(), 0, (0,)])
def test_in_place_or_a_copy(compiled, donated):
    """The input is only taken over when it was given away; else XLA copies it before the kernel."""
    program = compiled(in_place, floats(128), compiler="xla", donate_argnums=donated)
    assert [a.in_place_of for a in program.kernels[0].arguments] == [None, 0]
    copied = [(size, what.split(":")[0]) for size, what in program.copies]
    assert (program.in_place, copied) == (((), [(512, "device to device")]) if donated == () else ((0,), []))


def test_which_of_the_inputs_is_taken_over(tmp_path):
    """Inputs are numbered as leaves of the arguments, whether they are used or not."""

    def fn(first, second):
        return first["used"] + 1.0, in_place(second)

    require_cdna("xla")
    first = {"never used": SIZES[0], "used": SIZES[0]}
    program = cdna.compile(fn, first, floats(128), arch=ARCH, donate_argnums=1, cache=tmp_path)
    assert program.in_place == (2,)


def test_what_is_not_a_kernel(compiled):
    """Products are Triton kernels of XLA's or calls of a library; solves and transforms are always the latter."""
    program = compiled(lambda a, b: a @ b, floats(256, 256), floats(256, 256), compiler="xla")
    assert not program.pallas_kernels
    assert program.library_calls or any("gemm" in k.name for k in program.kernels)

    def solve(a, b):
        return jax.scipy.linalg.solve_triangular(a, b), jnp.fft.fft(b)

    calls = compiled(solve, floats(64, 64), floats(64, 64), compiler="xla").library_calls
    assert {call.split(":")[0] for call in calls} == {"triangular solve", "fft"}


@pytest.mark.parametrize("inside", ["loop", "branch"])
def test_steps_inside_steps(compiled, inside):
    """Loop bodies and branches count once."""

    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda i, a: centred(a), x)

    def branch(x):
        return jax.lax.cond(x[0] > 0, centred, lambda a: centred(a, "other"), x)

    program = compiled({"loop": loop, "branch": branch}[inside], SIZES[0], compiler="xla")
    names = sorted(k.name for k in program.pallas_kernels)
    assert names == (["row_minus_sum"] if inside == "loop" else ["other", "row_minus_sum"])


def test_arguments_may_be_arrays_in_trees(compiled, tmp_path):
    require_cdna("triton")
    trees = {"x": np.zeros(3 * COLUMNS, np.float32), "y": [jnp.zeros(3 * COLUMNS, jnp.float32)]}
    program = cdna.compile(
        jax.jit(lambda t: surrounded(t["x"], t["y"][0])), trees, arch=ARCH, compiler="triton", cache=tmp_path
    )
    (kernel,), (expected,) = program.kernels, compiled(surrounded, *SIZES).kernels
    # The wheel writes the name of a temporary file into the code object.
    assert dataclasses.replace(kernel, code_object=expected.code_object) == expected


# --- refusals --------------------------------------------------------------------------------------------------------
def bad_assembly(x, o):
    at = jnp.arange(64)
    _call.store(o.at[at], _primitives.assembly("v_no_such $0, $1", "=v,v", _call.load(x.at[at]), dtype=jnp.float32))


def no_such_conversion(x, o):
    at = jnp.arange(64)
    _call.store(o.at[at], _call.load(x.at[at]).astype(jnp.float8_e4m3fn).astype(jnp.float8_e5m2).astype(jnp.float32))


def too_much_lds(x, o):
    at = jnp.arange(256)[:, None] * 256 + jnp.arange(256)
    square = _call.load(x.at[at])
    _call.store(o.at[at], square @ square)


def odd_size(x, o):
    _call.store(o.at[jnp.arange(48)], _call.load(x.at[jnp.arange(48)]))


REFUSED = [
    (bad_assembly, 64, "triton", RuntimeError, "invalid instruction.*v_no_such"),
    (no_such_conversion, 64, "triton", RuntimeError, "PassManager::run failed / "),
    (no_such_conversion, 64, "xla", RuntimeError, "Failed to compile Triton kernel"),
    (too_much_lds, 256 * 256, "xla", RuntimeError, "requested 262144, available: 65536"),
    (odd_size, 64, "triton", ValueError, "power of 2"),
]


@pytest.mark.parametrize(("kernel", "size", "made_by", "error", "why"), REFUSED)
def test_refused_programs(compiled, kernel, size, made_by, error, why):
    """The reason reaches the caller, and the compiler's process lives on."""
    require_cdna(made_by)
    with pytest.raises(error, match=why):
        compiled(lambda x: launch(kernel, x), floats(size), compiler=made_by)
    before = worker._workers.get((ARCH, made_by))
    with pytest.raises(error, match=why):
        compiled(lambda x: launch(kernel, x), floats(size), compiler=made_by)
    assert worker._workers.get((ARCH, made_by)) is before


def test_more_lds_than_there_is(compiled):
    """Triton alone does not refuse it; nothing of it fits on a SIMD."""
    small = LDS_BYTES["gfx942"]
    code = code_object.KernelCode("k", "", {"vgpr_count": 64})
    assert [code.resources("gfx942", 256, lds).occupancy for lds in (0, small // 4, small, small + 1)] == [8, 4, 1, 0]
    assert code.resources("gfx950", 256, small + 1).occupancy == 2


@pytest.mark.parametrize(
    ("arch", "made_by", "message"),
    [
        ("gfx90a", "xla", "arch is 'gfx90a'; expected one of gfx942, gfx950"),
        ("", "triton", "arch is ''; expected"),
        (ARCH, "llvm", "compiler is 'llvm'; expected one of xla, triton"),
        (ARCH, "", "compiler is ''; expected"),
    ],
)
def test_unknown_choices(compiled, arch, made_by, message):
    call = lowering.pallas_calls(centred, SIZES[0], arch=ARCH)[0]
    for attempt in (
        lambda: cdna.compile(surrounded, *SIZES, arch=arch, compiler=made_by),
        lambda: compiler.compile_kernel(call, arch, made_by),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_one_kernel_of_many_is_not_compiled_by_xla(tmp_path):
    require_cdna("xla")
    call = lowering.pallas_calls(namesakes, floats(128), floats(256), arch=ARCH)[0]
    with pytest.raises(ValueError, match="kernel same holds 3 Pallas kernels; 1 was expected"):
        compiler.compile_kernel(call, ARCH, "xla", cache=tmp_path)


def executable(*thunks):
    """A serialized executable with these steps."""
    inner = files.split("xla.gpu.GpuExecutableProto", (b"", b"".join(files.field(13, t) for t in thunks)))
    return b"\0" + files.split("xla.ExecutableAndOptionsProto", (files.path(1), inner))


def step(kind, body=b""):
    return files.field(1, files.field(1, b"where")) + files.field(kind, body)


def test_steps_of_other_kinds():
    """What is not known is named, not left out; layouts of other versions are refused."""
    thunks = [step(9), step(19), step(99), step(2, files.field(1, step(27)))]
    made = {"executable": executable(*thunks), "hlo": "", "devices": 1, "temporary_bytes": 5, "argument_bytes": 6}
    made |= {"output_bytes": 7, "alias_bytes": 3}
    program = compiler.read_executable(made, ARCH, "XLA")
    assert program.library_calls == ("gemm: where", "fill with zeros: where", "step of kind 99: where", "fft: where")
    assert (program.kernels, program.temporary_bytes, program.in_place) == ((), 5, ())
    assert (program.devices, program.memory_bytes) == (1, 5 + 6 + 7 - 3)
    with pytest.raises(ValueError, match="kernel symbol has its code elsewhere"):
        compiler.read_executable({**made, "executable": executable(step(8, files.field(3, b"symbol")))}, ARCH, "XLA")
    with pytest.raises(ValueError, match="not a 64-bit ELF file: 0 bytes"):
        compiler.read_executable({**made, "executable": executable(step(36))}, ARCH, "XLA")
    with pytest.raises(ValueError, match="element type 99"):
        compiler._array(container.Message.parse(files.field(2, files.field(2, 99))))


def test_steps_nested_without_end():
    thunk = step(9)
    for _ in range(102):
        thunk = step(2, files.field(1, thunk))
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        compiler.read_executable({"executable": executable(thunk), "hlo": "", "temporary_bytes": 0}, ARCH, "XLA")


def test_a_kernel_that_does_not_say_what_it_writes():
    body = files.field(1, b"") + files.field(1, b"") + files.field(2, b"\1")
    with pytest.raises(ValueError, match="has 2 arguments and says of 1 whether they are written"):
        compiler._arguments(container.Message.parse(body))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_damaged_executables(seed):
    """Bytes of steps, buffers and outputs changed: ValueError, or a program whose kernels end or are refused."""
    require_cdna("xla")
    lowered = lowering.lower(surrounded, *SIZES, arch=ARCH)
    made = worker.request(ARCH, "xla", "module", lowered.as_text(), None)
    fields = [(n, v) for n, values in container.gpu_executable(made["executable"]).fields.items() for v in values]
    interesting = [place for place, (number, _) in enumerate(fields) if number in (10, 11, 13)]
    rnd, seen = random.Random(seed), set()
    for _ in range(100):
        place = rnd.choice(interesting)
        bad = bytearray(fields[place][1])
        for _ in range(rnd.choice([1, 1, 2])):
            at = rnd.choice([rnd.randrange(len(bad)), min(len(bad) - 1, rnd.randrange(60))])
            bad[at] = rnd.choice([bad[at] ^ 1 << rnd.randrange(8), 255, 0, rnd.randrange(256)])
        body = b"".join(files.field(n, bytes(bad) if k == place else v) for k, (n, v) in enumerate(fields))
        inner = files.split("xla.gpu.GpuExecutableProto", (b"", body))
        data = b"\0" + files.split("xla.ExecutableAndOptionsProto", (files.path(1), inner))
        try:
            for kernel in compiler.read_executable({**made, "executable": data}, ARCH, "XLA").kernels:
                if sum(a.nbytes for a in kernel.arguments) < 1 << 20:
                    inputs = [np.ones(a.shape, a.dtype) for a in kernel.arguments if a.role == "input"]
                    cdna.execute(kernel, inputs, budget=2000)
                    seen.add("executed")
        except ValueError as error:
            assert type(error) is ValueError, error
            seen.add("refused")
        except execution.InterpreterError:
            seen.add("not executed")
    assert {"refused", "executed"} <= seen


def test_no_code_object(compiled):
    elf = compiled(surrounded, *SIZES).kernels[0].code_object
    for bad in (b"", b"\x7fELF", b"\x7fELF\x01" + elf[5:], elf[:64], elf[: len(elf) // 2], elf[:-1], b"#!/bin/sh" * 99):
        with pytest.raises(ValueError, match="ELF"):
            code_object.kernels(bad, ARCH)


# --- cache -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def cached(compiled, tmp_path, monkeypatch, fresh):
    """(compile, the file that it keeps, requests to workers); a worker answers with what it made before."""

    def prepare(made_by):
        require_cdna(made_by)
        requests, answers = [], {}
        real = worker.request

        def request(*what):
            requests.append(what[:3])
            if what[:2] not in answers:
                answers[what[:2]] = real(*what)
            return answers[what[:2]]

        monkeypatch.setattr(worker, "request", request)

        def run(**how):
            compiler._in_memory.cache_clear()
            return cdna.compile(surrounded, *SIZES, arch=ARCH, compiler=made_by, cache=tmp_path, **how)

        run()
        (file,) = (tmp_path / "code").iterdir()
        assert len(requests) == 1
        return run, file, requests

    return prepare


@pytest.mark.parametrize("made_by", cdna.COMPILERS)
def test_the_second_time_nothing_is_compiled(cached, made_by):
    run, file, requests = cached(made_by)
    stamp = file.stat().st_mtime_ns
    assert run() == run()
    assert len(requests) == 1 and file.stat().st_mtime_ns == stamp
    (what,) = requests
    assert what == (ARCH, made_by, {"triton": "ir", "xla": "module"}[made_by])


def test_another_process_compiles_nothing(cached, tmp_path):
    """The key does not depend on anything of this process: hashes of strings, addresses, where the code stands."""
    cached("triton")
    script = f"""
import pathlib, sys
sys.path[:0] = {[str(p) for p in pathlib.Path(__file__).parents[:3]]!r}
import test_cdna_compile as t
t.worker.request = None
p = t.cdna.compile(t.surrounded, *t.SIZES, arch={ARCH!r}, compiler="triton", cache=pathlib.Path({str(tmp_path)!r}))
print(p.kernels[0].name)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "row_minus_sum", done.stderr


def sealed(entry):
    """A file with the right checksum, whatever is in it."""
    body = json.dumps(entry).encode()
    return disk_cache._first_line(body) + body


def opened(good):
    """What a file holds: its key and its value."""
    return json.loads(good.partition(b"\n")[2])


DAMAGE = {
    "empty": lambda good: b"",
    "cut": lambda good: good[: len(good) // 2],
    "last byte missing": lambda good: good[:-1],
    "garbage": lambda good: b"\x80\x05garbage" * 99,
    "one letter": lambda good: good.replace(b"s_endpgm", b"s_endpgn", 1),
    "a pickle": lambda good: pickle.dumps((opened(good)[0], 1)),
    "of another key": lambda good: sealed(["0" * 64, opened(good)[1]]),
    "of another shape": lambda good: sealed([opened(good)[0], 17]),
    "of other parts": lambda good: sealed([opened(good)[0], {"tuple": [1, 2, 3]}]),
    "without a key": lambda good: sealed(opened(good)[1]),
    "of a class that is gone": lambda good: sealed([opened(good)[0], {"NoSuchClass": {}}]),
    "of another version of a class": lambda good: sealed([opened(good)[0], {"Program": {"arch": "gfx942"}}]),
}


@pytest.mark.parametrize("made_by", cdna.COMPILERS)
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_made_again(cached, name, made_by):
    run, file, requests = cached(made_by)
    good = file.read_bytes()
    program = run()
    file.write_bytes(DAMAGE[name](good))
    assert run() == program and len(requests) == 2
    assert run() == program and len(requests) == 2
    assert list(file.parent.iterdir()) == [file]  # no temporary files


def test_a_folder_that_can_not_be_written(cached, tmp_path):
    run, _, requests = cached("triton")
    blocked = tmp_path / "file" / "folder"
    blocked.parent.write_bytes(b"")
    compiler._in_memory.cache_clear()
    how = {"arch": ARCH, "compiler": "triton", "cache": blocked}
    assert cdna.compile(surrounded, *SIZES, **how) == run()
    assert len(requests) == 2
    assert cdna.compile(surrounded, *SIZES, **how) == run() and len(requests) == 3  # run() forgets what is in memory


def with_variable(name, value):
    """An environment with another value of one variable."""
    return lambda patch: patch(toolchain.os, "environ", {**os.environ, name: value})


VERSIONS = {
    toolchain.TRITON: ("triton", lambda patch: patch(toolchain, "version_of", lambda name: "9.9")),
    "format": ("triton", lambda patch: patch(disk_cache, "FORMAT", 999)),
    "llvm": ("triton", lambda patch: patch(toolchain, "LLVM", "23")),
    "a release of llvm": ("triton", lambda patch: patch(toolchain, "_llvm_version", lambda path: "22.9")),
    "llvm for xla": ("xla", lambda patch: patch(toolchain, "LLVM", "23")),
    "plugin": ("xla", lambda patch: patch(toolchain, "version_of", lambda name: "9.9")),
    "jax": ("xla", lambda patch: patch(jax, "__version__", "9.9")),
    "the described GPU": ("xla", lambda patch: patch(compiler.xla_rocm, "target_config", lambda arch: "other")),
    "flags": ("xla", with_variable("XLA_FLAGS", "--xla_gpu_autotune_level=0")),
    "other flags": ("xla", with_variable("XLA_FLAGS", "--xla_gpu_autotune_level=1")),
    "device libraries": ("xla", with_variable("ROCM_PATH", "elsewhere")),
    "a knob": ("triton", with_variable("AMDGCN_USE_BUFFER_OPS", "0")),
    "another knob": ("triton", with_variable("TRITON_F32_DEFAULT", "ieee")),
}


def test_flags_in_a_file(tmp_path, monkeypatch):
    """XLA_FLAGS may name a file; its contents count."""
    (tmp_path / "flags").write_text("--xla_gpu_autotune_level=0")
    with_variable("XLA_FLAGS", f" {tmp_path}/flags ")(monkeypatch.setattr)
    first = toolchain.environment("xla")
    (tmp_path / "flags").write_text("--xla_gpu_autotune_level=1")
    assert toolchain.environment("xla") != first
    (tmp_path / "flags").unlink()
    assert toolchain.environment("xla")


def test_keys(compiled, monkeypatch, fresh):
    """Everything that the code depends on gives another key, and nothing else does."""
    stored, keys = {}, []
    for made_by in cdna.COMPILERS:
        require_cdna(made_by)
        kernel = compiled(centred, SIZES[0], compiler=made_by).kernels[0]
        code = code_object.KernelCode(kernel.name, kernel.assembly, {})
        stored[made_by] = (kernel.code_object, 0, code) if made_by == "triton" else compiled(centred, *SIZES[:1])
    compiler._in_memory.cache_clear()
    monkeypatch.setattr(compiler, "_check", lambda *_: None)
    monkeypatch.setattr(disk_cache, "read", lambda key, folder: keys.append(key) or stored[made_by])

    def key(made_by_, arch=ARCH, fn=centred, size=SIZES[0], **how):
        nonlocal made_by
        made_by = made_by_
        compiler._in_memory.cache_clear()
        cdna.compile(lambda x: fn(x, **how), size, arch=arch, compiler=made_by)
        return keys[-1]

    usual = {c: key(c) for c in cdna.COMPILERS}
    assert usual == {c: key(c) for c in cdna.COMPILERS}
    others = list(usual.values())
    for c in cdna.COMPILERS:
        others += [key(c, "gfx950"), key(c, num_warps=2), key(c, num_stages=2), key(c, name="other")]
    # The grid is no part of a kernel's code, but of XLA's program.
    assert key("triton", size=floats(COLUMNS * 3)) == usual["triton"]
    others.append(key("xla", size=floats(COLUMNS * 4)))
    for c, change in VERSIONS.values():
        with monkeypatch.context() as patched:
            change(patched.setattr)
            others.append(key(c))
    assert len(set(others)) == len(others)


# --- workers ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small_ir():
    """Triton IR that compiles quickly."""
    (call,) = lowering.pallas_calls(in_place, floats(128), arch=ARCH)
    return call.ir, call.num_warps, call.num_stages


def test_one_process_for_each_architecture(small_ir):
    require_cdna("triton")
    for _ in range(2):
        for arch in cdna.ARCHITECTURES:
            assert worker.request(arch, "triton", "ir", *small_ir)[0][:4] == b"\x7fELF"
    processes = {key: w.process.pid for key, w in worker._workers.items()}
    assert len(set(processes.values())) == len(processes) and os.getpid() not in processes.values()
    assert all(w.process.args[-2:] == list(key) for key, w in worker._workers.items())
    for arch in cdna.ARCHITECTURES:
        worker.request(arch, "triton", "ir", *small_ir)
    assert processes == {key: w.process.pid for key, w in worker._workers.items()}


def test_a_killed_process(small_ir):
    """Killed at work: RuntimeError; at rest: nobody notices. The next request works, and nothing is left open."""
    require_cdna("triton")

    def compiles():
        return worker.request(ARCH, "triton", "ir", *small_ir)[0][:4] == b"\x7fELF"

    assert compiles()
    busy = worker._workers[ARCH, "triton"]
    os.kill(busy.process.pid, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(worker.request, ARCH, "triton", "ir", *small_ir)
        while not busy.lock.locked():
            time.sleep(0.001)
        busy.process.kill()
        with pytest.raises(RuntimeError, match="the compiler's process died: exit code -9"):
            waiting.result(timeout=30)
    with pytest.raises(RuntimeError, match="died during another request"):
        busy.request("ir", *small_ir)
    assert compiles()
    idle = worker._workers[ARCH, "triton"]
    assert idle is not busy
    idle.process.kill()
    idle.process.wait()
    assert compiles()
    assert worker._workers[ARCH, "triton"] not in (busy, idle)
    for gone in (busy, idle):
        assert gone.errors.closed and gone.process.stdin.closed and gone.process.stdout.closed
    del busy, idle, gone
    gc.collect()  # ResourceWarning is an error here


def test_other_settings_need_another_process(small_ir, tmp_path, monkeypatch):
    """A compiler reads the environment when it starts: an old process would answer under the key of new settings.

    A process leaves no file behind, neither in the home nor among the temporary files.
    """
    require_cdna("triton")

    def started():
        assert worker.request(ARCH, "triton", "ir", *small_ir)[0][:4] == b"\x7fELF"
        return worker._workers[ARCH, "triton"]

    usual = started()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AMDGCN_USE_BUFFER_OPS", "1")
    other = started()
    assert other is not usual and started() is other
    folders = [pathlib.Path(w.folder.name) for w in (usual, other)]
    assert not folders[0].exists() and folders[1].stat().st_mode & 0o777 == 0o700
    assert list(folders[1].iterdir()) == list(tmp_path.iterdir()) == []
    other.process.stdin.close()  # as when this process is killed
    other.process.wait()
    assert not folders[1].exists()


def test_an_interrupted_request(small_ir, monkeypatch):
    """The next request would get the answer to this one, so the process ends; so do the files that it was writing."""
    require_cdna("triton")
    worker.request(ARCH, "triton", "ir", *small_ir)
    busy = worker._workers[ARCH, "triton"]
    folder = pathlib.Path(busy.folder.name)
    (folder / "half-written.o").write_bytes(b"")

    def interrupt(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        worker.request(ARCH, "triton", "ir", *small_ir)
    assert busy.process.poll() is not None and not folder.exists()


def test_a_compiler_that_does_not_answer(small_ir, monkeypatch):
    require_cdna("triton")
    worker.request(ARCH, "triton", "ir", *small_ir)
    monkeypatch.setattr(worker, "REQUEST_SECONDS", 0.2)
    os.kill(worker._workers[ARCH, "triton"].process.pid, signal.SIGSTOP)
    with pytest.raises(RuntimeError, match="died: it had not answered after 0.2 s"):
        worker.request(ARCH, "triton", "ir", *small_ir)


def test_an_unknown_request():
    with pytest.raises(RuntimeError, match="KeyError: 'nonsense'"):
        worker.request(ARCH, "triton", "nonsense")


# --- tools -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def forgotten():
    """Finders that look again."""
    toolchain.find_llvm.cache_clear()
    yield
    toolchain.find_llvm.cache_clear()


def without(*names):
    """A machine without some programs."""
    which = shutil.which

    def change(patch):
        patch(
            toolchain.shutil,
            "which",
            lambda p, **how: None if pathlib.Path(p).name.startswith(names) else which(p, **how),
        )

    return change


def installed(**versions):
    """A machine on which distributions have other versions, or are absent."""
    real = toolchain.version_of

    def change(patch):
        patch(toolchain, "version_of", lambda name: versions.get(name.replace("-", "_"), real(name)))

    return change


def only_old_llvm(patch):
    patch(toolchain.shutil, "which", lambda name, **how: f"/usr/bin/{name}" if name == "llvm-objdump" else None)
    patch(toolchain, "_major", lambda path: 18)


def no_cramjam(patch):
    real = toolchain.importlib.util.find_spec
    patch(toolchain.importlib.util, "find_spec", lambda name: None if name == "cramjam" else real(name))


def plugin_of(*names):
    return lambda patch: patch(toolchain.importlib.metadata, "files", lambda name: [pathlib.PurePath(n) for n in names])


RELEASE = ".".join(jax.__version__.split(".")[:3])
PLUGIN = next((name for name in toolchain.PLUGINS if toolchain.version_of(name)), toolchain.PLUGINS[0])
EXTRA = (
    "pip install 'sparse-mla-jax[cdna]'"
    if RELEASE == "0.12.0"
    else f"pip install triton==3.6.0 jax-rocm7-pjrt=={RELEASE} cramjam"
)
MISSING = {
    "objdump": (without("llvm-objdump"), "triton", "llvm-objdump-22 is not installed: apt-get install llvm-22"),
    "readelf": (without("llvm-readelf"), "xla", "llvm-readelf-22 is not installed: apt-get install llvm-22"),
    "old llvm": (only_old_llvm, "triton", "llvm-objdump-22 is not installed: apt-get install llvm-22"),
    "triton": (installed(triton=None), "triton", f"triton is not installed: {EXTRA}"),
    "plugin": (
        installed(jax_rocm7_pjrt=None, jax_rocm10_pjrt=None),
        "xla",
        f"jax-rocm7-pjrt is not installed: {EXTRA}",
    ),
    "other plugin": (
        installed(jax_rocm7_pjrt="0.1.2"),
        "xla",
        f"jax-rocm7-pjrt 0.1.2 does not match jax {jax.__version__}: pip install jax-rocm7-pjrt=={RELEASE}",
    ),
    "empty plugin": (
        plugin_of("README.md"),
        "xla",
        f"{PLUGIN} holds no xla_rocm_plugin.so: pip install --force-reinstall {PLUGIN}=={RELEASE}",
    ),
    "gcc": (without("gcc"), "xla", "gcc is not installed: apt-get install gcc"),
    "nm": (without("nm"), "xla", "nm is not installed: apt-get install binutils"),
    "binutils": (without("readelf"), "xla", "readelf is not installed: apt-get install binutils"),
    "cramjam": (no_cramjam, "xla", f"cramjam is not installed: {EXTRA}"),
}


@pytest.mark.parametrize("name", MISSING)
def test_missing_tools(name, monkeypatch, forgotten, tmp_path):
    """One line that says what to install, from `available` and from `compile`, before anything is compiled."""
    change, made_by, line = MISSING[name]
    require_cdna(made_by)
    change(monkeypatch.setattr)
    monkeypatch.setattr(worker, "request", None)
    toolchain.find_llvm.cache_clear()
    assert toolchain.available(made_by) == line
    with pytest.raises(cdna.ToolMissing) as caught:
        cdna.compile(surrounded, *SIZES, arch=ARCH, compiler=made_by, cache=tmp_path)
    assert str(caught.value) == line and "\n" not in line


def test_the_extra_of_another_jax(monkeypatch):
    """The extra's pins are those of one release; another release needs the plugin of its own."""
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    assert toolchain.extra() == "pip install triton==3.6.0 jax-rocm7-pjrt==0.99.0 cramjam"
    monkeypatch.setattr(jax, "__version__", f"{toolchain.JAX}.1")
    assert toolchain.extra() == "pip install 'sparse-mla-jax[cdna]'"
    pins = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())
    extra = pins["project"]["optional-dependencies"]["cdna"]
    assert {f"jax-rocm7-pjrt=={toolchain.JAX}", f"triton=={toolchain.TRITON_VERSION}"} < set(extra)
    assert any(pin.startswith(f"jax>={toolchain.JAX},") for pin in extra)


def test_a_plugin_serves_its_release(monkeypatch):
    """jax 0.12.0.1 has no plugin of its own: that of 0.12.0 is its plugin."""
    require_cdna("xla")
    monkeypatch.setattr(jax, "__version__", f"{RELEASE}.7")
    assert toolchain.plugin_library().exists()
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    with pytest.raises(cdna.ToolMissing, match="does not match jax 0.99.0"):
        toolchain.plugin_library()


def test_what_the_other_compiler_needs_is_not_asked_for(monkeypatch, forgotten):
    require_cdna("triton")
    for change in (installed(jax_rocm7_pjrt=None, jax_rocm10_pjrt=None), without("gcc", "nm", "readelf"), no_cramjam):
        with monkeypatch.context() as patched:
            change(patched.setattr)
            assert toolchain.available("triton") is None


# --- stubs -----------------------------------------------------------------------------------------------------------
def test_stubs_of_others_are_not_loaded(tmp_path, monkeypatch):
    """A folder or a library that another user could have written is built again, or elsewhere."""
    require_cdna("xla")
    plugin = toolchain.plugin_library()
    monkeypatch.setattr(rocm_stubs, "needed_libraries", lambda plugin: ["libamdhip64.so.7"])
    monkeypatch.setattr(rocm_stubs, "wanted_symbols", lambda plugin: [("hipGetDeviceCount", "")])
    (library,) = rocm_stubs.build(plugin, tmp_path)
    assert library.parent.stat().st_mode & 0o777 == library.stat().st_mode & 0o777 == 0o700
    good = library.read_bytes()
    library.write_bytes(good.replace(b"libamdhip64", b"planted fake"[:11]))
    library.chmod(0o722)
    rocm_stubs.build(plugin, tmp_path)
    assert library.read_bytes() == good and library.stat().st_mode & 0o777 == 0o700
    library.parent.chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0700"):
        rocm_stubs.build(plugin, tmp_path)
    loaded = []
    monkeypatch.setattr(rocm_stubs.ctypes, "CDLL", lambda path, mode: loaded.append((path, os.path.exists(path))))
    rocm_stubs.load(plugin, tmp_path)
    ((path, there),) = loaded
    assert there and not path.startswith(str(tmp_path)) and not os.path.exists(path)


def stamps(paths):
    return [(p.stat().st_ino, p.stat().st_mtime_ns) for p in paths]


def test_stubs_are_built_once(tmp_path, monkeypatch):
    require_cdna("xla")
    plugin = toolchain.plugin_library()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # as two processes would
        first, second = pool.map(lambda _: rocm_stubs.build(plugin, tmp_path), range(2))
    assert first == second and [p.name for p in first] == rocm_stubs.needed_libraries(plugin)
    (folder,) = tmp_path.iterdir()
    assert sorted(folder.iterdir()) == sorted(first)
    good, before = [p.read_bytes() for p in first], stamps(first)
    assert rocm_stubs.build(plugin, tmp_path) == first and stamps(first) == before
    runtime = next(p for p in first if p.name.startswith("libamdhip64"))
    count = ctypes.c_int(7)
    assert ctypes.CDLL(str(runtime)).hipGetDeviceCount(ctypes.byref(count)) == 100 and count.value == 0
    # The library stays mapped, so another one is damaged.
    victim = next(p for p in first if p.name.startswith("librocblas"))
    for damage in (None, b"", b"\x7fELF", good[0][:100], victim.read_bytes()[:-1], b"garbage" * 999):
        victim.unlink()
        if damage is not None:
            victim.write_bytes(damage)
        assert rocm_stubs.build(plugin, tmp_path) == first
        assert [p.read_bytes() for p in first] == good
    # Without gcc what is there still works, and what is not says so.
    without("gcc")(monkeypatch.setattr)
    assert rocm_stubs.build(plugin, tmp_path) == first
    victim.unlink()
    with pytest.raises(cdna.ToolMissing, match="^gcc is not installed: apt-get install gcc$"):
        rocm_stubs.build(plugin, tmp_path)


# --- execution -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], r"holds 0 arrays; kernel row_minus_sum reads 1"),
        ([whole(3 * COLUMNS)] * 2, "holds 2 arrays"),
        ([whole(2 * COLUMNS)], r"arrays\[0\] is float32\[1024\]; kernel row_minus_sum expects float32\[1536\]"),
        ([whole(3, COLUMNS)], r"is float32\[3, 512\]"),
        ([whole(3 * COLUMNS).astype(np.float64)], r"is float64\[1536\]"),
        ([whole(3 * COLUMNS).view(np.int32)], r"is int32\[1536\]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arrays_that_do_not_fit(compiled, arrays, message):
    (kernel,) = compiled(surrounded, *SIZES).kernels
    with pytest.raises(ValueError, match=message):
        cdna.execute(kernel, arrays)


def test_a_kernel_whose_arguments_are_not_known(compiled):
    (kernel,) = compiled(surrounded, *SIZES).kernels
    with pytest.raises(ValueError, match="reads 0"):
        cdna.execute(dataclasses.replace(kernel, arguments=()), [])


def test_an_unknown_order(compiled):
    (kernel,) = compiled(surrounded, *SIZES).kernels
    with pytest.raises(ValueError, match="order"):
        cdna.execute(kernel, [whole(3 * COLUMNS)], order="backwards")


@pytest.mark.parametrize("made_by", cdna.COMPILERS)
@pytest.mark.parametrize("aliased", [True, False])
def test_what_a_kernel_does_not_write(compiled, made_by, aliased):
    """In place it is the input, which itself does not change; else it is poison."""

    def elsewhere(x):
        return launch(first_half, x, name="first_half", num_warps=1)

    (kernel,) = compiled(in_place if aliased else elsewhere, floats(128), compiler=made_by).pallas_kernels
    x = whole(128)
    given = x.copy()
    (out,) = cdna.execute(kernel, [given]).outputs
    np.testing.assert_array_equal(out[:64], x[:64] + 1)
    np.testing.assert_array_equal(out[64:], x[64:] if aliased else np.full(256, 0xA5, np.uint8).view(np.float32))
    np.testing.assert_array_equal(given, x)


# --- devices ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arch", "how", "message"),
    [
        ("gfx906", {}, "arch is 'gfx906'; expected one of gfx942, gfx950"),
        (ARCH, {"compiler": "gcc"}, "compiler is 'gcc'; expected one of xla, triton"),
        (ARCH, {"order": "random"}, "order is 'random'; expected one of .*together"),
        (ARCH, {"budget": 0}, "budget is 0; expected at least 1 instruction"),
    ],
)
def test_unknown_devices(arch, how, message):
    with pytest.raises(ValueError, match=message), cdna.device(arch, **how):
        raise AssertionError("entered")
    assert targets.executor.value is None


@pytest.fixture
def traced():
    """A jitted program of one kernel, and how often it was traced."""
    require_cdna("triton")
    traces = []
    # The first kernel in interpret mode imports what changes every key, once.
    jax.jit(centred)(whole(COLUMNS))

    @jax.jit
    def fn(x):
        traces.append(1)
        return centred(x)

    return fn, traces


def test_devices_trace_and_record_for_themselves(traced):
    fn, traces = traced
    x = whole(COLUMNS)
    expected = x - x.sum()

    def run(device, launches, total):
        np.testing.assert_array_equal(fn(x), expected)
        assert len(traces) == total and (device is None or len(device.launches) == launches)

    run(None, 0, 1)
    with cdna.device("gfx942") as outer:
        run(outer, 1, 2)
        run(outer, 2, 2)  # jit keeps the trace
        with cdna.device("gfx950", order="reverse") as inner:
            run(inner, 1, 3)
            assert len(outer.launches) == 2
        run(outer, 3, 3)
        assert len(inner.launches) == 1
    run(None, 0, 3)
    with cdna.device("gfx942") as again:
        run(again, 1, 4)  # a new device, even of the same kind, has launches of its own
    with pytest.raises(ZeroDivisionError), cdna.device("gfx942"):
        _ = 1 // 0
    assert targets.executor.value is None
    run(None, 0, 4)
    assert [len(d.launches) for d in (outer, inner, again)] == [3, 1, 1]
    for device, arch in ((outer, "gfx942"), (inner, "gfx950")):
        for record in device.launches:
            assert (record.kernel.name, record.kernel.arch) == ("row_minus_sum", arch)
            assert record.counts.by_opcode()["s_endpgm"] == 4


def test_the_device_decides_how_waves_take_turns(traced, monkeypatch):
    fn, _ = traced
    orders = []
    real = execution.control_flow.run
    monkeypatch.setattr(execution.control_flow, "run", lambda *a, **how: orders.append(how["order"]) or real(*a, **how))
    for order in ("together", "forward", "reverse"):
        with cdna.device(ARCH, order=order):
            fn(whole(COLUMNS)).block_until_ready()
    assert orders == ["together", "forward", "reverse"]


def test_the_device_has_a_budget(traced):
    """The error reaches the caller, and the device can be used again."""
    fn, _ = traced
    with cdna.device(ARCH, budget=20) as device:
        with pytest.raises(jax.errors.JaxRuntimeError, match="kernel row_minus_sum, .* more than 20 instructions"):
            fn(whole(COLUMNS)).block_until_ready()
        assert device.launches == []


def test_a_device_without_a_compiler(traced, monkeypatch, forgotten):
    """Known when a program is traced, in the same line."""
    fn, _ = traced
    installed(triton=None)(monkeypatch.setattr)
    with cdna.device(ARCH), pytest.raises(cdna.ToolMissing, match="^triton is not installed: "):
        fn(whole(COLUMNS))
