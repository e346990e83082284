"""The machines that kernels support, and the choice of one when a program is lowered.

Block sizes, waves, FP8 types and instructions depend on the machine. This file holds all facts about machines. A GPU
that the kernels do not support raises NotImplementedError: operators then fall back to their XLA body, and
`python -m sparse_mla_jax info` prints the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
from jax.sharding import PartitionSpec

from pallas_kernels.mesh_axes import explicit_axes, on_shards


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins GPUs.

    Attributes:
      name: its product name.
      pair: bytes per second that a GPU sends to one other.
      total: bytes per second that it sends to all others together.
      launch: seconds that a collective takes besides those of its bytes.
    """

    name: str
    pair: float
    total: float
    launch: float

    def bandwidth(self, devices: int) -> float:
        """Bytes per second that a GPU sends to the others of a group of `devices`, at least 2."""
        return min(self.total, self.pair * (devices - 1))


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine that kernels support.

    Attributes:
      name: its name in plans and tables.
      platform: JAX's name of its platform.
      product: its product name.
      wave: lanes that execute one instruction together (NVIDIA: a warp).
      units: number of compute units (NVIDIA: multiprocessors).
      simds: vector units of a compute unit.
      lds_bytes: LDS (shared memory) that a workgroup may use.
      bandwidth: peak memory bandwidth, bytes per second.
      clock: peak engine clock, Hz.
      memory: bytes of its memory.
      programs: programs in flight that fill the machine; more splits than that only add merging.
      native_fp8: the FP8 type that its tensor cores multiply, None if they multiply none.
      conversions: FP8 types that one instruction converts, each with the power of two to multiply the result by.
      link: joins the GPUs of one machine, see `PER_HOST`; None for a CPU.
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
    memory: int = 0
    programs: int = 256
    native_fp8: str | None = None
    conversions: tuple[tuple[str, float], ...] = ()
    link: Link | None = None


# Measured on two H200 through XLA and NCCL: the sum of 0.9 MB takes 19 us and joining 1 MB from each takes 26 us, of
# which their bytes are 2 us. No AMD GPU and no network was measured.
_LAUNCH = 20e-6
# Interpret mode on a CPU. It has no waves; its plans are those of a wave of 32.
HOST = Target("cpu", "cpu", "CPU", wave=32, units=1, simds=1, lds_bytes=0, bandwidth=0.0, clock=0.0)
# Figures from AMD's data sheets. gfx950 does not list e4m3fnuz: its conversion instruction reads +-240 as NaN.
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
    memory=192 << 30,
    native_fp8="float8_e4m3fnuz",
    conversions=(("float8_e4m3fnuz", 1.0), ("float8_e4m3fn", 2.0)),
    # AMD's data sheet: one link to each of the 7 others, 128 GB/s in both directions together.
    link=Link("Infinity Fabric", pair=64e9, total=448e9, launch=_LAUNCH),
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
    memory=288 << 30,
    native_fp8="float8_e4m3fn",
    conversions=(("float8_e4m3fn", 1.0),),
    # As gfx942's, with 153.6 GB/s for each link.
    link=Link("Infinity Fabric", pair=76.8e9, total=537.6e9, launch=_LAUNCH),
)
# Hopper, where the kernels were timed, and data-center Blackwell, which has Hopper's instructions and shared memory.
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
    memory=141 * 10**9,
    native_fp8="float8_e4m3fn",
    # NVIDIA's data sheet: 900 GB/s in both directions together. Switches give all of it to any pair.
    link=Link("NVLink 4", pair=450e9, total=450e9, launch=_LAUNCH),
)
CDNA = (GFX942, GFX950)
# GPUs of one machine in AMD's Instinct platforms, all connected to all others.
CDNA_PER_HOST = 8
# GPUs that a `Target.link` joins: AMD's platforms, and NVIDIA's HGX boards.
PER_HOST = CDNA_PER_HOST
# Between machines: one adapter of 400 Gb/s for each GPU, as servers with eight of these GPUs usually have.
NETWORK = Link("network, 400 Gb/s for each GPU", pair=50e9, total=50e9, launch=_LAUNCH)
TARGETS = (HOST, *CDNA, NVIDIA)
# Names of NVIDIA in an earlier release.
_ALIASES = {"gpu": NVIDIA, "cuda": NVIDIA}

