"""The plan of the kernel that splits and merges residual streams."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import Target, find
from pallas_kernels.tiles import power_of_two

# Values of one stream per lane: two 16-byte loads of bfloat16. More waves do not help: the whole row is in flight with
# any number of waves, and every wave repeats the mixing matrices.
LANE_VALUES = 16
# Every wave of a program computes the mixing matrices: 4 tokens with 4 x 4 entries each fill a wave of 64.
MOST_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class HyperConnectionPlan:
    """Static sizes of one launch.

    Attributes:
      tokens: tokens per program, a power of two. The loop over them is sequential, except for the mixing matrices.
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
    # More than one token per program only if all compute units have work anyway.
    block = max(1, min(MOST_TOKENS, power_of_two(tokens // (4 * target.programs))))
    return HyperConnectionPlan(block, num_warps)
