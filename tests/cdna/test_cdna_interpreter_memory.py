"""Memory accesses of the CDNA interpreter: every load and store in every address space, byte by byte against numpy."""

import re

import cdna_program as cp
import numpy as np
import pytest

from pallas_kernels.cdna.interpreter import lds, memory_access
from pallas_kernels.cdna.interpreter.machine import POISON

# Bytes in memory, whether they are a signed number, and the half of the register that takes them ("" for all of it).
LOADS = {
    "ubyte": (1, False, ""),
    "sbyte": (1, True, ""),
    "ushort": (2, False, ""),
    "sshort": (2, True, ""),
    "dword": (4, False, ""),
    "dwordx2": (8, False, ""),
    "dwordx3": (12, False, ""),
    "dwordx4": (16, False, ""),
    "ubyte_d16": (1, False, "low"),
    "ubyte_d16_hi": (1, False, "high"),
    "sbyte_d16": (1, True, "low"),
    "sbyte_d16_hi": (1, True, "high"),
    "short_d16": (2, False, "low"),
    "short_d16_hi": (2, False, "high"),
}
# Bytes in memory and the first bit of the register that goes there.
STORES = {
    "byte": (1, 0),
    "short": (2, 0),
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "byte_d16_hi": (1, 16),
    "short_d16_hi": (2, 16),
}
# What LDS calls them.
LDS_LOADS = {
    "u8": "ubyte",
    "i8": "sbyte",
    "u16": "ushort",
    "i16": "sshort",
    "b32": "dword",
    "b64": "dwordx2",
    "b96": "dwordx3",
    "b128": "dwordx4",
    "u8_d16": "ubyte_d16",
    "u8_d16_hi": "ubyte_d16_hi",
    "i8_d16": "sbyte_d16",
    "i8_d16_hi": "sbyte_d16_hi",
    "u16_d16": "short_d16",
    "u16_d16_hi": "short_d16_hi",
}
LDS_STORES = {
    "b8": "byte",
    "b16": "short",
    "b32": "dword",
    "b64": "dwordx2",
    "b96": "dwordx3",
    "b128": "dwordx4",
    "b8_d16_hi": "byte_d16_hi",
    "b16_d16_hi": "short_d16_hi",
}
GROUPS, THREADS = 2, 256
WAVES = GROUPS * THREADS // 64
SIZE = 16384
# The offset in every instruction; addresses are this much lower.
OFFSET = 24


