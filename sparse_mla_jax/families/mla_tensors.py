"""The tensors that families of latent attention (MLA) share: names, other spellings, fused experts, what is skipped.

A table lists all rows that a layer may have; a row without a place in the parameters of a config is dropped
(`models.tensor_table`). FP8 matrices have their scales in "weight_scale_inv", as DeepSeek publishes them, or in
"weight_scale", as compressed-tensors, Quark and ModelOpt write them. Experts may be fused, as transformers holds them
in memory: "mlp.experts.gate_up_proj" [E, 2 I, D], gate rows first, and "mlp.experts.down_proj" [E, D, I]. Their scales
are called "gate_up_proj_scale_inv" or "gate_up_proj_scale", as those of a matrix, with an axis for the experts first;
one scale per expert may be [E] or [E, 1, 1], and one scale for all [].
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from sparse_mla_jax.families.published import (
    KEYS_AND_VALUES,
    SAME,
    Places,
    PublishedTensor,
    Shape,
    StoredPart,
    table_rows,
    transposed,
)
from sparse_mla_jax.families.skipped import describe_common, describe_shared_indexer
from sparse_mla_jax.mla_shapes import MlaConfig

TOP: Places = {"model.embed_tokens.weight": ("embed_tokens", SAME)}
END: Places = {"model.norm.weight": "norm", "lm_head.weight": "lm_head"}
INDEXER: Places = {
    "wq_b.weight": "wq_b",
    "wk.weight": "wk",
    "k_norm.weight": "k_norm.weight",
    "k_norm.bias": "k_norm.bias",
    "weights_proj.weight": "weights_proj",
}
ATTENTION: Places = {
    "q_a_proj.weight": "q_a_proj",
    "q_a_proj.bias": "q_a_proj_bias",
    "q_a_layernorm.weight": "q_a_layernorm",
    "q_b_proj.weight": "q_b_proj",
    "kv_a_proj_with_mqa.weight": "kv_a_proj_with_mqa",
    "kv_a_proj_with_mqa.bias": "kv_a_proj_with_mqa_bias",
    "kv_a_layernorm.weight": "kv_a_layernorm",
    "kv_b_proj.weight": ("kv_b_k kv_b_v", KEYS_AND_VALUES),
    "o_proj.weight": ("o_proj", transposed(inputs=2)),
    "o_proj.bias": "o_proj_bias",
    **{f"indexer.{name}": f"indexer.{place}" for name, place in INDEXER.items()},
}
NORMS: Places = {
    "input_layernorm.weight": "input_layernorm",
    "post_attention_layernorm.weight": "post_attention_layernorm",
}
GATE: Places = {
    "gate.weight": "gate.weight",
    "gate.e_score_correction_bias": "gate.e_score_correction_bias",
}
# Names of a SwiGLU's matrices in the files, and ours.
SWIGLU = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
SWIGLU_123 = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@dataclasses.dataclass(frozen=True)
class MlaNames:
    """The names of a family's tensors.

    Attributes:
      top: rows before the layers.
      end: rows after them.
      layer: rows of a layer without experts and SwiGLUs; places are relative to the layer.
      layers: prefix of the layers.
      dense, shared, experts: prefixes of the SwiGLUs in a layer.
      swiglu: names of their matrices.
      spellings: other names: patterns, and what they become, applied in order.
      head: name of the output head.
      skipped: patterns of the beginnings of names that the model does not use, and what those tensors are.
    """

    top: Places = dataclasses.field(default_factory=lambda: TOP)
    end: Places = dataclasses.field(default_factory=lambda: END)
    layer: Places = dataclasses.field(default_factory=lambda: layer_table())
    layers: str = "model.layers."
    dense: str = "mlp."
    shared: str = "mlp.shared_experts."
    experts: str = "mlp.experts."
    swiglu: Mapping[str, str] = dataclasses.field(default_factory=lambda: SWIGLU)
    spellings: Sequence[tuple[str, str]] = ()
    head: str = "lm_head.weight"
    skipped: Sequence[tuple[str, str]] = ()

    def tensors(self, config: MlaConfig) -> Iterator[PublishedTensor]:
        """Yields the rows of all tensors that a folder of this config may have, in the order of a written folder."""
        yield from table_rows(self.top, "", "")
        for number in range(config.num_hidden_layers):
            name, place = f"{self.layers}{number}.", f"layers.{number}."
            yield from table_rows(self.layer, name, place)
            yield from swiglu_rows(self.swiglu, name + self.dense, place + "mlp.")
            if config.is_moe_layer(number):
                for expert in range(config.n_routed_experts):
                    own = f"{name}{self.experts}{expert}."
                    yield from swiglu_rows(self.swiglu, own, place + "mlp.experts.", f".{expert}")
            yield from swiglu_rows(self.swiglu, name + self.shared, place + "mlp.shared_experts.")
        yield from table_rows(self.end, "", "")

    def parts(self, name: str, shape: Shape, config: MlaConfig) -> list[StoredPart]:
        """The published tensors that a file's tensor holds: several if it is one of fused experts, else one."""
        for pattern, published in self.spellings:
            name = re.sub(pattern, published, name)
        return split_experts(name, shape, config.n_routed_experts, self.swiglu)

    def describe_ignored(self, name: str, config: MlaConfig) -> str | None:
        """See `PublishedFamily`."""
        own = next((kind for pattern, kind in self.skipped if re.match(pattern, name)), None)
        return own or describe_common(name, config, self.head) or describe_shared_indexer(name, config)


