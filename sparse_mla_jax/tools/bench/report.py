"""Reports of `bench`: text tables, a markdown table, a picture, and the comparison with an earlier run.

A document is the JSON of `bench --json FILE`: machine, method, ceilings and `results`, one row per case and flavour.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from typing import Any

from sparse_mla_jax._check import require
from sparse_mla_jax.tools.output import whole_file

# A case is marked as slower if its time grew by this factor.
SLOWER = 1.1
PEERS = {"xla": "XLA us", "lax_top_k": "lax.top_k us", "torch_topk": "torch.topk us"}


def load(path: str) -> dict[str, Any]:
    """Reads a document.

    Raises:
      ValueError: no such file, or not the JSON of `bench --json`.
    """
    require(os.path.isfile(path), f"{path!r} is not a file; give what `bench --json FILE` wrote.")
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path!r} is not valid JSON ({error}); give what `bench --json FILE` wrote.") from None
    known = isinstance(document, dict) and {"machine", "method", "ceilings", "results"} <= set(document)
    known = known and isinstance(document["machine"], dict) and _are_rows(document["results"])
    require(known, f"{path!r} does not hold kernel times; give what `bench [AREA] --json FILE` wrote.")
    return document


def _are_rows(rows: Any) -> bool:
    """Whether these are rows that `ratios` can compare."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in ("case", "flavour", "query"))
        and (row.get("us") is None or isinstance(row["us"], int | float))
        and isinstance(row.get("sizes"), dict)
        for row in rows
    )


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """The key that is unique to a row in its document."""
    return row["case"], row["flavour"], row["query"]


def kind(row: dict[str, Any]) -> str:
    """Type of the caches, and of the queries if they have a type of their own."""
    flavour, query = (row[name].removeprefix("float8_") for name in ("flavour", "query"))
    return ", ".join(x for x in (flavour, query and f"q {query}") if x)


def label(row: dict[str, Any]) -> str:
    """Readable name of a row."""
    return " ".join(x for x in (row["case"], kind(row)) if x)


def number(x: Any) -> str:
    """Formats a number with three significant digits, without exponent from 1e-3 on; text unchanged, None as ""."""
    if x is None or isinstance(x, str):
        return x or ""
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    digits = 2 - math.floor(math.log10(abs(x)))
    return f"{x:.{max(0, digits)}f}" if abs(x) >= 1e-3 else f"{x:.1e}"


def _measured(row: dict[str, Any], name: str) -> str:
    """A number of a row; "" if it has none, and for TFLOPS if the case has no matrix product."""
    return "" if name == "tflops" and not row.get("flops") else number(row.get(name))


def _peer(row: dict[str, Any], name: str) -> str:
    """A peer's time, or a dash if it could not be timed."""
    time = row["peers"].get(name)
    return "-" if isinstance(time, str) else number(time)


