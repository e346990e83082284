"""What a family file says: which config keys there are, and how each published tensor and our arrays go together.

A family's tensors are a table: published name, places of ours in the parameters' pytree, layout. Shapes and types are
not in it: they follow from the pytree's own (`param_specs` of the model). Published matrices are output-first
([out, in], as torch.nn.Linear keeps them), ours input-first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_mla_jax.shapes import Config

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


class Layout(NamedTuple):
    """How one published tensor and the arrays of ours that hold it go into each other.

    Attributes:
      published_shape: the tensor's shape from those of ours.
      read: (tensor, shapes of ours) to ours; views.
      write: ours to the tensor; views where possible.
    """

    published_shape: Callable[[Shapes], Shape]
    read: Callable[[np.ndarray, Shapes], list[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]


class PublishedTensor(NamedTuple):
    """A row of a family's table.

    Attributes:
      name: the published name.
      places: where ours lie in the parameters, keys of the pytree joined by dots ("layers.0.self_attn.q_a_proj"); the
        last one is a number where ours is a stack of published tensors ("layers.1.mlp.experts.up_proj.7").
      layout: how they go into each other.
    """

    name: str
    places: tuple[str, ...]
    layout: Layout


class PublishedFamily(NamedTuple):
    """What a family file exports as FAMILY.

    Attributes:
      model_types: what config.json may call the family, the published name first.
      config_type: the dataclass that its config.json fills.
      read_config: fields of a config.json to the dataclass.
      write_config: (config, type of the matrices) to the fields of a config.json that `read_config` reads back.
      tensors: the table, in the order in which a folder is written.
      is_ignored: whether a folder may hold this tensor although the model has no use for it.
      scale_names: what the scales of a quantised matrix may be called, the published name first.
      fp4_experts: whether routed experts may be FP4.
    """

    model_types: tuple[str, ...]
    config_type: type
    read_config: Callable[[dict[str, Any]], Config]
    write_config: Callable[[Any, Any], dict[str, Any]]
    tensors: Callable[[Any], Iterator[PublishedTensor]]
    is_ignored: Callable[[str, Any], bool]
    scale_names: Callable[[str], tuple[str, ...]]
    fp4_experts: bool


# --- layouts


def transposed(inputs: int = 1) -> Layout:
    """[out, in] for ours [*in, *out], of which the first `inputs` axes are in; a vector is published as it is."""

    def published_shape(shapes: Shapes) -> Shape:
        (shape,) = shapes
        return shape if len(shape) == 1 else (math.prod(shape[inputs:]), math.prod(shape[:inputs]))

    def read(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
        return [value.T.reshape(shapes[0])]

    def write(arrays: Sequence[np.ndarray]) -> np.ndarray:
        (array,) = arrays
        return array if array.ndim == 1 else array.reshape(math.prod(array.shape[:inputs]), -1).T

    return Layout(published_shape, read, write)


LINEAR = transposed()

SAME = Layout(
    published_shape=lambda shapes: shapes[0],
    read=lambda value, shapes: [value],
    write=lambda arrays: arrays[0],
)


def _read_grouped(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    groups, width, rank = shapes[0]
    return [value.reshape(groups, rank, width).transpose(0, 2, 1)]


# Ours [groups, in, out], published [groups * out, in]: the rows of one group after those of the other.
GROUPED = Layout(
    published_shape=lambda shapes: (shapes[0][0] * shapes[0][2], shapes[0][1]),
    read=_read_grouped,
    write=lambda arrays: arrays[0].transpose(0, 2, 1).reshape(-1, arrays[0].shape[1]),
)


def _read_keys_and_values(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    (heads, keys, rank), (_, _, values) = shapes
    both = value.reshape(heads, keys + values, rank)
    return [both[:, :keys], both[:, keys:].transpose(0, 2, 1)]


def _write_keys_and_values(arrays: Sequence[np.ndarray]) -> np.ndarray:
    keys, values = arrays
    return np.concatenate([keys, values.transpose(0, 2, 1)], axis=1).reshape(-1, keys.shape[2])


# Ours [heads, keys, rank] and [heads, rank, values], published [heads * (keys + values), rank].
KEYS_AND_VALUES = Layout(
    published_shape=lambda shapes: (shapes[0][0] * (shapes[0][1] + shapes[1][2]), shapes[0][2]),
    read=_read_keys_and_values,
    write=_write_keys_and_values,
)


# --- tables

# What follows a published prefix, and what follows a place of ours, with a layout where it is not LINEAR; several
# places stand with spaces between them.
Places = dict[str, str | tuple[str, Layout]]


def table_rows(table: Places, name: str, place: str) -> Iterator[PublishedTensor]:
    """Rows of a part of the model: published names begin with `name`, places with `place`."""
    for suffix, ours in table.items():
        places, layout = ours if isinstance(ours, tuple) else (ours, LINEAR)
        yield PublishedTensor(name + suffix, tuple(place + one for one in places.split()), layout)
