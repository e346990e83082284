"""`python -m sparse_mla_jax inspect --step --mesh`: what the devices of a compiled step exchange, and what it must not.

A step must not gather a divided weight, nor whole rows of scores: both are why the work was divided.
"""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.cdna import Collective, Program, collectives_of
from pallas_kernels.cdna.program import MEMORY
from sparse_mla_jax.cases.steps import PAGE_SIZE, Step, of_one_device
from sparse_mla_jax.parallel.axes import AXES, Parallel
from sparse_mla_jax.tools.tables import table


def axes_of_groups(groups: tuple[tuple[int, ...], ...], parallel: Parallel) -> str:
    """The axes of the mesh along which devices exchange, as "data+tensor"; else how many groups there are."""
    numbers = np.arange(parallel.num_devices).reshape(parallel.sizes)
    present = [place for place, size in enumerate(parallel.sizes) if size > 1]
    for count in range(1, len(present) + 1):
        for chosen in itertools.combinations(present, count):
            along = np.moveaxis(numbers, chosen, range(-count, 0)).reshape(
                -1, math.prod(np.take(numbers.shape, chosen))
            )
            if {frozenset(group) for group in groups} == {frozenset(map(int, group)) for group in along}:
                return "+".join(AXES[place] for place in chosen)
    return f"{len(groups)} groups of {max(map(len, groups))}"


def score_bytes(step: Step, parallel: Parallel) -> int:
    """Bytes of the index scores of one group's tokens against the keys of one device: float32 [B, context]."""
    page_table = of_one_device(step.args[-1])
    rows, pages = page_table.shape
    return 4 * rows * pages * PAGE_SIZE // parallel.context


def gathers(step: Step, found: tuple[Collective, ...], limit: int) -> list[str]:
    """Messages about gathered arrays that are divided weights or too large; empty if there are none.

    Scores of the whole vocabulary may be of any size.

    Args:
      step: its first argument has the weights.
      found: the collectives of the compiled step.
      limit: bytes that an array that an all-gather makes may have, on one device.
    """
    divided = [a for a in jax.tree.leaves(step.args[0]) if of_one_device(a).shape != a.shape]
    whole = {(str(jnp.dtype(a.dtype)), math.prod(a.shape)) for a in divided}
    parts = {(str(jnp.dtype(a.dtype)), math.prod(a.shape)) for a in map(of_one_device, divided)}
    # Scores of the vocabulary are joined once a step, for sampling.
    table = step.args[0].get("embed_tokens") if isinstance(step.args[0], dict) else None
    vocabulary = None if table is None else table.shape[0]
    messages = []
    for one in found:
        if one.kind != "all-gather":
            continue
        where = f"{one.name} ({one.origin})" if one.origin else one.name
        # XLA combines gathers, so that the bytes of one all-gather say little.
        for part, result in zip(one.operands, one.results):
            what = f"all-gather {where} makes {result.dtype}{list(result.shape)}"
            if (part.dtype, math.prod(part.shape)) in parts or (result.dtype, math.prod(result.shape)) in whole:
                messages.append(f"{what}, which may be a divided weight")
            elif result.nbytes > limit and result.shape[-1:] != (vocabulary,):
                messages.append(f"{what}, {result.nbytes} bytes, more than {limit}")
    return messages


def mesh_summary(step: Step, program: Program, parallel: Parallel, limit: int | None = None) -> dict[str, Any]:
    """What the devices of a compiled step exchange, and the memory of one, as plain numbers and strings.

    Args:
      step: on the mesh of `parallel`.
      program: the step, compiled by XLA:ROCm.
      parallel: the mesh.
      limit: bytes that an array that an all-gather makes may have; None means fewer than `score_bytes`.

    Returns:
      "collectives" has a row for every kind with equal arrays and groups; "count" of them are in the program, each of
      which runs "times" in a step (None: as often as a loop decides). Bytes are those of one device, once.
    """
    found = collectives_of(program)
    counts = collections.Counter(
        (
            one.kind,
            " ".join(f"{a.dtype}{list(a.shape)}" for a in one.results),
            axes_of_groups(one.groups, parallel),
            one.times,
            one.operand_bytes,
            one.result_bytes,
            one.sent_bytes,
        )
        for one in found
    )
    names = ("kind", "results", "axes", "times", "operand_bytes", "result_bytes", "sent_bytes")
    limit = score_bytes(step, parallel) - 1 if limit is None else limit
    return {
        "mesh": dict(zip(AXES, parallel.sizes)),
        "devices": program.devices,
        "argument_bytes": program.argument_bytes,
        "output_bytes": program.output_bytes,
        "alias_bytes": program.alias_bytes,
        "memory_bytes": program.memory_bytes,
        "memory_of_device": MEMORY[program.arch],
        "collectives": [{**dict(zip(names, key)), "count": count} for key, count in counts.items()],
        "gathers": gathers(step, found, limit),
    }


def mesh_problems(row: dict[str, Any]) -> list[str]:
    """Messages about what a step on a mesh must not do; empty if there is nothing."""
    found = list(row["gathers"])
    if row["memory_bytes"] > row["memory_of_device"]:
        found.append(f"one device needs {row['memory_bytes']} bytes and has {row['memory_of_device']}")
    return found


def mesh_report(row: dict[str, Any]) -> str:
    """The collectives and the memory of a step on a mesh, as text."""
    rows = [
        (
            one["kind"],
            one["results"],
            one["axes"],
            one["count"],
            "a loop's" if one["times"] is None else one["times"],
            one["operand_bytes"],
            one["result_bytes"],
            one["sent_bytes"],
        )
        for one in row["collectives"]
    ]
    sent = sum(one["count"] * (one["times"] or 1) * one["sent_bytes"] for one in row["collectives"])
    mib = {name: row[f"{name}_bytes"] / 2**20 for name in ("argument", "output", "temporary", "alias", "memory")}
    used = row["memory_bytes"] / row["memory_of_device"]
    headers = ["collective", "results", "axes", "count", "times each", "bytes in", "bytes out", "bytes sent"]
    return (
        f"mesh {', '.join(f'{name}={size}' for name, size in row['mesh'].items())}: {row['devices']} devices\n"
        f"memory of one device: {mib['memory']:.1f} MiB, {used:.1%} of what it has"
        f" ({'fits' if used <= 1 else 'does not fit'}): arguments {mib['argument']:.1f}, outputs {mib['output']:.1f} of"
        f" which {mib['alias']:.1f} reuse arguments, temporary {mib['temporary']:.1f}\n"
        f"gathers of weights or of rows of scores: {'; '.join(row['gathers']) or 'none'}\n"
        f"one device sends {sent / 2**20:.2f} MiB in a step, if devices form rings and loops of unknown length run"
        f" once\n\n{table(headers, rows)}\n"
    )
