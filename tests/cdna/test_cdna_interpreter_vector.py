"""Vector instructions of the CDNA interpreter against formulas in Python numbers, numpy and ml_dtypes."""

import math
import re
import subprocess
from fractions import Fraction

import cdna_assembly as ca
import ml_dtypes
import numpy as np
import pytest
from support.division import DIVISION, assert_same, quotients

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.interpreter import control_flow, vector_alu, vector_table
from pallas_kernels.cdna.interpreter.assembly import InterpreterError
from pallas_kernels.cdna.interpreter.dispatch import Dispatch
from pallas_kernels.cdna.interpreter.machine import Memory

BF16 = ml_dtypes.bfloat16


def fraction_of(x):
    return Fraction(float(x))


def fused(a, b, c):
    """a * b + c of rational numbers, rounded once; whatever is not finite, and zeros, from numpy."""
    out = np.where(np.isfinite(a) & np.isfinite(b) & ~np.isfinite(c), c, a * b + c).astype(a.dtype)
    for k in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = fraction_of(a[k]) * fraction_of(b[k]) + fraction_of(c[k])
        # Of an exact zero only the signs of the addends decide; without rounding numpy's sign is right.
        if exact != 0:
            out[k] = ca.nearest(exact, a.dtype.type)
        else:
            zero = np.copysign(1, a[k]) * np.copysign(1, b[k])
            out[k] = -0.0 if a[k] * b[k] == 0 and c[k] == 0 and zero < 0 and np.signbit(c[k]) else 0.0
    return out


def larger(a, b):
    """maximumNumber of IEEE 754-2019."""
    key = [np.where(np.isnan(x), -np.inf, x) for x in (a, b)]
    above = (key[0] > key[1]) | ((key[0] == key[1]) & ~np.signbit(a) & ~np.isnan(a)) | np.isnan(b)
    return np.where(above, a, b)


def smaller(a, b):
    return -larger(-a, -b)


def truncated(a, low, high):
    return np.array([0 if math.isnan(x) else int(min(max(x, low), high)) for x in a.astype(float)], object)


def signed(x, bits):
    """The low bits of a Python integer as two's complement."""
    return ((x & ((1 << bits) - 1)) ^ (1 << (bits - 1))) - (1 << (bits - 1))


@np.vectorize(otypes=[object])
def permuted(a, b, selector):
    data = (a << 32 | b).to_bytes(8, "little")
    signs = [0xFF * (data[k] >> 7) for k in (1, 3, 5, 7)]
    return int.from_bytes(
        [[*data, *signs, 0, *[0xFF] * 3][min(c, 15)] for c in selector.to_bytes(4, "little")], "little"
    )


def shift_right_word(a, b, bits):
    return (a << 32 | b) >> bits


def popcount(a):
    return np.array([x.bit_count() for x in a], object)


# Opcode -> (types of the sources, type of the result, formula of Python integers).
INTEGERS = {
    "v_mov_b32": ("u", "u", lambda a: a),
    "v_mov_b64": ("U", "U", lambda a: a),
    "v_add_u32": ("uu", "u", lambda a, b: a + b),
    "v_add_i32": ("ii", "i", lambda a, b: a + b),
    "v_sub_u32": ("uu", "u", lambda a, b: a - b),
    "v_sub_i32": ("ii", "i", lambda a, b: a - b),
    "v_subrev_u32": ("uu", "u", lambda a, b: b - a),
    "v_add3_u32": ("uuu", "u", lambda a, b, c: a + b + c),
    "v_add_lshl_u32": ("uuu", "u", lambda a, b, c: (a + b) << c % 32),
    "v_lshl_add_u32": ("uuu", "u", lambda a, b, c: (a << b % 32) + c),
    "v_xad_u32": ("uuu", "u", lambda a, b, c: (a ^ b) + c),
    "v_mul_lo_u32": ("uu", "u", lambda a, b: a * b),
    "v_mul_hi_u32": ("uu", "u", lambda a, b: a * b >> 32),
    "v_mul_hi_i32": ("ii", "u", lambda a, b: a * b >> 32),
    "v_mul_u32_u24": ("uu", "u", lambda a, b: a % 2**24 * (b % 2**24)),
    "v_mul_i32_i24": ("uu", "u", lambda a, b: signed(a, 24) * signed(b, 24)),
    "v_mul_hi_u32_u24": ("uu", "u", lambda a, b: a % 2**24 * (b % 2**24) >> 32),
    "v_mad_u32_u24": ("uuu", "u", lambda a, b, c: a % 2**24 * (b % 2**24) + c),
    "v_mad_i32_i24": ("uuu", "u", lambda a, b, c: signed(a, 24) * signed(b, 24) + c),
    "v_max_i32": ("ii", "i", np.maximum),
    "v_min_i32": ("ii", "i", np.minimum),
    "v_max_u32": ("uu", "u", np.maximum),
    "v_min_u32": ("uu", "u", np.minimum),
    "v_max3_i32": ("iii", "i", lambda *x: np.max(x, axis=0)),
    "v_min3_i32": ("iii", "i", lambda *x: np.min(x, axis=0)),
    "v_max3_u32": ("uuu", "u", lambda *x: np.max(x, axis=0)),
    "v_min3_u32": ("uuu", "u", lambda *x: np.min(x, axis=0)),
    "v_med3_i32": ("iii", "i", lambda *x: np.sort(x, axis=0)[1]),
    "v_med3_u32": ("uuu", "u", lambda *x: np.sort(x, axis=0)[1]),
    "v_not_b32": ("u", "u", lambda a: ~a),
    "v_and_b32": ("uu", "u", lambda a, b: a & b),
    "v_or_b32": ("uu", "u", lambda a, b: a | b),
    "v_xor_b32": ("uu", "u", lambda a, b: a ^ b),
    "v_xnor_b32": ("uu", "u", lambda a, b: ~(a ^ b)),
    "v_and_or_b32": ("uuu", "u", lambda a, b, c: (a & b) | c),
    "v_or3_b32": ("uuu", "u", lambda a, b, c: a | b | c),
    "v_lshl_or_b32": ("uuu", "u", lambda a, b, c: (a << b % 32) | c),
    "v_lshlrev_b32": ("uu", "u", lambda a, b: b << a % 32),
    "v_lshrrev_b32": ("uu", "u", lambda a, b: b >> a % 32),
    "v_ashrrev_i32": ("ui", "i", lambda a, b: b >> a % 32),
    "v_lshlrev_b64": ("uU", "U", lambda a, b: b << a % 64),
    "v_lshrrev_b64": ("uU", "U", lambda a, b: b >> a % 64),
    "v_ashrrev_i64": ("uI", "I", lambda a, b: b >> a % 64),
    "v_bfe_u32": ("uuu", "u", lambda a, b, c: (a >> b % 32) & ((1 << c % 32) - 1)),
    "v_bfe_i32": ("iuu", "u", np.vectorize(lambda a, b, c: signed(a >> b % 32, c % 32) if c % 32 else 0, [object])),
    "v_bfi_b32": ("uuu", "u", lambda a, b, c: (a & b) | (~a & c)),
    "v_bfm_b32": ("uu", "u", lambda a, b: ((1 << a % 32) - 1) << b % 32),
    "v_bfrev_b32": ("u", "u", np.vectorize(lambda a: int(f"{a:032b}"[::-1], 2), [object])),
    "v_ffbh_u32": ("u", "u", np.vectorize(lambda a: 32 - a.bit_length() if a else -1, [object])),
    "v_ffbl_b32": ("u", "u", np.vectorize(lambda a: f"{a:b}"[::-1].find("1"), [object])),
    "v_bcnt_u32_b32": ("uu", "u", lambda a, b: popcount(a) + b),
    "v_perm_b32": ("uuu", "u", permuted),
    "v_alignbit_b32": ("uuu", "u", lambda a, b, c: shift_right_word(a, b, c % 32)),
    "v_alignbyte_b32": ("uuu", "u", lambda a, b, c: shift_right_word(a, b, c % 4 * 8)),
    "v_add_u16": ("ww", "w", lambda a, b: a + b),
    "v_sub_u16": ("ww", "w", lambda a, b: a - b),
    "v_subrev_u16": ("ww", "w", lambda a, b: b - a),
    "v_mul_lo_u16": ("ww", "w", lambda a, b: a * b),
    "v_mad_legacy_u16": ("www", "w", lambda a, b, c: a * b + c),
    "v_lshlrev_b16": ("ww", "w", lambda a, b: b << a % 16),
    "v_lshrrev_b16": ("ww", "w", lambda a, b: b >> a % 16),
    "v_ashrrev_i16": ("ws", "s", lambda a, b: b >> a % 16),
    "v_max_u16": ("ww", "w", np.maximum),
    "v_min_u16": ("ww", "w", np.minimum),
    "v_max_i16": ("ss", "s", np.maximum),
    "v_min_i16": ("ss", "s", np.minimum),
    "v_cvt_f32_i32": ("i", "f", np.vectorize(lambda a: ca.nearest(Fraction(a), np.float32), [np.float32])),
}


def register(first, letter):
    return f"v[{first}:{first + 1}]" if letter in "UId" else f"v{first}"


def line_of(opcode, types, result):
    """The instruction with its sources in v4, v6, v8 and its result in v0."""
    return f"{opcode} " + ", ".join([register(0, result), *(register(4 + 2 * k, t) for k, t in enumerate(types))])


