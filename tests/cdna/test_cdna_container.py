"""The container of a serialized XLA executable: files made here by a small writer, read back, and damaged.

The writer follows doc/riegeli_records_file_format.md of google/riegeli; hashes are left zero, as the reader does not
check them.
"""

import contextlib
import functools
import struct

import pytest
from cdna_support import require_cramjam
from hypothesis import given, settings
from hypothesis import strategies as st
from support.containers import (
    BLOCK,
    BLOCK_HEADER,
    CHUNK_HEADER,
    SIGNATURE,
    add,
    chunk,
    field,
    number,
    path,
    simple,
    split,
)

from pallas_kernels.cdna.container import Message, gpu_executable, riegeli_records, split_message, varint

quick = settings(max_examples=60, deadline=None, database=None)


# --- the writer ------------------------------------------------------------------------------------------------------


def text_only(value):
    """Names of tests without the bytes of their files."""
    return value if isinstance(value, str) else ""


# --- Riegeli ---------------------------------------------------------------------------------------------------------
def test_the_writer_begins_as_documented():
    written = add(b"", b"s", b"")
    # All but the hashes and the distances in the block header.
    assert len(written) == 64 and written[56:] == SIGNATURE[56:] and written[32:40] == SIGNATURE[32:40]


RECORDS = [b"", b"a", b"bc" * 500, b"\0" * 200]


@pytest.mark.parametrize("compression", [b"\0", b"s"])
@pytest.mark.parametrize("chunks", [[], [[]], [RECORDS], [RECORDS, [], [b"last"]]], ids=len)
def test_records_of_several_chunks(chunks, compression):
    file = SIGNATURE
    for records in chunks:
        file = chunk(file, records, compression)
    assert riegeli_records(file) == [r for records in chunks for r in records]


