"""Groups of requests around one queue, and pages of a request over several devices, on the fake model."""

import random

import pytest
from support.fake_engine import VOCABULARY, FakeEngine, FakeGroups, expected
from support.marks import slow

from sparse_mla_jax.serving.balance import Groups
from sparse_mla_jax.serving.pages import PageAllocator
from sparse_mla_jax.serving.scheduler import Request, Scheduler

SIZES = {"page_size": 4, "max_batch": 4, "max_context": 40, "token_budget": 8}


def submit(groups, count, length=3, **options):
    requests = [Request((i % VOCABULARY,) * length, **options) for i in range(count)]
    for request in requests:
        groups.add(request)
    return requests


def test_requests_go_to_the_group_with_the_least_load():
    engine = FakeGroups(3, token_budget=20)
    requests = submit(engine.groups, 3, length=2) + submit(engine.groups, 1, length=9) + submit(engine.groups, 3)
    engine.step()
    # All three are equal: one each. Then the long one to the first, and the others where it is not.
    running = [one.running for one in engine.groups.schedulers]
    assert running == [[requests[0], requests[3]], [requests[1], requests[4], requests[6]], [requests[2], requests[5]]]
    assert [one.load for one in engine.groups.schedulers] == [13, 11, 7]
    engine.run()
    assert all(request.tokens == expected(request)[0] for request in requests)


def test_no_group_is_idle_while_requests_wait():
    """The requests of one group end early; those that wait go there, whoever came before."""
    engine = FakeGroups(2, max_batch=2, token_budget=16)
    long, short = submit(engine.groups, 1, max_tokens=30), submit(engine.groups, 1, max_tokens=2)
    long += submit(engine.groups, 1, max_tokens=30)
    short += submit(engine.groups, 5, max_tokens=2)
    steps = 0
    while not all(request.finished for request in short):
        engine.step()
        steps += 1
        rooms = [2 - len(one.running) for one in engine.groups.schedulers]
        assert not engine.groups.waiting or sum(rooms) <= 2
    assert steps < 15 and not any(request.finished for request in long)


def test_one_group_is_a_scheduler():
    """The same batches, step for step."""
    rng = random.Random(0)
    one, groups = FakeEngine(num_pages=12), FakeGroups(1, num_pages=12)
    for _ in range(60):
        prompt, most = (rng.randrange(VOCABULARY),) * rng.randint(1, 30), rng.randint(1, 9)
        one.scheduler.add(Request(prompt, max_tokens=most))
        groups.groups.add(Request(prompt, max_tokens=most))
    while one.scheduler.has_work:
        assert [token for _, token in one.step()] == [token for _, token in groups.step()]
    assert not groups.groups.has_work


def test_a_preempted_request_runs_where_there_is_room():
    """The first group has too few pages for its two, and the second has none left to run."""
    engine = FakeGroups(2, num_pages=5, page_size=2, max_context=10, token_budget=30)
    first, small = Request((1,) * 3, max_tokens=7), Request((2,), max_tokens=1)
    second, third = Request((3,) * 3, max_tokens=4), Request((4,) * 2, max_tokens=8)
    for request in (first, small, second):
        engine.groups.add(request)
    schedulers = engine.groups.schedulers
    engine.step()
    assert schedulers[0].running == [first] and schedulers[1].running == [second]
    engine.groups.add(third)
    moved = set()
    while engine.groups.has_work:
        engine.step()
        moved |= {(request._arrival, i) for i, one in enumerate(schedulers) for request in one.running}
    assert third.num_preemptions >= 1 and first.num_preemptions == 0
    assert {(third._arrival, 0), (third._arrival, 1)} <= moved
    for request in (first, second, third):
        assert request.tokens == expected(request, 10)[0]
    engine.check_empty()


def test_cancellation_and_abort_in_every_group():
    engine = FakeGroups(2, max_batch=1)
    requests = submit(engine.groups, 5, max_tokens=9)
    engine.step()
    assert [one.running for one in engine.groups.schedulers] == [[requests[0]], [requests[1]]]
    for i in (1, 3):
        assert engine.groups.cancel(requests[i]) and not engine.groups.cancel(requests[i])
    assert engine.groups.running == [requests[0]] and list(engine.groups.waiting.values()) == requests[2::2]
    assert engine.groups.abort("the device is gone") == [requests[0], requests[2], requests[4]]
    assert {request.error for request in requests[::2]} == {"the device is gone"}
    assert not engine.groups.has_work and not engine.groups.cancel(Request((1,)))
    engine.check_empty()


def test_groups_share_a_queue():
    with pytest.raises(ValueError, match="do not share one queue; make them with the same `waiting`"):
        Groups([Scheduler(PageAllocator(2), **SIZES) for _ in range(2)])
    with pytest.raises(ValueError, match="do not share"):
        Groups([])


# --- pages over several devices


