"""Checks requests: turns prompts and stop sequences into token ids and validates the sampling options."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sparse_mla_jax import _check
from sparse_mla_jax._check import require, shown
from sparse_mla_jax.config import Config
from sparse_mla_jax.serving.scheduler import Request

Prompt = str | bytes | Sequence[int] | np.ndarray
# Stop sequences of a request: a text, or a sequence of texts, ids and sequences of ids.
Stops = Prompt | Sequence[Prompt | int] | None

# Bytes are token ids in a vocabulary of at most so many ids. In a larger one a text needs the model's tokenizer.
BYTES = 256


def encode(name: str, text: Prompt, vocab_size: int) -> tuple[int, ...]:
    """Token ids of a prompt or stop sequence; of text or bytes, if the vocabulary is bytes, the bytes.

    Raises:
      ValueError: not text, bytes or integers; text or bytes where the vocabulary is larger; an id outside the
        vocabulary.
    """
    if isinstance(text, str | bytes | bytearray):
        kind = "text" if isinstance(text, str) else "bytes"
        require(
            vocab_size <= BYTES,
            f"{name} is {kind}; the model's vocabulary has {vocab_size} ids, so bytes are no token ids. Pass the ids"
            " that the model's tokenizer makes.",
        )
        ids = tuple(_utf8(name, text) if isinstance(text, str) else text)
    else:
        ids = _integers(name, text)
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    require(
        wrong is None,
        f"{name} holds token id {shown(wrong)}; the model's vocabulary is 0..{vocab_size - 1}. Give ids of this model.",
    )
    return ids


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r}, half of a character, which UTF-8 can not encode. Give whole"
            " characters, or bytes."
        ) from None


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """The integers of a flat sequence or array; booleans and floats do not count as integers."""
    if isinstance(values, list | tuple) and all(map(_is_integer, values)):
        # Not through numpy, whose integers have 64 bits.
        return tuple(map(operator.index, values))
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        array = np.asarray(None)
    came = f"{array.dtype}{list(array.shape)}" if array.dtype.kind in "biufc" else f"of type {type(values).__name__}"
    if isinstance(values, list | tuple) and any(isinstance(value, bool | np.bool_) for value in values):
        array, came = np.asarray(None), "a sequence with a boolean"
    fits = array.ndim == 1 and (array.size == 0 or array.dtype.kind in "iu")
    require(fits, f"{name} is {came}; text, bytes or a flat sequence of integer ids is expected.")
    return tuple(array.tolist())


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _stop_sequences(stop: Stops, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The stop sequences of a request as token ids."""
    if stop is None:
        return ()
    if isinstance(stop, str | bytes | bytearray):
        stop = (stop,)
    require(
        isinstance(stop, Iterable) and not isinstance(stop, dict) and getattr(stop, "ndim", 1) > 0,
        f"stop is {stop!r}; a sequence of stop sequences is expected, as in stop=[[7], [3, 4]], or None for none.",
    )
    stops = [encode("stop", [one] if _is_integer(one) else one, vocab_size) for one in stop]  # type: ignore
    require(all(stops), "stop holds an empty sequence; it would end every request at once. Leave it out.")
    return tuple(stops)


def check_eos(eos_token_ids: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    """End-of-sequence ids, checked and without repetitions; None and an empty sequence are none.

    Raises:
      ValueError: not an id or a flat sequence of ids, or an id outside the vocabulary.
    """
    if eos_token_ids is None:
        return ()
    single = _is_integer(eos_token_ids)
    require(
        not isinstance(eos_token_ids, str | bytes | bytearray),
        f"eos_token_ids is {eos_token_ids!r}; token ids are expected. Pass a text as stop.",
    )
    ids = encode("eos_token_ids", [eos_token_ids] if single else eos_token_ids, vocab_size)  # type: ignore
    return tuple(dict.fromkeys(ids))


def _real(name: str, value: Any) -> float:
    """`value` as a float."""
    require(
        isinstance(value, numbers.Real) and not isinstance(value, bool), f"{name} is {value!r}; a number is expected."
    )
    try:
        return float(value)
    except OverflowError:
        # A Python integer or fraction may exceed every float.
        return math.inf if value > 0 else -math.inf


def check_request(
    config: Config,
    prompt: Prompt,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: Stops,
    eos_token_ids: tuple[int, ...] = (),
) -> Request:
    """Makes a checked request, which is not yet in a scheduler; `eos_token_ids` become stop sequences of one id.

    Raises:
      ValueError: an argument that is not as `Engine.submit` describes it.
    """
    vocabulary = config.vocab_size
    stops = _stop_sequences(stop, vocabulary)
    warmth, nucleus = _real("temperature", temperature), _real("top_p", top_p)
    require(
        math.isfinite(warmth) and warmth >= 0,
        f"temperature is {warmth}; a finite number of at least 0 is expected (0 is greedy).",
    )
    require(0 < nucleus <= 1, f"top_p is {top_p}; a number above 0 and at most 1 is expected (1 keeps every token).")
    return Request(
        prompt=encode("prompt", prompt, vocabulary),
        max_tokens=_check.size("max_tokens", max_tokens),
        # A step holds it in float32.
        temperature=min(warmth, float(np.finfo(np.float32).max)),
        top_p=nucleus,
        seed=_check.size("seed", seed, 0, 2**32 - 1),
        stop=(*stops, *((token,) for token in eos_token_ids)),
    )
