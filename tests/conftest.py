"""What every test module shares: the implementations under test, where fixtures lie, and how tests are distributed."""

import functools
import gc
import itertools
import os
import pathlib

# Decided before jax is imported anywhere: the tests are CPU tests, on whatever machine they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# Before the first import of it: assertions in what test modules share are explained like their own.
pytest.register_assert_rewrite("support")

from support import distribution, shards  # noqa: E402
from support.fixtures import fixtures as fixtures  # noqa: E402

from pallas_kernels import cdna  # noqa: E402
from pallas_kernels.cdna import toolchain  # noqa: E402


def pytest_addoption(pluginmanager):
    """Options and hooks of tests/support."""
    pluginmanager.register(shards)
    pluginmanager.register(distribution)


# Every program that XLA:CPU compiles maps memory, and Linux gives a process 65530 mappings: at more than these, all
# compiled programs are dropped between two tests.
MOST_MAPPINGS = 30_000
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


# --- implementations
@functools.cache
def machine_code_runs():
    """Whether kernels can be compiled for gfx942 and gfx950 and executed here."""
    return toolchain.available("triton") is None


def named_by_hand(metafunc, argument):
    """Whether the test's own `parametrize` gives values of the argument."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        if argument in (names.replace(",", " ").split() if isinstance(names, str) else names):
            return True
    return False


def pytest_generate_tests(metafunc):
    """Gives a test that asks for `implementation` every implementation of an operator.

    Interpret mode takes longest and checks least: where kernels run as machine code, it is a slow test unless the test
    is marked `interpret`.
    """
    if "implementation" not in metafunc.fixturenames or named_by_hand(metafunc, "implementation"):
        return
    by_default = not machine_code_runs() or metafunc.definition.get_closest_marker("interpret")
    interpreted = pytest.param("triton", marks=[] if by_default else [pytest.mark.slow])
    machines = cdna.ARCHITECTURES if machine_code_runs() else ()
    metafunc.parametrize("implementation", ["reference", "xla", interpreted, *machines], indirect=True)


@pytest.fixture
def implementation(request):
    """Every implementation of an operator.

    "triton" runs in interpret mode on a CPU; gfx942 and gfx950 are "triton" too, its kernels as machine code of that
    architecture, executed by our interpreter.
    """
    if not request.param.startswith("gfx"):
        yield request.param
        return
    with cdna.device(request.param):
        yield "triton"
