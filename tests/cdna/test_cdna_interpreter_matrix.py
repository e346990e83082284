"""Matrix instructions of the CDNA interpreter against sums over the layouts of AMD's ISA documents, element by element.

What the documents say is written here as one function per operand: which (row, k) a lane's item of A is, which
(k, column) one of B, and which (row, column) of which block a register of D is.
"""

import re
import subprocess

import cdna_assembly as ca
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.interpreter import control_flow
from pallas_kernels.cdna.interpreter.assembly import InterpreterError

E4M3 = {"gfx942": ml_dtypes.float8_e4m3fnuz, "gfx950": ml_dtypes.float8_e4m3fn}
E5M2 = {"gfx942": ml_dtypes.float8_e5m2fnuz, "gfx950": ml_dtypes.float8_e5m2}
TYPES = {"f32": np.float32, "xf32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i8": np.int8}
# Form -> machines that have it.
CDNA3, CDNA4 = ("gfx942",), ("gfx950",)
FORMS = {
    "v_mfma_f32_32x32x2_f32": CDNA3 + CDNA4,
    "v_mfma_f32_16x16x4_f32": CDNA3 + CDNA4,
    "v_mfma_f32_4x4x1_16b_f32": CDNA3 + CDNA4,
    "v_mfma_f32_32x32x4_xf32": CDNA3,
    "v_mfma_f32_16x16x8_xf32": CDNA3,
    "v_mfma_f32_4x4x4_16b_f16": CDNA3 + CDNA4,
    "v_mfma_f32_32x32x8_f16": CDNA3 + CDNA4,
    "v_mfma_f32_16x16x16_f16": CDNA3 + CDNA4,
    "v_mfma_f32_4x4x4_16b_bf16": CDNA3 + CDNA4,
    "v_mfma_f32_32x32x8_bf16": CDNA3 + CDNA4,
    "v_mfma_f32_16x16x16_bf16": CDNA3 + CDNA4,
    "v_mfma_f32_32x32x16_f16": CDNA4,
    "v_mfma_f32_16x16x32_f16": CDNA4,
    "v_mfma_f32_32x32x16_bf16": CDNA4,
    "v_mfma_f32_16x16x32_bf16": CDNA4,
    "v_mfma_i32_4x4x4_16b_i8": CDNA3 + CDNA4,
    "v_mfma_i32_32x32x16_i8": CDNA3 + CDNA4,
    "v_mfma_i32_16x16x32_i8": CDNA3 + CDNA4,
    "v_mfma_i32_32x32x32_i8": CDNA4,
    "v_mfma_i32_16x16x64_i8": CDNA4,
    **{f"v_mfma_f32_16x16x32_{a}_{b}": CDNA3 + CDNA4 for a in ("fp8", "bf8") for b in ("fp8", "bf8")},
    **{f"v_mfma_f32_32x32x16_{a}_{b}": CDNA3 + CDNA4 for a in ("fp8", "bf8") for b in ("fp8", "bf8")},
    "v_mfma_f32_16x16x128_f8f6f4": CDNA4,
    "v_mfma_f32_32x32x64_f8f6f4": CDNA4,
}
CASES = [(opcode, arch) for opcode, machines in FORMS.items() for arch in machines]
A, B, C, D = 8, 16, 24, 40


