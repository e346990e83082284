"""Shards of the suite: disjoint, complete, the same everywhere; what has passed is not run again, what failed is."""

import pathlib
import re
import subprocess
import sys

import pytest
import run_shards
from support.shards import deal, parse
from support.turns import resting

TESTS = pathlib.Path(__file__).parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from support import distribution, shards

def pytest_addoption(pluginmanager):
    pluginmanager.register(shards)
    pluginmanager.register(distribution)
"""
MODULE = """
import pathlib, pytest, time

@pytest.mark.parametrize("n", range(7))
def test_quick(n): ...

@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.slow) if n % 2 else n for n in range(10)])
def test_some_slow(n): ...

@pytest.mark.slow
def test_fails_while_there_is_a_file():
    assert not (pathlib.Path(__file__).parent / "broken").exists()
"""


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository with a small suite; plugins are not needed there, and take long to import."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(MODULE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / ".gitignore").write_text(".test-all/\n__pycache__/\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder):
    git(folder, "add", ".")
    git(folder, "commit", "-q", "--allow-empty", "-m", "x")


def collected(folder, *options):
    done = subprocess.run(
        [*PYTEST, "--collect-only", *options], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return re.findall(r"^test_it\.py::.*$", done.stdout, re.MULTILINE)


# --- which test is in which shard
@pytest.mark.parametrize("count", [1, 3, 24])
def test_shards_are_balanced_and_follow_from_the_names(count):
    keys = [f"function {n % 50}" for n in range(1000)]
    shards = deal(keys, count)
    assert set(shards) == set(range(1, count + 1)) and shards == deal(keys, count)
    for key in set(keys):
        of_one = [shard for k, shard in zip(keys, shards) if k == key]
        assert max(map(of_one.count, of_one)) - -(-20 // count) == 0, "cases of one function are dealt out in turn"
    without = [(k, s) for k, s in zip(keys, shards) if k != "function 7"]
    assert deal([k for k, _ in without], count) == [s for _, s in without], "a function moves no other"


def test_shards_are_the_same_everywhere():
    """Python's own hash of a string differs from process to process."""
    assert deal(["a", "b", "a", "c"], 8) == [4, 2, 5, 8]


def test_every_test_is_in_one_shard(tree):
    parts = [set(collected(tree, f"--shard={n}/3")) for n in (1, 2, 3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 18
    slow = set(collected(tree, "--shard=1/3", "-m", "slow"))
    assert slow < parts[0] and len(slow) == 2


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "1/2/3"])
def test_what_is_no_shard(text):
    with pytest.raises(ValueError, match="expected one of 1/N to N/N"):
        parse(text)


