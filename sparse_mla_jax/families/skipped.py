"""Tensors that a folder may hold although the model does not use them, as words that follow "12 tensors of"."""

from __future__ import annotations

import re
from typing import Any

PREDICTION = "multi-token prediction"
VISION, AUDIO = "the vision tower", "the audio tower"
_SHARED_INDEXERS = "indexers of layers that use another's selection"
_TIED_HEAD = "the tied head"

_BUFFER = re.compile(r".*rotary_emb\.(\w+_)?inv_freq")
_RUN_TIME_SCALE = re.compile(r"(model\.)?(language_model\.)?layers\.\d+\..+\.(input|output|activation|q|k|v|kv)_scale")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.*)")


def describe_common(name: str, config: Any, head: str = "lm_head.weight") -> str | None:
    """What every family skips; None for other tensors.

    Those are layers beyond num_hidden_layers, which predict several tokens, rotary buffers, a tied head, and how another
    engine rounds activations (`input_scale`) or its cache (`k_scale`, `v_scale`): we do not round activations, and our
    caches have scales of their own.

    Args:
      name: the published name.
      config: of the model.
      head: the published name of the output head.
    """
    layer = _LAYER.match(name)
    if layer is not None and int(layer.group(1)) >= config.num_hidden_layers:
        return PREDICTION
    if _BUFFER.fullmatch(name):
        return "rotary buffers"
    if _RUN_TIME_SCALE.fullmatch(name):
        return "scales of activations and caches"
    return _TIED_HEAD if config.tie_word_embeddings and name == head else None


def describe_shared_indexer(name: str, config: Any) -> str | None:
    """What an indexer is in a layer that has none of its own; None for other tensors."""
    layer = _LAYER.match(name)
    if layer is None or not re.match(r"(self_attn|attention)\.indexer\.", layer.group(2)):
        return None
    number = int(layer.group(1))
    shared = number < config.num_hidden_layers and not config.layer(number).has_indexer
    return _SHARED_INDEXERS if shared else None
