"""Data parallel primitives (DPP): the lane that each lane reads from."""

from __future__ import annotations

import functools

import numpy as np

from pallas_kernels.cdna.interpreter.assembly import Instruction
from pallas_kernels.cdna.interpreter.machine import LANE, LANES


def dpp_sources(instruction: Instruction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per lane, each [64]: source lane; whether that is in range; whether row and bank masks enable the lane."""
    m = instruction.modifiers
    control = next(((k, str(v)) for k, v in m.items() if k in _DPP), None)
    if control is None:
        raise instruction.error(f"unknown DPP control; known are {', '.join(_DPP)}")
    return _dpp(*control, int(str(m.get("row_mask", "0xf")), 0), int(str(m.get("bank_mask", "0xf")), 0))


@functools.lru_cache(maxsize=256)
def _dpp(name: str, value: str, row_mask: int, bank_mask: int):
    lane, in_range = _DPP[name](value)
    enabled = (row_mask >> (LANE // 16) & 1 & (bank_mask >> (LANE % 16 // 4))).astype(bool)
    in_range = np.broadcast_to(in_range, (LANES,))
    return np.where(in_range, lane, 0), in_range, enabled


def _quad(value: str):
    pattern = np.array([int(x) for x in value[1:-1].split(",")])
    return (LANE & ~3) + pattern[LANE & 3], True


ROW = LANE & ~15


# Control -> (source lane, whether it is in range). A row is 16 lanes.
_DPP = {
    "quad_perm": _quad,
    "row_shl": lambda v: (LANE + int(v), LANE % 16 + int(v) < 16),
    "row_shr": lambda v: (LANE - int(v), int(v) <= LANE % 16),
    "row_ror": lambda v: (ROW + (LANE - int(v)) % 16, True),
    "row_newbcast": lambda v: (ROW + int(v), True),
    "row_share": lambda v: (ROW + int(v), True),
    "row_mirror": lambda v: (ROW + 15 - LANE % 16, True),
    "row_half_mirror": lambda v: ((LANE & ~7) + 7 - LANE % 8, True),
    "row_bcast": lambda v: (ROW - 1, LANE >= 16) if int(v) == 15 else (np.full(LANES, 31), LANE >= 32),
    "wave_shl": lambda v: (LANE + 1, LANE < 63),
    "wave_shr": lambda v: (LANE - 1, LANE >= 1),
    "wave_rol": lambda v: ((LANE + 1) % 64, True),
    "wave_ror": lambda v: ((LANE - 1) % 64, True),
}
