"""The plan of the output projection's kernel."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import NVIDIA, Target, find
from pallas_kernels.tiles import power_of_two

# Sides of a matrix instruction's operands.
LEAST = 16
# Of a program's operands on their way: what NVIDIA's smallest machines have. Tiles for many tokens want 144 KiB, which
# an A100 has; steps of 32 need 96 and 6 % more time.
SHARED_BYTES = 96 * 1024
# Programs that keep an H200 busy, where several steps of each are on their way.
NVIDIA_PROGRAMS = 128


@dataclasses.dataclass(frozen=True)
class ProjectionPlan:
    """Static sizes of one launch; tokens, columns and step are powers of two, at least 16.

    Attributes:
      tokens: of one program.
      columns: of the result, of one program.
      step: values of a head that are multiplied at a time.
      num_warps: waves per program.
      num_stages: software pipelining depth.
    """

    tokens: int = 64
    columns: int = 64
    step: int = 64
    num_warps: int = 4
    num_stages: int = 2


def _step(kept: int, widest: int) -> int:
    """The widest step that divides the values before the rotated ones, or a narrow one that is masked."""
    widths = (n for n in (128, 64, 32, LEAST) if kept % n == 0 and n <= widest)
    return next(widths, min(32, max(LEAST, power_of_two(kept))))


@functools.lru_cache(maxsize=1024)
def projection_plan(
    *, tokens: int, groups: int, columns: int, kept: int, itemsize: int = 2, target: Target | str
) -> ProjectionPlan:
    """Heuristic plan for `tokens` tokens, `groups` products of `columns` columns, heads of `kept` unrotated values.

    Few tokens: the weights are what is read, by as many programs as there are units. Many: larger tiles read them less.
    """
    target = find(target)
    wanted = NVIDIA_PROGRAMS if target == NVIDIA else target.programs
    if target == NVIDIA and itemsize == 2 and groups * (tokens // 128) * (columns // 256) >= wanted:
        # One program of two groups of warps fills a multiprocessor.
        return ProjectionPlan(128, 256, _step(kept, 64), num_warps=8, num_stages=3)
    step = _step(kept, 256 // itemsize)
    block = max(LEAST, min(128 // itemsize, power_of_two(tokens)))
    width = 256 // itemsize
    while width > 2 * LEAST and groups * -(-columns // width) * -(-tokens // block) < wanted:
        width //= 2
    width = max(LEAST, min(width, power_of_two(columns)))
    if target != NVIDIA:
        # Waves without a tile of the result of their own repeat each other's.
        return ProjectionPlan(block, width, step, num_warps=min(4, block * width // LEAST**2))
    # 4 KiB of weights a step and program: several on their way keep the memory busy.
    room = SHARED_BYTES // ((block + width) * step * itemsize)
    return ProjectionPlan(block, width, step, num_stages=max(1, min(6, room)))
