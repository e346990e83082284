"""Scalar arithmetic of the CDNA interpreter against Python integers, and how waves branch, wait, start and end."""

import struct

import cdna_program as cp
import numpy as np
import pytest

from pallas_kernels.cdna.interpreter import control_flow, scalar_alu
from pallas_kernels.cdna.interpreter.assembly import NO_EFFECT, InterpreterError, parse

ALL32, ALL64 = 2**32 - 1, 2**64 - 1


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    """A branch that goes wrong must fail, not hang."""
    monkeypatch.setattr(control_flow, "BUDGET", 30_000)


def signed(x, bits=32):
    """The low bits of a number, with a sign."""
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def reversed_bits(x):
    return int(f"{x:032b}"[::-1], 2)


def lowest(x):
    return (x & -x).bit_length() - 1 if x else -1


def field(x, control, sign):
    """s_bfe for widths below 32."""
    offset, width = control & 31, control >> 16 & 127
    bits = (signed(x) if sign else x) >> offset & (1 << width) - 1
    return signed(bits, width) if sign and width else bits


def nonzero(result, *_):
    return result != 0


def kept(result, *sources):
    """SCC stays."""


def carry(result, *_):
    return not 0 <= result <= ALL32


def overflow(result, *_):
    return not -(2**31) <= result < 2**31


# Opcode -> (widths of destination and sources, signed sources, result before it is cut, SCC of result and sources).
LOGIC = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
ALU = {
    "s_mov_b32": ((32, 32), False, lambda a: a, kept),
    "s_mov_b64": ((64, 64), False, lambda a: a, kept),
    "s_not_b32": ((32, 32), False, lambda a: a ^ ALL32, nonzero),
    "s_not_b64": ((64, 64), False, lambda a: a ^ ALL64, nonzero),
    "s_abs_i32": ((32, 32), True, abs, nonzero),
    "s_brev_b32": ((32, 32), False, reversed_bits, kept),
    "s_sext_i32_i8": ((32, 32), False, lambda a: signed(a, 8), kept),
    "s_sext_i32_i16": ((32, 32), False, lambda a: signed(a, 16), kept),
    "s_ff1_i32_b32": ((32, 32), False, lowest, kept),
    "s_flbit_i32_b32": ((32, 32), False, lambda a: 32 - a.bit_length() if a else -1, kept),
    "s_bcnt1_i32_b32": ((32, 32), False, int.bit_count, nonzero),
    "s_bcnt1_i32_b64": ((32, 64), False, int.bit_count, nonzero),
    "s_add_u32": ((32, 32, 32), False, lambda a, b: a + b, carry),
    "s_sub_u32": ((32, 32, 32), False, lambda a, b: a - b, carry),
    "s_add_i32": ((32, 32, 32), True, lambda a, b: a + b, overflow),
    "s_sub_i32": ((32, 32, 32), True, lambda a, b: a - b, overflow),
    "s_mul_i32": ((32, 32, 32), True, lambda a, b: a * b, kept),
    "s_mul_hi_u32": ((32, 32, 32), False, lambda a, b: a * b >> 32, kept),
    "s_mul_hi_i32": ((32, 32, 32), True, lambda a, b: a * b >> 32, kept),
    # Of equal numbers min takes the second and max the first.
    "s_min_i32": ((32, 32, 32), True, min, lambda r, a, b: a < b),
    "s_max_i32": ((32, 32, 32), True, max, lambda r, a, b: a >= b),
    "s_min_u32": ((32, 32, 32), False, min, lambda r, a, b: a < b),
    "s_max_u32": ((32, 32, 32), False, max, lambda r, a, b: a >= b),
    **{f"s_lshl{n}_add_u32": ((32, 32, 32), False, lambda a, b, n=n: (a << n) + b, carry) for n in (1, 2, 3, 4)},
    "s_lshl_b32": ((32, 32, 32), False, lambda a, b: a << b % 32 & ALL32, nonzero),
    "s_lshr_b32": ((32, 32, 32), False, lambda a, b: a >> b % 32, nonzero),
    "s_ashr_i32": ((32, 32, 32), True, lambda a, b: a >> b % 32, nonzero),
    "s_lshl_b64": ((64, 64, 32), False, lambda a, b: a << b % 64 & ALL64, nonzero),
    "s_lshr_b64": ((64, 64, 32), False, lambda a, b: a >> b % 64, nonzero),
    "s_ashr_i64": ((64, 64, 32), True, lambda a, b: a >> b % 64, nonzero),
    "s_bfe_u32": ((32, 32, 32), False, lambda a, b: field(a, b, False), nonzero),
    "s_bfe_i32": ((32, 32, 32), False, lambda a, b: field(a, b, True), nonzero),
    "s_bfm_b32": ((32, 32, 32), False, lambda a, b: ((1 << a % 32) - 1) << b % 32, kept),
    "s_bfm_b64": ((64, 32, 32), False, lambda a, b: ((1 << a % 64) - 1) << b % 64, kept),
    "s_pack_ll_b32_b16": ((32, 32, 32), False, lambda a, b: (b & 0xFFFF) << 16 | a & 0xFFFF, kept),
    "s_pack_lh_b32_b16": ((32, 32, 32), False, lambda a, b: b >> 16 << 16 | a & 0xFFFF, kept),
    "s_pack_hh_b32_b16": ((32, 32, 32), False, lambda a, b: b >> 16 << 16 | a >> 16, kept),
}
for _name, _meaning in LOGIC.items():
    for _bits in (32, 64):
        # Negative numbers are cut to the width before SCC looks at them.
        _cut = lambda a, b, f=_meaning, n=_bits: f(a, b) & (1 << n) - 1  # noqa: E731
        ALU[f"s_{_name}_b{_bits}"] = ((_bits, _bits, _bits), False, _cut, nonzero)

