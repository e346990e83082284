"""Division as compilers make it of CDNA instructions, quotients around its limits, and comparison by bits."""

import cdna_assembly as ca
import numpy as np


def assert_same(got, expected):
    """The same bits, zeros' signs included; any NaN is as good as another."""
    expected = np.asarray(expected).astype(got.dtype, copy=False)
    if got.dtype.kind in "fV":
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(got), nan)
        got, expected = got[~nan], np.broadcast_to(expected, got.shape)[~nan]
    kind = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(got.view(kind), np.ascontiguousarray(expected).view(kind))


# What the compilers make of a / b (tests/test_cdna_kernels.py compares): numerator in v4, denominator in v6.
DIVISION = """
v_div_scale_f32 v10, s[2:3], v6, v6, v4
v_rcp_f32_e32 v12, v10
v_div_scale_f32 v11, vcc, v4, v6, v4
v_fma_f32 v13, -v10, v12, 1.0
v_fmac_f32_e32 v12, v13, v12
v_mul_f32_e32 v13, v11, v12
v_fma_f32 v14, -v10, v13, v11
v_fmac_f32_e32 v13, v14, v12
v_fma_f32 v10, -v10, v13, v11
v_div_fmas_f32 v11, v10, v12, v13
v_div_fixup_f32 v0, v11, v6, v4
"""


def quotients(seed=3, count=1 << 14):
    """Numerators and denominators: special pairs, random bits, and exponents around every limit of v_div_scale."""
    rng = np.random.default_rng(seed)
    special = ca.special_floats(np.float32)
    out = [(np.repeat(special, len(special)), np.tile(special, len(special)))]
    out.append(tuple(rng.integers(0, 2**32, count, np.uint32).view(np.float32) for _ in range(2)))

    def floats(low, high):
        """Of either sign, with exponents low to high; below -126 they are subnormal."""
        exponents = np.clip(rng.integers(low, high, count, endpoint=True), -149, 127)
        return np.ldexp(rng.choice([-1, 1], count) * (1 + rng.integers(0, 2**23, count) / 2**23), exponents)

    everything = (-149, 127)
    for limits in ((-40, 40), (-149, -126), (-126, -120), (-106, -101), (125, 127)):
        out += [(floats(*limits), floats(*everything)), (floats(*everything), floats(*limits))]
        out.append((floats(*limits), floats(*limits)))
    for apart in (-151, -149, -127, -125, 95, 97, 127):  # exponent of the quotient
        bottom = floats(*everything)
        out.append((np.ldexp(floats(0, 1), np.clip(np.frexp(bottom)[1] + apart, -149, 126)), bottom))
    # Few bits: quotients that end in a tie, subnormal ones among them.
    few = np.ldexp(rng.integers(1, 2**12, count), rng.integers(-149, -100, count))
    out.append((few, np.ldexp(rng.integers(1, 64, count), rng.integers(-10, 60, count))))
    pairs = [[x.astype(np.float32) for x in pair] for pair in out]
    a, b = (np.concatenate([p[k] for p in pairs]) for k in (0, 1))
    whole = len(a) // ca.LANES * ca.LANES
    return a[:whole], b[:whole]
