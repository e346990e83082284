"""Code objects: what is read of a good one, and that a damaged one is refused with the reason or read as it stands."""

import dataclasses
import functools
import random
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna

from pallas_kernels import cdna
from pallas_kernels.cdna import code_object, elf, toolchain
from pallas_kernels.cdna.interpreter.assembly import InterpreterError, parse
from sparse_mla_jax.ops.topk import top_k

ARCH = "gfx942"
ROW = np.sin(np.arange(300, dtype=np.float32))[None]
# A kernel of a row takes 1,000 to 2,000 instructions a wave.
BUDGET = 5_000


@functools.cache
def compiled(arch=ARCH, compiler="triton"):
    """top_k: loops, LDS, barriers."""
    program = cdna.compile(
        lambda scores: top_k(scores, 8, implementation="triton"),
        jax.ShapeDtypeStruct(ROW.shape, jnp.float32),
        arch=arch,
        compiler=compiler,
    )
    return program.pallas_kernels[0]


@pytest.fixture
def kernel():
    """A kernel that Triton compiled for gfx942."""
    require_cdna("triton")
    return compiled()


@pytest.fixture
def good(kernel):
    """Its code object."""
    return kernel.code_object


def changed(data, at, replacement):
    """Bytes with some of them replaced."""
    return data[:at] + replacement + data[at + len(replacement) :]


def symbol_entries(data, name):
    """Where the entries of a symbol are, in both tables."""
    parsed = elf.Elf.parse(data)
    for table in parsed.sections:
        if table.kind in (2, 11):
            strings = parsed.sections[table.link]
            for at in range(table.offset, table.offset + table.size, 24):
                start = strings.offset + struct.unpack_from("<I", data, at)[0]
                if data[start : data.index(b"\0", start)] == name.encode():
                    yield at


def with_symbol(data, name, at, form, value):
    """Both entries of a symbol with another value of one field."""
    for entry in symbol_entries(data, name):
        data = changed(data, entry + at, struct.pack(form, value))
    return data


def with_section(data, number, at, form, value):
    """A section header with another value of one field."""
    (table,) = struct.unpack_from("<Q", data, 40)
    return changed(data, table + 64 * number + at, struct.pack(form, value))


def sections(data, kind):
    """Numbers of the sections of a kind."""
    return [n for n, section in enumerate(elf.Elf.parse(data).sections) if section.kind == kind]


def with_descriptor(data, at, form, value):
    """The kernel's descriptor with another value of one field."""
    return changed(data, elf.Elf.parse(data).symbols["top_k.kd"].offset + at, struct.pack(form, value))


def note(data):
    """Offset and bytes of the note with the metadata."""
    (number,) = sections(data, 7)
    section = elf.Elf.parse(data).sections[number]
    return section.offset, data[section.offset : section.offset + section.size]


def with_note(data, old, new):
    """The note with some bytes replaced; they must occur."""
    offset, text = note(data)
    assert old in text and len(old) == len(new)
    return changed(data, offset, text.replace(old, new))


def code(data):
    """Offset and size of the kernel's code."""
    symbol = elf.Elf.parse(data).symbols["top_k"]
    return symbol.offset, symbol.size


# --- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_what_is_read(arch):
    require_cdna("triton")
    data = compiled(arch).code_object
    parsed = elf.Elf.parse(data)
    assert parsed.machine == arch and {"top_k", "top_k.kd"} <= set(parsed.symbols)
    (read,) = code_object.kernels(data, arch)
    assert read.name == "top_k" and read.metadata["wavefront_size"] == 64
    settings = parse(read.assembly).directives
    # Registers are granted in groups; what the metadata say is what the compiler uses.
    assert 0 <= settings["next_free_vgpr"] - read.metadata["vgpr_count"] < 8
    assert 0 <= settings["next_free_sgpr"] - read.metadata["sgpr_count"] < 16
    assert settings["accum_offset"] % 4 == 0 and settings["kernarg_size"] == read.metadata["kernarg_segment_size"]


