"""The engine: requests in, tokens out, continuous batching around one jitted step per token bucket.

A step is one pure function on the device: metadata from the lengths, the model's forward pass over a ragged mix of
decode tokens and prefill chunks, logits of each request's last token, sampling. The host prepares a few small numpy
arrays, passes them in one call, and fetches only the sampled tokens. Caches are donated, so they are updated in place.
Shapes depend on the bucket only: after `warm_up` nothing is traced or compiled again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sparse_mla_jax import _check
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import CACHE_DTYPES
from sparse_mla_jax.config import Config
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.models.family import check_params, family_of, partition_model
from sparse_mla_jax.models.generation import load_generation_defaults
from sparse_mla_jax.models.sharded_checkpoint import shard_checkpoint
from sparse_mla_jax.ops._dispatch import check_implementation
from sparse_mla_jax.parallel.axes import Parallel, parallel_of
from sparse_mla_jax.parallel.run import Where, create_on_mesh, place_params
from sparse_mla_jax.serving import packing
from sparse_mla_jax.serving.balance import Groups
from sparse_mla_jax.serving.pages import PageAllocator
from sparse_mla_jax.serving.requests import Prompt, Stops, check_eos, check_request
from sparse_mla_jax.serving.scheduler import Request, Scheduled, Scheduler
from sparse_mla_jax.serving.sizes import EngineSizes, check_sizes_fit, choose_sizes, default_buckets
from sparse_mla_jax.serving.step import StepInputs, jitted_step

__all__ = ["Engine", "default_buckets"]


class Engine:
    """Serves many requests with one model.

    >>> engine = Engine.from_folder("examples/tiny_python", max_context=2048)    # doctest: +SKIP
    >>> request = engine.submit(b"def main(", max_tokens=64, stop=[b"\\n\\n"])   # doctest: +SKIP
    >>> bytes(engine.stream(request))                                           # doctest: +SKIP

    A request's tokens do not depend on the other requests: sampling uses the request's seed and the token's position
    only, and preemption keeps the tokens. (Logits of another bucket may differ in the last bits of a float32; only an
    exact tie could show it.) Host memory and pages of a request are returned when it ends.

    If a step fails, by an exception of the device or model or by Ctrl-C in the middle, the donated caches are lost. The
    exception is passed on, every unfinished request ends with finish_reason "error", all pages are returned, and
    `failed` becomes True. Further `submit`, `step` and `warm_up` raise a RuntimeError that names the cause: make a new
    engine. Tokens given out before the failure stay valid.

    With a `mesh`, one step runs on all its devices. Every group of the axis "data" has its own running requests and
    pages; a waiting request goes to the group with the least load that has room (see `serving.balance`). The pages of a
    request are spread over "context", so its context may exceed what one device holds. In several processes, each makes
    the same engine and the same calls in the same order; each gets all tokens.

    Not thread-safe: one thread submits, steps and cancels.

    Attributes:
      config: the model's shapes.
      parallel: the axes of the mesh; None on one device.
      params: the model's weights on the device or the mesh.
      caches: tuple over layers, of (PagedKVCache, PagedIndexCache) or of DeepSeek-V4's LayerCaches; every step replaces
        it. On a mesh they have the pages of all devices.
      groups: the waiting and running requests of all groups.
      token_buckets: token counts to which steps are padded, ascending; on a mesh the tokens of each group.
      eos_token_ids: ids that end every request.
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
        eos_token_ids: int | Sequence[int] = (),
        mesh: Mesh | None = None,
        parallel: Parallel | None = None,
    ):
        """Puts the weights on the device and allocates the caches; compiles nothing yet.

        Args:
          params: from `init_params` or `load_checkpoint`.
          config: the model's shapes.
          dtype: float32 or bfloat16, to which matrices are cast; None keeps their type.
          cache_dtype: float8_e4m3fnuz, float8_e4m3fn, bfloat16 or float32.
          page_size: tokens per page; None: 64, or 256 for DeepSeek-V4 (a multiple or divisor of every compress ratio).
          num_pages: number of pages, on a mesh of each device: a group has num_pages * context. None: enough for
            max_batch sequences of max_context.
          max_batch: most requests in a step, on a mesh of each group of "data".
          max_context: most tokens of a request, prompt and generated; None: 4096 or the model's own limit if smaller.
          prefill_chunk: most tokens in a step, at least max_batch (smaller values are raised to it); on a mesh of each
            group. Longer prompts take several steps, in which other requests decode as well.
          token_buckets: token counts to which steps are padded; None: see `default_buckets`.
          implementation: of all operators: None, "triton", "xla" or "reference".
          eos_token_ids: ids that end every request, as a stop sequence of one id does. `from_folder` reads those of a
            folder; so does `models.generation.load_generation_defaults`.
          mesh: of axes "data", "context" and "tensor", from `parallel.make_mesh`; None for one device. Parameters that
            lie on it already (`shard_checkpoint`) stay where they are.
          parallel: the axes, if they are not those of `mesh` with experts over "data" and "tensor".

        Raises:
          ValueError: a size, type or name that is not as described, params that do not fit the config, sizes of the
            model that do not divide over the mesh, or caches that need more memory than there is.
        """
        check_implementation(implementation)
        cache_type = _check.dtype("cache_dtype", cache_dtype, CACHE_DTYPES)
        self.parallel = parallel_of(mesh, parallel)
        sizes = choose_sizes(
            config,
            page_size=page_size,
            num_pages=num_pages,
            max_batch=max_batch,
            max_context=max_context,
            prefill_chunk=prefill_chunk,
            token_buckets=token_buckets,
            context=1 if self.parallel is None else self.parallel.context,
        )
        self.eos_token_ids = check_eos(eos_token_ids, config.vocab_size)
        self.token_buckets = sizes.token_buckets
        self.config = config
        self.params = check_params(params, config, dtype, self.parallel)
        where = None
        if mesh is not None and self.parallel is not None:
            where = Where(mesh, self.parallel, partition_model(self.params, config, self.parallel))
            self.params = place_params(self.params, where)
        check_sizes_fit(config, sizes, cache_type, mesh)
        self.groups = _make_groups(sizes, self.parallel)
        self.caches = _create_caches(config, sizes, cache_type, where)
        options = {"config": config, "page_size": sizes.page_size, "implementation": implementation}
        on_mesh = {} if where is None else {"mesh": mesh, "parallel": self.parallel}
        self._step = functools.partial(jitted_step, **options, **on_mesh)
        self._failure: str | None = None

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: Any = "float32",
        progress: bool = True,
        mesh: Mesh | None = None,
        parallel: Parallel | None = None,
        **options: Any,
    ) -> Engine:
        """An engine with the weights of a Hugging Face folder, whose end-of-sequence ids end every request.

        Args:
          folder: a model folder, see `load_checkpoint`; generation_config.json in it may name the ids, see
            `load_generation_defaults`.
          dtype: float32 or bfloat16, of the matrices.
          progress: show a progress bar of the weights on stderr, if that is a terminal.
          mesh, parallel: of `Engine`; every device's part of the weights is read directly onto it.
          **options: of `Engine`; eos_token_ids replaces the folder's ids.

        Raises:
          ValueError: a folder that can not be read, or an argument that is not as described.
        """
        if "eos_token_ids" not in options:
            options["eos_token_ids"] = load_generation_defaults(folder).eos_token_ids
        axes = parallel_of(mesh, parallel)
        if mesh is None or axes is None:
            config, params = load_checkpoint(folder, dtype=dtype, progress=progress)
        else:
            config, params = shard_checkpoint(folder, mesh, axes, dtype=dtype, progress=progress)
        return cls(params, config, mesh=mesh, parallel=parallel, **options)

    @property
    def scheduler(self) -> Scheduler:
        """The requests of the first group; without a mesh these are all, see `groups`."""
        return self.groups.schedulers[0]

    @property
    def max_context(self) -> int:
        """Most tokens of a request, prompt and generated."""
        return self.scheduler.max_context

    @property
    def bytes_per_token(self) -> float:
        """Cache bytes that one more token of context costs over all layers, on a mesh on each device that has it.

        Those are the devices of "tensor"; over "context" and "data" only one has it.
        """
        return family_of(self.config).bytes_per_token(self.caches, self.scheduler.page_size)

    @property
    def bytes_per_request(self) -> int:
        """Further cache bytes per running request, whatever its length: windows and compressor states.

        On a mesh on every device of its group.
        """
        return family_of(self.config).bytes_per_request(self.caches)

    @property
    def failed(self) -> bool:
        """Whether a step failed, after which the engine can not be used."""
        return self._failure is not None

    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.groups.has_work

    def submit(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Stops = None,
        ignore_eos: bool = False,
    ) -> Request:
        """Queues a request; `step`, `run` or `stream` then work on it.

        A request that reaches max_context (or has all pages and fills them) ends there with finish_reason "length".

        Args:
          prompt: token ids, at least one; or text or bytes if the vocabulary is bytes (at most 256 ids). The ids of
            text are the bytes of its UTF-8 encoding.
          max_tokens: most tokens to generate, at least 1.
          temperature: 0 is greedy.
          top_p: nucleus, above 0 and at most 1.
          seed: 0..2**32 - 1; the same seed gives the same tokens, whatever other requests run.
          stop: texts, bytes or sequences of ids that end the request (an int is a sequence of one id), or a single text
            or bytes; None for none. They do not appear in the tokens.
          ignore_eos: do not end at the engine's eos_token_ids, which then appear in the tokens.

        Returns:
          The request; steps append to its `tokens`.

        Raises:
          ValueError: an argument that is not as described, or a prompt that can never fit; then nothing is queued.
          RuntimeError: the engine has failed.
        """
        self._check_usable()
        require(isinstance(ignore_eos, bool), f"ignore_eos is {ignore_eos!r}; True or False is expected.")
        request = check_request(
            self.config,
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            eos_token_ids=() if ignore_eos else self.eos_token_ids,
        )
        self.groups.add(request)
        if request.error is not None:
            raise ValueError(request.error)
        return request

    def cancel(self, request: Request) -> bool:
        """Ends `request` now with finish_reason "cancelled"; returns False if it has ended already."""
        return self.groups.cancel(request)

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
            batches = self.groups.schedule()
            if not any(batches):
                return []
            sampled = self._execute(self._inputs(*batches)).reshape(len(batches), -1)
            return self.groups.commit(
                batches, [row[: len(batch)].tolist() for row, batch in zip(sampled, batches, strict=True)]
            )
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
        """Runs the jitted step, waits for it, and fetches only the sampled tokens int32 [groups * B]."""
        tokens, self.caches = self._step(self.params, self.caches, inputs)
        return np.asarray(tokens)

    def _padding(self, num_tokens: int) -> StepInputs:
        """Inputs of a step of `num_tokens` a group in which every row is padding."""
        return packing.pad(num_tokens, groups=len(self.groups.schedulers), **self._shape)

    def _inputs(self, *batches: Sequence[Scheduled]) -> StepInputs:
        """The arrays of a step over one batch a group."""
        return packing.pack(batches, self.token_buckets, **self._shape)

    @property
    def _shape(self) -> dict[str, int]:
        return {"rows": self.scheduler.max_batch, "width": self.scheduler.table_width}

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine failed in an earlier step ({self._failure}); make a new Engine.")

    def _fail(self, error: BaseException) -> None:
        """Ends every request: the caches may be half written or already donated."""
        self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
        self.groups.abort(f"the engine failed: {self._failure}")


def _make_groups(sizes: EngineSizes, parallel: Parallel | None) -> Groups:
    """Groups of requests with their pages: one for each device of the axis "data"."""
    groups, devices = (1, 1) if parallel is None else (parallel.data, parallel.context)
    return Groups.create(
        groups,
        lambda waiting: Scheduler(
            PageAllocator(sizes.num_pages, devices),
            page_size=sizes.page_size,
            max_batch=sizes.max_batch,
            max_context=sizes.max_context,
            token_budget=sizes.token_budget,
            waiting=waiting,
        ),
    )


def _create_caches(config: Config, sizes: EngineSizes, dtype: Any, where: Where | None) -> Any:
    """The caches on the device, or those of all devices on the mesh."""

    def create() -> Any:
        return family_of(config).create_caches(
            config,
            sizes.num_pages,
            sizes.page_size,
            num_requests=sizes.max_batch,
            max_query_len=sizes.token_budget,
            dtype=dtype,
        )

    return create() if where is None else create_on_mesh(create, where)
