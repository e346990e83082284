"""How the parameters of a model lie on a mesh: one `jax.sharding.PartitionSpec` for each of them.

The names and shapes are those of `models.params_mla` and `models.params_v4`. Over the axis "tensor" lie

* the heads of the main attention: q_b_proj, q_proj, kv_b_k, kv_b_v, output_gate, query_scale, sinks, o_proj, and in
  DeepSeek-V4 o_a_proj and o_b_proj by the groups of heads;
* the columns of SwiGLUs: gate_proj and up_proj by their last axis, down_proj by its rows;
* the vocabulary: embed_tokens by its rows, lm_head by its columns. Both are the same on all devices of the axis if the
  vocabulary does not divide.

Routed experts lie over the product of the axes `parallel.experts`, each device having whole ones. If that product is 1
the columns of every expert lie over "tensor".

The same on all devices are latents (q_a_proj, kv_a_proj_with_mqa, V4's kv_proj), compressors, indexers (their work is
split by tokens), norms, hyper-connections, routers and o_proj_bias, which a layer adds once, after the sum over
"tensor". No parameter lies over "context", and none but experts over "data".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config
from sparse_mla_jax.parallel.axes import AXES, Parallel, divisors

# The axis that lies over "tensor", by the name of the array.
_SPLIT = {
    **dict.fromkeys(("q_b_proj", "q_proj", "output_gate"), 1),
    **dict.fromkeys(("kv_b_k", "kv_b_v", "o_proj", "sinks", "query_scale", "o_a_proj", "o_b_proj"), 0),
    **{"gate_proj": 1, "up_proj": 1, "down_proj": 0},
}
_VOCABULARY = {"embed_tokens": 0, "lm_head": 1}
# Arrays, and subtrees, that are the same on all devices.
_REPLICATED = frozenset(
    {
        *("norm", "input_layernorm", "post_attention_layernorm", "q_a_layernorm", "kv_a_layernorm", "kv_layernorm"),
        *("k_rope_layernorm", "rope_alpha", "attn_hc", "ffn_hc", "hc_head", "gate", "indexer", "compressor"),
        *("q_a_proj", "q_a_proj_bias", "kv_a_proj_with_mqa", "kv_a_proj_with_mqa_bias", "kv_proj", "o_proj_bias"),
    }
)
# The numbers of a config that a size comes from, by the name of the array.
_HEADS = "num_attention_heads"
_SIZES = {
    **dict.fromkeys(
        ("q_b_proj", "q_proj", "output_gate", "kv_b_k", "kv_b_v", "o_proj", "sinks", "query_scale"), _HEADS
    ),
    "o_a_proj": "o_groups",
}

Names = tuple[str, ...]


def _names(path: Any) -> Names:
    """The words of a path, without the numbers of layers."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _split(axis: int, *names: str) -> PartitionSpec:
    """Axis number `axis` over these axes of the mesh; the array is the same everywhere if there are none."""
    if not names:
        return PartitionSpec()
    return PartitionSpec(*(None,) * axis, names if len(names) > 1 else names[0])


def _partition(names: Names, shape: tuple[int, ...], parallel: Parallel) -> PartitionSpec:
    tensor = parallel.present("tensor")
    if _REPLICATED.intersection(names):
        return PartitionSpec()
    if "experts" in names:
        over = parallel.expert_axes
        return _split(0, *over) if over else _split(1 + _SPLIT[names[-1]], *tensor)
    if names[-1] in _VOCABULARY:
        axis = _VOCABULARY[names[-1]]
        return _split(axis, *(tensor if shape[axis] % parallel.tensor == 0 else ()))
    found = [name for name in names if name in _SPLIT]
    require(
        bool(found),
        f"specs has an array {'.'.join(names)}, of which parallel.partition does not know how it lies on a mesh. Pass"
        " the param_specs of a model; fused ones with partition_fused.",
    )
    return _split(_SPLIT[found[-1]], *tensor)


