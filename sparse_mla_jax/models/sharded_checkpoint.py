"""Reads a Hugging Face folder onto the devices of a mesh, each device's part directly from the files.

No process holds all weights on the host, nor a whole stack of experts: of each array in turn it reads the part of one
of its own devices, gives it to the devices that have that part, and forgets it. Of a quantised matrix, the rows are
dequantised that the process's devices need.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.models.checkpoint import OpenCheckpoint, open_checkpoint
from sparse_mla_jax.models.host_arrays import HostStack, Order, memory_order, put
from sparse_mla_jax.models.tensor_table import Keys, Tensor, at, keys_of
from sparse_mla_jax.parallel.axes import Parallel
from sparse_mla_jax.parallel.partition import check_divides, partition_params

Params = dict[str, Any]
# A part of an array: a start and an end for each axis.
Part = tuple[tuple[int, int], ...]


def shard_checkpoint(
    folder: str | os.PathLike[str],
    mesh: Mesh,
    parallel: Parallel,
    *,
    dtype: Any = jnp.float32,
    progress: bool = True,
) -> tuple[Config, Params]:
    """Reads config.json and the weights of a model folder onto the devices of a mesh.

    Everything that `load_checkpoint` reads is read, with the same values. Beside the weights on its devices, a process
    needs memory for the largest part of an array that one device has (the experts of one layer, usually) and for one
    tensor. With several processes (`jax.distributed`), each calls this function with the same arguments and reads only
    what its own devices have; all of them need the folder.

    Args:
      folder: a Hugging Face model folder.
      mesh: from `parallel.axes.make_mesh`, or another one with the axes `parallel.names`.
      parallel: how the model lies on the mesh; see `parallel.partition`.
      dtype: float32 or bfloat16, of the matrices; norms, biases and other small weights are always float32.
      progress: show a progress bar on stderr, if that is a terminal, and in one line there what was skipped, if
        anything.

    Returns:
      (config, params): global arrays, each with the `jax.sharding.NamedSharding` that `partition_params` gives it.

    Raises:
      ValueError: as `load_checkpoint`; a mesh without the axes of `parallel` in their sizes; heads, columns or experts
        that do not divide over it, with the sizes that do.
      OSError: a file that can not be opened.
    """
    _check.instance("parallel", parallel, Parallel)
    _check_mesh(mesh, parallel)
    opened = open_checkpoint(folder, dtype, progress=progress)
    specs = opened.specs
    check_divides(opened.config, specs, parallel)
    partition = partition_params(specs, parallel)
    disable = not progress or not sys.stderr.isatty()
    arrays: dict[Keys, jax.Array] = {}
    for keys, places in tqdm(_list_places(opened).items(), desc="weights", unit="array", disable=disable):
        arrays[keys] = _put(opened, places, at(specs, keys), NamedSharding(mesh, at(partition, keys)))
    return opened.config, jax.tree_util.tree_map_with_path(lambda path, _: arrays[keys_of(path)], specs)


def _check_mesh(mesh: Mesh, parallel: Parallel) -> None:
    """Raises ValueError unless the mesh has these axes; it may have others, along which weights are the same."""
    _check.instance("mesh", mesh, Mesh, hint="Make it with parallel.axes.make_mesh.")
    _check.instance("parallel", parallel, Parallel)
    expected = dict(zip(parallel.names, parallel.sizes))
    require(
        all(mesh.shape.get(name, 1) == size for name, size in expected.items()),
        f"mesh has the axes {dict(mesh.shape)} and parallel {expected}; make the mesh with parallel.make_mesh.",
    )


class _Place(NamedTuple):
    """Where an array's values are: output number `output` of the layout of `tensor`."""

    tensor: Tensor
    output: int


def _list_places(opened: OpenCheckpoint) -> dict[Keys, list[_Place]]:
    """For each array its tensors: one, or those of all experts in their order."""
    places: dict[Keys, list[_Place]] = {}
    for tensor in sorted(opened.tensors, key=lambda tensor: tensor.expert or 0):
        for output, keys in enumerate(tensor.keys):
            places.setdefault(keys, []).append(_Place(tensor, output))
    return places


def _put(
    opened: OpenCheckpoint, places: list[_Place], spec: jax.ShapeDtypeStruct, sharding: NamedSharding
) -> jax.Array:
    """The array with the parts of this process's devices, of which each is read once."""
    holders: dict[Part, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        assert index is not None
        part = tuple(one.indices(size)[:2] for one, size in zip(index, spec.shape))
        holders.setdefault(part, []).append(device)
    pieces = []
    for part, value, order in _read_parts(opened, places, spec, list(holders)):
        for number, device in enumerate(holders[part]):
            # Each device has memory of its own: jax on a CPU takes over that of the host.
            piece = put(value.copy() if number else value, order, device)
            # A device copies later than it is told to, and keeps the host's memory until then.
            pieces.append(piece.block_until_ready())
        # The next part is made only when this one is gone.
        del value, piece
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, pieces, dtype=spec.dtype)


def _read_parts(
    opened: OpenCheckpoint, places: list[_Place], spec: jax.ShapeDtypeStruct, parts: list[Part]
) -> Iterator[tuple[Part, np.ndarray, Order]]:
    """Yields the parts with their values, one at a time, in memory that nothing else uses; see `host_arrays.put`."""
    if places[0].tensor.expert is None:
        whole = _read(opened, places[0], parts)
        for part in parts:
            view = whole[_index(part)]
            order = memory_order(view)
            yield part, np.array(view.transpose(order), spec.dtype, order="C"), order
        return
    for part in parts:
        (first, last), own = part[0], part[1:]
        stack: HostStack | None = None
        for number in range(first, last):
            view = _read(opened, places[number], [own])[_index(own)]
            stack = stack or HostStack.create(last - first, view, spec.dtype)
            stack.values[number - first] = view.transpose(stack.order)
        assert stack is not None
        yield part, stack.values, stack.whole_order
        del stack


def _index(part: Part) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in part)


def _read(opened: OpenCheckpoint, place: _Place, parts: list[Part]) -> np.ndarray:
    """The whole array, or one expert's, as a view, in which only the parts need to have their values."""
    tensor, shapes = place.tensor, [spec.shape for spec in place.tensor.specs]
    return tensor.layout.read(opened.read(tensor, _rows(place, parts)), shapes)[place.output]


def _rows(place: _Place, parts: list[Part]) -> slice | None:
    """The rows of a published matrix that the parts come from; None for all, and for other tensors."""
    tensor = place.tensor
    if len(tensor.shape) != 2 or not parts:
        return None
    # What the layout makes of the numbers of the rows. A matrix whose columns take no memory stays one as a view.
    numbers = np.broadcast_to(np.arange(tensor.shape[0])[:, None], tensor.shape)
    placed = tensor.layout.read(numbers, [spec.shape for spec in tensor.specs])[place.output]
    found = [_without_copies(placed[_index(part)]) for part in parts]
    return slice(min(int(one.min()) for one in found), 1 + max(int(one.max()) for one in found))


def _without_copies(view: np.ndarray) -> np.ndarray:
    """The view without the axes along which all of its values are the same memory."""
    return view[tuple(0 if stride == 0 else slice(None) for stride in view.strides)]
