"""`python -m sparse_mla_jax inspect`: costs of the kernels on gfx942 and gfx950, without such a GPU.

XLA:ROCm or the public Triton wheel compiles the kernels, and the interpreter of `pallas_kernels.cdna` executes them on
the problems of `sparse_mla_jax.cases`. No number was timed on an AMD GPU: cycles are LLVM's scheduling model, summed
over the executed instructions, and ignore latency.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from pallas_kernels.cdna.program import LDS_BYTES, MAX_THREADS, PRODUCT
from pallas_kernels.plans import plan_for
from pallas_kernels.targets import CDNA
from sparse_mla_jax._check import require
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import KernelCase, KernelProblem
from sparse_mla_jax.tools.inspect.options import (
    WITH_HEADS,
    check_form,
    check_kernels,
    check_tools,
    chosen_architectures,
    chosen_compilers,
)
from sparse_mla_jax.tools.output import check_output, check_picture, whole_file
from sparse_mla_jax.tools.tables import table

if TYPE_CHECKING:
    from pallas_kernels.cdna.device_context import Launch

# The FP8 type of each machine's matrix instructions.
NATIVE = {target.name: target.native_fp8 or "" for target in CDNA}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One kernel on one architecture.

    Attributes:
      case: name of the problem.
      kind: type of its cache, empty if it has none.
      heads: query heads, None for the case's own number.
      launch: the kernel and its counts.
      error: of the outputs, see `cases.case.KernelProblem`.
      bound: largest error that passes.
      bytes: bytes that must be read and written once.
    """

    case: str
    kind: str
    heads: int | None
    launch: Launch
    error: float
    bound: float
    bytes: int

    @property
    def label(self) -> str:
        """Its name in tables and pictures."""
        kind = self.kind.removeprefix("float8_")
        return " ".join(x for x in (self.case, kind, f"{self.heads} heads" if self.heads else "") if x)

    def problems(self) -> list[str]:
        """Messages about everything that a shipped kernel must not do; empty if there is nothing."""
        kernel, r = self.launch.kernel, self.launch.kernel.resources
        found = []
        if not self.error <= self.bound:
            found.append(f"error {self.error:.2e} above {self.bound:.0e}")
        if r.vgpr_spills or r.sgpr_spills:
            found.append(f"{r.vgpr_spills} vector and {r.sgpr_spills} scalar registers spilled")
        if r.scratch:
            found.append(f"{r.scratch} bytes of scratch a lane")
        if r.lds > LDS_BYTES[kernel.arch]:
            found.append(f"{r.lds} bytes of LDS, {LDS_BYTES[kernel.arch]} exist")
        if kernel.threads > MAX_THREADS:
            found.append(f"{kernel.threads} threads, at most {MAX_THREADS}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and strings."""
        from pallas_kernels.cdna import cost

        kernel, counts = self.launch.kernel, self.launch.counts
        bound = cost.lower_bound(counts, kernel.arch)
        return {
            "kernel": self.case,
            "cache": self.kind,
            "heads": self.heads,
            "arch": kernel.arch,
            "compiler": kernel.compiler,
            "grid": list(kernel.grid),
            "threads": kernel.threads,
            **dataclasses.asdict(kernel.resources),
            "wave_instructions": counts.total,
            "by_class": counts.by_class,
            "busy_cycles": cost.busy_cycles(counts),
            "lower_bound_us": bound.microseconds,
            "hbm_floor_us": cost.hbm_floor(self.bytes, kernel.arch),
            "bytes": self.bytes,
            "error": self.error,
            "error_bound": self.bound,
            "problems": self.problems(),
        }


def measure(
    case: KernelCase, kind: str, arch: str, compiler: str, heads: int | None = None, changes: Mapping | None = None
) -> Measurement:
    """Compiles and executes the kernel of one case; `changes` replaces fields of its plan.

    Raises:
      ValueError: a kind of cache that the case does not support, or an invalid plan.
      ToolMissing: a compiler or LLVM's tools are not installed.
    """
    from pallas_kernels import cdna

    require(not case.kinds or kind in case.kinds, f"cache is {kind!r}; {case.name} takes {', '.join(case.kinds)}.")
    problem = case.build(kind, heads)
    plan = changed_plan(problem, arch, changes) if changes else None
    with cdna.device(arch, compiler=compiler) as device:
        try:
            out = jax.block_until_ready(jax.jit(functools.partial(problem.fn, plan=plan))(*problem.args))
        except (TypeError, ArithmeticError, AssertionError, IndexError) as error:
            # Plans check no field: a kernel traced with sizes that do not fit fails in its own arithmetic.
            require(plan is None, f"--plan {plan} does not fit {case.name}: {error}.")
            raise
    (launch,) = device.launches
    return Measurement(
        case.name, kind if case.kinds else "", heads, launch, problem.error(out), problem.bound, problem.bytes
    )


def changed_plan(problem: KernelProblem, arch: str, changes: Mapping[str, Any]) -> Any:
    """The heuristic plan of a problem with the fields of `changes` replaced.

    Raises:
      ValueError: the plan has no such field, or the value does not fit.
    """
    plan = plan_for(problem.fn, *problem.args, target=arch)
    known = [field.name for field in dataclasses.fields(plan)]
    for name, value in changes.items():
        require(name in known, f"--plan {name}: {type(plan).__name__} has {', '.join(known)}.")
        old = getattr(plan, name)
        require(
            old is None or type(value) is type(old),
            f"--plan {name}={value}: {type(plan).__name__} has a {type(old).__name__} there, {old!r}.",
        )
    return dataclasses.replace(plan, **changes)


def measurements(arguments: argparse.Namespace) -> Iterator[Measurement]:
    """Yields the measurements that the options select."""
    chosen = [catalogue.kernel_case(name) for name in arguments.kernel or catalogue.kernel_names()]
    for case in chosen:
        heads = arguments.heads if case.name in WITH_HEADS else None
        for arch in chosen_architectures(arguments):
            kind = arguments.cache_dtype or NATIVE[arch]
            if arguments.cache_dtype and case.kinds and kind not in case.kinds and not arguments.kernel:
                continue
            for compiler in chosen_compilers(arguments):
                yield measure(case, kind, arch, compiler, heads, arguments.plan)


# --- the command
def run(arguments: argparse.Namespace) -> int:
    """The command `inspect`; returns 1 if a kernel breaks a rule."""
    check_form(arguments)
    check_kernels(arguments)
    if arguments.asm is not None:
        check_output("--asm", arguments.asm)
    if arguments.picture is not None:
        check_picture("--picture", arguments.picture)
    check_tools(chosen_compilers(arguments))
    found = []
    for m in measurements(arguments):
        if not arguments.json:
            print(f"{m.label} on {m.launch.kernel.arch}", file=sys.stderr)
        found.append(m)
    rows = [m.as_dict() for m in found]
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(report(rows))
    if arguments.asm is not None:
        with whole_file(arguments.asm) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.write("\n".join(_annotated(m) for m in found))
    if arguments.picture is not None:
        from pallas_kernels.cdna.picture import picture

        with whole_file(arguments.picture) as unfinished:
            picture([(f"{m.label}\n{m.launch.kernel.arch}", m.launch.counts) for m in found], unfinished)
    broken = [f"{row['kernel']} on {row['arch']} ({row['compiler']}): {p}" for row in rows for p in row["problems"]]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


def _annotated(m: Measurement) -> str:
    kernel = m.launch.kernel
    return (
        f"; {m.label}: {kernel.name}, {kernel.arch}, compiled by {kernel.compiler} and executed by our interpreter\n"
        f"; grid {'x'.join(map(str, kernel.grid))}, {kernel.threads} threads,"
        f" {m.launch.counts.total} wave-instructions\n"
        f"{m.launch.counts.annotated()}\n"
    )


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Three tables: resources, executed wave-instructions, cycles and floors."""
    name = [
        (" ".join(x for x in (r["kernel"], r["cache"].removeprefix("float8_"), _heads(r)) if x), r["arch"])
        for r in rows
    ]
    resources = table(
        ["kernel", "arch", "VGPRs", "of them AGPRs", "SGPRs", "spilled", "scratch", "LDS", "threads", "waves/SIMD"],
        [
            (
                *n,
                *(r["vgprs"], r["agprs"], r["sgprs"], r["vgpr_spills"] + r["sgpr_spills"], r["scratch"]),
                *(r["lds"], r["threads"], r["occupancy"]),
            )
            for n, r in zip(name, rows)
        ],
    )
    classes = list(rows[0]["by_class"]) if rows else []
    executed = table(
        ["kernel", "arch", "total", *classes, "error"],
        [
            (*n, r["wave_instructions"], *r["by_class"].values(), f"{r['error']:.1e}" if r["error"] else "0")
            for n, r in zip(name, rows)
        ],
    )
    pipes = list(rows[0]["busy_cycles"]) if rows else []
    cycles = table(
        ["kernel", "arch", *(f"{p} cycles" for p in pipes), "busiest pipe us", "HBM floor us"],
        [
            (
                *n,
                *(f"{r['busy_cycles'][p]:.0f}" for p in pipes),
                f"{max(r['lower_bound_us'].values()):.3f}",
                f"{r['hbm_floor_us']:.3f}",
            )
            for n, r in zip(name, rows)
        ],
    )
    compilers = " and ".join(sorted({r["compiler"] for r in rows}))
    machines = " and ".join(f"{a} ({PRODUCT[a]})" for a in sorted({r["arch"] for r in rows}))
    return (
        f"Compiled for {machines} by {compilers} and executed by our interpreter; nothing was timed on a GPU.\n\n"
        f"Resources\n{resources}\n\nExecuted wave-instructions, whole grid\n{executed}\n\n"
        "Busy cycles per pipe by LLVM's scheduling model, summed over all waves; lower bounds if the work spread evenly"
        f" over the machine, without latency\n{cycles}"
    )


def _heads(row: dict[str, Any]) -> str:
    return f"{row['heads']} heads" if row["heads"] else ""
