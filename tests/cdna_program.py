"""Whole programs of CDNA assembly for tests: buffers in, a grid of waves, buffers out; and the names a pattern has."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

from pallas_kernels.cdna.interpreter import control_flow
from pallas_kernels.cdna.interpreter.assembly import Assembly, InterpreterError, parse
from pallas_kernels.cdna.interpreter.dispatch import Dispatch
from pallas_kernels.cdna.interpreter.machine import Memory

LANES = 64
GFX942, GFX950 = "gfx942", "gfx950"
# Where `run` leaves things: the address of buffer k in s[BUFFERS + 2 k : ...], the workgroup's x, y and z in s[2:4].
BUFFERS = 8


def buffer(number: int) -> str:
    """The scalar registers that hold the address of a buffer."""
    return f"s[{BUFFERS + 2 * number}:{BUFFERS + 2 * number + 1}]"


def source(body: str, buffers: int = 0, *, arch: str = GFX942, lds: int = 0, scratch: int = 0) -> str:
    """The text of a kernel: directives, one load of every buffer's address, then `body` and the end."""
    addresses = "".join(f"s_load_dwordx2 {buffer(k)}, s[0:1], {8 * k:#x}\n" for k in range(buffers))
    wait = "s_waitcnt lgkmcnt(0)\n" if buffers else ""
    ids = "".join(f"    .amdhsa_system_sgpr_workgroup_id_{axis} 1\n" for axis in "xyz")
    return f"""
.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
kernel:
{addresses}{wait}{body}
s_endpgm
.amdhsa_kernel kernel
    .amdhsa_user_sgpr_count 2
    .amdhsa_group_segment_fixed_size {lds}
    .amdhsa_private_segment_fixed_size {scratch}
{ids}.end_amdhsa_kernel
"""


def run_text(text: str, inputs=(), outputs=(), *, grid=(1, 1, 1), threads=LANES, **how: Any):
    """Executes a kernel's text; returns (parsed text, outputs, counts per block).

    Args:
      text: see `source`.
      inputs: arrays of the first buffers, read-only.
      outputs: arrays of the buffers behind them; the kernel changes copies, which are returned.
      grid: workgroups per axis.
      threads: of a workgroup.
      how: of `control_flow.run`.
    """
    named: list[tuple[str, np.ndarray, bool]] = [(f"input {k}", np.asarray(a), False) for k, a in enumerate(inputs)]
    named += [(f"output {k}", np.asarray(a), True) for k, a in enumerate(outputs)]
    memory = Memory([*named, ("arguments", np.zeros(len(named) + 1, np.uint64), False)])
    addresses = np.array([memory.address(k) for k in range(len(named))], np.uint64)
    start = int(memory.starts[-1])
    memory.bytes[start : start + addresses.nbytes] = addresses.view(np.uint8)
    parsed: Assembly = parse(text)
    counts = control_flow.run(parsed, memory, Dispatch(memory.address(len(named)), grid, threads), **how)
    results = [memory.contents(len(inputs) + k, np.shape(a), np.asarray(a).dtype) for k, a in enumerate(outputs)]
    return parsed, results, counts


def run(body: str, inputs=(), outputs=(), *, arch=GFX942, lds=0, scratch=0, **how: Any) -> list[np.ndarray]:
    """The outputs of a kernel with this body; see `source` and `run_text`."""
    text = source(body, len(inputs) + len(outputs), arch=arch, lds=lds, scratch=scratch)
    return run_text(text, inputs, outputs, **how)[1]


def fails(line: str, why: str, *, before="", arch=GFX942, lds=0, scratch=0, inputs=1, outputs=1, **how: Any) -> None:
    """Executing `before` and `line` must raise an error that names the line, its number, and the reason.

    Buffers have 256 bytes; the inputs are read-only.
    """
    arrays = [np.zeros(64, np.uint32) for _ in range(inputs + outputs)]
    text = source(f"{before}\n{line}", len(arrays), arch=arch, lds=lds, scratch=scratch)
    number = text.splitlines().index(line) + 1
    with pytest.raises(InterpreterError) as error:
        run_text(text, arrays[:inputs], arrays[inputs:], **how)
    assert str(error.value).startswith(f"line {number}: `{line}`: "), error.value
    assert why in str(error.value), error.value


