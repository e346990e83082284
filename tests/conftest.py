"""What every test module shares: the implementations under test, where fixtures lie, and how tests are distributed."""

import atexit
import collections
import gc
import itertools
import os
import pathlib
import shutil
import tempfile

# Decided before jax is imported anywhere: the tests are CPU tests, on whatever machine they run.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def share_compiled_programs():
    """Workers, and processes that tests start, take from a folder what another has compiled: a sixth of the time.

    The folder lives as long as the run; JAX_COMPILATION_CACHE_DIR names one that stays.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="sparse-mla-jax-programs-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


share_compiled_programs()

# In jax 0.11, XLA:CPU's older way to make loops of fusions takes 60 % of the time of the newer way. jax 0.12 has only
# the newer way and ignores this.
QUICK_FUSIONS = "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"

import jax  # noqa: E402
import pytest  # noqa: E402

# Before the first import of it: assertions in what test modules share are explained like their own.
pytest.register_assert_rewrite("support")

from support import distribution, long_tests, marks, shards, turns  # noqa: E402
from support.fixtures import fixtures as fixtures  # noqa: E402

from pallas_kernels import cdna  # noqa: E402


def pytest_addoption(parser, pluginmanager):
    """Our option, and those and the hooks of tests/support."""
    parser.addoption("--optimize", action="store_true", help="compile every program as well as XLA:CPU can")
    pluginmanager.register(shards)
    pluginmanager.register(distribution)
    # The last that is registered comes first.
    pluginmanager.register(turns)
    pluginmanager.register(long_tests)


def pytest_configure(config):
    """XLA:CPU optimises little, in workers and in processes that tests start too: half the time to compile.

    Tests ask what programs compute, with bounds that hold however they are compiled. `--optimize` has them compiled as
    users have them.
    """
    # Virtual devices for the tests of meshes; everything else runs on the first.
    jax.config.update("jax_num_cpu_devices", 8)
    if config.option.optimize:
        return
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    # Workers inherit it, and set it again.
    if QUICK_FUSIONS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_FUSIONS}".strip()


# jax forgets the oldest of 2048 traces, and a test that counts traces would see one twice. Every program that XLA:CPU
# compiles maps memory, and Linux gives a process 65530 mappings. Well before either, everything is dropped.
MOST_TRACES = 1000
MOST_MAPPINGS = 30_000
TESTS_BETWEEN_LOOKS = 20
_traces = collections.Counter()
_looks = itertools.count(1)


def count_trace(event, duration, **kwargs):
    """Counts what this process traces."""
    del duration, kwargs
    _traces[event] += 1


jax.monitoring.register_event_duration_secs_listener(count_trace)


def too_many():
    """Whether a worker that runs thousands of tests comes near one of the limits."""
    if _traces["/jax/core/compile/jaxpr_trace_duration"] > MOST_TRACES:
        return True
    maps = pathlib.Path("/proc/self/maps")
    return next(_looks) % TESTS_BETWEEN_LOOKS == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS


@pytest.fixture(autouse=True)
def drop_compiled_programs():
    """Between two tests, drops what has been traced and compiled where that is too much."""
    yield
    if too_many():
        _traces.clear()
        jax.clear_caches()
        gc.collect()


# --- implementations
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
    is marked `interpret`. Machines take turns, see tests/support/turns.py.
    """
    if "implementation" not in metafunc.fixturenames or named_by_hand(metafunc, "implementation"):
        return
    by_default = metafunc.definition.get_closest_marker("interpret") is not None
    interpreted = "triton" if by_default else marks.interpreted("triton")
    machines = cdna.ARCHITECTURES if marks.machine_code_runs() else ()
    metafunc.parametrize("implementation", ["reference", "xla", interpreted, *machines], indirect=True)


@pytest.fixture
def implementation(request):
    """Every implementation of an operator.

    "triton" runs in interpret mode on a CPU; gfx942 and gfx950 are "triton" too, its kernels as machine code of that
    architecture, executed by our interpreter.
    """
    with marks.running(request.param) as name:
        yield name
