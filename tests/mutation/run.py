"""The command: draws faults or reads a list of them, tries each, reports who noticed. See the package's docstring."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import difflib
import hashlib
import json
import pathlib
import queue
import signal
import sys
import tempfile
import threading

from mutation.edits import Source
from mutation.killers import modules
from mutation.sampling import ALIKE, draw, equivalent_sites, find, nearest, ordered
from mutation.sites import ROOMS, Site, find_sites, from_record
from mutation.trial import STOP, Limits, Outcome, attempt, copy_tree, fails_unbroken

HERE = pathlib.Path(__file__).resolve().parents[2]
RESULTS = HERE / ".mutants"
# Cheap rooms first: what a run that is stopped has found is most.
_ORDER = ["metadata", "serving", "models", "ops", "layers", "kernels"]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A site under the id that it has in the list, which a later tree may no longer give it.

    note: how it was found in the tree, if not by its name.
    """

    id: str
    site: Site
    note: str = ""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="mutation.run", description="Which faults do the tests notice?")
    parser.add_argument("--count", type=int, default=60, help="how many faults (60)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--tree", type=pathlib.Path, default=HERE, help="a checkout; it is copied, never changed")
    parser.add_argument("--sample", type=pathlib.Path, help="faults of this list in place of drawn ones")
    parser.add_argument("--save-sample", type=pathlib.Path, help="write the faults and what is known of them, and end")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="these only, again if known")
    parser.add_argument("--room", choices=list(ROOMS), help="faults of one room only")
    parser.add_argument("--list", action="store_true", help="print the faults and end")
    parser.add_argument("--report", action="store_true", help="print what is known and end")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time (1)")
    parser.add_argument("--limit", type=float, default=Limits.fault, help="seconds of processor time of a fault (360)")
    parser.add_argument("--hang", type=float, default=Limits.test, help="the same of one test, which then hangs (120)")
    return parser.parse_args(arguments)


def tree_key(tree: pathlib.Path) -> str:
    """Names a state of library and tests: results of another one do not count."""
    digest = hashlib.sha256()
    for folder in ("sparse_mla_jax", "pallas_kernels", "tests"):
        for file in sorted((tree / folder).rglob("*.py")):
            if "mutation" not in file.relative_to(tree).as_posix():
                digest.update(file.relative_to(tree).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _listed(records: list[dict], sites: list[Site]) -> list[Fault]:
    """Faults of a list in a tree: by name, else by likeness, else the next of the room in their place."""
    without, faults, gone = set(equivalent_sites(sites)), [], []
    for record in records:
        wanted = from_record(record)
        site, note = find(wanted, sites), ""
        if site is None:
            site, alike = nearest(wanted, sites)
            note = f"found by likeness ({alike:.2f}) to: {wanted.function}: {wanted.text}"
            if alike < ALIKE:
                gone.append(record)
                continue
        if site.id in without:
            gone.append(record)
            continue
        faults.append(Fault(record["id"], site, note))
    for record in gone:
        taken = without | {fault.site.id for fault in faults}
        room = ordered((site for site in sites if site.room == record["room"]), 0)
        site = next((site for site in room if site.id not in taken), None)
        if site is not None:
            note = (
                f"in place of {record['id']}, which is gone or changes nothing: {record['function']}: {record['text']}"
            )
            faults.append(Fault(site.id, site, note))
    return faults


def choose(options: argparse.Namespace, sites: list[Site]) -> list[Fault]:
    """Faults to try, cheap rooms first."""
    if options.sample:
        faults = _listed(json.loads(options.sample.read_text()), sites)
    else:
        drawn = draw(sites, options.count, options.seed, without=equivalent_sites(sites))
        faults = [Fault(site.id, site) for site in drawn]
        known = {fault.id for fault in faults}
        faults += [Fault(site.id, site) for site in sites if site.id in options.only and site.id not in known]
    faults = [f for f in faults if options.room in (None, f.site.room) and (not options.only or f.id in options.only)]
    return sorted(faults, key=lambda fault: _ORDER.index(fault.site.room))


def difference(tree: pathlib.Path, site: Site) -> str:
    """The fault as a diff."""
    old = (tree / site.path).read_text()
    new = Source(old).apply(site.edit)
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), site.path, site.path, lineterm="", n=2)
    return "\n".join(lines)


def load(folder: pathlib.Path) -> dict[str, Outcome]:
    """Stored outcomes by id."""
    return {
        file.stem: Outcome(**json.loads(file.read_text())["outcome"])
        for file in sorted(folder.glob("*.json"))
        if "outcome" in json.loads(file.read_text())
    }


def _store(folder: pathlib.Path, tree: pathlib.Path, fault: Fault, outcome: Outcome) -> None:
    record = fault.site.record() | {"id": fault.id, "diff": difference(tree, fault.site)}
    record |= {"modules": modules(tree, fault.site), "outcome": dataclasses.asdict(outcome)}
    part = folder / f"{fault.id}.part"
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.rename(folder / f"{fault.id}.json")