def run_lanes(body: str, columns, results, *, before="", after="", masks=None, scalars=(), reads=(), writes=(), **how):
    """Runs `body` with values in registers of every thread; returns registers afterwards.

    v0 is the thread of the workgroup. The rest of the vector registers is zero unless `columns` fills it.

    Args:
      body: the lines to test; they must leave v0, v80 to v82 and the addresses of the buffers alone.
      columns: uint32 [workgroups, threads, n] that v1, v2, ... hold.
      results: vector registers to return.
      before, after: lines around `body` that all lanes execute.
      masks: uint64 [workgroups * waves], EXEC while the body runs; whole waves when None.
      scalars: uint32 [workgroups * waves, m] that s20, s21, ... hold.
      reads, writes: further arrays: buffers 2, 3, ..., the written ones behind the read ones and the results.
      how: of `run`.

    Returns:
      uint32 [workgroups, threads, len(results)], from all lanes, active or not; and the written arrays, if any.
    """
    columns = np.asarray(columns, np.uint32)
    groups, threads, width = columns.shape
    waves = groups * threads // LANES
    masks = np.full(waves, 2**64 - 1, np.uint64) if masks is None else np.asarray(masks, np.uint64)
    scalars = np.zeros((waves, 0), np.uint32) if len(scalars) == 0 else np.asarray(scalars, np.uint32)
    head = np.concatenate([masks.view(np.uint32).reshape(waves, 2), scalars], axis=1)
    lines = [
        # The number of this wave in the grid, and the place of its threads in the arrays.
        "v_readfirstlane_b32 s6, v0",
        "s_lshr_b32 s6, s6, 6",
        f"s_mul_i32 s7, s2, {threads // LANES}",
        "s_add_u32 s6, s6, s7",
        f"s_mul_i32 s6, s6, {4 * head.shape[1]}",
        f"v_mov_b32_e32 v80, {threads}",
        "v_mul_lo_u32 v80, v80, s2",
        "v_add_u32_e32 v80, v80, v0",
        f"v_mul_lo_u32 v81, v80, {4 * width}",
        f"v_mul_lo_u32 v82, v80, {4 * len(results)}",
        f"s_load_dwordx2 s[4:5], {buffer(1)}, s6",
        *(f"s_load_dword s{20 + k}, {buffer(1)}, s6 offset:{8 + 4 * k:#x}" for k in range(scalars.shape[1])),
        *(f"global_load_dword v{1 + k}, v81, {buffer(0)} offset:{4 * k}" for k in range(width)),
        "s_waitcnt vmcnt(0) lgkmcnt(0)",
        before,
        "s_mov_b64 exec, s[4:5]",
        body,
        "s_mov_b64 exec, -1",
        after,
        *(f"global_store_dword v82, v{r}, {buffer(2 + len(reads))} offset:{4 * k}" for k, r in enumerate(results)),
    ]
    out = np.zeros((groups, threads, len(results)), np.uint32)
    found = run("\n".join(lines), [columns, head, *reads], [out, *writes], grid=(groups, 1, 1), threads=threads, **how)
    return found if writes else found[0]


def active(masks) -> np.ndarray:
    """uint64 [n] -> bool [n, 64]."""
    return (np.asarray(masks, np.uint64)[:, None] >> np.arange(LANES, dtype=np.uint64) & np.uint64(1)).astype(bool)


# EXEC of the eight waves that tests run with: whole, empty, single lanes, halves, alternating, and random.
MASKS = np.array(
    [2**64 - 1, 0, 1, 1 << 63, 0xFFFFFFFF, 0x5555_5555_5555_5555, 0xF00F_0FF0_1234_8001, 0xDEAD_BEEF_0BAD_CAFE],
    np.uint64,
)
SPECIAL = np.array(
    [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF],
    np.uint32,
)


def words(shape, seed: int = 0) -> np.ndarray:
    """Random uint32, a quarter of them special."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 2**32, shape, np.uint32)
    return np.where(rng.random(shape) < 0.25, rng.choice(SPECIAL, shape), raw)


def spellings(pattern: str | re.Pattern) -> set[str]:
    """All opcodes that a pattern of the interpreter's tables matches: it has groups, sets and options, no repeats."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    found, rest = _alternatives(text)
    assert not rest, text
    return set(found)


def _alternatives(text: str) -> tuple[list[str], str]:
    """What a pattern up to its closing parenthesis matches, and the rest of the text."""
    out: list[str] = []
    tails = [""]
    while text and text[0] != ")":
        if text[0] == "|":
            out, tails, text = out + tails, [""], text[1:]
            continue
        if text[0] == "(":
            choices, text = _alternatives(text[3 if text.startswith("(?:") else 1 :])
            text = text[1:]
        elif text[0] == "[":
            inside, _, text = text[1:].partition("]")
            choices = list(inside)
        else:
            choices, text = [text[0]], text[1:]
        if text.startswith("?"):
            choices, text = ["", *choices], text[1:]
        tails = [a + b for a, b in itertools.product(tails, choices)]
    return out + tails, text
