"""Derivatives of operators whose body has none: kernels, and loops whose length is known at run time only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def with_derivative_of(definition: Callable[..., Any], run: Callable[..., Any], *args: Any) -> Any:
    """`run(*args)`, with the derivative of `definition(*args)`: forward and reverse mode, of any order.

    The derivative computes the values of `definition` again, which costs its time and memory; `run` alone costs
    nothing more than without this function.

    Args:
      definition: a function that JAX can differentiate; it computes what `run` computes, up to rounding.
      run: computes the result.
      *args: pytrees of arrays, passed to both; neither may use other traced arrays.
    """

    @jax.custom_jvp
    def call(*args):
        return run(*args)

    @call.defjvp
    def differentiate(primals, tangents):
        out, tangent = call(*primals), jax.jvp(definition, primals, tangents)[1]
        # One may return a list where the other returns a tuple.
        return out, jax.tree.unflatten(jax.tree.structure(out), jax.tree.leaves(tangent))

    return call(*args)
