"""The shapes and constants of a model: one frozen dataclass per family, and presets.

Import these names from `sparse_mla_jax.config`, which also reads them from a Hugging Face folder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sparse_mla_jax._check import require, shown

# Smallest and largest value of each field, far outside of every published model: a larger value is a mistake, and is
# refused before it takes memory or time. Fields that are not listed are sizes of one axis, from 1 to _LARGEST_SIZE.
_LARGEST_SIZE = 2**20
_LARGEST_RATIO = 2**16
_INT32 = 2**31 - 1
# Smaller constants would round to 0 in float32.
_EPSILON = (1e-30, 1.0)
_LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 2**24),
    "num_hidden_layers": (1, 1024),
    "n_routed_experts": (1, 2**14),
    "n_shared_experts": (0, 1024),
    "first_k_dense_replace": (0, 1024),
    "num_hash_layers": (0, 1024),
    "index_topk": (1, _INT32),
    "sliding_window": (1, 2**16),
    "max_position_embeddings": (1, _INT32),
    "hc_mult": (1, 64),
    "hc_sinkhorn_iters": (1, 1000),
    "hc_eps": _EPSILON,
    "rms_norm_eps": _EPSILON,
    "routed_scaling_factor": (1e-6, 1e6),
    "swiglu_limit": (1e-6, 1e30),
    "theta": (2.0, 1e30),
    "factor": (1.0, 1e6),
    "original_max_position": (1, _INT32),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale_all_dim": (0.0, 100.0),
    "attention_factor": (1e-3, 1e3),
}
# Most routed experts of all layers together: ten times those of DeepSeek-V4-Pro. Each one has tensors of its own.
_MOST_EXPERTS = 2**18
# Types that a field of each type accepts. bool is an int in Python, and is told apart in `_check_fields`.
_NUMBERS: dict[type, tuple[type, ...]] = {int: (int, np.integer), float: (int, float, np.integer, np.floating)}


def _check_fields(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Checks type and range of every field that is a number or a truth value. Fields in `may_be_zero` start at 0."""
    for field in dataclasses.fields(config):
        value, kind, name = getattr(config, field.name), type(field.default), f"config field {field.name}"
        if kind is bool:
            require(isinstance(value, bool), f"{name} is {shown(value)}; true or false is expected. Mend config.json.")
        elif kind in _NUMBERS:
            word = "an integer" if kind is int else "a number"
            known = isinstance(value, _NUMBERS[kind]) and not isinstance(value, bool)
            require(known, f"{name} is {shown(value)}; {word} is expected. Mend config.json.")
            low, high = _LIMITS.get(field.name, (1, _LARGEST_SIZE))
            low = 0 if field.name in may_be_zero else low
            require(value >= low, f"{name} is {shown(value)}; it must be at least {low}. Mend config.json.")
            require(value <= high, f"{name} is {shown(value)}; it must be at most {high}. Mend config.json.")


def _check_experts(layers: int, experts: int) -> None:
    require(
        layers * experts <= _MOST_EXPERTS,
        f"config fields num_hidden_layers {layers} and n_routed_experts {experts} make {layers * experts} experts; at"
        f" most {_MOST_EXPERTS} are supported. Mend config.json.",
    )


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: plain when `factor` is 1, YaRN otherwise (frequencies of arXiv:2309.00071).

    Attributes:
      theta: base of the geometric frequency series.
      factor: how much longer the context is than `original_max_position`; 1 means plain RoPE.
      original_max_position: context length (tokens) before the extension.
      beta_fast, beta_slow: rotations over the original context that bound YaRN's ramp.
      mscale_all_dim: the softmax scale grows by (0.1 * mscale_all_dim * ln(factor) + 1) ** 2.
      attention_factor: cosines and sines are multiplied by it. 1 in DeepSeek's published models.
    """

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 1.0

    def __post_init__(self):
        _check_fields(self)
        require(
            self.beta_fast >= self.beta_slow,
            f"config field beta_fast is {self.beta_fast}, less than beta_slow {self.beta_slow}; YaRN's ramp goes from"
            " fast to slow. Exchange them.",
        )

    @property
    def softmax_factor(self) -> float:
        """The factor by which YaRN multiplies the softmax scale (1.0 for plain RoPE)."""
        if self.factor <= 1.0 or not self.mscale_all_dim:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2


def _check_rope(name: str, rope: Any) -> None:
    require(
        isinstance(rope, RopeConfig),
        f"config field {name} is {shown(rope)}; a RopeConfig is expected. Make it with sparse_mla_jax.config.from_hf.",
    )


@dataclasses.dataclass(frozen=True)
class DeepseekV32Config:
    """Shapes of a DeepSeek-V3.2 style model; field names are those of the published config.json.

    Hashable, so that it can be a static argument of `jax.jit`. Source: DeepSeek-V3.2-Exp, config.json and
    the technical report (arXiv:2512.02556).

    Attributes:
      rope_interleave: the main attention rotates neighbouring dimensions; false: the two halves of the rotated ones.
      indexer_rope_interleave: the same for the indexer, which rotates halves in DeepSeek-V3.2.
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
    rope_interleave: bool = True
    indexer_rope_interleave: bool = False
    # Not a published field: quantise index queries to the FP8 type of the index cache, as DeepSeek's own code does.
    quantize_index_query: bool = False
    rope: RopeConfig = RopeConfig(factor=40.0, mscale_all_dim=1.0)

    def __post_init__(self):
        _check_fields(self, may_be_zero=("n_routed_experts",))
        _check_rope("rope", self.rope)
        _check_experts(self.num_hidden_layers, self.n_routed_experts)
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
        _check_fields(self)
        _check_experts(self.num_hidden_layers, self.n_routed_experts)
        for name, rope in (("rope", self.rope), ("compress_rope", self.compress_rope)):
            _check_rope(name, rope)
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
