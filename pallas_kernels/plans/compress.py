"""The plan of the compressor's kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import Target, find
from pallas_kernels.tiles import power_of_two


@dataclasses.dataclass(frozen=True)
class CompressPlan:
    """Static sizes of one launch; a program makes one entry.

    Attributes:
      block: tokens whose loads are in flight together.
      num_warps: waves per program.
    """

    block: int = 8
    num_warps: int = 4


@functools.lru_cache(maxsize=1024)
def compress_plan(*, rows: int, width: int, target: Target | str) -> CompressPlan:
    """Heuristic plan for entries of `width` values made of `rows` tokens: two values of each token per lane.

    Few windows close in a decode step, so the time of a program counts more than its total work. With half the lanes a
    program would execute a third fewer wave-instructions (gfx942, ratio 4), but each wave would execute more.
    """
    target = find(target)
    wave = target.wave
    num_warps = max(1, min(8, power_of_two(width) // (2 * wave)))
    return CompressPlan(16 if rows > 16 else 8, num_warps)
