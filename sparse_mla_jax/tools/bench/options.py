"""Options of `bench`: for kernels (`bench [AREA]`), for a model (`bench MODEL_DIR`), and for both."""

from __future__ import annotations

import argparse

from sparse_mla_jax._check import require
from sparse_mla_jax._choices import CACHE_DTYPES, DTYPES, IMPLEMENTATIONS
from sparse_mla_jax.tools.bench.model import MODEL_BENCH, STDOUT
from sparse_mla_jax.tools.processes import MESH_OPTIONS, add_mesh_options

_MODEL_SIZES = {
    "batch": "sequences, on a mesh of each group of data",
    "context": "tokens at the end",
    "steps": "timed decode steps",
    "prefill_chunk": "tokens per step",
    "page_size": "tokens per cache page",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options. The default is None, so that `bench AREA` and `bench MODEL_DIR` can refuse each other's."""
    from sparse_mla_jax.tools.bench import run

    parser.add_argument(
        "target",
        nargs="?",
        metavar="AREA | MODEL_DIR",
        help="topk, indexer, decode, prefill, cache, projection, streams or step; or a Hugging Face folder"
        " (default: all areas)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write JSON to FILE; without FILE one line of it is printed instead of a table (put it last then)",
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of every operator (default: the best that runs here)"
    )
    model = parser.add_argument_group("a model (bench MODEL_DIR)")
    for name, what in _MODEL_SIZES.items():
        option = f"--{name.replace('_', '-')}"
        default = MODEL_BENCH[name] or "the model's own"
        model.add_argument(option, type=int, metavar="N", help=f"{what} (default {default})")
    model.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help=f"type of the caches (default {MODEL_BENCH['cache_dtype']})"
    )
    model.add_argument(
        "--dtype", choices=DTYPES, help=f"type of weights and activations (default {MODEL_BENCH['dtype']})"
    )
    add_mesh_options(parser)
    run.add_arguments(parser)


def check_form(arguments: argparse.Namespace, kernels: bool) -> None:
    """Raises ValueError for options of `bench MODEL_DIR` in `bench [AREA]`, and vice versa."""
    from sparse_mla_jax.tools.bench import run

    here, other = ("[AREA]", "MODEL_DIR") if kernels else ("MODEL_DIR", "[AREA]")
    for name in (*MODEL_BENCH, *MESH_OPTIONS) if kernels else run.OPTIONS:
        require(
            getattr(arguments, name) is None,
            f"--{name.replace('_', '-')} belongs to `bench {other}`, not to `bench {here}`; leave it out.",
        )