class Form:
    """Sizes of one instruction, and its operands' places in the matrices."""

    def __init__(self, opcode, arch):
        size, _, depth, blocks, types = re.fullmatch(
            r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)_(?:(\d+)b_)?(\w+)", opcode
        ).groups()
        self.opcode, self.arch = opcode, arch
        self.size, self.depth, self.blocks = int(size), int(depth), int(blocks or 1)
        named = {**TYPES, "fp8": E4M3[arch], "bf8": E5M2[arch], "f8f6f4": E4M3[arch]}
        names = types.split("_")
        self.types = named[names[0]], named[names[-1]]
        self.reduced = types == "xf32"
        self.result = np.int32 if "_i32_" in opcode else np.float32
        # Every lane holds the same number of items: all items over 64 lanes.
        self.items = self.blocks * self.size * self.depth // 64
        self.registers = self.blocks * self.size * self.size // 64

    def operand_registers(self, dtype):
        return self.items * np.dtype(dtype).itemsize // 4

    def place_of_item(self, lane, item):
        """(block, row of A or column of B, k): lanes count rows first, then blocks, then groups of items of k."""
        along, above = lane % self.size, lane // self.size
        if self.blocks > 1:
            return above, along, item
        return 0, along, self.items * above + item

    def place_of_result(self, lane, register):
        """(block, row, column): a lane has one column; four rows follow each other, and then the next lanes go on."""
        column, above = lane % self.size, lane // self.size
        if self.blocks > 1:
            return above, register, column
        lanes_per_column = 64 // self.size
        return 0, register // 4 * 4 * lanes_per_column + above * 4 + register % 4, column

    def gather(self, lanes_items):
        """Items [64, items] of lanes -> matrix [blocks, rows, k] (of B, columns for rows)."""
        out = np.full((self.blocks, self.size, self.depth), np.nan, object)
        for lane in range(64):
            for item in range(self.items):
                out[self.place_of_item(lane, item)] = lanes_items[lane, item]
        return out.astype(np.float64)

    def scatter(self, matrix):
        """Matrix [blocks, rows, columns] -> what lanes hold [registers, 64]."""
        return np.array([[matrix[self.place_of_result(lane, r)] for lane in range(64)] for r in range(self.registers)])


def registers(first, count, file="v"):
    return f"{file}{first}" if count == 1 else f"{file}[{first}:{first + count - 1}]"


def words(items, dtype):
    """Items [64, n] -> registers [m, 64], the first item lowest."""
    return np.ascontiguousarray(np.ascontiguousarray(items.astype(dtype)).view(np.uint32).T)


def ten_bits(a):
    """float32 with 10 bits of fraction, nearest even: what xf32 keeps."""
    wide = a.astype(np.float64)
    unit = np.exp2(np.floor(np.log2(np.where(wide == 0, 1, np.abs(wide)))) - 10)
    return np.rint(wide / unit) * unit


def draw(form, which, rng, special):
    """Items [64, n] of A or B."""
    dtype = form.types[which]
    shape = 64, form.items
    if dtype == np.int8:
        return rng.integers(-128, 128, shape).astype(np.int8)
    items = rng.normal(size=shape).astype(dtype)
    if special:
        info = ml_dtypes.finfo(dtype)
        edges = [0, -0.0, info.smallest_subnormal, -info.smallest_normal, info.max / 4, np.inf, np.nan]
        chosen = rng.random(shape) < 0.02
        items[chosen] = rng.choice(np.array([float(x) for x in edges]), chosen.sum()).astype(dtype)
    return items


def multiply(form, a, b, c, *, file="v", addend=None, modifiers="", extra=""):
    """Executes the instruction on one wave; D as [registers, 64]."""
    counts = [form.operand_registers(t) for t in form.types]
    place_c = addend if addend is not None else registers(C, form.registers, file)
    text = (
        f"{form.opcode} {registers(D, form.registers, file)}, {registers(A, counts[0])}, {registers(B, counts[1])}, "
        f"{place_c}{extra} {modifiers}"
    )
    v = {A + k: row for k, row in enumerate(words(a, form.types[0]))}
    v |= {B + k: row for k, row in enumerate(words(b, form.types[1]))}
    kept = {C + k: row for k, row in enumerate(c)}
    machine = ca.execute(text, form.arch, v=v | (kept if file == "v" else {}), a=kept if file == "a" else None)
    return np.array([ca.lanes(machine, D + r, form.result, file) for r in range(form.registers)])


