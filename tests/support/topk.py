"""Rows, oracle and checks of top_k, for every module that runs it."""

import numpy as np

from sparse_mla_jax.ops.topk import top_k
from support.equivalence import Operator, Same

COLUMNS = [1, 2047, 2048, 2049, 4097, 20000]
KS = [1, 64, 512, 1000, 2048]
ALL = 2**31 - 1


def mixture(*values):
    return lambda rng, n: rng.choice(np.array(values, np.float32), n)


def neighbours(rng, n):
    """Values that differ in the last bits of the mantissa only, of both signs."""
    bits = np.float32(1.25).view(np.int32) + rng.integers(-3, 4, n).astype(np.int32)
    return bits.view(np.float32) * rng.choice(np.array([-1, 1], np.float32), n)


def sparse(low, p):
    return lambda rng, n: np.where(rng.random(n) < p, rng.standard_normal(n), low).astype(np.float32)


KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n).astype(np.float32),
    "ties": lambda rng, n: np.round(rng.standard_normal(n) * 3).astype(np.float32),
    "equal": lambda rng, n: np.full(n, -1.5, np.float32),
    "zeros": mixture(0.0, -0.0),
    "zeros among others": mixture(0.0, -0.0, 0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30),
    "neighbours": neighbours,
    "NaN": mixture(np.nan),
    "NaN and -inf": mixture(np.nan, -np.inf, -np.nan),
    "NaN among numbers": sparse(np.nan, 0.3),
    "few above -inf": sparse(-np.inf, 0.01),
    "infinities": mixture(np.inf, -np.inf, np.nan, 0.0, 3.4028235e38, -3.4028235e38),
    "ascending": lambda rng, n: np.arange(n, dtype=np.float32) - 7,
    "descending": lambda rng, n: -np.arange(n, dtype=np.float32),
}


def cases(columns, k, rows, seed=0):
    """Batches of (scores, starts, lengths): every kind of row with every length, from column 0 and from later ones."""
    rng = np.random.default_rng([seed, columns, k])
    lengths = [-3, 0, 1, k - 1, k, k + 1, ALL]
    later = [0, 1, columns // 3, max(0, columns - k), columns - 1, columns]
    every = [(kind, length, shift) for kind in KINDS for length in lengths for shift in (False, True)]
    every += [every[i] for i in range(-len(every) % rows)]
    rng.shuffle(every)
    for first in range(0, len(every), rows):
        scores = np.empty((rows, columns), np.float32)
        starts, sizes = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for r, (kind, length, shift) in enumerate(every[first : first + rows]):
            # Outside its interval a row holds what would win, or spread, if it were read.
            scores[r] = rng.choice(np.array([np.inf, np.nan, 3e38, -np.inf], np.float32), columns)
            starts[r] = rng.choice(later) if shift else 0
            sizes[r] = int(length)
            end = min(columns, int(starts[r]) + max(0, int(length)))
            scores[r, starts[r] : end] = KINDS[kind](rng, columns)[: end - starts[r]]
        yield scores, starts, sizes


def oracle(scores, k, starts, lengths):
    """One row at a time, by a stable sort in float64."""
    out = np.full((len(scores), k), -1, np.int32)
    for row, values in enumerate(scores):
        start = min(max(int(starts[row]), 0), len(values))
        inside = values[start : start + max(0, int(lengths[row]))].astype(np.float64)
        inside[np.isnan(inside)] = -np.inf
        chosen = np.sort(np.argsort(-inside, kind="stable")[:k])
        out[row, : len(chosen)] = chosen
    return out


def choose(scores, k, starts, lengths, *, implementation=None):
    return top_k(scores, k, lengths, row_starts=starts, implementation=implementation)


select = Operator(choose, ("local",), {"local": Same()}, static=("k",), name="top_k")


def check_rows(columns, k, rows, implementation):
    for scores, starts, lengths in cases(columns, k, rows):
        got = select.check(implementation, oracle(scores, k, starts, lengths), scores, k, starts, lengths)
        assert got.dtype == np.int32
