"""The plan of the output projection's kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import NVIDIA, Target, find
from pallas_kernels.tiles import power_of_two

# Least side of a matrix instruction's operand.
LEAST = 16
# Shared memory for a program's operands in flight: what NVIDIA's smallest machines have. Tiles for many tokens need
# 144 KiB, which an A100 has. Steps of 32 would need 96 KiB, but 6 % more time.
SHARED_BYTES = 96 * 1024
# Programs that keep an H200 busy if several steps of each are in flight.
NVIDIA_PROGRAMS = 128


@dataclasses.dataclass(frozen=True)
class ProjectionPlan:
    """Static sizes of one launch; tokens, columns and step are powers of two, at least 16.

    Attributes:
      tokens: tokens per program.
      columns: columns of the result per program.
      step: values of a head per product.
      num_warps: waves per program.
      num_stages: software pipelining depth.
    """

    tokens: int = 64
    columns: int = 64
    step: int = 64
    num_warps: int = 4
    num_stages: int = 2


def _step(kept: int, widest: int) -> int:
    """The widest step up to `widest` that divides the `kept` unrotated values, else a narrow step that is masked."""
    widths = (n for n in (128, 64, 32, LEAST) if kept % n == 0 and n <= widest)
    return next(widths, min(32, max(LEAST, power_of_two(kept))))


@functools.lru_cache(maxsize=1024)
def projection_plan(
    *, tokens: int, groups: int, columns: int, kept: int, itemsize: int = 2, target: Target | str
) -> ProjectionPlan:
    """Heuristic plan for `tokens` tokens, `groups` products of `columns` columns, heads of `kept` unrotated values.

    With few tokens, time goes to loading the weights: use enough programs for all compute units. With many tokens,
    larger tiles load the weights fewer times.
    """
    target = find(target)
    wanted = NVIDIA_PROGRAMS if target == NVIDIA else target.programs
    if target == NVIDIA and itemsize == 2 and groups * (tokens // 128) * (columns // 256) >= wanted:
        # One program of two warpgroups fills a multiprocessor.
        return ProjectionPlan(128, 256, _step(kept, 64), num_warps=8, num_stages=3)
    step = _step(kept, 256 // itemsize)
    block = max(LEAST, min(128 // itemsize, power_of_two(tokens)))
    width = 256 // itemsize
    while width > 2 * LEAST and groups * -(-columns // width) * -(-tokens // block) < wanted:
        width //= 2
    width = max(LEAST, min(width, power_of_two(columns)))
    if target != NVIDIA:
        # At most one wave per 16 x 16 tile of the result: more waves would repeat each other's work.
        return ProjectionPlan(block, width, step, num_warps=min(4, block * width // LEAST**2))
    # A step of a program loads 4 KiB of weights: several steps in flight keep the memory busy.
    room = SHARED_BYTES // ((block + width) * step * itemsize)
    return ProjectionPlan(block, width, step, num_stages=max(1, min(6, room)))