def partition_params(specs: Any, parallel: Parallel) -> Any:
    """How parameters lie on the mesh of `parallel`; see the module.

    `check_divides` tells whether all sizes divide.

    Args:
      specs: pytree of `jax.ShapeDtypeStruct` (or arrays), the `param_specs` of a model; not fused.
      parallel: the sizes of the mesh.

    Returns:
      A pytree of `jax.sharding.PartitionSpec` like `specs`. They name only axes with more than one device, and end with
      the axis that is split; what is the same on all devices has PartitionSpec().

    Raises:
      ValueError: an array that no model here has, or a fused one (see `partition_fused`).
    """
    return jax.tree_util.tree_map_with_path(lambda path, one: _partition(_names(path), one.shape, parallel), specs)


class FusedPartition(NamedTuple):
    """Fused parameters on a mesh, from `partition_fused`.

    Attributes:
      specs: pytree of `jax.ShapeDtypeStruct`, the global shapes.
      partition: pytree of `jax.sharding.PartitionSpec` like `specs`.
    """

    specs: Any
    partition: Any


def partition_fused(fuse: Callable[[Any], Any], specs: Any, parallel: Parallel) -> FusedPartition:
    """How parameters lie on the mesh that every device fuses by itself, inside `jax.shard_map`.

    A fused matrix has the columns of each device one after the other: columns that are split, and beside them those
    that are the same everywhere, once for each device. So it is larger than the one that one device would fuse. A
    matrix without split columns (hidden_proj without a gate and without q_proj) is the same on all devices.

        separate = partition_params(specs, parallel)
        fused = partition_fused(fuse, specs, parallel)
        step = jax.shard_map(fuse, mesh=mesh, in_specs=(separate,), out_specs=fused.partition)

    Args:
      fuse: `fuse_projections` of the model.
      specs: as for `partition_params`.
      parallel: the sizes of the mesh; they divide (see `check_divides`).

    Raises:
      ValueError: as for `partition_params`.
    """
    separate = partition_params(specs, parallel)
    local = jax.eval_shape(fuse, local_specs(specs, separate, parallel))
    known = dict(jax.tree_util.tree_leaves_with_path(separate))

    def find(path: Any, whole: jax.ShapeDtypeStruct, part: jax.ShapeDtypeStruct) -> PartitionSpec:
        if path in known:
            return known[path]
        # Of a fused array, only axes with split columns or heads differ from those of one device.
        differ = [axis for axis, (a, b) in enumerate(zip(whole.shape, part.shape)) if a != b]
        return _split(differ[0], *parallel.present("tensor")) if differ else PartitionSpec()

    partition = jax.tree_util.tree_map_with_path(find, jax.eval_shape(fuse, specs), local)
    return FusedPartition(_scaled(local, partition, parallel, math.prod), partition)


def local_specs(specs: Any, partition: Any, parallel: Parallel) -> Any:
    """The shapes that one device has.

    Args:
      specs: pytree of `jax.ShapeDtypeStruct`, global shapes.
      partition: from `partition_params` or `partition_fused`.
      parallel: the sizes of the mesh.

    Returns:
      A pytree of `jax.ShapeDtypeStruct` like `specs`.

    Raises:
      ValueError: a size that does not divide; `check_divides` says which do.
    """

    def divide(numbers: tuple[int, int]) -> int:
        size, devices = numbers
        require(size % devices == 0, f"an axis of {size} does not divide over {devices} devices; see check_divides.")
        return size // devices

    return _scaled(specs, partition, parallel, divide)


def device_bytes(specs: Any, partition: Any, parallel: Parallel) -> int:
    """Bytes of the parameters on one device; arguments and errors as of `local_specs`."""
    leaves = jax.tree.leaves(local_specs(specs, partition, parallel))
    return sum(math.prod(one.shape) * one.dtype.itemsize for one in leaves)


def _devices(spec: PartitionSpec, axes: int, parallel: Parallel) -> list[int]:
    """Over how many devices each axis of an array lies."""
    sizes = dict(zip(parallel.names, parallel.sizes))
    split = [entry if isinstance(entry, tuple) else () if entry is None else (entry,) for entry in spec]
    return [math.prod(sizes[name] for name in names) for names in split] + [1] * (axes - len(split))


