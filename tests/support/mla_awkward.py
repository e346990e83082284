"""Awkward models of every family: odd sizes, patterns and spellings that no published model or fixture has."""

import dataclasses
import json
from typing import Any

import numpy as np
from mla_oracle import Oracle
from safetensors.numpy import save_file

from support.mla_random import draw, fuse_experts, rename, split_experts

SIZES = {
    "vocab_size": 64, "hidden_size": 40, "intermediate_size": 36, "moe_intermediate_size": 14, "num_attention_heads": 5,
    "q_lora_rank": 21, "kv_lora_rank": 24, "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 7,
    "n_routed_experts": 9, "num_experts_per_tok": 3, "n_shared_experts": 1, "index_n_heads": 6, "index_head_dim": 11,
    "index_topk": 5, "max_position_embeddings": 4096,
}  # fmt: skip
GROUPS = {"n_group": 3, "topk_group": 2}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 64,
        "beta_fast": 16.0, "beta_slow": 1.0}  # fmt: skip
MISTRAL_ROPE = {"rope_parameters": {**YARN, "attention_factor": 1.0}}


@dataclasses.dataclass(frozen=True)
class Awkward:
    """One model and one way to score it.

    Attributes:
      family: its model_type.
      config: what config.json has beside SIZES; None takes a key away.
      wrapped: whether the fields stand in `text_config`, and model_type ends in "_text" there.
      spelling: of the tensors' names, see `mla_random`.
      experts: "fused" or "apart", where it differs from the hub's form.
      vectors: other means and deviations of vectors.
      further: tensors that a reader skips, and their shapes.
      seed: of the tensors and the ids; its closest choice is decided by more than 1e-5 of the largest score.
      way: options of `score`.
    """

    family: str
    config: dict[str, Any]
    wrapped: bool = False
    spelling: str = "hub"
    experts: str | None = None
    vectors: dict[str, Any] | None = None
    further: dict[str, Any] | None = None
    seed: int = 0
    way: dict[str, Any] = dataclasses.field(default_factory=lambda: {"prompt_length": 22, "chunk": 9, "page_size": 3})

    def published(self):
        """The fields of config.json."""
        own = {**SIZES, **self.config, "model_type": self.config.get("model_type", self.family)}
        own = {name: value for name, value in own.items() if value is not DROP}
        if not self.wrapped:
            return own
        outer = {"model_type": self.family, "architectures": [], "vision_config": {"hidden_size": 3}}
        outer["tie_word_embeddings"] = own.get("tie_word_embeddings", False)
        return outer | {"text_config": {**own, "model_type": self.family + "_text"}}

    def tensors(self):
        """float32 tensors by the names that the oracle knows."""
        drawn = draw(self.published(), self.seed, self.vectors)
        return rename(drawn, "mistral") if self.family == "mistral_large4" else drawn

    def write(self, folder):
        """Writes config.json and model.safetensors as the case spells them."""
        held = rename(draw(self.published(), self.seed, self.vectors), self.spelling)
        held = {"fused": fuse_experts, "apart": split_experts}.get(self.experts, dict)(held)
        held |= {name: np.full(shape, np.nan, np.float32) for name, shape in (self.further or {}).items()}
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.published()))
        save_file(held, folder / "model.safetensors")

    def answer(self, batch=2, length=31):
        """(ids [B, L], float64 logits [B, L, V], the closest choice that is no exact tie: where, and its margin)."""
        ids = np.random.default_rng(self.seed + 1000).integers(0, SIZES["vocab_size"], (batch, length))
        oracles = [Oracle(self.tensors(), self.published()) for _ in ids]
        logits = np.stack([oracle.logits(row) for oracle, row in zip(oracles, ids)])
        margins = [one for oracle in oracles for one in oracle.margins if one[1] > 0]
        return ids, logits, min(margins, key=lambda one: one[1], default=("none", 1.0))