def _note(row: dict[str, Any]) -> str:
    notes = []
    if row["failure"]:
        notes.append(row["failure"])
    if row["not_supported"]:
        notes.append(f"not supported: {row['not_supported']}")
    relation = row.get("relation")
    if relation:
        notes.append(
            f"{relation['ratio']:.2f} x {relation['to']} (at most {relation['at_most']:g}): {relation['verdict']}"
        )
    if row.get("parts_us"):
        notes.append(f"parts {number(row['parts_us'])} us")
    text = "; ".join(notes)
    return text if len(text) <= 110 else f"{text[:110]}..."


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every row that failed, missed its targets, or took too many times as long as another."""
    found = []
    for row in rows:
        relation = row.get("relation") or {}
        if row["failure"]:
            found.append(f"{label(row)}: {row['failure']}")
        if row["verdict"] == "FAIL":
            target = row["floor"] if row["floor"] is not None else row["reach"]
            found.append(f"{label(row)}: FAIL, {number(row['us'])} us above {number(target)} us")
        if relation.get("verdict") == "FAIL":
            found.append(
                f"{label(row)}: FAIL, {relation['ratio']:.2f} x {relation['to']}, above {relation['at_most']:g} x"
            )
    return found


# --- text
def ratios(document: dict[str, Any], old: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """New time over old time, of rows that are in both documents with the same sizes."""
    before = {key(row): row for row in old["results"]}
    found = {}
    for row in document["results"]:
        other = before.get(key(row))
        if other and other["us"] and row["us"] and other["sizes"] == row["sizes"]:
            found[key(row)] = row["us"] / other["us"]
    return found


def area_table(rows: Sequence[dict[str, Any]], ratio: dict[tuple[str, str, str], float] | None = None) -> str:
    """The table of one area; `ratio` adds a column with the ratio to an earlier run."""
    from sparse_mla_jax.tools.tables import table

    peers = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    header = ["case", "flavour", "us", "launches", "GB/s", "TFLOPS", "% of ceiling", "reach", "floor", "target"]
    header += [PEERS[name] for name in peers] + ["error"] + (["new/old", ""] if ratio is not None else [])
    cells = []
    for row in rows:
        measured = [_measured(row, name) for name in ("us", "launches", "gbps", "tflops", "percent_of_ceiling")]
        line = [row["case"], kind(row), *measured, number(row.get("reach")), number(row.get("floor"))]
        line += [row["verdict"], *(_peer(row, name) for name in peers), number(row.get("error"))]
        if ratio is not None:
            change = ratio.get(key(row))
            line += [number(change), "slower" if change and change > SLOWER else ""]
        cells.append(line)
    # Notes follow after the columns, since they may be long. A column without an entry is left out.
    used = [c for c in range(len(header)) if c < 2 or any(line[c] for line in cells)]
    lines = table([header[c] for c in used], [[line[c] for c in used] for line in cells]).split("\n")
    notes = ["", "", *(_note(row) for row in rows)]
    return "\n".join(f"{line}  {note}".rstrip() for line, note in zip(lines, notes))


def gap_percent(us: float, wall_us: float) -> float:
    """Percentage of a call's wall-clock time without a kernel; negative if kernels were slower under the profiler."""
    return 100 * (1 - us / wall_us)


def _gaps(row: dict[str, Any]) -> str:
    """Text with the launch gaps of a row, its time per token and per layer, and its operations that need the host."""
    ways = {"": row["wall_us"], " without command buffers": row.get("wall_us_without_command_buffers")}
    gaps = [f"{gap_percent(row['us'], wall):.1f} %{way}" for way, wall in ways.items() if wall]
    words, sizes = [f"gaps {', '.join(gaps)}"], row["sizes"]
    if "batch" in sizes:
        words.append(f"{number(row['wall_us'] / sizes['batch'])} us a token")
    if sizes.get("layers", 1) > 1:
        launches, us = (number(row[name] / sizes["layers"]) for name in ("launches", "us"))
        words.append(f"{launches} launches and {us} us a layer")
    if row.get("host_transfers") is not None:
        words.append(f"host transfers: {', '.join(row['host_transfers']) or 'none'}")
    return "; ".join(words)


def kernel_table(row: dict[str, Any]) -> str:
    """The table of the kernels in one call of a row, slowest first."""
    from sparse_mla_jax.tools.tables import table

    rows = [(k["name"], "", k["launches"], number(k["us"])) for k in row["kernels"]]
    return (
        f"{label(row)}: {row['launches']} launches, {number(row['wall_us'])} us by wall clock, {_gaps(row)}\n"
        + table(["kernel", "", "launches", "us"], rows)
    )


def heading(document: dict[str, Any]) -> str:
    """Machine, method and ceilings in one line."""
    machine, ceilings = document["machine"], document["ceilings"]
    how = "kernel time by CUPTI" if document["method"] == "CUPTI" else f"by {document['method']}"
    return (
        f"{machine['device']}, jax {machine['jax']}; {how}, median of {document['repeats']} calls"
        f"{', shrunk sizes' if document['shrunk'] else ''}; ceilings {number(ceilings['read_gbps'])} GB/s read,"
        f" {number(ceilings['matmul_tflops'])} TFLOPS bfloat16"
    )


