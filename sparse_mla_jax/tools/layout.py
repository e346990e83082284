"""What a model costs on a mesh: weights and caches of a device, what fits, and what a step sends. From shapes alone."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from sparse_mla_jax._check import require, size
from sparse_mla_jax._choices import CACHE_DTYPES, DTYPES

if TYPE_CHECKING:
    import argparse

    from sparse_mla_jax.config import Config
    from sparse_mla_jax.parallel.axes import Parallel

# Of a device's memory, what is left for weights and caches; the rest is for a step's own arrays and the runtime.
USABLE = 0.9
PRO = "deepseek_v4_pro"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes from "192GiB", "141GB" or "1000000".

    Raises:
      ValueError: another form, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    require(
        found is not None and found[2].upper() in _UNITS,
        f"memory is {text!r}; a number and a unit are expected, as in 192GiB, 141GB or 1000000.",
    )
    assert found is not None
    number = int(float(found[1]) * _UNITS[found[2].upper()])
    require(number >= 1, f"memory is {text!r}; at least one byte is expected.")
    return number


def published_model(name: str) -> Config:
    """The published config of a family, by its model_type; "deepseek_v4_pro" is the larger model of deepseek_v4.

    Raises:
      ValueError: another name.
    """
    from sparse_mla_jax.config import DEEPSEEK_V4_PRO, DEEPSEEK_V32, default_config

    # Without model_type, config.json means DeepSeek-V3.2 with plain rotation; the preset has the published one.
    presets: dict[str, Config] = {DEEPSEEK_V32.family: DEEPSEEK_V32, PRO: DEEPSEEK_V4_PRO}
    return presets[name] if name in presets else default_config(name)


@dataclasses.dataclass(frozen=True)
class Load:
    """What the devices of a mesh are asked to do.

    Attributes:
      batch: tokens of a decode step of each group of "data", one of each running request.
      context: tokens of a request.
      dtype: of weights and hidden states.
      cache_dtype: of the caches.

    Raises:
      ValueError: numbers below 1.
    """

    batch: int
    context: int
    dtype: str = "bfloat16"
    cache_dtype: str = "float8_e4m3fnuz"

    def __post_init__(self) -> None:
        size("batch", self.batch, hint="Requests of each group of data.")
        size("context", self.context, hint="Tokens of a request.")


class CacheCost(NamedTuple):
    """Bytes of the caches on one device.

    Attributes:
      page: of a page.
      page_size: tokens of a page.
      per_token: of a token of a request of its group, on average over the devices of "context".
      per_request: of a running request, whatever its length.
    """

    page: int
    page_size: int
    per_token: float
    per_request: int


class Room(NamedTuple):
    """What fits on a mesh, in all groups together.

    Attributes:
      tokens: of context.
      requests: of a whole context each, and at most as many tokens.
      missing: bytes by which weights and running requests exceed a device; 0 if they fit.
    """

    tokens: int
    requests: int
    missing: int


def weight_bytes(config: Config, parallel: Parallel, dtype: str) -> int:
    """Bytes of the weights on one device, from the model's shapes and how they lie on the mesh.

    Raises:
      ValueError: sizes that the mesh does not divide.
    """
    import jax.numpy as jnp

    from sparse_mla_jax.models.family import family_of
    from sparse_mla_jax.parallel.partition import check_divides, device_bytes, partition_params

    specs = family_of(config).param_specs(config, jnp.dtype(dtype))
    check_divides(config, specs, parallel)
    return device_bytes(specs, partition_params(specs, parallel), parallel)


def cache_cost(config: Config, parallel: Parallel, dtype: str) -> CacheCost:
    """Bytes of the caches on one device, from the caches that the model makes and how they lie on the mesh."""
    import jax

    from sparse_mla_jax.models.family import family_of
    from sparse_mla_jax.parallel.caches import partition_caches
    from sparse_mla_jax.parallel.partition import device_bytes

    family = family_of(config)
    page_size = family.default_page_size(config)

    def own(pages: int, requests: int) -> int:
        """Bytes on a device that has so many pages and requests."""
        groups = parallel.data
        caches = jax.eval_shape(
            lambda: family.create_caches(
                config, pages * groups * parallel.context, page_size, num_requests=requests * groups, dtype=dtype
            )
        )
        return device_bytes(caches, partition_caches(caches, parallel), parallel)

    base = own(1, 1)
    page, request = own(2, 1) - base, own(1, 2) - base
    return CacheCost(page, page_size, page / (page_size * parallel.context), request)


def room(memory: int, weights: int, cost: CacheCost, parallel: Parallel, load: Load) -> Room:
    """What fits into devices of `memory` bytes beside the weights, with `load.batch` requests of each group running."""
    free = int(memory * USABLE) - weights
    left = free - load.batch * cost.per_request
    tokens = max(0, left // cost.page) * cost.page_size * parallel.context if cost.page else 0
    cycle = cost.page_size * parallel.context
    request = -(-load.context // cycle) * cost.page + cost.per_request
    return Room(tokens * parallel.data, max(0, free // request) * parallel.data, max(0, -left))


def describe_layout(config: Config, parallel: Parallel, load: Load, memory: int | None = None) -> dict[str, Any]:
    """The rows of `info --mesh`.

    Args:
      config: the model.
      parallel: the axes.
      load: what it is asked to do.
      memory: bytes of a device; None means those of the machines that are known.

    Raises:
      ValueError: sizes that the mesh does not divide.
    """
    from sparse_mla_jax.parallel.axes import AXES

    shown = ", ".join(f"{kind}={number}" for kind, number in zip(AXES, parallel.sizes))
    weights = {dtype: weight_bytes(config, parallel, dtype) for dtype in DTYPES}
    costs = {dtype: cache_cost(config, parallel, dtype) for dtype in CACHE_DTYPES}
    rows: dict[str, Any] = {
        "mesh": shown,
        "experts": "over " + " x ".join(parallel.experts) if parallel.experts else "columns over tensor",
        "requests of a group": load.batch,
        "tokens of a request": load.context,
        **{f"weights of a device, {dtype}": number for dtype, number in weights.items()},
    }
    for dtype, cost in costs.items():
        rows[f"cache bytes of a device per token, {dtype}"] = _whole(cost.per_token)
        if cost.per_request:
            rows[f"cache bytes of a device per request, {dtype}"] = cost.per_request
    rows |= _describe_room(weights[load.dtype], costs[load.cache_dtype], parallel, load, memory)
    return rows | _describe_traffic(config, parallel, load, costs[load.cache_dtype].page_size)


def _whole(number: float) -> float | int:
    """`number` as an integer if it is one."""
    return int(number) if number == int(number) else number


def _describe_room(weights: int, cost: CacheCost, parallel: Parallel, load: Load, memory: int | None) -> dict[str, Any]:
    """What fits, for one memory or for those of all known machines."""
    from pallas_kernels.targets import TARGETS

    memories = {"given memory": memory} if memory else {one.product: one.memory for one in TARGETS if one.memory}
    rows: dict[str, Any] = {f"left for weights and caches, {name}": int(m * USABLE) for name, m in memories.items()}
    for name, number in memories.items():
        found = room(number, weights, cost, parallel, load)
        kind = f"{load.dtype}, {load.cache_dtype} caches, {name}"
        rows[f"tokens that fit, {kind}"] = found.tokens
        rows[f"requests that fit, {kind}"] = found.requests
        if found.missing:
            rows[f"bytes missing in a device, {kind}"] = found.missing
    return rows


def _describe_traffic(config: Config, parallel: Parallel, load: Load, page_size: int) -> dict[str, Any]:
    """What a step sends, by axes, and the time that links make of it."""
    import jax.numpy as jnp

    from pallas_kernels.targets import TARGETS
    from sparse_mla_jax.parallel.traffic import StepSize, seconds, step_traffic, sum_by_axes

    whole_pages = -(-load.context // page_size) * page_size
    step = StepSize(load.batch, whole_pages, page_size, jnp.dtype(load.dtype).itemsize)
    found = step_traffic(config, parallel, step)
    rows: dict[str, Any] = {}
    for axes, (launches, sent) in sum_by_axes(found).items():
        rows[f"bytes sent per token and layer over {axes}"] = round(sent / load.batch / config.num_hidden_layers, 1)
        rows[f"collectives of a step over {axes}"] = launches
    if found:
        for one in TARGETS:
            if one.link is not None:
                time = seconds(found, parallel, one.link)
                rows[f"ms of a step's collectives, {one.product} ({one.link.name})"] = round(1e3 * time, 3)
    return rows


# --- options of the command
DEFAULTS: dict[str, Any] = {"batch": 64, "cache_dtype": "float8_e4m3fnuz", "context": None, "device_memory": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `info` that ask for a layout."""
    parser.add_argument(
        "--model", metavar="FAMILY", help=f"describe a family's published model: its model_type, or {PRO}"
    )
    group = parser.add_argument_group("what a model costs on several devices, which need not be here")
    group.add_argument("--mesh", metavar="SIZES", help="devices along data, context and tensor, as in data=2,tensor=4")
    group.add_argument(
        "--device-memory", metavar="SIZE", help="of each, as in 192GiB or 141GB (default: of the GPUs that are known)"
    )
    group.add_argument("--cache-dtype", choices=CACHE_DTYPES, help=f"default {DEFAULTS['cache_dtype']}")
    group.add_argument(
        "--batch", type=int, metavar="N", help=f"requests of each group of data (default {DEFAULTS['batch']})"
    )
    group.add_argument("--context", type=int, metavar="N", help="tokens of a request (default: the most of the model)")


def asked_layout(arguments: argparse.Namespace, config: Config | None) -> dict[str, Any]:
    """The rows that the options of `info` ask for; none without --mesh.

    Raises:
      ValueError: options without --mesh, or --mesh without a model; sizes that do not fit.
    """
    from sparse_mla_jax.parallel.axes import parse_parallel

    given = {name: getattr(arguments, name) for name in DEFAULTS if getattr(arguments, name) is not None}
    if arguments.mesh is None:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        require(not given, f"{names} given without --mesh; say on which devices, as in --mesh tensor=8.")
        return {}
    require(
        config is not None,
        "--mesh is given without a model; give its folder, or --model with the model_type of a family.",
    )
    assert config is not None
    asked = DEFAULTS | given
    context = config.max_position_embeddings if asked["context"] is None else asked["context"]
    memory = None if asked["device_memory"] is None else parse_bytes(asked["device_memory"])
    load = Load(asked["batch"], context, cache_dtype=asked["cache_dtype"])
    return describe_layout(config, parse_parallel(arguments.mesh), load, memory)
