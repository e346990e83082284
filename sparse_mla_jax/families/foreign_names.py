"""Names of tensors that no family here reads: what they are, and what to do with a folder that has them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

_DEQUANTISE = "Use the model's BF16 or FP8 files, or dequantise the folder with the program that wrote it."

_MANY = 8

# Ends of names, what the tensors are, and the remedy.
_FORMATS = (
    (r"\.(qweight|qzeros|scales|g_idx)$", "packed integers of GPTQ or AWQ", _DEQUANTISE),
    (r"\.weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+)$|\.SCB$", "weights of bitsandbytes", _DEQUANTISE),
    (r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$", "packed weights of compressed-tensors", _DEQUANTISE),
    (r"\.weight_scale_2$", "NVFP4 weights of ModelOpt", _DEQUANTISE),
    (r"_(blocks|scales)$", "MXFP4 weights of several experts at once", _DEQUANTISE),
    (r"\.lora_(A|B|embedding_A|embedding_B)(\.\w+)*$", "a LoRA adapter", "Merge it into its model and save that."),
    (
        r"^layers\.\d+\.attn\.(wq_a|wkv_a|wkv_b|wo)\.|^embed\.weight$",
        "names of DeepSeek's own inference code",
        "Use the files before its convert.py: those that DeepSeek publishes on Hugging Face.",
    ),
)

# Names that only one family has, by the family's model_type, or that of the first one that has them.
_FAMILIES = {
    "hy_v4": r"\.hc_(attn|mlp)_layer\.|\.hc_pre\.|\.learnable_sink_param$|\.linear_gate\.",
    "axk2": r"layernorm\.(W_down|W_up|norm)\.",
    "mistral_large4": r"^layers\.\d+\.attention\.|^tok_embeddings\.|^lerope\.",
    "dots3_note": r"\.k_rope_only_layernorm\.|\.self_attn\.g_proj\.",
    "deepseek_v4": r"\.attn\.attn_sink$|(^|\.)hc_(attn|ffn|head)[_.]",
}


def explain_surplus(names: Collection[str], model_types: Sequence[str]) -> str | None:
    """What surplus tensors are and the remedy, or None for names that tell nothing.

    Args:
      names: names in the files that the family has no place for.
      model_types: what config.json calls the family.
    """
    for model_type, pattern in _FAMILIES.items():
        name = _find(pattern, names)
        if name is not None and not any(one.startswith(model_type) for one in model_types):
            return (
                f"{name}, which a model of type {model_type!r} has; config.json makes it {model_types[0]!r}. Use the"
                " config.json that belongs to these weights."
            )
    for pattern, kind, remedy in _FORMATS:
        name = _find(pattern, names)
        if name is not None:
            return f"{name}, which is not read: {kind}. {remedy}"
    return None


def explain_missing(missing: Collection[str], names: Collection[str]) -> str | None:
    """Why a folder lacks all these tensors and the remedy, or None for names that tell nothing.

    Args:
      missing: published names that are not in the files.
      names: the names in the files.
    """
    if all(name in ("lm_head.weight", "head.weight") for name in missing):
        return "Set tie_word_embeddings to true if the model's input embedding is its head too; else fetch all files."
    if all(".indexer." in name for name in missing):
        if not any(".indexer." in name for name in names):
            return "No layer has an indexer: DeepSeek-V3 and others have none. Use a model with sparse attention."
        return (
            "Other layers have an indexer. If the model shares indexers between layers, its config.json says so"
            " (indexer_types): use the published one; else fetch all files."
        )
    held, first = set(names), min(missing)
    # One missing tensor has its name's end in common with others; a wrapper renames all of them.
    found = [name.removesuffix(first) for name in sorted(held) if name.endswith("." + first)]
    prefix = next((one for one in found if all(one + name in held for name in missing)), None)
    if prefix is not None and len(missing) >= _MANY:
        return f"It has {prefix + first}: save the model that the wrapper {prefix[:-1]!r} holds, or rename the tensors."
    short = [name.removeprefix("model.") for name in missing if name.startswith("model.")]
    if len(short) >= _MANY and held.issuperset(short):
        return (
            f"It has {short[0]}: save the model with its head (AutoModelForCausalLM), which names it model.{short[0]}."
        )
    return None


def _find(pattern: str, names: Collection[str]) -> str | None:
    return next((name for name in sorted(names) if re.search(pattern, name)), None)
