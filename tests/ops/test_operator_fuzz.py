"""Seeded calls of operators with hostile arguments: the answer of float64, or a ValueError of ours; nothing else.

A call takes a problem with an answer by numpy, gives its integers extreme values and its arrays other forms (numpy,
lists, other types), and in every third case spoils one argument: another rank, size or type, or no array at all.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax.ops import attention, cache, fp8, indexer, ragged, router, topk

CALLS = 1000
WILD = (0, 1, -1, 5, 2**31 - 1, -(2**31), 2**31, 2**32 + 2, -(2**40), 2**62)
NAMES = ("xla", "reference", "triton", None)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call fn(*args) and its answer.

    Attributes:
      fn: of args and implementation=.
      args: numpy arrays.
      want: float64 or integers, or a pytree of them.
      atol: largest difference.
    """

    fn: Callable[..., Any]
    args: tuple[np.ndarray, ...]
    want: Any
    atol: float = 1e-4


def integers(rng, high, *shape):
    """Small numbers, some of them wild."""
    x = rng.integers(-1, high + 1, shape)
    return np.where(rng.random(shape) < 0.2, rng.choice(np.array(WILD), shape), x)


def floats(rng, *shape):
    """Normal numbers; in a tenth of the arrays, zeros and large ones among them."""
    x = rng.standard_normal(shape).astype(np.float32)
    return (
        np.where(rng.random(shape) < 0.1, rng.choice(np.float32([0, -0.0, 30, -30]), shape), x)
        if rng.random() < 0.1
        else x
    )


def bounds(starts, lengths, columns):
    first = np.clip(starts, 0, columns)
    return first, np.minimum(np.clip(lengths, 0, columns), columns - first)


def top_k(rng):
    scores = floats(rng, 3, 11)
    scores[rng.random(scores.shape) < 0.2] = rng.choice([np.nan, np.inf, -np.inf, 1.0])
    starts, lengths = integers(rng, 11, 3), integers(rng, 11, 3)
    want = np.full((3, 4), -1)
    for r, (first, count) in enumerate(zip(*bounds(starts, lengths, 11))):
        row = np.where(np.isnan(scores[r]), -np.inf, scores[r])[first : first + count]
        best = np.sort(np.argsort(-row, kind="stable")[:4])
        want[r, : len(best)] = best
    return Problem(lambda s, a, n, **how: topk.top_k(s, 4, n, row_starts=a, **how), (scores, starts, lengths), want, 0)


def scores(rng):
    q, keys, weights = floats(rng, 3, 2, 8), floats(rng, 9, 8), floats(rng, 3, 2)
    starts, lengths = integers(rng, 9, 3), integers(rng, 9, 3)
    first, count = bounds(starts, lengths, 9)
    dots = np.maximum(np.einsum("thd,nd->thn", q.astype(np.float64), keys), 0)
    column = np.arange(9)
    inside = (column >= first[:, None]) & (column < (first + count)[:, None])
    want = np.where(inside, np.einsum("thn,th->tn", dots, weights), -np.inf)
    return Problem(
        lambda q, k, w, a, n, **how: indexer.indexer_scores(q, k, None, w, row_starts=a, row_lengths=n, **how),
        (q, keys, weights, starts, lengths),
        want,
        1e-2,
    )


