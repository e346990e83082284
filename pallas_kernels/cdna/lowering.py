"""Lowers functions for an AMD GPU that this host lacks: to StableHLO, and to the Triton IR of its Pallas kernels.

This file compiles nothing and needs no plugin. It relies on two private interfaces of jax: the MLIR bindings, and the
context that parses Pallas' Triton IR.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax._src.lib.mlir import ir
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import _primitives
from pallas_kernels.cdna.program import ARCHITECTURES
from pallas_kernels.targets import find, lower_for, on_abstract_device

CUSTOM_CALL = "__gpu$xla.gpu.triton"
_CONFIG = "mhlo.backend_config"
_DTYPES: dict[str, Any] = {
    "i1": np.bool_,
    **{f"i{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"ui{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": ml_dtypes.bfloat16,
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "f8E5M2": ml_dtypes.float8_e5m2,
    "f8E8M0FNU": ml_dtypes.float8_e8m0fnu,
}


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """A Pallas kernel inside a lowered program.

    Attributes:
      name: name of the kernel.
      ir: text of its Triton IR.
      grid: programs per axis.
      num_warps, num_stages: launch options.
      inputs, outputs: (shape, dtype) of the arrays, in argument order.
      aliases: (output, input) pairs that share a buffer.
      module: StableHLO of the program that contains the kernel.
    """

    name: str
    ir: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    inputs: tuple[tuple[tuple[int, ...], np.dtype], ...]
    outputs: tuple[tuple[tuple[int, ...], np.dtype], ...]
    aliases: tuple[tuple[int, int], ...]
    module: str


def check_arch(arch: str) -> None:
    """Raises ValueError for an unknown architecture."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch is {arch!r}; expected one of {', '.join(ARCHITECTURES)}")


@contextlib.contextmanager
def abstract_gpu(arch: str) -> Iterator[None]:
    """Makes jax trace and lower for a GPU of `arch` that this host lacks."""
    check_arch(arch)
    with on_abstract_device(find(arch)):
        yield


def mesh_of(*args: Any) -> jax.sharding.AbstractMesh | None:
    """The mesh on which arguments lie; None if none of them names one.

    Args:
      *args: arrays or shapes in pytrees; those of a mesh have a jax.sharding.NamedSharding.

    Raises:
      ValueError: arguments of two meshes.
    """
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    named = [s for s in shardings if isinstance(s, NamedSharding) and not s.mesh.empty]
    # Of a mesh of devices that are there, only the axes count.
    found = {s.mesh.abstract_mesh.update(abstract_device=None): s.mesh.abstract_mesh for s in named}
    if len(found) > 1:
        raise ValueError(f"arguments lie on two meshes, {' and '.join(map(str, found))}; expected is one")
    return next(iter(found.values()), None)


def lower(fn: Callable, *args: Any, arch: str, donate_argnums: int | Sequence[int] = ()) -> Any:
    """`jax.stages.Lowered` of `fn` for an architecture.

    Args:
      fn: function of `args`. In a mesh it may call `jax.shard_map`, which takes its mesh from there if not told one.
      *args: arrays or shapes, in pytrees. Those with a jax.sharding.NamedSharding say the mesh: one of devices, or a
        jax.sharding.AbstractMesh. Those without one are on every device.
      arch: "gfx942" or "gfx950".
      donate_argnums: arguments whose buffers the result may reuse.

    Raises:
      ValueError: an unknown architecture, or arguments of two meshes.
    """
    check_arch(arch)
    mesh = mesh_of(args)

    def shape_of(a):
        spec = getattr(getattr(a, "sharding", None), "spec", PartitionSpec())
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    avals = jax.tree.map(shape_of, args)
    with contextlib.ExitStack() as stack:
        if mesh is None:
            stack.enter_context(abstract_gpu(arch))
        else:
            # `shard_map` refuses a mesh other than the one in use, so the mesh keeps its device.
            stack.enter_context(lower_for(arch))
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        # Wrap `fn` in a new function object: jit must not reuse a trace made for another architecture.
        donated = (donate_argnums,) if isinstance(donate_argnums, int) else tuple(donate_argnums)
        traced = jax.jit(lambda *a: fn(*a), donate_argnums=donated, keep_unused=True).trace(*avals)
        return traced.lower(lowering_platforms=("rocm",))


def _array_type(value: ir.Value) -> tuple[tuple[int, ...], np.dtype]:
    type_ = ir.RankedTensorType(value.type)
    name = str(type_.element_type)
    if name not in _DTYPES:
        raise ValueError(f"a kernel has an array of {name}; known are {', '.join(_DTYPES)}")
    return tuple(type_.shape), np.dtype(_DTYPES[name])


def _triton_ir(serialized: bytes) -> str:
    """Text of Triton IR without locations, so that it does not depend on file names and line numbers."""
    with _primitives.ir_context():
        return str(ir.Module.parse(serialized).operation.get_asm())


def _walk(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _walk(inner.operation)


def calls_in(lowered: Any) -> list[PallasCall]:
    """The Pallas kernels of a `jax.stages.Lowered` program, in textual order."""
    return _calls_of(lowered.compiler_ir("stablehlo"), lowered.as_text())


def calls_in_exported(exported: Any) -> list[PallasCall]:
    """The Pallas kernels of a `jax.export.Exported` program, of all its platforms, in textual order."""
    text = exported.mlir_module()
    with mlir.make_ir_context():
        return _calls_of(ir.Module.parse(text), text)


def _calls_of(module: Any, text: str) -> list[PallasCall]:
    found = []
    with module.context:
        for operation in _walk(module.operation):
            attributes = operation.attributes
            if operation.name != "stablehlo.custom_call" or _CONFIG not in attributes:
                continue
            if ir.StringAttr(attributes["call_target_name"]).value != CUSTOM_CALL:
                continue
            config = {named.name: named.attr for named in ir.DictAttr(attributes[_CONFIG])}  # type: ignore[attr-defined]
            number = {
                k: ir.IntegerAttr(config[k]).value for k in ("grid_x", "grid_y", "grid_z", "num_warps", "num_stages")
            }
            aliases = re.findall(
                r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)",
                str(attributes["output_operand_aliases"]) if "output_operand_aliases" in attributes else "",
            )
            found.append(
                PallasCall(
                    name=ir.StringAttr(config["name"]).value,
                    ir=_triton_ir(ir.StringAttr(config["ir"]).value_bytes),
                    grid=(number["grid_x"], number["grid_y"], number["grid_z"]),
                    num_warps=number["num_warps"],
                    num_stages=number["num_stages"],
                    inputs=tuple(_array_type(v) for v in operation.operands),
                    outputs=tuple(_array_type(v) for v in operation.results),
                    aliases=tuple((int(output or 0), int(operand)) for output, operand in aliases),
                    module=text,
                )
            )
    return found


def pallas_calls(fn: Callable, *args: Any, arch: str) -> list[PallasCall]:
    """The Pallas kernels of `fn`, lowered for `arch`.

    Raises:
      ValueError: `arch` is unknown.
    """
    return calls_in(lower(fn, *args, arch=arch))
