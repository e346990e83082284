"""What a machine is: the GPUs that kernels are made for, and which of them a program is lowered for.

Block sizes, waves, FP8 types and instructions depend on the machine, and everything that is known of a machine stands
here. A GPU that no kernel was made for raises NotImplementedError: an operator then takes its XLA body, and
`python -m sparse_mla_jax info` says why.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine that kernels are made for.

    Attributes:
      name: what plans and tables call it.
      platform: JAX's name of the platform that programs are lowered for.
      product: what it is sold as.
      wave: lanes that execute one instruction together (a warp of NVIDIA's).
      units: compute units (multiprocessors).
      simds: vector units of a compute unit.
      lds_bytes: LDS (shared memory) that a workgroup may have.
      bandwidth: of memory at its peak, bytes a second.
      clock: of the engine at its peak, Hz.
      programs: programs in flight that fill it; splitting work beyond that can only add merging.
      native_fp8: the FP8 type that its matrix instructions read, None where there are none.
      conversions: FP8 types that one instruction converts, with the power of two that the result is short of.
    """

    name: str
    platform: str
    product: str
    wave: int
    units: int
    simds: int
    lds_bytes: int
    bandwidth: float
    clock: float
    programs: int = 256
    native_fp8: str | None = None
    conversions: tuple[tuple[str, float], ...] = ()


# Interpret mode on a CPU. It has no waves; plans for it are those of a wave of 32.
HOST = Target("cpu", "cpu", "CPU", wave=32, units=1, simds=1, lds_bytes=0, bandwidth=0.0, clock=0.0)
# AMD's data sheets of MI300X and MI355X. gfx950 does not convert e4m3fnuz: its own conversion reads +-240 as NaN.
GFX942 = Target(
    "gfx942",
    "rocm",
    "MI300X",
    wave=64,
    units=304,
    simds=4,
    lds_bytes=64 << 10,
    bandwidth=5.3e12,
    clock=2.1e9,
    native_fp8="float8_e4m3fnuz",
    conversions=(("float8_e4m3fnuz", 1.0), ("float8_e4m3fn", 2.0)),
)
GFX950 = Target(
    "gfx950",
    "rocm",
    "MI355X",
    wave=64,
    units=256,
    simds=4,
    lds_bytes=160 << 10,
    bandwidth=8.0e12,
    clock=2.4e9,
    native_fp8="float8_e4m3fn",
    conversions=(("float8_e4m3fn", 1.0),),
)
# Hopper, on which the kernels were timed, and data-center Blackwell, which has its instructions and shared memory.
NVIDIA = Target(
    "nvidia",
    "cuda",
    "H200",
    wave=32,
    units=132,
    simds=4,
    lds_bytes=227 << 10,
    bandwidth=4.8e12,
    clock=1.98e9,
    native_fp8="float8_e4m3fn",
)
CDNA = (GFX942, GFX950)
TARGETS = (HOST, *CDNA, NVIDIA)
# What a release before called NVIDIA.
_ALIASES = {"gpu": NVIDIA, "cuda": NVIDIA}

# NVIDIA's compute capabilities, by major number, and product names of such GPUs where that is all that is known.
_CAPABILITIES = (9, 10)
_PRODUCTS = re.compile(r"\b(GH200|GB[23]00|H(20|100|200|800)|B[123]00)\b")
_AMD_PRODUCTS = {"MI300": GFX942, "MI325": GFX942, "MI350": GFX950, "MI355": GFX950}


class Executor(Protocol):
    """Runs kernels on a CPU host in place of interpret mode; see `pallas_kernels.cdna.device`."""

    arch: str

    def call(self, kernel_call: Callable, arrays: Any, out_shape: Any) -> Any:
        """What `kernel_call` returns for these arrays."""


# The executor that is active: part of every jit cache key.
executor = jax.make_user_context(None)


def find(target: Target | str) -> Target:
    """The target of that name; a Target is returned as it is.

    Raises:
      ValueError: there is none.
    """
    if isinstance(target, Target):
        return target
    found = next((t for t in TARGETS if t.name == target), None) or _ALIASES.get(target)
    if found is None:
        raise ValueError(f"target is {target!r}; expected one of {', '.join(t.name for t in TARGETS)}.")
    return found


def target_of(device: Any) -> Target:
    """The target of a GPU: a jax.Device, or a jax.sharding.AbstractDevice, whose `device_kind` may be an architecture.

    Raises:
      NotImplementedError: no kernel was made for it.
    """
    kind = str(device.device_kind)
    # A real device tells its architecture ("gfx942:sramecc+:xnack-", "9.0"), an abstract one its kind alone.
    architecture = str(getattr(device, "compute_capability", "") or "")
    if gfx := re.search(r"gfx[0-9a-f]+\b", f"{architecture} {kind}"):
        found = next((t for t in CDNA if t.name == gfx[0]), None)
    elif amd := next((t for name, t in _AMD_PRODUCTS.items() if name in kind), None):
        found = amd
    elif capability := re.fullmatch(r"(\d+)\.\d+", architecture) or re.search(r"sm_(\d+)\d", kind):
        found = NVIDIA if int(capability[1]) in _CAPABILITIES else None
    else:
        found = NVIDIA if _PRODUCTS.search(kind) else None
    if found is None:
        made = ", ".join((*(t.name for t in CDNA), "NVIDIA GPUs of compute capability 9 and 10"))
        named = " ".join(x for x in (kind, architecture) if x)
        raise NotImplementedError(f"no kernel was made for {named}; kernels are made for {made}")
    return found


def traced_gpu() -> Any:
    """The GPU that is traced for: that of the abstract mesh, else the first device here; None where none is known."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform != "cpu":
        return abstract
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device


def by_target(body: Callable[..., Any], *args: Any) -> Any:
    """`body(target, *args)` for what the program is lowered for; args are pytrees of arrays.

    `body` is traced for the host (interpret mode) and for the GPU that is traced for, and the lowering keeps one. On a
    CPU host that names no GPU it is the host or an NVIDIA GPU; name a GPU by `jax.sharding.use_abstract_mesh`.

    Raises:
      NotImplementedError: no kernel was made for that GPU.
    """
    chosen = executor.value
    if chosen is not None:
        return body(find(chosen.arch), *args)
    gpu = traced_gpu()
    target = NVIDIA if gpu is None else target_of(gpu)
    ways = {"cpu": functools.partial(body, HOST), target.platform: functools.partial(body, target)}
    return jax.lax.platform_dependent(*args, **ways)