# Opcodes whose destination or SCC is a source too: operands, and (D, S0, S1, SCC) -> (D, SCC).
MORE = {
    "s_addc_u32": ("d, a, b", lambda d, a, b, c: (a + b + c, a + b + c > ALL32)),
    "s_subb_u32": ("d, a, b", lambda d, a, b, c: (a - b - c, a < b + c)),
    "s_cselect_b32": ("d, a, b", lambda d, a, b, c: (a if c else b, c)),
    "s_cselect_b64": ("D, A, B", lambda d, a, b, c: (a if c else b, c)),
    "s_cmov_b32": ("d, a", lambda d, a, b, c: (a if c else d, c)),
    "s_cmov_b64": ("D, A", lambda d, a, b, c: (a if c else d, c)),
    "s_bitset0_b32": ("d, a", lambda d, a, b, c: (d & ~(1 << a % 32), c)),
    "s_bitset1_b32": ("d, a", lambda d, a, b, c: (d | 1 << a % 32, c)),
    "s_bitcmp0_b32": ("a, b", lambda d, a, b, c: (d, not a >> b % 32 & 1)),
    "s_bitcmp1_b32": ("a, b", lambda d, a, b, c: (d, a >> b % 32 & 1)),
    "s_movk_i32": ("d, -1234", lambda d, a, b, c: (-1234, c)),
    "s_mulk_i32": ("d, -1234", lambda d, a, b, c: (signed(d) * -1234, c)),
    "s_addk_i32": ("d, -1234", lambda d, a, b, c: (signed(d) - 1234, overflow(signed(d) - 1234))),
}
COMPARE = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}
for _name, _meaning in COMPARE.items():
    _both = lambda d, a, b, c, f=_meaning: (d, f(a, b))  # noqa: E731
    _signs = lambda d, a, b, c, f=_meaning: (d, f(signed(a), signed(b)))  # noqa: E731
    MORE[f"s_cmp_{_name}_u32"], MORE[f"s_cmp_{_name}_i32"] = ("a, b", _both), ("a, b", _signs)
    if _name in ("eq", "lg"):
        MORE[f"s_cmp_{_name}_u64"] = ("A, B", _both)
    # 0x8000 as a signed and as an unsigned number of 16 bits.
    MORE[f"s_cmpk_{_name}_u32"] = ("a, 0x8000", lambda d, a, b, c, f=_meaning: (d, f(a, 0x8000)))
    MORE[f"s_cmpk_{_name}_i32"] = ("a, 0x8000", lambda d, a, b, c, f=_meaning: (d, f(signed(a), -0x8000)))

SOURCES = {"D": "s[24:25]", "A": "s[20:21]", "B": "s[22:23]", "d": "s24", "a": "s20", "b": "s22"}
COUNT = 512


def scalar_inputs():
    """Uint32 [waves, 7]: two 64-bit sources, the old destination, SCC; special values, small ones, equal ones."""
    rng = np.random.default_rng(0)
    out = cp.words((COUNT, 7), seed=20)
    edges = np.array([*cp.SPECIAL, 0x8001, 0x7FFE, 0xFFFF8000, 0xFFFF7FFF, 31, 32, 63], np.uint32)
    pairs = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    chosen = rng.permutation(len(pairs))[:256]
    out[:256, 0], out[:256, 2] = pairs[chosen].T
    out[256:320, 2] = rng.integers(0, 70, 64)
    out[320:352, 2:4] = out[320:352, :2]
    out[352:384, 1] = out[384:416, 3] = out[400:416, 0] = 0
    out[:, 6] = rng.integers(0, 2, COUNT)
    return out


INPUTS = scalar_inputs()


