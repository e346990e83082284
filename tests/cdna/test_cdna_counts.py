"""benchmarks/cdna_counts.json holds what the kernels execute now; `make counts` renews it."""

import json
import pathlib
import re
import runpy
import types

import pytest
from support import published

from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.tools.inspect.kernels import NATIVE

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "cdna_counts.py"
counts = runpy.run_path(str(SCRIPT))
STORED = json.loads(SCRIPT.with_suffix(".json").read_text())


def test_the_list_is_complete():
    assert set(STORED) == {counts["key"](*case) for case in counts["cases"]()}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=counts["key"](*case), marks=published.group(case[0])) for case in counts["cases"]()],
)
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
        kind = NATIVE[arch] if NATIVE[arch] in catalogue.kernel_case(name).kinds else ""
        assert int(row.split("|")[5]) == STORED[counts["key"](name, kind, arch)]["wave_instructions"], (name, arch)
