"""Chooses the implementation of an operator: a name means that one, None means the best that runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.targets import traced_gpu
from sparse_mla_jax._check import IMPLEMENTATIONS


def preferred() -> tuple[str, ...]:
    """The order in which `implementation=None` tries, for the device that is traced for."""
    return ("xla",) if traced_gpu() is None else ("triton", "xla")


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or one of IMPLEMENTATIONS."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; expected None or one of {names}.")


def with_config(implementation: str | None, config: Any, kind: type) -> str | None:
    """The implementation to ask for: a config is a plan of the kernel, so it asks for "triton".

    Raises:
      ValueError: a config that is no `kind`, or another implementation beside it.
    """
    if config is None:
        return implementation
    if not isinstance(config, kind):
        raise ValueError(f"config is {type(config).__name__}; expected None or a {kind.__module__}.{kind.__name__}.")
    if implementation not in (None, "triton"):
        raise ValueError(
            f"config is a plan of the kernel and implementation is {implementation!r}; pass 'triton' or None with it."
        )
    return "triton"


def dispatch(operator: str, implementation: str | None, bodies: Mapping[str, Callable[[], Any]]) -> Any:
    """Runs one of `bodies` (name to nullary function); only NotImplementedError falls through to the next.

    Raises:
      ValueError: unknown name, or the named implementation does not serve this case (with its reason).
    """
    check_implementation(implementation)
    if implementation is not None:
        try:
            return bodies[implementation]()
        except NotImplementedError as error:
            raise ValueError(
                f"implementation={implementation!r} of {operator} does not serve this case: {error}."
                " Pass implementation=None to let the library choose."
            ) from error
    reasons = []
    for name in preferred():
        try:
            return bodies[name]()
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(f"no implementation of {operator} serves this case ({'; '.join(reasons)}).")
