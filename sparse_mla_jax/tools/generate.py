"""`python -m sparse_mla_jax generate`: continue a prompt."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from sparse_mla_jax.tools.options import add_model_options, load_array

if TYPE_CHECKING:
    import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    add_model_options(parser, cache_dtype="float8_e4m3fnuz")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a file of bytes, or of token ids if it ends in .npy; - is stdin"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus, 0 < X <= 1 (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )


def _read_prompt(arguments: argparse.Namespace) -> bytes | np.ndarray:
    """The prompt: bytes, or an integer array from a .npy file."""
    from sparse_mla_jax._check import require

    if arguments.prompt is not None:
        return os.fsencode(arguments.prompt)
    if arguments.prompt_file == "-":
        return sys.stdin.buffer.read()
    if arguments.prompt_file.endswith(".npy"):
        return load_array(arguments.prompt_file, "--prompt-file")
    require(os.path.isfile(arguments.prompt_file), f"--prompt-file {arguments.prompt_file!r} is not a file.")
    with open(arguments.prompt_file, "rb") as file:
        return file.read()


def run(arguments: argparse.Namespace) -> int:
    """The command `generate`."""
    from sparse_mla_jax._check import require
    from sparse_mla_jax.config import load_config

    config = load_config(arguments.model_dir)
    prompt = _read_prompt(arguments)
    require(len(prompt) > 0, "the prompt is empty; give at least one byte or token.")
    require(arguments.max_tokens >= 1, f"--max-tokens is {arguments.max_tokens}; at least 1 is expected.")
    limit = config.max_position_embeddings
    require(
        len(prompt) < limit,
        f"the prompt has {len(prompt)} tokens; the model's context is {limit}, one more must fit. Shorten the prompt.",
    )
    import codecs

    from sparse_mla_jax.models.checkpoint import load_checkpoint
    from sparse_mla_jax.serving.engine import Engine
    from sparse_mla_jax.serving.requests import check_request
    from sparse_mla_jax.tools.info import check_backend

    stop = [os.fsencode(text) for text in arguments.stop]
    options = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    check_request(config, prompt, stop=stop, **options)
    check_backend()
    config, params = load_checkpoint(arguments.model_dir, dtype=arguments.dtype)
    engine = Engine(
        params,
        config,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        max_batch=1,
        max_context=min(len(prompt) + arguments.max_tokens, limit),
        prefill_chunk=min(512, len(prompt)),
        implementation=arguments.implementation,
    )
    request = engine.submit(prompt, stop=stop, **options)
    text = config.vocab_size <= 256
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in engine.stream(request):
        print(decoder.decode(bytes([token])) if text else f"{token} ", end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0
