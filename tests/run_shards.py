"""Runs the suite in shards and remembers which have passed; runs one slice of the long tests.

    python tests/run_shards.py all [--shard 3/8] --suite "jax 0.11.2=.venv/bin/python -m pytest -q -n 2"
    python tests/run_shards.py slice --of 32 --deadline 280 -- .venv/bin/python -m pytest -q -n 2

`all` runs the shards that have not passed yet at this state of the tree (commit, differences and new files), of every
suite, and says at the end which have passed. What passed is kept in .test-all/. `slice` runs a slice of the tests
marked `slow`, after the number of commits: another one after each commit.
"""

import argparse
import hashlib
import pathlib
import re
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
SHARDS = 8
NO_TESTS = 5  # pytest's exit code when nothing was selected


def git(root, *arguments):
    """What git prints, bytes; None without git, or outside of a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def state(root):
    """A hash of everything that a test could see: the commit, what differs from it, and files that git does not know.

    Without git: of all files that do not lie in a folder with a dot.
    """
    found = hashlib.sha256()
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        names = [p.relative_to(root) for p in root.rglob("*") if p.is_file()]
        names = [n for n in names if not any(part.startswith(".") or part == "__pycache__" for part in n.parts)]
    else:
        found.update(commit + (git(root, "diff", "HEAD", "--binary") or b""))
        new = git(root, "ls-files", "--others", "--exclude-standard", "-z") or b""
        names = [pathlib.Path(name.decode()) for name in new.split(b"\0") if name]
    for name in sorted(names):
        if (root / name).is_file():
            found.update(str(name).encode() + b"\0" + (root / name).read_bytes())
    return found.hexdigest()[:16]


# --- all
class Records:
    """Which shards have passed, in files."""

    def __init__(self, root, count):
        self.root, self.count = root, count

    def _path(self, key, suite, number):
        return self.root / ".test-all" / key / re.sub(r"[^\w.]+", "-", suite) / f"{number}-of-{self.count}"

    def passed(self, key, suite):
        return [n for n in range(1, self.count + 1) if self._path(key, suite, n).exists()]

    def add(self, key, suite, number):
        path = self._path(key, suite, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(time.strftime("%Y-%m-%d %H:%M:%S\n"))


def run_all(root, suites, count, only=None):
    """Runs what has not passed yet; returns 0 when all that was asked for has passed.

    suites: name -> command of pytest; only: number of the one shard to run.
    """
    records, key = Records(root, count), state(root)
    numbers = [only] if only else range(1, count + 1)
    try:
        for number in numbers:
            for suite, command in suites.items():
                if number in records.passed(key, suite):
                    continue
                print(f"== {suite}: shard {number}/{count}", flush=True)
                code = subprocess.run([*command, f"--shard={number}/{count}"], cwd=root).returncode
                if code in (0, NO_TESTS) and state(root) == key:
                    records.add(key, suite, number)
                elif code in (0, NO_TESTS):
                    print("files changed while it ran: not recorded as passed", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    complete = True
    for suite in suites:
        passed = records.passed(key, suite)
        missing = [n for n in range(1, count + 1) if n not in passed]
        complete = complete and not set(numbers) & set(missing)
        texts = [", ".join(f"{n}/{count}" for n in part) or "none" for part in (passed, missing)]
        print(f"{suite}: passed {texts[0]}; not passed {texts[1]}", flush=True)
    return 0 if complete else 1


# --- slice
def choose(root, count):
    """(number of the slice, 1 to `count`; why)."""
    commits = git(root, "rev-list", "--count", "HEAD")
    if commits is None:
        return 1, "no git history here"
    if git(root, "rev-parse", "--is-shallow-repository") != b"false\n":
        return 1, "a shallow clone does not know the number of commits"
    return int(commits) % count + 1, f"{int(commits)} commits"


def run_slice(root, command, count, deadline):
    """Runs one slice of the slow tests; returns pytest's exit code."""
    number, why = choose(root, count)
    print(f"slice {number}/{count} of the slow tests ({why}), at most {deadline:g} s", flush=True)
    options = ["-m", "slow", f"--shard={number}/{count}", f"--deadline={deadline:g}"]
    code = subprocess.run([*command, *options], cwd=root).returncode
    return 0 if code == NO_TESTS else code


# --- the command
def suite(text):
    """("jax 0.11.2", [words of the command]) of "jax 0.11.2=command"."""
    name, found, command = text.partition("=")
    if not found or not shlex.split(command):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=COMMAND")
    return name, shlex.split(command)


def shard(text):
    """(number or None, count) of "3/8" or "8" or nothing."""
    found = re.fullmatch(r"(?:(\d+)/)?(\d+)", text or str(SHARDS))
    number, count = (int(x) if x else None for x in found.groups()) if found else (0, 0)
    if count < 1 or (number is not None and not 1 <= number <= count):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, with I from 1 to N, or N")
    return number, count


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    every = commands.add_parser("all")
    every.add_argument(
        "--shard", type=shard, default=shard(""), metavar="I/N", help=f"only this one (default: {SHARDS}, all)"
    )
    every.add_argument("--suite", type=suite, action="append", required=True, metavar="NAME=COMMAND")
    one = commands.add_parser("slice")
    one.add_argument("--of", type=int, required=True, metavar="N")
    one.add_argument("--deadline", type=float, required=True, metavar="SECONDS")
    one.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if given.what == "slice":
        return run_slice(ROOT, given.command, given.of, given.deadline)
    number, count = given.shard
    return run_all(ROOT, dict(given.suite), count, number)


if __name__ == "__main__":
    sys.exit(main())
