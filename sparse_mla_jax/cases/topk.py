"""Cases of exact top-k."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.cases.answers import (
    selected,
)
from sparse_mla_jax.cases.case import Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    distinct,
    sample,
    seed,
    take,
)
from sparse_mla_jax.ops.topk import top_k
from sparse_mla_jax.ops.topk_merge import top_k_share

# Kinds of rows: independent normal scores, and cases that are hard for a radix selection.
ROWS = ("random", "equal", "narrow", "up", "down", "plateau")


def _scores(kind: str, key: Array, rows: int, columns: int, k: int) -> Array:
    """Scores of one of ROWS, float32 [rows, columns]."""
    shape = (rows, columns)
    if kind == "random":
        return jax.random.normal(key, shape, jnp.float32)
    if kind == "equal":
        return jnp.full(shape, 1.5, jnp.float32)
    if kind == "narrow":
        # Equal in all but the last ten bits.
        return 1 + jax.random.randint(key, shape, 0, 1 << 10).astype(jnp.float32) * 2.0**-23
    if kind in ("up", "down"):
        column = jnp.arange(columns, dtype=jnp.float32)
        return jnp.broadcast_to(column if kind == "up" else columns - column, shape)
    require(kind == "plateau", f"scores are {kind!r}; expected one of {', '.join(ROWS)}.")
    winners = distinct(key, rows, min(100, k // 2), columns)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.zeros(shape, jnp.float32).at[row, winners].set(1 + jax.random.uniform(key, winners.shape, jnp.float32))


def _topk(sizes: Mapping[str, int], flavour: str, query: str, *, kind: str = "random") -> Work:
    del flavour, query
    rows, columns, k = sizes["rows"], sizes["columns"], sizes["k"]
    length = min(sizes.get("length", columns), columns)

    def each(number):
        scores = _scores(kind, seed(2, number), rows, columns, k)
        return (scores, jnp.full((rows,), length, jnp.int32)) if "length" in sizes else (scores,)

    def fn(scores, lengths=None, *, implementation=None):
        return top_k(scores, k, lengths, implementation=implementation)

    def error(arguments, got):
        # Check all rows if that is quick.
        checked = np.arange(rows) if rows * length <= 1 << 24 else sample(rows)
        wrong = 0
        for row, mine in zip(take(arguments[0], checked), take(got, checked)):
            want = np.full(k, -1, np.int32)
            chosen_columns = selected(row[:length], k)
            want[: chosen_columns.size] = chosen_columns
            wrong += int((mine != want).sum())
        return float(wrong)

    return Work(fn, each, 4 * rows * (length + k), 0, error, 0.0)


# (rows, columns) -> best CUDA figure in microseconds, for k 2048.
_TOPK_BEST = {
    (1, 8192): 4.7,
    (1, 32768): 9.8,
    (1, 131072): 13.0,
    (32, 8192): 5.2,
    (32, 32768): 17.7,
    (32, 131072): 29.7,
    (64, 131072): 29.9,
    (128, 8192): 5.2,
    (128, 32768): 15.6,
    (128, 131072): 30.8,
    (256, 131072): 59.5,
    (1024, 8192): 30.8,
    (1024, 32768): 102.0,
    (4096, 16384): 202.0,
    (2048, 131072): 664.0,
}


def _topk_case(rows: int, columns: int, k: int = 2048, *, kind: str = "random", suffix: str = "", **given: Any) -> Case:
    sizes = {"rows": rows, "columns": columns, "k": k} | ({"length": given.pop("length")} if "length" in given else {})
    make = functools.partial(_topk, kind=kind)
    return Case(f"topk-{rows}x{columns}{suffix}", "topk", sizes, make, ("",), **given)


def topk_cases() -> Iterator[Case]:
    """Exact top-k of rows of scores."""
    for (rows, columns), best in _TOPK_BEST.items():
        yield _topk_case(rows, columns, reach=best, floor=best * (1.6 if rows <= 256 else 1.0))
    for k in (512, 1024):
        yield _topk_case(32, 32768, k, suffix=f"-k{k}")
    yield _topk_case(64, 131072, suffix="-length4096", length=4096)
    yield _topk_case(64, 65536)
    yield _topk_case(64, 32768)
    for kind in ROWS[1:]:
        yield _topk_case(64, 32768, kind=kind, suffix=f"-{kind}", at_most=(3.0, "topk-64x32768"))
    for parts in (2, 8):
        yield Case(f"topk-share-64x{parts}x2048", "topk", {"parts": parts, "rows": 64, "k": 2048}, _share, ("",))


# --- parts of the columns on several devices
class _Parts(NamedTuple):
    """Candidates of several parts.

    Attributes:
      positions, scores: [S, R, C].
    """

    positions: Array
    scores: Array


def _parts(key: Array, parts: int, rows: int, width: int, *, ties: bool) -> _Parts:
    """Full parts: pages of 64 positions go to the parts in turn, three in four positions are candidates."""
    choose, draw = jax.random.split(key)
    # Every fourth position, the first, second or third one of four, is left out.
    local = jnp.arange(width, dtype=jnp.int32)
    skipped = jax.random.randint(choose, (parts, rows, width), 0, 2, jnp.int32)
    local = 4 * (local // 2) + 2 * (local % 2) + skipped
    page = local // 64 * parts + jnp.arange(parts, dtype=jnp.int32)[:, None, None]
    scores = jax.random.normal(draw, (parts, rows, width), jnp.float32)
    return _Parts(page * 64 + local % 64, jnp.round(scores, 2) if ties else scores)


def _share_answer(parts: _Parts, part: int, k: int) -> np.ndarray:
    """The share of a part by `selected`, in the order of positions: int32 [R, C]."""
    positions, scores = (np.moveaxis(np.asarray(x), 1, 0) for x in parts)
    want = np.full((len(positions), positions.shape[2]), -1, np.int32)
    for row, (where, values) in enumerate(zip(positions, scores)):
        order = np.argsort(where, axis=None)
        chosen = where.reshape(-1)[order][selected(values.reshape(-1)[order], k)]
        own = np.intersect1d(chosen, where[part])
        want[row, : own.size] = own
    return want


def _share(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    del flavour, query
    parts, rows, k = sizes["parts"], sizes["rows"], sizes["k"]

    def each(number):
        return tuple(_parts(seed(2, number), parts, rows, k, ties=False))

    def fn(positions, scores, *, implementation=None):
        return top_k_share(positions, scores, 1, k, implementation=implementation)[0]

    def error(arguments, got):
        return float((np.asarray(got) != _share_answer(_Parts(*arguments), 1, k)).sum())

    return Work(fn, each, 4 * rows * k * (2 * parts + 1), 0, error, 0.0)


def _kernel_share(kind: str, heads: int | None, *, parts: int, k: int) -> KernelProblem:
    del kind, heads
    one, two = (_parts(seed(3, parts), parts, 1, k, ties=ties) for ties in (False, True))
    # The second row has ties across the threshold.
    both = _Parts(*(jnp.concatenate(pair, axis=1) for pair in zip(one, two)))
    want = _share_answer(both, 1, k)

    def fn(positions, scores, *, implementation="triton", plan=None):
        return top_k_share(positions, scores, 1, k, implementation=implementation, plan=plan)[0]

    return KernelProblem(
        fn,
        tuple(both),
        lambda got: float((np.asarray(got) != want).sum()),
        0.0,
        sum(x.nbytes for x in both) + want.nbytes,
    )


def _kernel_top_k(kind: str, heads: int | None, *, columns: int, k: int) -> KernelProblem:
    del kind, heads
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((2, columns)).astype(np.float32)
    # The second row has ties across the threshold.
    scores[1] = np.round(scores[1], 2)
    want = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)

    def fn(scores, *, implementation="triton", plan=None):
        return top_k(scores, k, implementation=implementation, plan=plan)

    return KernelProblem(
        fn,
        (jnp.asarray(scores),),
        lambda got: float((np.asarray(got) != want).sum()),
        0.0,
        scores.nbytes + want.size * 4,
    )


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "top_k",
        "2 rows of 2048 columns, k 512, one block",
        functools.partial(_kernel_top_k, columns=2048, k=512),
        kinds=(),
    ),
    KernelCase(
        "top_k_long",
        "2 rows of 16384 columns, k 2048, several blocks",
        functools.partial(_kernel_top_k, columns=16384, k=2048),
        kinds=(),
    ),
    *(
        KernelCase(
            f"top_k_share{suffix}",
            f"2 rows of {parts} parts of 2048 candidates, k 2048, the share of one part",
            functools.partial(_kernel_share, parts=parts, k=2048),
            kinds=(),
        )
        for parts, suffix in ((2, ""), (8, "_wide"))
    ),
)
