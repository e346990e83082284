"""Prompts and token ids that commands read: text, files of bytes, and ids from the command line or a file."""

from __future__ import annotations

import os
import re
import sys
from typing import IO

import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.serving.requests import BYTES
from sparse_mla_jax.tools.options import load_array

# A folder with one of these has a tokenizer, so its ids are not bytes, however small its vocabulary is.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
# Most bytes of an id in a file, with what separates it from the next: files are read no further than the context.
_ID_BYTES = 32


def is_byte_vocabulary(folder: str, config: Config) -> bool:
    """Whether bytes are the token ids of a model: at most 256 ids, and no tokenizer in its folder."""
    return config.vocab_size <= BYTES and not any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZERS)


def require_bytes(option: str, remedy: str, folder: str, config: Config) -> None:
    """Raises ValueError if an option gives text to a model whose token ids are not bytes."""
    require(
        is_byte_vocabulary(folder, config),
        f"{option} is text, and {folder!r} has a vocabulary of {config.vocab_size} tokens that are not bytes."
        f" Tokenizers are not supported yet: make the ids with the model's own tokenizer, and pass them with {remedy}.",
    )


def read_bytes(option: str, path: str, limit: int) -> bytes:
    """At most `limit` + 1 bytes of a file, or of stdin if it is "-": enough to see that there are too many.

    Raises:
      ValueError: not a file that can be read.
    """
    require(path != "", f"{option} is empty; give the name of a file, or - for stdin.")
    try:
        if path == "-":
            return _read(sys.stdin.buffer, limit) if sys.stdin is not None else b""
        # A pipe is as good as a file.
        require(os.path.exists(path) and not os.path.isdir(path), f"{option} {path!r} is not a file.")
        with open(path, "rb") as file:
            return _read(file, limit)
    except OSError as error:
        raise ValueError(f"{option} {path!r} can not be read ({error.strerror}).") from None


def _read(file: IO[bytes], limit: int) -> bytes:
    return file.read(limit + 1)


def read_ids(option: str, value: str, limit: int) -> np.ndarray | list[int]:
    """Token ids from `1 2 3` or `1,2,3`, from a .npy file, or from a file or stdin (-) with ids as text.

    Args:
      option: its name in messages.
      value: what the option was given.
      limit: most ids that can be used; of longer files only so much is read that their length shows.

    Raises:
      ValueError: neither ids nor a readable file.
    """
    if re.fullmatch(r"[\s\d,+-]*\d[\s\d,+-]*", value):
        return _parse(option, value)
    if value.endswith(".npy"):
        return load_ids(option, value)
    require(
        value in ("", "-") or os.path.exists(value),
        f"{option} {value[:80]!r} is neither token ids, as in 1 2 3, nor a file.",
    )
    text = read_bytes(option, value, limit * _ID_BYTES)
    try:
        return _parse(option, text.decode("ascii"))
    except UnicodeDecodeError:
        raise ValueError(
            f"{option} {value!r} holds other bytes than digits; token ids with spaces, commas or lines between them are"
            " expected, or a .npy file."
        ) from None


def load_ids(option: str, path: str) -> np.ndarray:
    """Token ids from a .npy file.

    Raises:
      ValueError: not a readable file, or not a flat array of integers.
    """
    ids = load_array(path, option)
    require(
        ids.ndim == 1 and np.issubdtype(ids.dtype, np.integer),
        f"{option} {path!r} holds {ids.dtype}{list(ids.shape)}; a flat array of integer token ids is expected.",
    )
    return ids


def _parse(option: str, text: str) -> list[int]:
    words = text.replace(",", " ").split()
    wrong = next((word for word in words if not re.fullmatch(r"[+-]?\d{1,18}", word)), None)
    require(
        wrong is None,
        f"{option} holds {(wrong or '')[:40]!r}; token ids with spaces, commas or lines between them are expected.",
    )
    return [int(word) for word in words]
