"""`compile` turns a jitted function into the kernels that JAX would launch on gfx942 or gfx950."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.cdna import code_object, container, disk_cache, lowering, toolchain, worker, xla_rocm
from pallas_kernels.cdna.container import Message
from pallas_kernels.cdna.lowering import PallasCall
from pallas_kernels.cdna.program import COMPILERS, Argument, Kernel, Program

# Field numbers of xla.gpu.ThunkProto: steps that contain other steps, kernels, copies and library calls.
_SEQUENTIAL, _CONDITIONAL, _WHILE, _GROUP, _ASYNC, _ASYNC_DONE = 2, 6, 7, 47, 57, 58
_CUSTOM_KERNEL, _KERNEL = 36, 8
_COPIES = {3: "copy", 13: "device to device", 4: "device to host", 5: "host to device"}
_LIBRARIES = {
    **{9: "gemm", 11: "triangular solve", 15: "cudnn", 20: "select k", 22: "hipblaslt matmul", 24: "norm"},
    **{25: "convolution", 27: "fft", 30: "custom call"},
}
# Collectives, which `collectives.collectives_of` reads from the text of the program.
_COLLECTIVES = (38, 39, 40, 41, 42, 43, 46)
_NUMBERS = {12: "number of the replica", 14: "number of the device"}
_MOST_NESTED = 100
_FILLS = {19: "fill with zeros", 28: "fill with a value"}
# Matches a Pallas kernel in the text of the optimised HLO.
_PALLAS = re.compile(
    rf'^\s*(?:ROOT )?%?([\w.-]+) = .*custom_call_target="{re.escape(lowering.CUSTOM_CALL)}"', re.MULTILINE
)
# xla.PrimitiveType -> dtype.
_ELEMENT_TYPES: dict[int, Any] = {
    **{1: np.bool_, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.uint8, 7: np.uint16, 8: np.uint32},
    **{9: np.uint64, 10: np.float16, 11: np.float32, 12: np.float64, 16: ml_dtypes.bfloat16},
    **{19: ml_dtypes.float8_e5m2, 20: ml_dtypes.float8_e4m3fn, 25: ml_dtypes.float8_e4m3fnuz},
    **{21: ml_dtypes.int4, 22: ml_dtypes.uint4, 33: ml_dtypes.float8_e8m0fnu, 15: np.complex64, 18: np.complex128},
}

# What is stored of a kernel that Triton compiled: the ELF file, bytes of dynamic LDS, and what was read from the file.
_TRITON_CODE = (bytes, int, code_object.KernelCode)


def _check(arch: str, compiler: str) -> None:
    lowering.check_arch(arch)
    if compiler not in COMPILERS:
        raise ValueError(f"compiler is {compiler!r}; expected one of {', '.join(COMPILERS)}")
    toolchain.require(compiler)


def compile(
    fn: Callable,
    *args: Any,
    arch: str,
    compiler: str = "xla",
    donate_argnums: int | Sequence[int] = (),
    cache: pathlib.Path | None = None,
) -> Program:
    """Compiles `fn` for a GPU that this host need not have.

    Args:
      fn: function to compile; it may be jitted already.
      *args: arrays or shapes (jax.ShapeDtypeStruct), in pytrees. If some have a jax.sharding.NamedSharding, the program
        is compiled for the devices of its mesh; a jax.sharding.AbstractMesh has as many as needed.
      arch: "gfx942" or "gfx950".
      compiler: "xla" compiles the whole program, as JAX would launch it; "triton" compiles only its Pallas kernels,
        with the public Triton wheel.
      donate_argnums: arguments whose buffers the result may reuse.
      cache: folder of compiled code; None means `toolchain.default_cache()`.

    Returns:
      The program: kernels in launch order, and for "xla" also memory, buffers written in place and copies. In a mesh it
      is what one device runs; `collectives_of` lists what the devices exchange.

    Raises:
      ValueError: `arch` or `compiler` is unknown, arguments lie on two meshes, or a mesh has more than eight devices
        but no multiple of eight.
      ToolMissing: the compiler or a tool is not installed.
      RuntimeError: the compiler refused the program, or crashed.
    """
    _check(arch, compiler)
    lowered = lowering.lower(fn, *args, arch=arch, donate_argnums=donate_argnums)
    if compiler == "triton":
        kernels = tuple(compile_kernel(call, arch, compiler, cache=cache) for call in lowering.calls_in(lowered))
        devices = xla_rocm.partitions(lowered.as_text())
        return Program(arch, toolchain.compiler_name(compiler), kernels, devices=devices)
    return _program(lowered.as_text(), arch, cache)


def compile_lowered(text: str, *, arch: str, cache: pathlib.Path | None = None) -> Program:
    """Compiles StableHLO with XLA:ROCm, for as many devices as its attribute `mhlo.num_partitions` says.

    Args:
      text: of a module that was lowered for `arch`, see `lowering.lower`.
      arch: "gfx942" or "gfx950".
      cache: as in `compile`.

    Raises:
      ValueError: `arch` is unknown, or the number of devices is neither at most that of one machine nor a multiple.
      ToolMissing: the compiler or a tool is not installed.
      RuntimeError: the compiler refused the program, or crashed.
    """
    _check(arch, "xla")
    return _program(text, arch, cache)


def compile_kernel(call: PallasCall, arch: str, compiler: str, *, cache: pathlib.Path | None = None) -> Kernel:
    """Compiles one Pallas kernel; with "xla" its program must contain no other Pallas kernel.

    Raises:
      ValueError: `arch` or `compiler` is unknown, or the program contains another Pallas kernel.
      ToolMissing: the compiler or a tool is not installed.
      RuntimeError: the compiler refused the kernel, or crashed.
    """
    _check(arch, compiler)
    if compiler == "xla":
        kernels = _program(call.module, arch, cache).pallas_kernels
        if len(kernels) != 1:
            raise ValueError(f"the program of kernel {call.name} holds {len(kernels)} Pallas kernels; 1 was expected")
        return kernels[0]
    key = disk_cache.key_of(
        what="Triton IR through make_ttir",
        ir=call.ir,
        options=[call.num_warps, call.num_stages],
        arch=arch,
        settings=toolchain.settings(compiler),
    )
    made = _remembered(key, cache, _TRITON_CODE)
    if made is None:
        elf, lds = worker.request(arch, compiler, "ir", call.ir, call.num_warps, call.num_stages)
        (code,) = code_object.kernels(elf, arch)
        made = _remember(key, (elf, lds, code), cache)
    elf, lds, code = made
    threads = 64 * call.num_warps
    # An aliased output has its own pointer, which equals the pointer of its input.
    shared = dict(call.aliases)
    arguments = [Argument(shape, dtype, "input") for shape, dtype in call.inputs]
    for number, (shape, dtype) in enumerate(call.outputs):
        arguments.append(Argument(shape, dtype, "output", shared.get(number)))
    return Kernel(
        name=code.name,
        arch=arch,
        compiler=toolchain.compiler_name(compiler),
        origin="pallas",
        grid=call.grid,
        block=(threads, 1, 1),
        code_object=elf,
        assembly=code.assembly,
        resources=code.resources(arch, threads, lds),
        arguments=tuple(arguments),
    )


# --- memory and disk
@functools.lru_cache(maxsize=512)
def _in_memory(key: str, cache: pathlib.Path | None) -> list:
    """A list per key that the process keeps: empty until `_remember` or `_remembered` appends the value."""
    del key, cache
    return []


def _remembered(key: str, cache: pathlib.Path | None, kind: type | tuple[type, ...]) -> Any:
    """The stored value of a type, or of a tuple of these types; None if nothing of this kind is stored."""
    box = _in_memory(key, cache)
    if not box:
        stored = disk_cache.read(key, cache)
        if isinstance(kind, type):
            good = isinstance(stored, kind)
        else:
            good = isinstance(stored, tuple) and list(map(type, stored)) == list(kind)
        if good:
            box.append(stored)
    return box[0] if box else None


def _remember(key: str, value: Any, cache: pathlib.Path | None) -> Any:
    disk_cache.write(key, value, cache)
    _in_memory(key, cache).append(value)
    return value


# --- XLA's executable
def _program(text: str, arch: str, cache: pathlib.Path | None) -> Program:
    """Compiles StableHLO with XLA:ROCm and parses the executable."""
    xla_rocm.topology(xla_rocm.partitions(text))
    name = toolchain.compiler_name("xla")
    key = disk_cache.key_of(
        what="module",
        layout=3,
        module=text,
        arch=arch,
        target=xla_rocm.target_config(arch),
        settings=toolchain.settings("xla"),
    )
    program = _remembered(key, cache, Program)
    if program is None:
        made = worker.request(arch, "xla", "module", text, cache)
        program = _remember(key, read_executable(made, arch, name), cache)
    return program


def _steps(thunks: Sequence[Message], depth: int = 0) -> Iterator[tuple[int, Message, Message]]:
    """Yields (kind, body, info) of every step in order; branches, loop conditions and loop bodies occur once."""
    if depth > _MOST_NESTED:
        raise ValueError(f"steps are nested more than {_MOST_NESTED} deep")
    for thunk in thunks:
        info = thunk.message(1)
        for kind in sorted(set(thunk.fields) - {1}):
            body = thunk.message(kind)
            if kind == _SEQUENTIAL:
                yield from _steps(body.messages(1), depth + 1)
            elif kind == _CONDITIONAL:
                for branch in body.messages(2):
                    yield from _steps(branch.messages(1), depth + 1)
            elif kind == _WHILE:
                yield from _steps(body.message(2).messages(1), depth + 1)
                yield from _steps(body.message(3).messages(1), depth + 1)
            elif kind == _GROUP:
                yield from _steps(body.messages(2), depth + 1)
            elif kind == _ASYNC:
                yield from _steps(body.message(3).messages(1), depth + 1)
            else:
                yield kind, body, info


def _slice(shaped: Message) -> tuple[int, int, int]:
    """(buffer, offset, bytes) of a kernel argument."""
    where = shaped.message(1)
    return where.number(3), where.number(1), where.number(2)


def _three(dimensions: Message) -> tuple[int, int, int]:
    return dimensions.number(1, 1), dimensions.number(2, 1), dimensions.number(3, 1)


def _array(shaped: Message) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of a kernel argument, from its xla.ShapeProto."""
    shape = shaped.message(2)
    dtype = _ELEMENT_TYPES.get(shape.number(2))
    if dtype is None:
        raise ValueError(f"a kernel has an array of element type {shape.number(2)}, which is not known here")
    return tuple(shape.numbers(3)), np.dtype(dtype)


