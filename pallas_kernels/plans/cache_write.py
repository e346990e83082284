"""The plan of the cache write kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import Target, find
from pallas_kernels.tiles import power_of_two


@dataclasses.dataclass(frozen=True)
class CacheWritePlan:
    """Static sizes of one launch; a program writes one token.

    Attributes:
      scan: slots of other tokens that are compared per step, a power of two.
      num_warps: waves per program.
    """

    scan: int = 128
    num_warps: int = 4


@functools.lru_cache(maxsize=1024)
def cache_write_plan(*, tokens: int, width: int, target: Target | str) -> CacheWritePlan:
    """Heuristic plan for tokens whose widest row has `width` values: four values per lane."""
    target = find(target)
    wave = target.wave
    num_warps = max(1, min(4, power_of_two(width) // (4 * wave)))
    return CacheWritePlan(max(16, min(1024, power_of_two(tokens))), num_warps)
