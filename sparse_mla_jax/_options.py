"""Options that the engine, the scorer and the command line share, checked in one place."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sparse_mla_jax._check import parse_dtype as parse_dtype
from sparse_mla_jax._check import require
from sparse_mla_jax.models.family import DTYPES as DTYPES
from sparse_mla_jax.models.family import check_params as check_params
from sparse_mla_jax.models.family import matmul_precision as matmul_precision

CACHE_DTYPES = ("float8_e4m3fnuz", "float8_e4m3fn", "bfloat16", "float32")


def check_size(name: str, value: Any, low: int = 1) -> int:
    """Returns `value` as an int.

    Raises:
      ValueError: not an integer, or below `low`.
    """
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(ok and value >= low, f"{name} is {value!r}; an integer of at least {low} is expected.")
    return int(value)


def check_writable(name: str, path: str) -> None:
    """Refuses an output path before any work is done for it; `name` is the option's.

    Raises:
      ValueError: a folder, in a folder that does not exist, or not writable.
    """
    folder = os.path.dirname(os.path.abspath(path))
    require(os.path.isdir(folder), f"{name} {path!r}: folder {folder!r} does not exist; make it first.")
    require(not os.path.isdir(path), f"{name} {path!r} is a folder; give the name of a file.")
    target = path if os.path.exists(path) else folder
    require(os.access(target, os.W_OK), f"{name} {path!r} is not writable; choose another place.")
