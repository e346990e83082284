"""benchmarks/cdna_counts.json holds what the kernels execute now; `make counts` renews it."""

import json
import pathlib
import runpy

import pytest
from cdna_support import require_cdna

from sparse_mla_jax import kernel_cases

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "cdna_counts.py"
counts = runpy.run_path(str(SCRIPT))
STORED = json.loads(SCRIPT.with_suffix(".json").read_text())


def test_the_list_is_complete():
    assert set(STORED) == {counts["key"](*case) for case in counts["cases"]()}


@pytest.mark.parametrize("case", counts["cases"](), ids=lambda c: counts["key"](*c))
def test_counts_are_as_stored(case):
    require_cdna(counts["COMPILER"])
    name, kind, arch = case
    assert counts["count"](kernel_cases.case(name), kind, arch) == STORED[counts["key"](*case)]
