"""Projections of a DeepSeek-V4 attention layer, from the hidden state and from the query latent.

T tokens, D hidden size, H heads of d values, r_q width of the query latent (the query's low-rank form), Hi indexer
heads of Di values, c = 2 if the compressor's windows overlap, else 1.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.projections import Path, fuse, place, project, unchanged
from sparse_mla_jax.layers.selection import IndexInputs, Queries
from sparse_mla_jax.layers.step import AttentionStep
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.ops.norm_rope import Section
from sparse_mla_jax.ops.rope import rope_frequencies
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.heads import own_config


@dataclasses.dataclass(frozen=True)
class LayerStep(AttentionStep):
    """An `AttentionStep` of layer number `layer` of a DeepSeek-V4 config."""

    config: DeepseekV4Config
    layer: int

    @classmethod
    def create(
        cls,
        metadata: StepMetadata,
        config: DeepseekV4Config,
        layer: int,
        implementation: str | None,
        parallel: Parallel | None = None,
    ) -> LayerStep:
        """Makes a LayerStep of one device's heads, with the layer's frequencies."""
        frequencies = jnp.asarray(rope_frequencies(config.layer_rope(layer), config.qk_rope_head_dim))
        own = own_config(config, parallel)
        return cls(metadata, implementation, frequencies, config.rms_norm_eps, parallel, own, layer)

    @property
    def ratio(self) -> int:
        """Tokens of a compressed entry, 0 in a layer that does not compress."""
        return self.config.compress_ratio(self.layer)

    @property
    def needs_indexer(self) -> bool:
        """Whether a token may see more than index_topk entries, so that the layer's indexer has to choose."""
        c = self.config
        return c.has_indexer(self.layer) and self.metadata.max_length // self.ratio > c.index_topk


class CompressorInputs(NamedTuple):
    """Inputs of a compressor.

    Attributes:
      kv: float32[T, c * width of an entry].
      gate: as kv.
    """

    kv: Array
    gate: Array


class HiddenProjections(NamedTuple):
    """Products of the hidden state: float32, except q_latent, which has hidden's type.

    Attributes:
      q_latent: [T, r_q], the query latent, which heads and indexer share.
      key: [T, d], the token's own key, normed and rotated.
      entry: inputs of the layer's compressor; None in layers that do not compress.
      index_entry: inputs of the indexer's compressor; None in layers without an indexer.
      index_weights: [T, Hi], the indexer's head weights, scales folded in; None in layers without an indexer.
    """

    q_latent: Array
    key: Array
    entry: CompressorInputs | None
    index_entry: CompressorInputs | None
    index_weights: Array | None


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """Concatenates the weights of one layer that multiply the same input: one matrix product per input.

    Call it once, when the weights are loaded; `compressed_attention_step` accepts fused and separate weights.

    * hidden_proj [D, columns] replaces, as far as the layer has them and in this order: q_a_proj, kv_proj, kv_proj and
      gate_proj of both compressors, indexer.weights_proj.
    * q_latent_proj [r_q, H * d + Hi * Di] replaces q_b_proj and indexer.wq_b.
    * head_norm [d] is added: ones, the weight of the queries' norm.
    """
    if "hidden_proj" in params:
        return params
    # Make the ones here: a constant that is made in the step costs a launch.
    ones = jnp.ones(params["q_b_proj"].shape[2], jnp.float32)
    groups = {"hidden_proj": _hidden_paths(params), "q_latent_proj": _q_latent_paths(params)}
    return fuse(params, groups) | {"head_norm": ones}


def _hidden_paths(params: dict[str, Any]) -> list[Path]:
    """Paths of the weights that multiply the hidden state, in the order of their columns."""
    paths: list[Path] = [("q_a_proj",), ("kv_proj",)]
    if "compressor" in params:
        paths += [("compressor", "kv_proj"), ("compressor", "gate_proj")]
    if "indexer" in params:
        paths += [("indexer", "compressor", "kv_proj"), ("indexer", "compressor", "gate_proj")]
        paths.append(("indexer", "weights_proj"))
    return paths


def _q_latent_paths(params: dict[str, Any]) -> list[Path]:
    """Paths of the weights that multiply the query latent, in the order of their columns."""
    return [("q_b_proj",), *([("indexer", "wq_b")] if "indexer" in params else [])]


def project_hidden(params: dict[str, Any], hidden: Array, step: LayerStep) -> HiddenProjections:
    """Multiplies hidden [T, D] by the weights of `_hidden_paths` and finishes the products."""
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
    """The queries, each head RMS-normed; and the indexer's inputs if its head weights are given.

    Both kinds of queries are rotated and have q_latent's type.
    """
    c, part = step.config, functools.partial(Section, 0, dtype=q_latent.dtype.name, interleaved=True)
    ones = params.get("head_norm", jnp.ones(c.head_dim, jnp.float32))
    parts = [part(c.num_attention_heads, c.head_dim, weight=ones, rotated=c.nope_dim)]
    if index_weights is not None:
        rotated = c.index_head_dim - c.qk_rope_head_dim
        parts.append(part(c.index_n_heads, c.index_head_dim, rotated=rotated))
    done = project(params, "q_latent_proj", q_latent, _q_latent_paths(params), place(parts), step.finish)
    return Queries(done[0], None if index_weights is None else IndexInputs(done[1], index_weights))
