"""Plans: block sizes, splits and warps of a kernel. They are frozen, and memoised by static shapes.

Get a plan, change it, and pass it back:

    plan = plan_for(sparse_mla, q, kv, rows, sm_scale=0.1, value_dim=512, target="gfx942")
    sparse_mla(q, kv, rows, sm_scale=0.1, value_dim=512, plan=dataclasses.replace(plan, key_block=32))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.targets import Target, executor, find


class LaunchPlan(NamedTuple):
    """A kernel that an operator launches, and the plan that it takes."""

    kernel: str
    plan: Any


class _Recorder:
    """Replaces the machine while an operator is traced: records plans and launches nothing."""

    def __init__(self, arch: str):
        """`arch` is a target's name."""
        self.arch = arch
        self.found: list[LaunchPlan] = []

    def call(self, kernel_call: Callable, arrays: Sequence[jax.Array], out_shape: Any) -> Any:
        """Returns zeros in place of the kernel's results."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out_shape)


def choose_plan(kernel: str, plan: Any, heuristic: Callable[..., Any], **sizes: Any) -> Any:
    """`plan` if the caller passed one, else `heuristic(**sizes)`; `kernel` is its name in `plans_for`."""
    chosen = heuristic(**sizes) if plan is None else plan
    recorder = executor.value
    if isinstance(recorder, _Recorder):
        recorder.found.append(LaunchPlan(kernel, chosen))
    return chosen


def plans_for(operator: Callable[..., Any], *args: Any, target: Target | str, **options: Any) -> list[LaunchPlan]:
    """The plans of all kernels that `operator(*args, **options)` launches on a machine, in order of launch.

    Args:
      operator: a function with `implementation=`: an operator of `sparse_mla_jax.ops`, or a layer made of operators.
      *args: its arguments; arrays or shapes (jax.ShapeDtypeStruct). Nothing is computed.
      target: "gfx942", "gfx950" or "nvidia", or a `pallas_kernels.targets.Target`.
      **options: its static keyword arguments.

    Raises:
      ValueError: the kernels do not support these arguments, or the target is not known.
    """
    recorder = _Recorder(find(target).name)
    with executor(recorder):
        # A new function object misses the cache of traces: a cached trace would record nothing.
        jax.eval_shape(lambda *a: operator(*a, **{"implementation": "triton", **options}), *args)
    return recorder.found


def plan_for(operator: Callable[..., Any], *args: Any, target: Target | str, **options: Any) -> Any:
    """The plan that the kernel of `operator(*args, **options)` takes on a machine; arguments as in `plans_for`.

    Raises:
      ValueError: the operator launches no kernel that has a plan, or kernels with different plans (see `plans_for`).
    """
    found = plans_for(operator, *args, target=target, **options)
    different = {launch.plan for launch in found}
    if len(different) != 1:
        names = ", ".join(launch.kernel for launch in found) or "none"
        raise ValueError(f"kernels with a plan that are launched: {names}; one is expected. Use plans_for.")
    return found[0].plan