def paged_scores(rng):
    keys, q, weights = floats(rng, 12, 8), floats(rng, 3, 2, 8), floats(rng, 3, 2)
    table, requests, lengths = integers(rng, 4, 2, 2), integers(rng, 1, 3), integers(rng, 8, 3)
    want = np.full((3, 8), -np.inf)
    for t in range(3):
        for p in range(int(np.clip(lengths[t], 0, 8)) if 0 <= requests[t] < 2 else 0):
            page = table[requests[t], p // 4]
            if 0 <= page < 3:
                want[t, p] = weights[t] @ np.maximum(q[t].astype(np.float64) @ keys[page * 4 + p % 4], 0)

    def call(keys, q, weights, table, requests, lengths, **how):
        empty = cache.PagedIndexCache.create(3, 4, dim=8, dtype="float32")
        stored = cache.write_index(empty, keys, np.arange(12), **how)
        return indexer.paged_indexer_scores(q, weights, stored, table, requests, lengths, max_length=8, **how)

    return Problem(call, (keys, q, weights, table, requests, lengths), want, 1e-2)


def sparse_mla(rng):
    q, keys, sinks, rows = floats(rng, 3, 2, 8), floats(rng, 10, 8), floats(rng, 2), integers(rng, 10, 3, 6)
    out, lse = np.zeros((3, 2, 6)), np.full((3, 2), -np.inf)
    for t in range(3):
        own = keys[[s for s in rows[t] if 0 <= s < 10]].astype(np.float64)
        if len(own):
            logits = 0.3 * q[t].astype(np.float64) @ own.T
            lse[t] = np.logaddexp.reduce(logits, axis=1)
            share = np.exp(lse[t] - np.logaddexp(lse[t], sinks))
            out[t] = np.exp(logits - lse[t][:, None]) @ own[:, :6] * share[:, None]

    def call(q, keys, sinks, rows, **how):
        return attention.sparse_mla(q, keys, rows, sm_scale=0.3, value_dim=6, sinks=sinks, return_lse=True, **how)

    return Problem(call, (q, keys, sinks, rows), (out, lse), 2e-2)


def write_and_gather(rng):
    latent, rope, slots, seen = floats(rng, 4, 8), floats(rng, 4, 4), integers(rng, 8, 4), integers(rng, 8, 5)
    stored = np.zeros((8, 12))
    for t, slot in enumerate(slots):
        if 0 <= slot < 8:
            stored[slot] = np.concatenate([latent[t], rope[t]])
    want = np.where(((seen >= 0) & (seen < 8))[:, None], stored[np.clip(seen, 0, 7)], 0)

    def call(latent, rope, slots, seen, **how):
        empty = cache.PagedKVCache.create(2, 4, latent_dim=8, rope_dim=4, group_size=8, dtype="float32")
        return cache.gather(cache.write(empty, latent, rope, slots, **how), seen, dtype="float32")

    return Problem(call, (latent, rope, slots, seen), want, 0)


def slots(rng):
    positions, requests, table = integers(rng, 9, 3, 4), integers(rng, 2, 3), integers(rng, 9, 2, 2)
    want = np.full((3, 4), -1)
    for t in range(3):
        for w, p in enumerate(positions[t]):
            page = table[requests[t], p // 4] if 0 <= requests[t] < 2 and 0 <= p < 8 else -1
            want[t, w] = page * 4 + p % 4 if 0 <= page < 2**29 else -1
    return Problem(lambda *x, **_: ragged.slots_from_positions(*x, page_size=4), (positions, requests, table), want, 0)


def pack(rng):
    rows, lengths = integers(rng, 9, 3, 5), integers(rng, 5, 3)
    kept = [[min(i, 2**31 - 1) for i in row[: int(np.clip(n, 0, 5))] if i >= 0] for row, n in zip(rows, lengths)]
    want = np.array([(row + [-1] * 5)[:5] for row in kept])
    return Problem(lambda *x, **_: ragged.pack_rows(*x).to_dense(5), (rows, lengths), want, 0)


def merge(rng):
    outs, lses = floats(rng, 3, 2, 2, 4), floats(rng, 3, 2, 2)
    lses[rng.random(lses.shape) < 0.4] = rng.choice([np.nan, np.inf, -np.inf])
    full = np.isfinite(lses)
    weights = np.where(full, np.exp(np.where(full, lses, 0).astype(np.float64)), 0)
    total = weights.sum(0)
    out = (weights[..., None] * outs).sum(0) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        want = out, np.log(total)
    return Problem(lambda *x, **_: attention.merge(*x), (outs, lses), want)


def quantize(rng):
    x = floats(rng, 3, 8) * np.float32(10.0) ** rng.integers(-30, 30)
    want = x.astype(np.float64)
    step = np.maximum(np.abs(want.reshape(3, 2, 4)).max(-1), 1e-4).repeat(4, 1).reshape(3, 8) / 28 + 1e-30

    def call(x, **_):
        values, scales = fp8.quantize(x, group_size=4)
        return fp8.dequantize(values, scales, group_size=4, dtype="float32").astype(jnp.float32) / step

    return Problem(call, (x,), want / step, 1.0)


def route(rng):
    logits, bias = floats(rng, 3, 8), floats(rng, 8)
    score = 1 / (1 + np.exp(-logits.astype(np.float64)))
    ids = np.argsort(-(score.astype(np.float32) + bias), kind="stable", axis=1)[:, :2]
    weights = np.take_along_axis(score, ids, 1)

    def call(logits, bias, **_):
        how = dict(num_groups=1, groups_kept=1, k=2, scale=1.0, renormalize=False)
        return router.biased_grouped_topk(logits, bias, **how)[0]

    return Problem(call, (logits, bias), weights, 1e-5)


PROBLEMS = (top_k, scores, paged_scores, sparse_mla, write_and_gather, slots, pack, merge, quantize, route)


def change_form(rng, x):
    """The same numbers as numpy, a list, or a jax array."""
    # jax has no int64 here: it would take another number.
    ways = [x, x.tolist()] + ([jnp.asarray(x)] if x.dtype != np.int64 or np.abs(x).max(initial=0) < 2**31 else [])
    return ways[rng.integers(len(ways))]


def spoil(rng, x):
    """Something that is not what the operator expects."""
    other = np.float32 if x.dtype == np.int64 else np.int64
    ways = (
        x[None],
        x[..., :-1],
        np.clip(np.nan_to_num(x), -9, 9).astype(other),
        x.astype(bool),
        x.astype(np.complex64),
        None,
        "text",
        object(),
        {},
        3,
    )
    return ways[rng.integers(len(ways))]


def is_right(got, want, atol):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    return len(got) == len(want) and all(
        np.allclose(np.asarray(g, np.float64), w, rtol=1e-5, atol=atol, equal_nan=False) for g, w in zip(got, want)
    )


def run_call(seed):
    rng = np.random.default_rng([7, seed])
    make = PROBLEMS[rng.integers(len(PROBLEMS))]
    problem, name = make(rng), NAMES[rng.integers(len(NAMES))]
    args: list[Any] = [change_form(rng, x) for x in problem.args]
    if seed % 3 == 0:
        at = rng.integers(len(args))
        args[at] = spoil(rng, problem.args[at])
    try:
        got = problem.fn(*args, implementation=name)
    except ValueError as error:
        assert seed % 3 == 0, (make.__name__, name, str(error))
        text = str(error)
        assert "expected" in text or "must" in text or "need" in text, (make.__name__, text)
        return
    if seed % 3:
        assert is_right(got, problem.want, problem.atol), (make.__name__, name, got, problem.want)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, CALLS, 50))
def test_calls(first):
    """Spoiled calls may also be right: a mask of other integers, say. They end in a result or a ValueError of ours."""
    for seed in range(first, first + 50):
        run_call(seed)
