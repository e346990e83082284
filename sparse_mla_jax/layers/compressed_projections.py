"""Projections of a DeepSeek-V4 attention layer: what it makes of the hidden state and of the query's low-rank form.

T tokens, D hidden size, H heads of d values, r_q width of the query's low-rank form, Hi indexer heads of Di values, c 2
where the compressor's windows overlap, else 1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.projections import Path, fuse, place, project, unchanged
from sparse_mla_jax.layers.selection import IndexInputs, Queries
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.rope import rope_frequencies


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """One layer in one step: what its functions share.

    Attributes:
      metadata: of the step.
      config: the model's shapes.
      layer: the layer's number.
      implementation: of every operator.
      frequencies: float32[rope dimensions // 2], the layer's.
    """

    metadata: StepMetadata
    config: DeepseekV4Config
    layer: int
    implementation: str | None
    frequencies: Array

    @classmethod
    def create(
        cls, metadata: StepMetadata, config: DeepseekV4Config, layer: int, implementation: str | None
    ) -> LayerStep:
        """With the frequencies that the config gives the layer."""
        frequencies = jnp.asarray(rope_frequencies(config.layer_rope(layer), config.qk_rope_head_dim))
        return cls(metadata, config, layer, implementation, frequencies)

    @property
    def ratio(self) -> int:
        """Tokens of a compressed entry, 0 in a layer that does not compress."""
        return self.config.compress_ratio(self.layer)

    @property
    def needs_indexer(self) -> bool:
        """Whether the layer has an indexer, and there can be entries that it would not choose."""
        c = self.config
        return c.has_indexer(self.layer) and self.metadata.max_length // self.ratio > c.index_topk

    def finish(self, product: Array, parts: Sequence[Section]) -> list[Any]:
        """`norm_rope` of a product [T, columns]."""
        return norm_rope(
            product,
            parts,
            self.metadata.positions,
            self.frequencies,
            eps=self.config.rms_norm_eps,
            implementation=self.implementation,
        )


class CompressorInputs(NamedTuple):
    """What a compressor takes in.

    Attributes:
      kv: float32[T, c * width of an entry].
      gate: as kv.
    """

    kv: Array
    gate: Array


class HiddenProjections(NamedTuple):
    """Products of the hidden state, float32 but the first, which has hidden's type.

    Attributes:
      q_latent: [T, r_q], the query's low-rank form, which heads and indexer share.
      key: [T, d], the token's own key, normed and rotated.
      entry: of the layer's compressor; None without one.
      index_entry: of the indexer's; None without one.
      index_weights: [T, Hi], the indexer's head weights, scales folded in; None without one.
    """

    q_latent: Array
    key: Array
    entry: CompressorInputs | None
    index_entry: CompressorInputs | None
    index_weights: Array | None


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """One layer's weights with those that multiply the same input side by side: one product of each input.

    Call it once, when the weights are loaded; `compressed_attention_step` takes either form. Of what that lists it
    replaces q_a_proj, kv_proj, kv_proj and gate_proj of both compressors, and indexer.weights_proj, as many as the
    layer has, by hidden_proj [D, columns], their columns in this order; q_b_proj and indexer.wq_b by q_latent_proj
    [r_q, H * d + Hi * Di]; and it adds head_norm [d], ones, the weight of the queries' norm.
    """
    if "hidden_proj" in params:
        return params
    # Made in a step, a constant is a launch.
    ones = jnp.ones(params["q_b_proj"].shape[2], jnp.float32)
    groups = {"hidden_proj": _hidden_paths(params), "q_latent_proj": _q_latent_paths(params)}
    return fuse(params, groups) | {"head_norm": ones}


def _hidden_paths(params: dict[str, Any]) -> list[Path]:
    """Weights of the hidden state, in order of columns."""
    paths: list[Path] = [("q_a_proj",), ("kv_proj",)]
    if "compressor" in params:
        paths += [("compressor", "kv_proj"), ("compressor", "gate_proj")]
    if "indexer" in params:
        paths += [("indexer", "compressor", "kv_proj"), ("indexer", "compressor", "gate_proj")]
        paths.append(("indexer", "weights_proj"))
    return paths


def _q_latent_paths(params: dict[str, Any]) -> list[Path]:
    """Weights of the query's low-rank form, in order of columns."""
    return [("q_b_proj",), *([("indexer", "wq_b")] if "indexer" in params else [])]


def project_hidden(params: dict[str, Any], hidden: Array, step: LayerStep) -> HiddenProjections:
    """Products of hidden [T, D]."""
    c, ratio = step.config, step.ratio
    overlap = 2 if c.compressor_overlap(ratio) else 1
    key = Section(0, 1, c.head_dim, "float32", params["kv_layernorm"], rotated=c.nope_dim, interleaved=True)
    parts = [Section(0, 1, c.q_lora_rank, hidden.dtype.name, params["q_a_layernorm"]), key]
    if ratio:
        parts += [unchanged(overlap * c.head_dim)] * 2
    if c.has_indexer(step.layer):
        parts += [unchanged(overlap * c.index_head_dim)] * 2
        parts.append(Section(0, 1, c.index_n_heads, "float32", scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5))
    done = project(params, "hidden_proj", hidden, _hidden_paths(params), place(parts), step.finish)
    rest = (heads[:, 0] for heads in done)
    return HiddenProjections(
        q_latent=next(rest),
        key=next(rest),
        entry=CompressorInputs(next(rest), next(rest)) if ratio else None,
        index_entry=CompressorInputs(next(rest), next(rest)) if c.has_indexer(step.layer) else None,
        index_weights=next(rest, None),
    )


def project_q_latent(params: dict[str, Any], q_latent: Array, step: LayerStep, index_weights: Array | None) -> Queries:
    """The queries, every head divided by its root mean square, and the indexer's if its head weights are given.

    Both rotated, in q_latent.dtype.
    """
    c, part = step.config, functools.partial(Section, 0, dtype=q_latent.dtype.name, interleaved=True)
    ones = params.get("head_norm", jnp.ones(c.head_dim, jnp.float32))
    parts = [part(c.num_attention_heads, c.head_dim, weight=ones, rotated=c.nope_dim)]
    if index_weights is not None:
        rotated = c.index_head_dim - c.qk_rope_head_dim
        parts.append(part(c.index_n_heads, c.index_head_dim, rotated=rotated))
    done = project(params, "q_latent_proj", q_latent, _q_latent_paths(params), place(parts), step.finish)
    return Queries(done[0], None if index_weights is None else IndexInputs(done[1], index_weights))
