"""Chooses the requests of the next step: continuous batching over a fixed number of cache pages. No device code.

The policy, in the order in which a step is filled:

1. Decode: every running request whose cache lacks only its newest token gets that token.
2. Prefill: the rest of the token budget goes to prompts that are partly cached, oldest first, in chunks.
3. Admission: waiting requests enter in order of arrival, as long as max_batch and the budget allow and there are free
   pages for all known tokens of the request, plus one spare page per running request that may still grow. No request
   overtakes the first in the queue, so none starves.

Pages are taken at admission (for all known tokens at once) and one by one while decoding. If none is left, the youngest
running request is preempted: it loses its pages, keeps its tokens, returns to the head of the queue, and later prefills
prompt and generated tokens again. Age is the order of arrival. Every running request is older than every waiting one,
so the oldest request always advances and every request ends.

A request's pages may be spread over several devices, see `PageAllocator`. Then the fullest device decides: a request
enters if every device has the pages that it needs there, and preemption takes the youngest that has a page on the
device without free ones. Several groups of requests share one queue, see `balance`.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.serving.pages import PageAllocator


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and its generated tokens. Made by `Engine.submit`; anyone may read it, only the scheduler writes it.

    Attributes:
      prompt: token ids.
      max_tokens: most tokens to generate.
      temperature, top_p, seed: sampling parameters, see `sampling.sample`.
      stop: token sequences that end the request; they are not part of `tokens`.
      tokens: tokens given out so far. A token that may begin a stop sequence is held back until that is decided.
      finish_reason: None while waiting or running, then "stop" (a stop sequence came), "length" (max_tokens or the
        context is reached), "cancelled" or "error".
      error: the reason, if finish_reason is "error".
      num_preemptions: how often the request lost its pages.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    num_preemptions: int = 0
    # Private to the scheduler: prompt and generated tokens; how many of them are cached; pages; row of the state.
    _sequence: list[int] = dataclasses.field(default_factory=list, repr=False)
    _num_cached: int = dataclasses.field(default=0, repr=False)
    _page_row: np.ndarray | None = dataclasses.field(default=None, repr=False)
    _num_pages: int = dataclasses.field(default=0, repr=False)
    _state: int = dataclasses.field(default=-1, repr=False)
    _arrival: int = dataclasses.field(default=-1, repr=False)

    @property
    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def prefilled(self) -> bool:
        """Whether the request decodes: everything but its newest token is in the cache."""
        return 0 < self._num_cached == len(self._sequence) - 1

    @property
    def num_generated(self) -> int:
        """Tokens generated so far, held-back and stop tokens included."""
        return max(0, len(self._sequence) - len(self.prompt))


# Requests that wait, by their number in the order of arrival, and in that order.
Queue = collections.OrderedDict[int, Request]


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """One row of a step: the next `num_tokens` tokens of `request`."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the row reaches the request's newest token, so that the token sampled after it counts."""
        return self.request._num_cached + self.num_tokens == len(self.request._sequence)

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the row."""
        start = self.request._num_cached
        return self.request._sequence[start : start + self.num_tokens]

    @property
    def seq_len(self) -> int:
        """Length of the request's sequence after this step."""
        return self.request._num_cached + self.num_tokens

    @property
    def page_row(self) -> np.ndarray:
        """int32 [page-table width]: the request's pages in order, then -1."""
        assert self.request._page_row is not None
        return self.request._page_row

    @property
    def state(self) -> int:
        """Row of the model's per-request state; no two running requests share it."""
        return self.request._state


def held_back(generated: Sequence[int], stop: Sequence[Sequence[int]]) -> int:
    """How many of the last `generated` tokens may begin a stop sequence: the longest suffix that is a prefix of one."""
    longest = 0
    for sequence in stop:
        for length in range(min(len(sequence) - 1, len(generated)), longest, -1):
            if tuple(generated[-length:]) == tuple(sequence[:length]):
                longest = length
                break
    return longest


@dataclasses.dataclass
class Plan:
    """A step while it is planned: its rows, and how many tokens it may still get."""

    rows: list[Scheduled]
    budget: int


