"""Products of an attention layer: the weights of one input as one matrix, or each by itself.

A layer multiplies its input by several weights, and the query's low-rank form by others. `fuse` makes one matrix of
those that share an input: one product and one launch of `norm_rope`. `project` takes either form. Products of separate
weights are not concatenated: that would copy all of them.

T tokens, D values of the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from sparse_mla_jax.ops.norm_rope import Section

# The keys that lead from a layer's parameters to a weight.
type Path = tuple[str, ...]


def matmul(x: Array, weight: Array) -> Array:
    """x[..., D] times weight[D, ...], accumulated and returned in float32."""
    return jnp.tensordot(x, weight, axes=1, preferred_element_type=jnp.float32)


def flat(weight: Array) -> Array:
    """Matrix [D, columns] of a weight [D, ...]."""
    return weight.reshape(weight.shape[0], -1)


def fuse(params: dict[str, Any], groups: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """`params` with one matrix [D, columns] per group, under the group's name, in place of the weights at its paths."""
    fused = {
        name: jnp.concatenate([flat(_weight_at(params, path)) for path in paths], axis=1)
        for name, paths in groups.items()
    }
    return _without(params, {path for paths in groups.values() for path in paths}) | fused


def project(
    params: dict[str, Any],
    group: str,
    x: Array,
    paths: Sequence[Path],
    parts: Sequence[Section],
    finish: Callable[[Array, Sequence[Section]], list[Any]],
) -> list[Any]:
    """Finished parts of x times the weights of a group.

    Args:
      params: one layer's weights, fused or not.
      group: name of the fused matrix.
      x: [T, D].
      paths: the weights of the group where they are separate, in order of columns.
      parts: columns of the fused matrix, none of which span two weights. A separate weight that no part names is not
        read.
      finish: norm, rotation, scale and cast of a product [T, columns]: `norm_rope` of one layer and step.

    Returns:
      What `finish` gives for each part.
    """
    if group in params:
        return finish(matmul(x, params[group]), parts)
    done: dict[int, Any] = {}
    start = 0
    for path in paths:
        weight = flat(_weight_at(params, path))
        end = start + weight.shape[1]
        inside = {i: _move(part, -start) for i, part in enumerate(parts) if start <= part.start < end}
        if inside:
            done |= zip(inside, _finish_some(matmul(x, weight), list(inside.values()), finish))
        start = end
    return [done[i] for i in range(len(parts))]


def place(parts: Iterable[Section]) -> list[Section]:
    """The parts with starts that follow each other, from column 0 on."""
    placed, start = [], 0
    for part in parts:
        placed.append(dataclasses.replace(part, start=start))
        start += part.columns
    return placed


def unchanged(width: int) -> Section:
    """A part of `width` columns that stay what the product gives."""
    return Section(0, 1, width, "float32")


def _finish_some(
    product: Array, parts: list[Section], finish: Callable[[Array, Sequence[Section]], list[Any]]
) -> list[Any]:
    if any(_changes(part) for part in parts):
        return finish(product, parts)
    # Nothing to do is no launch.
    return [product[:, part.start : part.start + part.columns].reshape(-1, part.heads, part.width) for part in parts]


def _changes(part: Section) -> bool:
    """Whether it is another than those of `unchanged`."""
    return part.weight is not None or part.rotated is not None or part.scale != 1.0 or part.dtype != "float32"


def _move(part: Section, columns: int) -> Section:
    return dataclasses.replace(part, start=part.start + columns)


def _weight_at(params: dict[str, Any], path: Path) -> Array:
    weight: Any = params
    for name in path:
        weight = weight[name]
    return weight


def _without(params: dict[str, Any], taken: set[Path], prefix: Path = ()) -> dict[str, Any]:
    """`params` without the weights at the paths in `taken`."""
    return {
        name: _without(value, taken, (*prefix, name)) if isinstance(value, dict) else value
        for name, value in params.items()
        if (*prefix, name) not in taken
    }
