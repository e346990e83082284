"""The `quantization_config` of a config.json: its format must be one that is read.

Each tensor's type in the file tells how it is stored (see `models.quantized_weights`), and values are multiplied by
their scales in every supported format. Supported are FP8 (e4m3) matrices, as DeepSeek ("fp8"), llm-compressor
("compressed-tensors"), Quark and ModelOpt save them, and DeepSeek-V4's FP4 experts. Activations and caches are not
quantised as the file says.
"""

from __future__ import annotations

import re
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._json_fields import ConfigFields

_METHODS = ("fp8", "compressed-tensors", "quark", "modelopt")
# Activations, caches, bookkeeping, and which modules are not quantised, which their tensors' types tell.
_WITHOUT_EFFECT = (
    *("activation_scheme", "dequantize", "ignore", "ignored_layers", "exclude", "exclude_modules"),
    *("modules_to_not_convert", "kv_cache_scheme", "kv_cache_quant_algo", "quantization_status", "version", "producer"),
    *("global_compression_ratio", "export", "quant_mode", "layer_quant_config", "layer_type_quant_config"),
)
_FIXED: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3", "e4m3fn", "e4m3fnuz"),
    "scale_fmt": ("ue8m0", "float", "float32"),
    "expert_dtype": ("fp4", "fp8", "bf16", "bfloat16", "float32"),
    "format": ("float-quantized",),
    "quant_algo": ("FP8", "FP8_PB_WO"),
    # Pruned weights, and weights that only fit transformed activations.
    "sparsity_config": ({},),
    "transform_config": ({},),
}
_FIXED_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block"),
    "dtype": ("fp8_e4m3",),
}


def check_quantization(fields: ConfigFields) -> None:
    """Checks quantization_config.

    Raises:
      ValueError: a format that is not supported, or a block size that is not two positive integers.
    """
    section = fields.section("quantization_config")
    if section is None:
        return
    method = section.read("quant_method", str, "fp8")
    require(
        method in _METHODS,
        f"config field quantization_config.quant_method is {shown(method)}; supported are"
        f" {', '.join(map(repr, _METHODS))}. Convert the weights to bfloat16, or to FP8 with scales of 128x128 blocks.",
    )
    section.require_values(_FIXED)
    section.ignore(_WITHOUT_EFFECT)
    read_block(section.full_name("weight_block_size"), section.raw("weight_block_size"))
    groups = section.section("config_groups")
    if groups is not None:
        for name in groups.names():
            _check_weights(groups.section(name), "weights")
    _check_weights(section.section("global_quant_config"), "weight")


def _check_weights(group: ConfigFields | None, name: str) -> None:
    """Checks the description of quantised weights in a group of compressed-tensors or Quark."""
    weights = group.section(name) if group else None
    if weights is not None:
        weights.require_values(_FIXED_WEIGHTS)
        read_block(weights.full_name("block_structure"), weights.raw("block_structure"))
    for section in (group, weights):
        if section is not None:
            # How the scales were found, and how activations were quantised.
            section.ignore(section.names())


def read_block(name: str, value: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale, a list or a text such as "128x128"; None for null.

    Raises:
      ValueError: something else than two positive integers; the message has `name`.
    """
    block = value
    if isinstance(block, str) and re.fullmatch(r"\d{1,7}x\d{1,7}", block):
        block = [int(size) for size in block.split("x")]
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    require(
        block is None or (is_pair and all(type(size) is int and 0 < size <= 2**20 for size in block)),
        f"config field {name} is {shown(block)}; two positive integers are expected. Mend config.json.",
    )
    return None if block is None else (block[0], block[1])
