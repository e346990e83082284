"""The named shapes that `bench` times and the tests run shrunk: the list of all of them, and how they are found."""

from __future__ import annotations

from sparse_mla_jax._check import require
from sparse_mla_jax.bench_attention import decode_cases, indexer_cases, prefill_cases, topk_cases
from sparse_mla_jax.bench_caches import cache_cases
from sparse_mla_jax.bench_layers import projection_cases, streams_cases
from sparse_mla_jax.bench_steps import step_cases
from sparse_mla_jax.bench_work import Case, Work

AREAS = ("topk", "indexer", "decode", "prefill", "cache", "projection", "streams", "step")

CASES = (
    *topk_cases(),
    *indexer_cases(),
    *decode_cases(),
    *prefill_cases(),
    *cache_cases(),
    *projection_cases(),
    *streams_cases(),
    *step_cases(),
)


def build(case: Case, flavour: str, query: str = "", *, shrink: bool = False) -> Work:
    """The work of a case.

    Args:
      case: one of CASES.
      flavour: type of its caches, one of case.flavours.
      query: type of the indexer's queries; "" for bfloat16.
      shrink: sizes for a CPU.

    Raises:
      ValueError: a flavour that the case does not take.
    """
    require(
        flavour in case.flavours,
        f"flavour is {flavour!r}; {case.name} takes {', '.join(repr(f) for f in case.flavours)}.",
    )
    case = case.shrunk() if shrink else case
    return case.make(case.sizes, flavour, query)


def case(name: str) -> Case:
    """The case of that name.

    Raises:
      ValueError: there is none.
    """
    found = next((c for c in CASES if c.name == name), None)
    require(found is not None, f"case is {name!r}; expected one of {', '.join(c.name for c in CASES)}.")
    return found  # type: ignore[return-value]


def chosen(area: str | None, text: str | None) -> tuple[Case, ...]:
    """Cases of an area (None: all) whose name contains `text` (None: all).

    Raises:
      ValueError: none is left.
    """
    found = tuple(c for c in CASES if area in (None, c.area))
    matching = tuple(c for c in found if text is None or text in c.name)
    require(
        len(matching) > 0,
        f"--case {text!r} is in no name of {'any area' if area is None else f'area {area}'}; names are"
        f" {', '.join(c.name for c in found)}.",
    )
    return matching
