"""benchmarks/cdna_counts.json holds what the kernels execute now; `make counts` renews it."""

import json
import pathlib
import re
import runpy
import types

import pytest
from support import published

from pallas_kernels import cdna
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "cdna_counts.py"
counts = runpy.run_path(str(SCRIPT))
STORED = json.loads(SCRIPT.with_suffix(".json").read_text())


def test_the_list_is_complete():
    assert set(STORED) == {counts["key"](*case) for case in counts["cases"]()}


def cases():
    """All of the file; in the other FP8 type than the machine's own as slow tests."""
    for name, kind, arch in counts["cases"]():
        own = kind == published.native(catalogue.kernel_case(name), arch)
        marks = [published.group(name), *([] if own else [pytest.mark.slow])]
        yield pytest.param((name, kind, arch), id=counts["key"](name, kind, arch), marks=marks)


@pytest.mark.parametrize("case", list(cases()))
def test_counts_are_as_stored(case):
    measurement = published.measured(*case, counts["COMPILER"]).measurement
    assert counts["kept"](measurement) == STORED[counts["key"](*case)]


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
        assert int(row.split("|")[5]) == STORED[counts["key"](name, kind, arch)]["wave_instructions"], (name, arch)


# Wave-instructions of vLLM's one-pass decode kernel on the case `sparse_mla_v4`: Triton 3.6.0, 8 warps, 16 keys a step.
PEER = {"gfx942": 118_848, "gfx950": 88_352}


@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_cost_against_the_peer(arch):
    """Of 16 heads, as the peer's; gfx942 converts e4m3fnuz by itself, on gfx950 that is the foreign flavour."""
    fnuz, fn = (STORED[counts["key"]("sparse_mla_v4", kind, arch)]["wave_instructions"] for kind in FP8)
    assert fn <= 0.6 * PEER[arch]
    if arch == "gfx942":
        assert fnuz <= fn


@published.group("sparse_mla_v4")
def test_the_peer_has_as_many_heads():
    assert published.problem("sparse_mla_v4", FP8[0], None).args[0].shape[1] == 16
