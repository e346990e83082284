"""Launches sparse latent attention: runs the kernel that the plan names, or "planes", and merges splits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from pallas_kernels.plans import choose_plan
from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.sparse_attention import float16, fp8, planes
from pallas_kernels.sparse_attention.merge import merge_splits
from pallas_kernels.sparse_attention.program import AttentionCall
from pallas_kernels.sparse_attention.rows import Source
from pallas_kernels.targets import Target, by_target


def _compute_dtype(q: Array, sources: Sequence[Source]):
    """bfloat16 unless q or any unquantised key is float32."""
    arrays = [q] + [a for s in sources for a in (s.rope, None if s.scale is not None else s.latent) if a is not None]
    return jnp.dtype(jnp.float32 if any(a.dtype == jnp.float32 for a in arrays) else jnp.bfloat16)


def sparse_attention(
    q: Array,
    sources: Sequence[Source],
    *,
    sm_scale: float,
    value_dim: int,
    sinks: Array | None = None,
    plan: AttentionPlan | None = None,
) -> tuple[Array, Array]:
    """Runs the kernel: q[T, H, D] with T > 0 -> (out[T, H, value_dim], lse float32[T, H]); contract: ops.attention.

    Raises:
      NotImplementedError: sources of different layouts, FP8 groups that split a word, types without a kernel.
    """
    tokens, heads = q.shape[:2]
    sources = [s for s in sources if s.num_slots and math.prod(s.values.shape)]
    if not sources:
        return jnp.zeros((tokens, heads, value_dim), q.dtype), jnp.full((tokens, heads), -jnp.inf, jnp.float32)
    return by_target(
        lambda target, *arrays: _launch(target, *arrays, sm_scale=sm_scale, value_dim=value_dim, plan=plan),
        q,
        sources,
        sinks,
    )


def attention_plan_for(target: Target, q: Array, sources: Sequence[Source], value_dim: int) -> AttentionPlan:
    """The heuristic plan of a call."""
    native = fp8.supports(q, sources, value_dim)
    return attention_plan(
        tokens=q.shape[0],
        heads=q.shape[1],
        width=sum(s.width for s in sources),
        itemsize=_compute_dtype(q, sources).itemsize,
        fp8=any(s.scale is not None for s in sources),
        native=native,
        columns=q.shape[-1],
        key_bytes=2 * q.shape[-1] - 4 * sources[0].latent.shape[-1] if native else 0,
        ragged=any(s.indptr is not None for s in sources),
        target=target,
    )


def _launch(
    target: Target,
    q: Array,
    sources: Sequence[Source],
    sinks: Array | None,
    *,
    sm_scale: float,
    value_dim: int,
    plan: AttentionPlan | None,
) -> tuple[Array, Array]:
    """Runs the kernel `plan.form`, or "planes" if that kernel does not support the call, and merges splits."""
    plan = choose_plan("sparse_mla", plan, attention_plan_for, target=target, q=q, sources=sources, value_dim=value_dim)
    request = AttentionCall(target, q, sources, sinks, sm_scale, value_dim, plan)
    if plan.form == "fp8" and fp8.supports(q, sources, value_dim):
        parts = fp8.launch(request)
    elif plan.form == "float16" and float16.supports(q, sources, value_dim):
        parts = float16.launch(request)
    else:
        request = dataclasses.replace(request, plan=dataclasses.replace(plan, form="planes", half_parts=False))
        parts = planes.launch(request, _compute_dtype(q, sources))
    if plan.splits == 1:
        return parts[0][0], parts[1][0]
    return merge_splits(*parts, sinks=sinks, dtype=q.dtype, target=target, partial=plan.shares > 0)