def _arguments(step: Message) -> tuple[Argument, ...]:
    """Roles and shapes of a kernel's pointers: inputs, then outputs. An output may share the buffer of an input."""
    written = step.numbers(2)
    places = [_slice(shaped) for shaped in step.messages(1)]
    if len(written) != len(places):
        raise ValueError(f"a kernel has {len(places)} arguments and says of {len(written)} whether they are written")
    out: list[Argument] = []
    for number, (shaped, where) in enumerate(zip(step.messages(1), places)):
        # XLA lists a buffer that is updated in place twice, both times as written: the last entry is the output.
        is_output = bool(written[number]) and where not in places[number + 1 :]
        same = places.index(where) if is_output and where in places[:number] else None
        out.append(Argument(*_array(shaped), "output" if is_output else "input", same))
    return tuple(out)


def _kernel(step: Message, info: Message, arch: str, compiler: str, pallas: set[str]) -> Kernel:
    """Reads a CustomKernelThunk: its code object, launch dimensions and arguments."""
    custom = step.message(3)
    elf = custom.message(2).message(2).data(1)
    threads, lds = _three(custom.message(4).message(1)), custom.number(6)
    symbol = custom.message(2).text(4) or custom.text(1)
    codes = {code.name: code for code in code_object.kernels(elf, arch)}
    if symbol not in codes:
        raise ValueError(f"the code object of {info.text(1)} holds {', '.join(codes)}; {symbol} was expected")
    is_pallas = info.text(1) in pallas
    return Kernel(
        name=symbol,
        arch=arch,
        compiler=compiler,
        origin="pallas" if is_pallas else "xla",
        grid=_three(custom.message(3).message(2)),
        block=threads,
        code_object=elf,
        assembly=codes[symbol].assembly,
        resources=codes[symbol].resources(arch, threads[0] * threads[1] * threads[2], lds),
        arguments=_arguments(step),
    )


