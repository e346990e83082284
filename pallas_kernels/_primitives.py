"""Operations of Triton that Pallas has no words for, as JAX primitives.

The only file of the kernels that imports jax._src."""

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
    """Reads refs[number].at[index], 0 where `mask` is False, from references alike but for their first axis.

    `number` is one for the program, so what chooses among the references is one address, not what was read from all.
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
    """FP8 values [K, width] of type `dtype` from byte `column` on of rows [K] of refs[number], uint32 words [N, W].

    0 in rows where `mask` is False. The arrays must hold less than 2**31 bytes. What is loaded in the type in which the
    matrix units multiply it goes to them unseen.
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
    """A load through a chosen pointer, or through one of another type: Pallas has no words for these."""
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
        # Added first, the start costs no register beside the offsets that all columns share.
        pointer = lowering._add(pointer, lowering._ir_constant(start, word))
        zeros = lowering._zeros(lowering.ir.RankedTensorType.get(shape, kind)) if mask else None
        where = lowering._add(lowering._bcast_to(pointer, shape), offsets)
        return lowering._load(where, mask=mask[0] if mask else None, other=zeros)

    return primitive


def assembly(
    text: str, constraints: str, *args: jax.Array, dtype: Any, pack: int = 1, pinned: bool = False
) -> jax.Array:
    """Instructions of the target per `pack` elements of `args`; see LLVM's inline assembly for the constraints.

    pinned: Triton does not rearrange what is computed before it to suit what comes after.
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
    """Pallas' own inline assembly has no side effects for Triton, and values are moved across it."""
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
    """An int32 array, of which a GPU's compiler no longer knows where it comes from.

    What is made of it is made after it: offsets that the start and the end of a kernel have in common would otherwise
    occupy registers in between.
    """
    if target == HOST:
        return value
    return _inert_primitive().bind(value, memory=False, register="v" if target in CDNA else "r")[0]


def fence(arrays: Sequence[jax.Array], target: Target) -> list[jax.Array]:
    """`arrays`, on CDNA for use when all loads before this have been asked for: one wait for memory, not one for each.

    Compilers save registers by asking for every load just before its use. Only arrays of the first's shape and type are
    held back; they are of 32 bits, or of 16 and even in number.
    """
    out = list(arrays)
    if target in CDNA:
        alike = [i for i, a in enumerate(arrays) if (a.shape, a.dtype) == (arrays[0].shape, arrays[0].dtype)]
        for i, held in zip(alike, _inert_primitive().bind(*(arrays[i] for i in alike), memory=True, register="v")):
            out[i] = held
    return out


@functools.cache
def _inert_primitive() -> Any:
    """Inline assembly of no instruction with side effects, of which all operands are there; loads pass it or do not."""
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
    """float32 [M, N] of float8_e4m3fn a[M, D] and b[N, D]; NVIDIA's units keep about 14 bits of a sum."""
    if target != HOST:
        return _dot_fp8_primitive().bind(a, b)
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jax.numpy.float32)


@functools.cache
def _dot_fp8_primitive() -> Any:
    """Pallas' own product asks Triton for full precision within an instruction, which keeps it off the FP8 units."""
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
        # All of the sum: there is no more precise addition to interleave.
        return dialect.dot(a, dialect.trans(b, (1, 0)), zeros, max_num_imprecise_acc=ctx.avals_in[0].shape[1])

    return primitive


def ir_context() -> Any:
    """An MLIR context that knows the Triton IR of lowered kernels."""
    from jax._src.pallas.triton import lowering

    return lowering._new_ir_context()
