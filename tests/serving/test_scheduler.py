"""The scheduling policy, on a fake model that reads its own pages: wrong pages or order show in the tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import VOCABULARY, FakeEngine, expected

from sparse_mla_jax.serving.pages import PageAllocator
from sparse_mla_jax.serving.scheduler import Request, Scheduler, held_back


def test_one_request():
    engine, request = FakeEngine(), Request((1, 2, 3), max_tokens=5)
    engine.scheduler.add(request)
    events = engine.run()
    assert [token for _, token in events] == request.tokens == expected(request)[0]
    assert request.finish_reason == "length" and request.finished
    assert engine.scheduler.allocator.num_used == 0


def test_decode_comes_first_and_prefill_is_chunked():
    engine = FakeEngine(token_budget=8)
    first, second = Request((1, 2), max_tokens=9), Request(tuple(range(20)), max_tokens=2)
    engine.scheduler.add(first)
    engine.step()
    engine.scheduler.add(second)
    engine.run()
    assert engine.batches[0] == [(first, 2)]
    assert engine.batches[1:4] == [[(first, 1), (second, 7)], [(first, 1), (second, 7)], [(first, 1), (second, 6)]]
    assert engine.batches[4] == [(first, 1), (second, 1)]


def test_prompts_share_one_step():
    engine = FakeEngine(token_budget=8)
    requests = [Request((i, 1, 2), max_tokens=1) for i in range(3)]
    for request in requests:
        engine.scheduler.add(request)
    engine.step()
    assert engine.batches[0] == [(requests[0], 3), (requests[1], 3), (requests[2], 2)]


def test_nobody_overtakes_the_queue():
    engine = FakeEngine(num_pages=4, page_size=4, max_context=16)
    big, small = Request((1,) * 12, max_tokens=2), Request((1,), max_tokens=2)
    running = Request((1,) * 5, max_tokens=3)
    for request in (running, big, small):
        engine.scheduler.add(request)
    engine.step()
    assert engine.scheduler.running == [running]
    engine.run()
    assert small.finish_reason == big.finish_reason == "length"


def test_enough_pages_for_everybody_admit_everybody_and_preempt_nobody():
    """Each request may fill the context; the last one enters although the others hold all pages they can use."""
    engine = FakeEngine(num_pages=4 * 10, page_size=4, max_batch=4, max_context=40, token_budget=16)
    requests = [Request((i,) * 34, max_tokens=40) for i in range(4)]
    for request in requests:
        engine.scheduler.add(request)
    most = 0
    while engine.scheduler.has_work:
        engine.step()
        most = max(most, len(engine.scheduler.running))
    assert most >= 3 and [request.num_preemptions for request in requests] == [0] * 4
    engine = FakeEngine(num_pages=2 * 10, page_size=4, max_batch=2, max_context=40, token_budget=40)
    first, second = Request((1,) * 36, max_tokens=40), Request((2,) * 37, max_tokens=40)
    engine.scheduler.add(first)
    engine.step()
    engine.step()
    engine.scheduler.add(second)
    engine.step()
    assert engine.scheduler.running == [first, second]


def test_the_youngest_is_preempted_and_resumes_with_the_same_tokens():
    engine = FakeEngine(num_pages=6, page_size=2, max_context=12, max_batch=3)
    requests = [Request((i, i + 1, i), max_tokens=8, seed=i) for i in range(3)]
    for request in requests:
        engine.scheduler.add(request)
    engine.run()
    assert requests[0].num_preemptions == 0
    assert sum(request.num_preemptions for request in requests) >= 1
    for request in requests:
        assert (request.tokens, request.finish_reason) == expected(request)
    assert engine.scheduler.allocator.num_used == 0


def test_a_prompt_that_can_never_fit_is_refused_and_others_go_on():
    engine = FakeEngine(num_pages=4, page_size=4, max_context=100)
    good, bad, empty = Request((1, 2), max_tokens=3), Request((1,) * 16), Request(())
    for request in (bad, good, empty):
        engine.scheduler.add(request)
    assert bad.finish_reason == empty.finish_reason == "error"
    assert "prompt has 16 tokens; at most 15 fit" in bad.error and "4 pages of 4 tokens" in bad.error
    assert "empty" in empty.error
    engine.run()
    assert good.tokens == expected(good)[0]
    assert engine.scheduler.cancel(bad) is False and bad.finish_reason == "error"


@pytest.mark.parametrize(("pages", "context", "total"), [(100, 10, 10), (2, 100, 8)])
def test_a_sequence_is_cut_where_the_context_or_the_cache_ends(pages, context, total):
    engine, request = FakeEngine(num_pages=pages, max_context=context), Request((1, 2, 3), max_tokens=50)
    engine.scheduler.add(request)
    engine.run()
    assert len(request.prompt) + len(request.tokens) == total
    assert request.finish_reason == "length"


def test_longest_prompt_gives_one_token():
    engine, request = FakeEngine(max_context=10), Request((1,) * 9, max_tokens=5)
    engine.scheduler.add(request)
    engine.run()
    assert len(request.tokens) == 1 and request.finish_reason == "length"


def test_stop_sequences_end_before_the_stop_and_never_leak():
    free = Request((1, 2, 3), max_tokens=30)
    text = expected(free)[0]
    for length in (1, 2, 3):
        for at in (0, 4, 9):
            stop = tuple(text[at : at + length])
            request = Request((1, 2, 3), max_tokens=30, stop=(stop, (99,)))
            engine = FakeEngine()
            engine.scheduler.add(request)
            events = engine.run()
            assert (request.tokens, request.finish_reason) == expected(request)
            assert request.finish_reason == "stop"
            assert [token for _, token in events] == request.tokens


def test_held_back_tokens_come_out_when_the_stop_does_not_come():
    free = Request((1, 2, 3), max_tokens=6)
    text = expected(free)[0]
    # The stop sequence begins with the last three tokens and can not complete.
    request = Request((1, 2, 3), max_tokens=6, stop=((*text[-3:], 100),))
    engine = FakeEngine()
    engine.scheduler.add(request)
    per_step = []
    while engine.scheduler.has_work:
        per_step.append([token for _, token in engine.step()])
    assert [token for step in per_step for token in step] == request.tokens == text
    assert request.finish_reason == "length"
    assert len(per_step[-1]) == 3 and per_step[-2] == []


@pytest.mark.parametrize(
    ("generated", "stop", "count"),
    [
        ([], [(1, 2)], 0),
        ([1], [(1, 2)], 1),
        ([1, 2], [(1, 2)], 0),
        ([1, 1], [(1, 1, 2)], 2),
        ([3, 1, 1, 1], [(1, 1, 2)], 2),
    ],
)
def test_held_back(generated, stop, count):
    assert held_back(generated, stop) == count


@settings(deadline=None, max_examples=100, database=None)
@given(
    st.lists(st.integers(0, 2), max_size=30), st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=3)
)
def test_held_back_is_the_longest_suffix_that_begins_a_stop(generated, stop):
    suffixes = [generated[-n:] for n in range(1, len(generated) + 1)]
    brute = max((len(s) for s in suffixes for stop_ in stop if len(s) < len(stop_) and stop_[: len(s)] == s), default=0)
    assert held_back(generated, stop) == brute


def test_cancellation_waiting_running_and_finished():
    engine = FakeEngine(max_batch=1)
    first, second, third = (Request((1, 2, i), max_tokens=4) for i in range(3))
    for request in (first, second, third):
        engine.scheduler.add(request)
    engine.step()
    assert engine.scheduler.cancel(second) and second.finish_reason == "cancelled"
    assert engine.scheduler.cancel(first) and engine.scheduler.allocator.num_used == 0
    assert not engine.scheduler.cancel(first)
    engine.run()
    assert third.tokens == expected(third)[0]
    assert not engine.scheduler.cancel(third) and third.finish_reason == "length"
    assert not engine.scheduler.cancel(Request((1,)))


def test_cancellation_between_schedule_and_commit():
    engine = FakeEngine()
    first, second = Request((1, 2), max_tokens=3), Request((3, 4), max_tokens=3)
    engine.scheduler.add(first)
    engine.scheduler.add(second)
    batch = engine.scheduler.schedule()
    sampled = [engine.model(row) for row in batch]
    engine.scheduler.cancel(first)
    assert engine.scheduler.commit(batch, sampled) == [(second, sampled[1])]
    assert first.tokens == [] and first not in engine.scheduler.running
    engine.run()
    assert second.tokens == expected(second)[0]


def test_abort_ends_everything_and_returns_the_pages():
    engine = FakeEngine(max_batch=2)
    requests = [Request((1, 2, i)) for i in range(5)]
    for request in requests:
        engine.scheduler.add(request)
    engine.step()
    assert engine.scheduler.abort("the device is gone") == requests
    assert {request.finish_reason for request in requests} == {"error"}
    assert {request.error for request in requests} == {"the device is gone"}
    assert engine.scheduler.allocator.num_used == 0 and not engine.scheduler.has_work


@pytest.mark.parametrize("name", ["page_size", "max_batch", "max_context", "token_budget"])
def test_bad_sizes(name):
    sizes = {"page_size": 4, "max_batch": 2, "max_context": 8, "token_budget": 4, name: 0}
    with pytest.raises(ValueError, match=rf"{name} is 0"):
        Scheduler(PageAllocator(2), **sizes)


def test_budget_below_batch():
    with pytest.raises(ValueError, match="below max_batch"):
        Scheduler(PageAllocator(2), page_size=4, max_batch=5, max_context=8, token_budget=4)


@pytest.mark.parametrize("seed", range(3))
def test_no_page_leaks_over_a_thousand_random_requests_with_cancellations(seed):
    """Few pages, so that preemption is common; every request that is not cancelled gets the tokens it gets alone."""
    rng = random.Random(seed)
    engine = FakeEngine(num_pages=12, page_size=3, max_batch=5, max_context=30, token_budget=11)
    scheduler, requests, live = engine.scheduler, [], []
    while len(requests) < 1000 or scheduler.has_work:
        if len(requests) < 1000:
            for _ in range(rng.randrange(3)):
                prompt = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 1, 2, 5, 11, 20, 29, 30, 50])))
                stop = tuple(
                    tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 3))) for _ in range(rng.randrange(3))
                )
                requests.append(Request(prompt, max_tokens=rng.randint(1, 20), seed=rng.randrange(5), stop=stop))
                scheduler.add(requests[-1])
                live.append(requests[-1])
        live = [request for request in live if not request.finished]
        if live and rng.random() < 0.15:
            scheduler.cancel(rng.choice(live))
        engine.step()
    assert scheduler.allocator.num_used == 0
    assert sum(request.num_preemptions for request in requests) > 20
    reasons = {request.finish_reason for request in requests}
    assert reasons == {"stop", "length", "cancelled", "error"}
    for request in requests:
        assert request._num_pages == 0
        if request.finish_reason == "error":
            assert len(request.prompt) not in range(1, 30) and request.tokens == []
        elif request.finish_reason == "cancelled":
            assert request.tokens == expected(request, 30)[0][: len(request.tokens)]
        else:
            assert (request.tokens, request.finish_reason) == expected(request, 30)