def check(form, got, left, right, c):
    """Against the sum in float64, which has room for the products; a bound for any order of float32 additions."""
    with np.errstate(all="ignore"):
        exact = form.scatter(np.einsum("bik,bjk->bij", left, right)) + c
        size = form.scatter(np.einsum("bik,bjk->bij", np.abs(left), np.abs(right))) + np.abs(c)
    if form.result == np.int32:
        np.testing.assert_array_equal(got, (exact.astype(np.int64) % 2**32).astype(np.uint32).view(np.int32))
        return
    finite = np.isfinite(exact)
    # Depth + 1 roundings, each of at most half a unit (2**-24) of a sum that is no larger than all sizes together.
    bound = (form.depth + 1) * 2.0**-24 * size + 2.0**-149
    assert (np.abs(got[finite] - exact[finite]) <= bound[finite]).all()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))
    infinite = np.isinf(exact)
    np.testing.assert_array_equal(got[infinite], exact[infinite])


def in_matrices(form, a, b):
    values = [ten_bits(x) if form.reduced else x.astype(np.float64) for x in (a, b)]
    return [form.gather(x) for x in values]


@pytest.mark.parametrize("special", [False, True], ids=["random", "special"])
@pytest.mark.parametrize("opcode, arch", CASES)
def test_products(opcode, arch, special):
    form, rng = Form(opcode, arch), np.random.default_rng(7)
    a, b = (draw(form, which, rng, special) for which in (0, 1))
    c = rng.integers(-1000, 1000, (form.registers, 64)).astype(form.result)
    if special and form.result == np.float32:
        c[0, :4] = [np.inf, -np.inf, np.nan, 1e-42]
    if special and form.reduced:
        # What xf32 makes of numbers beside overflow and of NaN fractions is not in the documents.
        a, b = (np.where(np.isfinite(x) & (np.abs(x) < 1e30), x, 1) for x in (a, b))
    left, right = in_matrices(form, a, b)
    check(form, multiply(form, a, b, c, file="a" if special else "v"), left, right, c)


@pytest.mark.parametrize("opcode, arch", CASES)
def test_constant_addend(opcode, arch):
    form, rng = Form(opcode, arch), np.random.default_rng(8)
    a, b = (draw(form, which, rng, False) for which in (0, 1))
    left, right = in_matrices(form, a, b)
    unused = np.zeros((0, 64))
    for addend, value in (("0", 0), ("1.0", 1) if form.result == np.float32 else ("7", 7)):
        got = multiply(form, a, b, unused, addend=addend)
        check(form, got, left, right, np.full((form.registers, 64), value))


@pytest.mark.parametrize("opcode, arch", CASES)
def test_one_element(opcode, arch):
    """One item of A and one of B: their product stands in one place when their k is the same, and nowhere otherwise."""
    form, rng = Form(opcode, arch), np.random.default_rng(9)
    zero = np.zeros((form.registers, 64), form.result)
    for _ in range(4):
        a, b = np.zeros((64, form.items)), np.zeros((64, form.items))
        lane, item = int(rng.integers(64)), int(rng.integers(form.items))
        block, row, k = form.place_of_item(lane, item)
        there = [(x, y) for x in range(64) for y in range(form.items) if form.place_of_item(x, y)[::2] == (block, k)]
        other = there[int(rng.integers(len(there)))]
        a[lane, item], b[other] = 3, 2
        got = multiply(form, a, b, zero)
        ((register, at),) = np.argwhere(got)
        assert got[register, at] == 6
        assert form.place_of_result(at, register) == (block, row, form.place_of_item(*other)[1])
        if form.items > 1:
            b = np.zeros((64, form.items))
            b[other[0], (other[1] + 1) % form.items] = 2
            assert not multiply(form, a, b, zero).any()