@pytest.mark.parametrize("before", [*range(-70, 30), -BLOCK // 2])
def test_block_headers_anywhere(before):
    """A chunk that begins `before` bytes from a block's end: its header, its sizes or its contents are interrupted."""
    fill = BLOCK + before - 64 - CHUNK_HEADER
    file = add(SIGNATURE, b"p", b"\xdd" * fill) if before <= 0 else chunk(SIGNATURE, [bytes(fill - BLOCK_HEADER - 5)])
    assert before > 0 or len(file) == BLOCK + before
    big = bytes(range(256)) * 600  # over two more block headers
    assert riegeli_records(chunk(file, [b"first", big, b"third"]))[-3:] == [b"first", big, b"third"]


@pytest.mark.parametrize("kind", [b"p", b"m", b"s"])
def test_chunks_without_records_are_skipped(kind):
    file = chunk(add(chunk(SIGNATURE, [b"one"]), kind, b"\xdd" * 100), [b"two"])
    assert riegeli_records(file) == [b"one", b"two"]


@pytest.mark.parametrize("end", [1000, *range(BLOCK - 2, BLOCK + 28), 2 * BLOCK + 7])
def test_padding_up_to_the_number_of_records(end):
    """Empty records that compress to less than a byte each; the chunk after them may not begin in a block header."""
    file = chunk(SIGNATURE, [b""] * (end - 64), b"s")
    assert riegeli_records(chunk(file, [b"after"])) == [b""] * (end - 64) + [b"after"]


@quick
@given(
    st.lists(st.tuples(st.lists(st.binary(max_size=300), max_size=8), st.sampled_from([b"\0", b"s"])), max_size=4),
    st.integers(0, 2 * BLOCK),
)
def test_round_trip(chunks, fill):
    file = add(SIGNATURE, b"p", bytes(fill))
    for records, compression in chunks:
        file = chunk(file, records, compression)
    assert riegeli_records(file) == [r for records, _ in chunks for r in records]


def head(kind: int, size: int = 0, count: int = 0) -> bytes:
    return struct.pack("<QQQQQ", 0, size, 0, kind | count << 8, 0)


GOOD = chunk(SIGNATURE, [b"abc", b"de"])
REFUSED = {
    "no signature": (chunk(bytes(BLOCK), [b"a"])[BLOCK:], "first chunk is of type 0x72"),
    "zeros": (bytes(100), "first chunk is of type 0x0"),
    "text": (b"# not a file of this kind at all, but long enough to look like one".ljust(200), "Riegeli|short"),
    "transposed": (add(SIGNATURE, b"t", b"123", 1, 3), "byte 64 is transposed"),
    "unknown chunk": (add(SIGNATURE, b"x", b""), "unknown type 0x78"),
    "brotli": (add(SIGNATURE, b"r", simple([b"abc"], b"b"), 1, 3), "compressed with 'b'"),
    "zstd": (add(SIGNATURE, b"r", simple([b"abc"], b"z"), 1, 3), "compressed with 'z'"),
    "empty chunk": (add(SIGNATURE, b"r", b"", 1), "runs past the end"),
    "more records than sizes": (add(SIGNATURE, b"r", simple([b"abc"]), 2, 3), "runs past the end"),
    "record beyond the chunk": (add(SIGNATURE, b"r", b"\0\1\4abc", 1, 3), "a record of 4 bytes"),
    "bytes of no record": (add(SIGNATURE, b"r", b"\0\1\2abc", 1, 3), "records of 2 bytes"),
    "other size announced": (add(SIGNATURE, b"r", simple([b"abc"]), 1, 4), "4 were announced"),
    "sizes beyond the chunk": (add(SIGNATURE, b"r", b"\0\x09\3abc", 1, 3), "holds 0 bytes, 3 were"),
    "no snappy": (add(SIGNATURE, b"r", b"s\2\1\xff\3\xff\xff\xff", 1, 3), "Snappy"),
    # In Snappy: a length, then a literal of one byte, or of three.
    "snappy of another size": (
        add(SIGNATURE, b"r", b"s\4\1" + b"\1\0\3" + b"\4" + b"\3\10abc", 1, 3),
        "holds 3 bytes, 4 were announced",
    ),
    # 4 GiB out of nine bytes.
    "snappy that would not fit": (
        add(SIGNATURE, b"r", b"s\4\1" + b"\1\0\3" + b"\xff\xff\xff\xff\x0f" * 2 + b"\10abc", 1, 3),
        "Snappy block is damaged: 14 bytes announce 4294967295",
    ),
    "size of 2**64 - 1": (SIGNATURE + head(ord("r"), 2**64 - 1, 1), "bytes short"),
    "count of 2**56 - 1": (SIGNATURE + head(ord("r"), 2, 2**56 - 1) + b"\0\0", "runs past the end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files(name):
    file, message = REFUSED[name]
    if "snappy" in name:
        require_cramjam()
    with pytest.raises(ValueError, match=message):
        riegeli_records(file)


@pytest.mark.parametrize("compression", [b"\0", b"s"])
def test_cut_files(compression):
    """Every cut but those between chunks is noticed."""
    ends = [len(SIGNATURE)]
    file = SIGNATURE
    for records in ([b"abc", b"de"], [b"x" * 40]):
        file = chunk(file, records, compression)
        ends.append(len(file))
    for size in range(1, len(file)):
        if size not in ends:
            with pytest.raises(ValueError):
                riegeli_records(file[:size])


@functools.cache
def executable(compression=b"s"):
    """What `Executable.serialize` returns, in small: an interface, then two split messages one inside the other."""
    inner = split("xla.gpu.GpuExecutableProto", (b"", field(13, b"") + field(2, 7)), compression=compression)
    outer = split("xla.ExecutableAndOptionsProto", (path(1), inner), (b"", field(2, b"o")), compression=compression)
    return field(1, b"interface")[1:] + outer


@quick
@given(st.data())
def test_damage_is_a_value_error(data):
    """One byte changed anywhere: another result or ValueError, never anything else."""
    good = executable(data.draw(st.sampled_from([b"\0", b"s"])))
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    for read in (gpu_executable, lambda b: riegeli_records(b[10:])):
        with contextlib.suppress(ValueError):
            read(bad)


# --- numbers and protocol buffers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_varint(value):
    assert varint(b"\xff" + number(value) + b"\1", 1) == (value, 1 + len(number(value)))
    for size in range(len(number(value))):
        with pytest.raises(ValueError, match="runs past the end"):
            varint(number(value)[:size], 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\x80" * 10 + b"\0", "longer than ten bytes"), (b"\xff" * 9 + b"\2", "64 bits"), (b"\x80" * 9, "runs past")],
    ids=text_only,
)
def test_varint_limits(data, message):
    with pytest.raises(ValueError, match=message):
        varint(data, 0)
    assert varint(b"\x80" * 9 + b"\0", 0) == (0, 10)  # longer than it must be, but allowed


@quick
@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varint_round_trip(value, rest):
    assert varint(number(value) + rest, 0) == (value, len(number(value)))


def test_wire_types():
    data = field(1, 5) + number(2 << 3 | 1) + b"12345678" + field(3, b"bytes") + number(4 << 3 | 5) + b"1234"
    data += field(1, 2**64 - 1) + field(1 << 28, b"")
    message = Message.parse(data)
    assert message.fields == {1: [5, 2**64 - 1], 2: [b"12345678"], 3: [b"bytes"], 4: [b"1234"], 1 << 28: [b""]}
    # The last one counts, negative numbers are two's complement, what is absent is empty.
    assert (message.number(1), message.number(9), message.number(9, 4)) == (-1, 0, 4)
    assert (message.data(3), message.text(3), message.data(9), message.text(9)) == (b"bytes", "bytes", b"", "")
    assert Message.parse(b"").fields == {}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (number(7 << 3 | 3), "field 7 at byte 0 is of wire type 3"),
        (number(7 << 3 | 4), "wire type 4"),
        (field(1, 1) + number(7 << 3 | 6), "field 7 at byte 2 is of wire type 6"),
        (number(7 << 3 | 7), "wire type 7"),
        (number(1 << 3 | 1) + b"1234567", "has 8 bytes, 7 are left"),
        (number(1 << 3 | 5) + b"123", "has 4 bytes, 3 are left"),
        (number(1 << 3 | 2) + b"\x05abcd", "has 5 bytes, 4 are left"),
        (number(1 << 3 | 2) + number(2**64 - 1) + b"a", "1 are left"),
        (number(1 << 3 | 2), "runs past the end"),
        (number(1 << 3) + b"\x80", "runs past the end"),
        (b"\x80", "runs past the end"),
    ],
    ids=text_only,
)
def test_no_protocol_buffer(data, message):
    with pytest.raises(ValueError, match=message):
        Message.parse(data)


def test_fields_of_the_other_kind():
    message = Message({1: [b"bytes"], 2: [3], 3: [b"\xff"]})
    for read, why in (
        (lambda: message.number(1), "number was expected"),
        (lambda: message.data(2), "bytes were expected"),
        (lambda: message.text(2), "bytes were expected"),
        (lambda: message.text(3), "utf-8"),
    ):
        with pytest.raises(ValueError, match=why):
            read()


def test_submessages():
    message = Message.parse(field(1, field(2, 3)) + field(1, field(2, 4)) + field(1, 9))
    assert [m.number(2) for m in message.messages(1)] == [3, 4]
    assert message.message(1).number(2) == 4
    assert (message.messages(5), message.message(5).fields) == ([], {})


@quick
@given(st.lists(st.lists(st.integers(0, 2**64 - 1), max_size=5)), st.booleans())
def test_repeated_numbers(groups, packed):
    """Packed, one by one, or both in turn."""
    data = b""
    for k, group in enumerate(groups):
        data += field(6, b"".join(map(number, group))) if packed ^ k % 2 else b"".join(field(6, v) for v in group)
    assert Message.parse(data).numbers(6) == [v for group in groups for v in group]


def test_packed_number_that_is_cut():
    with pytest.raises(ValueError, match="runs past the end"):
        Message.parse(field(6, b"\1\x80")).numbers(6)


@quick
@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.one_of(st.integers(0, 2**64 - 1), st.binary(max_size=200)))))
def test_message_round_trip(fields):
    expected = {}
    for tag, value in fields:
        expected.setdefault(tag, []).append(value)
    assert Message.parse(b"".join(field(*f) for f in fields)).fields == expected


