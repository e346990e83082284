"""The plan of the indexer score kernels."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.plans.attention import power_of_two


@dataclasses.dataclass(frozen=True)
class IndexerPlan:
    """Static sizes of one launch.

    Attributes:
      key_block: keys per program, a power of two, at least 16.
      token_block: queries that one program scores against the keys it holds.
      head_block: query heads per matrix product, a power of two, at least 16.
      num_warps: waves per program.
      num_stages: software pipelining depth.
    """

    key_block: int = 64
    token_block: int = 1
    head_block: int = 64
    num_warps: int = 4
    num_stages: int = 1


@functools.lru_cache(maxsize=1024)
def indexer_plan(
    *, tokens: int, heads: int, columns: int, itemsize: int, shared_keys: bool, target: str = "gpu"
) -> IndexerPlan:
    """Heuristic plan; shared_keys: all tokens read the same keys, so a program holds a block for several tokens."""
    float32 = itemsize == 4
    key_block = max(16, min(32 if float32 else 64, power_of_two(columns)))
    return IndexerPlan(
        key_block=key_block,
        token_block=max(1, min(8, tokens)) if shared_keys else 1,
        head_block=max(16, min(16 if float32 else 64, power_of_two(heads))),
    )
