"""The axes over which a step is spread, and the mesh that has them.

    data      requests: every group of devices has its own requests and pages.
    context   pages of a request: page p lies on device p % context. Weights are the same on all of them.
    tensor    heads of attention, columns of feed-forward layers, the vocabulary.

Experts lie over the product of some of these axes. The mesh and its collectives are JAX's own: a `Parallel` only says
which axes exist, so that functions inside `jax.shard_map` know what they hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.ops._axis import axis_size

AXES = ("data", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Sizes of a mesh's axes, static and hashable. Functions that get None run on one device.

    Attributes:
      data: groups of requests.
      context: devices that share the pages of a request.
      tensor: devices that share heads, columns and the vocabulary.
      experts: the axes over whose product experts are spread, each device having whole experts. If that is one device,
        as with (), the columns of every expert are split over "tensor" instead.
      names: the names of the three axes in the mesh.

    Raises:
      ValueError: sizes below 1, or names that are not three different ones.
    """

    data: int = 1
    context: int = 1
    tensor: int = 1
    experts: tuple[str, ...] = ("data", "tensor")
    names: tuple[str, str, str] = AXES

    def __post_init__(self) -> None:
        for kind in AXES:
            _check.size(kind, getattr(self, kind), hint="Devices along this axis of the mesh.")
        require(
            isinstance(self.names, tuple) and len(self.names) == len(set(self.names)) == 3,
            f"names is {self.names!r}; three different axis names are expected, for {', '.join(AXES)}.",
        )
        require(
            isinstance(self.experts, tuple) and len(set(self.experts)) == len(self.experts) <= 3,
            f"experts is {self.experts!r}; a tuple of axes is expected, of {', '.join(AXES)}.",
        )
        require(
            set(self.experts) <= set(AXES),
            f"experts is {self.experts!r}; expected are some of {', '.join(AXES)}, the kinds of axes.",
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Devices along "data", "context" and "tensor"."""
        return self.data, self.context, self.tensor

    @property
    def num_devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.sizes)

    @property
    def expert(self) -> int:
        """Devices over which experts are spread."""
        return math.prod(getattr(self, kind) for kind in self.experts)

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """Names in the mesh of the axes with more than one device over which experts are spread."""
        return self.present(*self.experts)

    def axis(self, kind: str) -> str | None:
        """The name in the mesh of axis "data", "context" or "tensor"; None if it has one device."""
        return self.names[AXES.index(kind)] if getattr(self, kind) > 1 else None

    def present(self, *kinds: str) -> tuple[str, ...]:
        """The names of those axes that have more than one device, in the order of the mesh."""
        return tuple(name for kind in AXES if kind in kinds and (name := self.axis(kind)) is not None)


def parse_parallel(text: str) -> Parallel:
    """Reads "data=2,tensor=4"; an axis that is left out has one device.

    "experts=data+tensor" names the axes over which experts are spread, "experts=" none.

    Raises:
      ValueError: another axis, one named twice, or a size that is not a whole number of at least 1.
    """
    found: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else []:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        require(
            bool(equals) and name in (*AXES, "experts") and name not in found,
            f"mesh is {text!r}, {part.strip()!r} in it; sizes of the axes {', '.join(AXES)} are expected, each once, as"
            " in data=2,tensor=4.",
        )
        if name == "experts":
            found[name] = tuple(kind for kind in value.split("+") if kind)
            continue
        require(
            value.isdecimal() and value.isascii() and 0 < len(value) < 10,
            f"mesh is {text!r}; {name} is {value!r}, a number of devices is expected, as in {name}=2.",
        )
        found[name] = int(value)
    return Parallel(**found)


def divisors(size: int) -> str:
    """The numbers of devices that divide `size`, for messages: "1, 2, 4"."""
    return ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)


def make_mesh(parallel: Parallel, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes of `parallel`, in the order of its names, with axes of type Auto for `jax.shard_map`.

    Neighbours along "tensor" are neighbours in `devices`; then those along "context", then along "data".

    Args:
      parallel: the sizes.
      devices: at least as many as the mesh has; None means `jax.devices()`.

    Raises:
      ValueError: too few devices.
    """
    there = jax.devices() if devices is None else list(devices)
    needed = parallel.num_devices
    shown = ", ".join(f"{kind}={size}" for kind, size in zip(AXES, parallel.sizes))
    require(
        len(there) >= needed,
        f"a mesh of {shown} has {needed} devices; there are {len(there)}. Choose sizes whose product is at most that.",
    )
    return jax.make_mesh(parallel.sizes, parallel.names, axis_types=(AxisType.Auto,) * 3, devices=there[:needed])


def parallel_of(mesh: Mesh | None, parallel: Parallel | None = None) -> Parallel | None:
    """The axes of `mesh`, or `parallel` if that is given; None without a mesh.

    Raises:
      ValueError: axes with other names or sizes.
    """
    if mesh is None:
        require(parallel is None, "parallel is given without a mesh; make one with parallel.make_mesh.")
        return None
    _check.instance("mesh", mesh, Mesh, hint="Make one with parallel.make_mesh.")
    if parallel is None:
        unknown = sorted(set(mesh.axis_names) - set(AXES))
        require(
            not unknown,
            f"mesh has the axes {', '.join(map(str, mesh.axis_names))}; expected are some of {', '.join(AXES)}. Pass"
            " parallel=Parallel(..., names=...) for other names.",
        )
        return Parallel(**mesh.shape)
    sizes = dict(zip(parallel.names, parallel.sizes))
    require(
        all(mesh.shape.get(name, 1) == size for name, size in sizes.items()) and mesh.size == parallel.num_devices,
        f"mesh has the axes {dict(mesh.shape)} and parallel {sizes}; make the mesh with parallel.make_mesh.",
    )
    return parallel


def check_axes(parallel: Parallel, *kinds: str) -> None:
    """Raises ValueError unless the mesh in use inside `jax.shard_map` has these axes in the sizes of `parallel`."""
    for kind in kinds:
        name, size = parallel.axis(kind), getattr(parallel, kind)
        require(
            name is None or axis_size(name) == size,
            f"parallel has {kind}={size}; axis {name!r} of the mesh in use has {name and axis_size(name)} devices. Make"
            " the mesh with parallel.make_mesh, or parallel with the sizes of the mesh.",
        )
