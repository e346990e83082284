"""Draws sites, and finds sites of a list again in a tree in which code has moved."""

from __future__ import annotations

import difflib
import hashlib
import pathlib
import tomllib
from collections.abc import Callable, Container, Iterable

from mutation.sites import Site, from_record

# Faults of each room among 60.
SHARES = {"ops": 15, "layers": 9, "metadata": 4, "models": 9, "serving": 8, "kernels": 15}
# These come twice where others come once.
OFTEN = {"comparison", "bound", "mask", "scale", "clamp", "sign"}
# Sites that are this alike are taken for one; below it they were different ones wherever it was tried.
ALIKE = 0.7
EQUIVALENT = pathlib.Path(__file__).parent / "equivalent.toml"


def _rank(seed: int, *names: object) -> str:
    """A place in a random order that does not depend on what else is there."""
    return hashlib.sha256("|".join(map(str, (seed, *names))).encode()).hexdigest()


def ordered(sites: Iterable[Site], seed: int) -> list[Site]:
    """Sites of a room in the order in which they are drawn: kinds take turns, a statement comes once."""
    kinds: dict[str, list[Site]] = {}
    for site in sorted(sites, key=lambda site: _rank(seed, site.id)):
        kinds.setdefault(site.kind, []).append(site)
    turns = sorted(
        ((kind, turn) for kind in kinds for turn in range(2 if kind in OFTEN else 1)),
        key=lambda turn: _rank(seed, kinds[turn[0]][0].room, *turn),
    )
    drawn, statements = [], set()
    while any(kinds.values()):
        for kind, _ in turns:
            site = kinds[kind].pop(0) if kinds[kind] else None
            place = site and (site.path, site.function, site.statement)
            if site and place not in statements:
                statements.add(place)
                drawn.append(site)
    return drawn


def shares(count: int) -> dict[str, int]:
    """Faults of each room among `count`, by largest remainder."""
    exact = {room: count * share / sum(SHARES.values()) for room, share in SHARES.items()}
    whole = {room: int(x) for room, x in exact.items()}
    for room in sorted(exact, key=lambda room: whole[room] - exact[room])[: count - sum(whole.values())]:
        whole[room] += 1
    return whole


def draw(sites: list[Site], count: int, seed: int, *, without: Container[str] = ()) -> list[Site]:
    """`count` sites over all rooms; one whose id is in `without` gives up its place to the next of its room."""
    chosen = []
    for room, share in shares(count).items():
        order = ordered((site for site in sites if site.room == room), seed)
        chosen += [site for site in order if site.id not in without][:share]
    return chosen


def _agree(*names: str) -> Callable[[Site, Site], bool]:
    return lambda a, b: all(getattr(a, name) == getattr(b, name) for name in names)


# From strict to lenient: functions are renamed, then variables around the expression, then rooms are rearranged.
_LEVELS = [
    _agree("room", "function", "kind", "text", "new", "statement"),
    _agree("room", "function", "kind", "text", "new"),
    _agree("room", "kind", "text", "new", "statement"),
    _agree("kind", "text", "new", "statement"),
    _agree("room", "kind", "text", "new"),
]


def find(wanted: Site, sites: list[Site]) -> Site | None:
    """The site of a tree that is `wanted`, a site of a list; None where it is not found, or not for certain."""
    stem = pathlib.PurePath(wanted.path).stem
    for level, agree in enumerate(_LEVELS):
        found = [site for site in sites if agree(wanted, site)]
        same_file = [site for site in found if pathlib.PurePath(site.path).stem == stem]
        found = same_file or found
        if len(found) == 1:
            return found[0]
        if level == 0 and found:
            return next((site for site in found if site.occurrence == wanted.occurrence), found[0])
    return None


def equivalent_sites(sites: list[Site], path: pathlib.Path = EQUIVALENT) -> dict[str, str]:
    """Reason by id of the sites of a tree that change no result."""
    table = tomllib.loads(path.read_text()).get("mutant", []) if path.exists() else []
    reasons = {}
    for entry in table:
        site = find(from_record(entry), sites)
        if site is not None:
            reasons[site.id] = entry["reason"]
    return reasons


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def nearest(wanted: Site, sites: list[Site]) -> tuple[Site | None, float]:
    """The site of the same kind and room that is most like `wanted`, and how like it is, from 0 to 1."""

    def likeness(site: Site) -> float:
        weights = {"text": 0.4, "new": 0.2, "statement": 0.25, "function": 0.15}
        return sum(w * _ratio(getattr(wanted, name), getattr(site, name)) for name, w in weights.items())

    alike = [site for site in sites if (site.room, site.kind) == (wanted.room, wanted.kind)]
    best = max(alike, key=likeness, default=None)
    return best, 0.0 if best is None else likeness(best)
