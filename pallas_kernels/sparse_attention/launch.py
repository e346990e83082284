"""Launches sparse latent attention: tries the forms of a plan, runs one, and merges the splits of a row."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.sparse_attention import float16, fp8, planes
from pallas_kernels.sparse_attention.merge import merge_splits
from pallas_kernels.sparse_attention.rows import Source
from pallas_kernels.targets import dispatch


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
    """Runs the kernel: q[T, H, D] with T > 0 -> (out[T, H, value_dim], lse float32[T, H]); contract of ops.attention.

    Raises:
      NotImplementedError: sources of different layouts, FP8 groups not of whole words, types without a kernel.
    """
    tokens, heads = q.shape[:2]
    sources = [s for s in sources if s.num_slots and math.prod(s.values.shape)]
    if not sources:
        return jnp.zeros((tokens, heads, value_dim), q.dtype), jnp.full((tokens, heads), -jnp.inf, jnp.float32)
    return dispatch(
        lambda target, q, sources, sinks: _launch(target, q, sources, sinks, sm_scale, value_dim, plan),
        q,
        sources,
        sinks,
    )


def _launch(
    target: str,
    q: Array,
    sources: Sequence[Source],
    sinks: Array | None,
    sm_scale: float,
    value_dim: int,
    plan: AttentionPlan | None,
) -> tuple[Array, Array]:
    """The kernel as it is for one target."""
    tokens, heads = q.shape[:2]
    compute = _compute_dtype(q, sources)
    native = fp8.serves(q, sources, value_dim)
    if plan is None:
        width = sum(s.width for s in sources)
        quantised = any(s.scale is not None for s in sources)
        plan = attention_plan(
            tokens=tokens,
            heads=heads,
            width=width,
            itemsize=compute.itemsize,
            fp8=quantised,
            native=native,
            key_bytes=2 * q.shape[-1] - 4 * sources[0].latent.shape[-1] if native else 0,
            ragged=any(s.indptr is not None for s in sources),
            target=target,
        )
    if plan.native and native:
        parts = fp8.launch(target, q, sources, sinks, sm_scale, value_dim, plan)
    elif plan.float16 and float16.serves(q, sources, value_dim):
        parts = float16.launch(target, q, sources, sinks, sm_scale, value_dim, plan)
    else:
        plan = dataclasses.replace(plan, half_parts=False)
        parts = planes.launch(target, q, sources, sinks, sm_scale, value_dim, plan, compute)
    if plan.splits == 1:
        return parts[0][0], parts[1][0]
    return merge_splits(*parts, sinks=sinks, dtype=q.dtype, target=target, partial=plan.shares > 0)
