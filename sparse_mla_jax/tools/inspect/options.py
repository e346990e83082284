"""Options of `inspect`."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.program import ARCHITECTURES, COMPILERS
from sparse_mla_jax._check import require
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import KINDS
from sparse_mla_jax.config import default_config
from sparse_mla_jax.families.registry import mla_models

# Options of `inspect --step` only, with their defaults, and those of `inspect` without it.
STEP: dict[str, Any] = {"batch": 64, "context": 32768, "layers": 2, "model": "deepseek_v32"}
_STEP_ONLY = (*STEP, "mesh", "most_gathered")
_KERNELS_ONLY = ("kernel", "compiler", "plan", "asm", "picture")
# Kernels whose case has a number of query heads that may be chosen.
_HEADED = ("sparse_mla", "indexer", "paged_indexer", "norm_rope_query")
WITH_HEADS = tuple(case.name for case in catalogue.KERNEL_CASES if case.name.startswith(_HEADED))
COMPILER_CHOICES = (*COMPILERS, "both")
ARCH_CHOICES = (*ARCHITECTURES, "both")


def chosen_compilers(arguments: argparse.Namespace) -> Sequence[str]:
    """The compilers that `--compiler` names."""
    return COMPILERS if arguments.compiler == "both" else (arguments.compiler or "triton",)


def chosen_architectures(arguments: argparse.Namespace) -> Sequence[str]:
    """The architectures that `--arch` names."""
    return ARCHITECTURES if arguments.arch == "both" else (arguments.arch,)


def check_form(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options of `inspect` in `inspect --step`, and vice versa."""
    refused = _KERNELS_ONLY if arguments.step else _STEP_ONLY
    where = "without --step" if arguments.step else "with --step"
    for name in refused:
        require(
            getattr(arguments, name) in (None, False),
            f"--{name.replace('_', '-')} is an option of `inspect` {where}; leave it out.",
        )


def check_tools(compilers: Sequence[str]) -> None:
    """Raises ValueError if a compiler or disassembler is not installed; the message says what installs it."""
    for compiler in compilers:
        missing = toolchain.available(compiler)
        require(missing is None, missing or "")


def check_step(arguments: argparse.Namespace) -> None:
    """Raises ValueError for sizes of `inspect --step` above the published model's, before anything is traced."""
    model = arguments.model or STEP["model"]
    config = default_config(str(model))
    for name, most in (("heads", config.num_attention_heads), ("layers", config.num_hidden_layers)):
        value = getattr(arguments, name)
        require(value is None or value <= most, f"--{name} is {value}; {model} has {most}, give no more.")
    limit = arguments.most_gathered
    require(limit is None or limit >= 0, f"--most-gathered is {limit}; a number of bytes is expected.")
    require(
        limit is None or arguments.mesh is not None,
        "--most-gathered is about the devices of a mesh; name the mesh with --mesh.",
    )


def check_kernels(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit the kernels of --kernel."""
    names = arguments.kernel or ()
    require(
        not arguments.plan or len(names) == 1,
        "--plan replaces fields of one kernel's plan; name the kernel with --kernel.",
    )
    heads = arguments.heads
    require(heads is None or 1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    for case in map(catalogue.kernel_case, names):
        require(
            heads is None or case.name in WITH_HEADS,
            f"--heads: kernel {case.name} has no query heads; leave it out.",
        )
        require(
            arguments.cache_dtype is None or bool(case.kinds),
            f"--cache-dtype: kernel {case.name} has no cache; leave it out.",
        )


def plan_changes(text: str) -> dict[str, Any]:
    """Fields of a plan from `name=value,name=value`; values are integers, True, False or words.

    Raises:
      argparse.ArgumentTypeError: not of that form.
    """
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not (name.isidentifier() and equals and value):
            raise argparse.ArgumentTypeError(f"{part!r} is not FIELD=VALUE, as in key_block=32,num_warps=2")
        try:
            changes[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            changes[name] = value
    return changes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `inspect`."""
    parser.add_argument("--arch", choices=ARCH_CHOICES, default="both", help="default: %(default)s")
    parser.add_argument(
        "--compiler",
        choices=COMPILER_CHOICES,
        help="triton: the public wheel, quick; xla: XLA:ROCm, what jax would launch (default: triton)",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(catalogue.kernel_names())}; may be repeated (default: all)",
    )
    parser.add_argument("--heads", type=int, metavar="N", help="query heads (default: 16 attention, 64 indexer)")
    parser.add_argument(
        "--cache-dtype",
        choices=KINDS,
        help="type of the caches (default: e4m3fnuz on gfx942, e4m3fn on gfx950)",
    )
    parser.add_argument(
        "--plan",
        type=plan_changes,
        metavar="FIELD=VALUE,...",
        help="replace fields of the kernel's plan, as in key_block=32,num_warps=2 (with one --kernel)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--asm", metavar="FILE", help="write the assembly, each line with how often it was executed")
    parser.add_argument("--picture", metavar="FILE", help="draw where the instructions go (needs matplotlib)")
    parser.add_argument(
        "--step",
        action="store_true",
        help="a model's whole decode step as XLA:ROCm compiles it: launches, temporary memory, cache copies",
    )
    parser.add_argument("--model", choices=mla_models(), help="with --step: whose step (default deepseek_v32)")
    parser.add_argument("--batch", type=int, metavar="N", help="with --step: sequences (default 64)")
    parser.add_argument("--context", type=int, metavar="N", help="with --step: tokens (default 32768)")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="with --step: the step on that many GPUs, as in data=8,tensor=8: what they exchange, and their memory",
    )
    parser.add_argument(
        "--most-gathered",
        type=int,
        metavar="BYTES",
        help="with --mesh: what an array that devices gather may have (default: less than the rows of index scores)",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="with --step: how many, from the first on (default 2)")
