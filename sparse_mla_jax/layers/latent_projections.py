"""Projections of a latent-attention (MLA) layer, from the hidden state and from the query latent.

T tokens, D hidden size, H heads, r_q width of the query latent (the query's low-rank form), R latent width, dn / dr
nope and rope dimensions of a head, dv value width, Hi indexer heads of Di dimensions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.layers.norm import INNER_EPS, layer_norm
from sparse_mla_jax.layers.projections import Path, flat, fuse, matmul, project
from sparse_mla_jax.layers.selection import IndexInputs, Queries
from sparse_mla_jax.layers.step import AttentionStep
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.ops.fp8 import is_fp8
from sparse_mla_jax.ops.norm_rope import Section
from sparse_mla_jax.ops.rope import rope_frequencies
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.heads import own_layer


@dataclasses.dataclass(frozen=True)
class LatentStep(AttentionStep):
    """An `AttentionStep` of one layer of a config with latent attention."""

    config: MlaConfig
    layer: MlaLayer

    @classmethod
    def create(
        cls,
        metadata: StepMetadata,
        config: MlaConfig,
        layer: int | None,
        implementation: str | None,
        frequencies: Array | None = None,
        parallel: Parallel | None = None,
    ) -> LatentStep:
        """Makes a LatentStep of one device's heads; without `frequencies`, with those of the layer's config.

        Raises:
          ValueError: no layer in a model whose layers differ, or no frequencies where they are learned.
        """
        require(
            layer is not None or config.is_uniform,
            "layer is None; the layers of this config differ. Pass the number of the layer.",
        )
        chosen = own_layer(config.layer(layer or 0), parallel)
        width = chosen.sizes.qk_rope_head_dim
        require(
            frequencies is not None or not config.learned_rope or not width,
            "frequencies is None; this model learns them. Pass layers.latent_projections.learned_frequencies.",
        )
        own = rope_frequencies(chosen.sizes.rope, width) if width else np.zeros(0, np.float32)
        used = own if frequencies is None or not width else frequencies
        return cls(metadata, implementation, used, INNER_EPS, parallel, config, chosen)

    @property
    def needs_indexer(self) -> bool:
        """Whether a token may see more than index_topk keys, so that the layer's indexer has to choose."""
        return self.layer.has_indexer and self.metadata.max_length > self.config.index_topk


def learned_frequencies(alpha: Array, config: MlaConfig) -> Array:
    """The rotary frequencies of a model with learned_rope: those of its config times exp(alpha), float32[dr // 2]."""
    return jnp.asarray(rope_frequencies(config.rope, config.qk_rope_head_dim)) * jnp.exp(alpha.astype(jnp.float32))


# --- weights
def _hidden_paths(params: dict[str, Any]) -> list[Path]:
    """Paths of the weights that multiply the hidden state, in the order of their columns."""
    paths: list[Path] = [("q_a_proj",), ("q_proj",), ("kv_a_proj_with_mqa",)]
    if "indexer" in params:
        paths += [("indexer", "wk"), ("indexer", "weights_proj")]
    if not _gates_by_latent(params):
        paths.append(("output_gate",))
    return [path for path in paths if path[0] in params]


def _q_latent_paths(params: dict[str, Any]) -> list[Path]:
    """Paths of the weights that multiply the query latent, in the order of their columns."""
    if _gates_by_latent(params):
        return [("q_b_proj",), ("output_gate",)]
    shared = "indexer" in params and "q_norm" not in params["indexer"]
    return [*([("indexer", "wq_b")] if shared else []), ("q_b_proj",)]


def _gates_by_latent(params: dict[str, Any]) -> bool:
    """Whether queries and output gate come from the query latent before and after its norm, side by side."""
    return "q_b_proj" in params and params["q_b_proj"].shape[0] == 2 * params["q_a_layernorm"].shape[0]


def fuse_projections(params: dict[str, Any]) -> dict[str, Any]:
    """Concatenates the weights of one layer that multiply the same input: fewer matrix products and launches.

    Call it once, when the weights are loaded; `attention_step` accepts fused and separate weights. Replaced are, as far
    as the layer has them and in this order:

    * q_a_proj or q_proj, kv_a_proj_with_mqa, indexer.wk, indexer.weights_proj and a gate from the hidden state by
      hidden_proj [D, columns], in DeepSeek-V3.2 [D, r_q + R + dr + Di + Hi];
    * indexer.wq_b, q_b_proj and a gate from the query latent by q_latent_proj [r_q, columns]; indexer.wq_b stays
      separate where its input is another one;
    * kv_b_k by q_absorb [H, dn + dr, R + dr], which maps the first dn values of a query to the latent space and passes
      the dr rotated ones through.
    """
    if "hidden_proj" in params:
        return params
    key = params["kv_b_k"]
    heads, nope, rank = key.shape
    rope = params["q_b_proj" if "q_b_proj" in params else "q_proj"].shape[2] - nope
    absorb = jnp.zeros((heads, nope + rope, rank + rope), key.dtype).at[:, :nope, :rank].set(key)
    groups = {"hidden_proj": _hidden_paths(params)}
    if "q_b_proj" in params:
        groups["q_latent_proj"] = _q_latent_paths(params)
    fused = fuse({name: weight for name, weight in params.items() if name != "kv_b_k"}, groups)
    return fused | {"q_absorb": absorb.at[:, nope:, rank:].set(jnp.eye(rope, dtype=key.dtype))}


