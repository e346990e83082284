"""The shapes and constants of a model: one frozen dataclass per family, and presets.

Import these names from `sparse_mla_jax.config`, which also reads them from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sparse_mla_jax._check import require


def _check_counts(config: Any, may_be_zero: tuple[str, ...]) -> None:
    """Requires every integer field to be at least 1, or at least 0 if it is in `may_be_zero`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int) and not isinstance(value, bool):
            low = 0 if field.name in may_be_zero else 1
            require(value >= low, f"config field {field.name} is {value}; it must be at least {low}. Mend config.json.")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain when `factor` is 1, YaRN otherwise (frequencies of arXiv:2309.00071).

    Attributes:
      theta: base of the geometric frequency series.
      factor: how much longer the context is than `original_max_position`; 1 means plain RoPE.
      original_max_position: context length (tokens) before the extension.
      beta_fast, beta_slow: rotations over the original context that bound YaRN's ramp.
      mscale_all_dim: the softmax scale grows by (0.1 * mscale_all_dim * ln(factor) + 1) ** 2.
    """

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def softmax_factor(self) -> float:
        """The factor by which YaRN multiplies the softmax scale (1.0 for plain RoPE)."""
        if self.factor <= 1.0 or not self.mscale_all_dim:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2


@dataclasses.dataclass(frozen=True)
class DeepseekV32Config:
    """Shapes of a DeepSeek-V3.2 style model; field names are those of the published config.json.

    Hashable, so that it can be a static argument of `jax.jit`. Source: DeepSeek-V3.2-Exp, config.json and
    the technical report (arXiv:2512.02556).
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 3
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163840
    tie_word_embeddings: bool = False
    # Not a published field: quantise index queries to the FP8 type of the index cache, as DeepSeek's own code does.
    quantize_index_query: bool = False
    rope: RopeConfig = RopeConfig(factor=40.0, mscale_all_dim=1.0)

    def __post_init__(self):
        _check_counts(self, may_be_zero=("first_k_dense_replace", "n_shared_experts", "n_routed_experts"))
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"config field qk_rope_head_dim is {self.qk_rope_head_dim}; rotation works on pairs, so it must be even.",
        )
        require(
            self.index_head_dim >= self.qk_rope_head_dim,
            f"config field index_head_dim is {self.index_head_dim}, smaller than qk_rope_head_dim "
            f"{self.qk_rope_head_dim}; the indexer rotates its first qk_rope_head_dim dimensions.",
        )
        if self.num_moe_layers:
            require(
                self.n_routed_experts % self.n_group == 0,
                f"config field n_group is {self.n_group}; it must divide n_routed_experts ({self.n_routed_experts}).",
            )
            require(
                self.topk_group <= self.n_group,
                f"config field topk_group is {self.topk_group}; it can not exceed n_group ({self.n_group}).",
            )
            reachable = self.topk_group * (self.n_routed_experts // self.n_group)
            require(
                self.num_experts_per_tok <= reachable,
                f"config field num_experts_per_tok is {self.num_experts_per_tok}; kept groups hold {reachable}.",
            )

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts: all after the first `first_k_dense_replace`."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace) if self.n_routed_experts else 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one expanded query or key head: nope and rope dimensions."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Softmax scale of the main attention, YaRN's correction included."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_factor

    @property
    def kv_group_size(self) -> int:
        """Latent values that share one FP8 scale: 128, or the whole latent if 128 does not divide its width."""
        return 128 if self.kv_lora_rank % 128 == 0 else self.kv_lora_rank

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def dense(self) -> DeepseekV32Config:
        """The same model with dense attention: every visible key is attended to and the indexer never runs."""
        return dataclasses.replace(self, index_topk=2**31 - 1)


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
        _check_counts(self, may_be_zero=("num_hash_layers", "n_shared_experts"))
        ratios = self.compress_ratios
        require(
            isinstance(ratios, tuple)
            and all(isinstance(ratio, int) and not isinstance(ratio, bool) and ratio >= 0 for ratio in ratios),
            f"config field compress_ratios is {ratios!r}; a tuple of integers of at least 0 is expected: 0 for a"
            " sliding-window layer, else the tokens of a compressed entry.",
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

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts: every layer does."""
        return True


Config = DeepseekV32Config | DeepseekV4Config

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