class Scheduler:
    """Decides which tokens of which requests run in each step, and owns the pages of every request. Not thread-safe.

    Use: `batch = schedule()`, run the model on it, `commit(batch, sampled)`. Between the two, only `cancel` and `add`
    are allowed. `commit` ignores the rows of a request that was cancelled in between.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        page_size: int,
        max_batch: int,
        max_context: int,
        token_budget: int,
        waiting: Queue | None = None,
    ):
        """Makes a scheduler without requests.

        Args:
          allocator: the pages; no other scheduler may use it.
          page_size: tokens per page.
          max_batch: most requests that run at a time.
          max_context: most tokens of one request, prompt and generated.
          token_budget: most tokens of one step, at least `max_batch`.
          waiting: the queue that the schedulers of several groups share; None: its own.

        Raises:
          ValueError: a size below 1, or a budget below `max_batch`.
        """
        sizes = {"page_size": page_size, "max_batch": max_batch, "max_context": max_context}
        for name, value in {**sizes, "token_budget": token_budget}.items():
            require(value >= 1, f"{name} is {value}; at least 1 is expected.")
        require(
            token_budget >= max_batch,
            f"token_budget is {token_budget}, below max_batch {max_batch}; each running request needs a token.",
        )
        self.allocator = allocator
        self.page_size = page_size
        self.max_batch = max_batch
        self.max_context = max_context
        self.token_budget = token_budget
        self.table_width = -(-max_context // page_size)
        # Most tokens (prompt and generated) of a request that has all pages.
        self.capacity = min(max_context, allocator.num_pages * allocator.devices * page_size)
        self.waiting: Queue = collections.OrderedDict() if waiting is None else waiting
        self.running: list[Request] = []
        # A request holds one state from its admission to its end or preemption.
        self._free_states = list(range(max_batch))[::-1]
        self._arrivals = itertools.count()

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    @property
    def load(self) -> int:
        """Tokens of all running requests, cached or not."""
        return sum(len(request._sequence) for request in self.running)

    def add(self, request: Request) -> None:
        """Puts `request` at the end of the queue.

        A request whose prompt can never fit is not queued: its finish_reason becomes "error", and its `error` says
        which sizes clash.
        """
        longest = self.capacity - 1
        if not 1 <= len(request.prompt) <= longest:
            devices = self.allocator.devices
            each = f" on each of {devices} devices" if devices > 1 else ""
            request.error = (
                "prompt is empty; at least one token is expected."
                if not request.prompt
                else f"prompt has {len(request.prompt)} tokens; at most {longest} fit, one more is to be generated: "
                f"max_context is {self.max_context} and the cache holds {self.allocator.num_pages} pages of "
                f"{self.page_size} tokens{each}. Shorten the prompt or raise max_context and num_pages."
            )
            request.finish_reason = "error"
            return
        request._sequence = list(request.prompt)
        request._arrival = next(self._arrivals)
        request._page_row = np.full(self.table_width, -1, np.int32)
        self.waiting[request._arrival] = request

    def cancel(self, request: Request) -> bool:
        """Ends `request` now and frees its pages; returns False if it is finished or not of this scheduler."""
        if request.finished:
            return False
        if self.waiting.get(request._arrival) is request:
            del self.waiting[request._arrival]
        elif request in self.running:
            self.running.remove(request)
        else:
            return False
        self._finish(request, "cancelled")
        return True

    def abort(self, message: str) -> list[Request]:
        """Ends every waiting and running request with finish_reason "error" and `message`; returns them."""
        requests = [*self.running, *self.waiting.values()]
        self.running.clear()
        self.waiting.clear()
        for request in requests:
            request.error = message
            self._finish(request, "error")
        return requests

    def schedule(self) -> list[Scheduled]:
        """Chooses the rows of the next step and takes their pages; empty only if no request waits or runs.

        Returns:
          At most `max_batch` rows, together at most `token_budget` tokens, each with at least one.
        """
        plan = self.resume()
        while self.waiting and self.can_admit(request := next(iter(self.waiting.values())), plan):
            self.admit(request, plan)
        return plan.rows

    def resume(self) -> Plan:
        """The first part of `schedule`: the rows of requests that run already. `admit` adds others."""
        batch = []
        for request in list(self.running):
            # A request preempted earlier in this loop has no pages and waits again.
            if request._num_pages and self._pending(request) == 1 and self._grow_or_preempt(request):
                batch.append(Scheduled(request, 1))
        budget = self.token_budget - len(batch)
        for request in self.running:
            pending = self._pending(request)
            if pending > 1 and budget > 0:
                batch.append(Scheduled(request, min(pending, budget)))
                budget -= batch[-1].num_tokens
        return Plan(batch, budget)

    def can_admit(self, request: Request, plan: Plan) -> bool:
        """Whether a waiting request may enter the step `plan`."""
        if plan.budget <= 0 or len(self.running) >= self.max_batch:
            return False
        needed = self.allocator.per_device(self._pages_for(len(request._sequence)))
        # Keep a spare page for each: otherwise the new request is preempted within a few steps, its prefill wasted.
        for other in filter(self._grows, self.running):
            needed[other._num_pages % self.allocator.devices] += 1
        return self.allocator.has(needed)

    def admit(self, request: Request, plan: Plan) -> None:
        """Lets a waiting request, which `can_admit`, run, and adds its row to `plan`."""
        del self.waiting[request._arrival]
        self._take(request, self._pages_for(len(request._sequence)))
        request._state = self._free_states.pop()
        # Not always the youngest: another group may have preempted it.
        bisect.insort(self.running, request, key=lambda other: other._arrival)
        plan.rows.append(Scheduled(request, min(self._pending(request), plan.budget)))
        plan.budget -= plan.rows[-1].num_tokens

    def commit(self, batch: Sequence[Scheduled], sampled: Sequence[int]) -> list[tuple[Request, int]]:
        """Records that the tokens of `batch` are in the cache and that `sampled[i]` was chosen after row i.

        Returns:
          (request, token) for every token given out, in order; a request may have none or several (held-back tokens).
        """
        events: list[tuple[Request, int]] = []
        ended = False
        for row, token in zip(batch, sampled, strict=True):
            request, samples = row.request, row.samples
            if request.finished:
                continue
            request._num_cached += row.num_tokens
            if samples:
                events.extend((request, given) for given in self._extend(request, int(token)))
                ended = ended or request.finished
        if ended:
            self.running = [request for request in self.running if not request.finished]
        return events

    def _extend(self, request: Request, token: int) -> list[int]:
        """Appends a sampled token, which may end the request; returns the tokens that may now be given out."""
        request._sequence.append(token)
        count = request.num_generated
        reach = min(count, max(map(len, request.stop), default=0))
        tail = tuple(request._sequence[len(request._sequence) - reach :])
        matched = max((len(stop) for stop in request.stop if tail[reach - len(stop) :] == stop), default=0)
        if matched:
            end, reason = count - matched, "stop"
        elif count >= request.max_tokens or len(request._sequence) >= self.capacity:
            end, reason = count, "length"
        else:
            end, reason = count - held_back(tail, request.stop), None
        first = len(request.prompt)
        given = request._sequence[first + len(request.tokens) : first + end]
        request.tokens.extend(given)
        if reason:
            self._finish(request, reason)
        return given

    def _pending(self, request: Request) -> int:
        """Tokens of a request that are not in the cache yet."""
        return len(request._sequence) - request._num_cached

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _grows(self, request: Request) -> bool:
        """Whether a running request may need another page before it ends."""
        longest = min(len(request.prompt) + request.max_tokens, self.capacity)
        return self._pages_for(longest) > request._num_pages

    def _take(self, request: Request, count: int) -> bool:
        """Gives `count` more pages to a request; returns False and gives none if fewer are free."""
        pages = self.allocator.allocate(count, request._num_pages)
        if pages is None:
            return False
        assert request._page_row is not None
        request._page_row[request._num_pages : request._num_pages + count] = pages
        request._num_pages += count
        return True

    def _release(self, request: Request) -> None:
        """Frees all pages of a request, which loses its cached tokens."""
        if request._num_pages:
            assert request._page_row is not None
            self.allocator.free(request._page_row[: request._num_pages].tolist())
            request._page_row.fill(-1)
        if request._state >= 0:
            self._free_states.append(request._state)
        request._state = -1
        request._num_pages = 0
        request._num_cached = 0

    def _finish(self, request: Request, reason: str) -> None:
        self._release(request)
        request.finish_reason = reason

    def _grow_or_preempt(self, request: Request) -> bool:
        """Takes a page for a request's next token, if need be from the youngest; False if it was preempted itself."""
        missing = self._pages_for(len(request._sequence)) - request._num_pages
        while missing > 0 and not self._take(request, missing):
            preempted = self._youngest_with_page(request._num_pages % self.allocator.devices, request)
            self.running.remove(preempted)
            self._release(preempted)
            preempted.num_preemptions += 1
            self._put_back(preempted)
            if preempted is request:
                return False
        return True

    def _youngest_with_page(self, device: int, request: Request) -> Request:
        """The youngest running request with a page on `device`, but no older one than `request`."""
        # The first `device` columns lie on other devices.
        younger = itertools.takewhile(lambda other: other is not request, reversed(self.running))
        return next((other for other in younger if other._num_pages > device), request)

    def _put_back(self, request: Request) -> None:
        """Puts a preempted request into the queue, which stays in order of arrival."""
        # Older ones only if another group has preempted them.
        older = list(itertools.takewhile(lambda arrival: arrival < request._arrival, self.waiting))
        self.waiting[request._arrival] = request
        for arrival in (request._arrival, *reversed(older)):
            self.waiting.move_to_end(arrival, last=False)
