"""The shapes and constants of models with latent attention (MLA): one dataclass for all of their families.

What differs between families is a flag, what differs between the layers of a model a tuple with one entry per layer.
`MlaConfig.layer` puts both together for one layer. The defaults are DeepSeek-V3.2's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sparse_mla_jax._check import require, shown
from sparse_mla_jax._config_fields import RopeConfig, check_experts, check_fields, check_rope
from sparse_mla_jax.mla_layer import FULL, INDEXED, SLIDING, AttentionSizes, DerivedSizes, MlaLayer

# Values of the per-layer tuples and of the flags that are words.
LAYER_TYPES = (INDEXED, FULL, SLIDING)
INDEXER_TYPES = ("full", "shared")
MLP_TYPES = ("dense", "sparse")
_WORDS: dict[str, tuple[str, ...]] = {
    "attention_gate": ("none", "head", "value", "latent"),
    "scoring_func": ("sigmoid", "softmax"),
}
_TUPLES: dict[str, tuple[Any, ...]] = {
    "layer_types": LAYER_TYPES,
    "indexer_types": INDEXER_TYPES,
    "mlp_layer_types": MLP_TYPES,
    "rope_layers": (False, True),
}
_MAY_BE_ZERO = (
    *("n_routed_experts", "q_lora_rank", "gated_norm_rank", "hc_mult", "swiglu_limit", "final_logit_softcapping"),
    *("shared_experts_intermediate_size", "sliding_window"),
)


@dataclasses.dataclass(frozen=True)
class MlaConfig(DerivedSizes):
    """Shapes of a model with latent attention; fields have the names of the published config.json where it has them.

    Hashable, so that it can be a static argument of `jax.jit`. Defaults: DeepSeek-V3.2-Exp, config.json and the
    technical report (arXiv:2512.02556). A per-layer tuple is empty if all layers are as its default says.

    Attributes:
      q_lora_rank: width of the query latent; 0: queries come from the hidden state directly.
      rope_interleave: the main attention rotates neighbouring dimensions; false: the two halves of the rotated ones.
      indexer_rope_interleave: the same for the indexer, which rotates halves in DeepSeek-V3.2.
      family: whose config keys and tensor names a saved folder has, a model_type of `families`.
      layer_types: per layer "indexed_attention", "full_attention" or "sliding_attention"; default the first.
      layer_sizes: per layer, in models whose layers differ in them; default the sizes of the config.
      indexer_types: per layer "full", or "shared": the layer uses what the last indexer before it chose.
      kv_source_layers: per layer the number of the layer whose latents it uses; default its own.
      rope_layers: per layer whether it rotates; default true.
      mlp_layer_types: per layer "dense" or "sparse"; default: dense in the first `first_k_dense_replace` layers.
      sliding_window: keys that a token sees in layers of "sliding_attention", its own included.
      attention_gate: the attention output times a sigmoid: "head", one per head, and "value", one per value, from the
        hidden state; "latent", one per value, from the query latent before and after its norm, as the queries then are.
      attention_sinks: one more logit per head in the softmax's denominator.
      attention_bias: biases of q_a_proj, kv_a_proj_with_mqa and o_proj.
      latent_scaling: latents are multiplied by sqrt(hidden_size / rank) after their norm.
      rope_key_norm: the shared rotary key has an RMS norm before its rotation.
      learned_rope: frequencies are multiplied by exp(alpha), alpha [qk_rope_head_dim / 2] a parameter of the model.
      query_position_scale: queries, also the indexer's, are multiplied by scale * ln(position + 1) + bias per head.
      index_query_from_hidden: the indexer's queries come from a layer norm of the hidden state, not the query latent.
      indexer_rope_last: the indexer rotates its last dimensions; false: its first.
      latent_norm_eps, index_norm_eps: epsilons of the norms of both latents, and of the index keys.
      gated_norm_rank: rank of the gate of the norms before attention and experts; 0: no gate.
      hc_mult: residual streams, joined by independent hyper-connections; 0: a plain residual.
      hc_magnitude, hc_eps: constants of the hyper-connections' weights.
      scoring_func: "sigmoid" with a bias for the choice, or "softmax" without.
      excluded_experts_lose: false: experts outside the kept groups compete with a score of 0.
      shared_experts_intermediate_size: width of one shared expert; 0: moe_intermediate_size.
      swiglu_limit: bound of the routed experts' gate and up projections; 0: none.
      final_logit_softcapping: logits are cap * tanh(logit / cap); 0: no cap.
      float32_head: lm_head is float32 whatever the type of the matrices.
      quantize_index_query: no published field: index queries are quantised to the FP8 type of the index cache.
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
    quantize_index_query: bool = False
    rope: RopeConfig = RopeConfig(factor=40.0, mscale_all_dim=1.0)
    family: str = "deepseek_v32"
    layer_types: tuple[str, ...] = ()
    layer_sizes: tuple[AttentionSizes, ...] = ()
    indexer_types: tuple[str, ...] = ()
    kv_source_layers: tuple[int, ...] = ()
    rope_layers: tuple[bool, ...] = ()
    mlp_layer_types: tuple[str, ...] = ()
    sliding_window: int = 0
    attention_gate: str = "none"
    attention_sinks: bool = False
    attention_bias: bool = False
    latent_scaling: bool = False
    rope_key_norm: bool = False
    learned_rope: bool = False
    query_position_scale: bool = False
    index_query_from_hidden: bool = False
    indexer_rope_last: bool = False
    latent_norm_eps: float = 1e-6
    index_norm_eps: float = 1e-6
    gated_norm_rank: int = 0
    hc_mult: int = 0
    hc_magnitude: float = 2.0
    hc_eps: float = 1e-6
    scoring_func: str = "sigmoid"
    excluded_experts_lose: bool = True
    shared_experts_intermediate_size: int = 0
    swiglu_limit: float = 0.0
    final_logit_softcapping: float = 0.0
    float32_head: bool = False

    def __post_init__(self):
        check_fields(self, may_be_zero=_MAY_BE_ZERO)
        check_rope("rope", self.rope)
        check_experts(self.num_hidden_layers, self.n_routed_experts)
        _check_words(self)
        for layer in self.layers:
            _check_layer(self, layer)
        if self.num_moe_layers:
            _check_router(self)

    # --- layers
    def layer(self, number: int) -> MlaLayer:
        """Layer `number`, counted from 0.

        Raises:
          ValueError: there is no such layer.
        """
        require(
            0 <= number < self.num_hidden_layers,
            f"layer is {number}; the config has layers 0 to {self.num_hidden_layers - 1}.",
        )
        return MlaLayer(
            number,
            self._entry("layer_types", number, INDEXED),
            self._sizes(number),
            self._index_source(number),
            self._entry("kv_source_layers", number, number),
            self.is_moe_layer(number),
        )

    def describe_layer(self, number: int) -> str:
        """What layer `number` is, in words that are alike for layers that are alike."""
        layer = self.layer(number)
        kinds = {INDEXED: "attends to chosen keys", FULL: "attends to all keys"}
        words = [kinds.get(layer.kind, f"attends to the last {self.sliding_window} keys")]
        if layer.index_source is not None:
            words.append("own indexer" if layer.has_indexer else f"selection of layer {layer.index_source}")
        if not layer.has_latents:
            words.append(f"latents of layer {layer.kv_source}")
        if not layer.sizes.qk_rope_head_dim:
            words.append("no rotation")
        if self.layer_sizes:
            words.append(f"{layer.sizes.num_attention_heads} heads, latents of {layer.sizes.kv_lora_rank}")
        words.append("experts" if layer.is_moe else "dense MLP")
        return ", ".join(words)

    @property
    def layers(self) -> tuple[MlaLayer, ...]:
        """All layers."""
        return tuple(self.layer(number) for number in range(self.num_hidden_layers))

    def cut(self, *, layers: int, heads: int) -> MlaConfig:
        """The first `layers` layers, with at most `heads` attention heads each: what one device of several may hold.

        Raises:
          ValueError: less than one of either, or more layers than there are.
        """
        require(heads >= 1, f"heads is {heads}; at least 1 is expected.")
        require(
            1 <= layers <= self.num_hidden_layers,
            f"layers is {layers}; between 1 and {self.num_hidden_layers} are expected.",
        )
        names = (*_TUPLES, "kv_source_layers")
        sizes = (
            dataclasses.replace(one, num_attention_heads=min(heads, one.num_attention_heads))
            for one in self.layer_sizes[:layers]
        )
        return dataclasses.replace(
            self,
            num_hidden_layers=layers,
            num_attention_heads=min(heads, self.num_attention_heads),
            layer_sizes=tuple(sizes),
            **{name: getattr(self, name)[:layers] for name in names},
        )

    @property
    def is_uniform(self) -> bool:
        """Whether the attention of all layers is alike."""
        names = ("layer_types", "layer_sizes", "indexer_types", "kv_source_layers", "rope_layers")
        return not any(getattr(self, name) for name in names)

    def _entry(self, name: str, number: int, default: Any) -> Any:
        """Entry `number` of a per-layer tuple."""
        entries = getattr(self, name)
        return entries[number] if entries else default

    def _sizes(self, number: int) -> AttentionSizes:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(AttentionSizes)}
        sizes = self._entry("layer_sizes", number, None) or AttentionSizes(**own)
        if self._entry("rope_layers", number, True):
            return sizes
        return dataclasses.replace(sizes, qk_nope_head_dim=sizes.qk_head_dim, qk_rope_head_dim=0)

    def _index_source(self, number: int) -> int | None:
        kinds = self.layer_types or (INDEXED,) * self.num_hidden_layers
        if kinds[number] != INDEXED:
            return None
        full = self.indexer_types or ("full",) * self.num_hidden_layers
        return next((i for i in range(number, -1, -1) if kinds[i] == INDEXED and full[i] == "full"), -1)

    @property
    def num_moe_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.is_moe_layer(number) for number in range(self.num_hidden_layers))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` routes to experts."""
        kind = self._entry("mlp_layer_types", layer, "sparse" if layer >= self.first_k_dense_replace else "dense")
        return self.n_routed_experts > 0 and kind == "sparse"

    @property
    def shared_width(self) -> int:
        """Inner width of the shared experts together."""
        return (self.shared_experts_intermediate_size or self.moe_intermediate_size) * self.n_shared_experts

    @property
    def mixing_constants(self) -> dict[str, Any]:
        """Constants of the hyper-connections, the options of `ops.hyper_connections.split`."""
        constants = {"eps": self.hc_eps, "writes_eps": self.hc_eps, "norm_eps": self.rms_norm_eps}
        return {"iterations": None, "magnitude": self.hc_magnitude, **constants}

    def dense(self) -> MlaConfig:
        """The same model with dense attention: every visible key is attended to and the indexer never runs."""
        return dataclasses.replace(self, index_topk=2**31 - 1)


# --- checks
def _check_words(c: MlaConfig) -> None:
    """Checks flags that are words, and the entries of per-layer tuples."""
    for name, allowed in _WORDS.items():
        value = getattr(c, name)
        require(
            value in allowed,
            f"config field {name} is {shown(value)}; expected is {' or '.join(map(repr, allowed))}.",
        )
    for name in (*_TUPLES, "kv_source_layers", "layer_sizes"):
        entries = getattr(c, name)
        require(
            isinstance(entries, tuple) and len(entries) in (0, c.num_hidden_layers),
            f"config field {name} is {shown(entries)}; a tuple of {c.num_hidden_layers} (num_hidden_layers) or no"
            " entries is expected. Give one per layer.",
        )
        allowed = _TUPLES.get(name, tuple(range(c.num_hidden_layers)) if name == "kv_source_layers" else ())
        kind = AttentionSizes if name == "layer_sizes" else type(allowed[0])
        wrong = [one for one in entries if type(one) is not kind or (allowed and one not in allowed)]
        require(
            not wrong,
            f"config field {name} has an entry {shown(wrong[:1])}; expected is"
            f" {' or '.join(map(repr, allowed[:8])) or 'an AttentionSizes'}. Mend it.",
        )
    require(
        not c.layer_types or SLIDING not in c.layer_types or c.sliding_window > 0,
        "config field layer_types has 'sliding_attention' and sliding_window is 0; give the keys that a token sees.",
    )


def _check_layer(c: MlaConfig, layer: MlaLayer) -> None:
    """Checks a layer's sizes, and the layers that it takes a selection or latents from."""
    number, sizes = layer.number, layer.sizes
    if layer.index_source is not None:
        require(
            layer.index_source >= 0,
            f"config field indexer_types has 'shared' in layer {number}, and no layer before it has an indexer. The"
            " first layer with an index must be 'full'.",
        )
        require(
            c.index_head_dim >= sizes.qk_rope_head_dim,
            f"config field index_head_dim is {c.index_head_dim}, smaller than qk_rope_head_dim"
            f" {sizes.qk_rope_head_dim}; the indexer rotates qk_rope_head_dim of its dimensions.",
        )
    require(
        c.attention_gate != "latent" or sizes.q_lora_rank > 0,
        "config field attention_gate is 'latent' and q_lora_rank is 0; the gate comes from the query latent.",
    )
    require(
        c.index_query_from_hidden or sizes.q_lora_rank > 0 or layer.kind != INDEXED,
        "config field q_lora_rank is 0; the indexer's queries come from the query latent. Set index_query_from_hidden.",
    )
    source = layer.kv_source
    if source == number:
        return
    require(source < number, f"config field kv_source_layers has {source} in layer {number}; give an earlier layer.")
    earlier = (c.layer(i) for i in range(number - 1, -1, -1) if c.kv_source_layers[i] == i)
    nearest = next((one.number for one in earlier if _has_same_latents(one, layer)), None)
    require(
        source == nearest,
        f"config field kv_source_layers has {source} in layer {number}; the nearest layer before it with latents of its"
        f" own and of the same sizes is {nearest}. Give that one.",
    )


def _has_same_latents(one: MlaLayer, other: MlaLayer) -> bool:
    """Whether the latents of two layers have the same sizes and lie in caches of the same kind."""
    a, b = one.sizes, other.sizes
    widths = (a.kv_lora_rank, a.qk_rope_head_dim) == (b.kv_lora_rank, b.qk_rope_head_dim)
    return widths and one.is_sliding == other.is_sliding


def _check_router(c: MlaConfig) -> None:
    require(
        c.n_routed_experts % c.n_group == 0,
        f"config field n_group is {c.n_group}; it must divide n_routed_experts ({c.n_routed_experts}).",
    )
    require(
        c.topk_group <= c.n_group,
        f"config field topk_group is {c.topk_group}; it can not exceed n_group ({c.n_group}).",
    )
    reachable = c.topk_group * (c.n_routed_experts // c.n_group)
    require(
        c.num_experts_per_tok <= reachable,
        f"config field num_experts_per_tok is {c.num_experts_per_tok}; kept groups hold {reachable}.",
    )
