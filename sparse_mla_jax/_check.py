"""What an argument must be: one rule and one notation for every operator.

Errors are ValueErrors at trace time. A message names the argument, what came, what is expected, and the remedy.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jax import Array

# What may be chosen by name: types of weights and activations, of caches, and bodies of an operator.
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fnuz", "float8_e4m3fn")
IMPLEMENTATIONS = ("triton", "xla", "reference")

# jax is imported inside of functions here: the command line imports this file and `--help` has to be quick.


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition`; a message names the argument, what came, what fits, the remedy."""
    if not condition:
        raise ValueError(message)


def describe(x: Any) -> str:
    """Type and shape of an array in the notation of every message: `float32[2, 3]`."""
    import jax.numpy as jnp

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


def integers(name: str, array: Any, *axes: int | None) -> Array:
    """`array` as an integer array of at least 32 bits.

    Args:
      name: the argument's name in the message.
      array: what came; booleans are no integers.
      *axes: the size of each axis, None where any size fits.

    Raises:
      ValueError: another type or shape.
    """
    import jax.numpy as jnp

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
    import jax.numpy as jnp

    array = jnp.asarray(array)
    require(
        jnp.issubdtype(array.dtype, jnp.floating) and _fits(array, axes),
        f"{name} is {describe(array)}; expected floating values {_axes(axes)}.",
    )
    return array.astype(jnp.float32)


def dtype(name: str, value: Any, allowed: tuple[str, ...]) -> np.dtype:
    """The numpy dtype that `value` (a name or a type) means.

    Raises:
      ValueError: not a type, or not one of `allowed`; `name` is the argument's name in the message.
    """
    import jax.numpy as jnp

    try:
        found = jnp.dtype(value)
    except TypeError:
        found = None
    if found is None or found.name not in allowed:
        raise ValueError(f"{name} is {value if found is None else found.name!r}; expected one of {', '.join(allowed)}.")
    return found


def _fits(array: Array, axes: tuple[int | None, ...]) -> bool:
    return array.ndim == len(axes) and all(n is None or n == size for n, size in zip(axes, array.shape))


def _axes(axes: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if n is None else str(n) for n in axes)}]"
