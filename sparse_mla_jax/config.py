"""The shapes and constants of a model: one frozen dataclass, presets, and reading a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`; a message names the argument, what came, what fits, the remedy."""
    if not condition:
        raise ValueError(message)


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
        """What YaRN multiplies the softmax scale by (1.0 for plain RoPE)."""
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
    rope: RopeConfig = RopeConfig(factor=40.0, mscale_all_dim=1.0)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool):
                low = 0 if field.name in ("first_k_dense_replace", "n_shared_experts", "n_routed_experts") else 1
                require(
                    value >= low, f"config field {field.name} is {value}; it must be at least {low}. Mend config.json."
                )
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
        """Layers after the first `first_k_dense_replace` ones are mixtures of experts."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace) if self.n_routed_experts else 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one expanded query or key head: nope and rope parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Softmax scale of the main attention, YaRN's correction included."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_factor

    @property
    def kv_group_size(self) -> int:
        """Latent values that share one FP8 scale: 128, or the whole latent where 128 does not divide it."""
        return 128 if self.kv_lora_rank % 128 == 0 else self.kv_lora_rank

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def dense(self) -> DeepseekV32Config:
        """The same model with every visible key attended to (the indexer is never asked)."""
        return dataclasses.replace(self, index_topk=2**31 - 1)


DEEPSEEK_V32 = DeepseekV32Config()


def _rope_from_json(data: dict[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (new spelling) or `rope_scaling` with `rope_theta` (the published file's spelling)."""
    parameters = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta = float(parameters.get("rope_theta", data.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    require(
        kind == "yarn",
        f"config field rope_type is {kind!r}; supported are 'default' and 'yarn'. Convert the model or open an issue.",
    )
    mscale, mscale_all_dim = (float(parameters.get(name) or 0.0) for name in ("mscale", "mscale_all_dim"))
    require(
        mscale_all_dim in (0.0, mscale) or "mscale" not in parameters,
        f"config fields mscale {mscale} and mscale_all_dim {mscale_all_dim} differ; cosines and sines would have to be"
        " scaled, which no DeepSeek model of this family asks for. Set them equal.",
    )
    return RopeConfig(
        theta=theta,
        factor=float(parameters.get("factor", 1.0)),
        original_max_position=int(parameters.get("original_max_position_embeddings", 4096)),
        beta_fast=float(parameters.get("beta_fast", 32.0)),
        beta_slow=float(parameters.get("beta_slow", 1.0)),
        mscale_all_dim=mscale_all_dim,
    )


def config_from_json(data: dict[str, Any]) -> DeepseekV32Config:
    """Builds a config from the fields of a Hugging Face config.json; absent fields take DeepSeek-V3.2's values.

    Raises:
      ValueError: another architecture, a field of the wrong type, or sizes that do not fit together.
    """
    require(isinstance(data, dict), f"config.json holds a {type(data).__name__}; a JSON object is expected.")
    kind = data.get("model_type", "deepseek_v32")
    require(
        kind in ("deepseek_v32", "deepseek_v3_2"),
        f"config.json names model_type {kind!r}; this reader knows 'deepseek_v32'. Give a DeepSeek-V3.2 folder.",
    )
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(DeepseekV32Config):
        if field.name == "rope" or data.get(field.name) is None:
            continue
        value = data[field.name]
        default: Any = field.default
        wanted = (int, float) if isinstance(default, float) else type(default)
        ok = isinstance(value, wanted) and (isinstance(default, bool) or not isinstance(value, bool))
        require(
            ok, f"config field {field.name} is {value!r}; a {type(default).__name__} is expected. Mend config.json."
        )
        fields[field.name] = type(default)(value)
    return DeepseekV32Config(**fields, rope=_rope_from_json(data))


def load_config(folder: str | os.PathLike[str]) -> DeepseekV32Config:
    """Reads `folder`/config.json.

    Raises:
      ValueError: no such folder or file, not JSON, or a model that this package does not know.
    """
    path = os.path.join(folder, "config.json")
    require(
        os.path.isdir(folder), f"model folder {os.fspath(folder)!r} does not exist; give a folder with config.json."
    )
    require(os.path.isfile(path), f"{os.fspath(folder)!r} has no config.json; give a Hugging Face model folder.")
    try:
        with open(path, encoding="utf-8") as f:
            data = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the file again.") from None
    return config_from_json(data)
