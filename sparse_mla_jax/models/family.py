"""One face for every model family, chosen by the config's type: what the engine, the scorer, the command line need."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import parse_dtype, require
from sparse_mla_jax.config import Config, DeepseekV4Config
from sparse_mla_jax.metadata import StepMetadata
from sparse_mla_jax.models import deepseek_v4, deepseek_v32

# Types of a model's matrices.
DTYPES = ("float32", "bfloat16")


def module_of(config: Config) -> ModuleType:
    """The model's own module: init_params, param_specs, prefill, decode, logits, ..."""
    return deepseek_v4 if isinstance(config, DeepseekV4Config) else deepseek_v32


def param_specs(config: Config, dtype: Any) -> Any:
    """The parameters' pytree with a `jax.ShapeDtypeStruct` in place of every array."""
    return module_of(config).param_specs(config, dtype)


def default_page_size(config: Config) -> int:
    """Tokens per page that suit the model: 64; with compressed entries a multiple of 256 and of every ratio."""
    if not isinstance(config, DeepseekV4Config):
        return 64
    return math.lcm(256, *(config.compress_ratio(layer) or 1 for layer in range(config.num_hidden_layers)))


def create_caches(
    config: Config, num_pages: int, page_size: int, *, num_requests: int, max_query_len: int, dtype: Any
) -> Any:
    """Empty caches of all layers.

    Args:
      config: the model's shapes.
      num_pages: pages of all requests together.
      page_size: tokens per page.
      num_requests: requests that run at a time; state_ids of `forward` are below it.
      max_query_len: most tokens of one request in a step.
      dtype: of the caches.

    Raises:
      ValueError: sizes or a type that the caches do not support.
    """
    if isinstance(config, DeepseekV4Config):
        return deepseek_v4.create_caches(
            config, num_pages, page_size, num_requests=num_requests, max_query_len=max_query_len, dtype=dtype
        )
    return deepseek_v32.create_caches(config, num_pages, page_size, dtype=dtype)


def bytes_per_token(config: Config, caches: Any, page_size: int) -> float:
    """Cache bytes that one more token of context costs over all layers."""
    if isinstance(config, DeepseekV4Config):
        return deepseek_v4.bytes_per_token(caches, page_size)
    return sum(cache.bytes_per_token + index.bytes_per_token for cache, index in caches)


def bytes_per_request(config: Config, caches: Any) -> int:
    """Cache bytes that a running request costs besides, whatever its length."""
    return deepseek_v4.bytes_per_request(caches) if isinstance(config, DeepseekV4Config) else 0


def forward(
    params: Any,
    token_ids: Array,
    caches: Any,
    metadata: StepMetadata,
    *,
    config: Config,
    state_ids: Array,
    implementation: str | None,
) -> tuple[Array, Any]:
    """One step through all layers: (hidden [T, D] after the final norm, caches); see the models' own `forward`."""
    options: dict[str, Any] = {"config": config, "implementation": implementation}
    if isinstance(config, DeepseekV4Config):
        options["state_ids"] = state_ids
    return module_of(config).forward(params, token_ids, caches, metadata, **options)


def logits(params: Any, hidden: Array, config: Config) -> Array:
    """Scores of the next token, float32[..., V], from final-normed hidden [..., D]."""
    return module_of(config).logits(params, hidden, config)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def check_params(params: Any, config: Config, dtype: Any = None) -> Any:
    """Puts `params` on the device, matrices as `dtype` (None: as they are); norms stay float32.

    Raises:
      ValueError: a parameter that is missing, surplus or of another shape than `config` wants.
    """
    if dtype is None:
        dtype = params["embed_tokens"].dtype if isinstance(params, dict) and "embed_tokens" in params else jnp.float32
    wanted = parse_dtype("dtype", dtype, DTYPES)
    tree: Any
    given_tree: Any
    specs, tree = jax.tree_util.tree_flatten_with_path(param_specs(config, wanted))
    given, given_tree = jax.tree_util.tree_flatten_with_path(params)
    if given_tree != tree:
        names = [{_name(path) for path, _ in flat} for flat in (specs, given)]
        raise ValueError(
            f"params do not fit the config: missing {sorted(names[0] - names[1])[:5]}, surplus"
            f" {sorted(names[1] - names[0])[:5]}. Make them with init_params or load_checkpoint of the same config."
        )
    for (path, spec), (_, leaf) in zip(specs, given, strict=True):
        require(
            tuple(np.shape(leaf)) == spec.shape,
            f"params {_name(path)} has shape {tuple(np.shape(leaf))}; the config needs {spec.shape}.",
        )
    return jax.tree_util.tree_unflatten(
        tree, [jnp.asarray(leaf, spec.dtype) for (_, spec), (_, leaf) in zip(specs, given, strict=True)]
    )


def matmul_precision(params: Any) -> Any:
    """A context: float32 models multiply in full float32 on every device, others at the default precision."""
    return jax.default_matmul_precision("highest" if params["embed_tokens"].dtype == jnp.float32 else None)
