"""The plan of the indexer score kernels."""

from __future__ import annotations

import dataclasses
import functools

from pallas_kernels.targets import CDNA, GFX950, Target, find
from pallas_kernels.tiles import power_of_two


@dataclasses.dataclass(frozen=True)
class IndexerPlan:
    """Static sizes of one launch.

    Attributes:
      key_block: keys of a matrix product, a power of two, at least 16. If it divides the page size, a block lies in one
        page, whose number is loaded once.
      token_block: queries that one program scores against the keys it holds, a power of two (contiguous keys).
      dot_tokens: queries of one matrix product, a power of two, at most token_block and the number of tokens; more
        than 1 only where head_block holds exactly the heads.
      key_steps: blocks of keys that one program walks over for its query (paged keys).
      head_block: query heads of a matrix product, a power of two, at least 16.
      keys_first: keys are the rows of the matrix product and heads its columns.
      num_warps: waves per program.
      num_stages: software pipelining depth of the loop over queries or blocks of keys.
    """

    key_block: int = 64
    token_block: int = 1
    dot_tokens: int = 1
    key_steps: int = 1
    head_block: int = 64
    keys_first: bool = False
    num_warps: int = 4
    num_stages: int = 1


# Programs per launch that keep 132 multiprocessors busy to the end, with a few programs each.
SHARED_PROGRAMS, PAGED_PROGRAMS = 1024, 2048


@functools.lru_cache(maxsize=1024)
def indexer_plan(
    *, tokens: int, heads: int, columns: int, itemsize: int, shared_keys: bool, target: Target | str
) -> IndexerPlan:
    """Heuristic plan; shared_keys: all tokens read the same keys, so a program holds a block for several tokens.

    itemsize: bytes of a factor in the products; 1 if FP8 is multiplied without decoding.
    """
    target = find(target)
    narrow = target in CDNA or itemsize == 4
    key_block = max(16, min(32 if itemsize == 4 else 64, power_of_two(columns)))
    head_block = max(16, min(16 if itemsize == 4 else 64, power_of_two(heads)))
    if narrow:
        token_block = min(8, power_of_two(tokens)) if shared_keys else 1
        # Keys as rows take a third to a half of the wave-instructions. Two waves on gfx942 would halve its occupancy.
        return IndexerPlan(
            key_block=key_block,
            token_block=token_block,
            head_block=head_block,
            keys_first=itemsize != 4,
            num_warps=2 if target == GFX950 and itemsize != 4 else 4,
        )
    if not shared_keys:
        steps = max(1, min(16, tokens * -(-columns // key_block) // PAGED_PROGRAMS))
        stages = 3 if steps > 1 else 1
        return IndexerPlan(
            key_block=key_block, key_steps=steps, head_block=head_block, keys_first=True, num_stages=stages
        )
    # Two queries per product: 128 columns keep tensor cores busier than 64. With wider blocks only one program fits.
    key_block = max(16, min(128 if itemsize == 1 else 64, power_of_two(columns)))
    token_block = power_of_two(max(1, min(64, tokens, tokens * -(-columns // key_block) // SHARED_PROGRAMS)))
    together = 2 if heads == head_block and min(tokens, token_block) >= 2 else 1
    return IndexerPlan(
        key_block=key_block,
        token_block=token_block,
        dot_tokens=together,
        head_block=head_block,
        keys_first=True,
        num_stages=3,
    )
