"""Fields of a config.json that mean the same in every family."""

# Fields that our writer adds to every config.json for other readers.
COMMON_FIELDS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# Fields that do not change what a model computes, whatever their values: training, token ids, bookkeeping of Hugging
# Face transformers, deployment, and multi-token prediction, whose layers are not loaded.
WITHOUT_EFFECT = (
    *("initializer_range", "attention_dropout", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef"),
    *("router_jitter_noise", "output_router_logits", "pretraining_tp", "ep_size"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "torch_dtype", "transformers_version", "auto_map", "name_or_path", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id", "num_labels"),
    *("problem_type", "model_type"),
    *("num_nextn_predict_layers", "index_share_for_mtp_iteration", "mtp_layer_types"),
)
