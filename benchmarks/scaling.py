"""How a step scales over the GPUs of one machine: DeepSeek-V3.2's attention layers, and its mixture of experts.

    python benchmarks/scaling.py --devices 1,2,4,8 --axes tensor,data,context,experts --json scaling.json
    python benchmarks/scaling.py --devices 2 --emulate           # one GPU does the work of one of several

For every axis and number of devices: the time of a step by wall clock (many steps enqueued), the kernels' and the
collectives' time by CUPTI, and what is left between them. `--emulate` compiles the program of one device of several and
replaces what crosses devices by copies of its own: kernel times without communication, on one GPU. `scaling_check.py`
beside this file compares selections and greedy tokens with those of one device.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sparse_mla_jax.cases.inputs import PAGE, filled
from sparse_mla_jax.cases.steps import layer_step, layers_step, published_config
from sparse_mla_jax.layers.mla import fuse_projections
from sparse_mla_jax.layers.moe import moe
from sparse_mla_jax.models import mla
from sparse_mla_jax.parallel.axes import Parallel, make_mesh
from sparse_mla_jax.parallel.caches import partition_caches, place
from sparse_mla_jax.parallel.partition import local_specs, partition_fused, partition_params

CACHE = "float8_e4m3fn"
STEPS = 20


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of the result: what runs, on which devices.

    Attributes:
      what: "attention" or "experts".
      parallel: the axes.
      batch: sequences of each group of "data".
      context: tokens of a sequence.
      layers: in one program.
      emulated: whether one device does the work of one of several.
    """

    what: str
    parallel: Parallel
    batch: int
    context: int
    layers: int
    emulated: bool = False

    @property
    def rows(self) -> int:
        """Sequences in the arrays of the mesh."""
        return self.batch * (1 if self.emulated else self.parallel.data)

    @property
    def mesh(self) -> Mesh:
        """Of real devices; of one if the others are emulated."""
        return make_mesh(Parallel() if self.emulated else self.parallel)


