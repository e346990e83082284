"""What every test module shares: the implementations under test, and where fixtures lie."""

import gc
import itertools
import os
import pathlib

# Decided before jax is imported anywhere: the tests are CPU tests, on whatever machine they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from cdna_support import require_cdna
from support.fixtures import fixtures as fixtures

from pallas_kernels import cdna

# Every program that XLA:CPU compiles maps memory, and Linux gives a process 65530 mappings: at more than these, all
# compiled programs are dropped between two tests.
MOST_MAPPINGS = 20_000
TESTS_BETWEEN_LOOKS = 20
_looks = itertools.count(1)


@pytest.fixture(autouse=True)
def drop_compiled_programs():
    """Keeps a worker that runs thousands of tests below the kernel's limit of mappings."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_looks) % TESTS_BETWEEN_LOOKS == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(params=["reference", "xla", "triton", "gfx942", "gfx950"])
def implementation(request):
    """Every implementation of an operator.

    "triton" runs in interpret mode on a CPU; gfx942 and gfx950 are "triton" too, its kernels as machine code of that
    architecture, executed by our interpreter.
    """
    if not request.param.startswith("gfx"):
        yield request.param
        return
    require_cdna("triton")
    with cdna.device(request.param):
        yield "triton"
