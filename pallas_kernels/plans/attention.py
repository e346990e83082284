"""The plan of the sparse attention kernel: block sizes, key splits, warps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from pallas_kernels.targets import CDNA, GFX942, NVIDIA, Target, find
from pallas_kernels.tiles import power_of_two

# A split shorter than this costs more in merging than it hides.
MIN_SPLIT_KEYS = 256


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Static sizes of one launch.

    Attributes:
      head_block: heads per program, a power of two, at least 16 (the M side of a matrix instruction).
      key_block: keys per loop step, a power of two, at least 16. 32 spill registers on gfx942 (Triton 3.6.0).
      splits: programs that share the keys of a row and are merged afterwards, in a fixed order.
      shares: 0, or how many parts of even size the keys of all rows would make together. A row then has as many as
        its length asks for, up to `splits` (more than 1), so that programs have like work where rows have not.
      tile: widest column tile of unquantised keys, and of FP8 keys that are multiplied as such; a power of two.
      exact_weights: multiply values by probabilities of 16 bits (two bfloat16 terms) instead of 8. One term alone costs
        an error of 1.7e-3, as much as rounding the result to bfloat16 does.
      num_warps: waves per program.
      num_stages: software pipelining depth.
      form: the kernel. "fp8" multiplies FP8 keys by FP8 queries, "float16" scaled float16 keys; each runs where it
        supports the call, "planes" everywhere else. See the files of that name in `pallas_kernels/sparse_attention`.
      anchored: absent keys repeat a present one, so that no key passes through a select. Of "planes" alone.
      fenced: all of a step's keys are asked for before the first is used, on CDNA, where the compiler would save
        registers by a wait for memory at every tile. Of "planes" alone.
      half_parts: splits of a row are handed on as float16 with a power of two each, not as float32. Not of "planes".
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
    ragged: bool = False,
    target: Target | str,
) -> AttentionPlan:
    """Heuristic plan for `tokens` rows of about `width` keys in all sources; itemsize 4 means float32 products.

    native: FP8 keys are such that NVIDIA's units multiply them; key_bytes: what of a key they read.
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
    # Waves repeat each other's scores and index arithmetic; one wave of float32 products would spill.
    if itemsize == 4:
        return AttentionPlan(splits=splits, num_warps=2)
    # Words reach the matrix operand's form through LDS unless their tile is narrow.
    tile = 128 if not fp8 else 16 if target == GFX942 else 32
    # Selects on keys cost instructions on gfx942, and on gfx950 a register that XLA:ROCm moves, with two sources.
    return AttentionPlan(splits=splits, tile=tile, num_warps=1, anchored=True, fenced=True)


def _splits(programs: int, resident: int, ragged: bool, most: int) -> int:
    """Parts of a row that fill the machine once; rows of different lengths are cut finer, so that none waits long."""
    wanted = 1 << max(0, (resident * (2 if ragged else 1) // max(1, programs)).bit_length() - 1)
    return max(1, min(wanted, most, 64))


def _shares(tokens: int, programs: int, resident: int) -> int:
    """Parts of even size into which the keys of all rows are cut, such that their programs are resident together.

    The last part of a row is half empty on average; where all rows are alike, it is full.
    """
    rounds = -(-2 * programs // resident)
    most = resident * rounds * tokens // programs
    return min(most - 3 * tokens // 8, most // tokens * tokens)


def _native_plan(tokens: int, heads: int, width: int, ragged: bool, key_bytes: int) -> AttentionPlan:
    """132 multiprocessors hold two programs of 64 keys and 16 heads, or one of 128 keys and 32 heads."""
    # Two blocks of keys in shared memory are worth more than keys decoded half as often.
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
        # Narrow tiles keep more bits of a score; with 32 heads they cost a quarter of the time.
        tile=128 if wide else 64,
        num_warps=8 if wide else 4,
        # 5 hold two blocks of keys in shared memory, if two programs have room for that; 3 hold one: as well for few.
        num_stages=5 if not wide and key_bytes <= 576 and blocks >= 2 * splits else 3,
        form="fp8",
        # Results of a part of few keys are as much to move as its keys; with many, the compiler makes a worse loop.
        half_parts=splits > 1 and blocks <= 4 * splits,
    )


def _float16_plan(tokens: int, heads: int, width: int, ragged: bool) -> AttentionPlan:
    """132 multiprocessors hold two programs of 4 warps each, or one of 8."""
    block = 16 if heads <= 16 else 32
    programs = tokens * -(-heads // block)
    # Few rows: wide programs of one round beat narrow ones.
    wide = block == 32 or 4 <= programs <= 8
    resident, key_block = (132, 64) if wide else (264, 32)
    splits = _splits(programs, resident, ragged, width // key_block)
    return AttentionPlan(
        head_block=block, key_block=key_block, splits=splits, num_warps=8 if wide else 4, form="float16"
    )


def _bfloat16_plan(tokens: int, heads: int, width: int, ragged: bool) -> AttentionPlan:
    """Keys go from memory to shared memory unseen, two blocks ahead; one program fills a multiprocessor."""
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