@contextlib.contextmanager
def emulation(parallel: Parallel) -> Iterator[None]:
    """Inside, a mesh of one device runs the program of the first of several, which receives copies of what it sends."""
    sizes = dict(zip(parallel.names, parallel.sizes))
    gather, scatter = jax.lax.all_gather, jax.lax.psum_scatter

    def count(axis: Any) -> int:
        return int(np.prod([sizes[name] for name in ([axis] if isinstance(axis, str) else axis)]))

    def all_gather(x: Any, axis_name: Any, *, axis: int = 0, tiled: bool = False, to: str = "varying") -> Any:
        own = gather(x, axis_name, axis=axis, tiled=True, to=to) if tiled else gather(x, axis_name, axis=axis, to=to)
        return jnp.concatenate([own] * count(axis_name), axis=axis)

    def all_to_all(x: Any, axis_name: Any, split_axis: int, concat_axis: int, *, tiled: bool = False) -> Any:
        return x if tiled else jnp.moveaxis(x, split_axis, concat_axis)

    def psum_scatter(x: Any, axis_name: Any, *, scatter_dimension: int = 0, tiled: bool = False) -> Any:
        own = scatter(x, axis_name, scatter_dimension=scatter_dimension, tiled=tiled)
        return jax.lax.slice_in_dim(own, 0, own.shape[0] // count(axis_name))

    replaced = {"axis_size": count, "all_gather": all_gather, "all_to_all": all_to_all, "psum_scatter": psum_scatter}
    with mock.patch.multiple(jax.lax, **replaced):
        yield


def _shapes(problem: Problem, specs: Any, partition: Any) -> Any:
    """Shapes of the arrays of the mesh: a device's own if the others are emulated."""
    return local_specs(specs, partition, problem.parallel) if problem.emulated else specs


def build_attention(problem: Problem) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """(step, donated caches, other arguments) of attention layers in a row."""
    config = published_config(heads=128, layers=problem.layers)
    build = layer_step if problem.layers == 1 else layers_step
    own = {"batch": problem.batch, "context": problem.context, "cache_dtype": jnp.dtype(CACHE)}
    single = build(config, **own, parallel=problem.parallel)
    mesh = problem.mesh
    one = dataclasses.replace(config, num_hidden_layers=1, n_routed_experts=8)
    specs = mla.param_specs(one, jnp.bfloat16)["layers"][0]["self_attn"]
    fused = partition_fused(fuse_projections, specs, problem.parallel)
    shapes = _shapes(problem, fused.specs, fused.partition)
    pages = problem.rows * problem.context // PAGE // (problem.parallel.context if problem.emulated else 1)

    def create() -> Any:
        return mla.create_caches(one, pages, PAGE, dtype=jnp.dtype(CACHE))[0]

    own_caches = partition_caches(jax.eval_shape(create), problem.parallel)
    weights = [_random(shapes, place(fused.partition, mesh), number) for number in range(problem.layers)]
    fill = jax.jit(lambda: tuple(filled(part) for part in create()), out_shardings=place(own_caches, mesh))
    state = [fill() for _ in range(problem.layers)]
    data = PartitionSpec(problem.parallel.axis("data"))
    params_spec: Any = fused.partition
    caches_spec: Any = own_caches
    if problem.layers > 1:
        params_spec, caches_spec = (params_spec,) * problem.layers, (caches_spec,) * problem.layers
    params, held = (weights[0], state[0]) if problem.layers == 1 else (tuple(weights), tuple(state))

    def step(caches: Any, params: Any, hidden: Any, seq_lens: Any, table: Any) -> Any:
        out, caches = single.fn(params, hidden, caches, seq_lens, table)
        return caches, out

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(caches_spec, params_spec, data, data, data), out_specs=(caches_spec, data)
    )
    hidden = jax.device_put(
        jax.random.normal(jax.random.key(3), (problem.rows, config.hidden_size), jnp.bfloat16),
        place(data, mesh),
    )
    lens = jax.device_put(jnp.full(problem.rows, problem.context, jnp.int32), place(data, mesh))
    columns, parts = problem.context // PAGE, problem.parallel.context
    # Page column p is a page of device p % parts, numbered from 0 on.
    row = np.arange(problem.rows) % problem.batch
    table = row[:, None] * -(-columns // parts) + np.arange(columns) // parts
    table = jax.device_put(jnp.asarray(table, jnp.int32), place(data, mesh))
    return jax.jit(sharded, donate_argnums=0), held, (params, hidden, lens, table)


def build_experts(problem: Problem) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """(step, no state, arguments) of one mixture of 256 experts in bfloat16."""
    config, mesh = published_config(heads=128, layers=2), problem.mesh
    specs = mla.param_specs(config, jnp.bfloat16)["layers"][1]["mlp"]
    partition = partition_params(specs, problem.parallel)
    specs = _shapes(problem, specs, partition)
    params = _random(specs, place(partition, mesh), 5)
    data = PartitionSpec(problem.parallel.axis("data"))
    hidden = jax.device_put(
        jax.random.normal(jax.random.key(4), (problem.rows, config.hidden_size), jnp.bfloat16), place(data, mesh)
    )
    run = functools.partial(moe, config=config, parallel=problem.parallel)
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(partition, data), out_specs=data)
    return jax.jit(lambda params, hidden: ((), sharded(params, hidden))), None, (params, hidden)


def _random(specs: Any, shardings: Any, number: int) -> Any:
    """Random weights of these shapes on the devices of a mesh: matrices with variance 1 / rows, vectors 1."""

    def one(key: Any, spec: Any) -> Any:
        if len(spec.shape) == 1:
            return jnp.ones(spec.shape, spec.dtype)
        return jax.random.normal(key, spec.shape, spec.dtype) * jnp.asarray(spec.shape[-2] ** -0.5, spec.dtype)

    def make(key: Any) -> Any:
        leaves, tree = jax.tree.flatten(specs)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [one(k, s) for k, s in zip(keys, leaves)])

    return jax.jit(make, out_shardings=shardings)(jax.random.key(number))


