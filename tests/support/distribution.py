"""Which tests go to one worker, and in which order.

Tests that share what is dear to make (compiled programs of one model, an executed problem) are marked
`xdist_group("name")`, one mark for a module or one a test. With `-n 2 --dist loadgroup --no-loadscope-reorder` the
tests of a group run in one worker; groups go first, since a long one at the end would leave the other worker idle.
Without workers the order is pytest's own.
"""

import pytest


def _group(item: pytest.Item) -> str | None:
    mark = item.get_closest_marker("xdist_group")
    return None if mark is None else str(mark.args[0])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    first = {group: n for n, group in reversed([*enumerate(map(_group, items))])}
    place = {item: (group is None, first[group]) for item, group in zip(items, map(_group, items))}
    items.sort(key=place.__getitem__)
