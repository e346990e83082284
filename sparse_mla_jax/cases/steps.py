"""Decode steps of models with latent attention (MLA), and their attention layers.

One layer, or all layers of a model in one program. Feed-forward layers are left out: one of V4's has 13 GB of experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DEEPSEEK_V32, MlaConfig, default_config
from sparse_mla_jax.layers.mla import attention_step, fuse_projections
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import decode_metadata
from sparse_mla_jax.models import mla
from sparse_mla_jax.parallel.axes import Parallel

PAGE_SIZE = 64


def of_one_device(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The part of an array that one device has; all of it if it has no sharding."""
    return a if a.sharding is None else jax.ShapeDtypeStruct(a.sharding.shard_shape(a.shape), a.dtype)


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step, or only its attention layers, with the shapes for which it is compiled.

    Attributes:
      fn: (params, inputs, caches, seq_lens[B], page_table[B, P]) -> (outputs, caches). Inputs and outputs of a decode
        step are token ids int32[B], those of attention layers hidden states [B, D].
      args: shapes of its arguments. Those of a step on many devices have a jax.sharding.NamedSharding.
      donated: index of the argument that is updated in place: the caches.
    """

    fn: Any
    args: tuple[Any, ...]
    donated: int = 2

    @property
    def caches(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of all caches, those of one device."""
        return [of_one_device(a) for a in jax.tree.leaves(self.args[self.donated])]

    @property
    def first_cache(self) -> int:
        """Index of the first cache array among all input arrays."""
        return len(jax.tree.leaves(self.args[: self.donated]))


def published_config(*, heads: int, layers: int, model: str = "deepseek_v32") -> MlaConfig:
    """The published model of a family with the heads of one GPU and its first layers.

    Of a part of the layers only the first may be dense.

    Raises:
      ValueError: sizes below 1 or above the model's, or a model without latent attention.
    """
    # Without model_type, config.json means DeepSeek-V3.2 with plain rotation; the preset has the published one.
    config = DEEPSEEK_V32 if model == DEEPSEEK_V32.family else default_config(model)
    require(
        isinstance(config, MlaConfig),
        f"model is {model!r}, which has no MlaConfig; expected is a family of latent attention (MLA).",
    )
    assert isinstance(config, MlaConfig)
    if not config.mlp_layer_types and layers < config.num_hidden_layers:
        config = dataclasses.replace(config, first_k_dense_replace=min(1, config.first_k_dense_replace))
    return config.cut(layers=layers, heads=heads)


def _shapes(config: MlaConfig, batch: int, context: int, cache_dtype: Any) -> tuple[Any, Any, Any]:
    """Shapes of the caches, of an int32 per sequence, and of the page table."""
    for name, value in (("batch", batch), ("context", context)):
        require(value >= 1, f"{name} is {value}; at least 1 is expected.")
    require(context % PAGE_SIZE == 0, f"context is {context}; a multiple of the page size {PAGE_SIZE} is expected.")
    pages, dtype = context // PAGE_SIZE, jnp.dtype(cache_dtype)
    caches = jax.eval_shape(
        lambda: mla.create_caches(config, batch * pages, PAGE_SIZE, num_requests=batch, dtype=dtype)
    )
    return caches, jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, pages), jnp.int32)


def decode_step(
    *,
    heads: int = 16,
    batch: int = 64,
    context: int = 32768,
    layers: int = 2,
    cache_dtype: Any = jnp.float8_e4m3fnuz,
    model: str = "deepseek_v32",
) -> Step:
    """A model's greedy decode step in bfloat16, for `compile`, with fused weights (`fuse_projections`).

    Args:
      heads: attention heads on this GPU (DeepSeek-V3.2 has 128).
      batch: sequences.
      context: tokens that the caches of a sequence can hold, a multiple of 64.
      layers: the first ones of the model; DeepSeek-V3.2's first is dense, the others are mixtures of 256 experts.
      cache_dtype: of latents and index keys.
      model: a model_type of latent attention.

    Raises:
      ValueError: see `published_config`; or a context that is not a multiple of the page size.
    """
    config = published_config(heads=heads, layers=layers, model=model)
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, token_ids, caches, seq_lens, page_table):
        scores, caches = mla.decode(
            params, token_ids, caches, seq_lens, page_table, config=config, implementation="triton"
        )
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    params = jax.eval_shape(mla.fuse_projections, mla.param_specs(config, jnp.bfloat16))
    return Step(step, (params, per_sequence, caches, per_sequence, table))


def layer_step(
    config: MlaConfig,
    *,
    batch: int,
    context: int,
    cache_dtype: Any,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> Step:
    """One attention layer of such a decode step: normed hidden states in, the layer's output [B, D] out.

    Its weights are fused (`fuse_projections`).

    Args:
      config: of the model, from `published_config`; one of its layers is used.
      batch, context, cache_dtype: as in `decode_step`.
      implementation: None, "triton", "xla" or "reference", of every operator.
      parallel: the axes over which the step is spread, inside `jax.shard_map`; the shapes are those of one device.

    Raises:
      ValueError: sizes below 1, or a context that is not whole pages.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, hidden, caches, seq_lens, page_table):
        metadata = decode_metadata(seq_lens, page_table, page_size=PAGE_SIZE)
        out, cache, index_cache = attention_step(
            params,
            hidden,
            caches[0],
            caches[1],
            metadata,
            config=config,
            implementation=implementation,
            parallel=parallel,
        )
        return out, (cache, index_cache)

    one = dataclasses.replace(config, num_hidden_layers=1)
    specs = mla.param_specs(one, jnp.bfloat16)
    params = jax.eval_shape(fuse_projections, specs["layers"][0]["self_attn"])
    hidden = jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.bfloat16)
    return Step(step, (params, hidden, caches[0], per_sequence, table))


def layers_step(
    config: MlaConfig,
    *,
    batch: int,
    context: int,
    cache_dtype: Any,
    implementation: str | None = None,
    parallel: Parallel | None = None,
) -> Step:
    """config.num_hidden_layers attention layers in a row; each reads the normed sum of the input and earlier outputs.

    Arguments as for `layer_step`; params and caches are tuples over layers. Norms have no weights, and there are no
    feed-forward layers.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)
    options: dict[str, Any] = {"cache_dtype": cache_dtype, "implementation": implementation, "parallel": parallel}
    single = layer_step(config, batch=batch, context=context, **options)

    @jax.jit
    def layer(params, hidden, cache, seq_lens, page_table):
        out, cache = single.fn(
            params, rms_norm(hidden, jnp.ones(hidden.shape[1], jnp.float32)), cache, seq_lens, page_table
        )
        return hidden + out, cache

    def step(params, hidden, caches, seq_lens, page_table):
        after = []
        for weights, cache in zip(params, caches):
            # A separate function, so that all layers are traced and lowered once.
            hidden, cache = layer(weights, hidden, cache, seq_lens, page_table)
            after.append(cache)
        return hidden, tuple(after)

    params, hidden = single.args[:2]
    return Step(step, ((params,) * config.num_hidden_layers, hidden, caches, per_sequence, table))
