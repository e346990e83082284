"""The shapes and constants of a model: one frozen dataclass for each kind of model, and presets.

Import these names from `sparse_mla_jax.config`, which also reads them from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._config_fields import RopeConfig, check_experts, check_fields, check_rope
from sparse_mla_jax.mla_layer import AttentionSizes, MlaLayer
from sparse_mla_jax.mla_shapes import MlaConfig

__all__ = [
    "DEEPSEEK_V4_FLASH",
    "DEEPSEEK_V4_PRO",
    "DEEPSEEK_V32",
    "AttentionSizes",
    "Config",
    "DeepseekV4Config",
    "DeepseekV32Config",
    "MlaConfig",
    "MlaLayer",
    "RopeConfig",
]

_LARGEST_RATIO = 2**16

# The name of the releases that read one family of latent attention.
DeepseekV32Config = MlaConfig

# Two layers without compression, then ratios 4 and 128 in turn, then 4.
_FLASH_RATIOS = (0, 0) + (4, 128) * 20 + (4,)


@dataclasses.dataclass(frozen=True)
class DeepseekV4Config:
    """Shapes of a DeepSeek-V4 style model; field names are those of the published config.json, defaults V4-Flash's.

    Hashable, so that it can be a static argument of `jax.jit`. Source: DeepSeek-V4-Flash and -Pro, config.json.

    Attributes:
      compress_ratios: per layer, how many tokens make one compressed entry; 0 (or 1) for a layer with a sliding window
        only. The published list also has multi-token-prediction layers at its end, which are cut off here.
      rope: rotation in layers that do not compress: plain.
      compress_rope: rotation of everything in layers that compress: YaRN.
    """

    family: ClassVar[str] = "deepseek_v4"

    vocab_size: int = 129280
    hidden_size: int = 4096
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    routed_scaling_factor: float = 1.5
    norm_topk_prob: bool = True
    num_hash_layers: int = 3
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1048576
    tie_word_embeddings: bool = False
    compress_ratios: tuple[int, ...] = _FLASH_RATIOS
    rope: RopeConfig = RopeConfig()
    compress_rope: RopeConfig = RopeConfig(theta=160000.0, factor=16.0, original_max_position=65536)

    def __post_init__(self):
        check_fields(self)
        check_experts(self.num_hidden_layers, self.n_routed_experts)
        for name, rope in (("rope", self.rope), ("compress_rope", self.compress_rope)):
            check_rope(name, rope)
            require(
                rope.attention_factor == 1.0 and rope.softmax_factor == 1.0,
                f"config field {name} has attention_factor {rope.attention_factor} and mscale_all_dim"
                f" {rope.mscale_all_dim}, which change the rotation's amplitude or the softmax scale; DeepSeek-V4 has"
                " neither. Set attention_factor to 1.0 and drop mscale and mscale_all_dim.",
            )
        ratios = self.compress_ratios
        require(
            isinstance(ratios, tuple) and all(type(ratio) is int and 0 <= ratio <= _LARGEST_RATIO for ratio in ratios),
            f"config field compress_ratios is {shown(ratios)}; a tuple of integers of at least 0 and at most"
            f" {_LARGEST_RATIO} is expected: 0 for a sliding-window layer, else the tokens of a compressed entry.",
        )
        require(
            len(ratios) == self.num_hidden_layers,
            f"config field compress_ratios has {len(ratios)} entries; num_hidden_layers is {self.num_hidden_layers}."
            " Give one per layer.",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"config field qk_rope_head_dim is {self.qk_rope_head_dim}; rotation works on pairs, so it must be even.",
        )
        require(
            self.qk_rope_head_dim < self.head_dim,
            f"config field qk_rope_head_dim is {self.qk_rope_head_dim}; it must be less than head_dim"
            f" ({self.head_dim}), of which it is the rotated end.",
        )
        require(
            self.index_head_dim >= self.qk_rope_head_dim,
            f"config field index_head_dim is {self.index_head_dim}, smaller than qk_rope_head_dim "
            f"{self.qk_rope_head_dim}; the indexer rotates its last qk_rope_head_dim dimensions.",
        )
        require(
            self.num_attention_heads % self.o_groups == 0,
            f"config field o_groups is {self.o_groups}; it must divide num_attention_heads"
            f" ({self.num_attention_heads}).",
        )
        require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"config field num_experts_per_tok is {self.num_experts_per_tok}; there are {self.n_routed_experts}"
            " (n_routed_experts) to choose from.",
        )

    @property
    def nope_dim(self) -> int:
        """Number of dimensions of a head that are not rotated. They come first, and a cache may quantise them."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Softmax scale of the main attention; YaRN does not change it."""
        return self.head_dim**-0.5

    @property
    def kv_group_size(self) -> int:
        """Values that share one FP8 scale: 64, or all nope dimensions if 64 does not divide their number."""
        return 64 if self.nope_dim % 64 == 0 else self.nope_dim

    @property
    def mixing_constants(self) -> dict[str, Any]:
        """Constants of the hyper-connections, the options of `ops.hyper_connections.split`."""
        return {"iterations": self.hc_sinkhorn_iters, "eps": self.hc_eps, "norm_eps": self.rms_norm_eps}

    def compress_ratio(self, layer: int) -> int:
        """Tokens of one compressed entry of layer number `layer`; 0 for sliding-window layers (published as 0 or 1)."""
        ratio = self.compress_ratios[layer]
        return ratio if ratio > 1 else 0

    def layer_rope(self, layer: int) -> RopeConfig:
        """The rotation of everything in layer number `layer`."""
        return self.compress_rope if self.compress_ratio(layer) else self.rope

    def is_hash_layer(self, layer: int) -> bool:
        """Whether layer number `layer` looks its experts up by token id."""
        return layer < self.num_hash_layers

    def has_indexer(self, layer: int) -> bool:
        """Whether layer number `layer` selects among its compressed entries (ratio 4) instead of reading them all."""
        return self.compress_ratio(layer) == 4

    def compressor_overlap(self, ratio: int) -> bool:
        """Whether an entry of that ratio also weighs the tokens of the previous window (ratio 4)."""
        return ratio == 4

    def describe_layer(self, number: int) -> str:
        """What layer `number` is, in words that are alike for layers that are alike."""
        ratio = self.compress_ratio(number)
        entries = f", {'chosen' if self.has_indexer(number) else 'all'} entries of {ratio} tokens" if ratio else ""
        experts = "experts by token id" if self.is_hash_layer(number) else "experts"
        return f"attends to the last {self.sliding_window} keys{entries}, {experts}"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts: every layer does."""
        return True


Config = MlaConfig | DeepseekV4Config

DEEPSEEK_V32 = DeepseekV32Config()
DEEPSEEK_V4_FLASH = DeepseekV4Config()
DEEPSEEK_V4_PRO = DeepseekV4Config(
    hidden_size=7168,
    moe_intermediate_size=3072,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    n_routed_experts=384,
    routed_scaling_factor=2.5,
    index_topk=1024,
    compress_ratios=(128,) + (128, 4) * 30,
)
