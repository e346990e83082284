"""Parameters that the default run leaves to `make test-all`, and where a named implementation runs."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
from cdna_support import require_cdna

from pallas_kernels import cdna
from pallas_kernels.cdna import toolchain


def slow(*values: Any, id: str | None = None):
    """A case that differs from those of the default run in size or in a combination only."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


@functools.cache
def machine_code_runs() -> bool:
    """Whether kernels can be compiled for gfx942 and gfx950 and executed here."""
    return toolchain.available("triton") is None


def interpreted(*values: Any, id: str | None = None):
    """A case in interpret mode, the dearest way to run a kernel: a slow one where machine code checks the same."""
    return pytest.param(*values, marks=pytest.mark.slow if machine_code_runs() else (), id=id)


def rarely(values: list[Any], often: Any):
    """All of these values or tuples; those that are not among `often` as slow ones."""
    return [v if v in often else slow(*(v if isinstance(v, tuple) else (v,))) for v in values]


@contextlib.contextmanager
def running(name: str) -> Iterator[str]:
    """The implementation to ask for: of an architecture's name "triton", whose kernels run as its machine code."""
    if name not in cdna.ARCHITECTURES:
        yield name
        return
    require_cdna("triton")
    with cdna.device(name):
        yield "triton"