def test_a_deadline_skips_and_names_the_rest(tree):
    done = subprocess.run([*PYTEST, "--deadline=0"], cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "18 tests not reached within 0 s" in done.stdout
    assert "test_it.py::test_quick: 7" in done.stdout and "18 skipped" in done.stdout.splitlines()[-1]


# --- workers
GROUPS = """
import os, pathlib, pytest

@pytest.mark.xdist_group("one")
@pytest.mark.parametrize("n", range(6))
def test_of_a_group(n):
    (pathlib.Path(__file__).parent / f"{os.environ['PYTEST_XDIST_WORKER']} {n}").touch()

@pytest.mark.parametrize("n", range(6))
def test_of_no_group(n): ...
"""


def test_a_group_runs_in_one_worker(tree):
    """Two seconds: versions of pytest and pytest-xdist that do not fit ignore groups, and then all is made twice."""
    (tree / "test_it.py").write_text(GROUPS)
    command = [*PYTEST, "-p", "xdist", "-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "12 passed" in done.stdout
    workers = [path.name.split() for path in tree.glob("gw*")]
    assert sorted(n for _, n in workers) == [*"012345"] and len({worker for worker, _ in workers}) == 1


# --- what has passed
def test_what_passed_is_not_run_again(tree, capfd):
    suites = {"one": PYTEST, "two, quick": [*PYTEST, "-m", "not slow"]}
    assert run_shards.run_all(tree, suites, 2, only=2) == 0
    said = capfd.readouterr().out
    assert said.count("== ") == 2 and "one: passed 2/2; not passed 1/2" in said
    assert run_shards.run_all(tree, suites, 2) == 0
    said = capfd.readouterr().out
    assert re.findall("== .*", said) == ["== one: shard 1/2", "== two, quick: shard 1/2"]
    assert "two, quick: passed 1/2, 2/2; not passed none" in said
    assert run_shards.run_all(tree, suites, 2) == 0
    assert "== " not in capfd.readouterr().out


def test_what_failed_is_not_recorded(tree, capfd):
    (tree / "broken").touch()
    assert run_shards.run_all(tree, {"one": PYTEST}, 1) == 1
    assert "one: passed none; not passed 1/1" in capfd.readouterr().out
    (tree / "broken").unlink()
    assert run_shards.run_all(tree, {"one": PYTEST}, 1) == 0


def test_records_are_of_one_state_of_the_tree(tree):
    states = [run_shards.state(tree)]
    assert run_shards.state(tree) == states[0]

    def changed():
        states.append(run_shards.state(tree))
        assert len(set(states)) == len(states)

    (tree / "new.py").write_text("1")
    changed()
    (tree / "new.py").write_text("2")
    changed()
    commit(tree)
    changed()
    (tree / "test_it.py").write_text(MODULE + "\n")
    changed()
    (tree / ".test-all").mkdir()
    (tree / ".test-all" / "x").touch()
    assert run_shards.state(tree) == states[-1]


def test_the_state_without_git(tree, monkeypatch):
    monkeypatch.setattr(run_shards, "git", lambda *_: None)
    before = run_shards.state(tree)
    (tree / ".test-all").mkdir()
    (tree / ".test-all" / "x").touch()
    assert run_shards.state(tree) == before
    (tree / "new.py").touch()
    assert run_shards.state(tree) != before


# --- slices
def test_every_slice_is_chosen_within_so_many_commits(tree):
    chosen = []
    for _ in range(3):
        number, why = run_shards.choose(tree, 3)
        chosen.append(number)
        assert "commits" in why
        commit(tree)
    assert sorted(chosen) == [1, 2, 3]


def test_a_slice_without_history(tree, tmp_path_factory, monkeypatch):
    commit(tree)
    shallow = tmp_path_factory.mktemp("shallow") / "it"
    git(tree, "clone", "-q", "--depth", "1", tree.as_uri(), str(shallow))
    assert run_shards.choose(shallow, 24) == (1, "a shallow clone does not know the number of commits")
    monkeypatch.setattr(run_shards, "git", lambda *_: None)
    assert run_shards.choose(tree, 24) == (1, "no git history here")


def test_a_slice_runs_slow_tests_and_fails_with_them(tree, capfd):
    assert run_shards.run_slice(tree, PYTEST, 1, 100.0) == 0
    said = capfd.readouterr().out
    assert said.startswith("slice 1/1 of the slow tests (1 commits), at most 100 s") and "6 passed" in said
    (tree / "broken").touch()
    assert run_shards.run_slice(tree, PYTEST, 1, 100.0) == 1
    assert run_shards.run_slice(tree, [*PYTEST, "-k", "quick"], 1, 100.0) == 0


def test_the_command(tree, monkeypatch, capfd):
    monkeypatch.setattr(run_shards, "ROOT", tree)
    command = " ".join(PYTEST)
    assert run_shards.main(["all", "--shard", "1/3", "--suite", f"it={command}"]) == 0
    assert "it: passed 1/3; not passed 2/3, 3/3" in capfd.readouterr().out
    assert run_shards.main(["slice", "--of", "2", "--deadline", "50", "--", *PYTEST]) == 0
    for wrong in (["all", "--shard", "4/3", "--suite", "a=b"], ["all", "--suite", "nothing"], ["all"]):
        with pytest.raises(SystemExit):
            run_shards.main(wrong)


def test_machines_take_turns():
    """One machine of each case that both could run, half of the cases each; what one machine alone runs stays."""
    both = [(function, f"{n}", arch) for function in ("a", "b") for n in range(6) for arch in ("gfx942", "gfx950")]
    cases = [*both, ("a", "alone", "gfx942"), ("c", "alone", "gfx950")]
    kept = [case for number, case in enumerate(cases) if number not in resting(cases)]
    assert kept[-2:] == cases[-2:]
    for function in ("a", "b"):
        mine = [case for case in kept[:-2] if case[0] == function]
        assert [n for _, n, _ in mine] == [*"012345"]
        machines = [arch for *_, arch in mine]
        assert machines[0] != machines[1] and machines == machines[:2] * 3