# --- damage ----------------------------------------------------------------------------------------------------------
DAMAGE = {
    "nothing": (lambda d: b"", "not a 64-bit ELF file: 0 bytes"),
    "another magic number": (lambda d: b"\x7fELG" + d[4:], "not a 64-bit ELF file"),
    "32 bits": (lambda d: changed(d, 4, b"\1"), "not a 64-bit ELF file"),
    "big-endian": (lambda d: changed(d, 5, b"\2"), "not a 64-bit ELF file"),
    "another system": (lambda d: changed(d, 7, b"\0"), "not a 64-bit ELF file.*as those for AMD GPUs do"),
    "no header": (lambda d: d[:63], "not a 64-bit ELF file: 63 bytes.*at least 64"),
    "only the header": (lambda d: d[:64], "of 64 bytes; its program headers end at byte"),
    "half": (lambda d: d[: len(d) // 2], "its section headers end at byte"),
    "without the last byte": (lambda d: d[:-1], "its section headers end at byte"),
    "an object file": (lambda d: changed(d, 16, b"\1"), "type 1 for machine 224; type 3, a shared object"),
    "another machine": (lambda d: changed(d, 18, b"\x3e"), "for machine 62; .* machine 224, AMD GPUs"),
    "another GPU": (lambda d: changed(d, 48, b"\x4f"), "an ELF file for machine gfx950; gfx942 expected"),
    "an unknown GPU": (lambda d: changed(d, 48, b"\x01"), "an ELF file for machine 0x1; gfx942 expected"),
    "headers far away": (lambda d: changed(d, 40, b"\xff" * 8), "section headers end at byte 1844674407"),
    "headers of another size": (lambda d: changed(d, 58, b"\x41\0"), "65 a section; 56 and 64 were expected"),
    "no headers": (lambda d: changed(d, 60, b"\0\0"), "holds no kernel: no symbol ends in .kd"),
    "a segment outside": (lambda d: changed(d, 64 + 56 + 8, b"\xff" * 7), "bytes of segment 1 end at byte"),
    "a section outside": (lambda d: with_section(d, 1, 24, "<Q", 2**60), "bytes of section 1 end at byte"),
    "a section too large": (lambda d: with_section(d, 1, 32, "<Q", 2**63), "bytes of section 1 end at byte"),
    "no string table": (lambda d: with_section(d, sections(d, 2)[0], 40, "<I", 0), "has no string table"),
    "a string table outside": (lambda d: with_section(d, sections(d, 2)[0], 40, "<I", 999), "has no string table"),
    "part of a symbol": (lambda d: with_section(d, sections(d, 2)[0], 32, "<Q", 25), "25 bytes in entries of 24"),
    "symbols of size 0": (lambda d: with_section(d, sections(d, 2)[0], 56, "<Q", 0), "in entries of 0; entries of 24"),
    "a name outside": (lambda d: with_symbol(d, "top_k", 0, "<I", 2**31), "with a name at byte 2147483648"),
    "a symbol in no section": (lambda d: with_symbol(d, "top_k", 6, "<H", 99), "symbol top_k is in section 99"),
    "a symbol outside": (lambda d: with_symbol(d, "top_k.kd", 8, "<Q", 2**40), "symbol top_k.kd has bytes"),
    "a symbol too large": (lambda d: with_symbol(d, "top_k", 16, "<Q", 2**63), "symbol top_k has bytes 0 to"),
    "two values of a symbol": (
        lambda d: changed(d, next(symbol_entries(d, "top_k")) + 16, b"\4" + b"\0" * 7),
        "two different symbols top_k",
    ),
    "no function": (lambda d: with_symbol(d, "top_k", 6, "<H", 0), "has a descriptor, but .* no function top_k"),
    "no function, but data": (lambda d: with_symbol(d, "top_k", 4, "<B", 17), "no function top_k"),
    "a function of no size": (lambda d: with_symbol(d, "top_k", 16, "<Q", 0), "function top_k has 0 bytes"),
    "no descriptor": (lambda d: with_symbol(d, "top_k.kd", 6, "<H", 0), "no symbol ends in .kd"),
    "a short descriptor": (lambda d: with_symbol(d, "top_k.kd", 16, "<Q", 32), "has 32 bytes; 64 expected"),
    "another entry": (lambda d: with_descriptor(d, 16, "<q", 4), "the descriptor of kernel top_k leads to"),
    "reserved bits": (lambda d: with_descriptor(d, 12, "<I", 1), "bits that CDNA does not define"),
    "waves of 32": (lambda d: with_descriptor(d, 56, "<H", 8 | 1 << 10), "bits that CDNA does not define"),
    "more LDS": (lambda d: with_descriptor(d, 0, "<I", 2**31), "group_segment_fixed_size 0, and its descriptor 2147"),
    "more scratch": (lambda d: with_descriptor(d, 4, "<I", 8), "private_segment_fixed_size 0, and its descriptor 8"),
    "more arguments": (lambda d: with_descriptor(d, 8, "<I", 8), "kernarg_segment_size .*, and its descriptor 8"),
    "fewer registers": (lambda d: with_descriptor(d, 48, "<I", 0), "vgpr_count .*; its descriptor allocates 8"),
    "no note": (lambda d: with_section(d, sections(d, 7)[0], 4, "<I", 1), "metadata is missing or damaged"),
    "an empty note": (lambda d: changed(d, note(d)[0], b"\0" * len(note(d)[1])), "metadata is missing|refuses"),
    "a note that is no msgpack": (
        lambda d: changed(d, note(d)[0] + 20, b"\xc1" * (len(note(d)[1]) - 20)),
        "metadata is missing or damaged",
    ),
    "a note of another kernel": (lambda d: with_note(d, b"\xa5top_k", b"\xa5top_j"), "metadata of kernel top_k lack"),
    "waves of 32 in the note": (
        lambda d: with_note(d, b".wavefront_size\x40", b".wavefront_size\x20"),
        "is missing or damaged|for waves of 32 lanes; 64 expected",
    ),
    "words that are no code": (lambda d: changed(d, code(d)[0] + 8, b"\xff" * 8), "of kernel top_k holds `.long 0xff"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_code_objects(good, name):
    """A ValueError of one line that says what is wrong."""
    damage, why = DAMAGE[name]
    with pytest.raises(ValueError, match=why) as error:
        code_object.kernels(damage(good), ARCH)
    assert "\n" not in str(error.value) and "/tmp" not in str(error.value)


def test_a_tool_that_does_not_end(good, monkeypatch, tmp_path):
    slow = tmp_path / "llvm-readelf"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(toolchain, "PROGRAM_SECONDS", 0.1)
    monkeypatch.setattr(toolchain, "find_llvm", lambda tool: str(slow))
    with pytest.raises(RuntimeError, match=r"^llvm-readelf did not end within 0\.1 s$"):
        code_object.kernels(good, ARCH)


# --- fuzz ------------------------------------------------------------------------------------------------------------
def mutated(data, rnd):
    """A damaged copy: cut, or with bytes, a field or a range changed, more often where something is read."""
    parsed = elf.Elf.parse(data)
    symbols = [s.offset for s in parsed.symbols.values()]
    places = [0, *symbols, *(s.offset for s in parsed.sections), struct.unpack_from("<Q", data, 40)[0]]
    at = min(len(data) - 1, rnd.choice([rnd.randrange(len(data)), rnd.choice(places) + rnd.randrange(128)]))
    kind = rnd.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return changed(data, at, bytes(rnd.randrange(256) for _ in range(rnd.choice([1, 2, 4]))))[: len(data)]
    if kind == 2:
        return changed(data, at, bytes([data[at] ^ 1 << rnd.randrange(8)]))
    if kind == 3:
        value = rnd.choice([0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data)])
        return changed(data, at & ~7, struct.pack("<Q", value))[: len(data)]
    other, size = rnd.randrange(len(data)), rnd.choice([4, 16, 64, 256])
    return changed(data, at, data[other : other + size])[: len(data)]


def outcome(kernel, bad):
    """ "refused", "not executed" or "executed"; any other exception fails, and so does a silent difference."""
    good = kernel.code_object
    try:
        (read,) = code_object.kernels(bad, ARCH)
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error), error
        return "refused"
    start, size = code(good)
    (descriptor,) = code_object.descriptors(good).values()
    if bad[start : start + size] == good[start : start + size] and descriptor in bad:
        assert read.assembly == kernel.assembly
    try:
        result = cdna.execute(dataclasses.replace(kernel, assembly=read.assembly), [ROW], budget=BUDGET)
    except InterpreterError:
        return "not executed"
    if read.assembly == kernel.assembly:
        np.testing.assert_array_equal(result.outputs[0], np.sort(np.argsort(-ROW[0], stable=True)[:8])[None])
    return "executed"


def fuzz(kernel, seed, trials):
    rnd = random.Random(seed)
    found = [outcome(kernel, mutated(kernel.code_object, rnd)) for _ in range(trials)]
    counts = {name: found.count(name) for name in ("refused", "not executed", "executed")}
    print(counts)
    return counts


def test_fuzz(kernel):
    """Damage is refused, or the code that stands there is executed; no other exception and no loop without end."""
    assert fuzz(kernel, 0, 24)["refused"] > 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_fuzz_more(kernel, seed):
    counts = fuzz(kernel, seed, 120)
    assert counts["refused"] > 20 and counts["executed"] > 20


def mutated_code(kernel, rnd):
    """The code object with one to three bits of its instructions changed."""
    start, size = code(kernel.code_object)
    bad = bytearray(kernel.code_object)
    for _ in range(rnd.choice([1, 1, 2, 3])):
        bad[start + rnd.randrange(size)] ^= 1 << rnd.randrange(8)
    return bytes(bad)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_fuzz_of_instructions(kernel, seed):
    """Other instructions than the compiler's end in a result or in an InterpreterError that names the line."""
    rnd = random.Random(seed)
    found = [outcome(kernel, mutated_code(kernel, rnd)) for _ in range(80)]
    assert {"not executed", "executed"} <= set(found)
