"""The plan of the kernel that merges the top-k of several parts."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import Target, find
from pallas_kernels.tiles import power_of_two


@dataclasses.dataclass(frozen=True)
class TopKMergePlan:
    """Static sizes of one launch, powers of two; lanes are num_warps * wave.

    Attributes:
      block: candidates of a part that one array holds.
      num_warps: waves per program.
      wave: lanes of a wave.
    """

    block: int
    num_warps: int
    wave: int = 32

    @property
    def lanes(self) -> int:
        """Lanes of a program."""
        return self.num_warps * self.wave


@functools.lru_cache(maxsize=1024)
def topk_merge_plan(*, parts: int, columns: int, target: Target | str) -> TopKMergePlan:
    """Heuristic plan: as many waves as give each lane 8 candidates, up to 16 waves, and at most a part's columns."""
    wave = find(target).wave
    width = max(wave, power_of_two(columns))
    num_warps = max(1, min(16, width // wave, power_of_two(parts) * width // (8 * wave)))
    return TopKMergePlan(min(width, 4 * num_warps * wave), num_warps, wave)
