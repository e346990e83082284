"""Files of compilers, built field by field: protocol buffers, and the split messages that hold executables."""

import struct

from cdna_support import require_cramjam

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
USABLE = BLOCK - BLOCK_HEADER


# The first 64 bytes of any Riegeli file, as its documentation prints them.
SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f 0000000000000000 4000000000000000 91bac23c9287e1a9"
    "0000000000000000 e19f13c0e9b1c372 7300000000000000 0000000000000000"
)


def number(value: int) -> bytes:
    """A base-128 number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def snappy(data: bytes) -> bytes:
    return bytes(require_cramjam().snappy.compress_raw(data))


def simple(records, compression=b"\0") -> bytes:
    """The body of a chunk of records."""

    def pack(data):
        return number(len(data)) + snappy(data) if compression == b"s" else data

    sizes = pack(b"".join(number(len(r)) for r in records))
    return compression + number(len(sizes)) + sizes + pack(b"".join(records))


def add(file: bytes, kind: bytes, body: bytes, count: int = 0, decoded: int = 0) -> bytes:
    """`file` and one more chunk, interrupted by block headers and followed by its padding."""
    rest = struct.pack("<QQQQQ", 0, len(body), 0, kind[0] | count << 8, decoded) + body
    start, out = len(file), bytearray(file)
    while rest:
        if len(out) % BLOCK == 0:
            out += b"\xee" * BLOCK_HEADER  # never to be taken for contents
        room = BLOCK - len(out) % BLOCK
        out += rest[:room]
        rest = rest[room:]
    end = start + count
    end += max(0, -end % BLOCK - (USABLE - 1))  # a chunk does not end inside or right behind a block header
    return bytes(out.ljust(end, b"\0"))


def chunk(file: bytes, records, compression=b"\0") -> bytes:
    return add(file, b"r", simple(records, compression), len(records), sum(map(len, records)))


def field(tag: int, value: int | bytes) -> bytes:
    """One field of a protocol buffer: a number, or bytes with their length."""
    if isinstance(value, int):
        return number(tag << 3) + number(value)
    return number(tag << 3 | 2) + number(len(value)) + value


def path(*fields: int) -> bytes:
    """Where a record of a split message belongs: a field tag, its number, deeper ones behind it."""
    return field(3, b"".join(field(1, field(1, f)) for f in fields))


def split(name: str, *entries: tuple[bytes, bytes], compression=b"\0") -> bytes:
    """A split message of (entry of the manifest, record)."""
    manifest = field(1, name.encode()) + b"".join(field(2, entry) for entry, _ in entries)
    return chunk(SIGNATURE, [manifest, *(record for _, record in entries)], compression)
