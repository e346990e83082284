"""One attention layer of a model with latent attention (MLA): its kind, its sizes, and what it takes from others."""

from __future__ import annotations

import dataclasses

from sparse_mla_jax._check import require
from sparse_mla_jax._config_fields import RopeConfig, check_fields, check_rope

# Kinds of attention layers: the keys that an indexer chooses, all keys, the newest keys.
INDEXED, FULL, SLIDING = "indexed_attention", "full_attention", "sliding_attention"


class DerivedSizes:
    """What follows from the sizes of an attention layer."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    rope: RopeConfig

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


@dataclasses.dataclass(frozen=True)
class AttentionSizes(DerivedSizes):
    """The sizes of an attention layer that differ from those of the config; see `MlaConfig` for the names."""

    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = RopeConfig()

    def __post_init__(self):
        check_fields(self, may_be_zero=("q_lora_rank", "qk_rope_head_dim"))
        check_rope("rope", self.rope)
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"config field qk_rope_head_dim is {self.qk_rope_head_dim}; rotation works on pairs, so it must be even.",
        )


@dataclasses.dataclass(frozen=True)
class MlaLayer:
    """One layer of a model, from `MlaConfig.layer`.

    Attributes:
      number: of the layer.
      kind: "indexed_attention" (the keys that an indexer chooses), "full_attention" (all) or "sliding_attention".
      sizes: heads, ranks, widths and rotation. A layer without rotation has a rope width of 0, and all of a head is
        nope.
      index_source: the layer whose indexer chooses; None if the layer is not "indexed_attention".
      kv_source: the layer whose latents it attends to.
      is_moe: whether it routes to experts.
    """

    number: int
    kind: str
    sizes: AttentionSizes
    index_source: int | None
    kv_source: int
    is_moe: bool

    @property
    def has_indexer(self) -> bool:
        """Whether the layer has an indexer of its own."""
        return self.index_source == self.number

    @property
    def shares_index(self) -> bool:
        """Whether the layer uses the selection of another one."""
        return self.index_source not in (None, self.number)

    @property
    def has_latents(self) -> bool:
        """Whether the layer makes and caches latents of its own."""
        return self.kv_source == self.number

    @property
    def is_sliding(self) -> bool:
        """Whether its keys are the newest ones of a request, in a ring of slots (`ops.window`)."""
        return self.kind == SLIDING