@pytest.mark.parametrize("letters", ["fp8_fp8", "fp8_bf8", "bf8_fp8", "bf8_bf8"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_all_codes(arch, letters):
    """Every FP8 code of A times a unit matrix."""
    form = Form(f"v_mfma_f32_16x16x32_{letters}", arch)
    left = np.zeros((64, form.items), form.types[0])
    codes = left.view(np.uint8)
    eye = np.zeros((64, form.items))
    for lane in range(64):
        for item in range(form.items):
            _, along, k = form.place_of_item(lane, item)
            eye[lane, item] = along == k
            # A column of 16 rows holds 16 codes; the other half of k meets zeros of B.
            codes[lane, item] = 16 * k + along if k < 16 else 0
    got = multiply(form, left, eye, np.zeros((4, 64), np.float32))
    matrix = form.gather(left.astype(np.float64))[0]
    for register in range(4):
        for lane in range(64):
            _, row, column = form.place_of_result(lane, register)
            # What is not finite reaches its whole row, as 0 x NaN.
            bad = ~np.isfinite(matrix[row]) & (np.arange(32) != column)
            np.testing.assert_equal(got[register, lane], np.float32(np.nan if bad.any() else matrix[row, column] + 0))


FORMATS = [(0, 0), (0, 1), (1, 0), (1, 1)]
WIDE = ["v_mfma_f32_16x16x128_f8f6f4", "v_mfma_f32_32x32x64_f8f6f4"]


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("opcode", WIDE)
def test_formats_by_modifier(opcode, formats):
    form, rng = Form(opcode, "gfx950"), np.random.default_rng(10)
    form.types = tuple((E4M3, E5M2)[f]["gfx950"] for f in formats)
    a, b = (draw(form, which, rng, False) for which in (0, 1))
    c = rng.normal(size=(form.registers, 64)).astype(np.float32)
    got = multiply(form, a, b, c, modifiers=f"cbsz:{formats[0]} blgp:{formats[1]}")
    check(form, got, *in_matrices(form, a, b), c)


@pytest.mark.parametrize("places", [(0, 0), (1, 2), (3, 1)])
@pytest.mark.parametrize("opcode", WIDE)
def test_block_scales(opcode, places):
    """Scales 2**(byte - 127), one for the 32 values of a lane; op_sel and op_sel_hi choose the byte of the register."""
    form, rng = Form(opcode, "gfx950"), np.random.default_rng(11)
    form.opcode = opcode.replace("v_mfma_", "v_mfma_scale_")
    a, b = (draw(form, which, rng, False) for which in (0, 1))
    scales = [rng.integers(120, 134, (64, 4), np.uint8) for _ in range(2)]
    counts = [form.operand_registers(t) for t in form.types]
    selected = [[p & 1 for p in places], [p >> 1 for p in places]]
    operands = registers(D, form.registers), registers(A, counts[0]), registers(B, counts[1])
    text = (
        f"{form.opcode} {', '.join(operands)}, 0, v0, v1 "
        f"op_sel:[{selected[0][0]},{selected[0][1]},0] op_sel_hi:[{selected[1][0]},{selected[1][1]},0]"
    )
    v = {A + k: row for k, row in enumerate(words(a, form.types[0]))}
    v |= {B + k: row for k, row in enumerate(words(b, form.types[1]))}
    v |= {k: x.view(np.uint32)[:, 0] for k, x in enumerate(scales)}
    machine = ca.execute(text, "gfx950", v=v)
    got = np.array([ca.lanes(machine, D + r, np.float32) for r in range(form.registers)])
    left, right = (
        form.gather(x.astype(np.float64) * np.exp2(s[:, p].astype(float) - 127)[:, None])
        for x, s, p in zip((a, b), scales, places)
    )
    check(form, got, left, right, np.zeros((form.registers, 64)))


def test_exec_is_ignored_and_sources_may_be_overwritten():
    form, rng = Form("v_mfma_f32_16x16x16_bf16", "gfx942"), np.random.default_rng(12)
    a, b = (draw(form, which, rng, False) for which in (0, 1))
    c = rng.normal(size=(4, 64)).astype(np.float32)
    expected = multiply(form, a, b, c)
    v = {8 + k: row for k, row in enumerate([*words(a, form.types[0]), *words(b, form.types[1])])}
    v |= {16 + k: row for k, row in enumerate(c)}
    for place in (16, 8):
        text = f"v_mfma_f32_16x16x16_bf16 v[{place}:{place + 3}], v[8:9], v[10:11], v[16:19]"
        machine = ca.execute(text, v=v, active=np.arange(64) % 3 == 0)
        got = np.array([ca.lanes(machine, place + r, np.float32) for r in range(4)])
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("waves", [None, [0, 2]])
def test_waves_do_not_mix(waves):
    form, rng = Form("v_mfma_f32_32x32x8_f16", "gfx942"), np.random.default_rng(13)
    drawn = [[draw(form, which, rng, False) for which in (0, 1)] for _ in range(3)]
    zero = np.zeros((form.registers, 64), np.float32)
    v = {}
    for which, first in ((0, A), (1, B)):
        rows = [words(pair[which], np.float16) for pair in drawn]
        v |= {first + k: np.concatenate([r[k] for r in rows]) for k in range(2)}
    machine = ca.execute("v_mfma_f32_32x32x8_f16 v[40:55], v[8:9], v[16:17], 0", v=v, waves=waves)
    got = machine.V[D : D + 16].view(np.float32)
    for wave in range(3):
        if waves is None or wave in waves:
            np.testing.assert_array_equal(got[:, wave], multiply(form, *drawn[wave], zero))
        else:
            assert (machine.V[D : D + 16, wave] == ca.UNTOUCHED).all()


def test_operands_may_be_accumulation_registers():
    form, rng = Form("v_mfma_f32_16x16x32_fp8_fp8", "gfx942"), np.random.default_rng(14)
    a, b = (draw(form, which, rng, False) for which in (0, 1))
    kept = {8 + k: row for k, row in enumerate([*words(a, form.types[0]), *words(b, form.types[1])])}
    machine = ca.execute("v_mfma_f32_16x16x32_fp8_fp8 v[0:3], a[8:9], a[10:11], 0", a=kept)
    got = np.array([ca.lanes(machine, r, np.float32) for r in range(4)])
    check(form, got, *in_matrices(form, a, b), np.zeros((4, 64)))


REFUSED = {
    "v_mfma_f32_16x16x16_bf16 v[0:3], v[8:9], v[10:11], v[0:3] cbsz:1": "broadcast modifiers",
    "v_mfma_f32_32x32x4_2b_f16 a[0:31], v[8:9], v[10:11], a[0:31]": "shape",
    "v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[8:13], v[16:21], v[0:3] cbsz:2 blgp:2": "six- and four-bit",
    "v_mfma_f32_16x16x16_bf16 v[0:3], v[8:11], v[12:15], v[0:3]": r"\[2, 2\] and 4 expected",
    "v_mfma_f32_32x32x8_bf16 v[0:3], v[8:9], v[10:11], v[0:3]": r"\[2, 2\] and 16 expected",
    "v_mfma_f32_16x16x16_what v[0:3], v[8:9], v[10:11], v[0:3]": "what",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_implemented_raises(text):
    with pytest.raises(InterpreterError, match=f"line 3: `{re.escape(text)}`: .*{REFUSED[text]}"):
        control_flow.bind_blocks(ca.kernel(text, "gfx950"))


def test_the_forms_are_real_assembly():
    try:
        assembler = toolchain.find_llvm("llvm-mc")
    except toolchain.ToolMissing as reason:
        pytest.skip(str(reason))
    for machine in ("gfx942", "gfx950"):
        lines = []
        for opcode, arch in CASES:
            form = Form(opcode, arch)
            sources = [registers(at, form.operand_registers(t)) for at, t in zip((A, B), form.types)]
            for file in "va":
                place = registers(D, form.registers, file)
                lines += [f"{opcode} {place}, {', '.join(sources)}, {c}" for c in ("0", place) if arch == machine]
        command = [assembler, "-triple=amdgcn-amd-amdhsa", f"-mcpu={machine}", "-filetype=null"]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
