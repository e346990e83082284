"""The lists of all cases, and lookups by name: CASES, which `bench` times, and KERNEL_CASES, for an interpreter.

Tests run both: CASES with shrunk sizes, KERNEL_CASES as machine code of gfx942 and gfx950.
"""

from __future__ import annotations

from sparse_mla_jax._check import require
from sparse_mla_jax.cases import (
    attention,
    attention_layers,
    cache,
    compressor,
    hyper_connections,
    indexer,
    projections,
    topk,
)
from sparse_mla_jax.cases.case import Case, KernelCase, Work

AREAS = ("topk", "indexer", "decode", "prefill", "cache", "projection", "streams", "step")

CASES = (
    *topk.topk_cases(),
    *indexer.indexer_cases(),
    *attention.decode_cases(),
    *attention.prefill_cases(),
    *cache.cache_cases(),
    *projections.projection_cases(),
    *hyper_connections.streams_cases(),
    *attention_layers.step_cases(),
)

KERNEL_CASES = (
    *attention.KERNEL_CASES,
    *indexer.KERNEL_CASES,
    *topk.KERNEL_CASES,
    *cache.KERNEL_CASES,
    *compressor.KERNEL_CASES,
    *hyper_connections.KERNEL_CASES,
    *projections.KERNEL_CASES,
)


def build(case: Case, flavour: str, query: str = "", *, shrink: bool = False) -> Work:
    """The Work of a case.

    Args:
      case: one of CASES.
      flavour: type of its caches, one of case.flavours.
      query: type of the indexer's queries; "" for bfloat16.
      shrink: sizes for a CPU.

    Raises:
      ValueError: a flavour that the case does not support.
    """
    require(
        flavour in case.flavours,
        f"flavour is {flavour!r}; {case.name} takes {', '.join(repr(f) for f in case.flavours)}.",
    )
    case = case.shrunk() if shrink else case
    return case.make(case.sizes, flavour, query)


def case(name: str) -> Case:
    """The case of CASES with that name.

    Raises:
      ValueError: no case has it.
    """
    found = next((c for c in CASES if c.name == name), None)
    require(found is not None, f"case is {name!r}; expected one of {', '.join(c.name for c in CASES)}.")
    return found  # type: ignore[return-value]


def chosen(area: str | None, text: str | None) -> tuple[Case, ...]:
    """Cases of an area (None: all) whose name contains `text` (None: all).

    Raises:
      ValueError: no case matches.
    """
    found = tuple(c for c in CASES if area in (None, c.area))
    matching = tuple(c for c in found if text is None or text in c.name)
    require(
        len(matching) > 0,
        f"--case {text!r} is in no name of {'any area' if area is None else f'area {area}'}; names are"
        f" {', '.join(c.name for c in found)}.",
    )
    return matching


def kernel_case(name: str) -> KernelCase:
    """The case of KERNEL_CASES with that name.

    Raises:
      ValueError: no case has it.
    """
    found = next((c for c in KERNEL_CASES if c.name == name), None)
    require(found is not None, f"kernel is {name!r}; expected one of {', '.join(kernel_names())}.")
    return found  # type: ignore[return-value]


def kernel_names() -> list[str]:
    """Names of KERNEL_CASES."""
    return [c.name for c in KERNEL_CASES]