def _scaled(specs: Any, partition: Any, parallel: Parallel, scale: Callable[[tuple[int, int]], int]) -> Any:
    """`specs` with each size replaced by scale((size, devices over which it lies))."""

    def one(spec: jax.ShapeDtypeStruct, lies: PartitionSpec) -> jax.ShapeDtypeStruct:
        sizes = zip(spec.shape, _devices(lies, len(spec.shape), parallel))
        return jax.ShapeDtypeStruct(tuple(map(scale, sizes)), spec.dtype)

    return jax.tree.map(one, specs, partition)


# --- which sizes divide


class _Size(NamedTuple):
    """A size that must divide over `devices`: the number of a config that it is, and where."""

    name: str
    size: int
    devices: int
    is_expert: bool


def check_divides(config: Config, specs: Any, parallel: Parallel) -> None:
    """Checks, when a model is set up, that its heads, columns and experts divide over the devices.

    Args:
      config: the model's shapes.
      specs: its `param_specs`.
      parallel: the sizes of the mesh.

    Raises:
      ValueError: some do not; the message names them, their layers, and the sizes that do divide.
    """
    sizes = list(_sizes(config, specs, parallel))
    split = [one for one in sizes if not one.is_expert]
    wrong = dict.fromkeys(f"{one.name} is {one.size}" for one in split if one.size % one.devices)
    fitting = divisors(math.gcd(*(one.size for one in split)))
    require(
        not wrong,
        f"tensor={parallel.tensor} does not divide this model: {', '.join(wrong)}. Sizes of tensor that divide it are"
        f" {fitting}.",
    )
    for one in sizes:
        require(
            not one.is_expert or one.size % one.devices == 0,
            f"{one.name} is {one.size}; the experts lie over {one.devices} devices ({_product(parallel)}), which do not"
            f" divide it. Numbers of devices that do are {divisors(one.size)}. Choose other sizes, or spread experts"
            " over other axes: experts=tensor, or experts= to split the columns of every expert over tensor.",
        )


def _product(parallel: Parallel) -> str:
    kinds = [kind for kind in AXES if kind in parallel.experts]
    return " times ".join(f"{kind}={getattr(parallel, kind)}" for kind in kinds)


def _sizes(config: Config, specs: Any, parallel: Parallel) -> Iterator[_Size]:
    """Every size that lies over more than one device, but for the vocabulary."""
    several: dict[tuple[str, int], list[int]] = {}
    devices: dict[tuple[str, int], tuple[int, bool]] = {}
    partition = partition_params(specs, parallel)
    for (path, spec), lies in zip(jax.tree_util.tree_leaves_with_path(specs), jax.tree.leaves(partition)):
        names = _names(path)
        for axis, number in enumerate(_devices(lies, len(spec.shape), parallel)):
            # The rows of o_b_proj are those of the groups of o_a_proj.
            if number > 1 and names[-1] not in _VOCABULARY and names[-1] != "o_b_proj":
                key = _size_name(config, names, axis), spec.shape[axis]
                several.setdefault(key, []).append(path[1].idx)
                devices[key] = number, "experts" in names and axis == 0
    counts = {name: sum(one == name for one, _ in several) for name, _ in several}
    for (name, size), layers in several.items():
        # Where layers differ, a message has to say which.
        where = f" of layers {', '.join(map(str, sorted(set(layers))))}" if counts[name] > 1 else ""
        yield _Size(name + where, size, *devices[name, size])


def _size_name(config: Config, names: Names, axis: int) -> str:
    """The number in a config that an axis of an array has."""
    if "experts" in names:
        return "moe_intermediate_size" if axis else "n_routed_experts"
    if "shared_experts" in names:
        own = getattr(config, "shared_experts_intermediate_size", 0)
        return f"{'shared_experts_intermediate_size' if own else 'moe_intermediate_size'} * n_shared_experts"
    return next((_SIZES[name] for name in names if name in _SIZES), "intermediate_size")
