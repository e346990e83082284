"""Runs the tests on one fault, in a copy of the tree, under limits of processor time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

from mutation.edits import Source
from mutation.killers import modules, selections
from mutation.sites import Site

_TICKS = os.sysconf("SC_CLK_TCK")
_COPIED = ("sparse_mla_jax", "pallas_kernels", "tests", "examples", "benchmarks", "pyproject.toml", "README.md")
# One process, and the same examples of hypothesis each time.
PLUGIN_OPTIONS = ("-n", "0", "--hypothesis-seed=0")
_PASSED, _FAILED, _INTERRUPTED, _NOTHING = 0, 1, 2, 5
# A test that waits and takes no processor time is given this many times as much time by the clock.
_PATIENCE = 10
# Seconds.
_BETWEEN_LOOKS = 1.0
# Seconds of processor time before the first test begins.
_COLLECTION = 120.0

# Set where the command is interrupted: tests under way are ended, and what they made of a fault is not kept.
STOP = threading.Event()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds of processor time: of one test, above which it hangs, and of all tests of one fault."""

    test: float = 120.0
    fault: float = 360.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the tests made of a fault.

    Attributes:
      result: "noticed", "hang" (counts as noticed), "survived", "unfinished" (the limit came first: not noticed).
      by: the test that failed or hung.
      tests: how many tests passed before.
      seconds: by the clock.
      message: last lines of pytest's output.
    """

    result: str
    by: str
    tests: int
    seconds: float
    message: str = ""

    @property
    def noticed(self) -> bool:
        """Whether some test failed or did not end."""
        return self.result in ("noticed", "hang")


def copy_tree(tree: pathlib.Path, into: pathlib.Path) -> None:
    """What the tests of a tree need, without caches."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "mutation")
    for name in _COPIED:
        if (tree / name).is_dir():
            shutil.copytree(tree / name, into / name, ignore=ignore)
        elif (tree / name).exists():
            shutil.copy2(tree / name, into / name)


@contextlib.contextmanager
def broken(copy: pathlib.Path, site: Site):
    """The copy has the fault inside of the context. Raises SyntaxError where the fault is no Python."""
    file = copy / site.path
    text = file.read_text()
    changed = Source(text).apply(site.edit)
    compile(changed, site.path, "exec")
    file.write_text(changed)
    try:
        yield
    finally:
        file.write_text(text)


def _processor_time(session: int) -> float:
    """Seconds that the processes of a session have used, their ended children included; 0 where there is no /proc."""
    total = 0
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session:
                total += sum(map(int, fields[11:15]))
    return total / _TICKS


def _last_test(log: str) -> str:
    """The test that pytest -v named last."""
    found = re.findall(r"^(\S+\.py::.*?)(?: (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS).*)?$", log, re.MULTILINE)
    return found[-1].strip() if found else "collection"


@dataclasses.dataclass
class _Watch:
    """Decides when to stop: the test that runs now, what had been used when it began, for how long it has run."""

    limits: Limits
    spent: float
    test: str = ""
    began: float = 0.0
    waited: float = 0.0
    looked: float = dataclasses.field(default_factory=time.monotonic)

    def verdict(self, test: str, used: float) -> str:
        """Why to stop, "hang" or "unfinished"; an empty string to go on."""
        if test != self.test:
            self.test, self.began, self.waited = test, used, 0.0
        now = time.monotonic()
        # A long time between two looks is one in which this process itself did not run.
        self.waited, self.looked = self.waited + min(now - self.looked, _BETWEEN_LOOKS), now
        limit = self.limits.test if "::" in test else max(self.limits.test, _COLLECTION)
        if used - self.began > limit or self.waited > _PATIENCE * limit:
            return "hang"
        return "unfinished" if self.spent + used > self.limits.fault else ""


def _pytest(copy: pathlib.Path, arguments: list[str], watch: _Watch) -> tuple[int | None, str, str, float]:
    """One run: exit code (None if it was stopped), why it was stopped, its output, processor time."""
    for cache in (".hypothesis", ".pytest_cache"):
        shutil.rmtree(copy / cache, ignore_errors=True)
    log = copy / "mutation.log"
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-m", "not slow", "--tb=line", "--no-header"]
    command += ["-p", "no:cacheprovider", *PLUGIN_OPTIONS, *arguments]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}
    if "JAX_COMPILATION_CACHE_DIR" in (copy / "tests" / "conftest.py").read_text():
        # Most programs are those of the fault before.
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(copy.parent / "programs"))
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        used, why, pause = 0.0, "", 0.05
        while process.poll() is None and not why and not STOP.is_set():
            time.sleep(pause)
            pause = min(2 * pause, _BETWEEN_LOOKS)
            used = max(used, _processor_time(process.pid))
            why = watch.verdict(_last_test(log.read_text(errors="replace")), used)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if STOP.is_set():
        raise KeyboardInterrupt
    return (None if why else code), why, log.read_text(errors="replace"), used


def _passed(log: str) -> int:
    return len(re.findall(r"^\S+\.py::.* PASSED", log, re.MULTILINE))


def _tail(log: str) -> str:
    return "\n".join(line[:300] for line in log.splitlines()[-6:])


def attempt(copy: pathlib.Path, site: Site, limits: Limits) -> Outcome:
    """Shows a fault to the tests of its room until one of them fails.

    Raises:
      RuntimeError: pytest could not run.
    """
    began, spent, tests, log = time.monotonic(), 0.0, 0, ""
    files = modules(copy, site)
    with broken(copy, site):
        for selection in selections(site):
            watch = _Watch(limits, spent)
            code, why, log, used = _pytest(copy, ["-k", selection, *files], watch)
            spent, tests = spent + used, tests + _passed(log)
            seconds = round(time.monotonic() - began, 1)
            if why:
                return Outcome(why, _last_test(log), tests, seconds, _tail(log))
            if code not in (_PASSED, _FAILED, _INTERRUPTED, _NOTHING) and code >= 0:
                raise RuntimeError(f"pytest ended with {code} on {site.id}:\n{_tail(log)}")
            if code not in (_PASSED, _NOTHING):
                return Outcome("noticed", _last_test(log), tests, seconds, _tail(log))
    return Outcome("survived", "", tests, round(time.monotonic() - began, 1), _tail(log))


def fails_unbroken(copy: pathlib.Path, tests: list[str]) -> list[str]:
    """Which of the tests, or modules, fail without any fault: what they notice does not count."""
    limits, bad = Limits(test=1e6, fault=1e6), []
    cases, files = [x for x in tests if "::" in x], [x for x in tests if "::" not in x]
    if cases:
        _, _, log, _ = _pytest(copy, [f"--maxfail={len(cases) + 1}", *cases], _Watch(limits, 0.0))
        passed = set(re.findall(r"^(\S+\.py::.*?) PASSED", log, re.MULTILINE))
        bad = [test for test in cases if test not in passed]
    if files and _pytest(copy, ["--collect-only", *files], _Watch(limits, 0.0))[0] != _PASSED:
        bad += files
    return bad
