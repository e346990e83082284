"""`python -m sparse_mla_jax score`: logits at every position of given token ids."""

from __future__ import annotations

import argparse

from sparse_mla_jax.tools.options import add_model_options, load_array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `score`."""
    add_model_options(parser, cache_dtype="float32")
    parser.add_argument("--tokens", required=True, metavar="FILE.npy", help="integer token ids [B, L]")
    parser.add_argument("--output", required=True, metavar="FILE.npy", help="where the logits go")
    parser.add_argument(
        "--prompt-length",
        type=int,
        metavar="P",
        help="tokens that go through prefill; the rest goes one by one through decode (default: all of them, L;"
        " 0 decodes from an empty cache)",
    )
    parser.add_argument(
        "--chunk", type=int, metavar="C", help="tokens of a sequence per prefill step (default: the whole prompt)"
    )


def run(arguments: argparse.Namespace) -> int:
    """The command `score`."""
    from sparse_mla_jax.config import load_config
    from sparse_mla_jax.tools.output import check_output, whole_file

    config = load_config(arguments.model_dir)
    check_output("--output", arguments.output)
    tokens = load_array(arguments.tokens, "--tokens")
    import numpy as np

    from sparse_mla_jax.models.checkpoint import load_checkpoint
    from sparse_mla_jax.serving import scoring
    from sparse_mla_jax.tools.info import check_backend

    # Check the ids before reading gigabytes of weights.
    ids = scoring.check_arguments(
        config,
        tokens,
        prompt_length=arguments.prompt_length,
        chunk=arguments.chunk,
        page_size=arguments.page_size,
    )[0]
    check_backend()
    config, params = load_checkpoint(arguments.model_dir, dtype=arguments.dtype)
    logits = scoring.score(
        params,
        config,
        ids,
        prompt_length=arguments.prompt_length,
        chunk=arguments.chunk,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        implementation=arguments.implementation,
        progress=True,
    )
    with whole_file(arguments.output) as unfinished, open(unfinished, "wb") as file:
        np.save(file, logits)
    print(f"wrote float32 logits {list(logits.shape)} to {arguments.output}")
    return 0