# --- the hidden state
class LatentProjections(NamedTuple):
    """Products of the hidden state; None where the layer has no such weights. float32 if no type is given.

    Attributes:
      q_latent: [T, r_q] in hidden's type, the query latent, which heads and indexer share.
      raw_q_latent: the same before its norm, where the output gate needs it.
      query: [T, H, dn + dr] in hidden's type, rotated, in models without a query latent.
      latent: [T, R], normed.
      rope: [T, dr], the rotated shared key.
      index_key: [T, Di].
      index_weights: [T, Hi], the indexer's head weights, scales folded in.
      gate: [T, H] or [T, H, dv] in hidden's type, before the sigmoid.
    """

    q_latent: Array | None = None
    raw_q_latent: Array | None = None
    query: Array | None = None
    latent: Array | None = None
    rope: Array | None = None
    index_key: Array | None = None
    index_weights: Array | None = None
    gate: Array | None = None


def project_hidden(params: dict[str, Any], hidden: Array, step: LatentStep) -> LatentProjections:
    """The products of hidden [T, D], normed and rotated; arguments as for `attention_step`."""
    parts = _hidden_parts(params, hidden.dtype.name, step)
    done = project(params, "hidden_proj", hidden, _hidden_paths(params), list(parts.values()), step.finish)
    found = dict(zip(parts, done))
    # Queries have heads; so does a gate for every value.
    wide = {"query", *(["gate"] if step.config.attention_gate == "value" else [])}
    return LatentProjections(**{name: value if name in wide else value[:, 0] for name, value in found.items()})


def _hidden_parts(params: dict[str, Any], dtype: str, step: LatentStep) -> dict[str, Section]:
    """The sections of the product, in the order of `_hidden_paths`; raw and normed query latent share columns."""
    c, layer, sizes = step.config, step.layer, step.layer.sizes
    parts: dict[str, Section] = {}
    start = 0

    def add(name: str, width: int, *, heads: int = 1, dtype: str = "float32", **how: Any) -> None:
        nonlocal start
        parts[name] = Section(start, heads, width, dtype, **how)
        start += heads * width

    if sizes.q_lora_rank:
        how = _latent_norm(params["q_a_layernorm"], sizes.q_lora_rank, c)
        add("q_latent", sizes.q_lora_rank, dtype=dtype, **how)
        if c.attention_gate == "latent":
            parts["raw_q_latent"] = Section(0, 1, sizes.q_lora_rank, dtype)
    else:
        add("query", sizes.qk_head_dim, heads=sizes.num_attention_heads, dtype=dtype, **_query_finish(params, step))
    if layer.has_latents:
        add("latent", sizes.kv_lora_rank, **_latent_norm(params["kv_a_layernorm"], sizes.kv_lora_rank, c))
        if sizes.qk_rope_head_dim:
            norm = {"weight": params["k_rope_layernorm"], "eps": _eps(c.latent_norm_eps)} if c.rope_key_norm else {}
            how = {"rotated": 0, "interleaved": c.rope_interleave, "scale": _amplitude(step), **norm}
            add("rope", sizes.qk_rope_head_dim, **how)
    if layer.has_indexer:
        weight, bias = _index_norm(params, step)
        how = {"weight": weight, "bias": bias, "eps": _eps(c.index_norm_eps), **_index_rotation(step)}
        add("index_key", c.index_head_dim, **how)
        add("index_weights", c.index_n_heads, scale=c.index_n_heads**-0.5 * c.index_head_dim**-0.5)
    if c.attention_gate == "head":
        add("gate", sizes.num_attention_heads, dtype=dtype)
    if c.attention_gate == "value":
        add("gate", sizes.v_head_dim, heads=sizes.num_attention_heads, dtype=dtype)
    return parts


def _eps(eps: float) -> float | None:
    """The epsilon of a section, None if it is that of `LatentStep.finish`."""
    return None if eps == INNER_EPS else eps


def _latent_norm(weight: Array, rank: int, c: MlaConfig) -> dict[str, Any]:
    """How a latent of width `rank` is normed."""
    scale = math.sqrt(c.hidden_size / rank) if c.latent_scaling else 1.0
    return {"weight": weight, "eps": _eps(c.latent_norm_eps), "scale": scale}


def _amplitude(step: LatentStep) -> float:
    """The factor of rotated keys. Only products with a query matter, so keys take the factors of both."""
    return step.layer.sizes.rope.attention_factor**2


