"""The structure of a family file: config readers, and a table that maps published tensors to our arrays.

A row of the table has the published name, the paths of our arrays in the parameters' pytree, and a layout. Shapes and
types are not in the table: they come from the model's `param_specs`. Published matrices are output-first ([out, in],
as torch.nn.Linear stores them), ours are input-first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_mla_jax._json_fields import ConfigFields
from sparse_mla_jax.shapes import Config

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


class Layout(NamedTuple):
    """Conversion between one published tensor and our arrays.

    Attributes:
      published_shape: shapes of our arrays -> shape of the tensor.
      read: (tensor, shapes of our arrays) -> our arrays, as views.
      write: our arrays -> tensor, as a view if possible.
    """

    published_shape: Callable[[Shapes], Shape]
    read: Callable[[np.ndarray, Shapes], list[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]


class PublishedTensor(NamedTuple):
    """A row of a family's table.

    Attributes:
      name: the published name.
      places: paths of our arrays in the parameters, keys joined by dots ("layers.0.self_attn.q_a_proj"). A number at
        the end is an index into an array that stacks published tensors ("layers.1.mlp.experts.up_proj.7").
      layout: conversion between the tensor and our arrays.
    """

    name: str
    places: tuple[str, ...]
    layout: Layout


class StoredPart(NamedTuple):
    """A published tensor that a file has under another name, or as a part of a tensor that holds several.

    Attributes:
      name: the published name.
      slices: its part of the file's tensor, by numbers and slices with start and stop, for the first axes.
    """

    name: str
    slices: tuple[int | slice, ...] = ()


class PublishedFamily(NamedTuple):
    """The exports of a family file, as FAMILY.

    Attributes:
      model_types: values of model_type in config.json, the published one first: that is `config.family`.
      architectures: class names of Hugging Face transformers that config.json may give under `architectures`.
      defaults: the family's constants, and the numbers of a config.json that says nothing.
      keys: names in config.json that mean something in this family; other families refuse them by name.
      read_config: fields of a config.json -> config. The registry refuses or reports the fields that it leaves.
      write_config: (config, type of the matrices) -> fields of a config.json that `read_config` reads back.
      tensors: the table of tensors, in the order in which a folder is written, with a row for each expert.
      describe_ignored: what a tensor is that a folder may hold although the model does not use it, in words that follow
        "12 tensors of"; None for others.
      scale_names: possible names of the scales of a quantised matrix, the published one first.
      parts: (name in a file, shape, config) -> published tensors that it holds; itself if the name is published.
      fp4_experts: whether routed experts may be FP4.
      fused_experts: whether the experts of a layer are written as two tensors, `gate_up_proj` and `down_proj`.
      composite: names in config.json of the other parts of a model that has its sizes in `text_config`; empty for
        models of text alone.
    """

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    defaults: Config
    keys: tuple[str, ...]
    read_config: Callable[[ConfigFields], Config]
    write_config: Callable[[Any, Any], dict[str, Any]]
    tensors: Callable[[Any], Iterator[PublishedTensor]]
    describe_ignored: Callable[[str, Any], str | None]
    scale_names: Callable[[str], tuple[str, ...]]
    parts: Callable[[str, Shape, Any], list[StoredPart]]
    fp4_experts: bool = False
    fused_experts: bool = False
    composite: tuple[str, ...] = ()


# --- layouts


def transposed(inputs: int = 1) -> Layout:
    """Published [out, in], ours [*in, *out] with `inputs` input axes; vectors are the same in both."""

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


def _by_head(*orders: tuple[int, int, int], stacked: bool = False) -> Layout:
    """Published are the rows [width, in] of all our arrays, one array after the other, for one head after the other.

    Args:
      orders: for each of our arrays the axes that are its heads, width and inputs.
      stacked: the tensor has the axis of the heads; false: it is [heads * width, in].
    """

    def published_shape(shapes: Shapes) -> Shape:
        heads, _, inputs = (shapes[0][axis] for axis in orders[0])
        rows = sum(shape[order[1]] for shape, order in zip(shapes, orders))
        return (heads, rows, inputs) if stacked else (heads * rows, inputs)

    def read(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
        ends = np.cumsum([shape[order[1]] for shape, order in zip(shapes, orders)])
        parts = np.split(value.reshape(shapes[0][orders[0][0]], ends[-1], -1), ends[:-1], axis=1)
        return [part.transpose(np.argsort(order)) for part, order in zip(parts, orders)]

    def write(arrays: Sequence[np.ndarray]) -> np.ndarray:
        parts = [array.transpose(order) for array, order in zip(arrays, orders)]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return rows if stacked else rows.reshape(-1, rows.shape[2])

    return Layout(published_shape, read, write)


# Ours [groups, in, out]; published [groups * out, in], one group after the other.
GROUPED = _by_head((0, 2, 1))
# Ours [heads, keys, rank] and [heads, rank, values]; published [heads * (keys + values), rank].
KEYS_AND_VALUES = _by_head((0, 1, 2), (0, 2, 1))
# Ours [in, heads, query] and [in, heads, gate]; published [heads * (query + gate), in].
QUERY_AND_GATE = _by_head((1, 2, 0), (1, 2, 0))
# Ours [experts, in, out] of gate and up; published [experts, 2 * out, in], gate rows first.
FUSED_GATE_UP = _by_head((0, 2, 1), (0, 2, 1), stacked=True)
# Ours [experts, in, out]; published [experts, out, in].
FUSED_DOWN = _by_head((0, 2, 1), stacked=True)


# --- tables

# Suffix of a published name -> suffix of our path, or (suffix, layout) if the layout is not LINEAR. Several paths are
# separated by spaces.
Places = dict[str, str | tuple[str, Layout]]


def table_rows(table: Places, name: str, place: str) -> Iterator[PublishedTensor]:
    """Yields the rows of a table, with prefix `name` for published names and prefix `place` for our paths."""
    for suffix, ours in table.items():
        places, layout = ours if isinstance(ours, tuple) else (ours, LINEAR)
        yield PublishedTensor(name + suffix, tuple(place + one for one in places.split()), layout)
