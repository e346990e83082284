"""Attention heads over the axis "tensor": the sizes that one device has."""

from __future__ import annotations

import dataclasses

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.mla_layer import MlaLayer
from sparse_mla_jax.parallel.axes import Parallel, divisors


def own_layer(layer: MlaLayer, parallel: Parallel | None) -> MlaLayer:
    """`layer` with the heads that one device has; heads are split in order.

    Raises:
      ValueError: heads that "tensor" does not divide.
    """
    if parallel is None or parallel.tensor == 1:
        return layer
    heads = layer.sizes.num_attention_heads
    _check_parts(f"layer {layer.number} has {heads} attention heads", heads, parallel.tensor)
    sizes = dataclasses.replace(layer.sizes, num_attention_heads=heads // parallel.tensor)
    return dataclasses.replace(layer, sizes=sizes)


def own_config(config: DeepseekV4Config, parallel: Parallel | None) -> DeepseekV4Config:
    """`config` with the heads and output groups that one device has; a group keeps its heads.

    Raises:
      ValueError: groups that "tensor" does not divide.
    """
    if parallel is None or parallel.tensor == 1:
        return config
    groups, size = config.o_groups, parallel.tensor
    _check_parts(f"o_groups is {groups}, whose heads stay together", groups, size)
    return dataclasses.replace(config, num_attention_heads=config.num_attention_heads // size, o_groups=groups // size)


def _check_parts(what: str, count: int, parts: int) -> None:
    require(
        count % parts == 0,
        f"tensor is {parts}, but {what}; give a size of the axis tensor that divides them: {divisors(count)}.",
    )
