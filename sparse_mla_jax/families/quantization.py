"""The `quantization_config` of a config.json. How a tensor is stored is told by its type in the file.

Supported are FP8 (e4m3) matrices, as DeepSeek publishes them (`quant_method` "fp8") and as llm-compressor saves them
("compressed-tensors"), and DeepSeek-V4's FP4 experts. Activations are never quantised.
"""

from __future__ import annotations

from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax.families.fields import ConfigFields

DEFAULT_BLOCK = (128, 128)
# How activations and caches were quantised, and which modules were not, has no effect on the weights that are read.
_WITHOUT_EFFECT = (
    *("activation_scheme", "modules_to_not_convert", "ignored_layers", "ignore", "kv_cache_scheme", "dequantize"),
    *("quantization_status", "global_compression_ratio", "version"),
)
_FP8: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3", "e4m3fn", "e4m3fnuz"),
    "scale_fmt": ("ue8m0", "float", "float32"),
    "expert_dtype": ("fp4", "fp8", "bf16", "bfloat16", "float32"),
}
_COMPRESSED: dict[str, tuple[Any, ...]] = {
    "format": ("float-quantized",),
    "sparsity_config": ({},),
    "transform_config": ({},),
}
_COMPRESSED_WEIGHTS: dict[str, tuple[Any, ...]] = {
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (True,),
    "strategy": ("tensor", "channel", "block"),
}


def read_block_size(fields: ConfigFields) -> tuple[int, int]:
    """Rows and columns of a matrix that share an FP8 scale: DeepSeek's 128x128 if config.json does not tell.

    Raises:
      ValueError: a quantisation that is not supported, or a block size that is not two positive integers.
    """
    section = fields.section("quantization_config")
    if section is None:
        return DEFAULT_BLOCK
    method = section.read("quant_method", str, "fp8")
    require(
        method in ("fp8", "compressed-tensors"),
        f"config field quantization_config.quant_method is {shown(method)}; supported are 'fp8' and"
        " 'compressed-tensors'. Convert the weights to bfloat16, or to FP8 with scales of 128x128 blocks.",
    )
    section.ignore(_WITHOUT_EFFECT)
    if method == "fp8":
        section.require_values(_FP8)
        return _block(section, "weight_block_size")
    section.require_values(_COMPRESSED)
    groups = section.section("config_groups")
    sizes = {_read_group(groups, str(name)) for name in groups.names()} if groups else {DEFAULT_BLOCK}
    require(
        len(sizes) == 1,
        f"config field quantization_config.config_groups has blocks of {' and '.join(map(str, sorted(sizes)))}; one"
        " size is supported. Convert the weights to bfloat16.",
    )
    return sizes.pop()


def _read_group(groups: ConfigFields, name: str) -> tuple[int, int]:
    """Block size of one group of compressed-tensors."""
    group = groups.section(name)
    weights = group.section("weights") if group else None
    if group is None or weights is None:
        return DEFAULT_BLOCK
    weights.require_values(_COMPRESSED_WEIGHTS)
    weights.ignore(["dynamic", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder", "group_size"])
    group.ignore(["targets", "input_activations", "output_activations", "format"])
    return _block(weights, "block_structure")


def _block(section: ConfigFields, name: str) -> tuple[int, int]:
    block = section.read(name, list)
    if block is None:
        return DEFAULT_BLOCK
    require(
        len(block) == 2 and all(type(size) is int and 0 < size <= 2**20 for size in block),
        f"config field {section.full_name(name)} is {shown(block)}; two positive integers are expected. Mend"
        " config.json.",
    )
    return block[0], block[1]
