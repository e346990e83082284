"""Expected results in float64, and the errors of outputs against them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax import reference
from sparse_mla_jax.cases.case import FP8, KINDS
from sparse_mla_jax.ops.norm_rope import Section


def relative(got: Any, want: Any) -> float:
    """Norm of the error over the norm of `want`; infinite if an output is not finite."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want)) if np.isfinite(got).all() else math.inf


def attention_answer(
    q: Any, keys: np.ndarray, rows: np.ndarray, scale: float, value_dim: int, sinks: np.ndarray | None = None
) -> np.ndarray:
    """Softmax attention in float64: q[T, H, D], keys[N, D], rows[T, W] (-1 for no key) -> [T, H, value_dim]."""
    q, keys = np.asarray(q).astype(np.float64), keys.astype(np.float64)
    out = np.zeros((*q.shape[:2], value_dim))
    sink = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    for t, row in enumerate(rows):
        chosen = keys[row[row >= 0]]
        logits = scale * q[t] @ chosen.T
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        out[t] = weights @ chosen[:, :value_dim] / (weights.sum(axis=1) + np.exp(sink - top[:, 0]))[:, None]
    return out


def scores_answer(q: Any, keys: np.ndarray, weights: Any) -> np.ndarray:
    """Indexer scores: q[T, H, D], keys[T, N, D], weights[T, H] -> float64 [T, N]."""
    products = np.einsum("thd,tnd->thn", np.asarray(q).astype(np.float64), keys.astype(np.float64))
    return np.einsum("th,thn->tn", np.asarray(weights, np.float64), np.maximum(products, 0))


def score_error(want: np.ndarray) -> Callable[[Any], float]:
    """A function of scores [T, N]: largest error over the largest score; infinite for NaN, or if -inf is misplaced."""

    def error(got):
        got = np.asarray(got)
        if not (np.isneginf(got) == np.isneginf(want)).all() or np.isnan(got).any():
            return math.inf
        seen = np.isfinite(want)
        return float(np.abs(got[seen] - want[seen]).max() / np.abs(want[seen]).max())

    return error


# Half a unit in the last place of each cache type, relative to the value.
ROUNDING = dict(zip(KINDS, (2.0**-4, 2.0**-4, 2.0**-8, 2.0**-24)))


def entries_error(got: Any, want: np.ndarray, kind: str) -> float:
    """Largest error of entries [N, D] over the rounding error of the cache type; entries are of the order of 1."""
    allowed = ROUNDING[kind] * np.abs(want) + 5e-6
    if kind in FP8:
        # Half a subnormal step. A power-of-two scale is up to twice as large as necessary.
        allowed += 2.0**-10 / 224 * np.abs(want).max(axis=1, keepdims=True)
    error = np.abs(np.asarray(got).astype(np.float64) - want) / allowed
    return float(error.max()) if np.isfinite(error).all() else math.inf


def finished_answer(x: Any, part: Section, angles: Any, eps: float = 1e-6) -> np.ndarray:
    """Expected section of x[T, W], without cast and `factor`: float64 [T, heads, width]; angles float32 [T, pairs]."""
    mine = np.asarray(x).astype(np.float64)[:, part.start : part.start + part.columns]
    with jax.enable_x64(True):
        wide = jnp.asarray(mine.reshape(-1, part.heads, part.width))
        turned = jnp.asarray(np.asarray(angles).astype(np.float64))
        eps = eps if part.eps is None else part.eps
        how: Any = dict(rotated=part.rotated, interleaved=part.interleaved, eps=eps, dtype=jnp.float64)
        out = np.asarray(reference.norm_rope(wide, part.weight, part.bias, turned, **how)) * part.scale
    return out if part.gain is None else out * np.asarray(part.gain).astype(np.float64)[:, :, None]


def finished_error(part: Section, got: Any, want: np.ndarray) -> float:
    """Largest error of a finished section over the rounding error of its type; above 1 it is wrong.

    got: from `norm_rope`, [T, heads, width], or (codes, scales [T, heads]) for FP8; want: from `finished_answer`.
    """
    allowed, scales_error = (ROUNDING[part.dtype] + 1e-6) * np.abs(want) + 4e-6, 0.0
    if part.quantized:
        codes, scales = (np.asarray(a).astype(np.float64) for a in got)
        factor = 1.0 if part.factor is None else np.asarray(part.factor).astype(np.float64)
        largest = 448.0 if part.dtype == "float8_e4m3fn" else 224.0
        scale = np.maximum(np.abs(want).max(axis=-1), 1e-4) / largest
        scales_error = float(np.abs(scales / (scale * factor) - 1).max()) / 5e-6
        # Half a subnormal step.
        allowed, got = allowed + 2.0**-10 * scale[..., None], codes * scale[..., None]
    error = np.abs(np.asarray(got).astype(np.float64) - want) / allowed
    finite = np.isfinite(error).all() and math.isfinite(scales_error)
    return max(float(error.max()), scales_error) if finite else math.inf


def selected(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest scores of one row without NaN, ascending, ties to the lower column; all if k is larger.

    The method differs from every implementation: columns above the k-th largest, then the first ones equal to it.
    """
    if scores.size <= k:
        return np.arange(scores.size)
    least = np.partition(scores, scores.size - k)[scores.size - k]
    above, equal = scores > least, scores == least
    return np.flatnonzero(above | (equal & (np.cumsum(equal) <= k - above.sum())))


def exact_scores(q: Any, weights: Any, keys: Any) -> np.ndarray:
    """Indexer scores float64 [N] of one query q[H, D], weights[H], dequantised keys[N, D]."""
    q, weights, keys = (np.asarray(x).astype(np.float64) for x in (q, weights, keys))
    return weights @ np.maximum(q @ keys.T, 0)


def misplaced(scores: np.ndarray, chosen: np.ndarray, k: int) -> float:
    """How much the best score left out exceeds the worst chosen one; infinite unless k ascending columns are chosen."""
    wanted = min(k, scores.size)
    mine, rest = chosen[:wanted], chosen[wanted:]
    if (np.diff(mine) <= 0).any() or mine[0] < 0 or mine[-1] >= scores.size or (rest != -1).any():
        return math.inf
    others = np.delete(scores, mine)
    return max(0.0, float(others.max() - scores[mine].min())) if others.size else 0.0
