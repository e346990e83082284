"""What an argument must be: one rule and one notation for every operator.

Errors are ValueErrors at trace time. A message names the argument, what came, what is expected, and the remedy.
"""

from __future__ import annotations

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`; a message names the argument, what came, what fits, the remedy."""
    if not condition:
        raise ValueError(message)


def describe(x: Any) -> str:
    """Type and shape of an array in the notation of every message: `float32[2, 3]`."""
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"


def size(name: str, value: Any, low: int = 1, *, hint: str = "") -> int:
    """`value` as an int. Integers of Python and numpy pass, booleans and floats do not.

    Args:
      name: the argument's name in the message.
      value: what came.
      low: the smallest value that is accepted.
      hint: a sentence that follows in the message: the remedy.

    Raises:
      ValueError: not an integer, or below `low`.
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    require(
        number >= low, f"{name} is {value!r}; expected an integer of at least {low}." + (f" {hint}" if hint else "")
    )
    return number


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


def integers(name: str, array: Any, *axes: int | None) -> Array:
    """`array` as an integer array of at least 32 bits.

    Args:
      name: the argument's name in the message.
      array: what came; booleans are no integers.
      *axes: the size of each axis, None where any size fits.

    Raises:
      ValueError: another type or shape.
    """
    array = jnp.asarray(array)
    require(
        jnp.issubdtype(array.dtype, jnp.integer) and _fits(array, axes),
        f"{name} is {describe(array)}; expected integers {_axes(axes)}.",
    )
    # Sizes and slots must be expressible in the type in which they are compared.
    return array.astype(jnp.int32) if array.dtype.itemsize < 4 else array


def floats(name: str, array: Any, *axes: int | None) -> Array:
    """`array` in float32.

    Args:
      name: the argument's name in the message.
      array: what came, of any floating type.
      *axes: the size of each axis, None where any size fits.

    Raises:
      ValueError: another type or shape.
    """
    array = jnp.asarray(array)
    require(
        jnp.issubdtype(array.dtype, jnp.floating) and _fits(array, axes),
        f"{name} is {describe(array)}; expected floating values {_axes(axes)}.",
    )
    return array.astype(jnp.float32)


def _fits(array: Array, axes: tuple[int | None, ...]) -> bool:
    return array.ndim == len(axes) and all(n is None or n == size for n, size in zip(axes, array.shape))


def _axes(axes: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in axes)}]"
