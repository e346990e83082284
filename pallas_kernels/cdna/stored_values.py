"""Compiled code as text: the values that `disk_cache` stores, to JSON and back.

An object of the JSON text has one entry. Its name is "bytes" (base64), "tuple", "dict", "dtype", or one of our
dataclasses; everything else stands for itself. Reading makes no object of any other class, and runs no code.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.cdna.code_object import KernelCode
from pallas_kernels.cdna.program import Argument, Kernel, Program, Resources

_CLASSES: dict[str, Any] = {c.__name__: c for c in (Argument, Kernel, KernelCode, Program, Resources)}


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _plain(value: Any) -> Any:
    """A value as what `json` can write."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) is list:
        return [_plain(v) for v in value]
    if type(value) is tuple:
        return {"tuple": [_plain(v) for v in value]}
    if type(value) is dict and all(type(k) is str for k in value):
        return {"dict": {k: _plain(v) for k, v in value.items()}}
    if isinstance(value, np.dtype) and value.isbuiltin:
        return {"dtype": value.name}
    name = type(value).__name__
    if type(value) is _CLASSES.get(name):
        return {name: {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    raise TypeError(f"a {name} cannot be stored; expected compiled code, or numbers, text and bytes in containers")


def _value(plain: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(plain, list):
        return [_value(p) for p in plain]
    if not isinstance(plain, dict):
        return plain
    ((name, inside),) = plain.items()
    if name == "bytes":
        return base64.b64decode(inside, validate=True)
    if name == "tuple":
        return tuple(_value(p) for p in inside)
    if name == "dtype":
        return _dtype(inside)
    fields = {k: _value(p) for k, p in inside.items()}
    return fields if name == "dict" else _CLASSES[name](**fields)


def to_bytes(value: Any) -> bytes:
    """A value as JSON text.

    Raises:
      TypeError: the value is, or contains, something else than compiled code, numbers, text, bytes and containers.
    """
    return json.dumps(_plain(value)).encode()


def from_bytes(data: bytes) -> Any:
    """The value whose JSON text this is.

    Raises:
      ValueError: the text is no JSON, or describes something that `to_bytes` does not write.
    """
    try:
        return _value(json.loads(data))
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"not a stored value: {type(error).__name__}: {error}") from None
