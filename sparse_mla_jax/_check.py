"""Argument checks, with one rule and one notation for every operator.

Errors are ValueErrors at trace time. A message names the argument, what was passed, what is expected, and the remedy.
No check reads a value from a device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

# An expected axis: an int is its size; a letter or None allows any size. A first `...` stands for any number of axes.
Axis = int | str | None | EllipsisType
# The largest int32: as a position, slot or page it stands for everything beyond int32, and is never valid.
BEYOND = 2**31 - 1
_KINDS = {jnp.integer: "integers", jnp.floating: "floating values", jnp.bool_: "booleans"}


def require(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def describe(x: Any) -> str:
    """Type and shape of an array as all messages print them, `float32[2, 3]`; for other objects the type's name."""
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        try:
            x = jnp.asarray(x)
        except (TypeError, ValueError, OverflowError):
            return type(x).__name__
    return f"{x.dtype}{list(x.shape)}"


def shown(value: Any, width: int = 60) -> str:
    """`value` as a message prints it: on one line, at most `width` characters; null for None, as in JSON."""
    try:
        text = "null" if value is None else repr(value)
    except (ValueError, RecursionError):
        # Python prints no integers of more than 4300 digits, and no lists that are nested too deeply.
        text = f"{type(value).__name__} that is too long to print"
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def size(name: str, value: Any, low: int = 1, high: int | None = None, *, hint: str = "") -> int:
    """`value` as an int. Integers of Python and numpy pass; booleans, floats and jax arrays do not.

    Args:
      name: the argument's name in the message.
      value: the argument.
      low: the smallest value that is accepted.
      high: the largest value that is accepted, None for no limit.
      hint: the remedy, a sentence that ends the message.

    Raises:
      ValueError: not an integer, or outside of low..high.
    """
    # Refuse jax arrays even if their value is known: reading it would wait for the device.
    static = not isinstance(value, bool | Array)
    try:
        number = operator.index(value) if static else low - 1
    except TypeError:
        number = low - 1
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    require(
        low <= number and (high is None or number <= high),
        _message(f"{name} is {value!r}; expected {expected}.", hint),
    )
    return number


def array(name: str, x: Any, types: Any, *axes: Axis, hint: str = "") -> Array:
    """`x` as a jax array of one of `types` with these axes.

    Args:
      name: the argument's name in the message.
      x: the argument.
      types: jnp.integer, jnp.floating, jnp.bool_, or a sequence of dtypes.
      *axes: for each axis its size, or a letter (or None) if any size fits; a first `...` for any number of axes.
      hint: the remedy, a sentence that ends the message.

    Raises:
      ValueError: another type or shape.
    """
    try:
        given = jnp.asarray(_narrow_on_host(x, types is jnp.integer))
        fits = _fits(given.shape, axes)
        fits = fits and (jnp.issubdtype(given.dtype, types) if types in _KINDS else given.dtype in types)
    except (TypeError, ValueError, OverflowError):
        given, fits = x, False
    kind = _KINDS[types] if types in _KINDS else _either(types)
    letters = ", ".join("any" if a is None else "..." if a is ... else str(a) for a in axes)
    require(fits, _message(f"{name} is {describe(given)}; expected {kind} [{letters}].", hint))
    return given


def int32(name: str, x: Any, *axes: Axis, hint: str = "") -> Array:
    """`x` as an int32 array; values beyond int32 become its smallest or largest. Arguments and errors as of `array`."""
    return saturate(array(name, x, jnp.integer, *axes, hint=hint))


def floats(name: str, x: Any, *axes: Axis, hint: str = "") -> Array:
    """`x` in float32, whatever its floating type; arguments and errors as of `array`."""
    return array(name, x, jnp.floating, *axes, hint=hint).astype(jnp.float32)


def booleans(name: str, x: Any, *axes: Axis, hint: str = "") -> Array:
    """`x` as a boolean array; arguments and errors as of `array`."""
    return array(name, x, jnp.bool_, *axes, hint=hint)


def saturate(x: Array) -> Array:
    """Casts an integer array to int32; values beyond int32 become its smallest or largest value.

    A plain cast would wrap: an index of 2**32 + 3 would become 3. int32 arrays are returned unchanged.
    """
    if x.dtype == jnp.int32:
        return x
    limits = jnp.iinfo(jnp.int32)
    if x.dtype.itemsize >= 4:
        x = jnp.minimum(x, limits.max)
        x = x if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else jnp.maximum(x, limits.min)
    return x.astype(jnp.int32)


def _narrow_on_host(x: Any, saturate: bool) -> Any:
    """Numbers of numpy, of Python or of lists in 32 bits; jax arrays and anything else unchanged.

    Floating ones are rounded to float32, as jax does without 64-bit types: lists mean the same with and without them.
    Integers saturate if asked: jax would keep their low 32 bits and so make other numbers of them.
    """
    if isinstance(x, Array) or hasattr(x, "__jax_array__"):
        return x
    host = np.asarray(x)
    if host.dtype == np.float64:
        return host.astype(np.float32)
    if not saturate or host.dtype.kind not in "iu" or host.dtype.itemsize < 4:
        return x
    limits = np.iinfo(np.int32)
    return np.clip(host, limits.min if host.dtype.kind == "i" else 0, limits.max).astype(np.int32)


def instance[T](name: str, value: Any, kind: type[T], *, hint: str = "") -> T:
    """`value`, which must be a `kind`.

    Raises:
      ValueError: it is something else.
    """
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    came = describe(value) if isinstance(value, np.ndarray | Array) else type(value).__name__
    require(isinstance(value, kind), _message(f"{name} is {came}; expected {article} {kind.__name__}.", hint))
    return value


def dtype(name: str, value: Any, allowed: Any) -> np.dtype:
    """The numpy dtype that `value` (a name or a type) means.

    Args:
      name: the argument's name in the message.
      value: the argument.
      allowed: a sequence of dtypes or of their names, or jnp.floating for any floating type.

    Raises:
      ValueError: not a type, or not one of `allowed`.
    """
    try:
        known = None if value is None else jnp.dtype(value)
    except TypeError:
        known = None
    fits = known is not None
    if known is not None:
        fits = jnp.issubdtype(known, allowed) if allowed in _KINDS else known in [jnp.dtype(d) for d in allowed]
    expected = "a floating type" if allowed in _KINDS else _either(allowed)
    came = repr(value) if known is None else known.name
    require(fits, f"{name} is {came}; expected {expected}.")
    assert known is not None
    return known


def _fits(shape: tuple[int, ...], axes: tuple[Axis, ...]) -> bool:
    if axes[:1] == (...,):
        axes = axes[1:]
        shape = shape[max(0, len(shape) - len(axes)) :]
    return len(axes) == len(shape) and all(a == n for a, n in zip(axes, shape) if isinstance(a, int))


def _either(types: Sequence[Any]) -> str:
    names = [jnp.dtype(d).name for d in types]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _message(text: str, hint: str) -> str:
    return f"{text} {hint}" if hint else text