def test_a_request_may_have_more_pages_than_a_device():
    engine = FakeEngine(num_pages=3, devices=3)
    request, other = Request((1, 2, 3), max_tokens=100), Request((1,) * 36)
    engine.scheduler.add(request)
    engine.run()
    assert len(request.tokens) == 33 and (request.tokens, "length") == expected(request, 36)
    engine.scheduler.add(other)
    assert "at most 35 fit" in other.error and "3 pages of 4 tokens on each of 3 devices" in other.error


def test_the_fullest_device_decides():
    """Short requests have their only page on the first device: pages elsewhere do not help."""
    engine = FakeEngine(num_pages=2, devices=2)
    requests = submit(engine.scheduler, 3, length=1, max_tokens=2)
    engine.step()
    assert engine.scheduler.running == requests[:2] and engine.scheduler.allocator.num_free == 2
    engine.run()
    assert [request.num_preemptions for request in requests] == [0, 0, 0]


def test_preemption_takes_a_page_of_the_device_that_lacks_one():
    """The youngest has no page on the second device; taking its pages would be of no use."""
    engine = FakeEngine(num_pages=3, devices=2, page_size=2, max_context=12, token_budget=12)
    oldest, middle = Request((1,) * 5, max_tokens=7), Request((2,) * 3, max_tokens=2)
    youngest = Request((3,), max_tokens=1)
    allocator = engine.scheduler.allocator
    for request in (oldest, middle):
        engine.scheduler.add(request)
    engine.step()
    # Four pages are taken; one more on the second device leaves none for the oldest there.
    taken = allocator.allocate(1, first=1)
    youngest._sequence, youngest._arrival, youngest._num_pages = [3, 3], 9, 1
    engine.scheduler.running.append(youngest)
    assert engine.scheduler._youngest_with_page(1, oldest) is middle
    assert engine.scheduler._youngest_with_page(0, oldest) is youngest
    assert engine.scheduler._youngest_with_page(1, youngest) is youngest
    engine.scheduler.running.remove(youngest)
    allocator.free(taken, first=1)
    engine.run()
    assert allocator.num_used == 0


def test_allocation_over_devices_is_all_or_nothing():
    allocator = PageAllocator(2, devices=3)
    assert [allocator.per_device(count, first) for count, first in ((0, 0), (4, 0), (4, 2), (7, 4))] == [
        [0, 0, 0],
        [2, 1, 1],
        [1, 1, 2],
        [2, 3, 2],
    ]
    pages = allocator.allocate(4)
    assert pages == [0, 0, 0, 1] and (allocator.num_free, allocator.num_used, allocator.num_pages) == (2, 4, 2)
    assert allocator.allocate(1) is None and allocator.allocate(1, first=4) == [1]
    with pytest.raises(ValueError, match="nobody owns it"):
        allocator.free(pages, first=2)
    assert allocator.num_used == 5
    allocator.free(pages)
    allocator.free([1], first=4)
    assert allocator.num_free == 6


@pytest.mark.parametrize(
    ("groups", "devices", "seed"), [(2, 2, 0), (1, 3, 1), slow(3, 1, 2), slow(2, 4, 3), slow(4, 2, 4)]
)
def test_no_page_leaks_over_300_random_requests(groups, devices, seed):
    """Few pages, so that preemption is common; every request that is not cancelled gets the tokens it gets alone."""
    rng = random.Random(seed)
    num_pages = max(5, -(-10 // devices))
    engine = FakeGroups(groups, num_pages=num_pages, devices=devices, page_size=3, max_context=30, token_budget=11)
    requests = []
    while len(requests) < 300 or engine.groups.has_work:
        for _ in range(rng.randrange(2 + groups) if len(requests) < 300 else 0):
            prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 2, 5, 11, 20, 29, 30])))
            stop = tuple((rng.randrange(VOCABULARY), rng.randrange(VOCABULARY)) for _ in range(rng.randrange(2)))
            requests.append(Request(prompt, max_tokens=rng.randint(1, 20), seed=rng.randrange(5), stop=stop))
            engine.groups.add(requests[-1])
        live = [request for request in requests if not request.finished]
        if live and rng.random() < 0.15:
            engine.groups.cancel(rng.choice(live))
        engine.step()
    engine.check_empty()
    assert sum(request.num_preemptions for request in requests) > 10
    assert {request.finish_reason for request in requests} == {"stop", "length", "cancelled", "error"}
    for request in requests:
        assert request._num_pages == 0
        if request.finish_reason == "error":
            assert len(request.prompt) == 30
        elif request.finish_reason == "cancelled":
            assert request.tokens == expected(request, 30)[0][: len(request.tokens)]
        else:
            assert (request.tokens, request.finish_reason) == expected(request, 30)


def test_the_same_calls_give_the_same_schedule():
    """As every process of a mesh needs: nothing depends on identities, time or order of hashes."""

    def serve():
        engine, steps = FakeGroups(2, num_pages=9, devices=2, max_context=30), []
        requests = submit(engine.groups, 9, length=13, max_tokens=9)
        numbers = {id(request): i for i, request in enumerate(requests)}
        while engine.groups.has_work:
            steps.append([(numbers[id(request)], token) for request, token in engine.step()])
        return steps, [request.num_preemptions for request in requests]

    assert serve() == serve()
