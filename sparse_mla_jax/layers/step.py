"""Shared by both kinds of attention layers: the arguments of a step that their functions share, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax import _check
from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops._dispatch import check_implementation
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.parallel.axes import Parallel, check_axes


@dataclasses.dataclass(frozen=True)
class AttentionStep:
    """The arguments that the functions of one layer share in one step.

    Attributes:
      metadata: of the step.
      implementation: of every operator.
      frequencies: float32[rope dimensions // 2], rotary frequencies of the layer.
      eps: of the norms of sections that have none of their own.
      parallel: the axes over which the step is spread; None on one device.
    """

    metadata: StepMetadata
    implementation: str | None
    frequencies: Any
    eps: float
    parallel: Parallel | None

    def axis(self, kind: str) -> str | None:
        """The name of axis "data", "context" or "tensor" in the mesh; None if the step is not spread over it."""
        return None if self.parallel is None else self.parallel.axis(kind)

    def finish(self, product: Array, parts: Sequence[Section]) -> list[Any]:
        """`norm_rope` of a product [T, columns]."""
        positions, how = self.metadata.positions, self.implementation
        return norm_rope(product, parts, positions, self.frequencies, eps=self.eps, implementation=how)


def check_static(metadata: Any, config: Any, kind: type, implementation: Any, parallel: Any = None) -> None:
    """Raises ValueError unless these are a step's metadata, a config of that kind, an implementation and axes."""
    if parallel is not None:
        _check.instance("parallel", parallel, Parallel, hint="None on one device.")
        check_axes(parallel, "context", "tensor")
    _check.instance("config", config, kind)
    _check.instance("metadata", metadata, StepMetadata, hint="Make it with build_metadata or decode_metadata.")
    check_implementation(implementation)


def check_hidden(hidden: Any, metadata: StepMetadata, config: Config) -> Array:
    """`hidden` as an array; raises ValueError unless it has a row for every token of the metadata."""
    hint = "Pad it to the metadata's num_tokens; its width is config.hidden_size."
    shape = metadata.num_tokens, config.hidden_size
    return _check.array("hidden", hidden, (jnp.float32, jnp.bfloat16), *shape, hint=hint)
