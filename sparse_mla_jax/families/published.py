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


def _read_grouped(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    groups, width, rank = shapes[0]
    return [value.reshape(groups, rank, width).transpose(0, 2, 1)]


# Ours [groups, in, out]; published [groups * out, in], one group after the other.
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


# Ours [heads, keys, rank] and [heads, rank, values]; published [heads * (keys + values), rank].
KEYS_AND_VALUES = Layout(
    published_shape=lambda shapes: (shapes[0][0] * (shapes[0][1] + shapes[1][2]), shapes[0][2]),
    read=_read_keys_and_values,
    write=_write_keys_and_values,
)


def _read_query_and_gate(value: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
    (inputs, heads, query), (_, _, gate) = shapes
    both = value.reshape(heads, query + gate, inputs).transpose(2, 0, 1)
    return [both[..., :query], both[..., query:]]


def _write_query_and_gate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    both = np.concatenate(list(arrays), axis=2)
    return both.transpose(1, 2, 0).reshape(-1, both.shape[0])


# Ours [in, heads, query] and [in, heads, gate]; published [heads * (query + gate), in].
QUERY_AND_GATE = Layout(
    published_shape=lambda shapes: (shapes[0][1] * (shapes[0][2] + shapes[1][2]), shapes[0][0]),
    read=_read_query_and_gate,
    write=_write_query_and_gate,
)

# Ours [experts, in, out] of gate and up; published [experts, 2 * out, in], gate rows first.
FUSED_GATE_UP = Layout(
    published_shape=lambda shapes: (shapes[0][0], 2 * shapes[0][2], shapes[0][1]),
    read=lambda value, shapes: [half.transpose(0, 2, 1) for half in np.split(value, 2, axis=1)],
    write=lambda arrays: np.concatenate([array.transpose(0, 2, 1) for array in arrays], axis=1),
)
# Ours [experts, in, out]; published [experts, out, in].
FUSED_DOWN = Layout(
    published_shape=lambda shapes: (shapes[0][0], shapes[0][2], shapes[0][1]),
    read=lambda value, shapes: [value.transpose(0, 2, 1)],
    write=lambda arrays: arrays[0].transpose(0, 2, 1),
)


# --- tables

# Suffix of a published name -> suffix of our path, or (suffix, layout) if the layout is not LINEAR. Several paths are
# separated by spaces.
Places = dict[str, str | tuple[str, Layout]]


def table_rows(table: Places, name: str, place: str) -> Iterator[PublishedTensor]:
    """Yields the rows of a table, with prefix `name` for published names and prefix `place` for our paths."""
    for suffix, ours in table.items():
        places, layout = ours if isinstance(ours, tuple) else (ours, LINEAR)
        yield PublishedTensor(name + suffix, tuple(place + one for one in places.split()), layout)
