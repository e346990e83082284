"""Matrix instructions (MFMA): D = A . B + C over the 64 lanes of a wave.

In an M x N x K instruction, lane l holds row l % M of A and column l % N of B. It holds K / (64 / M) consecutive values
of k; its run of k has the index l // M. Register r of lane l holds this element of C and D:

  * M = 16: (4 * (l // 16) + r, l % 16).
  * M = 32: (8 * (r // 4) + 4 * (l // 32) + r % 4, l % 32).
  * M = 4: (r, l % 4) of block l // 4; these instructions compute 16 independent blocks.

The interpreter sums in float64 and rounds once. The hardware rounds more often; the tolerances of float32 sums cover
the difference. Source: the matrix instruction chapters of AMD's CDNA3 and CDNA4 ISA documents.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction, Operand
from pallas_kernels.cdna.interpreter.machine import LANE, LANES, Waves
from pallas_kernels.cdna.interpreter.operands import Step, raw_reader
from pallas_kernels.cdna.interpreter.vector_arithmetic import FP8

_NAME = re.compile(r"v_mfma_(?:(scale)_)?(f32|i32)_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(\w+)")
_NARROW: dict[str, Any] = {
    "f32": np.float32,
    "xf32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i8": np.int8,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and element types of an MFMA instruction."""

    m: int
    k: int
    a: Any
    b: Any
    reduced: bool  # xf32: float32 rounded to 10 bits of fraction
    accumulator: Any
    scaled: bool

    @property
    def per_lane(self) -> int:
        """Number of consecutive values of k that a lane holds."""
        return self.k if self.m == 4 else self.k * self.m // LANES

    @property
    def results(self) -> int:
        """Number of registers of D."""
        return 16 if self.m == 32 else 4


def shape_of(i: Instruction, arch: str) -> Shape:
    """Shape of an MFMA instruction; the architecture determines its FP8 types."""
    match = _NAME.fullmatch(i.opcode)
    if not match:
        raise i.error("unknown matrix instruction")
    scale, accumulator, m, n, k, blocks, types = match.groups()
    if m != n or int(m) not in (4, 16, 32) or (int(blocks or 1) > 1 and m != "4"):
        raise i.error("this shape of matrix instruction is not implemented")
    fp8, bf8 = FP8[arch]
    table = {**_NARROW, "fp8": fp8, "bf8": bf8}
    if types == "f8f6f4":
        formats = [i.int_modifier("cbsz"), i.int_modifier("blgp")]
        if max(formats) > 1:
            raise i.error("six- and four-bit formats are not implemented")
        a, b = ((fp8, bf8)[f] for f in formats)
    else:
        if any(x in i.modifiers for x in ("cbsz", "abid", "blgp")):
            raise i.error("broadcast modifiers of matrix instructions are not implemented")
        names = types.removesuffix("_1k").split("_")
        a, b = table[names[0]], table[names[-1]]
    wide = np.int32 if accumulator == "i32" else np.float32
    return Shape(int(m), int(k), a, b, types == "xf32", wide, scale is not None)


@functools.cache
def _widening(dtype: Any) -> np.ndarray:
    """Values of all 256 codes of an 8-bit type, float64."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def _values(words: np.ndarray, dtype: Any, per_lane: int, reduced: bool) -> np.ndarray:
    """Unpacks registers: uint32 [w, 64, registers] -> float64 [w, 64, per_lane]."""
    count = len(words)
    if np.dtype(dtype).itemsize == 1:
        codes = words.view(np.uint8).reshape(count, LANES, -1)[..., :per_lane]
        return _widening(dtype)[codes]
    if dtype is ml_dtypes.bfloat16:
        halves = words.view(np.uint16).reshape(count, LANES, -1)[..., :per_lane]
        return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    if reduced:
        words = (words + np.uint32(0xFFF) + (words >> np.uint32(13) & np.uint32(1))) & np.uint32(0xFFFFE000)
    return words.view(dtype).reshape(count, LANES, -1)[..., :per_lane].astype(np.float64)


def multiply(shape: Shape, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiplies A and B in lane layout: float64 [w, 64, per_lane] each -> A . B, float64 [w, results, 64]."""
    count, size = len(a), shape.m
    if size == 4:
        blocks = np.einsum("wbik,wbjk->wbij", *(x.reshape(count, 16, 4, -1) for x in (a, b)))
        return blocks[:, LANE // 4, :, LANE % 4].transpose(1, 2, 0)
    runs = LANES // size
    left, right = (x.reshape(count, runs, size, -1).transpose(0, 2, 1, 3).reshape(count, size, -1) for x in (a, b))
    product = left @ right.transpose(0, 2, 1)
    register = np.arange(shape.results)[:, None]
    rows = (4 * (LANE // 16) + register) if size == 16 else (8 * (register // 4) + 4 * (LANE // 32) + register % 4)
    return product[:, rows, LANE % size]


def _register_block(m: Waves, operand: Operand, count: int) -> np.ndarray:
    """Reads consecutive registers, uint32 [w, 64, count]."""
    block = m.file(operand.kind)[operand.index : operand.index + count]
    block = block if isinstance(m.sel, slice) else block[:, m.sel]
    return np.ascontiguousarray(np.moveaxis(block, 0, -1))


def _scales(words: np.ndarray, byte: int) -> np.ndarray:
    """E8M0 scale of every lane, float64."""
    return np.exp2((words >> np.uint32(8 * byte) & np.uint32(255)).astype(np.float64) - 127)


def bind(i: Instruction, arch: str) -> Step:
    """Binds a matrix instruction."""
    shape = shape_of(i, arch)
    to, a, b, c = i.operands[:4]
    widths = [-(-shape.per_lane * np.dtype(t).itemsize // 4) for t in (shape.a, shape.b)]
    if [a.count, b.count] != widths or to.count != shape.results:
        raise i.error(
            f"operands of {a.count}, {b.count} and {to.count} registers; {widths} and {shape.results} expected"
        )
    if any(o.kind not in ("v", "a") for o in (to, a, b)) or (c.kind in ("v", "a") and c.count != shape.results):
        raise i.error(f"operands are not vector registers, or C has {c.count} of them; {shape.results} expected")
    addend = None if c.kind in ("v", "a") else raw_reader(c, i)
    scale_bytes = [
        x + 2 * y for x, y in zip(i.list_modifier("op_sel") or [0, 0], i.list_modifier("op_sel_hi") or [0, 0])
    ]
    scales = [raw_reader(o, i) for o in i.operands[4:6]] if shape.scaled else []

    def step(m):
        left = _values(_register_block(m, a, widths[0]), shape.a, shape.per_lane, shape.reduced)
        right = _values(_register_block(m, b, widths[1]), shape.b, shape.per_lane, shape.reduced)
        if scales:
            left, right = (
                x * np.broadcast_to(_scales(np.asarray(s(m)), byte), (m.count, LANES))[..., None]
                for x, s, byte in zip((left, right), scales, scale_bytes)
            )
        total = multiply(shape, left, right)
        if addend is not None:
            total = total + addend(m).view(shape.accumulator)
        else:
            words = _register_block(m, c, shape.results)
            total = total + np.moveaxis(words, -1, 1).view(shape.accumulator)
        out = total.astype(shape.accumulator).view(np.uint32)
        # Matrix instructions ignore EXEC.
        for register in range(shape.results):
            m.set_vector(to, out[:, register], register, everywhere=True)

    return step
