"""Checks requests: turns prompts and stop sequences into token ids and validates the sampling options."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import numpy as np

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.serving.scheduler import Request

Prompt = str | bytes | Sequence[int] | np.ndarray


def encode(name: str, text: Prompt, vocab_size: int) -> tuple[int, ...]:
    """Token ids of a prompt or stop sequence. Bytes (of text: its UTF-8 encoding) are their own ids; ids are checked.

    Raises:
      ValueError: not text, bytes or integers; an id outside the vocabulary.
    """
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    if isinstance(text, (bytes, bytearray)):
        ids: tuple[int, ...] = tuple(text)
    else:
        array = np.asarray(text)
        require(
            array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer)),
            f"{name} is {array.dtype}{list(array.shape)}; text, bytes or a flat sequence of integer ids is expected.",
        )
        ids = tuple(array.tolist())
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    require(
        wrong is None,
        f"{name} holds token id {wrong}; the model's vocabulary is 0..{vocab_size - 1}. Give ids of this model.",
    )
    return ids


def check_request(
    config: Config,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Prompt | Sequence[Prompt | int],
) -> Request:
    """Makes a checked request, which is not yet in a scheduler.

    Raises:
      ValueError: an argument that is not as `Engine.submit` describes it.
    """
    vocabulary = config.vocab_size
    if isinstance(stop, (str, bytes, bytearray)):
        stop = (stop,)
    stops = tuple(encode("stop", [int(s)] if isinstance(s, (int, np.integer)) else s, vocabulary) for s in stop)
    require(all(stops), "stop holds an empty sequence; it would end every request at once. Leave it out.")
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        require(isinstance(value, numbers.Real), f"{name} is {value!r}; a number is expected.")
    require(
        math.isfinite(temperature) and temperature >= 0,
        f"temperature is {temperature}; a finite number of at least 0 is expected (0 is greedy).",
    )
    require(0 < top_p <= 1, f"top_p is {top_p}; a number above 0 and at most 1 is expected (1 keeps every token).")
    require(_check.size("seed", seed, 0) < 2**32, f"seed is {seed}; below 2**32 is expected.")
    return Request(
        prompt=encode("prompt", prompt, vocabulary),
        max_tokens=_check.size("max_tokens", max_tokens),
        temperature=float(temperature),
        top_p=float(top_p),
        seed=int(seed),
        stop=stops,
    )