def _line(fault: Fault, outcome: Outcome | None) -> str:
    site = fault.site
    place = f"{fault.id} {site.room:8} {site.kind:10} {site.path}:{site.line} {site.function}"
    tests = "" if outcome is None else outcome.by or f"{outcome.tests} tests passed"
    result = f"\n         {outcome.result}: {tests}" if outcome else f"\n         {fault.note}".rstrip()
    return f"{place}\n         {site.text[:110]}  ->  {site.new[:110]}{result}"


def run(faults: list[Fault], tree: pathlib.Path, folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Tries the faults whose outcome is not known, `jobs` at a time, each in a copy of its own."""
    limits, lock = Limits(test=options.hang, fault=options.limit), threading.Lock()
    known = {} if options.only else load(folder)
    todo = [fault for fault in faults if fault.id not in known]
    print(f"{len(faults)} faults, {len(faults) - len(todo)} known already", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copies: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(max(1, min(options.jobs, len(todo)))):
            copies.put(pathlib.Path(place) / f"copy{i}")
            copy_tree(tree, pathlib.Path(place) / f"copy{i}")

        def one(numbered: tuple[int, Fault]) -> None:
            copy = copies.get()
            try:
                outcome = attempt(copy, numbered[1].site, limits)
            finally:
                copies.put(copy)
            with lock:
                _store(folder, tree, numbered[1], outcome)
                print(f"{numbered[0]}/{len(todo)} {_line(numbered[1], outcome)}, {outcome.seconds:.0f} s", flush=True)

        with concurrent.futures.ThreadPoolExecutor(max(1, options.jobs)) as pool:
            try:
                list(pool.map(one, enumerate(todo, 1)))
            except BaseException:
                STOP.set()
                pool.shutdown(cancel_futures=True)
                raise


def confirm(faults: list[Fault], tree: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Ids of faults whose test fails without them too; a test that passed once is not run again."""
    store = folder / "passes.txt"
    passes = set(store.read_text().splitlines()) if store.exists() else set()
    known, witnesses = load(folder), {}
    for fault in faults:
        if fault.id in known and known[fault.id].result == "noticed":
            by = known[fault.id].by
            witnesses[fault.id] = {by} if "::" in by else set(modules(tree, fault.site))
    tests = set().union(*witnesses.values())
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        copy = pathlib.Path(place) / "copy"
        copy_tree(tree, copy)
        bad = set(fails_unbroken(copy, sorted(tests - passes)))
    store.write_text("\n".join(sorted((passes | tests) - bad)) + "\n")
    return [name for name, needed in witnesses.items() if needed & bad]


def report(faults: list[Fault], known: dict[str, Outcome], bad: list[str]) -> bool:
    """Prints who noticed what; True when all faults are known and nine in ten were noticed."""
    done = [fault for fault in faults if fault.id in known]
    noticed = [f for f in done if known[f.id].noticed and f.id not in bad]
    for room in ROOMS:
        mine = [fault for fault in done if fault.site.room == room]
        print(f"{room:10} {sum(fault in noticed for fault in mine):3} of {len(mine):3}")
    hangs = sum(known[fault.id].result == "hang" for fault in done)
    print(f"{len(noticed)} of {len(done)} noticed ({hangs} of them as a test that does not end)", end="")
    print(f"; {len(faults) - len(done)} not tried" if len(done) < len(faults) else "")
    for name in bad:
        print(f"not counted: {name}, whose test fails without it too: {known[name].by}")
    for fault in done:
        if fault not in noticed:
            print(_line(fault, known[fault.id]))
    for fault in faults:
        if fault.note:
            print(f"{fault.id} {fault.note[:150]}")
    return len(done) == len(faults) and len(noticed) >= 0.9 * len(done)


def save_sample(path: pathlib.Path, faults: list[Fault], known: dict[str, Outcome]) -> None:
    """Writes the list, with the outcome of each where it is known."""
    rows = []
    for fault in faults:
        outcome = known.get(fault.id)
        row = fault.site.record() | {"id": fault.id}
        rows.append(row | ({"result": outcome.result, "by": outcome.by} if outcome else {}))
    path.write_text(json.dumps(rows, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Exit code: 0 when nine in ten were noticed, 1 otherwise."""
    options = parse(arguments)
    tree = options.tree.resolve()
    faults = choose(options, find_sites(tree))
    folder = RESULTS / tree_key(tree)
    if options.list:
        print("\n".join(_line(fault, None) for fault in faults))
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if options.save_sample:
        save_sample(options.save_sample, faults, load(folder))
        return 0
    bad: list[str] = []
    if not options.report:
        run(faults, tree, folder, options)
        bad = confirm(faults, tree, folder)
    good = report(faults, load(folder), bad)
    print(f"results: {folder.relative_to(HERE)}")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
