"""Requests over the groups of the axis "data": one queue, one scheduler a group, and all groups step together.

A request waits in one queue, in order of arrival, until a group has a place and pages for it. Then it goes to the group
with the least load of those that have: the tokens of its running requests, and the first group of several that are
equal. So no group is idle while requests wait, whatever the lengths of those that came before, and no request overtakes
the first in the queue. A preempted request returns to its place in that queue. It has no pages, so any group may take
it: it need not wait for the one that is short of them. Within a group the older request still comes first.

Nothing here depends on time, on identities of objects or on the order of sets: processes that make the same calls have
the same schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparse_mla_jax._check import require
from sparse_mla_jax.serving.scheduler import Queue, Request, Scheduled, Scheduler


class Groups:
    """The groups of requests of an engine. Used like a `Scheduler`, with one batch a group. Not thread-safe.

    Attributes:
      schedulers: one for each group, which share the queue `waiting`.
    """

    def __init__(self, schedulers: Sequence[Scheduler]):
        """Makes groups of schedulers without requests.

        Raises:
          ValueError: none, or schedulers that do not share one queue.
        """
        require(
            bool(schedulers) and all(one.waiting is schedulers[0].waiting for one in schedulers),
            "schedulers do not share one queue; make them with the same `waiting`, or with Groups.create.",
        )
        self.schedulers = tuple(schedulers)

    @classmethod
    def create(cls, count: int, make: Callable[[Queue], Scheduler]) -> Groups:
        """`count` groups; `make` gives a scheduler around the common queue."""
        queue = Queue()
        return cls([make(queue) for _ in range(count)])

    @property
    def waiting(self) -> Queue:
        """The queue, in order of arrival."""
        return self.schedulers[0].waiting

    @property
    def running(self) -> list[Request]:
        """The running requests of all groups, one group after the other."""
        return [request for one in self.schedulers for request in one.running]

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return any(one.has_work for one in self.schedulers)

    def add(self, request: Request) -> None:
        """As `Scheduler.add`: all groups have the same sizes, so the first decides whether the request can fit."""
        self.schedulers[0].add(request)

    def cancel(self, request: Request) -> bool:
        """As `Scheduler.cancel`."""
        return any(one.cancel(request) for one in self.schedulers)

    def abort(self, message: str) -> list[Request]:
        """As `Scheduler.abort`."""
        return [request for one in self.schedulers for request in one.abort(message)]

    def schedule(self) -> list[list[Scheduled]]:
        """Chooses the rows of the next step for every group; all are empty only if no request waits or runs."""
        plans = [one.resume() for one in self.schedulers]
        while self.waiting:
            request = next(iter(self.waiting.values()))
            able = [pair for pair in zip(self.schedulers, plans) if pair[0].can_admit(request, pair[1])]
            if not able:
                break
            scheduler, plan = min(able, key=lambda pair: pair[0].load)
            scheduler.admit(request, plan)
        return [plan.rows for plan in plans]

    def commit(
        self, batches: Sequence[Sequence[Scheduled]], sampled: Sequence[Sequence[int]]
    ) -> list[tuple[Request, int]]:
        """As `Scheduler.commit`, one group after the other; sampled[g][i] belongs to row i of group g."""
        groups = zip(self.schedulers, batches, sampled, strict=True)
        return [event for one, batch, tokens in groups for event in one.commit(batch, tokens)]