# Major compute capabilities of supported NVIDIA GPUs, and product names of GPUs that report no capability.
_CAPABILITIES = (9, 10)
_PRODUCTS = re.compile(r"\b(GH200|GB[23]00|H(20|100|200|800)|B[123]00)\b")
_AMD_PRODUCTS = {"MI300": GFX942, "MI325": GFX942, "MI350": GFX950, "MI355": GFX950}


class Executor(Protocol):
    """Runs kernels on a CPU host in place of interpret mode; see `pallas_kernels.cdna.device`."""

    arch: str

    def call(self, kernel_call: Callable, arrays: Any, out_shape: Any) -> Any:
        """Runs `kernel_call` on `arrays` and returns its results."""


# The targets that a program is lowered for on a host that may have none of them, see `lower_for`.
_named = jax.make_user_context(())
# Overrides interpret mode on CPU: the CDNA interpreter, when active. Part of every jit cache key.
executor = jax.make_user_context(None)


def find(target: Target | str) -> Target:
    """The target of that name; returns a Target unchanged.

    Raises:
      ValueError: no target has that name.
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
      NotImplementedError: the kernels do not support it.
    """
    kind = str(device.device_kind)
    # A real device reports its architecture ("gfx942:sramecc+:xnack-", "9.0"), an abstract one only its kind.
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


@contextlib.contextmanager
def lower_for(*names: str) -> Iterator[None]:
    """Traces and lowers programs for the named machines, on a host that may have none of them.

    For `jax.export` and `jax.jit(...).trace(...).lower(lowering_platforms=...)`. Inside, `implementation="triton"` puts
    the kernels of each named GPU into the program, `"xla"` the XLA body, and None what that machine would choose: the
    kernels on GPUs, the XLA body on a CPU. Part of jit's cache key.

    Args:
      *names: "cpu", "cuda", "rocm:gfx942", "rocm:gfx950" (or the targets' names); one of each platform at most.

    Raises:
      ValueError: no name, an unknown one, or two machines of one platform.
    """
    chosen = tuple(find(name.removeprefix("rocm:") if isinstance(name, str) else name) for name in names)
    platforms = [target.platform for target in chosen]
    if not chosen or len(set(platforms)) < len(platforms):
        raise ValueError(
            f"names are {', '.join(map(repr, names)) or 'absent'}; expected one machine at least, and one of each"
            " platform: a program holds one version of a kernel per platform. Export once for each machine."
        )
    with _named(chosen):
        yield


def named_targets() -> tuple[Target, ...]:
    """The targets of `lower_for`, empty outside of it."""
    return _named.value


@contextlib.contextmanager
def on_abstract_device(target: Target) -> Iterator[None]:
    """Makes jax trace and lower for a GPU that this host lacks; a mesh in use keeps its axes."""
    kind = target.name if target in CDNA else f"NVIDIA {target.product}"
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=target.units, platform="gpu")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        yield


def traced_gpu() -> Any:
    """The GPU to trace for: that of the abstract mesh, else the first device; None if that is a CPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.platform != "cpu":
        return abstract
    device = jax.devices()[0]
    return None if device.platform == "cpu" else device


def by_target(body: Callable[..., Any], *args: Any) -> Any:
    """Runs `body(target, *args)` for the machine that the program is lowered for; args are pytrees of arrays.

    `body` is traced for the host (interpret mode) and for one GPU (`traced_gpu`); the lowering keeps one of the two. On
    a CPU host that GPU is an NVIDIA GPU, unless `lower_for` or `jax.sharding.use_abstract_mesh` names another. In a
    mesh with Explicit axes every device computes the whole result.

    Raises:
      NotImplementedError: the kernels do not support that GPU.
    """
    if explicit_axes():
        # An operator that can split its work over these axes has done so before (`on_shards`).
        whole = jax.tree.map(lambda _: PartitionSpec(), args)
        return on_shards(lambda *args: by_target(body, *args), args, whole, PartitionSpec())
    chosen = executor.value
    if chosen is not None:
        return body(find(chosen.arch), *args)
    gpu = traced_gpu()
    targets = named_targets() or (HOST, NVIDIA if gpu is None else target_of(gpu))
    ways = {target.platform: functools.partial(body, target) for target in targets}
    return jax.lax.platform_dependent(*args, **ways)