def run_scalars(line, inputs):
    """(low and high word of the destination, SCC) after one line, for every wave of inputs."""
    body = f"s_cmp_lg_u32 s26, 0\n{line}\ns_cselect_b32 s27, 1, 0"
    after = "\n".join(f"v_mov_b32_e32 v{1 + k}, s{s}" for k, s in enumerate((24, 25, 27)))
    found = cp.run_lanes(body, np.zeros((len(inputs), 64, 1)), [1, 2, 3], after=after, scalars=inputs)
    assert (found == found[:, :1]).all()
    low, high, scc = found[:, 0].astype(object).T
    return low, high, scc


def numbers(inputs, column, bits):
    low, high = inputs[:, column].astype(object), inputs[:, column + 1].astype(object)
    return low if bits == 32 else low | high << 32


@pytest.mark.parametrize("opcode", ALU)
def test_scalar_arithmetic(opcode):
    (width, *sources), with_sign, meaning, condition = ALU[opcode]
    inputs = INPUTS.copy()
    if "_bfe_" in opcode:
        # What a width of 32 or more gives is not specified.
        inputs[:, 2] = inputs[:, 2] & 0xFF80_FFFF | (inputs[:, 3] % 32) << 16
    names = "".join(x.upper() if bits == 64 else x for x, bits in zip("dab", ALU[opcode][0]))
    low, high, scc = run_scalars(f"{opcode} " + ", ".join(SOURCES[n] for n in names), inputs)
    values = [numbers(inputs, 2 * k, bits) for k, bits in enumerate(sources)]
    for wave in range(len(inputs)):
        arguments = [signed(v[wave], bits) if with_sign else v[wave] for v, bits in zip(values, sources)]
        result = meaning(*arguments)
        expected = condition(result, *arguments)
        got = low[wave] | high[wave] << 32 if width == 64 else low[wave]
        assert got == result & (1 << width) - 1, (arguments, got, result)
        assert scc[wave] == (inputs[wave, 6] if expected is None else bool(expected)), arguments
        assert width == 64 or high[wave] == inputs[wave, 5]


@pytest.mark.parametrize("opcode", MORE)
def test_scalar_instructions_that_read_their_destination_or_scc(opcode):
    text, meaning = MORE[opcode]
    names = text.split(", ")
    wide = any(n in "DAB" for n in names)
    low, high, scc = run_scalars(f"{opcode} " + ", ".join(SOURCES.get(n, n) for n in names), INPUTS)
    bits = 64 if wide else 32
    d, a, b = (numbers(INPUTS, column, bits) for column in (4, 0, 2))
    for wave in range(COUNT):
        result, condition = meaning(d[wave], a[wave], b[wave], int(INPUTS[wave, 6]))
        got = low[wave] | high[wave] << 32 if wide else low[wave]
        assert got == result & (1 << bits) - 1, (opcode, d[wave], a[wave], b[wave])
        assert scc[wave] == bool(condition), (opcode, d[wave], a[wave], b[wave])


def double(x):
    return int.from_bytes(struct.pack("<d", x), "little")


def single(x):
    return int.from_bytes(struct.pack("<f", x), "little")


# Operand -> (its 32 bits, its 64 bits); a float is a double for 64-bit operands.
CONSTANTS = {
    "0": (0, 0),
    "64": (64, 64),
    "-16": (2**32 - 16, 2**64 - 16),
    "0x12345678": (0x12345678, 0x12345678),
    "1.0": (single(1), double(1)),
    "-0.5": (single(-0.5), double(-0.5)),
    "4.0": (single(4), double(4)),
    "-2.0": (single(-2), double(-2)),
}


@pytest.mark.parametrize("text", CONSTANTS)
def test_constants(text):
    for opcode, to, expected in (("s_mov_b32", "d", CONSTANTS[text][0]), ("s_mov_b64", "D", CONSTANTS[text][1])):
        low, high, _ = run_scalars(f"{opcode} {SOURCES[to]}, {text}", INPUTS[:2])
        assert low[0] | (high[0] << 32 if to == "D" else 0) == expected


@pytest.mark.parametrize("register", ["vcc", "exec", "flat_scratch"])
def test_special_registers_as_pairs_and_halves(register):
    body = f"s_mov_b64 {register}, s[20:21]\ns_mov_b32 s28, {register}_lo\ns_mov_b32 s29, {register}_hi"
    body += f"\ns_xor_b64 {register}, {register}, s[22:23]\ns_mov_b64 s[30:31], {register}"
    body += f"\ns_mov_b32 {register}_hi, s24\ns_mov_b64 s[32:33], {register}\ns_mov_b32 {register}_lo, s25"
    if register == "flat_scratch":
        body = "\n".join(line for line in body.splitlines() if "_lo" not in line and "_hi" not in line)
    body += f"\ns_mov_b64 s[34:35], {register}"
    after = "\n".join(f"v_mov_b32_e32 v{k}, s{k + 27}" for k in range(1, 9))
    found = cp.run_lanes(body, np.zeros((COUNT, 64, 1)), range(1, 9), after=after, scalars=INPUTS)[:, 0]
    a, b, d = INPUTS[:, :2], INPUTS[:, 2:4], INPUTS[:, 4:6]
    if register == "flat_scratch":
        np.testing.assert_array_equal(found[:, [2, 3, 6, 7]], np.concatenate([a ^ b, a ^ b], axis=1))
        return
    high = np.stack([(a ^ b)[:, 0], d[:, 0]], axis=1)
    np.testing.assert_array_equal(found, np.concatenate([a, a ^ b, high, d[:, ::-1]], axis=1))


