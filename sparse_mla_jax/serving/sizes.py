"""The sizes of an engine: defaults, checks, and whether its caches fit into memory, all before any memory is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax.config import Config, DeepseekV4Config
from sparse_mla_jax.metadata import buckets
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.parallel.pages import check_windows
from sparse_mla_jax.serving.memory import check_memory

# Slots of a cache are numbered by int32.
_MOST_SLOTS = 2**31 - 1


class EngineSizes(NamedTuple):
    """The sizes of an engine, checked; `Engine` describes them. On a mesh, steps are those of one group of requests.

    Attributes:
      page_size: tokens per page.
      num_pages: pages of every cache, on one device.
      max_batch: most requests in a step.
      max_context: most tokens of a request, prompt and generated.
      token_budget: most tokens in a step, at least max_batch.
      token_buckets: token counts to which steps are padded, ascending.
    """

    page_size: int
    num_pages: int
    max_batch: int
    max_context: int
    token_budget: int
    token_buckets: tuple[int, ...]


def default_buckets(max_batch: int, token_budget: int) -> tuple[int, ...]:
    """Token counts to which steps are padded: a full decode batch, then growing fourfold up to the budget.

    Every bucket is a program to compile. Compared with doubling, there are half as many programs, so the engine starts
    twice as fast; and a long prompt fills whole budgets anyway.
    """
    ladder = buckets(token_budget, min_size=max_batch)
    return tuple(sorted({ladder[0], *ladder[::-1][::2]}))


def choose_page_size(config: Config, page_size: int | None, context: int = 1) -> int:
    """Tokens per page: `page_size`, or the family's. `context` is the number of devices that share a request's pages.

    Raises:
      ValueError: not a size; over several devices, pages smaller than DeepSeek-V4's windows.
    """
    if page_size is None:
        page_size = family_of(config).default_page_size(config)
    page_size = _check.size("page_size", page_size)
    if isinstance(config, DeepseekV4Config):
        for layer in range(config.num_hidden_layers):
            check_windows(page_size, config.compress_ratio(layer), context)
    return page_size


def choose_sizes(
    config: Config,
    *,
    page_size: int | None = None,
    num_pages: int | None = None,
    max_batch: int = 8,
    max_context: int | None = None,
    prefill_chunk: int = 512,
    token_buckets: Sequence[int] | None = None,
    context: int = 1,
) -> EngineSizes:
    """Checks the arguments of `Engine` that are sizes, and fills in their defaults.

    `context` is the number of devices that share the pages of a request.

    Raises:
      ValueError: a size that is not as `Engine` describes it.
    """
    page_size = choose_page_size(config, page_size, context)
    max_batch = _check.size("max_batch", max_batch)
    limit = config.max_position_embeddings
    max_context = _check.size("max_context", min(limit, 4096) if max_context is None else max_context, 2)
    require(
        max_context <= limit,
        f"max_context is {max_context}; the model's positions end at {limit} (max_position_embeddings).",
    )
    token_budget = max(_check.size("prefill_chunk", prefill_chunk), max_batch)
    # Of a request's pages the first device has the most.
    width = math.ceil(math.ceil(max_context / page_size) / context)
    num_pages = max_batch * width if num_pages is None else _check.size("num_pages", num_pages)
    require(
        num_pages * page_size <= _MOST_SLOTS,
        f"num_pages is {num_pages} and page_size {page_size}; slots are int32, so a cache holds at most {_MOST_SLOTS}"
        " tokens. Lower num_pages, max_batch or max_context.",
    )
    if token_buckets is None:
        token_buckets = default_buckets(max_batch, token_budget)
    require(
        isinstance(token_buckets, Sequence) and not isinstance(token_buckets, str),
        f"token_buckets is {token_buckets!r}; a sequence of integers is expected, or None.",
    )
    token_buckets = tuple(sorted({_check.size("token_buckets", size) for size in token_buckets}))
    require(
        bool(token_buckets) and token_buckets[-1] >= token_budget,
        f"token_buckets is {token_buckets}; the largest must hold a whole step of {token_budget} tokens.",
    )
    return EngineSizes(page_size, num_pages, max_batch, max_context, token_budget, token_buckets)


def check_sizes_fit(config: Config, sizes: EngineSizes, cache_dtype: Any, mesh: Mesh | None = None) -> None:
    """Checks that the caches and the arrays of a step fit into memory; uses shapes only.

    On a mesh, into that of each of this process's devices.

    Raises:
      ValueError: they need more memory than there is.
    """
    page_size, num_pages, max_batch, max_context, token_budget, _ = sizes
    largest = sizes.token_buckets[-1]
    # At least these: hidden states of every token, and the scores of every row.
    step = 4 * (largest * config.hidden_size + max_batch * config.vocab_size)
    # Page tables of the step and of the requests, and the allocator's list of pages.
    host = 8 * max_batch * math.ceil(max_context / page_size) + 16 * num_pages
    hint = "Lower max_batch, max_context, num_pages or prefill_chunk."
    what = f"an engine of {num_pages} pages of {page_size} tokens, {max_batch} requests and steps of {largest} tokens"
    devices = None
    if mesh is not None:
        what, devices = f"{what} on each of {mesh.size} devices", list(mesh.local_devices)
        # At most one group of requests a device.
        host *= mesh.size
    # First without the caches: the sizes of their arrays may not even be numbers to jax.
    check_memory(what, device_bytes=step, host_bytes=host, hint=hint, devices=devices)
    caches = jax.eval_shape(
        lambda: family_of(config).create_caches(
            config, num_pages, page_size, num_requests=max_batch, max_query_len=token_budget, dtype=cache_dtype
        )
    )
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    check_memory(what, device_bytes=held + step, host_bytes=host, hint=hint, devices=devices)
