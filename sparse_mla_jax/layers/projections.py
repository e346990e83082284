"""Matrix products of an attention layer, with fused or separate weights.

A layer multiplies its input by several weights, and the query latent (the query's low-rank form) by others. `fuse`
concatenates the weights of one input into one matrix: one product and one launch of `norm_rope`. `project` accepts
fused and separate weights. It does not concatenate the products of separate ones, which would copy all of them.

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
    """Replaces the weights at the paths of each group by one matrix [D, columns] under the group's name.

    Their biases, if any has one (see `_bias_at`), become one vector [columns] under the name with "_bias".
    """
    fused: dict[str, Any] = {}
    taken = {path for paths in groups.values() for path in paths}
    for name, paths in groups.items():
        weights = [flat(_weight_at(params, path)) for path in paths]
        fused[name] = jnp.concatenate(weights, axis=1)
        biases = [_bias_at(params, path) for path in paths]
        if any(bias is not None for bias in biases):
            zeros = (jnp.zeros(weight.shape[1], jnp.float32) for weight in weights)
            fused[f"{name}_bias"] = jnp.concatenate([z if bias is None else bias for z, bias in zip(zeros, biases)])
    return _without(params, taken | {_bias_path(path) for path in taken}) | fused


def _bias_path(path: Path) -> Path:
    return *path[:-1], f"{path[-1]}_bias"


def _bias_at(params: dict[str, Any], path: Path) -> Array | None:
    """The bias [columns] of the weight at `path`, which has its name and "_bias"; None without one."""
    parent: Any = _weight_at(params, path[:-1])
    return parent.get(_bias_path(path)[-1])


def _affine(x: Array, weight: Array, bias: Array | None) -> Array:
    product = matmul(x, weight)
    return product if bias is None else product + bias


def project(
    params: dict[str, Any],
    group: str,
    x: Array,
    paths: Sequence[Path],
    parts: Sequence[Section],
    finish: Callable[[Array, Sequence[Section]], list[Any]],
) -> list[Any]:
    """Multiplies x by the weights of a group and finishes the sections of the product.

    Args:
      params: one layer's weights, fused or separate.
      group: name of the fused matrix.
      x: [T, D].
      paths: paths of the separate weights of the group, in the order of their columns.
      parts: sections (columns) of the fused matrix; none may span two weights. A separate weight without a section is
        not read.
      finish: norm, rotation, scale and cast of a product [T, columns]: `norm_rope` of one layer and step.

    Returns:
      The result of `finish` for each section.
    """
    if group in params:
        return finish(_affine(x, params[group], params.get(f"{group}_bias")), parts)
    done: dict[int, Any] = {}
    start = 0
    for path in paths:
        weight = flat(_weight_at(params, path))
        end = start + weight.shape[1]
        inside = {i: _move(part, -start) for i, part in enumerate(parts) if start <= part.start < end}
        if inside:
            product = _affine(x, weight, _bias_at(params, path))
            done |= zip(inside, _finish_some(product, list(inside.values()), finish))
        start = end
    return [done[i] for i in range(len(parts))]


def place(parts: Iterable[Section]) -> list[Section]:
    """The sections one after the other, from column 0 on."""
    placed, start = [], 0
    for part in parts:
        placed.append(dataclasses.replace(part, start=start))
        start += part.columns
    return placed


def unchanged(width: int) -> Section:
    """A section of `width` columns that is not changed: no norm, rotation, scale or cast."""
    return Section(0, 1, width, "float32")


def _finish_some(
    product: Array, parts: list[Section], finish: Callable[[Array, Sequence[Section]], list[Any]]
) -> list[Any]:
    if any(_changes(part) for part in parts):
        return finish(product, parts)
    # Unchanged sections need no launch.
    return [product[:, part.start : part.start + part.columns].reshape(-1, part.heads, part.width) for part in parts]


def _changes(part: Section) -> bool:
    """Whether a section needs `norm_rope`."""
    arrays = (part.weight, part.rotated, part.gain)
    return any(one is not None for one in arrays) or part.scale != 1.0 or part.dtype != "float32"


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