def sources(types, values):
    return {4 + 2 * k: x for k, x in enumerate(values)}


def wrapped(numbers, letter):
    """Python integers cut to a type."""
    dtype = np.dtype(ca.DTYPES[letter])
    if dtype.kind == "f":
        return numbers.astype(dtype)
    unsigned = np.array([int(x) % (1 << 8 * dtype.itemsize) for x in numbers], f"u{dtype.itemsize}")
    return unsigned.view(dtype)


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode):
    types, result, formula = INTEGERS[opcode]
    values = ca.inputs(types)
    machine = ca.execute(line_of(opcode, types, result), v=sources(types, values))
    assert_same(ca.lanes(machine, 0, ca.DTYPES[result]), wrapped(formula(*(x.astype(object) for x in values)), result))
    # A 16-bit result clears the upper half of its register.
    assert result not in "ws" or not (ca.lanes(machine, 0) >> 16).any()


# --- floats ----------------------------------------------------------------------------------------------------------
def each(dtype, formula):
    """A formula of Python floats as one of arrays; infinities and NaN pass unchanged."""

    def one(a, *rest):
        return a if not math.isfinite(a) else formula(a, *rest)

    return lambda *arrays: np.array([one(*map(float, x)) for x in zip(*arrays)], dtype)


def rounded_to(dtype):
    """Conversion from a wider float, by rational numbers."""
    return each(dtype, lambda a: ca.nearest(Fraction(a), dtype) if a else a)


def bf16_bits(a):
    """Round to nearest even in integers, the usual formula for bfloat16."""
    bits = a.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(a), 0x7FC0, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(BF16)


def half_toward_zero(a):
    def one(x):
        unit = 2.0 ** (max(math.frexp(x)[1] - 1, -14) - 10)
        return math.copysign(min(math.floor(abs(x) / unit) * unit, 65504.0), x)

    return each(np.float16, one)(a)


def pair(low, high):
    return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16


def exponent(a):
    """The biased exponent that stands in a float32."""
    return int(np.float32(a).view(np.uint32)) >> 23 & 255


def fixed_up(quotient, denominator, numerator):
    """The cases of v_div_fixup in the order of the ISA document; a quotient that is NaN overflowed on its way."""
    sign = -1.0 if np.signbit(denominator) != np.signbit(numerator) else 1.0
    if np.isnan(numerator) or np.isnan(denominator):
        return np.nan
    if (denominator == 0 and numerator == 0) or (np.isinf(denominator) and np.isinf(numerator)):
        return np.nan
    if denominator == 0 or np.isinf(numerator):
        return sign * np.inf
    if numerator == 0 or np.isinf(denominator) or exponent(numerator) - exponent(denominator) < -150:
        return sign * 0.0
    return sign * np.inf if np.isnan(quotient) else sign * abs(quotient)


def middle(a, b, c):
    """v_med3 as the ISA document writes it."""
    most = larger(larger(a, b), c)
    out = np.where(most == a, larger(b, c), np.where(most == b, larger(a, c), larger(a, b)))
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), smaller(smaller(a, b), c), out)


def with_nan(choose):
    """maximum and minimum of IEEE 754-2019: NaN wins."""
    return lambda a, b, c: np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.nan, choose(choose(a, b), c))


def byte_of(place):
    return lambda a: np.array([x.to_bytes(4, "little")[place] for x in a.tolist()], np.float32)


def scaled_by_power(a, b):
    return each(
        np.float32,
        lambda x, e: ca.nearest(Fraction(x) * Fraction(2) ** int(max(-600, min(600, e))), np.float32) if x else x,
    )(a, b)


def fraction_part(a):
    below = [Fraction(float(x)) - math.floor(x) if np.isfinite(x) else None for x in a]
    return np.array(
        [np.nan if x is None else min(ca.nearest(x, np.float32), np.float32(1 - 2**-24)) for x in below], "f"
    )


def to_integer(low, high):
    return lambda a: truncated(a, low, high)


SIGNED, UNSIGNED = (-(2**31), 2**31 - 1), (0, 2**32 - 1)
# Opcode -> (types of the sources, type of the result, formula of numpy arrays).
FLOATS = {
    "v_cvt_f32_u32": ("u", "f", lambda a: np.array([ca.nearest(Fraction(int(x)), np.float32) for x in a])),
    "v_cvt_i32_f32": ("f", "i", to_integer(*SIGNED)),
    "v_cvt_u32_f32": ("f", "u", to_integer(*UNSIGNED)),
    "v_cvt_i32_f64": ("d", "i", to_integer(*SIGNED)),
    "v_cvt_u32_f64": ("d", "u", to_integer(*UNSIGNED)),
    "v_cvt_f32_f16": ("h", "f", lambda a: np.array([float(x) for x in a])),
    "v_cvt_f16_f32": ("f", "h", rounded_to(np.float16)),
    "v_cvt_f32_bf16": ("b", "f", lambda a: (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)),
    "v_cvt_f32_f64": ("d", "f", rounded_to(np.float32)),
    "v_cvt_f64_f32": ("f", "d", lambda a: np.array([float(x) for x in a])),
    "v_cvt_f64_i32": ("i", "d", lambda a: np.array([float(x) for x in a])),
    "v_cvt_f64_u32": ("u", "d", lambda a: np.array([float(x) for x in a])),
    **{f"v_cvt_f32_ubyte{k}": ("u", "f", byte_of(k)) for k in range(4)},
    "v_cvt_pkrtz_f16_f32": ("ff", "u", lambda a, b: pair(half_toward_zero(a), half_toward_zero(b))),
    "v_cvt_pk_f16_f32": ("ff", "u", lambda a, b: pair(rounded_to(np.float16)(a), rounded_to(np.float16)(b))),
    "v_cvt_pk_bf16_f32": ("ff", "u", lambda a, b: pair(bf16_bits(a), bf16_bits(b))),
    "v_pack_b32_f16": ("hh", "u", pair),
    "v_add_f32": ("ff", "f", lambda a, b: a + b),
    "v_sub_f32": ("ff", "f", lambda a, b: a - b),
    "v_subrev_f32": ("ff", "f", lambda a, b: b - a),
    "v_mul_f32": ("ff", "f", lambda a, b: a * b),
    "v_mul_legacy_f32": ("ff", "f", lambda a, b: np.where((a == 0) | (b == 0), 0, a * b)),
    "v_fma_f32": ("fff", "f", fused),
    "v_max_f32": ("ff", "f", larger),
    "v_min_f32": ("ff", "f", smaller),
    "v_max3_f32": ("fff", "f", lambda a, b, c: larger(larger(a, b), c)),
    "v_min3_f32": ("fff", "f", lambda a, b, c: smaller(smaller(a, b), c)),
    "v_med3_f32": ("fff", "f", middle),
    "v_maximum3_f32": ("fff", "f", with_nan(larger)),
    "v_minimum3_f32": ("fff", "f", with_nan(smaller)),
    "v_floor_f32": ("f", "f", each(np.float32, lambda a: math.copysign(math.floor(a), a))),
    "v_ceil_f32": ("f", "f", each(np.float32, lambda a: math.copysign(math.ceil(a), a))),
    "v_trunc_f32": ("f", "f", each(np.float32, lambda a: math.copysign(math.trunc(a), a))),
    "v_rndne_f32": ("f", "f", each(np.float32, lambda a: math.copysign(round(a), a))),
    "v_fract_f32": ("f", "f", fraction_part),
    "v_frexp_mant_f32": ("f", "f", each(np.float32, lambda a: math.frexp(a)[0])),
    "v_frexp_exp_i32_f32": ("f", "i", lambda a: np.array([math.frexp(x)[1] if np.isfinite(x) else 0 for x in a])),
    "v_ldexp_f32": ("fi", "f", scaled_by_power),
    "v_div_fixup_f32": ("fff", "f", np.vectorize(fixed_up, [np.float32])),
    "v_add_f16": ("hh", "h", lambda a, b: a + b),
    "v_sub_f16": ("hh", "h", lambda a, b: a - b),
    "v_mul_f16": ("hh", "h", lambda a, b: a * b),
    "v_fma_f16": ("hhh", "h", fused),
    "v_max_f16": ("hh", "h", larger),
    "v_min_f16": ("hh", "h", smaller),
    "v_add_f64": ("dd", "d", lambda a, b: a + b),
    "v_mul_f64": ("dd", "d", lambda a, b: a * b),
    "v_fma_f64": ("ddd", "d", fused),
    "v_max_f64": ("dd", "d", larger),
    "v_min_f64": ("dd", "d", smaller),
}
GFX950 = {"v_cvt_f32_bf16", "v_cvt_pk_f16_f32", "v_cvt_pk_bf16_f32", "v_maximum3_f32", "v_minimum3_f32"}


def arch_of(opcode):
    return "gfx950" if opcode in GFX950 else "gfx942"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", FLOATS)
def test_floats(opcode):
    types, result, formula = FLOATS[opcode]
    values = ca.inputs(types, 1024)
    machine = ca.execute(line_of(opcode, types, result), arch_of(opcode), v=sources(types, values))
    assert_same(ca.lanes(machine, 0, ca.DTYPES[result]), wrapped(formula(*values), result))


