"""Registers of many waves, and the memory that they address."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.cdna.interpreter.assembly import EXEC, Instruction, Operand

LANES = 64
LANE = np.arange(LANES)
ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
LOW = np.uint64(0xFFFF_FFFF)
# Fill byte of fresh memory and LDS: a read before the first write gives a wrong value instead of a plausible zero.
POISON = 0xA5
_BASE = 1 << 40
_GUARD = 4096


def lanes_of(masks: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Masks uint64 [w] -> bool [w, 64]."""
    raw = np.ascontiguousarray(masks).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(raw, axis=1, bitorder="little").view(np.bool_)


def masks_of(lanes: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Lanes bool [w, 64] -> masks uint64 [w]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(np.uint64)[:, 0]


class Memory:
    """Buffers separated by guard ranges; an access outside every buffer raises an error.

    Args:
      buffers: (name, array, writable); contents are copied.
    """

    def __init__(self, buffers: Sequence[tuple[str, np.ndarray, bool]]):
        """Assigns addresses to the buffers and copies their contents."""
        self.names = [name for name, _, _ in buffers]
        self.writable = np.array([w for _, _, w in buffers], bool)
        starts, at = [], _GUARD
        for _, array, _ in buffers:
            starts.append(at)
            at = (at + max(array.nbytes, 1) + _GUARD + 255) & ~255
        self.starts = np.array(starts, np.int64)
        self.ends = self.starts + np.array([array.nbytes for _, array, _ in buffers], np.int64)
        self.bytes = np.full(at, POISON, np.uint8)
        self.words = self.bytes.view(np.uint32)
        for start, (_, array, _) in zip(starts, buffers):
            self.bytes[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def address(self, number: int) -> int:
        """Address of the first byte of a buffer."""
        return _BASE + int(self.starts[number])

    def contents(self, number: int, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """A copy of a buffer as an array."""
        raw = self.bytes[self.starts[number] : self.ends[number]].copy()
        return raw.view(dtype).reshape(tuple(shape))

    def _offsets(self, addresses: np.ndarray, size: int, write: bool, instruction: Instruction) -> np.ndarray:
        """Checks accesses of `size` bytes; returns their offsets into `bytes`."""
        offsets = addresses.astype(np.int64) - _BASE
        owner = np.searchsorted(self.starts, offsets, side="right") - 1
        safe = np.maximum(owner, 0)
        good = (owner >= 0) & (offsets + size <= self.ends[safe])
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            near = self.names[int(safe[bad])]
            where = int(offsets[bad] - self.starts[safe[bad]])
            length = int(self.ends[safe[bad]] - self.starts[safe[bad]])
            raise instruction.error(
                f"access outside every buffer: {size} bytes at byte {where} of `{near}`, which has {length}"
            )
        if write and not self.writable[owner].all():
            bad = int(np.flatnonzero(~self.writable[owner])[0])
            raise instruction.error(f"write to the read-only buffer `{self.names[int(owner[bad])]}`")
        return offsets

    def load(self, addresses: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        """Addresses [n] -> uint32 [n, size / 4], or [n, 1] for sizes 1 and 2 (zero-extended)."""
        return load_words(self.bytes, self.words, self._offsets(addresses, size, False, instruction), size)

    def store(self, addresses: np.ndarray, words: np.ndarray, size: int, instruction: Instruction) -> None:
        """Writes uint32 [n, max(1, size / 4)] to addresses [n]; the last write to an address wins."""
        store_words(self.bytes, self.words, self._offsets(addresses, size, True, instruction), words, size)


def load_words(raw: np.ndarray, words: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    """Gathers uint32 [n, max(1, size / 4)] from the bytes `raw`; `words` is the same memory viewed as uint32."""
    if size < 4:
        value = raw[offsets].astype(np.uint32)
        return (value if size == 1 else value | (raw[offsets + 1].astype(np.uint32) << np.uint32(8)))[:, None]
    if not (offsets & 3).any():
        return words[(offsets >> 2)[:, None] + np.arange(size // 4)]
    return np.ascontiguousarray(raw[offsets[:, None] + np.arange(size)]).view(np.uint32)


def store_words(raw: np.ndarray, words: np.ndarray, offsets: np.ndarray, data: np.ndarray, size: int) -> None:
    """Scatters `data`, uint32 [n, max(1, size / 4)], to `offsets`: the inverse of `load_words`."""
    if size < 4:
        for byte in range(size):
            raw[offsets + byte] = (data[:, 0] >> np.uint32(8 * byte)).astype(np.uint8)
    elif not (offsets & 3).any():
        words[(offsets >> 2)[:, None] + np.arange(size // 4)] = data
    else:
        raw[offsets[:, None] + np.arange(size)] = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), size)


class Waves:
    """The registers of W waves. The w waves in `sel` execute; reads and writes apply to these only.

    Attributes:
      V, A: vector and accumulation registers, uint32 [registers, W, 64].
      S: scalar registers, uint32 [128, W]; `exec` holds EXEC instead.
      exec: mask of active lanes, uint64 [W].
      scc: scalar condition code, bool [W].
      sel: slice or indices of the waves that execute now.
      lanes: active lanes of the selected waves, bool [w, 64].
      full: whether all lanes of the selected waves are active.
      lds, lds_words: LDS of all workgroups, `lds_stride` bytes each, viewed as uint8 and as uint32.
      group: workgroup of each wave, int64 [W].
      scratch: private memory of each lane, uint8 [W, 64, bytes].
    """

    def __init__(self, count: int, registers: tuple[int, int], memory: Memory, arch: str):
        """Creates `count` waves with `registers` = (vector, accumulation) registers; all lanes are active."""
        self.V = np.zeros((registers[0], count, LANES), np.uint32)
        self.A = np.zeros((registers[1], count, LANES), np.uint32)
        self.S = np.zeros((128, count), np.uint32)
        self.exec = np.full(count, ALL)
        self.scc = np.zeros(count, bool)
        self.memory = memory
        self.arch = arch
        self.group = np.zeros(count, np.int64)
        self.lds_size = 0
        self.lds_stride = 0
        self.lds = np.zeros(0, np.uint8)
        self.lds_words = self.lds.view(np.uint32)
        self.scratch = np.zeros((count, LANES, 0), np.uint8)
        self.select(slice(None))

    def set_lds(self, size: int, groups: int) -> None:
        """Allocates `size` bytes of LDS for each of `groups` workgroups."""
        self.lds_size, self.lds_stride = size, (size + 15) // 16 * 16
        self.lds = np.full(max(16, groups * self.lds_stride), POISON, np.uint8)
        self.lds_words = self.lds.view(np.uint32)

    def select(self, sel: Any) -> None:
        """Selects the waves that execute."""
        self.sel = sel
        self.exec_changed()

    @property
    def count(self) -> int:
        """Number of waves that execute now."""
        return len(self.lanes)

    def exec_changed(self) -> None:
        """Recomputes `lanes` and `full` from `exec`."""
        masks = self.exec[self.sel]
        self.lanes = lanes_of(masks)
        self.full = bool((masks == ALL).all())

    def set_exec(self, masks: Any) -> None:
        """Sets EXEC of the selected waves, uint64 [w]."""
        self.exec[self.sel] = masks
        self.exec_changed()

    def file(self, kind: str) -> np.ndarray:
        """The register file "v" or "a"."""
        return self.V if kind == "v" else self.A

    # Scalars.
    def scalar(self, index: int) -> np.ndarray:
        """Reads a 32-bit scalar register, uint32 [w]."""
        if index >= EXEC:
            return (self.exec[self.sel] >> np.uint64(32 * (index - EXEC)) & LOW).astype(np.uint32)
        return self.S[index][self.sel]

    def scalar64(self, index: int) -> np.ndarray:
        """Reads a pair of scalar registers, uint64 [w]."""
        if index == EXEC:
            return self.exec[self.sel]
        return self.S[index][self.sel] | self.S[index + 1][self.sel].astype(np.uint64) << np.uint64(32)

    def set_scalar(self, operand: Operand, value: Any) -> None:
        """Writes uint32 [w] to a scalar register."""
        if operand.kind == "off":
            return
        if operand.kind != "s":
            raise ValueError(f"`{operand.text}` is not a scalar register")
        if operand.index >= EXEC:
            old, shift = self.exec[self.sel], np.uint64(32 * (operand.index - EXEC))
            new = np.asarray(value).astype(np.uint64) << shift
            self.set_exec((old & ~(LOW << shift)) | new)
        else:
            self.S[operand.index][self.sel] = value

    def set_scalar64(self, operand: Operand, value: Any) -> None:
        """Writes uint64 [w] to a pair of scalar registers."""
        if operand.kind == "off":
            return
        if operand.kind != "s":
            raise ValueError(f"`{operand.text}` is not a scalar register")
        second = operand.register(1)
        if operand.index == EXEC:
            self.set_exec(value)
        else:
            value = np.asarray(value, np.uint64)
            self.S[operand.index][self.sel] = (value & LOW).astype(np.uint32)
            self.S[second][self.sel] = (value >> np.uint64(32)).astype(np.uint32)

    # Vectors.
    def set_vector(self, operand: Operand, value: Any, offset: int = 0, everywhere: bool = False) -> None:
        """Broadcasts uint32 to [w, 64] and writes it to the active lanes, or to all lanes with `everywhere`."""
        register = self._register(operand, offset)
        if self.full or everywhere:
            register[self.sel] = value
        elif isinstance(self.sel, slice):
            np.copyto(register[self.sel], value, where=self.lanes)
        else:
            register[self.sel] = np.where(self.lanes, value, register[self.sel])

    def vector(self, operand: Operand, offset: int = 0) -> np.ndarray:
        """Reads a vector register, uint32 [w, 64]; returns a view when all waves are selected."""
        return self._register(operand, offset)[self.sel]

    def _register(self, operand: Operand, offset: int) -> np.ndarray:
        if operand.kind not in ("v", "a"):
            raise ValueError(f"`{operand.text}` is not a vector register")
        return self.file(operand.kind)[operand.register(offset)]
