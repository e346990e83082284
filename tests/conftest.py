"""What every test module shares: the implementations under test, and where fixtures lie."""

import os
import pathlib

# Decided before jax is imported anywhere: the tests are CPU tests, on whatever machine they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(params=["reference", "xla", "triton"])
def implementation(request):
    """Every implementation of an operator; "triton" runs in interpret mode on a CPU."""
    return request.param


@pytest.fixture
def fixtures():
    """The folder of checkpoints and arrays that tests compare with."""
    return FIXTURES
