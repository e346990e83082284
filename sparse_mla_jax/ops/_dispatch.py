"""Chooses the implementation of an operator: the named one, or for None the best that runs here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from pallas_kernels.targets import HOST, named_targets, traced_gpu
from sparse_mla_jax._choices import IMPLEMENTATIONS


def preferred() -> tuple[str, ...]:
    """Implementations in the order in which `implementation=None` tries them, for the device that is traced for."""
    gpus = [target for target in named_targets() if target != HOST]
    has_gpu = bool(gpus) if named_targets() else traced_gpu() is not None
    return ("triton", "xla") if has_gpu else ("xla",)


def check_implementation(implementation: str | None) -> None:
    """Raises ValueError unless `implementation` is None or one of IMPLEMENTATIONS."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; expected None or one of {names}.")


def with_plan[Plan](
    implementation: str | None, plan: Plan | None, config: Plan | None, kind: type[Plan]
) -> tuple[str | None, Plan | None]:
    """(implementation, plan) of a call; a plan belongs to the kernel, so it implies "triton".

    Args:
      implementation: as the caller passed it.
      plan: as the caller passed it.
      config: the same argument under its former name.
      kind: the operator's plan class.

    Raises:
      ValueError: both plan and config, a plan that is no `kind`, or a plan with another implementation.
    """
    if plan is not None and config is not None:
        raise ValueError("plan and config are two names of one argument; pass plan alone.")
    name, given = ("plan", plan) if config is None else ("config", config)
    if given is None:
        return implementation, None
    if not isinstance(given, kind):
        raise ValueError(f"{name} is {type(given).__name__}; expected None or a {kind.__module__}.{kind.__name__}.")
    if implementation not in (None, "triton"):
        raise ValueError(
            f"{name} is a plan of the kernel and implementation is {implementation!r}; pass 'triton' or None with it."
        )
    return "triton", given


def dispatch(operator: str, implementation: str | None, bodies: Mapping[str, Callable[[], Any]]) -> Any:
    """Runs one of `bodies` (name to function without arguments). Only NotImplementedError leads to the next one.

    Raises:
      ValueError: an unknown name, or the named implementation does not support this case (with its reason).
    """
    check_implementation(implementation)
    if implementation is not None:
        try:
            return bodies[implementation]()
        except NotImplementedError as error:
            raise ValueError(
                f"implementation={implementation!r} of {operator} does not support this case: {error}."
                " Pass implementation=None to let the library choose."
            ) from error
    if HOST in named_targets() and len(named_targets()) > 1:
        # A program for several platforms: a CPU would interpret the kernels.
        return jax.lax.platform_dependent(cpu=bodies["xla"], default=lambda: _first_of(operator, bodies))
    return _first_of(operator, bodies)


def _first_of(operator: str, bodies: Mapping[str, Callable[[], Any]]) -> Any:
    reasons = []
    for name in preferred():
        try:
            return bodies[name]()
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise ValueError(f"no implementation of {operator} supports this case ({'; '.join(reasons)}).")