# Opcode -> formula in float64. The ISA documents promise 1 unit in the last place, and that subnormals count as zero.
APPROXIMATE = {
    "v_rcp_f32": lambda a: 1 / a,
    "v_rcp_iflag_f32": lambda a: 1 / a,
    "v_rsq_f32": lambda a: np.where(a > 0, np.abs(a) ** -0.5, np.where(a == 0, 1 / a, np.nan)),
    "v_sqrt_f32": np.sqrt,
    "v_exp_f32": lambda a: 2**a,
    "v_log_f32": lambda a: np.log(a) / math.log(2),
}


def flushed(a):
    return np.where(np.abs(a) < np.float32(2.0**-126), np.copysign(np.float32(0), a), a)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_transcendental(opcode):
    (a,) = ca.inputs("f", 4096)
    near = np.random.default_rng(0).uniform(-140, 140, 4096).astype(np.float32)
    a = np.concatenate([a, near, np.exp2(near), np.nextafter(np.float32(1), near)])
    got = ca.lanes(ca.execute(f"{opcode} v0, v4", v={4: a}), 0, np.float32)
    expected = flushed(APPROXIMATE[opcode](flushed(a).astype(np.float64)).astype(np.float32))
    # Results beside the border between normal and flushed numbers may fall on either side.
    clear = np.abs(np.abs(expected.astype(np.float64)) - 2.0**-126) > 2.0**-148
    special = ~np.isfinite(expected) | (expected == 0)
    assert_same(got[special & clear], expected[special & clear])
    plain = ~special & clear
    assert plain.sum() > 1000
    error = np.abs(got[plain].astype(np.float64) - expected[plain])
    assert (error <= np.spacing(np.abs(expected[plain]))).all()


# --- comparisons and masks -------------------------------------------------------------------------------------------
# Comparison -> outcomes for which it holds: less, equal, greater, unordered.
RELATIONS = {
    **{"f": "", "lt": "<", "eq": "=", "le": "<=", "gt": ">", "lg": "<>", "ge": ">=", "o": "<=>", "u": "u"},
    **{"nge": "<u", "nlg": "=u", "ngt": "<=u", "nle": ">u", "neq": "<>u", "nlt": "=>u", "tru": "<=>u"},
}
INTEGER_RELATIONS = {"f": "", "lt": "<", "eq": "=", "le": "<=", "gt": ">", "ne": "<>", "ge": ">="}
COMPARED = {"f16": "h", "f32": "f", "f64": "d", "i16": "s", "i32": "i", "i64": "I", "u16": "w", "u32": "u", "u64": "U"}
COMPARISONS = [
    (f"v_cmp{x}_{name}_{kind}", letter, holds)
    for kind, letter in COMPARED.items()
    for name, holds in (RELATIONS if kind[0] == "f" else INTEGER_RELATIONS).items()
    for x in ("", "x")
]


