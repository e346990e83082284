"""Options and files that several commands share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from sparse_mla_jax._choices import CACHE_DTYPES, DTYPES, IMPLEMENTATIONS

if TYPE_CHECKING:
    import numpy as np


def add_model_options(parser: argparse.ArgumentParser, *, cache_dtype: str) -> None:
    """Adds the options that every command with a model has."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="Hugging Face folder: config.json and safetensors")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, default=cache_dtype, help="type of the caches (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of weights and activations (default %(default)s)"
    )
    parser.add_argument(
        "--page-size", type=int, metavar="N", help="tokens per cache page (default 64, of DeepSeek-V4 256)"
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of every operator (default: the best that runs here)"
    )


def load_model(folder: str, dtype: str, mesh: Any, parallel: Any) -> tuple[Any, Any]:
    """(config, params) of a model folder, on one device or on those of a mesh."""
    from sparse_mla_jax.models.checkpoint import load_checkpoint
    from sparse_mla_jax.models.sharded_checkpoint import shard_checkpoint
    from sparse_mla_jax.tools.processes import agree, is_first

    if mesh is None:
        return load_checkpoint(folder, dtype=dtype)
    return agree(lambda: shard_checkpoint(folder, mesh, parallel, dtype=dtype, progress=is_first()))


def load_array(path: str, name: str) -> np.ndarray:
    """Reads one array of a .npy file."""
    import numpy as np

    from sparse_mla_jax._check import require

    require(os.path.isfile(path), f"{name} {path!r} is not a file; give a .npy file (numpy.save).")
    try:
        # Mapped: a header may promise more than the file has, or than memory holds.
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError, OverflowError, SyntaxError, TypeError) as error:
        raise ValueError(f"{name} {path!r} is not a readable .npy file ({error}); write it with numpy.save.") from None
    require(isinstance(array, np.ndarray), f"{name} {path!r} holds several arrays; give a .npy file with one.")
    return array
