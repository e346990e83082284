"""`python -m sparse_mla_jax bench [AREA]`: times every kernel, checks its result and compares it with its targets.

The sizes are those of `sparse_mla_jax.cases`. Times come from the device (see `device_timing`); ceilings are measured
first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparse_mla_jax._check import require
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8, Case, Work
from sparse_mla_jax.cases.catalogue import AREAS
from sparse_mla_jax.cases.inputs import nbytes
from sparse_mla_jax.ops import _dispatch
from sparse_mla_jax.tools.bench import report
from sparse_mla_jax.tools.bench.device_timing import (
    CUPTI,
    Ceilings,
    Timing,
    measure_ceilings,
    method,
    number_of_sets,
    time_calls,
    wall_time,
)
from sparse_mla_jax.tools.bench.model import STDOUT, writes_file
from sparse_mla_jax.tools.bench.peers import torch_topk
from sparse_mla_jax.tools.output import check_output, check_picture, whole_file

FLAVOURS = (*FP8, "bfloat16")
# Default number of timed calls of a case, and most timed calls of a peer.
REPEATS, PEER_REPEATS = 30, 5
# An XLA body that needs more temporary memory than this is not run.
PEER_BYTES = 16 << 30
# Launch kernels one by one; otherwise XLA launches a step as one CUDA graph.
NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
# Options of `bench [AREA]` only; `bench MODEL_DIR` refuses them.
OPTIONS = ("case", "flavour", "repeats", "shrink", "peers", "plot", "compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `bench [AREA]`. The default is None, so that `bench MODEL_DIR` can refuse them."""
    group = parser.add_argument_group(f"kernels (bench [{' | '.join(AREAS)}])")
    group.add_argument("--case", metavar="TEXT", help="only cases with this in their name")
    group.add_argument("--flavour", choices=FLAVOURS, help="only this type of caches (default: all that a case takes)")
    group.add_argument("--repeats", type=int, metavar="N", help=f"timed calls, the median counts (default {REPEATS})")
    group.add_argument(
        "--shrink", action=argparse.BooleanOptionalAction, help="small sizes (default: only where there is no GPU)"
    )
    group.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="also time the XLA body, jax.lax.top_k, and torch.topk where torch is installed (default: yes)",
    )
    group.add_argument("--plot", metavar="FILE", help="draw the times and targets (needs matplotlib)")
    group.add_argument("--compare", metavar="OLD.json", help="ratios to an earlier run; marks what became slower")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run.

    Attributes:
      repeats: timed calls per case.
      shrink: use small sizes, which have no targets.
      peers: also time other implementations of the same operator.
      implementation: of the operators, None for the best that runs here.
      ceilings: of this machine, measured in this run.
    """

    repeats: int
    shrink: bool
    peers: bool
    implementation: str | None
    ceilings: Ceilings

    @property
    def has_targets(self) -> bool:
        """Whether targets apply: they are kernel times at full sizes."""
        return method() == CUPTI and not self.shrink


# --- one case
class NotSupported(Exception):
    """The library does not support the case; the message is its reason."""


def _lowered(fn: Callable[..., Any], shapes: tuple[Any, ...], donated: int) -> Any:
    try:
        return jax.jit(fn, donate_argnums=tuple(range(donated))).lower(*shapes)
    except (ValueError, NotImplementedError) as error:
        raise NotSupported(_one_line(error)) from error


def _compiled(fn: Callable[..., Any], shapes: tuple[Any, ...], donated: int) -> Any:
    return _lowered(fn, shapes, donated).compile()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def _sets(work: Work, calls: int) -> list[tuple[Any, ...]]:
    """Argument sets of the calls, without the state."""
    shared = jax.block_until_ready(work.shared())
    held = nbytes(jax.eval_shape(lambda: work.each(0)))
    make = jax.jit(work.each)
    return [jax.block_until_ready((*shared, *make(n))) for n in range(number_of_sets(work.bytes, held, calls))]


def measure(case: Case, flavour: str, query: str, settings: Settings) -> dict[str, Any]:
    """Runs one case: checks a result, times the calls and its peers.

    Returns:
      A row of plain numbers and strings; `failure` is a reason, or None. `tools.bench.report` prints the fields.

    Raises:
      NotSupported: the library does not support the case.
    """
    work = catalogue.build(case, flavour, query, shrink=settings.shrink)
    targets = case if settings.has_targets else case.shrunk()
    shapes, donated = jax.eval_shape(work.arguments), len(jax.eval_shape(work.state))
    start = time.perf_counter()
    lowered = _lowered(functools.partial(work.fn, implementation=settings.implementation), shapes, donated)
    run = lowered.compile()
    compiled = time.perf_counter() - start
    sets, state = _sets(work, settings.repeats), work.state()

    out = jax.block_until_ready(run(*state, *sets[0]))
    in_place = all(leaf.is_deleted() for leaf in jax.tree.leaves(state)) if donated else None
    # The state was donated: make the same again for the check.
    error = work.error((*(work.state() if work.replays else ()), *sets[0]), out)
    failure = None if error <= work.bound else f"wrong: error {error:.2g} above {work.bound:.2g}"
    if in_place is False:
        failure = "the donated caches were copied"
    timing = time_calls(run, sets, calls=settings.repeats, state=tuple(out[:donated]) if donated else ())
    del out, state
    launched_singly = _launched_singly(case, lowered, sets, work, settings.repeats)
    waits = host_transfers(run.as_text()) if case.area == "step" and method() == CUPTI else None

    gbps, tflops = 1e-3 * work.bytes / timing.microseconds, 1e-6 * work.flops / timing.microseconds
    return {
        **_identity(case, flavour, query, settings.shrink),
        **_time_fields(timing),
        "wall_us_without_command_buffers": launched_singly,
        "compile_seconds": compiled,
        "bytes": work.bytes,
        "flops": work.flops,
        "gbps": gbps,
        "tflops": tflops,
        "percent_of_ceiling": settings.ceilings.percent(gbps, tflops),
        "reach": targets.reach,
        "floor": targets.floor,
        "at_most": targets.at_most,
        "verdict": verdict(timing.microseconds, targets.reach, targets.floor),
        "error": error if math.isfinite(error) else None,
        "error_bound": work.bound,
        "in_place": in_place,
        "host_transfers": waits,
        "failure": failure,
        "not_supported": None,
        "peers": _peers(case, work, sets, shapes, donated, settings) if settings.peers else {},
    }


def _launched_singly(case: Case, lowered: Any, sets: list[tuple[Any, ...]], work: Work, calls: int) -> float | None:
    """Wall-clock microseconds of a step, kernels launched one by one; None for other areas and other machines."""
    if case.area != "step" or method() != CUPTI:
        return None
    return wall_time(lowered.compile(NO_COMMAND_BUFFERS), sets, calls, work.state())


# Matches an operation of a compiled program that may need the host; groups: its name, its kind.
_OPERATION = re.compile(r"\s*(?:ROOT )?%?(\S+) = .*? (infeed|outfeed|send|recv|while|conditional|custom-call)\(")
# Operations that need the host only if their line matches: a callback as target, or a loop without known trip count.
_NEEDS_HOST = {
    "custom-call": re.compile(r'custom_call_target="[^"]*callback'),
    "while": re.compile(r"^(?!.*known_trip_count)"),
}


def host_transfers(program: str) -> list[str]:
    """Names of the operations of a compiled program (its text) that send data to the host or wait for it.

    These are infeeds, outfeeds, sends, receives, callbacks into Python, branches, and loops without a known trip count.
    For branches and loops, XLA:GPU reads the condition from the device, unless they are in a command buffer.
    """
    found = ((line, _OPERATION.match(line)) for line in program.split("\n"))
    return [m[1] for line, m in found if m and (m[2] not in _NEEDS_HOST or _NEEDS_HOST[m[2]].search(line))]


def _identity(case: Case, flavour: str, query: str, shrink: bool) -> dict[str, Any]:
    sizes = dict((case.shrunk() if shrink else case).sizes)
    return {"case": case.name, "area": case.area, "flavour": flavour, "query": query, "sizes": sizes}


def _time_fields(timing: Timing) -> dict[str, Any]:
    return {
        "us": timing.microseconds,
        "us_low": timing.low,
        "us_high": timing.high,
        "wall_us": timing.wall_microseconds,
        "launches": timing.launches or None,
        "kernels": [{"name": k.name, "launches": k.launches, "us": k.microseconds} for k in timing.kernels],
    }


def verdict(us: float, reach: float | None, floor: float | None) -> str:
    """ "reach" or "pass" if a time meets the target `reach` or `floor`, "FAIL" if it meets none, "" without targets."""
    if reach is not None and us <= reach:
        return "reach"
    if floor is not None and us <= floor:
        return "pass"
    return "FAIL" if reach is not None or floor is not None else ""


# --- peers
def _peers(
    case: Case, work: Work, sets: list[tuple[Any, ...]], shapes: tuple[Any, ...], donated: int, settings: Settings
) -> dict[str, float | str]:
    """Microseconds of each peer (another implementation of the same operator), or the reason why it was not timed."""
    calls = min(settings.repeats, PEER_REPEATS)

    def jax_peer(fn: Callable[..., Any]) -> float | str:
        run = _compiled(fn, shapes, donated)
        memory = run.memory_analysis()
        needed = getattr(memory, "temp_size_in_bytes", 0)
        if needed > PEER_BYTES:
            return f"needs {needed / 2**30:.0f} GiB"
        return time_calls(run, sets, calls=calls, state=work.state()).microseconds

    found: dict[str, Callable[[], float | str]] = {}
    if work.has_bodies and (settings.implementation or _dispatch.preferred()[0]) != "xla":
        found["xla"] = lambda: jax_peer(functools.partial(work.fn, implementation="xla"))
    if case.area == "topk" and len(shapes) == 1:
        k = (case.shrunk() if settings.shrink else case).sizes["k"]
        found["lax_top_k"] = lambda: jax_peer(lambda scores: jax.lax.top_k(scores, k)[1])
        if method() == CUPTI:
            rows, columns = shapes[0].shape
            found["torch_topk"] = lambda: torch_topk(rows, columns, k, calls=calls)
    times = {}
    for name, run in found.items():
        try:
            times[name] = run()
        except ModuleNotFoundError:
            continue
        except Exception as error:
            # A failing peer does not fail the case.
            times[name] = _one_line(error)
    return times


# --- the run
def relate(rows: Sequence[dict[str, Any]]) -> None:
    """Adds the fields that depend on other rows: `relation` to another case, `parts_us` of cases with the same work."""

    def time_of(name: str, row: dict[str, Any]) -> float | None:
        same = [r for r in rows if r["case"] == name and r.get("us") is not None]
        same = [r for r in same if r["flavour"] in ("", row["flavour"]) and r["query"] in ("", row["query"])]
        return same[0]["us"] if same else None

    for row in rows:
        case = catalogue.case(row["case"])
        if row.get("us") is None:
            continue
        parts = [time_of(name, row) for name in case.parts]
        row["parts_us"] = sum(p for p in parts if p) if parts and all(parts) else None
        row["relation"] = None
        if row["at_most"]:
            factor, name = row["at_most"]
            base = time_of(name, row)
            if base:
                kept = "pass" if row["us"] <= factor * base else "FAIL"
                row["relation"] = {"to": name, "ratio": row["us"] / base, "at_most": factor, "verdict": kept}


Variant = tuple[Case, str, str]


def variants(area: str | None, text: str | None, flavour: str | None) -> list[Variant]:
    """All (case, type of the caches, type of the indexer's queries) that match; None matches all.

    Raises:
      ValueError: nothing matches.
    """
    cases = catalogue.chosen(area, text)
    found = [
        (case, kind, query)
        for case in cases
        for kind, query in case.variants()
        if flavour is None or kind in ("", flavour)
    ]
    require(
        len(found) > 0, f"--flavour {flavour!r} is taken by none of {', '.join(c.name for c in cases)}; leave it out."
    )
    return found


def run_variants(
    variants: Sequence[Variant], settings: Settings, done: Callable[[dict[str, Any]], None]
) -> list[dict[str, Any]]:
    """Runs the variants and returns their rows; a failure is noted in its row. Calls `done` with each row."""
    rows: list[dict[str, Any]] = []
    for case, kind, query in variants:
        print(" ".join(x for x in (case.name, kind, query and f"queries {query}") if x), file=sys.stderr, flush=True)
        try:
            row = measure(case, kind, query, settings)
        except NotSupported as error:
            row = _without_time(case, kind, query, settings, "not_supported", str(error))
        except Exception as error:
            why = f"{type(error).__name__}: {_one_line(error)}"
            row = _without_time(case, kind, query, settings, "failure", why)
        rows.append(row)
        relate(rows)
        done(row)
    return rows


def _without_time(case: Case, flavour: str, query: str, settings: Settings, field: str, why: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "us": None,
        "failure": None,
        "not_supported": None,
        "verdict": "",
        "peers": {},
        "kernels": [],
    }
    return _identity(case, flavour, query, settings.shrink) | row | {field: why}


def run(arguments: argparse.Namespace, area: str | None, machine: dict[str, Any]) -> int:
    """The command `bench [AREA]`: `area` is one of AREAS, or None for all; `machine` goes into the report.

    Returns:
      1 if a case failed, gave a wrong result or missed a target, else 0.

    Raises:
      ValueError: options that do not fit; nothing has run then.
    """
    asked = variants(area, arguments.case, arguments.flavour)
    repeats = REPEATS if arguments.repeats is None else arguments.repeats
    require(repeats >= 1, f"--repeats is {repeats}; at least 1 is expected.")
    old = report.load(arguments.compare) if arguments.compare is not None else None
    if writes_file(arguments.json):
        check_output("--json", arguments.json)
    if arguments.plot is not None:
        check_picture("--plot", arguments.plot)
    on_cpu = jax.default_backend() == "cpu"
    shrink = on_cpu if arguments.shrink is None else arguments.shrink
    ceilings = measure_ceilings(calls=min(repeats, 10), small=on_cpu)
    settings = Settings(repeats, shrink, arguments.peers is not False, arguments.implementation, ceilings)
    document: dict[str, Any] = {
        "machine": machine,
        "method": method(),
        "shrunk": shrink,
        "repeats": repeats,
        "implementation": arguments.implementation,
        "ceilings": dataclasses.asdict(ceilings),
        "results": [],
    }

    def save(row: dict[str, Any]) -> None:
        # Save after every case, so that an interrupted run keeps its results.
        document["results"].append(row)
        if writes_file(arguments.json):
            with whole_file(arguments.json) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=1) + "\n")

    rows = run_variants(asked, settings, save)
    if arguments.json == STDOUT:
        print(json.dumps(document))
    else:
        print(report.report(document, old))
    if arguments.plot is not None:
        report.plot(document, arguments.plot)
    bad = report.failures(rows)
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0