def loaded(raw, at, kind, old):
    """What registers [n, 4] hold after a load from bytes `raw` at places [n]."""
    size, signed, half = LOADS[kind]
    out = old.copy()
    for k, place in enumerate(at):
        number = int.from_bytes(bytes(raw[place : place + size]), "little", signed=signed)
        if half:
            kept = int(old[k, 0]) & (0xFFFF0000 if half == "low" else 0xFFFF)
            out[k, 0] = kept | (number & 0xFFFF) << (16 if half == "high" else 0)
        else:
            for r in range(max(1, size // 4)):
                out[k, r] = number >> 32 * r & 0xFFFFFFFF
    return out


def stored(raw, at, kind, data, active):
    """Bytes `raw` after a store of registers [n, 4] by the active lanes."""
    size, shift = STORES[kind]
    out = raw.copy()
    for k in np.flatnonzero(active):
        number = sum(int(word) << 32 * r for r, word in enumerate(data[k])) >> shift
        out[at[k] : at[k] + size] = np.frombuffer((number & (1 << 8 * size) - 1).to_bytes(size, "little"), np.uint8)
    return out


def random_bytes(size, seed=1):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def places_to_load(size, limit, align, seed=2):
    """A byte to load from for every thread [n], the first and the last one among them."""
    at = np.random.default_rng(seed).integers(OFFSET, limit - size + 1, GROUPS * THREADS)
    at[:2], at[-2:] = (OFFSET + align - 1) // align * align, limit - size
    return at // align * align


def places_to_store(size, limit, align, lanes, seed=3):
    """Different places for every one of `lanes`, somewhere within 16 bytes that no other lane writes to."""
    rng = np.random.default_rng(seed)
    slots = np.stack([2 + rng.permutation(limit // 16 - 2)[:lanes] for _ in range(GROUPS * THREADS // lanes)])
    return (16 * slots + rng.integers(0, (16 - size) // align + 1, slots.shape) * align).reshape(-1)


# The address of byte v1 of the buffer in {base} as a 64-bit number in v[6:7].
WIDE = "v_mov_b32_e32 v7, {high}\nv_add_co_u32_e32 v6, vcc, {low}, v1\nv_addc_co_u32_e32 v7, vcc, 0, v7, vcc"
# A descriptor of SIZE bytes in s[32:35], and an offset in s36.
DESCRIPTOR = f"s_mov_b32 s32, {{low}}\ns_mov_b32 s33, {{high}}\ns_mov_b32 s34, {SIZE:#x}\ns_mov_b32 s35, 0x27000"
# Name -> (lines before, address operands of a load, what the lanes' own address lacks, alignment of words).
MODES = {
    "global, vector address": ("global", WIDE, "v[6:7], off offset:{o}", OFFSET, 1),
    "global, scalar base": ("global", "", "v1, {base} offset:{o}", OFFSET, 1),
    "global, negative offset": ("global", "", "v1, {base} offset:-{o}", -OFFSET, 1),
    "flat": ("flat", WIDE, "v[6:7] offset:{o}", OFFSET, 1),
    "buffer, offen": ("buffer", DESCRIPTOR, "v1, s[32:35], 0 offen offset:{o}", OFFSET, 4),
}


def operands(mode, number):
    """(prefix, lines before, address operands, bytes added to v1) for the buffer of a number."""
    prefix, lines, text, added, _ = MODES[mode]
    first = cp.BUFFERS + 2 * number
    names = {"low": f"s{first}", "high": f"s{first + 1}", "base": cp.buffer(number), "o": OFFSET}
    return prefix, lines.format(**names), text.format(**names), added


def registers(kind, first=2):
    count = max(1, (LOADS if kind in LOADS else STORES)[kind][0] // 4)
    return f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"


def with_addresses(at, seed=4):
    """Columns: an address and four random words for every thread."""
    columns = cp.words((GROUPS, THREADS, 5), seed)
    columns[..., 0] = at.reshape(GROUPS, THREADS).astype(np.int64) & 0xFFFFFFFF
    return columns


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("mode", MODES)
def test_loads(mode, kind):
    """Inactive lanes keep their registers, and so does the other half of a 16-bit load."""
    size = LOADS[kind][0]
    raw = random_bytes(SIZE)
    at = places_to_load(size, SIZE - OFFSET, min(size, MODES[mode][4]))
    prefix, lines, address, added = operands(mode, 2)
    columns = with_addresses(at - added)
    line = f"{prefix}_load_{kind} {registers(kind)}, {address}"
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], before=lines, masks=cp.MASKS, reads=[raw])
    old = columns[..., 1:].reshape(-1, 4)
    expected = np.where(cp.active(cp.MASKS).reshape(-1, 1), loaded(raw, at, kind, old), old)
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("mode", MODES)
def test_stores(mode, kind):
    """Every byte that no active lane stores to stays."""
    size = STORES[kind][0]
    raw = random_bytes(SIZE)
    at = places_to_store(size, SIZE, min(size, MODES[mode][4]), GROUPS * THREADS)
    prefix, lines, address, added = operands(mode, 3)
    columns = with_addresses(at - added)
    # Of all stores only those to buffers name the data first.
    first, rest = re.fullmatch(r"(v\S*?)((?:,| offset).*)", address).groups()
    line = f"{registers(kind)}, {address}" if prefix == "buffer" else f"{first}, {registers(kind)}{rest}"
    line = f"{prefix}_store_{kind} {line}"
    _, found = cp.run_lanes(line, columns, [2], before=lines, masks=cp.MASKS, writes=[raw])
    data, active = columns[..., 1:].reshape(-1, 4), cp.active(cp.MASKS).reshape(-1)
    np.testing.assert_array_equal(found, stored(raw, at, kind, data, active))


# --- LDS -------------------------------------------------------------------------------------------------------------
# Every workgroup of 256 threads has 4096 bytes, which one write of 16 bytes a thread fills from buffer 2.
LDS = 16 * THREADS
FILL_LDS = f"""v_lshlrev_b32_e32 v10, 4, v80
global_load_dwordx4 v[12:15], v10, {cp.buffer(2)}
v_lshlrev_b32_e32 v10, 4, v0
s_waitcnt vmcnt(0)
ds_write_b128 v10, v[12:15]
s_waitcnt lgkmcnt(0)
s_barrier"""
# The LDS of every workgroup to buffer 4, behind the results in buffer 3.
DUMP_LDS = f"""s_waitcnt lgkmcnt(0)
s_barrier
v_lshlrev_b32_e32 v10, 4, v0
ds_read_b128 v[12:15], v10
v_lshlrev_b32_e32 v10, 4, v80
s_waitcnt lgkmcnt(0)
global_store_dwordx4 v10, v[12:15], {cp.buffer(4)}"""


def group_of(places):
    """Bytes of the LDS of all workgroups, one after the other, for places within one."""
    return places + np.repeat(np.arange(GROUPS) * LDS, THREADS)


@pytest.mark.parametrize("kind", LDS_LOADS)
def test_lds_reads(kind):
    """Each workgroup reads its own bytes, at any alignment."""
    name = LDS_LOADS[kind]
    raw = random_bytes(GROUPS * LDS)
    at = places_to_load(LOADS[name][0], LDS, 1)
    columns = with_addresses(at - OFFSET)
    line = f"ds_read_{kind} {registers(name)}, v1 offset:{OFFSET}"
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], before=FILL_LDS, masks=cp.MASKS, reads=[raw], lds=LDS)
    old = columns[..., 1:].reshape(-1, 4)
    expected = np.where(cp.active(cp.MASKS).reshape(-1, 1), loaded(raw, group_of(at), name, old), old)
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


def lds_after(lines, columns, **how):
    """(bytes of the LDS before, after) lines that run in the middle."""
    raw = random_bytes(GROUPS * LDS)
    out = np.zeros_like(raw)
    how = {"masks": cp.MASKS, "lds": LDS, **how}
    _, after = cp.run_lanes(lines, columns, [2], before=FILL_LDS, after=DUMP_LDS, reads=[raw], writes=[out], **how)
    return raw, after


@pytest.mark.parametrize("kind", LDS_STORES)
def test_lds_writes(kind):
    """At any alignment; the two lowest slots of every workgroup belong to nobody."""
    name = LDS_STORES[kind]
    at = places_to_store(STORES[name][0], LDS + 32, 1, THREADS) - 32
    columns = with_addresses(at)
    before, after = lds_after(f"ds_write_{kind} v1, {registers(name)}", columns)
    data, active = columns[..., 1:].reshape(-1, 4), cp.active(cp.MASKS).reshape(-1)
    np.testing.assert_array_equal(after, stored(before, group_of(at), name, data, active))


@pytest.mark.parametrize(
    "line, added", [("ds_write_b32 v1, v2 offset:40", 40), ("ds_write_b8 v1, v2 offset:0x3ff", 1023)]
)
def test_lds_writes_with_an_offset(line, added):
    at = np.tile(np.arange(THREADS) * 12, GROUPS)
    columns = with_addresses(at)
    before, after = lds_after(line, columns)
    data, active = columns[..., 1:].reshape(-1, 4), cp.active(cp.MASKS).reshape(-1)
    kind = "byte" if "b8" in line else "dword"
    np.testing.assert_array_equal(after, stored(before, group_of(at + added), kind, data, active))


# Two offsets in elements; strides of the instruction in elements.
DOUBLE = [(name, bits, offsets) for name in ("2", "2st64") for bits in (32, 64) for offsets in ((0, 1), (3, 2), (1, 0))]


@pytest.mark.parametrize("name, bits, offsets", DOUBLE)
def test_lds_reads_of_two_places(name, bits, offsets):
    size = bits // 8
    steps = np.array(offsets) * size * (64 if name == "2st64" else 1)
    raw = random_bytes(GROUPS * LDS)
    at = np.random.default_rng(5).integers(0, LDS - steps.max() - size + 1, GROUPS * THREADS)
    columns = with_addresses(at)
    line = f"ds_read{name}_b{bits} v[2:{1 + 2 * size // 4}], v1 offset0:{offsets[0]} offset1:{offsets[1]}"
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], before=FILL_LDS, masks=cp.MASKS, reads=[raw], lds=LDS)
    expected = columns[..., 1:].reshape(-1, 4).copy()
    for k in np.flatnonzero(cp.active(cp.MASKS)):
        both = b"".join(bytes(raw[p : p + size]) for p in group_of(at)[k] + steps)
        expected[k, : size // 2] = np.frombuffer(both, "<u4")
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


@pytest.mark.parametrize("name, bits, offsets", DOUBLE)
def test_lds_writes_of_two_places(name, bits, offsets):
    """Only waves write whose places meet those of no other wave."""
    size, wave = bits // 8, np.arange(WAVES) % 4
    if name == "2":
        # Lanes two elements apart.
        at, unit, working = np.tile(np.arange(THREADS), GROUPS) * 2 * size, size, wave == 0
    else:
        # A wave's 64 elements, of which the second write fills the next 64.
        at, unit, working = np.tile(np.arange(64), WAVES) * size, 64 * size, wave == 1
    masks = np.where(working, np.uint64(0x0FF0_1234_FFFF_8001), np.uint64(0))
    columns = with_addresses(at)
    data = ("v2", "v4") if size == 4 else ("v[2:3]", "v[4:5]")
    line = f"ds_write{name}_b{bits} v1, {data[0]}, {data[1]} offset0:{offsets[0]} offset1:{offsets[1]}"
    before, after = lds_after(line, columns, masks=masks)
    expected, active = before, cp.active(masks).reshape(-1)
    assert active.sum() > 20
    values = columns[..., 1:].reshape(-1, 4)
    for offset, part in zip(offsets, (values[:, :2], values[:, 2:])):
        place = group_of(at) + offset * unit
        expected = stored(expected, place, "dword" if size == 4 else "dwordx2", part, active)
    np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("bits", [8, 16])
def test_transposing_lds_reads(bits):
    """Sixteen lanes together read rows of sixteen elements; lane c receives column c."""
    raw = random_bytes(GROUPS * LDS)
    at = np.random.default_rng(6).integers(0, LDS // 8 - 8, GROUPS * THREADS) * 8
    found = cp.run_lanes(
        f"ds_read_b64_tr_b{bits} v[2:3], v1 offset:{OFFSET}",
        with_addresses(at),
        [2, 3],
        before=FILL_LDS,
        reads=[raw],
        lds=LDS,
        arch=cp.GFX950,
    )
    rows, lanes_a_row, size = 64 // bits, 2 * bits // 8, bits // 8
    expected = np.zeros((GROUPS * THREADS, 8), np.uint8)
    for thread in range(GROUPS * THREADS):
        column = thread % 16
        for row in range(rows):
            # The lane that holds this element of the row, and the element's place in its eight bytes.
            lane = thread - column + row * lanes_a_row + column // (16 // lanes_a_row)
            start = group_of(at)[lane] + OFFSET + column % (16 // lanes_a_row) * size
            expected[thread, row * size : (row + 1) * size] = raw[start : start + size]
    np.testing.assert_array_equal(found.reshape(-1, 2), expected.view("<u4"))


@pytest.mark.parametrize("arch, kind, stride", [(cp.GFX942, "", 4), (cp.GFX950, "x3", 16), (cp.GFX950, "x4", 16)])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar base", "vector address"])
def test_loads_to_lds(arch, kind, stride, vector):
    """Lane after lane from M0 on; three words a lane leave a gap (CDNA4 ISA, 9.1.9)."""
    size = 4 * int(kind[1:] or 1)
    source = random_bytes(SIZE, seed=7)
    at = places_to_load(size, SIZE - OFFSET, 4)
    columns = with_addresses(at - OFFSET)
    address = f"v[6:7], off offset:{OFFSET}" if vector else f"v1, {cp.buffer(3)} offset:{OFFSET}"
    wide = WIDE.format(low=f"s{cp.BUFFERS + 6}", high=f"s{cp.BUFFERS + 7}")
    # Each wave fills its own quarter.
    start = f"v_readfirstlane_b32 s7, v0\ns_mul_i32 s7, s7, {LDS // THREADS}\ns_mov_b32 m0, s7\n{wide}"
    raw = random_bytes(GROUPS * LDS)
    masks = cp.MASKS & np.uint64(2**62 - 1)  # the rest would fall into the next quarter
    dump = DUMP_LDS.replace(cp.buffer(4), cp.buffer(5))
    _, after = cp.run_lanes(
        f"global_load_lds_dword{kind} {address}",
        columns,
        [2],
        before=f"{FILL_LDS}\n{start}",
        after=f"s_waitcnt vmcnt(0)\n{dump}",
        masks=masks,
        reads=[raw, source],
        writes=[np.zeros_like(raw)],
        lds=LDS,
        arch=arch,
    )
    expected = raw.copy()
    for k in np.flatnonzero(cp.active(masks)):
        group, thread = divmod(int(k), THREADS)
        to = group * LDS + thread // 64 * (LDS // 4) + OFFSET + thread % 64 * stride
        expected[to : to + size] = source[at[k] : at[k] + size]
    np.testing.assert_array_equal(after, expected)


# --- scratch ---------------------------------------------------------------------------------------------------------
PRIVATE = 96
# Every lane's 96 bytes from buffer 2, and back to buffer 4.
FILL_SCRATCH = "\n".join(
    [f"v_mov_b32_e32 v10, {PRIVATE}\nv_mul_lo_u32 v10, v80, v10"]
    + [
        f"global_load_dwordx4 v[12:15], v10, {cp.buffer(2)} offset:{k}\ns_waitcnt vmcnt(0)\n"
        f"scratch_store_dwordx4 off, v[12:15], off offset:{k}"
        for k in range(0, PRIVATE, 16)
    ]
)
DUMP_SCRATCH = "\n".join(
    [f"v_mov_b32_e32 v10, {PRIVATE}\nv_mul_lo_u32 v10, v80, v10"]
    + [
        f"scratch_load_dwordx4 v[12:15], off, off offset:{k}\ns_waitcnt vmcnt(0)\n"
        f"global_store_dwordx4 v10, v[12:15], {cp.buffer(4)} offset:{k}"
        for k in range(0, PRIVATE, 16)
    ]
)
# Name -> (address operands, what a wave's s20 adds, what a lane's v1 adds, the offset adds).
PRIVATE_MODES = {
    "offset": ("off, off offset:40", False, False),
    "scalar": ("off, s20 offset:40", True, False),
    "vector": ("v1, off offset:40", False, True),
    "both": ("v1, s20 offset:40", True, True),
    "negative offset": ("v1, s20 offset:-3", True, True),
}


def private_places(mode):
    """(address operands, columns, scalars, bytes of scratch memory [threads]) for one mode."""
    text, scalar, vector = PRIVATE_MODES[mode]
    rng = np.random.default_rng(8)
    columns, scalars = with_addresses(rng.integers(3, 20, GROUPS * THREADS)), rng.integers(0, 20, (WAVES, 1), np.uint32)
    at = np.full(GROUPS * THREADS, int(text.rpartition(":")[2]))
    at = at + np.repeat(scalars[:, 0], 64).astype(int) if scalar else at
    return text, columns, scalars, at + columns[..., 0].reshape(-1).astype(int) if vector else at


@pytest.mark.parametrize("kind, mode", [*((k, "both") for k in LOADS), *(("dwordx2", m) for m in PRIVATE_MODES)])
def test_scratch_loads(kind, mode):
    text, columns, scalars, at = private_places(mode)
    raw = random_bytes(GROUPS * THREADS * PRIVATE)
    line = f"scratch_load_{kind} {registers(kind)}, {text}"
    how = {"before": FILL_SCRATCH, "masks": cp.MASKS, "scalars": scalars, "reads": [raw], "scratch": PRIVATE}
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], **how)
    old = columns[..., 1:].reshape(-1, 4)
    at = at + np.arange(len(at)) * PRIVATE
    expected = np.where(cp.active(cp.MASKS).reshape(-1, 1), loaded(raw, at, kind, old), old)
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


@pytest.mark.parametrize("kind, mode", [*((k, "both") for k in STORES), *(("dwordx2", m) for m in PRIVATE_MODES)])
def test_scratch_stores(kind, mode):
    text, columns, scalars, at = private_places(mode)
    raw = random_bytes(GROUPS * THREADS * PRIVATE)
    address, _, rest = text.partition(",")
    line = f"scratch_store_{kind} {address}, {registers(kind)},{rest}"
    how = {"masks": cp.MASKS, "scalars": scalars, "scratch": PRIVATE, "reads": [raw], "writes": [np.zeros_like(raw)]}
    _, found = cp.run_lanes(line, columns, [2], before=FILL_SCRATCH, after=DUMP_SCRATCH, **how)
    data, active = columns[..., 1:].reshape(-1, 4), cp.active(cp.MASKS).reshape(-1)
    at = at + np.arange(len(at)) * PRIVATE
    np.testing.assert_array_equal(found, stored(raw, at, kind, data, active))


# --- buffers ---------------------------------------------------------------------------------------------------------
def test_buffer_offset_without_lanes_addresses():
    """All lanes read one place: the instruction's offset and a scalar register, which the range does not count."""
    raw = random_bytes(SIZE)
    lines = operands("buffer, offen", 2)[1]
    scalars = np.arange(WAVES, dtype=np.uint32)[:, None] * 4 + SIZE // 2
    line = f"buffer_load_dword v2, off, s[32:35], s20 offset:{SIZE // 4 - 4 & 0xFFF}"
    found = cp.run_lanes(line, with_addresses(np.zeros(512)), [2], before=lines, scalars=scalars, reads=[raw])
    at = np.repeat(scalars[:, 0].astype(int), 64) + (SIZE // 4 - 4 & 0xFFF)
    np.testing.assert_array_equal(found.reshape(-1), [raw[p : p + 4].copy().view("<u4")[0] for p in at])


@pytest.mark.parametrize(
    "kind", ["ubyte", "ushort", "sshort", "dword", "dwordx2", "dwordx3", "dwordx4", "short_d16_hi"]
)
def test_buffer_loads_beyond_the_range_give_zero(kind):
    """Word by word (CDNA4 ISA, 9.1.5.1), also where more memory follows, and far beyond it."""
    raw, limit, size = random_bytes(SIZE), 2000, LOADS[kind][0]
    unit = min(size, 4)
    at = np.random.default_rng(9).integers(limit - 20, limit + 20, GROUPS * THREADS) // unit * unit
    at[::7] = 0xFFFF_0000
    lines = operands("buffer, offen", 2)[1].replace(f"{SIZE:#x}", str(limit))
    columns = with_addresses(at)
    line = f"buffer_load_{kind} {registers(kind)}, v1, s[32:35], 0 offen"
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], before=lines, masks=cp.MASKS, reads=[raw])
    inside = np.concatenate([np.where(np.arange(SIZE) < limit, raw, 0), np.zeros(64, np.uint8)])
    old = columns[..., 1:].reshape(-1, 4)
    expected = np.where(cp.active(cp.MASKS).reshape(-1, 1), loaded(inside, np.minimum(at, SIZE), kind, old), old)
    np.testing.assert_array_equal(found.reshape(-1, 4), expected)


@pytest.mark.parametrize("kind", ["byte", "short", "dword", "dwordx2", "dwordx3", "dwordx4"])
def test_buffer_stores_beyond_the_range_are_dropped(kind):
    """Word by word as well."""
    raw, size, limit = random_bytes(SIZE), STORES[kind][0], SIZE // 2
    at = places_to_store(size, SIZE, min(size, 4), 512)
    at[:128] = np.sort(at[:128])
    at[5] = limit - 4 if size > 4 else limit - size
    taken = np.abs(at - at[5]) < 32
    taken[5] = False
    columns = with_addresses(np.where(taken, 0xFFFF_FF00, at))
    lines = operands("buffer, offen", 3)[1].replace(f"{SIZE:#x}", str(limit))
    line = f"buffer_store_{kind} {registers(kind)}, v1, s[32:35], 0 offen"
    _, found = cp.run_lanes(line, columns, [2], before=lines, writes=[raw])
    expected = stored(raw, at, kind, columns[..., 1:].reshape(-1, 4), ~taken)
    np.testing.assert_array_equal(found, np.where(np.arange(SIZE) < limit, expected, raw))


# --- scalar loads ----------------------------------------------------------------------------------------------------
# Name -> (address operands, what they add to the base); s20 is the wave's own offset.
SCALAR_MODES = {
    "plain": ("{b}, 0x0", lambda s: 0),
    "offset": ("{b}, 0x1c4", lambda s: 0x1C4),
    "register": ("{b}, s20", lambda s: s),
    "both": ("{b}, s20 offset:0x44", lambda s: s + 0x44),
    "negative": ("s[36:37], -0x64", lambda s: 0x100 - 0x64),
    "unaligned": ("{b}, 0x1c7", lambda s: 0x1C4),
}


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("mode", SCALAR_MODES)
def test_scalar_loads(mode, count):
    """Consecutive words for the whole wave, whatever EXEC says; the lowest two bits of addresses are ignored."""
    text, place = SCALAR_MODES[mode]
    raw = random_bytes(4096)
    scalars = np.random.default_rng(10).integers(0, 200, (WAVES, 1), np.uint32) * 4
    base = cp.buffer(2)
    first = cp.BUFFERS + 4
    line = f"s_load_dword{f'x{count}' if count > 1 else ''} {'s40' if count == 1 else f's[40:{39 + count}]'}, "
    found = cp.run_lanes(
        line + text.format(b=base),
        np.zeros((GROUPS, THREADS, 1)),
        [*range(20, 20 + count)],
        before=f"s_add_u32 s36, s{first}, 0x100\ns_addc_u32 s37, s{first + 1}, 0",
        after="\n".join(f"v_mov_b32_e32 v{20 + k}, s{40 + k}" for k in range(count)),
        masks=np.zeros(WAVES, np.uint64),
        scalars=scalars,
        reads=[raw],
    )
    for wave in range(WAVES):
        at = place(int(scalars[wave, 0]))
        expected = np.tile(raw[at : at + 4 * count].view("<u4"), (64, 1))
        np.testing.assert_array_equal(found.reshape(WAVES, 64, count)[wave], expected)


# --- fresh memory, empty waves, errors -------------------------------------------------------------------------------
def test_lds_is_not_zero_at_first():
    """What is read before it is written must not look right by luck."""
    found = cp.run_lanes("ds_read_b32 v2, v1", with_addresses(np.arange(512) % 128 * 4), [2], lds=512)
    np.testing.assert_array_equal(found, POISON * 0x01010101)


@pytest.mark.parametrize(
    "line",
    [
        "global_load_dword v2, v1, s[10:11]",
        "global_store_dword v1, v2, s[10:11]",
        "flat_load_dwordx4 v[2:5], v[6:7]",
        "flat_store_dwordx4 v[6:7], v[2:5]",
        "scratch_load_dword v2, v1, off",
        "scratch_store_dword v1, v2, off",
        "ds_read_b64 v[2:3], v1",
        "ds_write_b128 v1, v[2:5]",
        "ds_read2_b32 v[2:3], v1 offset1:9",
        "ds_write2st64_b32 v1, v2, v3 offset1:200",
        "global_load_lds_dword v1, s[10:11]",
    ],
)
def test_waves_without_lanes_touch_nothing(line):
    """Addresses far from everything: they are not even looked at."""
    columns = with_addresses(np.full(512, 0xFFFF_FFF0))
    found = cp.run_lanes(line, columns, [2, 3, 4, 5], masks=np.zeros(WAVES), lds=64, scratch=64)
    np.testing.assert_array_equal(found, columns[..., 1:])


INPUT, OUTPUT = cp.buffer(0), cp.buffer(1)
SCALE = "v_lshlrev_b32_e32 v1, 2, v0\n"
ERRORS = {
    "load behind the end": (
        SCALE,
        f"global_load_dword v2, v1, {INPUT} offset:4",
        "byte 256 of `input 0`, which has 256",
    ),
    "load across the end": (SCALE, f"global_load_dwordx2 v[2:3], v1, {INPUT}", "8 bytes at byte 252 of `input 0`"),
    "load before the start": (SCALE, f"global_load_ubyte v2, v1, {INPUT} offset:-1", "access outside every buffer"),
    "load nowhere": (
        "v_mov_b32_e32 v2, 0\nv_mov_b32_e32 v3, 0\n",
        "flat_load_dword v2, v[2:3]",
        "outside every buffer",
    ),
    "store behind the end": (SCALE, f"global_store_dword v1, v0, {OUTPUT} offset:4", "byte 256 of `output 0`"),
    "store to an input": (SCALE, f"global_store_byte v1, v0, {INPUT}", "write to the read-only buffer `input 0`"),
    "store to the arguments": (
        "v_mov_b32_e32 v1, 0\n",
        "global_store_dword v1, v0, s[0:1]",
        "write to the read-only buffer `arguments`",
    ),
    "scalar load behind the end": ("", f"s_load_dwordx4 s[20:23], {INPUT}, 0xf4", "16 bytes at byte 244"),
    "LDS read behind the end": (SCALE, "ds_read_b32 v2, v1 offset:4", "access of 4 bytes at byte 256 of an LDS of 256"),
    "LDS write behind the end": (SCALE, "ds_write_b8 v1, v0 offset:253", "an LDS of 256"),
    "LDS read at -4": ("v_mov_b32_e32 v1, -4\n", "ds_read_b32 v2, v1", "of an LDS of 256"),
    "second LDS place": (SCALE, "ds_read2st64_b32 v[2:3], v1 offset1:1", "an LDS of 256"),
    "load to LDS behind the end": (
        f"s_mov_b32 m0, 8\n{SCALE}",
        f"global_load_lds_dword v1, {INPUT}",
        "write at byte 260 of an LDS of 256",
    ),
    "scratch behind the end": (
        SCALE,
        "scratch_load_dword v2, v1, off",
        "outside the 64 bytes of scratch memory a lane",
    ),
    "scratch before the start": ("", "scratch_store_dword off, v0, off offset:-4", "outside the 64 bytes"),
    "transposing with inactive lanes": (
        f"s_mov_b64 exec, 1\n{SCALE}",
        "ds_read_b64_tr_b16 v[2:3], v1",
        "transposing read with inactive lanes",
    ),
    "indexed buffer": ("", "buffer_load_dword v1, v0, s[32:35], 0 idxen", "not implemented"),
    "buffer to LDS": ("", "buffer_load_dword v0, s[32:35], 0 offen lds", "not implemented"),
    "buffer with stride": (
        "s_mov_b32 s33, 0x40000\n",
        "buffer_load_dword v1, v0, s[32:35], 0 offen",
        "a descriptor with a stride is not implemented",
    ),
    "buffer whose descriptor is wrong": (
        "s_mov_b32 s34, 256\n",
        "buffer_load_dword v1, v0, s[32:35], 0 offen",
        "access outside every buffer",
    ),
    "load to a scalar register": (SCALE, "ds_read_b32 s20, v1", "`s20` is not a vector register"),
    "scalar data": (SCALE, "ds_write_b32 v1, s20", "`s20` is not a vector register"),
    "scalar offset": ("", f"global_load_dword v1, s20, {INPUT}", "`s20` is not a vector register"),
    "no address": ("", f"global_store_dword off, v0, {OUTPUT}", "`off` is not a vector register"),
    "scalar load to a vector register": ("", f"s_load_dword v1, {INPUT}, 0x0", "`v1` is not a scalar register"),
    "no operands": ("", "global_load_dword v1", "operands not understood"),
    "global atomic": ("", f"global_atomic_add v1, v0, {OUTPUT}", "unknown instruction"),
    "LDS atomic": ("", "ds_add_u32 v1, v0", "unknown instruction"),
    "transposing 4 bits": ("", "ds_read_b64_tr_b4 v[2:3], v1", "unknown instruction"),
    "scalar buffer load": ("", "s_buffer_load_dword s20, s[32:35], 0x0", "unknown instruction"),
    "scalar store": ("", "s_store_dword s20, s[10:11], 0x0", "unknown instruction"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_line(name):
    lines, line, why = ERRORS[name]
    cp.fails(line, why, before=lines, lds=256, scratch=64, arch=cp.GFX950)


def test_an_input_is_a_copy():
    """What the kernel writes does not reach the caller's arrays."""
    array = np.zeros(64, np.uint32)
    (out,) = cp.run(f"{SCALE}global_store_dword v1, v0, {cp.buffer(0)}", [], [array])
    np.testing.assert_array_equal(out, np.arange(64))
    assert not array.any()


# Spellings that the patterns of the tables match and that no processor has.
NO_INSTRUCTIONS = (
    r"\w+_load_(byte|short)(_hi)?|\w+_load_byte_d16\w*|\w+_store_[us](byte|short)\w*|\w+_dword(x\d)?_\w+"
    r"|\w+_(byte_d16|store_short_d16)|\w+_store_(byte|short)_hi|\w+_load_[us](byte|short)_hi|\w+_[us]short_d16\w*"
    r"|ds_read_b(8|16)\w*|ds_write_[ui]\w+|ds_\w+_b(32|64|96|128)_(d16\w*|hi)|ds_write_b(8|16)_(d16|hi)"
    r"|ds_read_[ui](8|16)_hi|ds_read_i16_d16\w*"
)


def test_every_opcode_of_the_tables_is_here():
    known = {s for table in (memory_access.TABLE, lds.TABLE) for pattern in table for s in cp.spellings(pattern)}
    here = {f"{p}_load_{k}" for p in ("global", "flat", "buffer", "scratch") for k in LOADS}
    here |= {f"{p}_store_{k}" for p in ("global", "flat", "buffer", "scratch") for k in STORES}
    here |= {f"ds_read_{k}" for k in LDS_LOADS} | {f"ds_write_{k}" for k in LDS_STORES}
    here |= {f"ds_{d}{name}_b{bits}" for name, bits, _ in DOUBLE for d in ("read", "write")}
    here |= {"ds_read_b64_tr_b8", "ds_read_b64_tr_b16"} | {f"global_load_lds_dword{k}" for k in ("", "x3", "x4")}
    here |= {f"s_load_dword{k}" for k in ("", "x2", "x4", "x8", "x16")}
    assert here <= known
    assert {name for name in known - here if not re.fullmatch(NO_INSTRUCTIONS, name)} == set()
    assert not {name for name in here if re.fullmatch(NO_INSTRUCTIONS, name)}
