"""`python -m sparse_mla_jax score`: logits at every position of given token ids."""

from __future__ import annotations

import argparse
from typing import Any

from sparse_mla_jax.tools.options import add_model_options, load_array, load_model
from sparse_mla_jax.tools.processes import (
    add_mesh_options,
    chosen_mesh,
    is_first,
    join_processes,
    read_config,
    read_first,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `score`."""
    add_model_options(parser, cache_dtype="float32")
    add_mesh_options(parser)
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
    from sparse_mla_jax.tools.output import check_output, whole_file

    join_processes(arguments)
    config = read_config(arguments.model_dir)
    import numpy as np

    from sparse_mla_jax.serving import scoring
    from sparse_mla_jax.tools.info import check_backend

    def read() -> Any:
        check_output("--output", arguments.output)
        # Check the ids before reading gigabytes of weights.
        return scoring.check_arguments(
            config,
            load_array(arguments.tokens, "--tokens"),
            prompt_length=arguments.prompt_length,
            chunk=arguments.chunk,
            page_size=arguments.page_size,
        )[0].tolist()

    check_backend()
    ids = np.asarray(read_first(read), np.int32)
    mesh, parallel = chosen_mesh(arguments)
    config, params = load_model(arguments.model_dir, arguments.dtype, mesh, parallel)
    logits = scoring.score(
        params,
        config,
        ids,
        prompt_length=arguments.prompt_length,
        chunk=arguments.chunk,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        implementation=arguments.implementation,
        progress=is_first(),
        mesh=mesh,
        parallel=parallel,
    )
    if not is_first():
        return 0
    with whole_file(arguments.output) as unfinished, open(unfinished, "wb") as file:
        np.save(file, logits)
    print(f"wrote float32 logits {list(logits.shape)} to {arguments.output}")
    return 0
