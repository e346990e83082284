"""Triton operations that Pallas does not expose, as JAX primitives.

No other file of the kernels imports jax._src."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend

from pallas_kernels._call import load, pltriton
from pallas_kernels.targets import CDNA, HOST, Target


def load_from(
    refs: Sequence[Any], number: jax.Array | int, *index: jax.Array, target: Target, mask: jax.Array | None = None
) -> jax.Array:
    """Loads refs[number].at[index], 0 where `mask` is False. The refs may differ in the length of their first axis.

    `number` is one scalar for the whole program. A GPU selects one pointer and loads once, not once from every ref.
    """
    if len(refs) == 1:
        where = refs[0].at[index]
        return load(where) if mask is None else load(where, mask=mask, other=jax.numpy.zeros((), refs[0].dtype))
    if target != HOST:
        offsets = index[0]
        for size, column in zip(refs[0].shape[1:], index[1:]):
            offsets = offsets * size + column
        return _load_from(refs, number, offsets, mask, 0, refs[0].dtype)
    out = None
    for i, ref in enumerate(refs):
        value = load_from([ref], 0, jax.numpy.where(number == i, index[0], 0), *index[1:], target=target, mask=mask)
        out = value if out is None else jax.numpy.where(number == i, value, out)
    assert out is not None
    return out


def load_codes(
    refs: Sequence[Any],
    number: jax.Array | int,
    rows: jax.Array,
    mask: jax.Array,
    column: int,
    width: int,
    dtype: Any,
    target: Target,
) -> jax.Array:
    """Loads FP8 values [K, width]: the bytes from `column` on in rows[K] of refs[number], which is uint32 [N, W].

    Rows where `mask` is False give 0. Each array must be smaller than 2**31 bytes. If `dtype` is the type that the
    tensor cores multiply, they read the values from shared memory; the values pass through no register.
    """
    columns = jax.numpy.arange(width, dtype=jax.numpy.int32)
    mask = jax.numpy.broadcast_to(mask[:, None], (rows.shape[0], width))
    if target != HOST:
        offsets = (rows * (4 * refs[0].shape[1]))[:, None] + columns[None, :]
        return _load_from(refs, number, offsets, mask, column, dtype)
    columns = jax.numpy.broadcast_to(column + columns[None, :], mask.shape)
    rows = jax.numpy.broadcast_to(rows[:, None], mask.shape)
    words = load_from(refs, number, rows, columns // 4, target=target, mask=mask)
    codes = (words >> (8 * (columns % 4)).astype(jax.numpy.uint32)).astype(jax.numpy.uint8)
    return jax.lax.bitcast_convert_type(codes, dtype)


def _load_from(refs, number, offsets, mask, start: int, dtype: Any) -> jax.Array:
    masks = [] if mask is None else [mask]
    number = jax.numpy.int32(number)
    dtype = jax.numpy.dtype(dtype)
    return _load_from_primitive().bind(number, *refs, offsets, *masks, refs=len(refs), start=start, dtype=dtype)


@functools.cache
def _load_from_primitive() -> Any:
    """Primitive: a load through a pointer that is selected at run time or cast to another type. Pallas has neither."""
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering
    from jax._src.state.types import ReadEffect

    primitive = jax.extend.core.Primitive("load_from")

    @primitive.def_effectful_abstract_eval
    def _(number, *args, refs, start, dtype):
        del number, start
        return jax.core.ShapedArray(args[refs].shape, dtype), {ReadEffect(1 + i) for i in range(refs)}

    @lowering.register_lowering(primitive)
    def _(ctx, number, *args, refs, start, dtype):
        pointers, (offsets, *mask) = args[:refs], args[refs:]
        word = lowering.ir.IntegerType.get_signless(32)
        pointer = pointers[0]
        for i, other in enumerate(pointers[1:], 1):
            pointer = lowering.arith_dialect.select(
                lowering._equal(number, lowering._ir_constant(i, word), signed=True), other, pointer
            )
        kind, shape = lowering._dtype_to_ir_type(dtype), ctx.avals_out[0].shape
        if dtype != ctx.avals_in[1].dtype:
            pointer = dialect.bitcast(dialect.PointerType.get(kind, 1), pointer)
        # Add `start` to the scalar pointer, not to the offsets: the offsets stay shared by all tiles.
        pointer = lowering._add(pointer, lowering._ir_constant(start, word))
        zeros = lowering._zeros(lowering.ir.RankedTensorType.get(shape, kind)) if mask else None
        where = lowering._add(lowering._bcast_to(pointer, shape), offsets)
        return lowering._load(where, mask=mask[0] if mask else None, other=zeros)

    return primitive


def assembly(
    text: str, constraints: str, *args: jax.Array, dtype: Any, pack: int = 1, pinned: bool = False
) -> jax.Array:
    """Runs inline assembly on each `pack` elements of `args`; `constraints` are those of LLVM's inline assembly.

    pinned: declares side effects, so that Triton does not change the layout of `args` to suit uses of the result.
    """
    if pinned:
        return _pinned_primitive().bind(
            *args, text=text, constraints=constraints, dtype=jax.numpy.dtype(dtype), pack=pack
        )
    (out,) = pltriton.elementwise_inline_asm(
        text,
        args=args,
        constraints=constraints,
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, dtype)],
    )
    return out


@functools.cache
def _pinned_primitive() -> Any:
    """Primitive: inline assembly with side effects. Pallas declares none, so Triton moves layout changes across it."""
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering

    primitive = jax.extend.core.Primitive("pinned_assembly")

    @primitive.def_abstract_eval
    def _(*args, dtype, **_):
        return jax.core.ShapedArray(args[0].shape, dtype)

    @lowering.register_lowering(primitive)
    def _(ctx, *args, text, constraints, dtype, pack):
        kind = lowering.ir.RankedTensorType.get(ctx.avals_out[0].shape, lowering._dtype_to_ir_type(dtype))
        return dialect.elementwise_inline_asm(
            [kind], text, constraints=constraints, pure=False, packed_element=pack, args=args
        )

    return primitive


def hidden(value: jax.Array, target: Target) -> jax.Array:
    """Returns an int32 array unchanged and hides its origin from the GPU's compiler.

    The compiler computes values that depend on it after this point. Otherwise it would keep offsets that the start and
    the end of a kernel share in registers throughout.
    """
    if target == HOST:
        return value
    return _inert_primitive().bind(value, memory=False, register="v" if target in CDNA else "r")[0]


def fence(arrays: Sequence[jax.Array], target: Target) -> list[jax.Array]:
    """Returns `arrays`. On CDNA it makes the compiler issue all earlier loads before the first use of a result.

    The kernel then waits for memory once, not once per load: to save registers, compilers issue each load just before
    its use. Only arrays with the shape and type of the first one are fenced. Their elements have 32 bits, or 16 bits
    and an even count.
    """
    out = list(arrays)
    if target in CDNA:
        alike = [i for i, a in enumerate(arrays) if (a.shape, a.dtype) == (arrays[0].shape, arrays[0].dtype)]
        for i, held in zip(alike, _inert_primitive().bind(*(arrays[i] for i in alike), memory=True, register="v")):
            out[i] = held
    return out


@functools.cache
def _inert_primitive() -> Any:
    """Primitive: empty inline assembly with side effects that returns its operands. memory: no load may cross it."""
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering

    primitive = jax.extend.core.Primitive("inert_assembly")
    primitive.multiple_results = True

    @primitive.def_abstract_eval
    def _(*args, memory, register):
        del memory, register
        return [jax.core.ShapedArray(a.shape, a.dtype) for a in args]

    @lowering.register_lowering(primitive)
    def _(ctx, *args, memory, register):
        of, count = ctx.avals_out[0], len(args)
        kind = lowering.ir.RankedTensorType.get(of.shape, lowering._dtype_to_ir_type(of.dtype))
        constraints = ["=" + register] * count + [str(i) for i in range(count)] + ["~{memory}"] * memory
        pack = 4 // of.dtype.itemsize
        out = dialect.elementwise_inline_asm(
            [kind] * count, "", constraints=",".join(constraints), pure=False, packed_element=pack, args=args
        )
        return [out] if count == 1 else out

    return primitive


def dot_fp8(a: jax.Array, b: jax.Array, target: Target) -> jax.Array:
    """float32 [M, N]: a @ b.T of float8_e4m3fn a[M, D], b[N, D]. NVIDIA's tensor cores keep about 14 bits of a sum."""
    if target != HOST:
        return _dot_fp8_primitive().bind(a, b)
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jax.numpy.float32)


@functools.cache
def _dot_fp8_primitive() -> Any:
    """Primitive: a Triton dot on FP8 tensor cores. Pallas' dot requests full precision, which rules them out."""
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering

    primitive = jax.extend.core.Primitive("dot_fp8")

    @primitive.def_abstract_eval
    def _(a, b):
        return jax.core.ShapedArray((a.shape[0], b.shape[0]), jax.numpy.float32)

    @lowering.register_lowering(primitive)
    def _(ctx, a, b):
        (out,) = ctx.avals_out
        zeros = lowering._zeros(lowering.ir.RankedTensorType.get(out.shape, lowering.ir.F32Type.get()))
        # Accumulate all D terms in the tensor cores, without float32 additions in between.
        return dialect.dot(a, dialect.trans(b, (1, 0)), zeros, max_num_imprecise_acc=ctx.avals_in[0].shape[1])

    return primitive


def ir_context() -> Any:
    """Returns an MLIR context with the dialects of lowered Triton kernels."""
    from jax._src.pallas.triton import lowering

    return lowering._new_ir_context()