# --- split messages --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [b"\0", b"s"])
def test_split_message(compression):
    """Records that are fields come back into them, in order; the others are merged."""
    name, message = split_message(
        split(
            "a.Type",
            (path(4), b"first"),
            (path(4), b"second"),
            (b"", field(1, 7) + field(4, b"third")),
            (b"", field(1, 8)),
            compression=compression,
        )
    )
    assert name == "a.Type"
    assert message.fields == {4: [b"first", b"second", b"third"], 1: [7, 8]}


INDEXED = field(3, field(1, field(1, 4)) + field(1, field(2, 1)))
IN_MAP = field(3, field(1, field(1, 4) + field(3, b"key")))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (split("a", (path(1, 2), b"x")), "nested field"),
        (split("a", (field(3, b""), b"x")), "nested field"),
        (split("a", (INDEXED, b"x")), "nested field"),
        (split("a", (IN_MAP, b"x")), "nested field"),
        (SIGNATURE, "without a manifest"),
        (b"", "without a manifest"),
        (chunk(SIGNATURE, [field(2, b"")]), "1 records before 0"),
        (chunk(SIGNATURE, [field(1, b"a"), b""]), "0 records before 1"),
        (chunk(SIGNATURE, [b"\x80"]), "runs past the end"),
        (split("a", (b"", b"\7")), "wire type 7"),
        (split("a", (b"\7", b"")), "wire type 7"),
    ],
    ids=text_only,
)
def test_refused_split_messages(file, message):
    with pytest.raises(ValueError, match=message):
        split_message(file)


# --- executables -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [b"\0", b"s"])
def test_gpu_executable(compression):
    assert gpu_executable(executable(compression)).fields == {13: [b""], 2: [7]}


INNER, OUTER = "xla.gpu.GpuExecutableProto", "xla.ExecutableAndOptionsProto"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "runs past the end"),
        (b"\0", "without a manifest"),
        (b"\x20short", "without a manifest"),
        (executable(b"\0")[:-1], "short"),
        (b"\0" + split("xla.CpuExecutable", (b"", b"")), "is a xla.CpuExecutable; .*Options"),
        (b"\0" + split(INNER, (b"", b"")), "is a xla.gpu.GpuExecutableProto; "),
        (b"\0" + split(OUTER, (b"", b"")), "without a manifest"),
        (b"\0" + split(OUTER, (b"", field(1, 3))), "bytes were expected"),
        (b"\0" + split(OUTER, (path(1), b"text" * 20)), "Riegeli|short"),
        (b"\0" + split(OUTER, (path(1), split("xla.cpu.Proto", (b"", b"")))), "holds a xla.cpu.Proto; .*Gpu"),
    ],
    ids=text_only,
)
def test_refused_executables(data, message):
    with pytest.raises(ValueError, match=message):
        gpu_executable(data)
