"""Text that every Python installation has: the sources of its standard library, with whole modules held out."""

from __future__ import annotations

import pathlib
import sysconfig

# Whole modules, tests included, that are never trained on, in the order in which demos show them.
HELD_OUT = (
    "heapq",
    "textwrap",
    "fractions",
    "statistics",
    "configparser",
    "difflib",
    "calendar",
    "csv",
    "shlex",
    "graphlib",
    "sched",
    "colorsys",
    "bisect",
)
_NOT_STDLIB = ("site-packages", "dist-packages", "__pycache__")


def is_held_out(name: str) -> bool:
    """Whether path `name` (relative to the library, '/' between parts) belongs to a held-out module or to its tests."""
    parts = name.removesuffix(".py").split("/")
    return any(
        part == module or part == f"test_{module}" or part.startswith(f"test_{module}_")
        for part in parts
        for module in HELD_OUT
    )


def stdlib_sources(held_out: bool) -> list[tuple[str, bytes]]:
    """Sources of the running interpreter's standard library: (path relative to the library, bytes).

    Args:
      held_out: True gives the modules of `HELD_OUT`, in that order, for evaluation; False everything else (without
        site-packages, and without the tests of held-out modules), sorted by path, for training.

    Returns:
      An empty list if the installation has no sources (a zipped library).
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    if held_out:
        paths = [root / f"{module}.py" for module in HELD_OUT]
    else:
        paths = [
            path for path in sorted(root.rglob("*.py")) if not set(_NOT_STDLIB) & set(path.relative_to(root).parts)
        ]
        paths = [path for path in paths if not is_held_out(path.relative_to(root).as_posix())]
    return [(path.relative_to(root).as_posix(), path.read_bytes()) for path in paths if path.is_file()]
