"""Arguments of a request: what is accepted in which form, and one clear ValueError for everything else. No device."""

import array
import dataclasses
import fractions

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax.config import DEEPSEEK_V32
from sparse_mla_jax.serving.requests import check_eos, check_request

BYTES = dataclasses.replace(DEEPSEEK_V32, vocab_size=256)
DEFAULTS = {"max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": None}


def make(prompt=(1,), config=DEEPSEEK_V32, **options):
    return check_request(config, prompt, **{**DEFAULTS, **options})


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        [np.int64(5), np.uint8(6), 7],
        range(5, 8),
        np.array([5, 6, 7], np.uint64),
        np.array([5, 6, 7], np.int8),
        jnp.array([5, 6, 7]),
        [jnp.int32(5), 6, 7],
        array.array("i", [5, 6, 7]),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_forms_of_a_prompt(prompt):
    request = make(prompt)
    assert request.prompt == (5, 6, 7) and all(type(token) is int for token in request.prompt)


BAD_PROMPTS = [
    (None, "prompt is of type NoneType; text, bytes or a flat sequence of integer ids is expected"),
    (5, r"prompt is int64\[\]"),
    (1.5, r"prompt is float64\[\]"),
    ([True, False], "prompt is a sequence with a boolean"),
    ([1, True], "prompt is a sequence with a boolean"),
    (np.array([True]), r"prompt is bool\[1\]"),
    ([1, 2.0], r"prompt is float64\[2\]"),
    (np.array([1.0]), r"prompt is float64\[1\]"),
    ([[1, 2], [3]], "prompt is of type list"),
    (np.zeros((1, 2), int), r"prompt is int64\[1, 2\]"),
    (["a"], "prompt is of type list"),
    ({1: 2}, "prompt is of type dict"),
    ({1, 2}, "prompt is of type set"),
    (iter([1, 2]), "prompt is of type list_iterator"),
    ([2**40], "token id 1099511627776; the model's vocabulary is 0..129279"),
    ([2**64], "token id 18446744073709551616"),
    ([1, -(10**400)], r"token id -10{50,} \.\.\."),
    ([10**5000], "token id int that is too long to print"),
    ([2**63, -1], "token id 9223372036854775808"),
    (np.array([2**64 - 1], np.uint64), "token id 18446744073709551615"),
    ([-1], "token id -1"),
    ([129280], "token id 129280"),
    ("text", "prompt is text; the model's vocabulary has 129280 ids, so bytes are no token ids"),
    (b"text", "prompt is bytes; .* Pass the ids that the model's tokenizer makes"),
    (bytearray(b"text"), "prompt is bytes"),
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[message[:45] for _, message in BAD_PROMPTS])
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        make(prompt)


def test_text_is_bytes_where_the_vocabulary_is():
    assert make("é", BYTES).prompt == make("é".encode(), BYTES).prompt == (195, 169)
    # What the operating system gives for bytes that are not UTF-8.
    assert make("a\udcff", BYTES).prompt == (97, 255)
    with pytest.raises(ValueError, match=r"prompt holds '\\ud800', half of a character"):
        make("a\ud800", BYTES)
    assert make([1], BYTES, stop="ab").stop == make([1], BYTES, stop=["ab"]).stop == ((97, 98),)


@pytest.mark.parametrize(
    ("stop", "sequences"),
    [
        (None, ()),
        ((), ()),
        ([7], ((7,),)),
        (np.array([7, 8]), ((7,), (8,))),
        ([[7, 8], 9, np.int32(3)], ((7, 8), (9,), (3,))),
        ([np.array([7, 8], np.uint16)], ((7, 8),)),
        (iter([[7]]), ((7,),)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_forms_of_stop(stop, sequences):
    assert make(stop=stop).stop == sequences


BAD_OPTIONS = [
    ({"stop": 7}, r"stop is 7; a sequence of stop sequences is expected, as in stop=\[\[7\], \[3, 4\]\], or None"),
    ({"stop": np.array(7)}, r"stop is array\(7\)"),
    ({"stop": {7: 8}}, "stop is {7: 8}"),
    ({"stop": True}, "stop is True"),
    ({"stop": [None]}, "stop is of type NoneType"),
    ({"stop": [True]}, r"stop is bool\[\]"),
    ({"stop": [1.5]}, r"stop is float64\[\]"),
    ({"stop": [[]]}, "stop holds an empty sequence"),
    ({"stop": ["text"]}, "stop is text; the model's vocabulary has 129280 ids"),
    ({"stop": [[2**40]]}, "stop holds token id 1099511627776"),
    ({"stop": [-1]}, "stop holds token id -1"),
    ({"max_tokens": True}, "max_tokens is True; expected an integer of at least 1"),
    ({"max_tokens": None}, "max_tokens is None"),
    ({"max_tokens": 2.0}, "max_tokens is 2.0"),
    ({"temperature": True}, "temperature is True; a number is expected"),
    ({"temperature": None}, "temperature is None"),
    ({"temperature": 10**400}, "temperature is inf; a finite number"),
    ({"temperature": fractions.Fraction(-(10**400), 3)}, "temperature is -inf"),
    ({"temperature": np.array([1.0])}, "temperature is array"),
    ({"top_p": True}, "top_p is True"),
    ({"top_p": float("nan")}, "top_p is nan; a number above 0 and at most 1"),
    ({"seed": True}, "seed is True"),
    ({"seed": 1.0}, "seed is 1.0; expected an integer from 0 to 4294967295"),
    ({"seed": None}, "seed is None"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options)[:40] for options, _ in BAD_OPTIONS])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_numbers_of_numpy():
    request = make(
        max_tokens=np.int64(3), temperature=np.float32(0.5), top_p=np.float16(0.5), seed=np.uint32(2**32 - 1)
    )
    assert (request.max_tokens, request.temperature, request.top_p, request.seed) == (3, 0.5, 0.5, 2**32 - 1)
    # A step holds temperatures in float32, without a warning.
    assert np.float32(make(temperature=1e300).temperature) == np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("given", "ids"),
    [(None, ()), ((), ()), (1, (1,)), (np.int64(1), (1,)), ([1, 2, 1], (1, 2)), (np.array([3]), (3,))],
    ids=str,
)
def test_eos_token_ids(given, ids):
    assert check_eos(given, 129280) == ids
    assert make(eos_token_ids=ids, stop=[[5, 6]]).stop == ((5, 6), *((token,) for token in ids))


@pytest.mark.parametrize("given", ["</s>", b"x", True, 1.0, [[1]], [None], 129280, -1, [2**40]], ids=str)
def test_bad_eos_token_ids(given):
    with pytest.raises(ValueError, match="eos_token_ids"):
        check_eos(given, 129280)
