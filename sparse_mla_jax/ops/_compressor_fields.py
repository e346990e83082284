"""Accepts the release 0.1 call of `compressor.compress`, which passes metadata and weights field by field.

Kept for one release. To drop it, delete this file and the decorator of `compress`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, overload

import numpy as np
from jax import Array

from pallas_kernels.plans.compress import CompressPlan
from sparse_mla_jax._check import floats, size
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops._compressor_state import CompressorState, CompressorWeights
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache


class _EitherCall(Protocol):
    @overload
    def __call__[Cache: (PagedKVCache, PagedIndexCache)](
        self,
        cache: Cache,
        state: CompressorState,
        kv: Array,
        gate: Array,
        weights: CompressorWeights,
        metadata: StepMetadata,
        *,
        state_ids: Array | None = None,
        implementation: str | None = None,
        plan: CompressPlan | None = None,
        config: CompressPlan | None = None,
    ) -> tuple[Cache, CompressorState]: ...

    @overload
    def __call__[Cache: (PagedKVCache, PagedIndexCache)](
        self,
        cache: Cache,
        state: CompressorState,
        kv: Array,
        gate: Array,
        position_bias: Array,
        norm: Array,
        frequencies: Any,
        *,
        positions: Array,
        request_ids: Array,
        query_indptr: Array,
        seq_lens: Array,
        page_table: Array,
        page_size: int,
        state_ids: Array | None = None,
        ratio: int,
        eps: float = 1e-6,
        implementation: str | None = None,
        plan: CompressPlan | None = None,
        config: CompressPlan | None = None,
    ) -> tuple[Cache, CompressorState]: ...


def accept_fields(compress: Callable[..., Any]) -> _EitherCall:
    """Wraps `compress` so that it also accepts the arguments of release 0.1, recognised by `positions=`."""

    @functools.wraps(compress)
    def call(cache: Any, state: Any, kv: Any, gate: Any, *args: Any, **kwargs: Any) -> Any:
        if "positions" not in kwargs:
            return compress(cache, state, kv, gate, *args, **kwargs)
        weights, metadata, kwargs = _collect_fields(*args, **kwargs)
        return compress(cache, state, kv, gate, weights, metadata, **kwargs)

    return call


def _collect_fields(
    position_bias: Any,
    norm: Any,
    frequencies: Any,
    *,
    positions: Any,
    request_ids: Any,
    query_indptr: Any,
    seq_lens: Any,
    page_table: Any,
    page_size: Any,
    ratio: Any,
    eps: float = 1e-6,
    **kwargs: Any,
) -> tuple[CompressorWeights, StepMetadata, dict[str, Any]]:
    position_bias = floats("position_bias", position_bias, size("ratio", ratio), None)
    unread: Any = np.zeros(0, np.int32)
    metadata = StepMetadata(
        positions=positions,
        request_ids=request_ids,
        slots=unread,
        lengths=unread,
        valid=unread,
        seq_lens=seq_lens,
        query_indptr=query_indptr,
        last_token=unread,
        page_table=page_table,
        page_size=page_size,
        max_length=0,
    )
    return CompressorWeights(position_bias, norm, frequencies, float(eps)), metadata, kwargs
