"""The plan of the top-k kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import CDNA, Target, find
from pallas_kernels.tiles import power_of_two

# Most columns of a row that stays in registers, and columns per block of a longer row.
REGISTER_BLOCK = 8192
STREAM_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class TopKPlan:
    """Static sizes of one launch, powers of two; lanes are num_warps * wave.

    Attributes:
      block: columns per loop step, at least 4 * lanes; a row that fits into one block stays in registers.
      num_warps: waves per program.
      wave: lanes of a wave.
      groups: for a row of several blocks, the number of maxima that estimate the threshold, and the capacity of the
        list of columns that reach it; at least 2k and 4 * lanes, at most block. 0: selects by counting instead.
      run: neighbouring columns whose marks one lane reads, at least 32 or all.
      unroll: blocks whose loads are issued before the first is waited for; any number.
    """

    block: int
    num_warps: int
    wave: int = 32
    groups: int = 0
    run: int = 64
    unroll: int = 2

    @property
    def lanes(self) -> int:
        """Lanes of a program."""
        return self.num_warps * self.wave


@functools.lru_cache(maxsize=1024)
def topk_plan(*, columns: int, k: int, target: Target | str) -> TopKPlan:
    """Heuristic plan: as many waves as give each lane 8 columns, up to 16."""
    target = find(target)
    wave = target.wave
    block = max(4 * wave, min(REGISTER_BLOCK, power_of_two(columns)))
    if columns > block and (k <= STREAM_BLOCK // 2 or target in CDNA):
        # On CDNA the masks of 8 columns per lane would spill scalar registers.
        block = STREAM_BLOCK
    num_warps = max(1, min(16, block // (8 * wave) if columns <= block else 16))
    if columns <= block:
        return TopKPlan(block, num_warps, wave)
    lanes = num_warps * wave
    groups = max(power_of_two(2 * k), 4 * lanes)
    run = min(64, power_of_two(columns) // lanes)
    return TopKPlan(block, num_warps, wave, groups if groups <= block else 0, max(run, 8))
