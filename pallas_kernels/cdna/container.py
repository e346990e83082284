"""Reads the container of a serialized XLA executable: Riegeli records, Snappy blocks, protocol buffers.

A serialized GPU executable is a protocol buffer that describes the interface, followed by a Riegeli file. The records
of that file are a split protocol buffer: a manifest, one record per field that was stored separately, then one record
with the remaining fields. The field `serialized_executable` holds a second such file, whose message is
`xla.gpu.GpuExecutableProto`. The formats are documented in riegeli/records_file_format.md of google/riegeli, in
format_description.txt of google/snappy, and by the descriptors inside jaxlib and the plugin.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

# Riegeli puts a block header at every multiple of 64 KiB and a chunk header before every chunk.
_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")
_SNAPPY_RATIO = 64
_SIGNATURE, _RECORDS, _PADDING, _METADATA, _TRANSPOSED = b"srpmt"


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Decodes the base-128 number at byte `at`; returns (value, offset of the byte after it).

    Raises:
      ValueError: the number does not end within the data or within ten bytes, or it has more than 64 bits.
    """
    value = 0
    for k in range(10):
        if at + k >= len(data):
            raise ValueError(f"a number at byte {at} runs past the end of {len(data)} bytes")
        byte = data[at + k]
        value |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            if value >> 64:
                raise ValueError(f"a number at byte {at} has more than 64 bits")
            return value, at + k + 1
    raise ValueError(f"a number at byte {at} is longer than ten bytes")


# --- protocol buffers
@dataclasses.dataclass(frozen=True)
class Message:
    """A protocol buffer without its schema: field number -> values in order; varints are int, all others bytes."""

    fields: dict[int, list[int | bytes]]

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """Reads all fields.

        Raises:
          ValueError: `data` is not a protocol buffer.
        """
        fields: dict[int, list[int | bytes]] = {}
        at = 0
        while at < len(data):
            start = at
            tag, at = varint(data, at)
            number, kind = tag >> 3, tag & 7
            value: int | bytes
            if kind == 0:
                value, at = varint(data, at)
            elif kind in (1, 2, 5):
                size, at = varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
                value = data[at : at + size]
                if len(value) < size:
                    raise ValueError(f"field {number} at byte {start} has {size} bytes, {len(value)} are left")
                at += size
            else:
                raise ValueError(f"field {number} at byte {start} is of wire type {kind}")
            fields.setdefault(number, []).append(value)
        return cls(fields)

    def messages(self, number: int) -> list[Message]:
        """All submessages of a field."""
        return [Message.parse(v) for v in self.fields.get(number, []) if isinstance(v, bytes)]

    def message(self, number: int) -> Message:
        """The last submessage of a field; an empty message when the field is absent."""
        found = self.messages(number)
        return found[-1] if found else Message({})

    def number(self, number: int, default: int = 0) -> int:
        """A signed 64-bit integer field."""
        value = self.fields.get(number, [default])[-1]
        if not isinstance(value, int):
            raise ValueError(f"field {number} holds bytes, a number was expected")
        return value - (1 << 64) if value >> 63 else value

    def data(self, number: int) -> bytes:
        """A bytes field; empty when the field is absent."""
        value = self.fields.get(number, [b""])[-1]
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} holds a number, bytes were expected")
        return value

    def text(self, number: int) -> str:
        """A string field."""
        try:
            return self.data(number).decode()
        except UnicodeDecodeError:
            raise ValueError(f"field {number} holds {self.data(number)[:40]!r}, which is no text in utf-8") from None

    def numbers(self, number: int) -> list[int]:
        """A repeated integer field, packed or not."""
        out: list[int] = []
        for value in self.fields.get(number, []):
            if isinstance(value, int):
                out.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = varint(value, at)
                out.append(one)
        return out


