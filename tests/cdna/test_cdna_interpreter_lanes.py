"""Instructions of the CDNA interpreter that move values between lanes, against loops over lanes."""

import re

import cdna_program as cp
import numpy as np
import pytest

from pallas_kernels.cdna.interpreter import cross_lane
from pallas_kernels.cdna.interpreter.assembly import InterpreterError

GROUPS, THREADS = 4, 128
WAVES = GROUPS * THREADS // 64
ACTIVE = cp.active(cp.MASKS)


def waves(array):
    """[groups, threads, n] -> [waves, 64, n]."""
    return array.reshape(WAVES, 64, -1)


def lanes_of(function):
    """Source lanes [64] of a function from a lane to a lane or None, as -1."""
    return np.array([-1 if function(lane) is None else function(lane) for lane in range(64)])


def within(source, condition):
    return source if condition else None


# --- DPP -------------------------------------------------------------------------------------------------------------
def dpp_controls():
    """Modifier -> function from a lane to its source, or None where it is out of range."""
    out = {}
    for pattern in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 2, 2, 2], [0, 0, 3, 1]):
        name = "quad_perm:[" + ",".join(map(str, pattern)) + "]"
        out[name] = lambda i, p=pattern: i // 4 * 4 + p[i % 4]
    for n in (1, 2, 3, 4, 8, 15):
        out[f"row_shl:{n}"] = lambda i, n=n: within(i + n, i % 16 + n <= 15)
        out[f"row_shr:{n}"] = lambda i, n=n: within(i - n, i % 16 - n >= 0)
        out[f"row_ror:{n}"] = lambda i, n=n: i // 16 * 16 + (i + 16 - n) % 16
    for n in (0, 1, 7, 15):
        out[f"row_newbcast:{n}"] = lambda i, n=n: i // 16 * 16 + n
    # The name that later processors have for it.
    out["row_share:5"] = lambda i: i // 16 * 16 + 5
    out["row_mirror"] = lambda i: i // 16 * 16 + 15 - i % 16
    out["row_half_mirror"] = lambda i: i // 8 * 8 + 7 - i % 8
    out["row_bcast:15"] = lambda i: within(i // 16 * 16 - 1, i > 15)
    out["row_bcast:31"] = lambda i: within(31, i > 31)
    out["wave_shl:1"] = lambda i: within(i + 1, i < 63)
    out["wave_shr:1"] = lambda i: within(i - 1, i > 0)
    out["wave_rol:1"] = lambda i: (i + 1) % 64
    out["wave_ror:1"] = lambda i: (i + 63) % 64
    return out


DPP = dpp_controls()
DPP_MASKS = [(0xF, 0xF), (0xA, 0xF), (0xF, 0x5), (0x6, 0x9)]


@pytest.mark.parametrize("control", DPP)
def test_dpp(control):
    """A lane whose source is out of range or inactive keeps its register, or with bound_ctrl reads zero."""
    source = lanes_of(DPP[control])
    variants = [(row, bank, bound) for row, bank in DPP_MASKS for bound in (False, True)]
    columns = cp.words((GROUPS, THREADS, 2 + len(variants)), seed=1)
    lines = [
        f"v_mov_b32_dpp v{3 + k}, v1 {control} row_mask:{row:#x} bank_mask:{bank:#x}{' bound_ctrl:1' if bound else ''}"
        for k, (row, bank, bound) in enumerate(variants)
    ]
    found = waves(cp.run_lanes("\n".join(lines), columns, range(3, 3 + len(variants)), masks=cp.MASKS))
    columns = waves(columns)
    for k, (row, bank, bound) in enumerate(variants):
        expected = columns[..., 2 + k].copy()
        for wave, lane in np.argwhere(ACTIVE):
            if not (row >> lane // 16 & 1 and bank >> lane % 16 // 4 & 1):
                continue
            if source[lane] >= 0 and ACTIVE[wave, source[lane]]:
                expected[wave, lane] = columns[wave, source[lane], 0]
            elif bound:
                expected[wave, lane] = 0
        np.testing.assert_array_equal(found[..., k], expected, str(variants[k]))


def test_dpp_moves_only_the_first_source():
    """And the result may overwrite it."""
    columns = cp.words((GROUPS, THREADS, 2), seed=2)
    found = cp.run_lanes("v_sub_u32_dpp v1, v1, v2 row_ror:5 row_mask:0xf bank_mask:0xf", columns, [1])
    rows = columns.reshape(-1, 16, 2)
    np.testing.assert_array_equal(found.reshape(-1, 16), np.roll(rows[..., 0], 5, axis=1) - rows[..., 1])


def test_dpp_sums_a_wave():
    """The reduction that compilers emit; lane 63 holds the sum."""
    columns = cp.words((GROUPS, THREADS, 1), seed=3)
    steps = [f"v_add_u32_dpp v1, v1, v1 row_shr:{n} row_mask:0xf bank_mask:0xf bound_ctrl:1" for n in (1, 2, 4, 8)]
    steps += [
        f"v_add_u32_dpp v1, v1, v1 row_bcast:{n} row_mask:{m} bank_mask:0xf" for n, m in ((15, "0xa"), (31, "0xc"))
    ]
    found = waves(
        cp.run_lanes("\n".join([*steps, "v_readlane_b32 s40, v1, 63", "v_mov_b32_e32 v1, s40"]), columns, [1])
    )
    expected = waves(columns)[..., 0].sum(axis=1, dtype=np.uint64) & np.uint64(0xFFFFFFFF)
    np.testing.assert_array_equal(found[..., 0], np.tile(expected[:, None], 64))


# --- one lane and a scalar -------------------------------------------------------------------------------------------
def test_readfirstlane():
    """The lowest active lane; lane 0 when none is (CDNA4 ISA, V_READFIRSTLANE_B32)."""
    columns = cp.words((GROUPS, THREADS, 1), seed=4)
    found = cp.run_lanes("v_readfirstlane_b32 s40, v1", columns, [2], after="v_mov_b32_e32 v2, s40", masks=cp.MASKS)
    first = [next((lane for lane in range(64) if int(mask) >> lane & 1), 0) for mask in cp.MASKS]
    expected = waves(columns)[np.arange(WAVES), first]
    np.testing.assert_array_equal(waves(found), np.tile(expected[:, None], (64, 1)))


# Operand -> lane of each wave, given the wave's s20.
LANES_NAMED = {
    "0": lambda s: 0,
    "17": lambda s: 17,
    "63": lambda s: 63,
    "s20": lambda s: s % 64,
    "m0": lambda s: s % 64,
}


@pytest.mark.parametrize("lane", LANES_NAMED)
def test_readlane_and_writelane(lane):
    """Both ignore EXEC; only six bits of the lane count."""
    columns = cp.words((GROUPS, THREADS, 3), seed=5)
    scalars = np.stack([np.arange(WAVES) * 23 + 7, np.random.default_rng(0).integers(0, 2**32, WAVES)], axis=1)
    # One instruction reads at most one scalar register, beside M0.
    value = "s20" if lane == "s20" else "s21"
    body = f"v_readlane_b32 s40, v1, {lane}\nv_writelane_b32 v2, {value}, {lane}\nv_writelane_b32 v3, -9, {lane}"
    how = {"before": "s_mov_b32 m0, s20", "after": "v_mov_b32_e32 v4, s40", "masks": cp.MASKS, "scalars": scalars}
    found = waves(cp.run_lanes(body, columns, [2, 3, 4], **how))
    columns = waves(columns)
    expected = np.concatenate([columns[..., 1:], np.zeros_like(columns[..., :1])], axis=-1)
    for wave in range(WAVES):
        at = LANES_NAMED[lane](int(scalars[wave, 0]))
        expected[wave, at, 0], expected[wave, at, 1] = scalars[wave, int(value == "s21")], 2**32 - 9
        expected[wave, :, 2] = columns[wave, at, 0]
    np.testing.assert_array_equal(found, expected)


# --- counts of lanes below -------------------------------------------------------------------------------------------
# Source -> its 32 bits per lane, given the wave's s20 and the lane's v1.
MBCNT = {
    "-1": lambda s, v: 0xFFFFFFFF,
    "s20": lambda s, v: int(s),
    "v1": lambda s, v: int(v),
    "exec_lo": None,
    "exec_hi": None,
}


@pytest.mark.parametrize("mask", MBCNT)
@pytest.mark.parametrize("half", ["lo", "hi"])
def test_mbcnt(half, mask):
    """Lanes of the upper half are above all bits of the lower mask, those of the lower half below the upper one."""
    columns, scalars = cp.words((GROUPS, THREADS, 2), seed=6), cp.words((WAVES, 2), seed=7)
    body = f"v_mbcnt_{half}_u32_b32 v3, {mask}, v2\nv_mbcnt_{half}_u32_b32 v4, {mask}, 0\nv_mov_b32_e32 v5, v0"
    found = waves(cp.run_lanes(body, columns, [3, 4], masks=cp.MASKS, scalars=scalars))
    columns, expected = waves(columns), np.zeros((WAVES, 64, 2), np.uint32)
    for wave, lane in np.argwhere(ACTIVE):
        if mask.startswith("exec"):
            bits = int(cp.MASKS[wave]) >> (32 if mask == "exec_hi" else 0) & 0xFFFFFFFF
        else:
            bits = MBCNT[mask](scalars[wave, 0], columns[wave, lane, 0])
        counted = sum(bits >> k & 1 for k in range(32) if k + (32 if half == "hi" else 0) < lane)
        expected[wave, lane] = (counted + int(columns[wave, lane, 1])) & 0xFFFFFFFF, counted
    np.testing.assert_array_equal(found, expected)


def test_mbcnt_numbers_the_lanes():
    body = "v_mbcnt_lo_u32_b32 v1, -1, 0\nv_mbcnt_hi_u32_b32 v1, -1, v1"
    found = cp.run_lanes(body, np.zeros((GROUPS, THREADS, 1)), [1])
    np.testing.assert_array_equal(found.reshape(-1), np.arange(GROUPS * THREADS) % 64)


# --- permutations through LDS ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0, 4, 132, 0xFFFC])
@pytest.mark.parametrize("opcode", ["ds_bpermute_b32", "ds_permute_b32"])
def test_permute(opcode, offset):
    """Pulling and pushing with random, repeated, unaligned and huge addresses; the highest sender wins."""
    columns = cp.words((GROUPS, THREADS, 3), seed=8)
    columns[:2, :, 0] = np.random.default_rng(1).integers(0, 256, (2, THREADS))
    line = f"{opcode} v3, v1, v2 offset:{offset}"
    found = waves(cp.run_lanes(line, columns, [3], masks=cp.MASKS))[..., 0]
    columns = waves(columns)
    expected = columns[..., 2].copy()
    for wave in range(WAVES):
        other = [(int(a) + offset) % 2**32 // 4 % 64 for a in columns[wave, :, 0]]
        moved = [0] * 64
        for lane in np.flatnonzero(ACTIVE[wave]):
            if opcode == "ds_permute_b32":
                moved[other[lane]] = columns[wave, lane, 1]
            elif ACTIVE[wave, other[lane]]:
                moved[lane] = columns[wave, other[lane], 1]
        for lane in np.flatnonzero(ACTIVE[wave]):
            expected[wave, lane] = moved[lane]
    np.testing.assert_array_equal(found, expected)


def swizzle_of_number(offset):
    """The pseudocode of DS_SWIZZLE_B32."""
    if offset & 0x8000:
        return lambda i: i // 4 * 4 + (offset >> 2 * (i % 4) & 3)
    return lambda i: ((i & 31 & offset | offset >> 5 & 31) ^ (offset >> 10 & 31)) & 31 | i & 32


SWIZZLES = {
    **{str(k): swizzle_of_number(k) for k in (0x041F, 0x7C1F, 0x0000, 0x03E0, 0x5A35, 0x801B, 0x80B1, 0x8000)},
    "swizzle(SWAP,1)": lambda i: i + 1 if i % 2 == 0 else i - 1,
    "swizzle(SWAP,16)": lambda i: i + 16 if i % 32 < 16 else i - 16,
    "swizzle(REVERSE,8)": lambda i: i // 8 * 8 + 7 - i % 8,
    "swizzle(REVERSE,32)": lambda i: i // 32 * 32 + 31 - i % 32,
    "swizzle(BROADCAST,4,3)": lambda i: i // 4 * 4 + 3,
    "swizzle(BROADCAST,32,9)": lambda i: i // 32 * 32 + 9,
    "swizzle(QUAD_PERM,3,0,1,1)": lambda i: i // 4 * 4 + (3, 0, 1, 1)[i % 4],
    # From the highest bit on: clear, set, flip, keep, keep.
    'swizzle(BITMASK_PERM,"01ipp")': lambda i: i // 32 * 32 + 8 + (4 - i % 8 // 4 * 4) + i % 4,
}


@pytest.mark.parametrize("offset", SWIZZLES)
def test_swizzle(offset):
    source = lanes_of(SWIZZLES[offset])
    columns = cp.words((GROUPS, THREADS, 2), seed=9)
    found = waves(cp.run_lanes(f"ds_swizzle_b32 v2, v1 offset:{offset}", columns, [2], masks=cp.MASKS))[..., 0]
    columns = waves(columns)
    sent = np.where(ACTIVE[:, source], columns[:, source, 0], 0)
    np.testing.assert_array_equal(found, np.where(ACTIVE, sent, columns[..., 1]))


def test_swizzle_offset_in_hexadecimal_and_spaces():
    columns = cp.words((1, 64, 1), seed=9)
    body = "ds_swizzle_b32 v2, v1 offset:0x401f\nds_swizzle_b32 v3, v1 offset:swizzle(SWAP, 16)"
    found = cp.run_lanes(body, columns, [2, 3])[0]
    np.testing.assert_array_equal(found, np.tile(columns[0, np.arange(64) ^ 16], 2))


# --- swaps of gfx950 -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("half", [16, 32])
def test_permlane_swap(half):
    columns = cp.words((GROUPS, THREADS, 2), seed=10)
    found = cp.run_lanes(f"v_permlane{half}_swap_b32_e32 v1, v2", columns, [1, 2], arch=cp.GFX950)
    blocks = columns.reshape(-1, 2, half, 2)
    # First register: its even block and the second's even block; second register: the odd blocks.
    first = np.stack([blocks[:, 0, :, 0], blocks[:, 0, :, 1]], axis=1)
    second = np.stack([blocks[:, 1, :, 0], blocks[:, 1, :, 1]], axis=1)
    np.testing.assert_array_equal(found.reshape(-1, 2, half, 2), np.stack([first, second], axis=-1))


# --- errors, coverage ------------------------------------------------------------------------------------------------
ERRORS = {
    "v_mov_b32_dpp v1, v2 row_xmask:1 row_mask:0xf bank_mask:0xf": "unknown DPP control",
    "v_readlane_b32 s40, v1, v2": "`v2` must be a scalar register or a constant",
    "v_writelane_b32 v1, v2, 3": "`v2` must be a scalar register or a constant",
    "v_readfirstlane_b32 v5, v1": "`v5` is not a scalar register",
    "v_readlane_b32 s40, s41, 3": "`s41` is not a vector register",
    "ds_bpermute_b32 v1, s20, v2": "`s20` is not a vector register",
    "ds_swizzle_b32 v1, s20 offset:3": "`s20` is not a vector register",
    "v_readlane_b32 s40, v1": "operands not understood",
    "ds_swizzle_b32 v1, v2 offset:0xc020": "rotate and FFT swizzles are not implemented",
    "ds_swizzle_b32 v1, v2 offset:0xe001": "rotate and FFT swizzles are not implemented",
    "ds_swizzle_b32 v1, v2 offset:swizzle(FFT,1)": "unknown swizzle FFT",
    "v_permlane16_b32 v1, v2, s40, s41": "unknown instruction",
    "ds_bpermute_b32 v1, v2": "operands not understood",
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors_name_the_line(line):
    cp.fails(line, ERRORS[line])


def test_every_opcode_and_control_is_here():
    here = {"v_readfirstlane_b32", "v_readlane_b32", "v_writelane_b32", "v_mbcnt_lo_u32_b32", "v_mbcnt_hi_u32_b32"}
    here |= {"ds_bpermute_b32", "ds_permute_b32", "ds_swizzle_b32", "v_permlane16_swap_b32", "v_permlane32_swap_b32"}
    assert set(cross_lane.TABLE) == here
    with pytest.raises(InterpreterError, match="known are (.*)") as error:
        cp.run("v_mov_b32_dpp v1, v2 row_xmask:1")
    controls = re.search("known are (.*)", str(error.value))[1].split(", ")
    assert set(controls) == {re.match(r"\w+", control)[0] for control in DPP}
