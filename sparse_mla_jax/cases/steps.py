"""Decode steps: attention layers of DeepSeek-V3.2, and of DeepSeek-V4 with its hyper-connections.

One layer, or all layers of a model in one program. Feed-forward layers are left out: one of V4's has 13 GB of experts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.mla import attention_step, fuse_projections
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import decode_metadata
from sparse_mla_jax.models import deepseek_v32

PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step, or only its attention layers, with the shapes for which it is compiled.

    Attributes:
      fn: (params, inputs, caches, seq_lens[B], page_table[B, P]) -> (outputs, caches). Inputs and outputs of a decode
        step are token ids int32[B], those of attention layers hidden states [B, D].
      args: shapes of its arguments.
      donated: index of the argument that is updated in place: the caches.
    """

    fn: Any
    args: tuple[Any, ...]
    donated: int = 2

    @property
    def caches(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of all caches."""
        return jax.tree.leaves(self.args[self.donated])

    @property
    def first_cache(self) -> int:
        """Index of the first cache array among all input arrays."""
        return len(jax.tree.leaves(self.args[: self.donated]))


def published_config(*, heads: int, layers: int) -> DeepseekV32Config:
    """DeepSeek-V3.2 with the heads of one GPU and `layers` layers, of which the first is dense.

    Raises:
      ValueError: sizes below 1.
    """
    for name, value in (("heads", heads), ("layers", layers)):
        require(value >= 1, f"{name} is {value}; at least 1 is expected.")
    return dataclasses.replace(
        DeepseekV32Config(), num_attention_heads=heads, num_hidden_layers=layers, first_k_dense_replace=1
    )


def _shapes(config: DeepseekV32Config, batch: int, context: int, cache_dtype: Any) -> tuple[Any, Any, Any]:
    """Shapes of the caches, of an int32 per sequence, and of the page table."""
    for name, value in (("batch", batch), ("context", context)):
        require(value >= 1, f"{name} is {value}; at least 1 is expected.")
    require(context % PAGE_SIZE == 0, f"context is {context}; a multiple of the page size {PAGE_SIZE} is expected.")
    pages = context // PAGE_SIZE
    caches = jax.eval_shape(
        lambda: deepseek_v32.create_caches(config, batch * pages, PAGE_SIZE, dtype=jnp.dtype(cache_dtype))
    )
    return caches, jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, pages), jnp.int32)


def decode_step(
    *, heads: int = 16, batch: int = 64, context: int = 32768, layers: int = 2, cache_dtype: Any = jnp.float8_e4m3fnuz
) -> Step:
    """DeepSeek-V3.2's greedy decode step in bfloat16, for `compile`, with fused weights (`fuse_projections`).

    Args:
      heads: attention heads on this GPU (the model has 128).
      batch: sequences.
      context: tokens that the caches of a sequence can hold, a multiple of 64.
      layers: the first is dense, the others mixtures of 256 experts; 61 in the published model.
      cache_dtype: of latents and index keys.

    Raises:
      ValueError: sizes below 1, or a context that is not a multiple of the page size.
    """
    config = published_config(heads=heads, layers=layers)
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, token_ids, caches, seq_lens, page_table):
        scores, caches = deepseek_v32.decode(
            params, token_ids, caches, seq_lens, page_table, config=config, implementation="triton"
        )
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    params = jax.eval_shape(deepseek_v32.fuse_projections, deepseek_v32.param_specs(config, jnp.bfloat16))
    return Step(step, (params, per_sequence, caches, per_sequence, table))


def layer_step(
    config: DeepseekV32Config, *, batch: int, context: int, cache_dtype: Any, implementation: str | None = None
) -> Step:
    """One attention layer of such a decode step: normed hidden states in, the layer's output [B, D] out.

    Its weights are fused (`fuse_projections`).

    Args:
      config: of the model, from `published_config`; one of its layers is used.
      batch, context, cache_dtype: as in `decode_step`.
      implementation: None, "triton", "xla" or "reference", of every operator.

    Raises:
      ValueError: sizes below 1, or a context that is not whole pages.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, hidden, caches, seq_lens, page_table):
        metadata = decode_metadata(seq_lens, page_table, page_size=PAGE_SIZE)
        out, cache, index_cache = attention_step(
            params, hidden, caches[0], caches[1], metadata, config=config, implementation=implementation
        )
        return out, (cache, index_cache)

    one = dataclasses.replace(config, num_hidden_layers=1)
    specs = deepseek_v32.param_specs(one, jnp.bfloat16)
    params = jax.eval_shape(fuse_projections, specs["layers"][0]["self_attn"])
    hidden = jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.bfloat16)
    return Step(step, (params, hidden, caches[0], per_sequence, table))


def layers_step(
    config: DeepseekV32Config, *, batch: int, context: int, cache_dtype: Any, implementation: str | None = None
) -> Step:
    """config.num_hidden_layers attention layers in a row; each reads the normed sum of the input and earlier outputs.

    Arguments as for `layer_step`; params and caches are tuples over layers. Norms have no weights, and there are no
    feed-forward layers.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)
    single = layer_step(config, batch=batch, context=context, cache_dtype=cache_dtype, implementation=implementation)

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