def measure(problem: Problem) -> dict[str, Any]:
    """Times one problem; microseconds a step."""
    inside = emulation(problem.parallel) if problem.emulated else contextlib.nullcontext()
    build = build_attention if problem.what == "attention" else build_experts
    with inside:
        step, state, arguments = build(problem)
        given = (state, *arguments) if state is not None else arguments
        start = time.perf_counter()
        compiled = step.lower(*given).compile()
        compile_seconds = time.perf_counter() - start

    def run(state: Any, times: int) -> Any:
        for _ in range(times):
            state, out = compiled(state, *arguments) if state is not None else (None, compiled(*arguments)[1])
        return state, jax.block_until_ready(out)

    state, _ = run(state, 3)
    walls = []
    for _ in range(3):
        start = time.perf_counter()
        state, _ = run(state, STEPS)
        walls.append(1e6 * (time.perf_counter() - start) / STEPS)
    kernels = _kernels(lambda state: run(state, 1)[0], state)
    collective = sum(us for name, (_, us) in kernels.items() if _crosses(name))
    busy = sum(us for _, us in kernels.values())
    devices = 1 if problem.emulated else problem.parallel.num_devices
    return {
        "what": problem.what,
        "mesh": dict(zip(problem.parallel.names, problem.parallel.sizes)),
        **{name: getattr(problem, name) for name in ("batch", "context", "layers", "emulated")},
        "wall_us": round(float(np.median(walls)), 1),
        "wall_low_us": round(min(walls), 1),
        "kernels_us": round((busy - collective) / devices, 1),
        "collectives_us": round(collective / devices, 1),
        "launches": round(sum(n for n, _ in kernels.values()) / devices, 1),
        "compile_s": round(compile_seconds, 1),
        "slowest": {
            name[:60]: [n / devices, round(us / devices, 1)]
            for name, (n, us) in sorted(kernels.items(), key=lambda item: -item[1][1])[:14]
        },
    }


def _crosses(name: str) -> bool:
    """Whether a kernel is a collective."""
    return "nccl" in name.lower() or "all_reduce" in name.lower() or "allreduce" in name.lower()


def _kernels(run: Callable[[Any], Any], state: Any) -> dict[str, tuple[int, float]]:
    """Launches and microseconds of each kernel of one step, over all devices; empty where CUPTI is not there."""
    if "NVIDIA" not in jax.devices()[0].device_kind:
        return {}
    from jax.experimental.mosaic.gpu import profiler

    class Call:
        """Looks like a jitted function to the profiler, which calls it."""

        def __call__(self) -> None:
            nonlocal state
            state = run(state)

        def trace(self) -> None:
            raise NotImplementedError

        def lower(self) -> None:
            raise NotImplementedError

    _, found = profiler.measure(Call(), aggregate=False)()
    totals: dict[str, tuple[int, float]] = {}
    for name, ms in found or []:
        launches, us = totals.get(name, (0, 0.0))
        totals[name] = launches + 1, us + 1e3 * ms
    return totals


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """What is measured, one device first."""
    counts = [int(n) for n in arguments.devices.split(",")]
    for axis in arguments.axes.split(","):
        for count in counts:
            what = "experts" if axis == "experts" else "attention"
            sizes = {"tensor" if axis == "experts" else axis: count}
            context = arguments.long_context if axis == "context" else arguments.context
            for layers in [1] if what == "experts" else map(int, arguments.layers.split(",")):
                emulated = arguments.emulate and count > 1
                yield Problem(what, Parallel(**sizes), arguments.batch, context, layers, emulated)


def main() -> None:
    """Measures, prints a row of JSON for each problem as it comes, and writes them all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", default="1,2")
    parser.add_argument("--axes", default="tensor,data,context,experts")
    parser.add_argument("--layers", default="1", help="attention layers in one program, as in 1,61")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--long-context", type=int, default=131072, help="of the axis context")
    parser.add_argument("--emulate", action="store_true")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = []
    for problem in problems(arguments):
        try:
            rows.append(measure(problem))
        except Exception as error:
            rows.append({**dataclasses.asdict(problem), "error": f"{type(error).__name__}: {str(error)[:300]}"})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
