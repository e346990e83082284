"""Options that the engine, the scorer and the command line share, checked in one place."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.models import family

DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float8_e4m3fnuz", "float8_e4m3fn", "bfloat16", "float32")


def parse_dtype(name: str, value: Any, allowed: tuple[str, ...]) -> np.dtype:
    """The numpy dtype that `value` (a name or a type) means.

    Raises:
      ValueError: not a type, or not one of `allowed`; `name` is the argument's name in the message.
    """
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in allowed:
        raise ValueError(f"{name} is {value if dtype is None else dtype.name!r}; expected one of {', '.join(allowed)}.")
    return dtype


def check_size(name: str, value: Any, low: int = 1) -> int:
    """Returns `value` as an int.

    Raises:
      ValueError: not an integer, or below `low`.
    """
    ok = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(ok and value >= low, f"{name} is {value!r}; an integer of at least {low} is expected.")
    return int(value)


def check_writable(name: str, path: str) -> None:
    """Refuses an output path before any work is done for it; `name` is the option's.

    Raises:
      ValueError: a folder, in a folder that does not exist, or not writable.
    """
    folder = os.path.dirname(os.path.abspath(path))
    require(os.path.isdir(folder), f"{name} {path!r}: folder {folder!r} does not exist; make it first.")
    require(not os.path.isdir(path), f"{name} {path!r} is a folder; give the name of a file.")
    target = path if os.path.exists(path) else folder
    require(os.access(target, os.W_OK), f"{name} {path!r} is not writable; choose another place.")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def check_params(params: Any, config: Config, dtype: Any = None) -> Any:
    """Puts `params` on the device, matrices as `dtype` (None: as they are); norms stay float32.

    Raises:
      ValueError: a parameter that is missing, surplus or of another shape than `config` wants.
    """
    if dtype is None:
        dtype = params["embed_tokens"].dtype if isinstance(params, dict) and "embed_tokens" in params else jnp.float32
    wanted = parse_dtype("dtype", dtype, DTYPES)
    tree: Any
    given_tree: Any
    specs, tree = jax.tree_util.tree_flatten_with_path(family.param_specs(config, wanted))
    given, given_tree = jax.tree_util.tree_flatten_with_path(params)
    if given_tree != tree:
        names = [{_name(path) for path, _ in flat} for flat in (specs, given)]
        raise ValueError(
            f"params do not fit the config: missing {sorted(names[0] - names[1])[:5]}, surplus"
            f" {sorted(names[1] - names[0])[:5]}. Make them with init_params or load_checkpoint of the same config."
        )
    for (path, spec), (_, leaf) in zip(specs, given, strict=True):
        require(
            tuple(np.shape(leaf)) == spec.shape,
            f"params {_name(path)} has shape {tuple(np.shape(leaf))}; the config needs {spec.shape}.",
        )
    return jax.tree_util.tree_unflatten(
        tree, [jnp.asarray(leaf, spec.dtype) for (_, spec), (_, leaf) in zip(specs, given, strict=True)]
    )


def matmul_precision(params: Any) -> Any:
    """A context: float32 models multiply in full float32 on every device, others at the default precision."""
    return jax.default_matmul_precision("highest" if params["embed_tokens"].dtype == jnp.float32 else None)