def some_lanes(count, seed=0):
    """Active lanes: some waves whole, the others at random."""
    rng = np.random.default_rng(seed)
    chosen = rng.random((count // ca.LANES, ca.LANES)) < 0.6
    chosen[::3] = True
    return chosen.reshape(-1)


@pytest.mark.parametrize("opcode, letter, holds", COMPARISONS, ids=lambda x: x if str(x).startswith("v_") else "")
def test_comparisons(opcode, letter, holds):
    a, b = ca.inputs(letter * 2, 1024)
    active = some_lanes(1024)
    outcome = [
        "u" if x != x or y != y else "<" if x < y else ">" if x > y else "="
        for x, y in zip(a.astype(float if letter in "fhd" else object).tolist(), b.tolist())
    ]
    expected = np.array([o in holds for o in outcome]) & active
    machine = ca.execute(
        f"{opcode}_e64 s[20:21], {register(4, letter)}, {register(6, letter)}", v={4: a, 6: b}, active=active
    )
    np.testing.assert_array_equal(ca.mask(machine, 20), expected)
    # v_cmpx goes on with the lanes where the comparison holds.
    np.testing.assert_array_equal(machine.lanes.reshape(-1), expected if "cmpx" in opcode else active)
    np.testing.assert_array_equal(ca.mask(machine), ca.mask(ca.execute("v_mov_b32 v0, v4", v={4: a})))


def class_of(bits):
    """Number of the class of float32 bits, of the ten that v_cmp_class knows."""
    negative, size = bits >> 31, bits & 0x7FFFFFFF
    if size > 0x7F800000:
        return 1 if size & 0x400000 else 0
    kind = 3 if size == 0x7F800000 else 2 if size >= 0x800000 else 1 if size else 0
    return 5 - kind if negative else 6 + kind


@pytest.mark.parametrize("wanted", [*(1 << k for k in range(10)), 0x1F8, 0x3FF, 0])
def test_classes(wanted):
    (a,) = ca.inputs("f", 512)
    a.view(np.uint32)[-4:] = [0x7F800001, 0xFF800001, 0x7FC00000, 0xFFFFFFFF]
    active = some_lanes(512)
    expected = np.array([wanted >> class_of(int(x)) & 1 for x in a.view(np.uint32)], bool) & active
    values = {4: a, 6: np.full(512, wanted, np.uint32)}
    for opcode, right in (("v_cmp_class_f32", "v6"), ("v_cmpx_class_f32", "s6")):
        machine = ca.execute(f"{opcode} s[20:21], v4, {right}", v=values, s={6: wanted}, active=active)
        np.testing.assert_array_equal(ca.mask(machine, 20), expected)
        np.testing.assert_array_equal(machine.lanes.reshape(-1), expected if "cmpx" in opcode else active)
    # Of a negated or absolute value.
    machine = ca.execute("v_cmp_class_f32_e64 vcc, -|v4|, v6", v=values)
    turned = [wanted >> class_of(int(x) | 0x80000000) & 1 for x in a.view(np.uint32)]
    np.testing.assert_array_equal(ca.mask(machine), np.array(turned, bool))


def test_select():
    a, b = ca.inputs("ff", 1024)
    chosen = some_lanes(1024, 5)
    for text, x, y in (
        ("v_cndmask_b32_e32 v0, v4, v6, vcc", a, b),
        ("v_cndmask_b32_e64 v0, v4, v6, s[20:21]", a, b),
        ("v_cndmask_b32_e64 v0, -v4, |v6|, s[20:21]", -a, np.abs(b)),
        ("v_cndmask_b32_e64 v0, 0, 1.0, vcc", np.float32(0), np.float32(1)),
        ("v_cndmask_b32_e64 v0, v4, s2, vcc", a, np.float32(7)),
    ):
        machine = ca.execute(text, v={4: a, 6: b}, s={2: 0x40E00000}, masks={20: chosen, ca.VCC: chosen})
        assert_same(ca.lanes(machine, 0, np.float32), np.where(chosen, y, x))


CARRIES = {
    "v_add_co_u32": lambda a, b, c: a + b,
    "v_addc_co_u32": lambda a, b, c: a + b + c,
    "v_sub_co_u32": lambda a, b, c: a - b,
    "v_subb_co_u32": lambda a, b, c: a - b - c,
    "v_subrev_co_u32": lambda a, b, c: b - a,
    "v_subbrev_co_u32": lambda a, b, c: b - a - c,
}


@pytest.mark.parametrize("opcode", CARRIES)
def test_carries(opcode):
    a, b = ca.inputs("uu", 1024)
    carry, active = some_lanes(1024, 1), some_lanes(1024, 2)
    with_carry = "addc" in opcode or "subb" in opcode
    for pair_of in ("vcc", "s[20:21]"):
        text = f"{opcode} v0, {pair_of}, v4, v6" + (f", {pair_of}" if with_carry else "")
        index = ca.VCC if pair_of == "vcc" else 20
        machine = ca.execute(text, v={4: a, 6: b}, masks={index: carry}, active=active)
        total = CARRIES[opcode](*(x.astype(object) for x in (a, b, carry.astype(int))))
        expected = np.where(active, wrapped(total, "u"), ca.UNTOUCHED)
        np.testing.assert_array_equal(ca.lanes(machine, 0), expected)
        overflow = np.array([not 0 <= x < 2**32 for x in total])
        np.testing.assert_array_equal(ca.mask(machine, index), overflow & active)


@pytest.mark.parametrize("opcode, types", [("v_mad_u64_u32", "uuU"), ("v_mad_i64_i32", "iiI")])
def test_wide_multiply(opcode, types):
    values = ca.inputs(types, 1024)
    active = some_lanes(1024)
    machine = ca.execute(f"{opcode} v[0:1], s[20:21], v4, v6, v[8:9]", v=sources(types, values), active=active)
    a, b, c = (x.astype(object) for x in values)
    expected = np.where(active, wrapped(a * b + c, "U"), ca.UNTOUCHED << 32 | ca.UNTOUCHED)
    np.testing.assert_array_equal(ca.lanes(machine, 0, np.uint64), expected)
    carry = np.array([(x % 2**64) + (y % 2**64) >= 2**64 for x, y in zip(a * b, c)]) & active
    np.testing.assert_array_equal(ca.mask(machine, 20), carry)


# --- accumulating ----------------------------------------------------------------------------------------------------
ACCUMULATING = {
    "v_fmac_f16 v8, v4, v6": "h",
    "v_fmac_f32 v8, v4, v6": "f",
    "v_fmac_f64 v[8:9], v[4:5], v[6:7]": "d",
    "v_fmac_f32_e64 v8, -v4, |v6|": "f",
}
PI = 0x40490FDB
LITERAL = {
    "v_fmamk_f32 v0, v4, 0x40490fdb, v6": lambda a, b: (a, np.full_like(a, np.float32(np.pi)), b),
    "v_fmaak_f32 v0, v4, v6, 0x40490fdb": lambda a, b: (a, b, np.full_like(a, np.float32(np.pi))),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("text", ACCUMULATING)
def test_accumulate(text):
    letter = ACCUMULATING[text]
    a, b, c = ca.inputs(letter * 3, 1024)
    got = ca.lanes(ca.execute(text, v={4: a, 6: b, 8: c}), 8, ca.DTYPES[letter])
    assert_same(got, fused(-a, np.abs(b), c) if "|" in text else fused(a, b, c))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("text", LITERAL)
def test_literal_fma(text):
    a, b = ca.inputs("ff", 1024)
    assert_same(ca.lanes(ca.execute(text, v={4: a, 6: b}), 0, np.float32), fused(*LITERAL[text](a, b)))


# --- division --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("units", [0, 1, -1])
def test_division_is_rounded_once(units, monkeypatch):
    """All quotients, subnormal ones too: the kernels run with the denormal mode on (tests/test_cdna_kernels.py).

    The hardware's v_rcp_f32 may be one unit in the last place away from the interpreter's, which is rounded. That only
    matters for denominators whose fraction is all ones, where the reciprocal that the refinement ends with can be off.
    """
    types, result, exact = vector_table.TABLE["v_rcp_f32"]

    def reciprocal(a):
        r = exact(a)
        return np.where(np.isfinite(r) & (r != 0), r + np.float32(units) * np.spacing(r), r).astype(np.float32)

    monkeypatch.setitem(vector_table.TABLE, "v_rcp_f32", (types, result, reciprocal))
    a, b = quotients()
    got, expected = ca.lanes(ca.execute(DIVISION, v={4: a, 6: b}), 0, np.float32), a / b
    if units:
        hard = (b.view(np.uint32) & 0x7FFFFF == 0x7FFFFF) & np.isfinite(expected)
        off = got[hard].view(np.int32).astype(np.int64) - expected[hard].view(np.int32)
        assert 0 < np.abs(off).max() <= 1
        got, expected = got[~hard], expected[~hard]
    assert_same(got, expected)


# (numerator, denominator) -> powers of two that they are scaled by, and whether the quotient is scaled back: one row or
# more for every case of the ISA document. Its "1 / denominator is subnormal" is meant in float32.
SCALED = {
    (3.0, 7.0): (0, 0, False),
    # The quotient is near the largest number.
    (2.0**60, 2.0**-36): (0, 64, True),
    (2.0**60 * 1.5, 2.0**-35): (0, 0, False),
    (1.0, 2.0**-140): (0, 64, True),
    (np.inf, 1.0): (0, 64, True),
    # The denominator is subnormal.
    (2.0**-40, 2.0**-140): (64, 64, False),
    # The denominator has a subnormal reciprocal, and the quotient is subnormal, or is not.
    (1.0, 2.0**127): (0, -64, True),
    (2.0**100, 2.0**127): (-64, -64, False),
    (2.0**100, 2.0**126): (0, 0, False),
    # The quotient is subnormal, or too small for that.
    (2.0**-30, 2.0**100): (64, 0, True),
    (2.0**-140, 2.0**30): (64, 0, True),
    (2.0**-26, 2.0**100): (0, 0, False),
    # The numerator is small, its exponent at most 23 as it is stored.
    (2.0**-104, 2.0**-20): (64, 64, False),
    (2.0**-140, 2.0**-20): (64, 64, False),
    (2.0**-103, 2.0**-20): (0, 0, False),
}


@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_scale_of_a_division(signs):
    top, bottom = (np.repeat(np.array(x, np.float32) * s, ca.LANES) for x, s in zip(zip(*SCALED), signs))
    active = some_lanes(len(top))
    machine = ca.execute("\n".join(DIVISION.strip().splitlines()[:3:2]), v={4: top, 6: bottom}, active=active)
    of_top, of_bottom, flag = (np.repeat(x, ca.LANES) for x in zip(*SCALED.values()))
    untouched = np.uint32(ca.UNTOUCHED).view(np.float32)
    for register, value, power in ((10, bottom, of_bottom), (11, top, of_top)):
        expected = np.where(active, np.ldexp(value, power), untouched)
        assert_same(ca.lanes(machine, register, np.float32), expected.astype(np.float32))
    for register in (2, ca.VCC):
        np.testing.assert_array_equal(ca.mask(machine, register), flag & active)


def test_scale_of_a_division_by_or_of_zero():
    top, bottom = (np.repeat(np.array(x, np.float32), ca.LANES) for x in ((0, 5, -0.0, 0), (5, 0, -5, 0)))
    machine = ca.execute(DIVISION.strip().splitlines()[2], v={4: top, 6: bottom})
    assert np.isnan(ca.lanes(machine, 11, np.float32)).all() and not ca.mask(machine).any()


def test_fixup_of_a_quotient_too_small_for_a_subnormal():
    top, bottom = (np.repeat(np.array(x, np.float32), ca.LANES) for x in ((2.0**-51, 2.0**-50), (2.0**100, 2.0**100)))
    machine = ca.execute("v_div_fixup_f32 v0, v8, v6, v4", v={4: top, 6: bottom, 8: np.full_like(top, 3)})
    np.testing.assert_array_equal(ca.lanes(machine, 0, np.float32), np.repeat([0, 3], ca.LANES))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scaling_back_rounds_once():
    a, b, c = ca.inputs("fff")
    rng = np.random.default_rng(5)
    # Quotients that become subnormal, with a remainder far below their last bit.
    c[:512] = np.ldexp(rng.uniform(1, 2, 512), rng.integers(-85, -62, 512))
    a[:512], b[:512] = c[:512] * np.float32(2.0**-40), 1
    flag = rng.random(len(a)) < 0.75
    flag[:512] = True
    got = ca.lanes(ca.execute("v_div_fmas_f32 v0, v4, v6, v8", v={4: a, 6: b, 8: c}, masks={ca.VCC: flag}), 0, "f")
    expected = fused(a, b, c)
    for k in np.flatnonzero(flag & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        power = Fraction(2) ** (64 if exponent(c[k]) > 127 else -64)
        exact = (fraction_of(a[k]) * fraction_of(b[k]) + fraction_of(c[k])) * power
        expected[k] = ca.nearest(exact, np.float32) if exact else expected[k]
    assert_same(got, expected)


# --- truth tables, moves ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("letter", "uw")
def test_truth_tables(letter):
    a, b, c = ca.inputs(letter * 3, 256)
    width = 32 if letter == "u" else 16
    bits = [(x[:, None].astype(np.uint64) >> np.arange(width, dtype=np.uint64) & np.uint64(1)) for x in (a, b, c)]
    row = (bits[0] * 4 + bits[1] * 2 + bits[2]).astype(int)
    for table in range(256):
        text = f"v_bitop3_b{width} v0, v4, v6, v8 bitop3:{table:#x}"
        got = ca.lanes(ca.execute(text, "gfx950", v={4: a, 6: b, 8: c}), 0, ca.DTYPES[letter])
        np.testing.assert_array_equal(got, ((table >> row & 1) << np.arange(width)).sum(axis=1))


def test_swap_and_wide_moves():
    a, b = ca.inputs("uu", 256)
    machine = ca.execute("v_swap_b32 v4, v6", v={4: a, 6: b})
    np.testing.assert_array_equal([ca.lanes(machine, 4), ca.lanes(machine, 6)], [b, a])
    machine = ca.execute("v_accvgpr_write_b32 a3, v4\nv_accvgpr_mov_b32 a5, a3\nv_accvgpr_read_b32 v0, a5", v={4: a})
    np.testing.assert_array_equal(ca.lanes(machine, 0), a)
    np.testing.assert_array_equal(ca.lanes(machine, 3, file="a"), a)
    (wide,) = ca.inputs("U", 256)
    for shift in range(5):
        machine = ca.execute(f"v_lshl_add_u64 v[0:1], v[4:5], {shift}, v[6:7]", v={4: wide, 6: wide[::-1]})
        expected = wrapped((wide.astype(object) << shift) + wide[::-1].astype(object), "U")
        np.testing.assert_array_equal(ca.lanes(machine, 0, np.uint64), expected)


# --- packed instructions ---------------------------------------------------------------------------------------------
def halves(words):
    return (words & 0xFFFF).astype(np.uint16), (words >> 16).astype(np.uint16)


def sixteen(formula):
    """A formula of Python integers as one of 16-bit arrays."""
    return lambda *x: wrapped(formula(*(a.astype(object) for a in x)), "w")


# Opcode -> (type of the halves, formula of 16-bit arrays).
PACKED = {
    "v_pk_add_f16": ("hh", lambda a, b: a + b),
    "v_pk_mul_f16": ("hh", lambda a, b: a * b),
    "v_pk_fma_f16": ("hhh", fused),
    "v_pk_max_f16": ("hh", larger),
    "v_pk_min_f16": ("hh", smaller),
    "v_pk_add_u16": ("ww", sixteen(lambda a, b: a + b)),
    "v_pk_sub_u16": ("ww", sixteen(lambda a, b: a - b)),
    "v_pk_add_i16": ("ss", sixteen(lambda a, b: a + b)),
    "v_pk_sub_i16": ("ss", sixteen(lambda a, b: a - b)),
    "v_pk_mul_lo_u16": ("ww", sixteen(lambda a, b: a * b)),
    "v_pk_mad_u16": ("www", sixteen(lambda a, b, c: a * b + c)),
    "v_pk_lshlrev_b16": ("ww", sixteen(lambda a, b: b << a % 16)),
    "v_pk_lshrrev_b16": ("ww", sixteen(lambda a, b: b >> a % 16)),
    "v_pk_ashrrev_i16": ("ws", sixteen(lambda a, b: b >> a % 16)),
    "v_pk_max_u16": ("ww", sixteen(np.maximum)),
    "v_pk_min_u16": ("ww", sixteen(np.minimum)),
    "v_pk_max_i16": ("ss", sixteen(np.maximum)),
    "v_pk_min_i16": ("ss", sixteen(np.minimum)),
}
PACKED_FLOAT32 = {"v_pk_add_f32": lambda a, b: a + b, "v_pk_mul_f32": lambda a, b: a * b, "v_pk_fma_f32": fused}


def bracket(numbers):
    return "[" + ",".join(map(str, numbers)) + "]"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", PACKED)
def test_packed_sixteen_bits(opcode):
    types, formula = PACKED[opcode]
    low, high = ca.inputs(types, 512), ca.inputs(types, 512, seed=1)
    words = [pair(a, b) for a, b in zip(low, high)]
    count = len(types)
    for low_from, high_from, negated in (([0] * count, [1] * count, ()), ([1] * count, [0, 1, 0][:count], (1,))):
        text = line_of(opcode, "u" * count, "u") + f" op_sel:{bracket(low_from)} op_sel_hi:{bracket(high_from)}"
        signs = [[k in negated and types[0] == "h" for k in range(count)], [False] * count]
        text += f" neg_lo:{bracket(map(int, signs[0]))}" if any(signs[0]) else ""
        got = ca.lanes(ca.execute(text, v=sources(types, words)), 0)
        for half, chosen, minus in zip(halves(got), (low_from, high_from), signs):
            values = [(low[k], high[k])[c] for k, c in enumerate(chosen)]
            values = [-x if sign else x for x, sign in zip(values, minus)]
            expected = formula(*values)
            assert_same(half.view(expected.dtype), expected)


def test_packed_constants_stand_in_the_low_half():
    low, high = ca.inputs("hh", 512)
    word = {4: pair(low, high)}
    with np.errstate(all="ignore"):
        for text, constants in (
            ("v_pk_add_f16 v0, v4, 1.0", (1, 0)),
            ("v_pk_add_f16 v0, v4, 1.0 op_sel_hi:[1,0]", (1, 1)),
            ("v_pk_add_f16 v0, v4, 0.15915494 op_sel_hi:[1,0]", (0.1592, 0.1592)),
            ("v_pk_add_f16 v0, v4, s2", (0.5, -2)),
        ):
            got = halves(ca.lanes(ca.execute(text, v=word, s={2: 0xC0003800}), 0))
            for half, x, constant in zip(got, (low, high), constants):
                assert_same(half.view(np.float16), x + np.float16(constant))
        machine = ca.execute("v_pk_add_u16 v0, v4, -1", v=word)
        for half, x in zip(halves(ca.lanes(machine, 0)), (low, high)):
            np.testing.assert_array_equal(half, x.view(np.uint16) - np.uint16(1))
    with pytest.raises(InterpreterError, match="clamp of packed"):
        ca.execute("v_pk_add_u16 v0, v4, v4 clamp", v=word)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("opcode", PACKED_FLOAT32)
def test_packed_float32(opcode):
    count = 3 if "fma" in opcode else 2
    low, high = ca.inputs("f" * count, 512), ca.inputs("f" * count, 512, seed=1)
    registers = {4 + 2 * k + half: x[k] for k in range(count) for half, x in enumerate((low, high))}
    for low_from, high_from, negated in (([0, 0, 0], [1, 1, 1], None), ([1, 0, 1], [0, 0, 1], 1)):
        text = line_of(opcode, "U" * count, "U")
        text += f" op_sel:{bracket(low_from[:count])} op_sel_hi:{bracket(high_from[:count])}"
        text += f" neg_hi:{bracket([int(k == negated) for k in range(count)])}" if negated else ""
        machine = ca.execute(text, v=registers)
        for half, chosen in enumerate((low_from, high_from)):
            values = [(low[k], high[k])[chosen[k]] for k in range(count)]
            values = [-x if half and k == negated else x for k, x in enumerate(values)]
            assert_same(ca.lanes(machine, half, np.float32), PACKED_FLOAT32[opcode](*values))
    # A pair of scalar registers, a constant, and a result that overwrites its source.
    machine = ca.execute("v_pk_mul_f32 v[4:5], v[4:5], s[2:3]", v=registers, s={2: 0x40000000, 3: 0x3F000000})
    assert_same(ca.lanes(machine, 4, np.float32), low[0] * np.float32(2))
    assert_same(ca.lanes(machine, 5, np.float32), high[0] * np.float32(0.5))
    machine = ca.execute("v_pk_add_f32 v[4:5], v[4:5], 1.0 op_sel:[1,0] op_sel_hi:[0,0]", v=registers)
    assert_same(ca.lanes(machine, 4, np.float32), high[0] + np.float32(1))
    assert_same(ca.lanes(machine, 5, np.float32), low[0] + np.float32(1))


def test_packed_move():
    words = dict(zip((4, 5, 6, 7), ca.inputs("uuuu", 128)))
    for first in (0, 1):
        for second in (0, 1):
            machine = ca.execute(f"v_pk_mov_b32 v[0:1], v[4:5], v[6:7] op_sel:[{first},{second}]", v=words)
            np.testing.assert_array_equal(ca.lanes(machine, 0), words[4 + first])
            np.testing.assert_array_equal(ca.lanes(machine, 1), words[6 + second])


DOT = {
    "v_dot2_f32_f16 v0, v4, v6, v8": ("h", "gfx942"),
    "v_dot2c_f32_f16 v8, v4, v6": ("h", "gfx942"),
    "v_dot2_f32_bf16 v0, v4, v6, v8": ("b", "gfx950"),
    "v_dot2c_f32_bf16 v8, v4, v6": ("b", "gfx950"),
}


@pytest.mark.parametrize("text", DOT)
def test_dot_of_two(text):
    letter, arch = DOT[text]
    rng = np.random.default_rng(1)
    a, b, c, d = (rng.normal(size=512).astype(ca.DTYPES[letter]) for _ in range(4))
    e = rng.normal(size=512).astype(np.float32)
    a[:4], c[:4] = [np.inf, np.nan, 0, -0.0], [1, 1, np.inf, 2]
    machine = ca.execute(text, arch, v={4: pair(a, b), 6: pair(c, d), 8: e})
    got = ca.lanes(machine, 8 if "dot2c" in text else 0, np.float32)
    wide = [x.astype(np.float64) for x in (a, b, c, d)]
    with np.errstate(invalid="ignore"):
        exact = wide[0] * wide[2] + wide[1] * wide[3] + e
        size = np.abs(wide[0] * wide[2]) + np.abs(wide[1] * wide[3]) + np.abs(e)
        # The order of the additions is free, so each may lose half a unit of the largest sum.
        close = np.abs(got - exact) <= 3 * 2.0**-24 * size
    assert (close | (np.isnan(got) & np.isnan(exact)) | (got == exact)).all()
    assert np.isinf(got[0]) and np.isnan(got[1:3]).all()


# --- FP8 -------------------------------------------------------------------------------------------------------------
# Exponent bits, fraction bits, bias and whether the codes are "fnuz" (one NaN, no infinity) of each machine's types.
FP8 = {
    ("gfx942", "fp8"): (4, 3, 8, "fnuz"),
    ("gfx942", "bf8"): (5, 2, 16, "fnuz"),
    ("gfx950", "fp8"): (4, 3, 7, "fn"),
    ("gfx950", "bf8"): (5, 2, 15, "ieee"),
}


def fp8_values(arch, kind):
    """The 256 numbers of an FP8 type, from the definition of the format."""
    exponents, fractions, bias, flavour = FP8[arch, kind]
    out = []
    for code in range(256):
        sign, exponent = (-1.0) ** (code >> 7), code >> fractions & (1 << exponents) - 1
        fraction = code & (1 << fractions) - 1
        value = sign * math.ldexp(fraction + (exponent > 0) * (1 << fractions), max(exponent, 1) - bias - fractions)
        if flavour == "fnuz":
            value = math.nan if code == 0x80 else value
        elif flavour == "fn":
            value = math.nan if code & 0x7F == 0x7F else value
        elif exponent == 31:
            value = math.nan if fraction else sign * math.inf
        out.append(value)
    return np.array(out)


def to_fp8(values, arch, kind):
    """Codes of the nearest numbers, ties to the even code, larger ones saturated; NaN is NaN's first code."""
    table = fp8_values(arch, kind)
    finite = np.flatnonzero(np.isfinite(table) & (np.arange(256) < 128))
    distance = np.abs(table[finite] - np.minimum(np.abs(values.astype(float)), table[finite].max())[:, None])
    least = distance.min(axis=1, keepdims=True)
    best = np.where(distance == least, finite + 1000 * (finite % 2), 9999).min(axis=1) % 1000
    zero = FP8[arch, kind][3] == "fnuz"
    negative = np.signbit(values) & ~((best == 0) & zero)
    return best | negative.astype(int) << 7


BOTH = pytest.mark.parametrize("arch, kind", FP8)


@BOTH
def test_from_fp8(arch, kind):
    codes = np.arange(256, dtype=np.uint32)
    words = codes | (codes ^ 0x35) << 8 | (codes ^ 0x5A) << 16 | (codes ^ 0xC3) << 24
    table = fp8_values(arch, kind).astype(np.float32)
    spread = [table[words >> 8 * k & 0xFF] for k in range(4)]
    for text, byte in [
        (f"v_cvt_f32_{kind}_e32 v0, v4", 0),
        *((f"v_cvt_f32_{kind}_sdwa v0, v4 src0_sel:BYTE_{k}", k) for k in range(4)),
    ]:
        assert_same(ca.lanes(ca.execute(text, arch, v={4: words}), 0, np.float32), spread[byte])
    for text, byte in [
        (f"v_cvt_pk_f32_{kind}_e32 v[0:1], v4", 0),
        (f"v_cvt_pk_f32_{kind}_e64 v[0:1], v4", 0),
        *((f"v_cvt_pk_f32_{kind}_sdwa v[0:1], v4 src0_sel:WORD_{k}", 2 * k) for k in range(2)),
    ]:
        machine = ca.execute(text, arch, v={4: words})
        for k in range(2):
            assert_same(ca.lanes(machine, k, np.float32), spread[byte + k])


def fp8_inputs(arch, kind):
    """All numbers of the type, the middles between neighbours and their neighbours, and what saturates."""
    table = fp8_values(arch, kind)
    known = np.unique(table[np.isfinite(table)]).astype(np.float32)
    ties = (known[1:] + known[:-1]) / 2
    beyond = np.float32([-0.0, 1e-30, 1e30, -1e30, 1.001 * known[-1], 1.2 * known[-1]])
    values = np.concatenate(
        [known, ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(-9e9)), beyond]
    )
    return np.resize(values, -(-len(values) // 64) * 64)


@BOTH
def test_to_fp8(arch, kind):
    a = fp8_inputs(arch, kind)
    b = a[::-1].copy()
    both = to_fp8(a, arch, kind) | to_fp8(b, arch, kind) << 8
    for modifier, expected in (
        ("", both | ca.UNTOUCHED & 0xFFFF0000),
        (" op_sel:[0,0,1]", both << 16 | ca.UNTOUCHED & 0xFFFF),
    ):
        machine = ca.execute(f"v_cvt_pk_{kind}_f32 v0, v4, v6{modifier}", arch, v={4: a, 6: b})
        np.testing.assert_array_equal(ca.lanes(machine, 0), expected)
    machine = ca.execute(f"v_cvt_pk_{kind}_f32 v0, -v4, |v6|", arch, v={4: a, 6: b})
    expected = to_fp8(-a, arch, kind) | to_fp8(np.abs(b), arch, kind) << 8
    np.testing.assert_array_equal(ca.lanes(machine, 0) & 0xFFFF, expected)
    # NaN stays NaN, whatever its code.
    machine = ca.execute(f"v_cvt_pk_{kind}_f32 v0, v4, v4", arch, v={4: np.full(64, np.nan, np.float32)})
    assert np.isnan(fp8_values(arch, kind)[ca.lanes(machine, 0) & 0xFF]).all()


NARROW = {"f32": np.float32, "f16": np.float16, "bf16": BF16}
SCALES = np.float32([1, 0.25, 8, 2.0**-20, 2.0**20])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["fp8", "bf8"])
@pytest.mark.parametrize("wide", NARROW)
def test_scaled_from_fp8(wide, kind):
    codes = np.arange(256, dtype=np.uint32)
    words = codes | (codes ^ 0x35) << 8 | (codes ^ 0x5A) << 16 | (codes ^ 0xC3) << 24
    table, to = fp8_values("gfx950", kind), "v[0:1]" if wide == "f32" else "v0"
    for scale in SCALES:
        # Of the scale only the exponent counts.
        values = {4: words, 6: np.full(256, scale * np.float32(1.5))}
        for upper in (0, 1):
            text = f"v_cvt_scalef32_pk_{wide}_{kind} {to}, v4, v6" + (" op_sel:[1,0,0]" if upper else "")
            machine = ca.execute(text, "gfx950", v=values)
            for k in range(2):
                expected = table[words >> (16 * upper + 8 * k) & 0xFF] * float(scale)
                if wide == "f32":
                    assert_same(ca.lanes(machine, k, np.float32), expected)
                else:
                    half = halves(ca.lanes(machine, 0))[k].view(NARROW[wide])
                    assert_same(half, expected.astype(np.float32).astype(NARROW[wide]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["fp8", "bf8"])
@pytest.mark.parametrize("wide", NARROW)
def test_scaled_to_fp8(wide, kind):
    unit = fp8_inputs("gfx950", kind)
    for scale in SCALES[:3]:
        a = (np.clip(unit, -60000, 60000) * scale).astype(NARROW[wide])
        b = a[::-1].copy()
        values = {4: a, 6: b} if wide == "f32" else {4: pair(a, b)}
        text = "v4, v6, v8" if wide == "f32" else "v4, v8"
        codes = [to_fp8(x.astype(np.float32) / scale, "gfx950", kind) for x in (a, b)]
        for upper in (0, 1):
            sel = f" op_sel:{bracket([0] * (3 if wide == 'f32' else 2) + [1])}" if upper else ""
            machine = ca.execute(
                f"v_cvt_scalef32_pk_{kind}_{wide} v0, {text}{sel}",
                "gfx950",
                v={**values, 8: np.full(len(a), scale * np.float32(1.25))},
            )
            got = ca.lanes(machine, 0)
            np.testing.assert_array_equal(got >> 16 * upper & 0xFFFF, codes[0] | codes[1] << 8)
            assert (got >> 16 * (1 - upper) & 0xFFFF == ca.UNTOUCHED >> 16 * (1 - upper) & 0xFFFF).all()


# --- modifiers and operands ------------------------------------------------------------------------------------------
def unit_interval(a):
    return np.where(np.isnan(a), 0, np.minimum(np.maximum(a, 0), 1)).astype(a.dtype)


# Instruction -> (type, formula of the two sources).
MODIFIED = {
    "v_add_f32 v0, -v4, |v6|": ("f", lambda a, b: np.abs(b) - a),
    "v_sub_f32 v0, -|v4|, v6": ("f", lambda a, b: -np.abs(a) - b),
    "v_mul_f32 v0, abs(v4), neg(v6)": ("f", lambda a, b: np.abs(a) * -b),
    "v_add_f32 v0, v4, v6 clamp": ("f", lambda a, b: unit_interval(a + b)),
    "v_add_f32 v0, v4, v6 mul:2": ("f", lambda a, b: (a + b) * np.float32(2)),
    "v_add_f32 v0, v4, v6 mul:4": ("f", lambda a, b: (a + b) * np.float32(4)),
    "v_mul_f32 v0, v4, v6 div:2": ("f", lambda a, b: a * b * np.float32(0.5)),
    "v_mul_f32 v0, v4, -v6 clamp div:2": ("f", lambda a, b: unit_interval(a * -b / np.float32(2))),
    "v_max_f32 v0, v4, v4 clamp": ("f", lambda a, b: unit_interval(a)),
    "v_fma_f32 v0, v4, -v4, |v6|": ("f", lambda a, b: fused(a, -a, np.abs(b))),
    "v_add_f16 v0, -v4, |v6| clamp": ("h", lambda a, b: unit_interval(np.abs(b) - a)),
    "v_fma_f16 v0, v4, v6, -v4": ("h", lambda a, b: fused(a, b, -a)),
    "v_add_f64 v[0:1], -v[4:5], |v[6:7]|": ("d", lambda a, b: np.abs(b) - a),
    "v_mul_f64 v[0:1], v[4:5], v[6:7] clamp": ("d", lambda a, b: unit_interval(a * b)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("text", MODIFIED)
def test_float_modifiers(text):
    letter, formula = MODIFIED[text]
    a, b = ca.inputs(letter * 2, 1024)
    got = ca.lanes(ca.execute(text, v={4: a, 6: b}), 0, ca.DTYPES[letter])
    # Plus zero: which of its signs clamp leaves is not defined.
    assert_same(got + 0 if "clamp" in text else got, formula(a, b) + 0 if "clamp" in text else formula(a, b))


SATURATING = {
    "v_add_u32": ("u", lambda a, b: a + b),
    "v_sub_u32": ("u", lambda a, b: a - b),
    "v_add_i32": ("i", lambda a, b: a + b),
    "v_sub_i32": ("i", lambda a, b: a - b),
    "v_add_u16": ("w", lambda a, b: a + b),
    "v_sub_u16": ("w", lambda a, b: a - b),
}


@pytest.mark.parametrize("opcode", SATURATING)
def test_integer_clamp(opcode):
    letter, formula = SATURATING[opcode]
    a, b = ca.inputs(letter * 2, 1024)
    limits = np.iinfo(ca.DTYPES[letter])
    exact = formula(a.astype(object), b.astype(object))
    expected = [min(max(x, limits.min), limits.max) for x in exact]
    got = ca.lanes(ca.execute(f"{opcode} v0, v4, v6 clamp", v={4: a, 6: b}), 0, ca.DTYPES[letter])
    np.testing.assert_array_equal(got, np.array(expected, ca.DTYPES[letter]))


def test_integer_clamp_elsewhere_raises():
    with pytest.raises(InterpreterError, match="v_mad_u32_u24 v0, v4, v4, v4 clamp`: clamp of this integer"):
        ca.execute("v_mad_u32_u24 v0, v4, v4, v4 clamp", v={4: np.zeros(64, np.uint32)})


# Instruction -> (type of the result, formula of float32 v4, or of its bits when the type is an integer).
OPERANDS = {
    "v_mul_f32 v0, 0.5, v4": ("f", lambda a: a / 2),
    "v_add_f32 v0, v4, -4.0": ("f", lambda a: a - 4),
    "v_mul_f32 v0, 0.15915494, v4": ("f", lambda a: a * np.uint32(0x3E22F983).view(np.float32)),
    "v_mul_f32 v0, 0x40490fdb, v4": ("f", lambda a: a * np.float32(np.pi)),
    "v_add_f32 v0, s2, v4": ("f", lambda a: a + np.float32(1.5)),
    "v_add_f32 v0, vcc_lo, v4": ("f", lambda a: a + np.float32(-2)),
    "v_add_f32 v0, v4, 1": ("f", lambda a: a + np.float32(1e-45)),
    "v_add_u32 v0, -16, v4": ("u", lambda a: a - np.uint32(16)),
    "v_add_u32 v0, 64, v4": ("u", lambda a: a + np.uint32(64)),
    "v_xor_b32 v0, 1.0, v4": ("u", lambda a: a ^ np.uint32(0x3F800000)),
    "v_xor_b32 v0, 0xdeadbeef, v4": ("u", lambda a: a ^ np.uint32(0xDEADBEEF)),
    "v_add_u32 v0, v4, m0": ("u", lambda a: a + np.uint32(99)),
    "v_add_u32 v0, exec_lo, v4": ("u", lambda a: a - np.uint32(1)),
    "v_mov_b64 v[0:1], 1.0": ("U", lambda a: np.full(a.shape, 0x3FF0000000000000, np.uint64)),
    "v_mov_b64 v[0:1], -1": ("U", lambda a: np.full(a.shape, 2**64 - 1, np.uint64)),
    "v_mov_b64 v[0:1], s[2:3]": ("U", lambda a: np.full(a.shape, 0x12345678_3FC00000, np.uint64)),
    "v_lshlrev_b64 v[0:1], 3, s[2:3]": (
        "U",
        lambda a: np.full(a.shape, 0x12345678_3FC00000 << 3 & 2**64 - 1, np.uint64),
    ),
    "v_lshlrev_b64 v[0:1], v4, 1": ("U", lambda a: np.uint64(1) << (a.astype(np.uint64) & np.uint64(63))),
    "v_add_f64 v[0:1], 1.0, 0.5": ("d", lambda a: np.full(a.shape, 1.5)),
    "v_add_f64 v[0:1], 1, neg(1)": ("d", lambda a: np.full(a.shape, 0.0)),
    "v_max_f64 v[0:1], 1, -4.0": ("d", lambda a: np.full(a.shape, 5e-324)),
    "v_mul_f16 v0, 0.5, 4.0": ("h", lambda a: np.full(a.shape, np.float16(2))),
    "v_add_f16 v0, 0x3c00, 0": ("h", lambda a: np.full(a.shape, np.float16(1))),
    "v_add_u16 v0, -1, -2": ("w", lambda a: np.full(a.shape, 65533, np.uint16)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("text", OPERANDS)
def test_operands(text):
    letter, formula = OPERANDS[text]
    (a,) = ca.inputs("f", 256)
    scalars = {2: 0x3FC00000, 3: 0x12345678, ca.VCC: 0xC0000000, 124: 99}
    machine = ca.execute(text, v={4: a}, s=scalars)
    expected = formula(a if letter == "f" else a.view(np.uint32))
    assert_same(ca.lanes(machine, 0, ca.DTYPES[letter]), expected)


def test_halves_by_op_sel():
    a, b = ca.inputs("hh", 512), ca.inputs("hh", 512, seed=1)
    words = {4: pair(a[0], b[0]), 6: pair(a[1], b[1])}
    low, high = np.arange(2), np.arange(2)
    for x in low:
        for y in high:
            machine = ca.execute(f"v_pack_b32_f16 v0, v4, v6 op_sel:[{x},{y},0]", v=words)
            np.testing.assert_array_equal(ca.lanes(machine, 0), pair((a[0], b[0])[x], (a[1], b[1])[y]))
            with np.errstate(all="ignore"):
                expected = fused((a[0], b[0])[x], (a[1], b[1])[y], a[0])
            for upper in (0, 1):
                text = f"v_fma_f16 v0, v4, v6, v4 op_sel:[{x},{y},0,{upper}]"
                got = ca.lanes(ca.execute(text, v=words), 0)
                assert_same(halves(got)[upper].view(np.float16), expected)
                assert not upper or (got & 0xFFFF == ca.UNTOUCHED & 0xFFFF).all()


def sub_dword(words, name, sign=False):
    """Part of a word as SDWA selects it, as Python integers."""
    shift, bits = (
        {"B": (8 * int(name[-1]), 8), "W": (16 * int(name[-1]), 16)}.get(name[0], (0, 32))
        if name != "DWORD"
        else (0, 32)
    )
    part = words.astype(object) >> shift & (1 << bits) - 1
    return np.array([signed(x, bits) for x in part], object) if sign else part


SELECTORS = ["BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD"]


@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"])
@pytest.mark.parametrize("destination", SELECTORS)
def test_sub_dwords(destination, unused):
    a, b = ca.inputs("uu", 256)
    for x, y in zip(SELECTORS, ["WORD_1", "DWORD", "BYTE_0", "WORD_0", "BYTE_3", "BYTE_1", "BYTE_2"]):
        for sign in (False, True):
            text = f"v_add_u32_sdwa v0, {'sext(v4)' if sign else 'v4'}, v6 dst_sel:{destination} dst_unused:{unused}"
            got = ca.lanes(ca.execute(f"{text} src0_sel:{x} src1_sel:{y}", v={4: a, 6: b}), 0)
            total = sub_dword(a, x, sign) + sub_dword(b, y)
            if destination == "DWORD":
                expected = total
            else:
                shift, bits = (
                    8 * int(destination[-1]) * (1 if destination[0] == "B" else 2),
                    8 if destination[0] == "B" else 16,
                )
                field = ((1 << bits) - 1) << shift
                if unused == "UNUSED_SEXT":
                    expected = np.array([signed(t, bits) << shift for t in total], object)
                else:
                    expected = (total << shift & field) | (ca.UNTOUCHED & ~field if "PRESERVE" in unused else 0)
            np.testing.assert_array_equal(got, wrapped(expected, "u"))


SDWA = "dst_sel:{} dst_unused:{} src0_sel:{} src1_sel:{}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sub_dwords_of_floats_and_masks():
    a, b = ca.inputs("hh", 512), ca.inputs("hh", 512, seed=1)
    words = {4: pair(a[0], b[0]), 6: pair(a[1], b[1])}
    machine = ca.execute("v_cvt_f32_f16_sdwa v0, v4 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1", v=words)
    assert_same(ca.lanes(machine, 0, np.float32), b[0].astype(np.float32))
    options = SDWA.format("WORD_1", "UNUSED_PRESERVE", "WORD_1", "WORD_0")
    low, high = halves(ca.lanes(ca.execute(f"v_mul_f16_sdwa v0, -v4, |v6| {options}", v=words), 0))
    assert_same(high.view(np.float16), -b[0] * np.abs(a[1]))
    assert (low == ca.UNTOUCHED & 0xFFFF).all()
    machine = ca.execute("v_cmp_lt_f16_sdwa vcc, v4, v6 src0_sel:WORD_1 src1_sel:WORD_0", v=words)
    np.testing.assert_array_equal(ca.mask(machine), b[0] < a[1])
    machine = ca.execute("v_cmp_eq_u32_sdwa s[20:21], v4, v6 src0_sel:BYTE_1 src1_sel:BYTE_3", v=words)
    np.testing.assert_array_equal(ca.mask(machine, 20), words[4] >> 8 & 255 == words[6] >> 24)
    chosen = some_lanes(512)
    options = SDWA.format("DWORD", "UNUSED_PAD", "WORD_0", "BYTE_1")
    machine = ca.execute(f"v_cndmask_b32_sdwa v0, v4, v6, vcc {options}", v=words, masks={ca.VCC: chosen})
    expected = np.where(chosen, words[6] >> 8 & 255, words[4] & 0xFFFF)
    np.testing.assert_array_equal(ca.lanes(machine, 0), expected)


# Control -> source of lane n, or None where there is none.
DPP = {
    "quad_perm:[3,0,2,1]": lambda n: n - n % 4 + (3, 0, 2, 1)[n % 4],
    "row_shl:3": lambda n: n + 3 if n % 16 < 13 else None,
    "row_shr:5": lambda n: n - 5 if n % 16 >= 5 else None,
    "row_ror:7": lambda n: n - n % 16 + (n + 9) % 16,
    "row_newbcast:6": lambda n: n - n % 16 + 6,
    "row_mirror": lambda n: n ^ 15,
    "row_half_mirror": lambda n: n ^ 7,
    "row_bcast:15": lambda n: n // 16 * 16 - 1 if n >= 16 else None,
    "row_bcast:31": lambda n: 31 if n >= 32 else None,
    "wave_shl:1": lambda n: n + 1 if n < 63 else None,
    "wave_shr:1": lambda n: n - 1 if n else None,
    "wave_rol:1": lambda n: (n + 1) % 64,
    "wave_ror:1": lambda n: (n - 1) % 64,
}


@pytest.mark.parametrize("masks", [(0xF, 0xF), (0xA, 0x6)])
@pytest.mark.parametrize("bound", ["", " bound_ctrl:1"])
@pytest.mark.parametrize("control", DPP)
def test_data_parallel_primitives(control, bound, masks):
    a, b = ca.inputs("uu", 512)
    for active in (np.ones(512, bool), some_lanes(512)):
        text = f"v_add_u32_dpp v0, v4, v6 {control} row_mask:{masks[0]:#x} bank_mask:{masks[1]:#x}{bound}"
        got = ca.lanes(ca.execute(text, v={4: a, 6: b}, active=active), 0)
        for k in range(512):
            lane, source = k % 64, DPP[control](k % 64)
            enabled = masks[0] >> lane // 16 & 1 and masks[1] >> lane % 16 // 4 & 1
            there = source is not None and active[k - lane + source]
            # A lane without source reads 0 with bound_ctrl, and is switched off without it.
            value = int(a[k - lane + source]) if there else 0
            writes = active[k] and enabled and (there or bound)
            assert got[k] == ((value + int(b[k])) % 2**32 if writes else ca.UNTOUCHED)


# --- which lanes and waves are written, and what raises --------------------------------------------------------------
def table_lines():
    """The lines of the tables above, with their machines."""
    for table in (INTEGERS, FLOATS):
        for opcode, (types, result, _) in table.items():
            yield line_of(opcode, types, result), arch_of(opcode)
    for opcode, (types, _) in PACKED.items():
        yield line_of(opcode, "u" * len(types), "u"), "gfx942"
    for opcode in PACKED_FLOAT32:
        yield line_of(opcode, "UUU" if "fma" in opcode else "UU", "U"), "gfx942"
    for opcode in APPROXIMATE:
        yield f"{opcode} v0, v4", "gfx942"
    for text in (*ACCUMULATING, *LITERAL, *MODIFIED):
        yield text, "gfx942"
    for text, (_, arch) in DOT.items():
        yield text, arch
    for arch, kind in FP8:
        yield f"v_cvt_f32_{kind}_sdwa v0, v4 src0_sel:BYTE_2", arch
        yield f"v_cvt_pk_f32_{kind}_e32 v[0:1], v4", arch
        yield f"v_cvt_pk_{kind}_f32 v0, v4, v6 op_sel:[0,0,1]", arch
    for kind in ("fp8", "bf8"):
        for wide in NARROW:
            to, of = ("v[0:1]", "v4, v6") if wide == "f32" else ("v0", "v4")
            yield f"v_cvt_scalef32_pk_{wide}_{kind} {to}, v4, v6 op_sel:[1,0,0]", "gfx950"
            yield f"v_cvt_scalef32_pk_{kind}_{wide} v0, {of}, v8", "gfx950"
    yield "v_swap_b32 v4, v6", "gfx942"
    yield "v_pk_mov_b32 v[0:1], v[4:5], v[6:7] op_sel:[1,0]", "gfx942"
    yield "v_lshl_add_u64 v[0:1], v[4:5], 3, v[6:7]", "gfx942"
    yield "v_cndmask_b32_e32 v0, v4, v6, vcc", "gfx942"
    yield "v_accvgpr_write_b32 a0, v4", "gfx942"
    yield "v_accvgpr_read_b32 v0, a4", "gfx942"
    yield "v_accvgpr_mov_b32 a0, a4", "gfx942"
    for width in (16, 32):
        yield f"v_bitop3_b{width} v0, v4, v6, v8 bitop3:0x9b", "gfx950"
    for opcode in CARRIES:
        yield f"{opcode} v0, vcc, v4, v6" + (", vcc" if "addc" in opcode or "subb" in opcode else ""), "gfx942"
    for kind in ("u64_u32", "i64_i32"):
        yield f"v_mad_{kind} v[0:1], vcc, v4, v6, v[8:9]", "gfx942"
    for line in DIVISION.strip().splitlines():
        yield line, "gfx942"
    yield f"v_mul_f16_sdwa v0, v4, v6 {SDWA.format('WORD_1', 'UNUSED_PRESERVE', 'WORD_1', 'WORD_0')}", "gfx942"
    for control in DPP:
        yield f"v_add_u32_dpp v0, v4, v6 {control} row_mask:0xf bank_mask:0xf bound_ctrl:1", "gfx942"


def comparison_lines():
    for opcode, letter, _ in COMPARISONS:
        yield f"{opcode}_e64 s[20:21], {register(4, letter)}, {register(6, letter)}", "gfx942"
    for x in ("", "x"):
        yield f"v_cmp{x}_class_f32_e64 s[20:21], v4, v6", "gfx942"


# In the interpreter's table, and in no row here.
UNCOVERED: set[str] = set()


def test_every_opcode_has_a_row():
    covered = {ca.kernel(text, arch).instructions[0].opcode for text, arch in (*table_lines(), *comparison_lines())}
    assert set(vector_table.TABLE) - covered == UNCOVERED
    # Of the patterns, every alternative that their names spell out.
    for pattern in vector_alu.SPECIAL:
        assert any(re.fullmatch(pattern, opcode) for opcode in covered), pattern


@pytest.mark.parametrize("waves", [None, [1, 2, 4]])
def test_inactive_lanes_and_other_waves_are_not_written(waves):
    values = {4 + k: x for k, x in enumerate(ca.inputs("uuuuuu", 384))}
    active = some_lanes(384, 9)
    running = np.repeat(np.isin(np.arange(6), [1, 2, 4]) if waves else np.ones(6, bool), ca.LANES)
    for text, arch in table_lines():
        if "_dpp" in text:
            continue  # reads other lanes, so it has its own test
        everything, some = (
            ca.execute(text, arch, v=values, a=values, active=a, waves=w) for a, w in ((None, None), (active, waves))
        )
        before = ca.execute("v_nop", arch, v=values, a=values)
        for file in ("V", "A"):
            full, part, old = (getattr(m, file).reshape(64, -1) for m in (everything, some, before))
            assert (part == np.where(active & running, full, old)).all(), text
            assert file == "A" or " a0" in text or (full != old).any(), text


def test_unknown_instructions_raise():
    parsed = ca.kernel("v_add_f32 v0, v1, v2\nv_frobnicate_b32 v0, v4", "gfx942")
    with pytest.raises(InterpreterError, match=r"line 4: `v_frobnicate_b32 v0, v4`: unknown instruction"):
        control_flow.bind_blocks(parsed)
    for text, why in (
        ("v_add_f32 v0, v1", "2 operands, 3 expected"),
        ("v_add_f32 v0, v1, nonsense", "can not be read"),
        ("v_mov_b32_dpp v0, v1 row_turn:3", "unknown DPP control"),
        ("v_cvt_sr_fp8_f32 v0, v1, v2", "unknown instruction"),
    ):
        with pytest.raises(InterpreterError, match=f"line 3: `{re.escape(text)}`: .*{why}"):
            control_flow.bind_blocks(ca.kernel(text, "gfx942"))


KERNEL = """
s_load_dwordx4 s[4:7], s[0:1], 0x0
v_lshl_add_u32 v0, s2, 7, v0
v_lshlrev_b32_e32 v0, 2, v0
s_waitcnt lgkmcnt(0)
global_load_dword v1, v0, s[4:5]
s_waitcnt vmcnt(0)
v_cmp_gt_f32_e32 vcc, 0, v1
v_cndmask_b32_e64 v2, 1.0, 2.0, vcc
v_fma_f32 v1, v1, v2, -1.0
global_store_dword v0, v1, s[6:7]
"""


def test_kernel_on_a_grid():
    (a,) = ca.inputs("f", 384)
    # 100 threads of 2 waves: the last 28 lanes of every second wave are off.
    memory = Memory(
        [("a", a, False), ("out", np.full(384, 7, np.float32), True), ("arguments", np.zeros(2, "u8"), True)]
    )
    start = memory.starts[2]
    memory.bytes[start : start + 16] = np.array([memory.address(0), memory.address(1)], np.uint64).view(np.uint8)
    control_flow.run(ca.kernel(KERNEL, "gfx942"), memory, Dispatch(memory.address(2), (3, 1, 1), 100))
    with np.errstate(all="ignore"):
        expected = fused(a, np.where(a < 0, 2, 1).astype(np.float32), np.full_like(a, -1))
    assert_same(memory.contents(1, (384,), np.float32), np.where(np.arange(384) % 128 < 100, expected, 7))


# Known to the interpreter, and to neither machine.
OLDER = "v_fmac_f16"


def test_the_lines_are_real_assembly():
    try:
        assembler = toolchain.find_llvm("llvm-mc")
    except toolchain.ToolMissing as reason:
        pytest.skip(str(reason))
    lines = [*table_lines(), *comparison_lines(), *((text, "gfx942") for text in OPERANDS)]
    lines = [(text, arch) for text, arch in lines if not text.startswith(OLDER)]
    for machine in ("gfx942", "gfx950"):
        source = "\n".join(text for text, arch in lines if arch == machine)
        command = [assembler, "-triple=amdgcn-amd-amdhsa", f"-mcpu={machine}", "-filetype=null"]
        done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
