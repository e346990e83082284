"""The plan of the sparse attention kernel: block sizes, key splits, warps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from pallas_kernels.targets import CDNA, GFX942, NVIDIA, Target, find
from pallas_kernels.tiles import power_of_two

# A split of fewer keys costs more time in merging than it saves.
MIN_SPLIT_KEYS = 256
# CDNA: columns of the widest keys whose queries and sums one wave holds. 1088 columns spilled 359 registers (gfx942,
# Triton 3.6.0), and 13 in two waves if they were FP8.
WAVE_COLUMNS = 576


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Static sizes of one launch.

    Attributes:
      head_block: heads per program, a power of two, at least 16 (the M side of a matrix instruction).
      key_block: keys per loop step, a power of two, at least 16. 32 keys spill registers on gfx942 (Triton 3.6.0).
      splits: programs that share the keys of a row. Their results are merged in a fixed order.
      shares: 0, or the number of equal splits that the keys of all rows together are cut into. Long rows then get more
        splits, at most `splits` (more than 1), so that programs have equal work although row lengths differ.
      tile: widest tile of a key, a power of two: in columns, or in words of four FP8 columns with "planes".
      exact_weights: multiply values by probabilities of 16 bits (two bfloat16 terms) instead of 8. With one term the
        error is 1.7e-3, as large as that of rounding the result to bfloat16.
      num_warps: waves per program.
      num_stages: software pipelining depth.
      form: the kernel: a file in `pallas_kernels/sparse_attention`. "fp8" multiplies FP8 keys by FP8 queries, "float16"
        multiplies keys converted to scaled float16. "planes" is the fallback for calls that they do not support.
      anchored: absent keys repeat a present one, so that no key passes through a select. "planes" only.
      fenced: on CDNA, issue all loads of a step's keys before the first key is used. To save registers, the compiler
        would otherwise wait for memory at every tile. "planes" only.
      half_parts: splits are stored as float16 with a power-of-two scale each, not as float32. Not with "planes".
    """

    head_block: int = 16
    key_block: int = 16
    splits: int = 1
    shares: int = 0
    tile: int = 128
    exact_weights: bool = True
    num_warps: int = 4
    num_stages: int = 1
    form: Literal["planes", "float16", "fp8"] = "planes"
    anchored: bool = False
    fenced: bool = False
    half_parts: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("planes", "float16", "fp8"):
            raise ValueError(f"AttentionPlan.form is {self.form!r}; expected 'planes', 'float16' or 'fp8'.")
        for name in ("head_block", "key_block", "tile"):
            n = getattr(self, name)
            if n < 16 or n != power_of_two(n):
                raise ValueError(f"AttentionPlan.{name} is {n}; expected a power of two, at least 16.")
        if self.splits < 1 or self.shares < 0 or ((self.shares or self.half_parts) and self.splits == 1):
            raise ValueError(
                f"AttentionPlan has splits {self.splits}, shares {self.shares} and half_parts {self.half_parts};"
                " expected splits of at least 1, and shares of more than 0 or half_parts only with more than one."
            )


