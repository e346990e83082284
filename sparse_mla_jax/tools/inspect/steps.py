"""`python -m sparse_mla_jax inspect --step`: a model's decode step as XLA:ROCm compiles it, at published sizes.

Only shapes are used: no weight and no cache is allocated. The report lists every kernel of the step in order, the
temporary memory, and whether the caches are updated in place.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from typing import Any

import jax.numpy as jnp

from pallas_kernels import cdna
from pallas_kernels.cdna.program import PRODUCT, Program
from sparse_mla_jax.cases.sharded import sharded_decode_step
from sparse_mla_jax.cases.steps import Step, decode_step
from sparse_mla_jax.config import default_config
from sparse_mla_jax.parallel.axes import Parallel, parse_parallel
from sparse_mla_jax.tools.inspect.meshes import mesh_problems, mesh_report, mesh_summary
from sparse_mla_jax.tools.inspect.options import STEP, check_form, check_step, check_tools, chosen_architectures
from sparse_mla_jax.tools.tables import table


def cache_copies(step: Step, program: Program) -> list[str]:
    """Messages about operations of a compiled step that copy or rewrite a whole cache; empty if there are none."""
    found = []
    for number, array in enumerate(step.caches, step.first_cache):
        if array.size and number not in (program.in_place or ()):
            found.append(f"cache array {number}, {array.dtype}{list(array.shape)}, is not updated in place")
    # XLA may give a cache its shape [pages, page_size, ...], or merge the first two axes, or flatten it.
    shapes = {
        (jnp.dtype(a.dtype), shape)
        for a in step.caches
        # Keys without a rotated part have an empty array.
        if a.size
        for shape in (a.shape, (a.shape[0] * a.shape[1], *a.shape[2:]), (math.prod(a.shape),))
    }
    for kernel in program.kernels:
        for a in kernel.arguments:
            if a.role == "output" and a.in_place_of is None and (jnp.dtype(a.dtype), a.shape) in shapes:
                found.append(f"kernel {kernel.name} writes a new {a.dtype}{list(a.shape)}")
    volumes = {dtype.itemsize * math.prod(shape) for dtype, shape in shapes}
    return found + [f"{size} bytes copied by {what}" for size, what in program.copies or () if size in volumes]


def products(program: Program) -> list[str]:
    """Names of the kernels that XLA generates for matrix products, and of its library calls for them."""
    gemms = [k.name for k in program.kernels if k.origin == "xla" and k.name.startswith("gemm_fusion")]
    return gemms + [name for name in program.library_calls if "gemm" in name or "blas" in name]


def summary(step: Step, program: Program) -> dict[str, Any]:
    """Launches and memory of a compiled step, as plain numbers and strings."""
    return {
        "arch": program.arch,
        "compiler": program.compiler,
        "launches": len(program.kernels),
        "launches_of_products": len(products(program)),
        "launches_of_pallas_kernels": len(program.pallas_kernels),
        "library_calls": list(program.library_calls),
        "copies": [[size, what] for size, what in program.copies or ()],
        "temporary_bytes": program.temporary_bytes,
        "cache_bytes": sum(a.dtype.itemsize * math.prod(a.shape) for a in step.caches),
        "cache_copies": cache_copies(step, program),
        "kernels": [
            {
                "name": k.name,
                "origin": k.origin,
                "grid": list(k.grid),
                "threads": k.threads,
                "lds": k.resources.lds,
                "vgprs": k.resources.vgprs,
                "spills": k.resources.vgpr_spills + k.resources.sgpr_spills,
                "scratch": k.resources.scratch,
            }
            for k in program.kernels
        ],
    }


def report(row: dict[str, Any]) -> str:
    """Launches and memory of one compiled step, as text."""
    times = collections.Counter((k["origin"], k["name"], *k["grid"], k["threads"], k["vgprs"]) for k in row["kernels"])
    launches = table(
        ["kernel", "made by", "launches", "grid", "threads", "VGPRs"],
        [
            (name, origin, n, f"{x}x{y}x{z}", threads, vgprs)
            for (origin, name, x, y, z, threads, vgprs), n in times.items()
        ],
    )
    copied = sum(size for size, _ in row["copies"])
    return (
        f"{PRODUCT[row['arch']]} ({row['arch']}), compiled by {row['compiler']}\n"
        f"{row['launches']} launches, {row['launches_of_pallas_kernels']} of them Pallas kernels and"
        f" {row['launches_of_products']} matrix products;"
        f" {len(row['library_calls'])} library calls and fills; {len(row['copies'])} copies of {copied} bytes in all\n"
        f"temporary memory {row['temporary_bytes'] / 2**20:.1f} MiB, caches {row['cache_bytes'] / 2**30:.2f} GiB\n"
        f"copies of a cache: {'; '.join(row['cache_copies']) or 'none'}\n\n{launches}\n"
    )


def _chosen_step(arguments: argparse.Namespace, parallel: Parallel | None) -> Step:
    """The step that the options name; with a mesh, `heads` are those of all its devices."""
    given = {name: getattr(arguments, name) for name in STEP}
    sizes = STEP | {name: value for name, value in given.items() if value is not None}
    heads = arguments.heads
    if heads is None:
        heads = 16 if parallel is None else default_config(str(sizes["model"])).num_attention_heads
    options: dict[str, Any] = {"cache_dtype": arguments.cache_dtype or jnp.float8_e4m3fnuz, **sizes}
    if parallel is None:
        return decode_step(heads=heads, **options)
    return sharded_decode_step(parallel, heads=heads, **options)


def run(arguments: argparse.Namespace) -> int:
    """The command `inspect --step`; returns 1 if a cache is copied or a Pallas kernel spills.

    On a mesh also if a weight or rows of scores are gathered, or if the memory of a device does not suffice.
    """
    check_form(arguments)
    check_step(arguments)
    check_tools(["xla"])
    parallel = None if arguments.mesh is None else parse_parallel(arguments.mesh)
    step = _chosen_step(arguments, parallel)
    rows = []
    for arch in chosen_architectures(arguments):
        program = cdna.compile(step.fn, *step.args, arch=arch, donate_argnums=step.donated)
        rows.append(summary(step, program))
        if parallel is not None:
            rows[-1] |= mesh_summary(step, program, parallel, arguments.most_gathered)
        if not arguments.json:
            print(report(rows[-1]))
            print(*[mesh_report(rows[-1])] if parallel is not None else [], sep="", end="")
    if arguments.json:
        print(json.dumps(rows))
    broken = [f"{row['arch']}: {what}" for row in rows for what in row["cache_copies"]]
    broken += [f"{row['arch']}: {what}" for row in rows if parallel is not None for what in mesh_problems(row)]
    broken += [
        f"{row['arch']}: kernel {k['name']} spills {k['spills']} registers, {k['scratch']} bytes of scratch"
        for row in rows
        for k in row["kernels"]
        if k["origin"] == "pallas" and (k["spills"] or k["scratch"])
    ]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0
