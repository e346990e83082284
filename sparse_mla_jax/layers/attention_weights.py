"""The shapes of an attention layer's weights, for both kinds of layers, and the check of what a caller passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig

# Pytrees of dicts with shapes (tuples) in place of arrays.
Shapes = dict[str, Any]
Fuse = Callable[[dict[str, Any]], dict[str, Any]]


def mla_shapes(c: MlaConfig, layer: MlaLayer) -> Shapes:
    """Weights of a latent-attention layer, see `layers.mla.attention_step`."""
    s = layer.sizes
    heads, rank, latent = s.num_attention_heads, s.q_lora_rank, s.kv_lora_rank
    # With a gate from the query latent, its normed and raw form are the input of both.
    both = 2 * rank if c.attention_gate == "latent" else rank
    shapes: Shapes = {}
    if rank:
        shapes["q_a_proj"] = (c.hidden_size, rank)
        shapes["q_a_layernorm"] = (rank,)
        shapes["q_b_proj"] = (both, heads, s.qk_head_dim)
    else:
        shapes["q_proj"] = (c.hidden_size, heads, s.qk_head_dim)
    if layer.has_latents:
        shapes["kv_a_proj_with_mqa"] = (c.hidden_size, latent + s.qk_rope_head_dim)
        shapes["kv_a_layernorm"] = (latent,)
        if c.rope_key_norm:
            shapes["k_rope_layernorm"] = (s.qk_rope_head_dim,)
    shapes["kv_b_k"] = (heads, s.qk_nope_head_dim, latent)
    shapes["kv_b_v"] = (heads, latent, s.v_head_dim)
    gates = {"head": (c.hidden_size, heads), "value": (c.hidden_size, heads, s.v_head_dim)}
    if c.attention_gate != "none":
        shapes["output_gate"] = gates.get(c.attention_gate, (both, heads, s.v_head_dim))
    if c.attention_sinks:
        shapes["sinks"] = (heads,)
    shapes["o_proj"] = (heads, s.v_head_dim, c.hidden_size)
    if c.query_position_scale:
        shapes["query_scale"] = {"scale": (heads,), "bias": (heads,)}
    if c.attention_bias:
        outputs = {"q_a_proj": (rank,), "kv_a_proj_with_mqa": (latent + s.qk_rope_head_dim,)}
        shapes |= {f"{name}_bias": shape for name, shape in outputs.items() if name in shapes}
        shapes["o_proj_bias"] = (c.hidden_size,)
    if layer.has_indexer:
        shapes["indexer"] = _indexer_shapes(c, rank)
    return shapes


def _indexer_shapes(c: MlaConfig, rank: int) -> Shapes:
    heads, width = c.index_n_heads, c.index_head_dim
    shapes: Shapes = {
        "wq_b": (c.hidden_size if c.index_query_from_hidden else rank, heads, width),
        "wk": (c.hidden_size, width),
        "k_norm": {"weight": (width,), "bias": (width,)},
        "weights_proj": (c.hidden_size, heads),
    }
    if c.index_query_from_hidden:
        shapes["q_norm"] = {"weight": (c.hidden_size,), "bias": (c.hidden_size,)}
    if c.query_position_scale:
        shapes["query_scale"] = {"scale": (heads,), "bias": (heads,)}
    return shapes


def _compressor_shapes(c: DeepseekV4Config, ratio: int, width: int) -> Shapes:
    both = width * (2 if c.compressor_overlap(ratio) else 1)
    return {
        "kv_proj": (c.hidden_size, both),
        "gate_proj": (c.hidden_size, both),
        "position_bias": (ratio, both),
        "norm": (width,),
    }


def compressed_shapes(c: DeepseekV4Config, layer: int) -> Shapes:
    """Weights of layer number `layer` of DeepSeek-V4, see `layers.compressed_attention.compressed_attention_step`."""
    shapes: Shapes = {
        "q_a_proj": (c.hidden_size, c.q_lora_rank),
        "q_a_layernorm": (c.q_lora_rank,),
        "q_b_proj": (c.q_lora_rank, c.num_attention_heads, c.head_dim),
        "kv_proj": (c.hidden_size, c.head_dim),
        "kv_layernorm": (c.head_dim,),
        "sinks": (c.num_attention_heads,),
        "o_a_proj": (c.o_groups, c.num_attention_heads // c.o_groups * c.head_dim, c.o_lora_rank),
        "o_b_proj": (c.o_groups * c.o_lora_rank, c.hidden_size),
    }
    ratio = c.compress_ratio(layer)
    if ratio:
        shapes["compressor"] = _compressor_shapes(c, ratio, c.head_dim)
    if c.has_indexer(layer):
        shapes["indexer"] = {
            "wq_b": (c.q_lora_rank, c.index_n_heads, c.index_head_dim),
            "weights_proj": (c.hidden_size, c.index_n_heads),
            "compressor": _compressor_shapes(c, ratio, c.index_head_dim),
        }
    return shapes


def check_weights(params: Any, shapes: Callable[[Any, Any], Shapes], config: Any, layer: Any, fuse: Fuse) -> None:
    """Checks one layer's weights, separate or fused, against the shapes that the config asks for.

    Args:
      params: as the caller passed them.
      shapes: gives those of the separate weights of a config's layer: `mla_shapes` or `compressed_shapes`.
      config: the model's shapes.
      layer: of the config.
      fuse: the layer's `fuse_projections`.

    Raises:
      ValueError: a weight that is missing, has another shape, is not floating, or that the layer does not have.
    """
    _check.instance("params", params, dict, hint="Pass one layer's weights, layers[i]['self_attn'].")
    wanted = _by_path(_expected(shapes, config, layer, fuse if "hidden_proj" in params else None))
    given = _by_path(params)
    missing, surplus = (sorted(a - b) for a, b in ((set(wanted), set(given)), (set(given), set(wanted))))
    faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(surplus)}"] * bool(surplus)
    require(
        not faults,
        f"params {' and '.join(faults)}; expected {', '.join(wanted)}. Pass one layer's weights, layers[i]['self_attn']"
        " of this config's model.",
    )
    for name, shape in wanted.items():
        _check.array(f"params[{name}]", given[name], jnp.floating, *shape, hint="The config gives these sizes.")


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their keys joined with dots; a tuple of sizes is a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


@functools.lru_cache(maxsize=256)
def _expected(shapes: Callable[[Any, Any], Shapes], config: Any, layer: Any, fuse: Fuse | None) -> Shapes:
    separate = shapes(config, layer)
    if fuse is None:
        return separate
    specs = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), separate, is_leaf=lambda node: isinstance(node, tuple)
    )
    return jax.tree.map(lambda spec: spec.shape, jax.eval_shape(fuse, specs))
