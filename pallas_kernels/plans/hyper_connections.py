"""The plan of the kernel that splits and merges residual streams."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import Target, find
from pallas_kernels.tiles import power_of_two

# Values of one stream that a lane holds: two 16-byte loads of bfloat16. All of a row is in flight with any number of
# waves, and every one of them repeats the mixing matrices.
LANE_VALUES = 16
# Mixing matrices are computed by every wave of a program: that many tokens fill its lanes with 4 x 4 entries.
MOST_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class HyperConnectionPlan:
    """Static sizes of one launch.

    Attributes:
      tokens: per program, one after the other but for the mixing matrices; a power of two.
      num_warps: waves per program.
    """

    tokens: int = 1
    num_warps: int = 4


@functools.lru_cache(maxsize=1024)
def hyper_connection_plan(*, tokens: int, width: int, target: Target | str) -> HyperConnectionPlan:
    """Heuristic plan for `tokens` rows of streams of `width` values."""
    target = find(target)
    wave = target.wave
    num_warps = max(1, min(16, power_of_two(width) // (LANE_VALUES * wave)))
    # More than one where all units have work anyhow.
    block = max(1, min(MOST_TOKENS, power_of_two(tokens // (4 * target.programs))))
    return HyperConnectionPlan(block, num_warps)
