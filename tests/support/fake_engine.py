"""A fake model that reads its own pages, around schedulers: wrong pages or order show in the tokens."""

import numpy as np

from sparse_mla_jax.serving.balance import Groups
from sparse_mla_jax.serving.pages import PageAllocator
from sparse_mla_jax.serving.scheduler import Scheduler

VOCABULARY = 7


def next_token(tokens, seed):
    """The fake model: depends on every token and its position, and on the request's seed."""
    return int((np.dot(tokens, np.arange(1, len(tokens) + 1) ** 2 % 1009) + seed * 31) % VOCABULARY)


def expected(request, capacity=10**9):
    """What the fake model says about a request on its own, by a plain loop, with the reason of its end."""
    tokens = list(request.prompt)
    generated = []
    while True:
        generated.append(next_token(tokens, request.seed))
        tokens.append(generated[-1])
        ends = [len(s) for s in request.stop if tuple(generated[-len(s) :]) == s]
        if ends:
            return generated[: -max(ends)], "stop"
        if len(generated) == request.max_tokens or len(tokens) == capacity:
            return generated, "length"


class FakeEngine:
    """A scheduler around a cache of tokens: each step writes a row's tokens to its pages and reads all of them back."""

    def __init__(self, *, num_pages=16, devices=1, **sizes):
        sizes = {"page_size": 4, "max_batch": 4, "max_context": 40, "token_budget": 8, **sizes}
        self.scheduler = Scheduler(PageAllocator(num_pages, devices), **sizes)
        self.cache = np.full((devices, num_pages, self.scheduler.page_size), -1)
        self.batches = []

    def model(self, row):
        start, page_size = row.seq_len - row.num_tokens, self.scheduler.page_size
        columns = np.arange(row.seq_len) // page_size
        pages = row.page_row[columns]
        assert (pages >= 0).all()
        places = columns % len(self.cache), pages, np.arange(row.seq_len) % page_size
        self.cache[tuple(part[start:] for part in places)] = row.token_ids
        return next_token(self.cache[places], row.request.seed)

    def check(self, batch):
        """Limits of a step, one owner a page, and the order of arrival."""
        scheduler = self.scheduler
        assert len(batch) <= scheduler.max_batch and sum(row.num_tokens for row in batch) <= scheduler.token_budget
        assert all(row.num_tokens >= 1 for row in batch)
        owned = [
            (column % scheduler.allocator.devices, page)
            for request in scheduler.running
            for column, page in enumerate(request._page_row[: request._num_pages])
        ]
        assert len(owned) == len(set(owned)) == scheduler.allocator.num_used
        arrivals = [request._arrival for request in scheduler.running]
        assert arrivals == sorted(arrivals)
        assert list(scheduler.waiting) == sorted(scheduler.waiting)

    def step(self):
        scheduler = self.scheduler
        had_work = scheduler.has_work
        batch = scheduler.schedule()
        assert bool(batch) == had_work
        self.check(batch)
        arrivals = [request._arrival for request in [*scheduler.running, *scheduler.waiting.values()]]
        assert arrivals == sorted(arrivals)
        self.batches.append([(row.request, row.num_tokens) for row in batch])
        return scheduler.commit(batch, [self.model(row) for row in batch])

    def run(self):
        events = []
        while self.scheduler.has_work:
            events += self.step()
        return events


class FakeGroups:
    """Several of them that step together, around one queue."""

    def __init__(self, count, **options):
        self.engines = []

        def make(waiting):
            self.engines.append(FakeEngine(waiting=waiting, **options))
            return self.engines[-1].scheduler

        self.groups = Groups.create(count, make)

    def step(self):
        had_work = self.groups.has_work
        batches = self.groups.schedule()
        assert any(batches) == had_work
        for engine, batch in zip(self.engines, batches, strict=True):
            engine.check(batch)
        sampled = [[engine.model(row) for row in batch] for engine, batch in zip(self.engines, batches, strict=True)]
        return self.groups.commit(batches, sampled)

    def run(self):
        events = []
        while self.groups.has_work:
            events += self.step()
        return events

    def check_empty(self):
        """No page and no state is lost."""
        for engine in self.engines:
            scheduler = engine.scheduler
            assert scheduler.allocator.num_used == 0
            assert sorted(scheduler._free_states) == list(range(scheduler.max_batch))
