"""Launch of an attention kernel: its arguments, its results, and each program's share of a row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels._call import call
from pallas_kernels.plans.attention import AttentionPlan
from pallas_kernels.sparse_attention.results import store_by_head
from pallas_kernels.sparse_attention.rows import Source, kernel_arrays, part_of
from pallas_kernels.targets import Target


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """One call of sparse attention on one machine.

    Attributes:
      target: the machine.
      q: queries [T, H, D].
      sources: key sources and the slots that rows name in them.
      sinks: float32 [H], or None.
      sm_scale: multiplies the products of queries and keys.
      value_dim: columns of a key that are its value.
      plan: block sizes.
    """

    target: Target
    q: Array
    sources: Sequence[Source]
    sinks: Array | None
    sm_scale: float
    value_dim: int
    plan: AttentionPlan


def unpack(refs: Sequence[Any], s: Any) -> tuple[Any, list[dict], Any, Any, Any, Any]:
    """Names refs: (queries, arrays of each source by name, sinks or None, out, lse, scales of out or None)."""
    at, sources = 1, []
    for names in s.names:
        sources.append(dict(zip(names, refs[at : at + len(names)])))
        at += len(names)
    sinks, outputs = refs[at : at + s.has_sinks], refs[at + s.has_sinks :]
    return refs[0], sources, *(sinks or [None]), *outputs, *([] if s.plan.half_parts else [None])


def _program(kernel: Callable[..., None], *refs: Any, s: Any) -> None:
    """Runs `kernel` on the program's share. A program without keys stores only lse = -inf; its `out` is not read."""
    _, sources, _, _, lse_ref, _ = unpack(refs, s)
    part = part_of([pl.program_id(axis) for axis in range(3)], sources, lse_ref.shape[1], s)

    def leave():
        store_by_head(lse_ref, part, jnp.full(part.heads.shape, -jnp.inf, jnp.float32), s)

    if s.plan.shares:
        jax.lax.cond(part.first < part.last, lambda: kernel(*refs, part=part, s=s), leave)
    else:
        kernel(*refs, part=part, s=s)


def kernel_arguments(sources: Sequence[Source]) -> tuple[list[Array], dict[str, Any]]:
    """Returns the arrays of all sources in argument order, and kwargs of a specialization: names, counts, widths."""
    arrays = [kernel_arrays(s) for s in sources]
    return [a for named in arrays for a in named.values()], dict(
        names=tuple(tuple(a) for a in arrays),
        counts=tuple(s.num_slots for s in sources),
        widths=tuple(0 if s.indptr is not None else s.values.shape[1] for s in sources),
    )


def launch_rows(kernel: Callable[..., None], s: Any, request: AttentionCall, arrays: Sequence[Array]) -> Any:
    """Runs `kernel` over the grid (T, head blocks, splits): (out[splits, T, H, value_dim], lse[splits, T, H]).

    With `plan.half_parts`, `out` is float16, and its scales [splits, T, H] are a third result. With `plan.shares`,
    programs without keys store `lse` only.
    """
    tokens, heads = request.q.shape[:2]
    plan = s.plan
    dtype = request.q.dtype if plan.splits == 1 else jnp.float16 if plan.half_parts else jnp.float32
    by_head = jax.ShapeDtypeStruct((plan.splits, tokens, heads), jnp.float32)
    return call(
        functools.partial(_program, kernel, s=s),
        request.q,
        *arrays,
        *([request.sinks] if request.sinks is not None and s.has_sinks else []),
        out_shape=(
            jax.ShapeDtypeStruct((plan.splits, tokens, heads, s.value_dim), dtype),
            *[by_head] * (2 if plan.half_parts else 1),
        ),
        grid=(tokens, -(-heads // plan.head_block), plan.splits),
        name="sparse_mla",
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        target=s.target,
    )
