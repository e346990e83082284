"""The plan of the kernel that finishes projections."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import CDNA, Target, find
from pallas_kernels.tiles import power_of_two

# Values of a tile per lane, unless that needs more than 8 waves. CDNA: more, since reductions across waves cost more.
LANE_VALUES, CDNA_LANE_VALUES = 8, 32


@dataclasses.dataclass(frozen=True)
class NormRopePlan:
    """Static sizes of one launch; a program finishes some heads of one token.

    Attributes:
      tile: values per program including padding, a power of two. A wider head is one program.
      num_warps: waves per program.
    """

    tile: int = 1024
    num_warps: int = 4

    def heads(self, heads: int, width: int) -> int:
        """Heads per program of a section of `heads` heads of `width` values, a power of two."""
        return max(1, min(power_of_two(heads), self.tile // power_of_two(width)))


@functools.lru_cache(maxsize=1024)
def norm_rope_plan(*, widest: int, target: Target | str) -> NormRopePlan:
    """Heuristic plan for sections whose widest head has `widest` values."""
    target = find(target)
    per_wave = target.wave * (CDNA_LANE_VALUES if target in CDNA else LANE_VALUES)
    tile = 1024
    num_warps = max(tile, power_of_two(widest)) // per_wave
    return NormRopePlan(tile, max(1, min(8, num_warps)))
