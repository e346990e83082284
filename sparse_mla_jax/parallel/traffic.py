"""What the devices of a mesh send in one step, by formulas: nothing is traced or compiled.

A step is a decode step, or one with as many rows of logits as tokens. Bytes are those that one device sends in a ring,
as in `parallel.collectives`; bytes of routed experts are the mean for experts that are drawn at random.

T tokens of a group of "data", D values of a token, b bytes of a value, n devices of the axes of a collective.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pallas_kernels.targets import NETWORK, PER_HOST, Link
from sparse_mla_jax import _check
from sparse_mla_jax.config import Config, DeepseekV4Config
from sparse_mla_jax.ops.indexer import MEMORY_LIMIT
from sparse_mla_jax.parallel.axes import AXES, Parallel
from sparse_mla_jax.parallel.experts import expert_traffic
from sparse_mla_jax.parallel.pages import check_windows


@dataclasses.dataclass(frozen=True)
class StepSize:
    """The sizes of a step.

    Attributes:
      tokens: T, of each group of "data".
      context: tokens that the page table of a request can name.
      page_size: tokens of a page.
      itemsize: bytes of a value of the hidden states.

    Raises:
      ValueError: a size below 1.
    """

    tokens: int
    context: int
    page_size: int = 64
    itemsize: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check.size(field.name, getattr(self, field.name), hint="A size of the step.")


class Exchange(NamedTuple):
    """Collectives of one kind that serve one purpose.

    Attributes:
      what: the purpose.
      axes: the axes over which devices exchange, of "data", "context" and "tensor".
      kind: all-reduce, all-gather, all-to-all or ragged-all-to-all.
      launches: how many collectives.
      sent: bytes that one device sends in all of them.
      devices: n.
    """

    what: str
    axes: tuple[str, ...]
    kind: str
    launches: int
    sent: float
    devices: int


class AxisTraffic(NamedTuple):
    """Sums over the collectives of the same axes.

    Attributes:
      launches: how many collectives.
      sent: bytes that one device sends.
    """

    launches: int
    sent: float


class _Keys(NamedTuple):
    """The attention of a layer, as far as its traffic depends on it.

    Attributes:
      heads: of the whole model.
      value_dim: values of a head that parts are merged with: after the value projection where there is one.
      has_sinks: whether the merged lse is used.
      is_spread: whether keys lie over "context".
      chosen: keys that its indexer chooses; 0 if none runs.
      columns: keys of a request.
      page_size: keys of a page.
    """

    heads: int
    value_dim: int
    has_sinks: bool
    is_spread: bool
    chosen: int
    columns: int
    page_size: int


def layer_traffic(config: Config, layer: int, parallel: Parallel, size: StepSize) -> tuple[Exchange, ...]:
    """The collectives of one layer.

    Args:
      config: the model's shapes.
      layer: number of the layer.
      parallel: the axes; `partition.check_divides` tells whether they divide the model.
      size: of the step.

    Raises:
      ValueError: devices that do not divide experts; over "context", pages that do not hold whole windows of
        DeepSeek-V4.
    """
    keys = _keys(config, layer, parallel, size)
    found = [*_selection(keys, parallel, size), *_merging(keys, parallel, size)]
    hidden = size.tokens * config.hidden_size * size.itemsize
    found.append(_sum("heads summed", ("tensor",), hidden, parallel))
    if config.is_moe_layer(layer):
        found += _experts(config, parallel, size)
    else:
        found.append(_sum("feed-forward summed", ("tensor",), hidden, parallel))
    return _present(found)


def rest_traffic(config: Config, parallel: Parallel, size: StepSize) -> tuple[Exchange, ...]:
    """The collectives of a step outside of its layers: embedding, logits, and the ids of the next tokens."""
    found = []
    tensor, data = parallel.tensor, parallel.data
    if config.vocab_size % tensor == 0:
        hidden = size.tokens * config.hidden_size * size.itemsize
        found.append(_sum("embedding", ("tensor",), hidden, parallel))
        columns = 4 * size.tokens * config.vocab_size // tensor
        found.append(Exchange("logits", ("tensor",), "all-gather", 1, columns * (tensor - 1), tensor))
    found.append(Exchange("tokens", ("data",), "all-gather", 1, 4 * size.tokens * (data - 1), data))
    return _present(found)


def step_traffic(config: Config, parallel: Parallel, size: StepSize) -> tuple[Exchange, ...]:
    """The collectives of a whole step, layer after layer, then those of `rest_traffic`; arguments as there."""
    layers = (layer_traffic(config, number, parallel, size) for number in range(config.num_hidden_layers))
    return (*(one for layer in layers for one in layer), *rest_traffic(config, parallel, size))


def sum_by_axes(exchanges: Iterable[Exchange]) -> dict[str, AxisTraffic]:
    """Sums by the axes of the collectives: {"tensor": ..., "context": ..., "context+tensor": ...}."""
    found: dict[str, AxisTraffic] = {}
    for one in exchanges:
        launches, sent = found.get("+".join(one.axes), (0, 0.0))
        found["+".join(one.axes)] = AxisTraffic(launches + one.launches, sent + one.sent)
    return found


def crosses_hosts(axes: Iterable[str], parallel: Parallel, per_host: int = PER_HOST) -> bool:
    """Whether devices that differ along these axes lie in several machines, as `axes.make_mesh` places them.

    Args:
      axes: of "data", "context" and "tensor".
      parallel: the sizes.
      per_host: devices of a machine.
    """
    outermost = min((AXES.index(kind) for kind in axes), default=len(AXES))
    return math.prod(parallel.sizes[outermost:]) > per_host


def seconds(exchanges: Iterable[Exchange], parallel: Parallel, link: Link, network: Link = NETWORK) -> float:
    """Time that links make of collectives, one after the other: launches and bytes.

    A lower bound of neither: a program may overlap collectives with other work, and no link reaches its peak.

    Args:
      exchanges: the collectives.
      parallel: the axes.
      link: joins the devices of one machine, the `link` of a `pallas_kernels.targets.Target`.
      network: joins machines.
    """
    total = 0.0
    for one in exchanges:
        used = network if crosses_hosts(one.axes, parallel) else link
        total += one.launches * used.launch + one.sent / used.bandwidth(one.devices)
    return total


# --- parts
def _present(found: Iterable[Exchange]) -> tuple[Exchange, ...]:
    """Those over more than one device."""
    return tuple(one for one in found if one.devices > 1)


def _sum(what: str, axes: tuple[str, ...], operand: float, parallel: Parallel) -> Exchange:
    """The sum of an operand of so many bytes over those of `axes` that have several devices."""
    axes = tuple(kind for kind in AXES if kind in axes and getattr(parallel, kind) > 1)
    devices = math.prod(getattr(parallel, kind) for kind in axes)
    return Exchange(what, axes, "all-reduce", 1, 2 * operand * (devices - 1) / devices, devices)


def _keys(config: Config, number: int, parallel: Parallel, size: StepSize) -> _Keys:
    if isinstance(config, DeepseekV4Config):
        ratio = config.compress_ratio(number)
        check_windows(size.page_size, ratio, parallel.context)
        columns = size.context // ratio if ratio else 0
        runs = config.has_indexer(number) and columns > config.index_topk
        chosen = config.index_topk if runs else 0
        page = max(1, size.page_size // ratio) if ratio else size.page_size
        return _Keys(config.num_attention_heads, config.head_dim, True, ratio > 0, chosen, columns, page)
    layer = config.layer(number)
    chosen = config.index_topk if layer.has_indexer and size.context > config.index_topk else 0
    sizes, is_spread = layer.sizes, not layer.is_sliding
    sinks = config.attention_sinks
    return _Keys(sizes.num_attention_heads, sizes.v_head_dim, sinks, is_spread, chosen, size.context, size.page_size)


def _selection(keys: _Keys, parallel: Parallel, size: StepSize) -> Iterator[Exchange]:
    """Each device of "tensor" chooses for its own rows; those of "context" agree on the best of all their keys."""
    if not keys.chosen:
        return
    rows, n = -(-size.tokens // parallel.tensor), parallel.context
    cycle = keys.page_size * n
    own = keys.columns // cycle * keys.page_size + min(keys.columns % cycle, keys.page_size)
    # The indexer works on as many rows at a time as its scores may take memory; the last chunk is whole.
    chunk = min(rows, MEMORY_LIMIT // (4 * own))
    chunks = -(-rows // chunk)
    candidates = chunks * chunk * min(keys.chosen, own) * 8
    yield Exchange("candidates of the context", ("context",), "all-gather", 2 * chunks, candidates * (n - 1), n)
    joined = rows * keys.chosen * 4 * (parallel.tensor - 1)
    yield Exchange("selection joined", ("tensor",), "all-gather", 1, joined, parallel.tensor)


def _merging(keys: _Keys, parallel: Parallel, size: StepSize) -> Iterator[Exchange]:
    """`ops.merge_across` of a device's heads; without sinks nothing needs the merged lse, and XLA drops it."""
    if not keys.is_spread:
        return
    what, axes, n = "outputs merged", ("context",), parallel.context
    heads = keys.heads // parallel.tensor
    out, lse = size.tokens * heads * keys.value_dim * size.itemsize, size.tokens * heads * 4
    if heads % n:
        yield Exchange(what, axes, "all-gather", 2, (out + lse) * (n - 1), n)
        return
    yield Exchange(what, axes, "all-to-all", 2, (out + lse) * (n - 1) / n, n)
    whole = out + (lse if keys.has_sinks else 0)
    yield Exchange(what, axes, "all-gather", 2 if keys.has_sinks else 1, whole * (n - 1) / n, n)


def _experts(config: Config, parallel: Parallel, size: StepSize) -> Iterator[Exchange]:
    """Tokens go to their experts over "data" and come back: sizes, rows, weights with ids, results."""
    sent = expert_traffic(
        parallel,
        tokens=size.tokens,
        hidden=config.hidden_size,
        num_experts=config.n_routed_experts,
        k=config.num_experts_per_tok,
        itemsize=size.itemsize,
    )
    if "data" in parallel.experts:
        sizes = 8 * (parallel.data - 1)
        yield Exchange("experts", ("data",), "all-to-all", 1, sizes, parallel.data)
        yield Exchange("experts", ("data",), "ragged-all-to-all", 3, sent.ragged - sizes, parallel.data)
    operand = size.tokens * config.hidden_size * size.itemsize
    axes = tuple({"tensor", *parallel.experts} - {"data"})
    yield _sum("feed-forward summed", axes, operand, parallel)
