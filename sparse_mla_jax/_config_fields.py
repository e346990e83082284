"""The fields of a config that all models share: types, ranges, and the rotary embedding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sparse_mla_jax._check import require, shown

# Smallest and largest value of each field, far outside of every published model: a larger value is a mistake, and is
# refused before it takes memory or time. Fields that are not listed are sizes of one axis, from 1 to _LARGEST_SIZE.
_LARGEST_SIZE = 2**20
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
    "hc_magnitude": (1e-6, 1e6),
    "hc_sinkhorn_iters": (1, 1000),
    "hc_eps": _EPSILON,
    "rms_norm_eps": _EPSILON,
    "latent_norm_eps": _EPSILON,
    "index_norm_eps": _EPSILON,
    "routed_scaling_factor": (1e-6, 1e6),
    "swiglu_limit": (1e-6, 1e30),
    "final_logit_softcapping": (1e-6, 1e6),
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
# Types that a field of each type accepts. bool is an int in Python, and is told apart in `check_fields`.
_NUMBERS: dict[type, tuple[type, ...]] = {int: (int, np.integer), float: (int, float, np.integer, np.floating)}


def check_fields(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
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


def check_experts(layers: int, experts: int) -> None:
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
        check_fields(self)
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


def check_rope(name: str, rope: Any) -> None:
    require(
        isinstance(rope, RopeConfig),
        f"config field {name} is {shown(rope)}; a RopeConfig is expected. Make it with sparse_mla_jax.config.from_hf.",
    )
