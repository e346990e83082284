"""What a machine is: the GPUs that kernels are made for, and which of them a program is lowered for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
from jax import lax

# Who executes kernels on a CPU in place of interpret mode (pallas_kernels.cdna.device); part of every jit cache key.
executor = jax.make_user_context(None)

HOST = "cpu"
# Targets for which plans and FP8 decoding are specialised.
CDNA = ("gfx942", "gfx950")


def dispatch(body: Callable[..., Any], *args: Any) -> Any:
    """`body(target, *args)` for what the program is lowered for, and for its plans: args are pytrees of arrays.

    The target is "cpu" (interpret mode), "gfx942", "gfx950", or "gpu" for any other GPU. Several platforms are traced,
    the lowering keeps one; so a CPU host can lower for `cuda` or `rocm`.
    """
    chosen = executor.value
    if chosen is not None:
        return body(chosen.arch, *args)
    return jax.lax.platform_dependent(
        *args, cpu=functools.partial(body, HOST), default=functools.partial(body, gpu_target())
    )


def gpu_target() -> str:
    """The architecture of the GPU that is traced for, where kernels differ by it: "gfx942", "gfx950" or "gpu"."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind = abstract.device_kind
    else:
        device = jax.devices()[0]
        kind = getattr(device, "compute_capability", "") if device.platform != "cpu" else ""
    return next((arch for arch in CDNA if arch in str(kind)), "gpu")


# Programs that keep the machines at hand busy (132 to 304 compute units); more splits only add merging.
TARGET_PROGRAMS = 256


# Waves of attention that the machines hold, one on each SIMD.
SIMDS = {"gfx942": 304 * 4, "gfx950": 256 * 4}


def dispatch_division(run: Callable[..., Any], *args: Any) -> Any:
    """`dispatch` of `run(target, *args)` where an NVIDIA GPU has a target of its own, "cuda", for `divide`."""

    def launch(target, *args):
        if target != "gpu":
            return run(target, *args)
        ways = {"cuda": functools.partial(run, "cuda"), "default": functools.partial(run, "gpu")}
        return lax.platform_dependent(*args, **ways)

    return dispatch(launch, *args)
