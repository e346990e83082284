"""Draws a kernel's executed instructions, by class and along its assembly text. Needs the extra `plot`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pallas_kernels.cdna.execution import Counts
from pallas_kernels.cdna.interpreter.assembly import CLASSES, classify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart. Waits are grey.
COLOURS = dict(
    zip(CLASSES, ("#0072b2", "#d55e00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#e69f00", "#b3b3b3"), strict=True)
)
_ROW = 2.3  # inches of height for one kernel
_DARK = {"vector", "matrix", "memory read"}  # classes whose colour needs white text


def flame(counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rectangles along the kernel's text, per class, whose area is the number of executed wave-instructions.

    A basic block is as wide as its number of instructions and as high as the number of its executions by a wave.
    Within a block, instructions of one class are adjacent.

    Returns:
      For each of CLASSES: left edges and widths in instructions, heights in executions. Each is int64 with one element
      per block that has instructions of that class.
    """
    rectangles: dict[str, list[tuple[int, int, int]]] = {name: [] for name in CLASSES}
    start = 0
    for block, times in zip(counts.assembly.blocks, counts.per_block):
        names = [classify(i.opcode) for i in block.instructions]
        for name in CLASSES:
            if number := names.count(name):
                rectangles[name].append((start, number, int(times)))
                start += number
    out = {}
    for name, rows in rectangles.items():
        left, width, height = np.array(rows, np.int64).reshape(-1, 3).T
        out[name] = (left, width, height)
    return out


def picture(results: Sequence[tuple[str, Counts]], path: str | os.PathLike[str]) -> Figure:
    """Draws two charts per kernel: a bar of wave-instructions by class, and below it the flame along the text.

    Every kernel has its own axes, because totals differ by orders of magnitude. Its bar spans the full width.

    Args:
      results: label and counts of each kernel, drawn from top to bottom.
      path: file to write; its suffix selects the format (png, svg, pdf, ...).

    Returns:
      The figure. For result k, axes 2k hold the bar and axes 2k + 1 the flame. Each has one container per class.

    Raises:
      ValueError: `results` is empty.
      ImportError: matplotlib is not installed.
    """
    if not results:
        raise ValueError("results is empty; expected at least one (label, counts)")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.patches import Patch
    except ImportError as missing:
        raise ImportError("picture needs matplotlib: pip install 'sparse-mla-jax[plot]'") from missing
    height = _ROW * len(results) + 0.7
    figure = Figure(figsize=(11, height), layout=ConstrainedLayoutEngine(h_pad=0.07))
    FigureCanvasAgg(figure)
    ratios = [1.0, 3.2] * len(results)
    axes = figure.subplots(2 * len(results), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    for k, (label, counts) in enumerate(results):
        bar, along = axes[2 * k], axes[2 * k + 1]
        _draw_classes(bar, counts)
        bar.set_title(f"{label.replace(chr(10), ', ')}: {counts.total:,} wave-instructions", loc="left", fontsize=10)
        _draw_flame(along, counts)
    axes[-1].set_xlabel("instruction of the text, those of a class put together within a basic block", fontsize=8)
    handles = [Patch(color=COLOURS[name], label=name) for name in CLASSES]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(CLASSES), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    return figure


def _draw_classes(axes, counts: Counts) -> None:
    """Draws one bar over the full width: wave-instructions by class."""
    total, left = max(counts.total, 1), 0
    for name in CLASSES:
        number = counts.by_class[name]
        drawn = axes.barh([0], [number], left=[left], height=1, color=COLOURS[name], label=name)
        if number >= 0.06 * total:
            colour = "white" if name in _DARK else "black"
            axes.bar_label(drawn, [f"{number / total:.0%}"], label_type="center", color=colour, fontsize=8)
        left += number
    axes.set(xlim=(0, total), ylim=(-0.5, 0.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_flame(axes, counts: Counts) -> None:
    """Draws executions along the text, see `flame`."""
    for name, (left, width, height) in flame(counts).items():
        axes.bar(left, height, width=width, align="edge", color=COLOURS[name], linewidth=0, label=name)
    axes.set_xlim(0, max(len(counts.assembly.instructions), 1))
    axes.set_ylim(0, max(int(counts.per_block.max(initial=0)), 1) * 1.05)
    axes.set_ylabel("times\nexecuted", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