def read_executable(made: dict[str, Any], arch: str, compiler: str) -> Program:
    """Reads the program from the worker's reply.

    Raises:
      ValueError: the executable has a layout that this version does not support.
    """
    executable = container.gpu_executable(made["executable"])
    pallas = set(_PALLAS.findall(made["hlo"]))
    kernels: list[Kernel] = []
    copies: list[tuple[int, str]] = []
    libraries: list[str] = []
    for kind, body, info in _steps(executable.messages(13)):
        where = info.text(1)
        if kind == _CUSTOM_KERNEL:
            kernels.append(_kernel(body, info, arch, compiler, pallas))
        elif kind == _KERNEL:
            raise ValueError(f"kernel {body.text(3)} has its code elsewhere, a layout of older versions of XLA")
        elif kind in _COPIES:
            inner = body.message(1) if kind != 3 else body
            copies.append((inner.number(3) or _slice(inner.message(1))[2], f"{_COPIES[kind]}: {where}"))
        elif kind in _LIBRARIES:
            libraries.append(f"{_LIBRARIES[kind]}: {where}")
        elif kind in _FILLS:
            libraries.append(f"{_FILLS[kind]}: {where}")
        elif kind in _NUMBERS:
            libraries.append(f"{_NUMBERS[kind]}: {where}")
        elif kind not in (*_COLLECTIVES, _ASYNC_DONE):
            libraries.append(f"step of kind {kind}: {where}")
    return Program(
        arch=arch,
        compiler=compiler,
        kernels=tuple(kernels),
        devices=made["devices"],
        **{name: made[name] for name in ("temporary_bytes", "argument_bytes", "output_bytes", "alias_bytes")},
        in_place=_in_place(executable),
        copies=tuple(copies),
        library_calls=tuple(libraries),
        hlo=made["hlo"],
    )


def _in_place(executable: Message) -> tuple[int, ...]:
    """Numbers of the inputs whose buffer an output reuses."""
    parameters = {a.number(1): a.number(6) for a in executable.message(10).messages(1) if a.number(5)}
    outputs = [entry.message(2) for entry in executable.messages(11)]
    return tuple(sorted({parameters[o.number(1)] for o in outputs if 3 in o.fields and o.number(1) in parameters}))
