"""The plan of the sparse attention kernel: block sizes, key splits, warps."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels._call import CDNA

# Programs that keep the machines at hand busy (132 to 304 compute units); more splits only add merging.
TARGET_PROGRAMS = 256
# A split shorter than this costs more in merging than it hides.
MIN_SPLIT_KEYS = 256


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Static sizes of one launch.

    Attributes:
      head_block: heads per program, a power of two, at least 16 (the M side of a matrix instruction).
      key_block: keys per loop step, a power of two, at least 16. 32 spill registers on gfx942 (Triton 3.6.0).
      splits: programs that share the keys of a row and are merged afterwards, in a fixed order.
      tile: widest column tile of unquantised keys, a power of two.
      exact_weights: multiply values by probabilities of 16 bits (two bfloat16 terms) instead of 8. One term alone costs
        an error of 1.7e-3, as much as rounding the result to bfloat16 does.
      num_warps: waves per program.
      num_stages: software pipelining depth.
    """

    head_block: int = 16
    key_block: int = 16
    splits: int = 1
    tile: int = 128
    exact_weights: bool = True
    num_warps: int = 4
    num_stages: int = 1


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


@functools.lru_cache(maxsize=1024)
def attention_plan(
    *, tokens: int, heads: int, width: int, itemsize: int, fp8: bool = False, target: str = "gpu"
) -> AttentionPlan:
    """Heuristic plan for `tokens` rows of about `width` keys in all sources; itemsize 4 means float32 products."""
    programs = tokens * -(-heads // 16)
    wanted = power_of_two(max(1, TARGET_PROGRAMS // max(1, programs)))
    splits = max(1, min(wanted, width // MIN_SPLIT_KEYS, 16))
    if itemsize == 4 and target in CDNA and not fp8:
        # 4 waves spill a few registers with two sources; with FP8 keys it is 8 that spill.
        return AttentionPlan(splits=splits, num_warps=8)
    if itemsize == 4:
        return AttentionPlan(splits=splits, tile=64)
    # CDNA: waves repeat each other's scores and index arithmetic; one wave of its own would spill on gfx942.
    return AttentionPlan(splits=splits, num_warps=2 if target in CDNA else 4)