# --- Riegeli
def _read(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    """Reads `size` bytes from `at` on and skips block headers; returns (bytes, offset behind them)."""
    parts = []
    while size:
        if at % _BLOCK == 0:
            at += _BLOCK_HEADER
        part = data[at : at + min(size, _BLOCK - at % _BLOCK)]
        if not part:
            raise ValueError(f"the file ends at byte {len(data)}, {size} bytes short of a chunk")
        parts.append(part)
        at += len(part)
        size -= len(part)
    return b"".join(parts), at


def _decompressed(data: bytes, compression: int) -> bytes:
    """Decompresses one buffer, which stores its uncompressed size before its contents."""
    if compression == 0:
        return data
    size, at = varint(data, 0)
    if compression != ord("s"):
        raise ValueError(f"a chunk is compressed with {chr(compression)!r}; Snappy ('s') or none was expected")
    import cramjam

    try:
        # Snappy stores the size too. Memory is taken by what it says, and three bytes give at most 64.
        inner, _ = varint(data, at)
        if inner > _SNAPPY_RATIO * len(data):
            raise ValueError(f"{len(data)} bytes announce {inner}")
        out = bytes(cramjam.snappy.decompress_raw(data[at:]))
    except (cramjam.DecompressionError, ValueError) as error:
        raise ValueError(f"a Snappy block is damaged: {error}") from None
    if len(out) != size:
        raise ValueError(f"a Snappy block holds {len(out)} bytes, {size} were announced")
    return out


def _simple_chunk(data: bytes, count: int, total: int) -> Iterator[bytes]:
    """Yields the records of a chunk that stores all sizes before all contents; contents have `total` bytes."""
    size, at = varint(data, 1)
    sizes = _decompressed(data[at : at + size], data[0])
    values = _decompressed(data[at + size :], data[0])
    if len(values) != total:
        raise ValueError(f"a chunk holds {len(values)} bytes, {total} were announced")
    start = where = 0
    for _ in range(count):
        length, where = varint(sizes, where)
        if start + length > len(values):
            raise ValueError(f"a record of {length} bytes at byte {start} of a chunk of {len(values)}")
        yield values[start : start + length]
        start += length
    if start != total:
        raise ValueError(f"records of {start} bytes in a chunk of {total}")


def riegeli_records(data: bytes) -> list[bytes]:
    """All records of a Riegeli file.

    Raises:
      ValueError: `data` is not a Riegeli file, is damaged, or has chunks of a type that this reader does not support.
    """
    records: list[bytes] = []
    at = 0
    while at < len(data):
        start = at
        header, at = _read(data, at, _CHUNK_HEADER.size)
        _, size, _, kind_and_count, total = _CHUNK_HEADER.unpack(header)
        kind, count = kind_and_count & 0xFF, kind_and_count >> 8
        body, at = _read(data, at, size)
        if start == 0 and kind != _SIGNATURE:
            raise ValueError(f"no Riegeli file: the first chunk is of type {kind:#x}")
        if kind == _RECORDS:
            records += _simple_chunk(body, count, total)
        elif kind == _TRANSPOSED:
            raise ValueError(f"the chunk at byte {start} is transposed, which this reader does not know")
        elif kind not in (_SIGNATURE, _PADDING, _METADATA):
            raise ValueError(f"the chunk at byte {start} is of unknown type {kind:#x}")
        # Zero bytes pad a chunk to at least as many bytes as it has records. The next chunk begins neither inside a
        # block header nor right behind one.
        end = start + count
        at = max(at, end + max(0, -end % _BLOCK - (_BLOCK - _BLOCK_HEADER - 1)))
    return records


# --- split protocol buffers
def split_message(data: bytes) -> tuple[str, Message]:
    """Reassembles a split protocol buffer from a Riegeli file; returns (type name, complete message).

    Raises:
      ValueError: the file is damaged, or a record replaces a nested field, which XLA's executables do not do.
    """
    records = riegeli_records(data)
    if not records:
        raise ValueError("a split protocol buffer without a manifest")
    manifest = Message.parse(records[0])
    merged: dict[int, list[int | bytes]] = {}
    entries = manifest.messages(2)
    if len(entries) != len(records) - 1:
        raise ValueError(f"a manifest of {len(entries)} records before {len(records) - 1} records")
    for entry, record in zip(entries, records[1:]):
        if 3 in entry.fields:
            path = entry.message(3).messages(1)
            if len(path) != 1 or set(path[0].fields) != {1}:
                raise ValueError("a split protocol buffer overrides a nested field")
            merged.setdefault(path[0].number(1), []).append(record)
        else:
            for number, values in Message.parse(record).fields.items():
                merged.setdefault(number, []).extend(values)
    return manifest.text(1), Message(merged)


def gpu_executable(serialized: bytes) -> Message:
    """Extracts `xla.gpu.GpuExecutableProto` from the bytes that `Executable.serialize` returned.

    Raises:
      ValueError: the executable is of another kind, or its layout differs from the module's docstring.
    """
    size, at = varint(serialized, 0)
    name, outer = split_message(serialized[at + size :])
    if name != "xla.ExecutableAndOptionsProto":
        raise ValueError(f"the executable is a {name}; xla.ExecutableAndOptionsProto was expected")
    name, inner = split_message(outer.data(1))
    if name != "xla.gpu.GpuExecutableProto":
        raise ValueError(f"the executable holds a {name}; xla.gpu.GpuExecutableProto was expected")
    return inner
