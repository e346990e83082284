"""gfx942 and gfx950 take turns: a case that both could run is a slow test on one of them.

The machine of a test function's first case follows from its name, and its other cases change machines in turn. So both
machines run half of the cases of every module, and `make test-all` runs all of them. Tests that are about a machine
take it as `arch` and run on both.
"""

import collections
import zlib
from collections.abc import Sequence

import pytest

from pallas_kernels.cdna import ARCHITECTURES


def resting(cases: Sequence[tuple[str, str, str]]) -> set[int]:
    """Numbers of the cases (function, what else it is given, machine) that are left to another machine."""
    machines: dict[tuple[str, str], dict[str, int]] = collections.defaultdict(dict)
    for number, (function, given, machine) in enumerate(cases):
        machines[function, given][machine] = number
    turns: collections.Counter[str] = collections.Counter()
    found = set()
    for (function, _), numbers in machines.items():
        if len(numbers) == len(ARCHITECTURES):
            chosen = ARCHITECTURES[(zlib.crc32(function.encode()) + turns[function]) % len(ARCHITECTURES)]
            turns[function] += 1
            found |= {number for machine, number in numbers.items() if machine != chosen}
    return found


def _case(item: pytest.Item) -> tuple[str, str, str] | None:
    """The case of a test of an operator's implementations that runs by default on one of the machines."""
    call = getattr(item, "callspec", None)
    machine = call and call.params.get("implementation")
    if machine not in ARCHITECTURES or item.get_closest_marker("slow"):
        return None
    function, _, case = item.nodeid.partition("[")
    return function, case.replace(machine, ""), machine


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases, before shards and `-m` ask for the mark."""
    found = [(item, case) for item in items if (case := _case(item))]
    for number in resting([case for _, case in found]):
        found[number][0].add_marker(pytest.mark.slow)
