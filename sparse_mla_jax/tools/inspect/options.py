"""Options of `inspect`."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from pallas_kernels.cdna.program import ARCHITECTURES, COMPILERS
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import KINDS

COMPILER_CHOICES = (*COMPILERS, "both")
ARCH_CHOICES = (*ARCHITECTURES, "both")


def chosen_architectures(arguments: argparse.Namespace) -> Sequence[str]:
    """The architectures that `--arch` names."""
    return ARCHITECTURES if arguments.arch == "both" else (arguments.arch,)


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
        default="triton",
        help="triton: the public wheel, quick; xla: XLA:ROCm, what jax would launch (default: %(default)s)",
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
        help="the whole DeepSeek-V3.2 decode step as XLA:ROCm compiles it: launches, temporary memory, cache copies",
    )
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="with --step: sequences (default 64)")
    parser.add_argument("--context", type=int, default=32768, metavar="N", help="with --step: tokens (default 32768)")
    parser.add_argument(
        "--layers", type=int, default=2, metavar="N", help="with --step: the first is dense (default 2; published: 61)"
    )