# --- EXEC ------------------------------------------------------------------------------------------------------------
SAVE = {
    "and": lambda s, e: s & e,
    "or": lambda s, e: s | e,
    "xor": lambda s, e: s ^ e,
    "andn1": lambda s, e: ~s & e,
    "andn2": lambda s, e: s & ~e,
    "orn1": lambda s, e: ~s | e,
    "orn2": lambda s, e: s | ~e,
    "nand": lambda s, e: ~(s & e),
    "nor": lambda s, e: ~(s | e),
    "xnor": lambda s, e: ~(s ^ e),
}


@pytest.mark.parametrize("name", SAVE)
def test_exec_is_combined_and_saved(name):
    """The destination gets the old mask, and may be the source; lanes follow at once; SCC says whether any is left."""
    sources = np.array(
        [0, ALL64, 0xF0F0, 1 << 63, 0x5555_5555_5555_5555, 0xDEAD_BEEF_0000_0000, ALL64 - 1, 7], np.uint64
    )
    masks, sources = (x.reshape(-1) for x in np.meshgrid(cp.MASKS, sources))
    for to in ("s[24:25]", "s[20:21]"):
        body = f"s_{name}_saveexec_b64 {to}, s[20:21]\ns_cselect_b32 s28, 1, 0\nv_mov_b32_e32 v1, 1\n"
        body += f"s_mov_b64 s[30:31], {to}\ns_mov_b64 s[32:33], exec"
        after = "\n".join(f"v_mov_b32_e32 v{2 + k}, s{s}" for k, s in enumerate((30, 31, 32, 33, 28)))
        how = {"masks": masks, "scalars": sources.view(np.uint32).reshape(-1, 2)}
        found = cp.run_lanes(body, np.zeros((len(masks), 64, 1)), range(1, 7), after=after, **how)
        expected = np.array([SAVE[name](int(s), int(e)) & ALL64 for s, e in zip(sources, masks)], np.uint64)
        np.testing.assert_array_equal(found[..., 0], cp.active(expected))
        np.testing.assert_array_equal(found[:, 0, 1:3], masks.view(np.uint32).reshape(-1, 2))
        np.testing.assert_array_equal(found[:, 0, 3:5], expected.view(np.uint32).reshape(-1, 2))
        np.testing.assert_array_equal(found[:, 0, 5], expected != 0)


# --- branches --------------------------------------------------------------------------------------------------------
# Branch -> lines before it, and whether a wave with s20 takes it.
BRANCHES = {
    "s_branch": ("", lambda x: True),
    "s_cbranch_scc0": ("s_cmp_lg_u32 s20, 0", lambda x: x == 0),
    "s_cbranch_scc1": ("s_cmp_lg_u32 s20, 0", lambda x: x != 0),
    "s_cbranch_vccz": ("s_mov_b32 vcc_lo, 0\ns_mov_b32 vcc_hi, s20", lambda x: x == 0),
    "s_cbranch_vccnz": ("s_mov_b32 vcc_hi, 0\ns_mov_b32 vcc_lo, s20", lambda x: x != 0),
    "s_cbranch_execz": ("s_mov_b32 exec_lo, 0\ns_mov_b32 exec_hi, s20", lambda x: x == 0),
    "s_cbranch_execnz": ("s_mov_b32 exec_hi, 0\ns_mov_b32 exec_lo, s20", lambda x: x != 0),
}


@pytest.mark.parametrize("order", control_flow.ORDERS)
@pytest.mark.parametrize("opcode", BRANCHES)
def test_branches(opcode, order):
    """Waves of one workgroup part and meet again."""
    lines, taken = BRANCHES[opcode]
    scalars = np.array([0, 1, 0, 0x8000_0000, 5, 0, 0, ALL32], np.uint32)[:, None]
    body = f"s_mov_b32 s24, 1\n{lines}\n{opcode} .LBB0_1\ns_mov_b32 s24, 2\n.LBB0_1:\ns_add_u32 s24, s24, 0x10"
    found = cp.run_lanes(body, np.zeros((2, 256, 1)), [1], after="v_mov_b32_e32 v1, s24", scalars=scalars, order=order)
    expected = [0x11 if taken(int(x)) else 0x12 for x in scalars[:, 0]]
    np.testing.assert_array_equal(found.reshape(8, 64), np.tile(np.array(expected)[:, None], 64))


