"""Models with latent attention (MLA) as pure functions of (params, tokens, caches, metadata), with steps on top.

One module for every family of `families` whose config is an `MlaConfig`: DeepSeek-V3.2, GLM-5, Hy4, A.X-K2, Mistral
Large 4, dots3. Parameters: see `models.params_mla`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.layers import latent_projections
from sparse_mla_jax.layers.hyper_connections import join_streams, merge_streams, split_streams
from sparse_mla_jax.layers.latent_projections import learned_frequencies
from sparse_mla_jax.layers.mla import attention_step
from sparse_mla_jax.layers.moe import moe, swiglu
from sparse_mla_jax.layers.norm import gated_rms_norm, rms_norm
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.models import common
from sparse_mla_jax.models.common import Family, check_step, embed
from sparse_mla_jax.models.mla_caches import Caches, bytes_per_request, bytes_per_token, create_caches, tokens_per_page
from sparse_mla_jax.models.params_mla import Params, init_params, param_specs
from sparse_mla_jax.models.steps import decode, prefill
from sparse_mla_jax.parallel.axes import Parallel

__all__ = [
    "FAMILY",
    "Caches",
    "Params",
    "attention_input",
    "bytes_per_request",
    "bytes_per_token",
    "create_caches",
    "decode",
    "decoder_layer",
    "default_page_size",
    "embed",
    "forward",
    "fuse_projections",
    "init_params",
    "logits",
    "param_specs",
    "prefill",
    "tokens_per_page",
]


def fuse_projections(params: Params) -> Params:
    """Fuses the projections of every layer (`layers.latent_projections.fuse_projections`): faster steps on a GPU.

    Call it once, when weights are loaded (`jax.jit(fuse_projections, donate_argnums=0)`). Every step of this module
    accepts the result; `save_checkpoint` does not.
    """
    fuse = latent_projections.fuse_projections
    layers = [{**layer, "self_attn": fuse(layer["self_attn"])} for layer in params["layers"]]
    return {**params, "layers": layers}


def default_page_size(config: MlaConfig) -> int:
    """Tokens per page that suit the model: 64."""
    return 64


def logits(params: Params, hidden: Array, config: MlaConfig, parallel: Parallel | None = None) -> Array:
    """Scores of the next token, float32[..., V], from final-normed hidden [..., D]; pass only the rows you need.

    With final_logit_softcapping they are cap * tanh(score / cap).
    """
    scores, cap = common.logits(params, hidden, config, parallel), config.final_logit_softcapping
    return cap * jnp.tanh(scores / cap) if cap else scores


def forward(
    params: Params,
    token_ids: Array,
    caches: Caches,
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    state_ids: Array | None = None,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> tuple[Array, Caches]:
    """One step through all layers, for decode tokens and prefill chunks in any mix.

    Args:
      params: see `models.params_mla`.
      token_ids: int[T]; ids outside the vocabulary, and those of padding, are clamped into it.
      caches: from `create_caches`; donate them to update in place.
      metadata: of this step.
      config: the model's shapes (static).
      state_ids: int32[B], the ring of each request in sliding layers; None means b for request b.
      implementation: None, "triton", "xla" or "reference", for every operator.
      parallel: the axes over which the step is spread (static), inside `jax.shard_map`; None on one device. Weights and
        caches are then the device's own, see docs/howto/many-gpus.md.

    Returns:
      (hidden [T, D] after the final norm, caches).

    Raises:
      ValueError: token_ids, caches or metadata of other shapes than expected (at trace time).
    """
    check_step(token_ids, caches, metadata, config)
    state = embed(params, token_ids, config, parallel)
    if config.hc_mult:
        state = jnp.repeat(state[:, None, :], config.hc_mult, axis=1)
    frequencies = learned_frequencies(params["rope_alpha"], config) if config.learned_rope else None
    updated: list[Any] = []
    selection = None
    for layer, own in zip(config.layers, caches):
        cache = own[0] if layer.has_latents else updated[layer.kv_source][0]
        state, cache, index_cache, chosen = _layer(
            params,
            layer,
            state,
            (cache, own[1]),
            metadata,
            config=config,
            state_ids=state_ids,
            frequencies=frequencies,
            implementation=implementation,
            parallel=parallel,
            selection=selection if layer.shares_index else None,
        )
        # Layers that share it come later, with sliding layers between them perhaps.
        selection = chosen if layer.has_indexer else selection
        updated.append((cache if layer.has_latents else None, index_cache))
    return _finish(params, state, config, implementation), tuple(updated)


def _finish(params: Params, state: Array, c: MlaConfig, implementation: str | None) -> Array:
    """The final norm of the residual, whose streams are merged first."""
    if c.hc_mult:
        return merge_streams(params["hc_head"], state, config=c, norm=params["norm"], implementation=implementation)
    return rms_norm(state, params["norm"], eps=c.rms_norm_eps)


def _enter(layer: Params, part: str, state: Array, c: MlaConfig, implementation: str | None) -> tuple[Array, Any]:
    """The normed input of a sub-layer ("attn" or "ffn"), and the weights with which `_leave` adds its output."""
    norm = layer["input_layernorm" if part == "attn" else "post_attention_layernorm"]
    if c.hc_mult:
        return split_streams(layer[f"{part}_hc"], state, config=c, norm=norm, implementation=implementation)
    return _norm(norm, state, c), None


def _norm(norm: Any, x: Array, c: MlaConfig) -> Array:
    """The RMS norm, gated if its weights have a gate."""
    if isinstance(norm, dict):
        return gated_rms_norm(norm, x, eps=c.rms_norm_eps)
    return rms_norm(x, norm, eps=c.rms_norm_eps)


def _leave(state: Array, out: Array, weights: Any) -> Array:
    """The residual after a sub-layer."""
    return state + out.astype(state.dtype) if weights is None else join_streams(state, out, weights)


def _layer(
    params: Params,
    layer: MlaLayer,
    state: Array,
    caches: tuple[Any, Any],
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    implementation: str | None,
    parallel: Parallel | None = None,
    **options: Any,
) -> tuple[Array, Any, Any, Array | None]:
    """One layer on the residual: (residual, cache, index cache, selection); options: of `attention_step`."""
    own = params["layers"][layer.number]
    normed, weights = _enter(own, "attn", state, config, implementation)
    out, cache, index_cache, chosen = attention_step(
        own["self_attn"],
        normed,
        *caches,
        metadata,
        config=config,
        layer=layer.number,
        implementation=implementation,
        return_selection=True,
        parallel=parallel,
        **options,
    )
    state = _leave(state, out, weights)
    normed, weights = _enter(own, "ffn", state, config, implementation)
    if layer.is_moe:
        out = moe(own["mlp"], normed, config=config, parallel=parallel)
    else:
        out = swiglu(own["mlp"], normed, parallel=parallel)
    return _leave(state, out, weights), cache, index_cache, chosen


def attention_input(params: Params, number: int, hidden: Array, *, config: MlaConfig) -> Array:
    """The input of `layers.mla.attention_step` in layer `number`: the normed residual stream [T, D].

    hidden: the residual before the layer, [T, D], or [T, n, D] with hyper-connections.
    """
    return _enter(params["layers"][number], "attn", hidden, config, None)[0]


def decoder_layer(
    params: Params,
    number: int,
    hidden: Array,
    cache: Any,
    index_cache: Any,
    metadata: StepMetadata,
    *,
    config: MlaConfig,
    implementation: str | None = None,
    **options: Any,
) -> tuple[Array, Any, Any]:
    """Layer `number` on the residual stream hidden [T, D] ([T, n, D] with hyper-connections): attention, then SwiGLU
    or the mixture of experts.

    options: state_ids, frequencies and selection, as for `layers.mla.attention_step`, in models whose layers need them;
    and parallel.

    Returns:
      (residual, cache, index_cache).
    """
    options |= {"config": config, "implementation": implementation}
    return _layer(params, config.layer(number), hidden, (cache, index_cache), metadata, **options)[:3]


FAMILY = Family(
    forward=forward,
    prefill=prefill,
    decode=decode,
    logits=logits,
    param_specs=param_specs,
    init_params=init_params,
    fuse_projections=fuse_projections,
    create_caches=create_caches,
    default_page_size=default_page_size,
    tokens_per_page=tokens_per_page,
    bytes_per_token=bytes_per_token,
    bytes_per_request=bytes_per_request,
)
