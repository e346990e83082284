"""What every test module shares: the implementations under test, and where fixtures lie."""

import os
import pathlib

# Decided before jax is imported anywhere: the tests are CPU tests, on whatever machine they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from cdna_support import require_cdna

from pallas_kernels import cdna

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


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


@pytest.fixture
def fixtures():
    """The folder of checkpoints and arrays that tests compare with."""
    return FIXTURES