def layer_table(attention: Places = ATTENTION, norms: Places = NORMS, further: Places | None = None) -> Places:
    """The rows of a layer: V3.2's attention and norms where none are given, its router, and further ones."""
    router = under(GATE, "mlp.", "mlp.")
    return {**norms, **under(attention, "self_attn.", "self_attn."), **router, **(further or {})}


def swiglu_rows(names: Mapping[str, str], name: str, place: str, expert: str = "") -> Iterator[PublishedTensor]:
    """Yields the rows of a SwiGLU whose matrices have these names, or of one expert's."""
    return table_rows({f"{theirs}.weight": ours + expert for theirs, ours in names.items()}, name, place)


def under(table: Places, name: str, place: str) -> Places:
    """The table with a prefix before its names and one before its places."""
    found: Places = {}
    for suffix, ours in table.items():
        places = ours[0] if isinstance(ours, tuple) else ours
        joined = " ".join(place + one for one in places.split())
        found[name + suffix] = (joined, ours[1]) if isinstance(ours, tuple) else joined
    return found


def scale_names(name: str) -> tuple[str, ...]:
    """Possible names of the scales of an FP8 matrix, the published one first."""
    return name + "_scale_inv", name + "_scale"


_FUSED = re.compile(r"(.*\bexperts\.)(gate_up_proj|down_proj)(?:\.weight)?(_scale_inv|_scale)?")


def split_experts(name: str, shape: Shape, experts: int, swiglu: Mapping[str, str]) -> list[StoredPart]:
    """The matrices of single experts, or their scales, that a file's tensor holds; itself if it is of one matrix.

    A part of fused scales has all those of an expert's fused matrix: blocks need not end where the gate's rows end.
    """
    fused = _FUSED.fullmatch(name)
    if fused is None:
        return [StoredPart(name)]
    prefix, kind, scale = fused.groups()
    names = {ours: theirs for theirs, ours in swiglu.items()}
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    own = bool(shape) and shape[0] == experts
    if not (own and len(shape) == 3 if scale is None else own or math.prod(shape) == 1):
        return [StoredPart(name)]
    rows: list[tuple[slice, ...]] = [()] * len(kinds)
    if scale is None and len(kinds) > 1:
        half = shape[1] // 2
        rows = [(slice(0, half),), (slice(half, shape[1]),)]
    return [
        StoredPart(f"{prefix}{expert}.{names[one]}.weight{scale or ''}", (*((expert,) if own else ()), *part))
        for expert in range(experts)
        for one, part in zip(kinds, rows)
    ]
