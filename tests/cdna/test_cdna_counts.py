"""benchmarks/cdna_counts.json holds what the kernels execute now; `make counts` renews it."""

import json
import pathlib
import re
import runpy
import types

import jax
import pytest
from support import published

from pallas_kernels import cdna
from pallas_kernels.cdna import toolchain
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "cdna_counts.py"
counts = runpy.run_path(str(SCRIPT))
STORED = json.loads(SCRIPT.with_suffix(".json").read_text())


def test_the_list_is_complete():
    assert set(STORED) == {counts["key"](*case) for case in counts["cases"]()}


def stored(compiler, name, kind, arch):
    """What the file keeps of a case as one compiler makes it."""
    entry = STORED[counts["key"](name, kind, arch)]
    return entry["triton"] if compiler == "triton" else {k: v for k, v in entry.items() if k != "triton"}


def cases():
    """All of the file; those that `make test` does not execute as slow tests."""
    for compiler in cdna.COMPILERS:
        for case in counts["cases"]():
            marks = published.marks(*case, compiler)
            yield pytest.param(compiler, case, id=f"{compiler} {counts['key'](*case)}", marks=marks)


@pytest.mark.parametrize(("compiler", "case"), list(cases()))
def test_counts_are_as_stored(compiler, case):
    """Of the release of jax that the file belongs to: another one's kernels may differ in an instruction."""
    measurement = published.measured(*case, compiler).measurement
    if toolchain.release(jax.__version__) != toolchain.JAX or toolchain.plugin() != toolchain.PLUGINS[0]:
        pytest.skip(f"the file belongs to jax {toolchain.JAX} and {toolchain.PLUGINS[0]}")
    assert counts["kept"](measurement) == stored(compiler, *case)


def test_counts_of_a_wrong_kernel_mean_nothing():
    """They are refused before anything else of the measurement is read."""
    measurement = types.SimpleNamespace(
        case="top_k",
        kind="",
        launch=types.SimpleNamespace(kernel=types.SimpleNamespace(arch="gfx942")),
        error=1.0,
        bound=0.0,
    )
    with pytest.raises(ValueError, match="top_k  on gfx942: error 1.00e"):
        counts["kept"](measurement)


def test_what_candidates_were_weighed_against_is_what_ships():
    """The tables of cdna_candidates.md: their first rows are the stored counts."""
    text = SCRIPT.with_name("cdna_candidates.md").read_text()
    tables = re.findall(r"^### (\w+) on (\w+) .*?^\| \*\*shipped\*\* \|(.*?)$", text, re.MULTILINE | re.DOTALL)
    assert len(tables) >= 2 * 12
    for name, arch, row in tables:
        kind = published.native(catalogue.kernel_case(name), arch)
        assert int(row.split("|")[5]) == stored("triton", name, kind, arch)["wave_instructions"], (name, arch)


def test_the_page_shows_the_file():
    """docs/performance.md has the table of the stored counts: `python benchmarks/cdna_counts.py --table` prints it."""
    assert counts["table"](STORED) in (SCRIPT.parents[1] / "docs" / "performance.md").read_text()


# Wave-instructions of vLLM's one-pass decode kernel on the case `sparse_mla_v4`: Triton 3.6.0, 8 warps, 16 keys a step.
PEER = {"gfx942": 118_848, "gfx950": 88_352}


@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_cost_against_the_peer(arch):
    """Of 16 heads, as the peer's; gfx942 converts e4m3fnuz by itself, on gfx950 that is the foreign flavour."""
    fnuz, fn = (stored("triton", "sparse_mla_v4", kind, arch)["wave_instructions"] for kind in FP8)
    assert fn <= 0.6 * PEER[arch]
    if arch == "gfx942":
        assert fnuz <= fn


@published.group("sparse_mla_v4")
def test_the_peer_has_as_many_heads():
    assert published.problem("sparse_mla_v4", FP8[0], None).args[0].shape[1] == 16
