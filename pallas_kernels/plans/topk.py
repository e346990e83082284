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

    block: int = 2048
    num_warps: int = 16


@functools.lru_cache(maxsize=1024)
def topk_plan(*, columns: int, target: str = "gpu") -> TopKPlan:
    """Heuristic plan: one block up to 4096 columns; beyond, 16 waves hide the reads and small blocks avoid spills."""
    block = max(64, power_of_two(columns))
    return TopKPlan(block=block, num_warps=max(1, block // 512)) if block <= 4096 else TopKPlan()
