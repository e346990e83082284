"""Parts of the suite: `--shard 3/8` selects one, the same on every machine; `--deadline` starts no test after it.

Cases of one test function are dealt out in turn, since they take about the same time. The shard of the first follows
from the function's name, so a new test moves no other function to another shard.
"""

import collections
import re
import time
import zlib
from collections.abc import Sequence

import pytest

_start = time.monotonic()


def parse(text: str) -> tuple[int, int]:
    """(3, 8) of "3/8".

    Raises:
      ValueError: anything else, or a shard that does not exist.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"shard is {text!r}; expected one of 1/N to N/N")
    return number, count


def deal(keys: Sequence[str], count: int) -> list[int]:
    """Shard (1 to `count`) of each test; tests of one key go to one shard after the other."""
    seen: collections.Counter[str] = collections.Counter()
    shards = []
    for key in keys:
        shards.append((zlib.crc32(key.encode()) + seen[key]) % count + 1)
        seen[key] += 1
    return shards


def _key(item: pytest.Item) -> str:
    """The test function; its slow cases are dealt out by themselves."""
    return f"{item.nodeid.split('[')[0]} {item.get_closest_marker('slow') is not None}"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shards")
    group.addoption("--shard", metavar="I/N", help="run only this part of the tests")
    group.addoption(
        "--deadline", type=float, metavar="SECONDS", help="start no test later than this; the others are skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.shard is not None:
        try:
            parse(config.option.shard)
        except ValueError as error:
            raise pytest.UsageError(f"--shard: {error}") from None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before `-m` and `-k` select, so that they do not change who is dealt what."""
    if config.option.shard is None:
        return
    number, count = parse(config.option.shard)
    shards = deal([_key(item) for item in items], count)
    config.hook.pytest_deselected(items=[item for item, shard in zip(items, shards) if shard != number])
    items[:] = [item for item, shard in zip(items, shards) if shard == number]


def _reason(config: pytest.Config) -> str:
    return f"not reached within {config.option.deadline:g} s"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.option.deadline
    if deadline is not None and time.monotonic() - _start > deadline:
        pytest.skip(_reason(item.config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Names what was not reached."""
    if config.option.deadline is None:
        return
    reason = _reason(config)
    late = [r.nodeid for r in terminalreporter.stats.get("skipped", []) if reason in str(r.longrepr)]
    if late:
        terminalreporter.section(f"{len(late)} tests {reason}")
        cases = collections.Counter(nodeid.split("[")[0] for nodeid in late)
        for function, number in sorted(cases.items()):
            terminalreporter.line(f"{function}: {number}")
