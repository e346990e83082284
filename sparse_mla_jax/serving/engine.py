"""The engine: requests in, tokens out, continuous batching around one jitted step per token bucket.

A step is one pure function on the device: metadata from the lengths, the model's forward pass over a ragged mix of
decode tokens and prefill chunks, logits of each request's last token, sampling. The host prepares a few small numpy
arrays, passes them in one call, and fetches only the sampled tokens. Caches are donated, so they are updated in place.
Shapes depend on the bucket only: after `warm_up` nothing is traced or compiled again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import CACHE_DTYPES
from sparse_mla_jax.config import Config
from sparse_mla_jax.metadata import bucket_for, buckets, build_metadata
from sparse_mla_jax.models.family import check_params, family_of, matmul_precision
from sparse_mla_jax.ops._dispatch import check_implementation
from sparse_mla_jax.serving.pages import PageAllocator
from sparse_mla_jax.serving.requests import Prompt, check_request
from sparse_mla_jax.serving.sampling import sample
from sparse_mla_jax.serving.scheduler import Request, Scheduled, Scheduler


class StepInputs(NamedTuple):
    """The host's inputs of a step: T tokens and B = max_batch rows (requests), both padded; P pages per row.

    Attributes:
      token_ids: int32 [T], the rows' tokens one after the other.
      seq_lens: int32 [B], each sequence's length after this step; 0 in padded rows.
      query_lens: int32 [B], number of tokens that the row has in this step; 0 in padded rows.
      page_table: int32 [B, P], -1 for no page.
      state_ids: int32 [B], row of the per-request state (in models that have one); -1 in padded rows.
      temperature: float32 [B].
      top_p: float32 [B].
      seeds: uint32 [B].
    """

    token_ids: Any
    seq_lens: Any
    query_lens: Any
    page_table: Any
    state_ids: Any
    temperature: Any
    top_p: Any
    seeds: Any


def model_step(
    params: Any,
    caches: Any,
    inputs: StepInputs,
    *,
    config: Config,
    page_size: int,
    implementation: str | None,
) -> tuple[jax.Array, Any]:
    """The pure function behind `Engine.step`: (sampled tokens int32 [B], caches); padded rows give any token."""
    with matmul_precision(params):
        metadata = build_metadata(
            inputs.seq_lens,
            inputs.query_lens,
            inputs.page_table,
            num_tokens=inputs.token_ids.shape[0],
            page_size=page_size,
        )
        hidden, caches = family_of(config).forward(
            params,
            inputs.token_ids,
            caches,
            metadata,
            config=config,
            state_ids=inputs.state_ids,
            implementation=implementation,
        )
        scores = family_of(config).logits(params, hidden[metadata.last_token], config)
        # Position of the sampled token: the length before it, however the earlier tokens were cut into steps.
        tokens = sample(scores, inputs.temperature, inputs.top_p, inputs.seeds, metadata.seq_lens)
    return tokens, caches


_jitted_step = jax.jit(
    model_step, static_argnames=("config", "page_size", "implementation"), donate_argnames=("caches",)
)


def default_buckets(max_batch: int, token_budget: int) -> tuple[int, ...]:
    """Token counts to which steps are padded: a full decode batch, then growing fourfold up to the budget.

    Every bucket is a program to compile. Compared with doubling, there are half as many programs, so the engine starts
    twice as fast; and a long prompt fills whole budgets anyway.
    """
    ladder = buckets(token_budget, min_size=max_batch)
    return tuple(sorted({ladder[0], *ladder[::-1][::2]}))


class Engine:
    """Serves many requests with one model.

    >>> engine = Engine(params, config, max_batch=8, max_context=2048)          # doctest: +SKIP
    >>> request = engine.submit(b"def main(", max_tokens=64, stop=[b"\\n\\n"])   # doctest: +SKIP
    >>> bytes(engine.stream(request))                                           # doctest: +SKIP

    A request's tokens do not depend on the other requests: sampling uses the request's seed and the token's position
    only, and preemption keeps the tokens. (Logits of another bucket may differ in the last bits of a float32; only an
    exact tie could show it.) Host memory and pages of a request are returned when it ends.

    If a step fails, by an exception of the device or model or by Ctrl-C in the middle, the donated caches are lost. The
    exception is passed on, every unfinished request ends with finish_reason "error", all pages are returned, and
    `failed` becomes True. Further `submit`, `step` and `warm_up` raise a RuntimeError that names the cause: make a new
    engine. Tokens given out before the failure stay valid.

    Not thread-safe: one thread submits, steps and cancels.

    Attributes:
      config: the model's shapes.
      params: the model's weights on the device.
      caches: tuple over layers, of (PagedKVCache, PagedIndexCache) or of DeepSeek-V4's LayerCaches; every step replaces
        it.
      scheduler: the waiting and running requests.
      token_buckets: token counts to which steps are padded, ascending.
    """

    def __init__(
        self,
        params: Any,
        config: Config,
        *,
        dtype: Any = None,
        cache_dtype: Any = "float8_e4m3fnuz",
        page_size: int | None = None,
        num_pages: int | None = None,
        max_batch: int = 8,
        max_context: int | None = None,
        prefill_chunk: int = 512,
        token_buckets: Sequence[int] | None = None,
        implementation: str | None = None,
    ):
        """Puts the weights on the device and allocates the caches; compiles nothing yet.

        Args:
          params: from `init_params` or `load_checkpoint`.
          config: the model's shapes.
          dtype: float32 or bfloat16, to which matrices are cast; None keeps their type.
          cache_dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.
          page_size: tokens per page; None: 64, or 256 for DeepSeek-V4 (a multiple or divisor of every compress ratio).
          num_pages: total number of pages; None: enough for max_batch sequences of max_context.
          max_batch: most requests in a step.
          max_context: most tokens of a request, prompt and generated; None: 4096 or the model's own limit if smaller.
          prefill_chunk: most tokens in a step, at least max_batch (smaller values are raised to it). Longer prompts
            take several steps, in which other requests decode as well.
          token_buckets: token counts to which steps are padded; None: see `default_buckets`.
          implementation: of all operators: None, "triton", "xla" or "reference".

        Raises:
          ValueError: a size, type or name that is not as described, or params that do not fit the config.
        """
        check_implementation(implementation)
        cache_type = _check.dtype("cache_dtype", cache_dtype, CACHE_DTYPES)
        family = family_of(config)
        page_size = family.default_page_size(config) if page_size is None else _check.size("page_size", page_size)
        max_batch = _check.size("max_batch", max_batch)
        limit = config.max_position_embeddings
        max_context = _check.size("max_context", min(limit, 4096) if max_context is None else max_context, 2)
        require(
            max_context <= limit,
            f"max_context is {max_context}; the model's positions end at {limit} (max_position_embeddings).",
        )
        token_budget = max(_check.size("prefill_chunk", prefill_chunk), max_batch)
        width = math.ceil(max_context / page_size)
        num_pages = max_batch * width if num_pages is None else _check.size("num_pages", num_pages)
        if token_buckets is None:
            token_buckets = default_buckets(max_batch, token_budget)
        self.token_buckets = tuple(sorted({_check.size("token_buckets", size) for size in token_buckets}))
        require(
            bool(self.token_buckets) and self.token_buckets[-1] >= token_budget,
            f"token_buckets is {self.token_buckets}; the largest must hold a whole step of {token_budget} tokens.",
        )
        self.config = config
        self.params = check_params(params, config, dtype)
        self.scheduler = Scheduler(
            PageAllocator(num_pages),
            page_size=page_size,
            max_batch=max_batch,
            max_context=max_context,
            token_budget=token_budget,
        )
        self.caches = family.create_caches(
            config, num_pages, page_size, num_requests=max_batch, max_query_len=token_budget, dtype=cache_type
        )
        self._step = functools.partial(_jitted_step, config=config, page_size=page_size, implementation=implementation)
        self._failure: str | None = None

    @property
    def max_context(self) -> int:
        """Most tokens of a request, prompt and generated."""
        return self.scheduler.max_context

    @property
    def bytes_per_token(self) -> float:
        """Cache bytes that one more token of context costs over all layers."""
        return family_of(self.config).bytes_per_token(self.caches, self.scheduler.page_size)

    @property
    def bytes_per_request(self) -> int:
        """Further cache bytes per running request, whatever its length: windows and compressor states."""
        return family_of(self.config).bytes_per_request(self.caches)

    @property
    def failed(self) -> bool:
        """Whether a step failed, after which the engine can not be used."""
        return self._failure is not None

    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_work

    def submit(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Prompt | Sequence[Prompt | int] = (),
    ) -> Request:
        """Queues a request; `step`, `run` or `stream` then work on it.

        A request that reaches max_context (or has all pages and fills them) ends there with finish_reason "length".

        Args:
          prompt: text, bytes (ids are the bytes) or token ids, at least one.
          max_tokens: most tokens to generate, at least 1.
          temperature: 0 is greedy.
          top_p: nucleus, above 0 and at most 1.
          seed: 0..2**32 - 1; the same seed gives the same tokens, whatever other requests run.
          stop: texts, bytes or sequences of ids that end the request (an int is a sequence of one id), or a single text
            or bytes. They do not appear in the tokens.

        Returns:
          The request; steps append to its `tokens`.

        Raises:
          ValueError: an argument that is not as described, or a prompt that can never fit; then nothing is queued.
          RuntimeError: the engine has failed.
        """
        self._check_usable()
        request = check_request(
            self.config, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        self.scheduler.add(request)
        if request.error is not None:
            raise ValueError(request.error)
        return request

    def cancel(self, request: Request) -> bool:
        """Ends `request` now with finish_reason "cancelled"; returns False if it has ended already."""
        return self.scheduler.cancel(request)

    def step(self) -> list[tuple[Request, int]]:
        """Makes one step for the requests that the scheduler chooses.

        Returns:
          (request, token) for every token given out, in order. Empty if no request waits or runs, if the step was
          prefill only, or if tokens are held back because they may begin a stop sequence.

        Raises:
          RuntimeError: the engine has failed before. An exception of this step is passed on; see the class.
        """
        self._check_usable()
        try:
            batch = self.scheduler.schedule()
            if not batch:
                return []
            sampled = self._execute(self._inputs(batch))
            return self.scheduler.commit(batch, sampled[: len(batch)].tolist())
        except BaseException as error:
            self._fail(error)
            raise

    def run(self) -> None:
        """Steps until every request has ended."""
        while self.has_work():
            self.step()

    def stream(self, request: Request) -> Iterator[int]:
        """Yields the tokens of `request` as they come; in between it steps the engine, with all other requests.

        Raises:
          RuntimeError: the engine has failed.
        """
        given = 0
        while True:
            while given < len(request.tokens):
                given += 1
                yield request.tokens[given - 1]
            if request.finished:
                return
            require(self.has_work(), "request is not this engine's; stream it where it was submitted.")
            self.step()

    def warm_up(self, *, progress: bool = False) -> None:
        """Compiles and runs the step of every bucket, on padding only: requests and caches keep their contents.

        Args:
          progress: show a progress bar of the buckets on stderr.

        Raises:
          RuntimeError: the engine has failed.
        """
        from tqdm import tqdm

        self._check_usable()
        try:
            for size in tqdm(
                self.token_buckets, desc="compiling", unit="bucket", disable=None if progress else True, leave=False
            ):
                self._execute(self._padding(size))
        except BaseException as error:
            self._fail(error)
            raise

    def _execute(self, inputs: StepInputs) -> np.ndarray:
        """Runs the jitted step, waits for it, and fetches only the sampled tokens int32 [B]."""
        tokens, self.caches = self._step(self.params, self.caches, inputs)
        return np.asarray(tokens)

    def _padding(self, num_tokens: int) -> StepInputs:
        """Inputs of a step of `num_tokens` in which every row is padding."""
        rows = self.scheduler.max_batch
        return StepInputs(
            token_ids=np.zeros(num_tokens, np.int32),
            seq_lens=np.zeros(rows, np.int32),
            query_lens=np.zeros(rows, np.int32),
            page_table=np.full((rows, self.scheduler.table_width), -1, np.int32),
            state_ids=np.full(rows, -1, np.int32),
            temperature=np.zeros(rows, np.float32),
            top_p=np.ones(rows, np.float32),
            seeds=np.zeros(rows, np.uint32),
        )

    def _inputs(self, batch: Sequence[Scheduled]) -> StepInputs:
        """The arrays of a step over `batch`, newly allocated: the device may still read those of the last step."""
        count = sum(row.num_tokens for row in batch)
        inputs = self._padding(bucket_for(count, self.token_buckets))
        start = 0
        for i, row in enumerate(batch):
            request = row.request
            inputs.token_ids[start : start + row.num_tokens] = row.token_ids
            start += row.num_tokens
            inputs.seq_lens[i] = row.seq_len
            inputs.query_lens[i] = row.num_tokens
            inputs.page_table[i] = row.page_row
            inputs.state_ids[i] = row.state
            inputs.temperature[i] = request.temperature
            inputs.top_p[i] = request.top_p
            inputs.seeds[i] = request.seed
        return inputs

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine failed in an earlier step ({self._failure}); make a new Engine.")

    def _fail(self, error: BaseException) -> None:
        """Ends every request: the caches may be half written or already donated."""
        self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
        self.scheduler.abort(f"the engine failed: {self._failure}")
