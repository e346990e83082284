"""`python -m sparse_mla_jax generate`: continue a prompt."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sparse_mla_jax.tools.options import add_model_options, load_model
from sparse_mla_jax.tools.processes import (
    add_mesh_options,
    chosen_mesh,
    is_first,
    join_processes,
    read_config,
    read_first,
)

if TYPE_CHECKING:
    from sparse_mla_jax.config import Config
    from sparse_mla_jax.serving.requests import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    add_model_options(parser, cache_dtype="float8_e4m3fnuz")
    add_mesh_options(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself, if the vocabulary is bytes")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a file of bytes, or of token ids if it ends in .npy; - is stdin"
    )
    prompt.add_argument(
        "--tokens",
        metavar="IDS | FILE",
        help='token ids: "1 2 3" or "1,2,3", a .npy file, or a file of ids as text; - is stdin',
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default 0)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus, 0 < X <= 1 (default 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--stop-tokens", action="append", default=[], metavar="IDS", help="end before these ids; may be repeated"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", help="do not end at eos_token_id of generation_config.json or config.json"
    )


def _read_prompt(arguments: argparse.Namespace, config: Config) -> Prompt:
    """The prompt: bytes, or token ids."""
    from sparse_mla_jax.tools.prompts import load_ids, read_bytes, read_ids, require_bytes

    limit = config.max_position_embeddings
    if arguments.tokens is not None:
        return read_ids("--tokens", arguments.tokens, limit)
    if arguments.prompt_file is not None and arguments.prompt_file.endswith(".npy"):
        return load_ids("--prompt-file", arguments.prompt_file)
    option = "--prompt" if arguments.prompt is not None else "--prompt-file"
    require_bytes(option, "--tokens", arguments.model_dir, config)
    if arguments.prompt is not None:
        return os.fsencode(arguments.prompt)
    return read_bytes("--prompt-file", arguments.prompt_file, limit)


def _read_stop(arguments: argparse.Namespace, config: Config) -> list[Prompt]:
    """The stop sequences of --stop and --stop-tokens."""
    from sparse_mla_jax.tools.prompts import read_ids, require_bytes

    if arguments.stop:
        require_bytes("--stop", "--stop-tokens", arguments.model_dir, config)
    texts: list[Prompt] = [os.fsencode(text) for text in arguments.stop]
    return texts + [read_ids("--stop-tokens", ids, config.max_position_embeddings) for ids in arguments.stop_tokens]


def _read_request(arguments: argparse.Namespace, config: Config) -> tuple[Prompt, dict[str, Any], tuple[int, ...]]:
    """What the options ask for, checked before the weights are read: prompt, options of `submit`, ids that end it."""
    from sparse_mla_jax._check import require
    from sparse_mla_jax.models.generation import load_generation_defaults
    from sparse_mla_jax.serving.requests import check_eos, check_request

    prompt = _read_prompt(arguments, config)
    require(len(prompt) > 0, "the prompt is empty; give at least one byte or token.")
    require(arguments.max_tokens >= 1, f"--max-tokens is {arguments.max_tokens}; at least 1 is expected.")
    limit = config.max_position_embeddings
    # Files are read no further.
    length = len(prompt) if len(prompt) <= limit else f"more than {limit}"
    require(
        len(prompt) < limit,
        f"the prompt has {length} tokens; the model's context is {limit}, one more must fit. Shorten the prompt.",
    )
    options = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    options["stop"] = _read_stop(arguments, config)
    check_request(config, prompt, **options)
    eos: tuple[int, ...] = ()
    if not arguments.ignore_eos:
        eos = load_generation_defaults(arguments.model_dir).eos_token_ids
        wrong = [token for token in eos if token >= config.vocab_size]
        require(
            not wrong,
            f"eos_token_id of {arguments.model_dir!r} is {wrong}; the vocabulary is 0..{config.vocab_size - 1}. Mend"
            " generation_config.json or config.json, or pass --ignore-eos.",
        )
    return prompt, options, check_eos(eos, config.vocab_size)


def _plain_request(prompt: Prompt, options: dict[str, Any], eos: tuple[int, ...]) -> list[Any]:
    """The same request in lists of ids, as processes exchange it."""
    return [list(map(int, prompt)), {**options, "stop": [list(map(int, ids)) for ids in options["stop"]]}, list(eos)]


def _print_tokens(tokens: Iterable[int], text: bool) -> None:
    """Prints tokens as they come: the characters that their bytes complete, or their ids."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        print(decoder.decode(bytes([token])) if text else f"{token} ", end="", flush=True)
    print(decoder.decode(b"", final=True))


def run(arguments: argparse.Namespace) -> int:
    """The command `generate`."""
    join_processes(arguments)
    config = read_config(arguments.model_dir)
    prompt, options, eos = read_first(lambda: _plain_request(*_read_request(arguments, config)))

    from sparse_mla_jax.serving.engine import Engine
    from sparse_mla_jax.tools.info import check_backend
    from sparse_mla_jax.tools.prompts import is_byte_vocabulary

    check_backend()
    mesh, parallel = chosen_mesh(arguments)
    config, params = load_model(arguments.model_dir, arguments.dtype, mesh, parallel)
    chunk = min(512, len(prompt))
    engine = Engine(
        params,
        config,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        max_batch=1,
        max_context=min(len(prompt) + arguments.max_tokens, config.max_position_embeddings),
        prefill_chunk=chunk,
        # Two programs, all of which one request needs: a chunk of its prompt, and one token.
        token_buckets=(1, chunk),
        implementation=arguments.implementation,
        eos_token_ids=eos,
        mesh=mesh,
        parallel=parallel,
    )
    engine.warm_up(progress=is_first())
    request = engine.submit(prompt, **options)
    if is_first():
        _print_tokens(engine.stream(request), is_byte_vocabulary(arguments.model_dir, config))
    else:
        engine.run()
    return 0