def _index_rotation(step: LatentStep) -> dict[str, Any]:
    """Which dimensions of the indexer's queries and keys are rotated."""
    c, width = step.config, step.layer.sizes.qk_rope_head_dim
    if not width:
        return {}
    return {
        "rotated": c.index_head_dim - width if c.indexer_rope_last else 0,
        "interleaved": c.indexer_rope_interleave,
    }


def _index_norm(params: dict[str, Any], step: LatentStep) -> tuple[Array, Array]:
    """Weight and bias [Di] of the index keys' norm, times the amplitude in the dimensions that will be rotated."""
    norm, first = params["indexer"]["k_norm"], _index_rotation(step).get("rotated")
    if first is None or _amplitude(step) == 1.0:
        return norm["weight"], norm["bias"]
    factor = np.ones(step.config.index_head_dim, np.float32)
    factor[first : first + step.layer.sizes.qk_rope_head_dim] = _amplitude(step)
    return norm["weight"] * factor, norm["bias"] * factor


# --- queries
def project_queries(
    params: dict[str, Any], hidden: Array, known: LatentProjections, step: LatentStep, index_dtype: Any = None
) -> Queries:
    """The queries, and the indexer's inputs in type `index_dtype` unless that is None."""
    index = None if index_dtype is None else _index_part(params, jnp.dtype(index_dtype), known, step)
    if known.q_latent is None:
        assert known.query is not None
        done: list[Any] = [known.query]
        apart, gate, finish = index, known.gate, step.finish
    else:
        finish = functools.partial(_finish_rounded, dtype=known.q_latent.dtype, step=step)
        done, apart, gate = _from_q_latent(params, known, index, step, finish)
    if apart is not None:
        norm = params["indexer"].get("q_norm")
        source = known.q_latent if norm is None else layer_norm(hidden, norm["weight"], norm["bias"])
        assert source is not None
        done += finish(matmul(source, flat(params["indexer"]["wq_b"])), [apart])
    if index is None:
        return Queries(done[0], None, gate)
    inputs = done[1] if index.quantized else (done[1], known.index_weights)
    return Queries(done[0], IndexInputs(*inputs), gate)


def _finish_rounded(product: Array, parts: Sequence[Section], *, dtype: Any, step: LatentStep) -> list[Any]:
    return step.finish(product.astype(dtype), parts)


def _from_q_latent(
    params: dict[str, Any], known: LatentProjections, index: Section | None, step: LatentStep, finish: Any
) -> tuple[list[Any], Section | None, Array | None]:
    """Products of the query latent: ([queries, index queries if asked], what is left to project, the gate)."""
    c, sizes, source = step.config, step.layer.sizes, known.q_latent
    assert source is not None
    dtype, heads = source.dtype.name, sizes.num_attention_heads
    is_shared = step.layer.has_indexer and not c.index_query_from_hidden and known.raw_q_latent is None
    start = c.index_n_heads * c.index_head_dim if is_shared else 0
    parts = [Section(start, heads, sizes.qk_head_dim, dtype, **_query_finish(params, step))]
    if is_shared and index is not None:
        parts.append(index)
    if known.raw_q_latent is not None:
        source = jnp.concatenate([source, known.raw_q_latent], axis=1)
        parts.append(Section(parts[0].columns, heads, sizes.v_head_dim, dtype))
    done = project(params, "q_latent_proj", source, _q_latent_paths(params), parts, finish)
    gate = done.pop() if known.raw_q_latent is not None else known.gate
    return done, None if is_shared else index, gate


def _query_finish(params: dict[str, Any], step: LatentStep) -> dict[str, Any]:
    """Rotation and scale of the queries, as fields of a Section."""
    c, sizes = step.config, step.layer.sizes
    rotation = {"rotated": sizes.qk_nope_head_dim, "interleaved": c.rope_interleave} if sizes.qk_rope_head_dim else {}
    return {**rotation, "gain": _position_gain(params, step)}


def _position_gain(params: dict[str, Any], step: LatentStep) -> Array | None:
    """scale * ln(position + 1) + bias, float32[T, heads]; None in models that do not scale queries by it."""
    if "query_scale" not in params:
        return None
    # Padding may have any position.
    logarithm = jnp.log(jnp.maximum(step.metadata.positions, 0).astype(jnp.float32) + 1.0)
    return logarithm[:, None] * params["query_scale"]["scale"] + params["query_scale"]["bias"]


def _index_part(params: dict[str, Any], dtype: np.dtype, known: LatentProjections, step: LatentStep) -> Section:
    """The indexer's queries: some dimensions rotated, the others unchanged."""
    c = step.config
    factor = known.index_weights if is_fp8(dtype) else None
    gain = _position_gain(params["indexer"], step)
    how = {**_index_rotation(step), "factor": factor, "gain": gain}
    return Section(0, c.index_n_heads, c.index_head_dim, dtype.name, **how)
