"""The plan of the top-k kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.plans.attention import power_of_two


@dataclasses.dataclass(frozen=True)
class TopKPlan:
    """Static sizes of one launch.

    Attributes:
      block: columns per loop step, a power of two; a row that fits in one block is read once and stays in registers.
      num_warps: waves per program.
    """

    block: int = 4096
    num_warps: int = 8


@functools.lru_cache(maxsize=1024)
def topk_plan(*, columns: int) -> TopKPlan:
    """Heuristic plan: 8 columns per lane of a 64-wide wave, fewer waves for short rows."""
    block = max(64, min(4096, power_of_two(columns)))
    return TopKPlan(block=block, num_warps=max(1, min(8, block // 512)))