@functools.lru_cache(maxsize=1024)
def attention_plan(
    *,
    tokens: int,
    heads: int,
    width: int,
    itemsize: int,
    fp8: bool = False,
    native: bool = False,
    key_bytes: int = 0,
    columns: int = WAVE_COLUMNS,
    ragged: bool = False,
    target: Target | str,
) -> AttentionPlan:
    """Heuristic plan for `tokens` rows of about `width` keys over all sources; itemsize 4 means float32 products.

    native: the "fp8" kernel supports the call. key_bytes: bytes of a key that it loads, without scales.
    columns: of a key.
    """
    target = find(target)
    if itemsize == 2 and target == NVIDIA and native:
        return _native_plan(tokens, heads, width, ragged, key_bytes)
    if itemsize == 2 and target == NVIDIA:
        return (_float16_plan if fp8 else _bfloat16_plan)(tokens, heads, width, ragged)
    programs = tokens * -(-heads // 16)
    resident = target.units * target.simds if itemsize == 2 and target in CDNA else target.programs
    wanted = power_of_two(max(1, resident // max(1, programs)))
    splits = max(1, min(wanted, width // MIN_SPLIT_KEYS, 16))
    if target not in CDNA:
        return AttentionPlan(splits=splits, tile=64 if itemsize == 4 else 128)
    # Use few waves: every wave repeats the scores and the index arithmetic. float32 products would spill in one wave.
    wide = columns > WAVE_COLUMNS
    if itemsize == 4:
        return AttentionPlan(splits=splits, num_warps=4 if wide else 2)
    # Decoded words move to the layout of a tensor core operand through LDS, unless the tile is narrow. A narrow tile
    # has no columns to share between waves.
    tile = 128 if not fp8 else 16 if target == GFX942 and not wide else 32
    num_warps = 1 if not wide else 4 if fp8 else 2
    # Anchor the keys. Selects on keys cost instructions on gfx942. On gfx950, with two sources, XLA:ROCm moves a
    # register for them.
    return AttentionPlan(splits=splits, tile=tile, num_warps=num_warps, anchored=True, fenced=True)


def _splits(programs: int, resident: int, ragged: bool, most: int) -> int:
    """Splits per row that fill the machine once. Ragged rows get twice as many, so that no long row finishes late."""
    wanted = 1 << max(0, (resident * (2 if ragged else 1) // max(1, programs)).bit_length() - 1)
    return max(1, min(wanted, most, 64))


def _shares(tokens: int, programs: int, resident: int) -> int:
    """Number of equal splits that the keys of all rows are cut into: their programs fill the machine in whole rounds.

    The last split of a row is half empty on average. If all rows have the same length, it is full.
    """
    rounds = -(-2 * programs // resident)
    most = resident * rounds * tokens // programs
    return min(most - 3 * tokens // 8, most // tokens * tokens)


def _native_plan(tokens: int, heads: int, width: int, ragged: bool, key_bytes: int) -> AttentionPlan:
    """Plan of the "fp8" kernel. Each of 132 multiprocessors holds two programs, or one of twice the size.

    Each of two programs has 64 keys and 16 heads; a single one has 128 keys and 32 heads.
    """
    # Keys of up to 576 bytes: two key blocks in shared memory gain more than 32 heads, which halve the decoding.
    wide = heads > 16 and key_bytes > 576
    block, resident, key_block = (32, 132, 128) if wide else (16, 264, 64)
    programs = tokens * -(-heads // block)
    blocks = width // key_block
    splits = _splits(programs, resident, ragged, blocks)
    uneven = ragged and splits > 1
    return AttentionPlan(
        head_block=block,
        key_block=key_block,
        splits=max(splits, min(4, blocks)) if uneven else splits,
        shares=_shares(tokens, programs, resident) if uneven else 0,
        # Narrow tiles keep more bits of a score, but with 32 heads they cost a quarter of the time.
        tile=128 if wide else 64,
        num_warps=8 if wide else 4,
        # 5 stages hold two key blocks in shared memory, if two programs fit. 3 stages hold one, as fast for few blocks.
        num_stages=5 if not wide and key_bytes <= 576 and blocks >= 2 * splits else 3,
        form="fp8",
        # A split of few keys stores as many bytes as it loads: halve them. With many keys the compiled loop gets worse.
        half_parts=splits > 1 and blocks <= 4 * splits,
    )


def _float16_plan(tokens: int, heads: int, width: int, ragged: bool) -> AttentionPlan:
    """Plan of the "float16" kernel. Each of 132 multiprocessors holds two programs of 4 warps, or one of 8 warps."""
    block = 16 if heads <= 16 else 32
    programs = tokens * -(-heads // block)
    # Few rows: wide programs in one round are faster than narrow ones.
    wide = block == 32 or 4 <= programs <= 8
    resident, key_block = (132, 64) if wide else (264, 32)
    splits = _splits(programs, resident, ragged, width // key_block)
    return AttentionPlan(
        head_block=block, key_block=key_block, splits=splits, num_warps=8 if wide else 4, form="float16"
    )


def _bfloat16_plan(tokens: int, heads: int, width: int, ragged: bool) -> AttentionPlan:
    """Plan for unquantised keys. Hardware copies them to shared memory, up to two blocks ahead; one program per SM."""
    block = 16 if heads <= 16 else 32
    splits = _splits(tokens * -(-heads // block), 132, ragged, width // 64)
    wide = block == 32
    return AttentionPlan(
        head_block=block,
        key_block=64,
        splits=splits,
        tile=128 if wide else 512,
        num_warps=8 if wide else 4,
        num_stages=2 if wide else 3,
        anchored=True,
    )