LOOP = f"""s_mov_b32 s20, 0
s_mov_b32 s21, 0
v_readfirstlane_b32 s22, v0
s_lshr_b32 s22, s22, 6
s_lshl_b32 s23, s2, 2
s_add_u32 s22, s22, s23
.LBB0_1:
s_cmp_ge_u32 s20, s22
s_cbranch_scc1 .LBB0_3
s_add_u32 s20, s20, 1
s_bitcmp1_b32 s20, 0
s_cbranch_scc0 .LBB0_1
s_add_u32 s21, s21, s20
s_branch .LBB0_1
.LBB0_3:
s_lshl_b32 s23, s2, 8
v_add_u32_e32 v1, s23, v0
v_lshlrev_b32_e32 v1, 2, v1
v_mov_b32_e32 v2, s21
global_store_dword v1, v2, {cp.buffer(0)}"""


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_loops_and_how_often_blocks_run(order):
    """Wave w goes round w times and adds odd numbers; the counts are those of all waves."""
    groups, waves = 3, 12
    text = cp.source(LOOP, 1)
    parsed, (found,), counts = cp.run_text(
        text, [], [np.zeros(groups * 256, np.uint32)], grid=(groups, 1, 1), threads=256, order=order
    )
    expected = [sum(range(1, wave + 1, 2)) for wave in range(waves)]
    np.testing.assert_array_equal(found.reshape(waves, 64), np.tile(np.array(expected)[:, None], 64))
    rounds = sum(range(waves))
    odd = sum((wave + 1) // 2 for wave in range(waves))
    by_first = {b.instructions[0].text: int(counts[b.number]) for b in parsed.blocks if b.instructions}
    assert by_first == {
        f"s_load_dwordx2 {cp.buffer(0)}, s[0:1], 0x0": waves,
        "s_cmp_ge_u32 s20, s22": rounds + waves,
        "s_add_u32 s20, s20, 1": rounds,
        "s_add_u32 s21, s21, s20": odd,
        "s_lshl_b32 s23, s2, 8": waves,
    }


def test_lanes_that_loop_until_none_is_left():
    """The loop that compilers emit for lanes that part: EXEC shrinks, and what it was comes back."""
    columns = np.random.default_rng(3).integers(0, 40, (4, 128, 1))
    body = """s_mov_b64 s[24:25], exec
v_mov_b32_e32 v2, 0
v_mov_b32_e32 v3, 0
.LBB0_1:
v_cmp_lt_u32_e32 vcc, v2, v1
s_and_b64 exec, exec, vcc
s_cbranch_execz .LBB0_2
v_add_u32_e32 v2, 1, v2
v_add_u32_e32 v3, v3, v2
s_branch .LBB0_1
.LBB0_2:
s_mov_b64 exec, s[24:25]
v_add_u32_e32 v3, 0x64, v3"""
    found = cp.run_lanes(body, columns, [2, 3], masks=cp.MASKS)
    n = columns[..., 0]
    expected = np.stack([n, n * (n + 1) // 2 + 100], axis=-1).reshape(8, 64, 2)
    np.testing.assert_array_equal(found.reshape(8, 64, 2), np.where(cp.active(cp.MASKS)[..., None], expected, 0))


# --- how waves start and end -----------------------------------------------------------------------------------------
GRID = f"""s_mul_i32 s20, s4, 3
s_add_u32 s20, s20, s3
s_mul_i32 s20, s20, 5
s_add_u32 s20, s20, s2
s_mul_i32 s20, s20, 70
v_add_u32_e32 v1, s20, v0
v_lshlrev_b32_e32 v1, 4, v1
v_mov_b32_e32 v4, s2
v_mov_b32_e32 v5, s3
v_mov_b32_e32 v6, s4
v_mov_b32_e32 v7, v0
global_store_dwordx4 v1, v[4:7], {cp.buffer(0)}"""


@pytest.mark.parametrize("limit", [1, 7, 256])
def test_workgroup_ids_and_threads(monkeypatch, limit):
    """Every workgroup runs once, however many go together; the last wave has only the lanes that there are."""
    monkeypatch.setattr(control_flow, "MAX_WAVES", limit)
    shape = (2, 3, 5, 70, 4)
    (found,) = cp.run(GRID, [], [np.full(shape, 99, np.uint32)], grid=(5, 3, 2), threads=70)
    z, y, x, thread = np.meshgrid(*map(np.arange, shape[:4]), indexing="ij")
    np.testing.assert_array_equal(found, np.stack([x, y, z, thread], axis=-1))


def test_workgroup_ids_that_are_not_asked_for():
    """The y and z of the workgroup take the registers behind the arguments that there are."""
    text = cp.source(f"v_mov_b32_e32 v1, s2\nv_lshlrev_b32_e32 v2, 2, v1\nglobal_store_dword v2, v1, {cp.buffer(0)}", 1)
    text = text.replace("workgroup_id_x 1", "workgroup_id_x 0").replace("workgroup_id_y 1", "workgroup_id_y 0")
    found = cp.run_text(text, [], [np.zeros(4, np.uint32)], grid=(1, 2, 4))[1][0]
    np.testing.assert_array_equal(found, np.arange(4))


def test_arguments_behind_other_user_registers():
    """A dispatch pointer and a queue pointer come first."""
    text = f"s_load_dwordx2 {cp.buffer(0)}, s[4:5], 0x0\nv_mov_b32_e32 v1, s6\nv_lshlrev_b32_e32 v2, 2, v1"
    text = cp.source(f"{text}\nglobal_store_dword v2, v1, {cp.buffer(0)}")
    for name in ("dispatch_ptr", "queue_ptr"):
        text = text.replace(
            "    .amdhsa_user_sgpr_count 2", f"    .amdhsa_user_sgpr_{name} 1\n    .amdhsa_user_sgpr_count 2"
        )
    text = text.replace("user_sgpr_count 2", "user_sgpr_count 6")
    found = cp.run_text(text, [], [np.zeros(4, np.uint32)], grid=(4, 1, 1))[1][0]
    np.testing.assert_array_equal(found, np.arange(4))


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_waves_end_one_by_one(order):
    """A wave that has ended does nothing more, and no barrier waits for it."""
    body = f"""v_lshlrev_b32_e32 v1, 2, v0
v_mov_b32_e32 v2, 1
v_readfirstlane_b32 s20, v0
global_store_dword v1, v2, {cp.buffer(0)}
s_cmp_lt_u32 s20, 0x80
s_cbranch_scc1 .LBB0_1
s_endpgm
.LBB0_1:
s_barrier
v_mov_b32_e32 v2, 2
global_store_dword v1, v2, {cp.buffer(0)}"""
    (found,) = cp.run(body, [], [np.zeros(256, np.uint32)], threads=256, order=order)
    np.testing.assert_array_equal(found, np.repeat([2, 1], 128))


# Operands of those that have any.
IGNORED = {"s_waitcnt": "vmcnt(0) lgkmcnt(0)", "s_nop": "7", "s_sleep": "1", "s_setprio": "3", "buffer_wbl2": "sc1"}
IGNORED |= {"s_setreg_b32": "hwreg(HW_REG_MODE, 0, 8), s20", "s_setreg_imm32_b32": "hwreg(HW_REG_MODE, 4, 4), 0x0"}


@pytest.mark.parametrize("opcode", sorted(NO_EFFECT))
def test_instructions_without_effect(opcode):
    """Waits and the like: no register changes, whatever their operands are."""
    columns = cp.words((1, 64, 2), seed=30)
    found = cp.run_lanes(f"{opcode} {IGNORED.get(opcode, '')}".strip(), columns, [1, 2])
    np.testing.assert_array_equal(found, columns)


# --- barriers and orders ---------------------------------------------------------------------------------------------
# Every thread writes to LDS and reads what a thread of the next wave wrote.
EXCHANGE = """v_lshlrev_b32_e32 v2, 2, v0
ds_write_b32 v2, v1
s_waitcnt lgkmcnt(0)
{barrier}
v_add_u32_e32 v3, 0x100, v2
v_and_b32_e32 v3, 0x3fc, v3
ds_read_b32 v4, v3"""


def exchange(barrier, order):
    columns = cp.words((3, 256, 1), seed=31)
    fill = "v_lshlrev_b32_e32 v2, 2, v0\nv_mov_b32_e32 v5, 0\nds_write_b32 v2, v5\ns_barrier"
    found = cp.run_lanes(EXCHANGE.format(barrier=barrier), columns, [4], before=fill, lds=1024, order=order)
    return columns[..., 0], found[..., 0]


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_a_barrier_makes_the_order_irrelevant(order):
    columns, found = exchange("s_barrier", order)
    np.testing.assert_array_equal(found, np.roll(columns, -64, axis=1))


def test_without_the_barrier_the_orders_differ():
    """Forward, only the last wave finds what the first one wrote; in reverse, all but it do."""
    columns, together = exchange("s_nop 0", "together")
    np.testing.assert_array_equal(together, np.roll(columns, -64, axis=1))
    _, forward = exchange("s_nop 0", "forward")
    late = np.arange(256) >= 192
    np.testing.assert_array_equal(forward, np.where(late, np.roll(columns, -64, axis=1), 0))
    _, reverse = exchange("s_nop 0", "reverse")
    np.testing.assert_array_equal(reverse, np.where(late, 0, np.roll(columns, -64, axis=1)))


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_barriers_in_a_loop(order):
    """A prefix sum over 256 threads: eight rounds with two barriers each."""
    columns = cp.words((4, 256, 1), seed=32)
    body = """v_lshlrev_b32_e32 v2, 2, v0
s_mov_b32 s24, 1
.LBB0_1:
ds_write_b32 v2, v1
s_barrier
v_subrev_u32_e32 v3, s24, v0
v_lshlrev_b32_e32 v3, 2, v3
v_cmp_le_u32_e32 vcc, s24, v0
s_and_saveexec_b64 s[26:27], vcc
ds_read_b32 v4, v3
v_add_u32_e32 v1, v1, v4
s_mov_b64 exec, s[26:27]
s_barrier
s_lshl_b32 s24, s24, 1
s_cmp_lt_u32 s24, 0x100
s_cbranch_scc1 .LBB0_1"""
    found = cp.run_lanes(body, columns, [1], lds=1024, order=order)
    np.testing.assert_array_equal(found[..., 0], np.cumsum(columns[..., 0], axis=1, dtype=np.uint32))


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_any_barrier_of_the_text_is_the_barrier(order):
    """Half of the waves wait at another s_barrier; what they wrote before it is there afterwards."""
    body = """v_lshlrev_b32_e32 v2, 2, v0
ds_write_b32 v2, v1
v_readfirstlane_b32 s20, v0
s_cmp_lt_u32 s20, 0x80
s_cbranch_scc1 .LBB0_1
s_barrier
s_branch .LBB0_2
.LBB0_1:
s_barrier
.LBB0_2:
v_xor_b32_e32 v2, 0x200, v2
ds_read_b32 v3, v2"""
    columns = cp.words((3, 256, 1), seed=33)
    found = cp.run_lanes(body, columns, [3], lds=1024, order=order)
    np.testing.assert_array_equal(found, np.roll(columns, 128, axis=1))


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_waves_that_end_do_not_hold_up_a_barrier(order):
    """Wave w ends before the barrier of round w: in the last round one wave is alone, and goes on."""
    body = f"""v_lshlrev_b32_e32 v1, 2, v0
v_readfirstlane_b32 s20, v0
s_lshr_b32 s20, s20, 6
s_mov_b32 s21, 0
.LBB0_1:
v_mov_b32_e32 v2, s21
global_store_dword v1, v2, {cp.buffer(0)}
s_cmp_ge_u32 s21, s20
s_cbranch_scc1 .LBB0_2
s_barrier
s_add_u32 s21, s21, 1
s_branch .LBB0_1
.LBB0_2:"""
    (found,) = cp.run(body, [], [np.full(512, 99, np.uint32)], threads=512, order=order)
    np.testing.assert_array_equal(found, np.repeat(np.arange(8), 64))


def test_orders_are_checked():
    with pytest.raises(ValueError, match="order is 'backward'; expected one of together, forward, reverse"):
        cp.run("", order="backward")


# --- errors, limits, coverage ----------------------------------------------------------------------------------------
ERRORS = {
    "s_getpc_b64 s[20:21]": "unknown instruction",
    "s_setpc_b64 s[20:21]": "unknown instruction",
    "s_swappc_b64 s[20:21], s[22:23]": "unknown instruction",
    "s_endpgm_saved": "unknown instruction",
    "s_trap 2": "unknown instruction",
    "s_getreg_b32 s20, hwreg(HW_REG_MODE)": "unknown instruction",
    "s_memtime s[20:21]": "unknown instruction",
    "s_bfe_u64 s[20:21], s[22:23], s24": "unknown instruction",
    "v_no_such_thing v0": "unknown instruction",
    "s_branch .LBB0_9": "no label .LBB0_9",
    "s_cbranch_scc0 .LBB0_9": "no label .LBB0_9",
    "s_add_u32 s20, s21": "operands not understood",
    "s_mov_b32 s20, v1": "`v1` can not be read by a scalar instruction",
    "s_mov_b32 v1, s20": "`v1` is not a scalar register",
    "s_and_saveexec_b64 v[2:3], s[20:21]": "`v[2:3]` is not a scalar register",
    "v_mov_b32_e32 s20, v0": "`s20` is not a vector register",
    "s_and_b32 s20, s21, off": "can not be read by a scalar instruction",
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors_name_the_line(line):
    cp.fails(line, ERRORS[line], before="s_mov_b32 s20, 0")


def test_unknown_instructions_are_found_before_anything_runs():
    """Also those that no wave reaches."""
    cp.fails("s_trap 2", "unknown instruction", before="s_branch .LBB0_1\n.LBB0_1:\ns_endpgm")


def test_an_error_inside_a_step_names_the_line(monkeypatch):
    monkeypatch.setitem(scalar_alu.TABLE, "s_mov_b32", ("u", "u", lambda a: a // np.array([])[0], None))
    cp.fails("s_mov_b32 s20, 0", "IndexError")


LONG_LOOP = "s_mov_b32 s20, 0\n.LBB0_1:\ns_add_u32 s20, s20, 1\ns_cmp_lt_u32 s20, 0x3d0\ns_cbranch_scc1 .LBB0_1"


def test_endless_loops_end():
    """The error names the line, the kernel, the workgroup, the wave and the budget."""
    with pytest.raises(InterpreterError) as error:
        cp.run(".LBB0_1:\ns_nop 0\ns_branch .LBB0_1", budget=1000)
    assert str(error.value) == (
        "line 6: `s_branch .LBB0_1`: kernel kernel, program (0, 0, 0), wave 0 executed more than 1000 instructions, its"
        " budget: the loop has no end, or the budget must be larger"
    )


def test_the_usual_budget_ends_loops_too(monkeypatch):
    monkeypatch.setattr(control_flow, "BUDGET", 1000)
    with pytest.raises(InterpreterError, match="more than 1000 instructions"):
        cp.run(".LBB0_1:\ns_branch .LBB0_1")


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_which_wave_does_not_end(order):
    """Of a grid of 2 x 3 workgroups of two waves only one loops; the others end, and one waits at a barrier."""
    body = """
s_cmp_eq_u32 s3, 2
s_cselect_b32 s20, s2, 0
v_cmp_lt_u32_e32 vcc, 63, v0
s_and_b32 s20, s20, vcc_lo
.LBB0_1:
s_cmp_eq_u32 s20, 1
s_cbranch_scc1 .LBB0_1
s_barrier"""
    with pytest.raises(InterpreterError, match=r"program \(1, 2, 0\), wave 1 executed more than 500 instructions"):
        cp.run(body, grid=(2, 3, 1), threads=128, order=order, budget=500)


@pytest.mark.parametrize("order", control_flow.ORDERS)
def test_a_long_loop_is_not_endless(order):
    """A wave may execute exactly its budget, however many waves there are."""
    executed = 2 + 3 * 0x3D0
    cp.run(LONG_LOOP, grid=(3, 1, 1), threads=128, order=order, budget=executed)
    with pytest.raises(InterpreterError, match=f"more than {executed - 1} instructions"):
        cp.run(LONG_LOOP, grid=(3, 1, 1), threads=128, order=order, budget=executed - 1)


@pytest.mark.parametrize("budget", [0, -1])
def test_no_budget(budget):
    with pytest.raises(ValueError, match=f"budget is {budget}; expected at least 1 instruction"):
        cp.run("s_nop 0", budget=budget)


def test_running_past_the_end():
    text = cp.source("s_nop 0").replace("s_endpgm\n", "")
    with pytest.raises(InterpreterError, match="a wave ran past the end of the kernel, behind block 0"):
        cp.run_text(text)


def test_the_target_must_be_there():
    with pytest.raises(InterpreterError, match=r"no \.amdgcn_target directive"):
        parse("kernel:\ns_endpgm\n")


def test_execution_starts_at_the_kernels_label():
    """Not at the first instruction; comments and other directives do not matter."""
    text = cp.source(
        f"v_lshlrev_b32_e32 v1, 2, v0 ; a comment\nglobal_store_dword v1, v0, {cp.buffer(0)} // another", 1
    )
    text = text.replace("kernel:", ".Lother:\nv_mov_b32_e32 v0, 7\ns_endpgm\n.p2align 8\nkernel:", 1)
    found = cp.run_text(text, [], [np.zeros(64, np.uint32)])[1][0]
    np.testing.assert_array_equal(found, np.arange(64))


def test_every_scalar_opcode_is_here():
    known = set(scalar_alu.TABLE) | {s for pattern in scalar_alu.SPECIAL for s in cp.spellings(pattern)}
    here = set(ALU) | set(MORE) | {f"s_{name}_saveexec_b64" for name in SAVE}
    assert here <= known
    # Comparisons of 64 bits exist only for equality, and none with a short constant.
    none = {f"s_cmp_{n}_u64" for n in ("gt", "ge", "lt", "le")} | {f"s_cmpk_{n}_u64" for n in COMPARE}
    assert known - here == none


def test_every_branch_is_here():
    for opcode in BRANCHES:
        text = cp.source(f"{opcode} .LBB0_1\n.LBB0_1:")
        assert control_flow.bind_blocks(parse(text))[0].end == "branch"
    cp.fails("s_cbranch_cdbgsys .LBB0_1", "unknown instruction", before=".LBB0_1:")