def report(document: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """Tables of all areas, of the kernels of the steps, and of the cases that are slower than in `old`."""
    rows = document["results"]
    ratio = None if old is None else ratios(document, old)
    parts = [heading(document)]
    if old is not None and old["machine"].get("device") != document["machine"].get("device"):
        parts.append(f"The earlier run is of another machine: {old['machine'].get('device')}.")
    for area in dict.fromkeys(row["area"] for row in rows):
        parts.append(f"{area}\n" + area_table([row for row in rows if row["area"] == area], ratio))
    parts += [kernel_table(row) for row in rows if row["area"] == "step" and row["kernels"]]
    if ratio is not None:
        slower = [f"{label(row)} {ratio[key(row)]:.2f} x" for row in rows if ratio.get(key(row), 0) > SLOWER]
        parts.append(f"slower than {SLOWER} times the earlier run: {', '.join(slower) or 'none'}")
    return "\n\n".join(parts)


# --- markdown
def markdown(document: dict[str, Any], *, area: str | None = None, text: str | None = None) -> str:
    """A markdown table of the rows that were timed.

    Args:
      document: from `load`.
      area: only rows of this area.
      text: only cases with this text in their name.

    Raises:
      ValueError: no row matches.
    """
    rows = [
        row for row in document["results"] if row["us"] and area in (None, row["area"]) and (text or "") in row["case"]
    ]
    require(len(rows) > 0, "no case was timed that fits; give another area or text.")
    peers = [name for name in PEERS if any(name in row["peers"] for row in rows)]
    header = ["case", "flavour", "µs", "GB/s", "TFLOPS", "% of ceiling", "reach µs", "floor µs"]
    header += [PEERS[name].replace("us", "µs") for name in peers]
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---'] * len(header))}|"]
    for row in rows:
        time = number(row["us"]) + (" (wrong)" if row["failure"] else "")
        cells = [row["case"], kind(row), time]
        cells += [_measured(row, name) for name in ("gbps", "tflops", "percent_of_ceiling", "reach", "floor")]
        lines.append(f"| {' | '.join([*cells, *(_peer(row, name) for name in peers)])} |")
    return "\n".join([f"{heading(document)}.", "", *lines])


# --- a picture
def plot(document: dict[str, Any], path: str) -> None:
    """Draws one bar per row, by area, with marks for targets and peers; the suffix of `path` is the file type."""
    from matplotlib.figure import Figure

    rows = [row for row in document["results"] if row["us"]]
    areas = list(dict.fromkeys(row["area"] for row in rows))
    require(len(rows) > 0, "no case was timed; there is nothing to draw.")
    counts = [sum(row["area"] == area for row in rows) for area in areas]
    figure = Figure(figsize=(11, 1.5 * len(areas) + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots(len(areas), 1, squeeze=False, height_ratios=[n + 2 for n in counts])[:, 0]
    marks = {"reach": ("|", "tab:green"), "floor": ("|", "tab:red"), "xla": (".", "tab:gray")}
    for area, axis in zip(areas, axes):
        mine = [row for row in rows if row["area"] == area]
        axis.barh(range(len(mine)), [row["us"] for row in mine], color="tab:blue", label="measured")
        for name, (marker, colour) in marks.items():
            values = [row["peers"].get(name) if name == "xla" else row[name] for row in mine]
            points = [(v, i) for i, v in enumerate(values) if isinstance(v, int | float)]
            if points:
                axis.scatter(*zip(*points), marker=marker, s=90, color=colour, label=name, zorder=3)
        axis.set_yticks(range(len(mine)), [label(row) for row in mine], fontsize=7)
        axis.set_ylim(len(mine) - 0.4, -0.6)
        axis.set_xscale("log")
        # Start bars at a power of ten, so that areas are comparable.
        axis.set_xlim(left=10 ** math.floor(math.log10(min(row["us"] for row in mine)) - 0.01))
        axis.set_title(area, loc="left")
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlabel("microseconds")
    figure.suptitle(heading(document), fontsize=8)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=130)
