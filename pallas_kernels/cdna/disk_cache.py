"""Caches compiled code on disk, under a hash of all inputs of its compilation.

An entry is a file `<key>.json`: a line with a checksum, then JSON text (`stored_values`). Nothing in it is executed. A
folder or an entry that another user could have written, a damaged entry, and an entry of another key are ignored: the
caller compiles again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import time
from typing import Any

from pallas_kernels.cdna import private_folder, stored_values, toolchain

# Increase this number whenever the meaning of stored values changes.
FORMAT = 2
# Larger files are not entries. The largest program so far, a step at published sizes, takes a hundredth of it.
MOST_BYTES = 256 << 20
_HEAD = b"compiled code, SHA-256 of what follows: "
_FIRST_LINE = len(_HEAD) + 64 + 1
# A writer that was killed leaves its temporary file; after this time, seconds, another one deletes it.
_ABANDONED = 3600


def key_of(**ingredients: Any) -> str:
    """Hash of IR, options and versions; the ingredients must be serializable as JSON."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **ingredients}, sort_keys=True).encode()).hexdigest()


def _entry(key: str) -> str:
    if not re.fullmatch(r"\w+", key):
        raise ValueError(f"key is {key!r}; expected what `key_of` returns")
    return f"{key}.json"


def _open(folder: pathlib.Path | None, make: bool) -> int | None:
    """The folder of entries, opened; None if there is none that is private to this user."""
    root = folder or toolchain.default_cache()
    if root is None:
        return None
    path = root / "code"
    if make:
        private_folder.make_folder(path)
    return private_folder.open_folder(path, tighten=folder is None)


def _contents(handle: int) -> bytes | None:
    """What follows the first line of an entry; None if the file is no entry or is damaged."""
    found = os.fstat(handle)
    if not private_folder.is_own_file(found) or found.st_size > MOST_BYTES:
        return None
    with open(handle, "rb", closefd=False) as file:
        first = file.read(_FIRST_LINE)
        if not first.startswith(_HEAD):
            return None
        body = file.read(MOST_BYTES)
    return body if first == _first_line(body) else None


def _first_line(body: bytes) -> bytes:
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + b"\n"


def read(key: str, folder: pathlib.Path | None = None) -> Any:
    """The value stored under `key`; None if nothing is stored, or what is stored cannot be trusted.

    Args:
      key: from `key_of`.
      folder: root of the cache; None means `toolchain.default_cache()`.
    """
    name = _entry(key)
    opened = _open(folder, make=False)
    if opened is None:
        return None
    try:
        # Without waiting: a pipe in place of an entry has no writer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=opened)
        try:
            body = _contents(handle)
        finally:
            os.close(handle)
        stored = None if body is None else stored_values.from_bytes(body)
    except (OSError, ValueError):
        return None
    finally:
        os.close(opened)
    if not (isinstance(stored, list) and len(stored) == 2 and stored[0] == key):
        return None
    return stored[1]


def write(key: str, value: Any, folder: pathlib.Path | None = None) -> None:
    """Stores `value`; does nothing if the folder cannot be written or is not private to this user.

    Args:
      key: from `key_of`.
      value: compiled code, or numbers, text, bytes and containers of them.
      folder: root of the cache; None means `toolchain.default_cache()`. Missing folders are made with mode 0700.

    Raises:
      TypeError: `value` cannot be stored.
    """
    name, opened = _entry(key), None
    with contextlib.suppress(OSError):
        opened = _open(folder, make=True)
    try:
        body = stored_values.to_bytes([key, value])
        if opened is None or len(body) + _FIRST_LINE > MOST_BYTES:
            return
        with contextlib.suppress(OSError):
            _delete_abandoned(opened)
            _replace(opened, name, body)
    finally:
        if opened is not None:
            os.close(opened)


def _replace(folder: int, name: str, body: bytes) -> None:
    """Writes an entry and renames it, so that a reader never sees a partial file, even with several writers."""
    temporary = f"{secrets.token_hex(16)}.part"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(handle, "wb") as file:
            # The umask can take bits of the owner away too.
            os.fchmod(handle, 0o600)
            file.write(_first_line(body) + body)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def _delete_abandoned(folder: int) -> None:
    """Deletes temporary files of writers that were killed."""
    for name in os.listdir(folder):
        if name.endswith(".part"):
            # Another process may be faster.
            with contextlib.suppress(OSError):
                if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > _ABANDONED:
                    os.unlink(name, dir_fd=folder)