DROP = object()
# Scores below 0, so that a score of 0 for experts outside of the kept groups would win.
NEGATIVE = {"e_score_correction_bias": (-0.7, 0.2)}
ALL = {"prompt_length": None, "chunk": None, "page_size": 4}
DECODE = {"prompt_length": 0, "page_size": 4}
CASES = {
    "v32 bias, YaRN with mscale alone": Awkward("deepseek_v32", {
        **GROUPS, "num_hidden_layers": 3, "first_k_dense_replace": 2, "attention_bias": True, "num_attention_heads": 6,
        "rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64,
                                              "mscale": 0.7}, "num_experts": 9, "n_routed_experts": DROP,
    }),
    "v32 mscale_all_dim alone, two shared experts": Awkward("deepseek_v32", {
        **GROUPS, "num_hidden_layers": 2, "mlp_layer_types": ["sparse", "dense"], "first_k_dense_replace": DROP,
        "rope_parameters": {**YARN, "mscale_all_dim": 1.3}, "n_shared_experts": 2, "norm_topk_prob": False,
        "tie_word_embeddings": True, "rms_norm_eps": 0.05,
    }, experts="fused", vectors=NEGATIVE, way=ALL),
    "glm frequency 3 from 1, all options": Awkward("glm_moe_dsa", {
        **GROUPS, "num_hidden_layers": 5, "num_attention_heads": 6, "attention_bias": True, "tie_word_embeddings": True,
        "n_shared_experts": 2, "norm_topk_prob": False, "index_topk_freq": 3, "index_skip_topk_offset": 1,
        "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"], "rms_norm_eps": 0.05,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    }),
    "glm pattern with a run of three": Awkward("glm_moe_dsa", {
        "num_hidden_layers": 6, "index_topk_pattern": "FSSSFS", "first_k_dense_replace": 2, "num_local_experts": 9,
        "n_routed_experts": DROP, "n_shared_experts": 0, "rope_theta": 300.0,
        "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "mscale": 1.0,
                         "mscale_all_dim": 1.0}, "layer_types": ["deepseek_sparse_attention"] * 6,
    }, experts="fused"),
    "glm attention_factor, short": Awkward("glm_moe_dsa", {
        "num_hidden_layers": 2, "indexer_types": ["full", "shared"], "first_k_dense_replace": 1, "rms_norm_eps": 0.05,
        "attention_bias": True, "norm_topk_prob": False, **GROUPS,
        "rope_parameters": {**YARN, "attention_factor": 1.4, "mscale_all_dim": 0.8},
    }, vectors=NEGATIVE, way=ALL),
    "glm frequency 2 from 3, tensors that nobody uses": Awkward("glm_moe_dsa", {
        "num_hidden_layers": 5, "index_topk_freq": 2, "index_skip_topk_offset": 3, "first_k_dense_replace": 0,
        "index_topk": 1, "num_nextn_predict_layers": 1,
    }, further={"model.layers.5.eh_proj.weight": (40, 80), "model.layers.3.self_attn.indexer.wk.weight": (11, 40),
                "model.layers.5.self_attn.indexer.wk.weight": (11, 40)}, way=DECODE),
    "hy three streams, default indexers": Awkward("hy_v4", {
        "num_hidden_layers": 6, "hc_mult": 3, "hc_magnitude": 1.3, "hc_eps": 0.05, "swiglu_limit": 0.5,
        "rms_norm_eps": 0.05,
    }),
    "hy two streams, short": Awkward("hy_v4", {
        "num_hidden_layers": 2, "hc_mult": 2, "hc_magnitude": 1.3, "hc_eps": 0.05, "swiglu_limit": 0.5,
        "rms_norm_eps": 0.05, "indexer_types": ["full", "shared"], **GROUPS, "n_shared_experts": 2,
    }, vectors=NEGATIVE, way=ALL),
    "hy as save_pretrained names it": Awkward("hy_v4", {
        "num_hidden_layers": 4, "hc_mult": 2, "attention_bias": True, "tie_word_embeddings": True, "swiglu_limit": 0.5,
        "indexer_types": ["full", "shared", "shared", "full"], "num_attention_heads": 6, **GROUPS,
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense"], "norm_topk_prob": False,
        "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    }, spelling="saved"),
    "hy as modules are called, experts apart": Awkward("hy_v4", {
        "num_hidden_layers": 3, "hc_mult": 1, "swiglu_limit": 0.5, "n_shared_experts": 0, "rope_theta": 300.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64},
    }, spelling="modules", experts="apart", further={"model.mtp_layers.0.a.weight": (2, 2)}, way=DECODE),
    "hy_vl composite, as save_pretrained names it": Awkward("hy_v4_vl", {
        "num_hidden_layers": 3, "hc_mult": 3, "rms_norm_eps": 0.05, "hc_eps": 0.02, "swiglu_limit": 0.5,
        "rope_parameters": {"rope_theta": 300.0, "mrope_section": [1, 1, 1]}, "tie_word_embeddings": True,
    }, wrapped=True, spelling="saved VL", further={"vit.patch.weight": (3, 3)}),
    "hy_vl text alone, short": Awkward("hy_v4_vl", {
        "model_type": "hy_v4_vl_text", "num_hidden_layers": 2, "indexer_types": ["full", "shared"],
        "attention_bias": True, "rms_norm_eps": 0.05, "swiglu_limit": 0.5, **GROUPS,
        "rope_parameters": {**YARN, "attention_factor": 1.4, "mscale_all_dim": 0.8},
    }, way=ALL),
    "axk2 groups and negative scores, short": Awkward("axk2", {
        **GROUPS, "num_hidden_layers": 2, "gated_norm_rank": 3, "rms_norm_eps": 0.05, "num_attention_heads": 6,
        "attention_bias": True, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        "num_experts_per_tok": 5, "norm_topk_prob": False,
    }, vectors=NEGATIVE, way=ALL),
    "axk2 every second layer, tied": Awkward("axk2", {
        "num_hidden_layers": 5, "gated_norm_rank": 1, "first_k_dense_replace": 1, "moe_layer_freq": 2,
        "tie_word_embeddings": True, "n_shared_experts": 2, "n_group": None, "topk_group": None,
        "routed_scaling_factor": 1.7,
    }, seed=1),
    "axk2 as modules are called, fused": Awkward("axk2", {
        "num_hidden_layers": 3, "gated_norm_rank": 3, "mlp_layer_types": ["sparse", "dense", "sparse"],
        "n_shared_experts": 0, "num_local_experts": 9, "n_routed_experts": DROP, "rope_theta": 300.0,
    }, spelling="axk2 modules", experts="fused", way=DECODE),
    "mistral shared latents of both kinds": Awkward("mistral_large4", {
        **MISTRAL_ROPE, "num_hidden_layers": 7, "q_lora_rank": DROP, "no_rope_layers": [1, 0, 1, 0, 1, 1, 0],
        "kv_source_layers": [0, 1, 0, 1, 0, 5, 1], "final_logit_softcapping": 0.7, "rms_norm_eps": 0.05,
        "indexer_types": ["full", "shared", "full", "full", "shared", "shared", "shared"],
    }, wrapped=True, spelling="mistral", further={"vision_encoder.a.weight": (2, 2), "mtp_dspark.a": (2,)}),
    "mistral shared latents, short": Awkward("mistral_large4", {
        **MISTRAL_ROPE, "num_hidden_layers": 3, "q_lora_rank": DROP, "no_rope_layers": [1, 0, 1],
        "kv_source_layers": [0, 1, 0], "final_logit_softcapping": 0.7, "rms_norm_eps": 0.05, **GROUPS,
        "indexer_types": ["full", "shared", "full"], "attention_bias": True,
    }, spelling="mistral", way=ALL),
    "mistral one layer rotates": Awkward("mistral_large4", {
        **GROUPS, "num_hidden_layers": 4, "q_lora_rank": DROP, "no_rope_layers": [0, 0, 1, 0], "attention_bias": True,
        "final_logit_softcapping": None, "tie_word_embeddings": True, "n_shared_experts": 2, "rope_parameters": None,
        "kv_source_layers": [0, 0, 2, 0], "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
        "num_attention_heads": 6, "first_k_dense_replace": DROP, "routed_scaling_factor": 1.7,
    }, wrapped=True, spelling="mistral"),
    "mistral text alone, older keys": Awkward("mistral_large4", {
        "model_type": "mistral_large4_text", "num_hidden_layers": 5, "q_lora_rank": DROP, "no_rope_layer_interval": 2,
        "index_topk_freq": 2, "index_skip_topk_offset": 1, "rope_theta": 300.0, "num_experts": 9,
        "n_routed_experts": DROP, "n_shared_experts": 0,
        "rope_scaling": {"type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "mscale": 0.7,
                         "mscale_all_dim": 1.3},
    }, spelling="mistral", experts="fused", way=DECODE),
    "dots3 sliding first, window 1": Awkward("dots3_note", {
        "num_hidden_layers": 5, "sliding_window": 1, "shared_experts_intermediate_size": 11, "rms_norm_eps": 0.05,
        "layer_types": ["sliding_attention", "indexed_attention", "sliding_attention", "sliding_attention",
                        "indexed_attention"],
        "per_layer_config": {
            "0": {"num_attention_heads": 3, "kv_lora_rank": 15, "q_lora_rank": 10, "head_dim": 8},
            "2": {"qk_nope_head_dim": 4, "qk_rope_head_dim": 8, "v_head_dim": 3, "num_key_value_heads": 5},
            "4": {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 33, "qk_nope_head_dim": 5},
        },
        "rope_parameters": {"indexed_attention": {"rope_theta": 300.0, "partial_rotary_factor": 0.4},
                            "sliding_attention": {"rope_theta": 40.0, "rope_type": "default"}},
        "mlp_layer_types": ["sparse", "dense", "sparse", "dense", "sparse"], **GROUPS, "head_dim": 99,
    }),
    "dots3 short": Awkward("dots3_note", {
        "num_hidden_layers": 2, "sliding_window": 4, "shared_experts_intermediate_size": 11, "rms_norm_eps": 0.05,
        "layer_types": ["sliding_attention", "indexed_attention"], "attention_bias": True, "n_shared_experts": 2,
        "per_layer_config": {"0": {"num_attention_heads": 3, "kv_lora_rank": 15, "q_lora_rank": 10}}, **GROUPS,
        "rope_parameters": {"indexed_attention": {"rope_theta": 300.0}, "sliding_attention": {"rope_theta": 40.0}},
    }, vectors=NEGATIVE, way=ALL),
    "dots3 older keys, use_dsa false, window beyond the context": Awkward("dots3_note", {
        "num_hidden_layers": 4, "use_dsa": False, "moe_layer_freq": [0, 1, 0, 1], "sliding_window_size": 100,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "swa_num_attention_heads": 3, "swa_q_lora_rank": 10, "swa_kv_lora_rank": 15, "swa_head_dim": 12,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 5, "swa_rope_theta": 40.0, "rope_theta": 300.0,
        "moe_shared_expert_intermediate_size": 11, "n_shared_experts": 2, "attention_bias": True,
        "vision_config": {"a": 1}, "audio_config": {"a": 1},
    }, spelling="language_model", further={"model.language_model.layers.4.a.weight": (2, 2), "model.mtp.a": (2,),
                                           "model.language_model.mtp.b.weight": (2, 2)}),
    "dots3 all layers slide but one": Awkward("dots3_note", {
        "num_hidden_layers": 4, "sliding_window": 4, "tie_word_embeddings": True, "norm_topk_prob": False,
        "shared_experts_intermediate_size": 14, "n_shared_experts": 0, "num_attention_heads": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "deepseek_sparse_attention", "sliding_attention"],
        "per_layer_config": {}, "first_k_dense_replace": DROP,
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
        "rope_parameters": {"indexed_attention": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
                            "sliding_attention": {**YARN, "rope_theta": 40.0, "attention_factor": 1.4}},
    }, wrapped=True, experts="fused", way={"prompt_length": 20, "chunk": 7, "page_size": 4}),
    "dots3 older keys, default layers": Awkward("dots3_note", {
        "num_hidden_layers": 7, "sliding_window_size": 3, "moe_layer_freq": 2, "shared_experts_intermediate_size": 11,
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 10, "swa_kv_lora_rank": 15,
        "swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 10, "swa_v_head_dim": 5, "use_dsa": True,
        "use_sliding_window": True,
    }, way=DECODE),
}  # fmt: skip
