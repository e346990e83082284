"""compressor: entries of any mix of requests and chunkings, against the definition on whole sequences and bit for bit.

Bound on entries of float32 caches: 5e-6 absolute (entries are of the order of 1; the largest seen is 3.4e-6), beside
the rounding of what other caches hold: half a unit in the last place, and half a subnormal code of FP8.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compressor import BF16, E8M0, F32, FN, FNUZ, Case, run, same, step
from support.equivalence import bits
from support.marks import interpreted, slow

from sparse_mla_jax.ops.compressor import CompressorState, entry_pages, num_entries

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("compressor")

CASES = [
    # Pages larger and smaller than a window, and every type of cache.
    Case(4, True, 8),
    Case(4, True, 2, BF16),
    Case(4, True, 4, FN, 20, 4, 8, E8M0),
    Case(4, True, 4, FNUZ, 16, 6, 0),
    Case(8, False, 4, FNUZ),
    # No rotation, odd widths, other ratios.
    Case(8, True, 8, F32, 7, 0, 0),
    Case(3, False, 6, F32, 10, 2),
]
MORE = [
    Case(4, True, 16, FNUZ),
    Case(4, True, 8, FN, 16, 16, 0),
    Case(4, True, 8, BF16, 12, 2, 0),
    Case(8, False, 16, F32, 12, 6, 0),
    Case(1, True, 2, FN, 12, 4),
    Case(32, False, 8, FNUZ, 12, 4, 4, E8M0),
]
PUBLISHED = [
    Case(4, True, 64, FN, 128, 64, 0),
    Case(128, False, 64, FNUZ, 512, 64, 64, E8M0),
]
MORE_PUBLISHED = [
    Case(4, True, 64, FNUZ, 512, 64, 64, E8M0),
    Case(128, False, 256, F32, 512, 64, 64),
]


def cases(quick, more=()):
    return pytest.mark.parametrize("case", [*quick, *map(slow, more)], ids=str)


def named_cases(quick, more, interpret):
    """XLA body and kernel; the kernel in interpret mode, by default of the cases in `interpret` alone."""
    kernel = [("triton", case) if case in interpret else interpreted("triton", case) for case in quick]
    every = [*(("xla", case) for case in quick), *kernel, *(slow(name, c) for name in ("xla", "triton") for c in more)]
    return pytest.mark.parametrize(("name", "case"), every, ids=str)


@cases(CASES, MORE)
def test_against_the_definition(implementation, case):
    """Prefill chunks, decode tokens and requests at rest in one step; NaN wherever nothing may be read."""
    steps = [(0, 5, 11, 1), (case.ratio, 1, 4, 1), (1, 12, 0, 1), (9, 1, 1, 0), (1, 2, 2, 1)]
    check_run(case, steps, implementation)


# As machine code in test_cdna_kernels.
@cases(PUBLISHED, MORE_PUBLISHED)
@pytest.mark.parametrize("name", ["reference", "xla", interpreted("triton")])
def test_published_sizes(name, case):
    check_run(case, [(0, 5, 100, 1), (2 * case.ratio, 1, 28, 1), (1, 3, 1, 1)], name)


def check_run(case, steps, implementation):
    total = np.sum(steps, axis=0)
    kv, gate = case.tokens(len(total), total.max())
    table, pages = case.table(len(total), total.max())
    cache, state = case.cache(pages, np.nan), case.state(len(total) + 2, np.nan)
    tokens = int(np.sum(steps, axis=1).max()) + 3
    ids = np.array([4, 1, 5, 2], np.int32)
    after, kept = run(case, kv, gate, steps, table, cache, state, tokens=tokens, implementation=implementation, ids=ids)
    slots, used = case.slots(table, total.max() // case.ratio), np.zeros(after.num_slots, bool)
    found, want = case.entries(after, slots), case.expected(kv, gate)
    kept, before = jax.tree.map(np.asarray, (kept, state))
    for b, n in enumerate(total):
        closed = n // case.ratio
        used[slots[b, :closed]] = True
        case.check(found[b, :closed], want[b, :closed])
        rows = case.ring(kv[b, :n], gate[b, :n], jax.tree.map(lambda x, b=b: x[ids[b]], before))
        same((kept.kv[ids[b]], kept.gate[ids[b]]), rows)
    # Nothing else is touched.
    untouched = [jax.tree.map(lambda x: np.asarray(x).reshape(cache.num_slots, -1)[~used], x) for x in (after, cache)]
    same(*untouched)
    same(*(jax.tree.map(lambda x: x[np.array([0, 3])], x) for x in (kept, before)))


# --- one result from every way to cut a sequence
SPLIT = [
    Case(4, True, 2, FNUZ),
    Case(16, True, 8, F32, 20, 6, 4),
    Case(8, False, 16, FN, 20, 4, 8, E8M0),
]
MORE_SPLIT = [
    Case(4, True, 8),
    Case(4, True, 4, FN, 16, 6, 0),
    Case(32, False, 16, F32, 10, 2, 0),
]
LENGTHS = (70, 33, 47)


@functools.cache
def whole(case, name):
    """Entries and state of three sequences, each prefilled in one step by itself."""
    kv, gate = case.tokens(3, max(LENGTHS))
    table, pages = case.table(3, max(LENGTHS))
    cache, state = case.cache(pages), case.state(3)
    for b, n in enumerate(LENGTHS):
        steps = [[n if i == b else 0 for i in range(3)]]
        cache, state = run(case, kv, gate, steps, table, cache, state, tokens=70, implementation=name)
    return kv, gate, table, pages, (cache, state)


@st.composite
def chunkings(draw):
    """Steps of at most 16 tokens that take in three sequences, decode steps among them."""
    left, steps = np.array(LENGTHS), []
    while left.any():
        most, lengths = draw(st.sampled_from([3, 16])), []
        for n in left:
            lengths.append(min(int(n), draw(st.sampled_from([0, 1, 1, 2, 3, 4, 7, 8, 13])), most - sum(lengths)))
        if not sum(lengths):
            lengths[int(np.argmax(left))] = 1
        left -= lengths
        steps.append(lengths)
    return steps


@named_cases(SPLIT, MORE_SPLIT, SPLIT[:1])
@given(steps=chunkings())
@settings(deadline=None, max_examples=4, database=None)
def test_any_chunking_gives_the_same_bits(case, name, steps):
    kv, gate, table, pages, want = whole(case, name)
    same(run(case, kv, gate, steps, table, case.cache(pages), case.state(3), tokens=16, implementation=name), want)


@named_cases(SPLIT, MORE_SPLIT, ())
def test_decode_gives_the_bits_of_prefill(case, name):
    """Token by token, through the decode step's metadata, in which padded requests keep their row."""
    kv, gate, table, pages, want = whole(case, name)
    cache, state = case.cache(pages), case.state(3)
    for t in range(max(LENGTHS)):
        seq_lens = np.array([t + 1 if t < n else 0 for n in LENGTHS], np.int32)
        rows = (np.where((seq_lens > 0)[:, None], x[:, t], np.nan) for x in (kv, gate))
        how: Any = dict(page_size=case.page_size, decode=True, implementation=name)
        cache, state = step(cache, state, *rows, case.weights(), table, seq_lens, None, **how)
    same((cache, state), want)


@named_cases(PUBLISHED, MORE_PUBLISHED, ())
def test_published_sizes_give_the_same_bits(case, name):
    kv, gate = case.tokens(2, 260)
    table, pages = case.table(2, 260)
    results = []
    for steps in ([(260, 131)], [(3, 131), (255, 0), (1, 0), (1, 0)], [(127, 60), (1, 70), (127, 0), (5, 1)]):
        cache, state = case.cache(pages), case.state(2)
        tokens = int(np.sum(steps, axis=1).max())
        results.append(run(case, kv, gate, steps, table, cache, state, tokens=tokens, implementation=name))
    same(results[1], results[0])
    same(results[2], results[0])


# --- properties one by one
@pytest.mark.parametrize(
    ("name", "ratio", "overlap"),
    [(name, *sizes) for name in ("reference", "xla") for sizes in ((4, True), (128, False))]
    + [("triton", 4, True), interpreted("triton", 128, False)],
)
def test_a_window_closes_with_its_last_token(name, ratio, overlap):
    case = Case(ratio, overlap, ratio, F32, 8, 2)
    kv, gate = case.tokens(1, 256)
    table, pages = case.table(1, 256)
    cache, state, stored = case.cache(pages), case.state(1), []
    for t in range(256):
        how: Any = dict(page_size=case.page_size, implementation=name)
        at = (table, np.array([t + 1]), np.array([1]))
        after, state = step(cache, state, kv[:, t], gate[:, t], case.weights(), *at, **how)
        if any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (bits(cache), bits(after))))):
            stored.append(t)
        cache = after
    assert stored == list(range(ratio - 1, 256, ratio))
    assert {3, 7, 127, 255} <= set(stored) if ratio == 4 else stored == [127, 255]


def test_the_position_bias_is_that_of_the_place_in_the_window(implementation):
    """A bias that leaves one token: the entry is that token's contribution, of whichever step it came."""
    case = Case(4, False, 4, F32, 8, 0, 0)
    kv, gate = case.tokens(1, 8)
    table, pages = case.table(1, 8)
    how: Any = dict(page_size=4, implementation=implementation)
    for row in range(4):
        bias = np.where(np.arange(4)[:, None] == row, np.float32(200), np.zeros((4, 8), np.float32))
        weights = bias, np.ones(8, np.float32), np.zeros(0, np.float32)
        cache, state = case.cache(pages), case.state(1)
        for at, n in ((0, 3), (3, 2), (5, 3)):
            rows = (np.resize(x[0, at : at + n], (3, 8)) for x in (kv, gate))
            cache, state = step(cache, state, *rows, weights, table, np.array([at + n]), np.array([n]), **how)
        alone = kv[0, [row, 4 + row]]
        want = alone / np.sqrt((alone**2).mean(axis=1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(case.entries(cache, case.slots(table, 2))[0], want, rtol=1e-6, atol=1e-6)


def test_an_entry_without_a_page_is_not_stored(implementation):
    case = Case(4, True, 4)
    kv, gate = case.tokens(2, 16)
    table, pages = case.table(2, 16)
    holes = table.copy()
    holes[0, 2] = holes[1, 0] = -1
    holes[1, 1] = pages
    how: Any = dict(tokens=32, implementation=implementation)
    want, kept = run(case, kv, gate, [(16, 16)], table, case.cache(pages, np.nan), case.state(2), **how)
    after, state = run(case, kv, gate, [(16, 16)], holes, case.cache(pages, np.nan), case.state(2), **how)
    slots = case.slots(table, 4)
    missing = [slots[0, 2], slots[1, 0], slots[1, 1]]
    same(state, kept)
    others = np.setdiff1d(np.arange(after.num_slots), missing)
    for chosen, expected in ((others, want), (missing, case.cache(pages, np.nan))):
        trees = (after, expected)
        same(*(jax.tree.map(lambda x: np.asarray(x).reshape(after.num_slots, -1)[chosen], x) for x in trees))  # noqa: B023


def test_a_row_of_the_state_serves_the_next_request(implementation):
    """After preemption another request has the row, from position 0: what lay there is never seen."""
    case = Case(4, True, 4)
    kv, gate = case.tokens(2, 11)
    table, pages = case.table(2, 11)
    how: Any = dict(tokens=11, implementation=implementation)
    bad, _ = case.tokens(1, 11, seed=5)
    cache, state = run(case, bad * np.nan, bad, [[11]], table[1:], case.cache(pages), case.state(1), **how)
    for steps in ([[11]], [[1], [4], [6]]):
        got, kept = run(case, kv[:1], gate[:1], steps, table[:1], cache, state, **how)
        case.check(case.entries(got, case.slots(table[:1], 2))[0], case.expected(kv[:1], gate[:1])[0])
        assert np.isfinite(kept.kv).all()


def test_requests_without_a_row_store_nothing(implementation):
    case = Case(4, True, 4)
    kv, gate = case.tokens(4, 8)
    table, pages = case.table(4, 8)
    ids = np.array([-1, 1, 2, 2**31 - 1], np.int32)
    cache, state = case.cache(pages), case.state(2)
    after, kept = run(
        case, kv, gate, [(8, 8, 8, 8)], table, cache, state, tokens=32, ids=ids, implementation=implementation
    )
    slots = case.slots(table, 2)
    case.check(case.entries(after, slots[1]), case.expected(kv, gate)[1])
    assert (case.entries(after, slots[[0, 2, 3]]) == 0).all()
    same(kept.kv[0], state.kv[0])
    np.testing.assert_array_equal(np.asarray(kept.kv[1]), kv[1])


@pytest.mark.parametrize("name", ["xla", interpreted("triton")])
def test_rows_of_the_state_in_any_order(name):
    case = Case(4, True, 4)
    kv, gate, table, pages, want = whole(case, name)
    ids = np.array([2, 0, 1], np.int32)
    steps = [(30, 20, 10), (40, 13, 37)]
    how: Any = dict(tokens=90, implementation=name, ids=ids)
    cache, state = run(case, kv, gate, steps, table, case.cache(pages), case.state(3), **how)
    same((cache, jax.tree.map(lambda x: x[ids], state)), want)


@pytest.mark.parametrize(("tokens", "requests"), [(0, 2), (0, 0), (5, 0)])
def test_nothing_to_do(implementation, tokens, requests):
    case = Case(4, True, 4, FNUZ)
    cache, state = case.cache(3, np.nan), case.state(2, np.nan)
    kv, gate = case.tokens(tokens)
    table, none = np.zeros((requests, 2), np.int32), np.zeros(requests, np.int32)
    how: Any = dict(page_size=4, implementation=implementation)
    same(step(cache, state, kv, gate, case.weights(), table, none, none, **how), (cache, state))


def test_a_step_of_padding_only(implementation):
    case = Case(4, True, 4)
    cache, state = case.cache(3, np.nan), case.state(2, np.nan)
    kv = gate = np.full((6, case.channels), np.nan, np.float32)
    table, none = np.zeros((2, 2), np.int32), np.zeros(2, np.int32)
    how: Any = dict(page_size=4, implementation=implementation)
    same(step(cache, state, kv, gate, case.weights(), table, none, none, **how), (cache, state))


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_tokens_past_the_page_table_are_padding(name):
    """A request longer than its pages: what fits is as ever, the rest is dropped, others are not disturbed."""
    case = Case(4, True, 4)
    kv, gate = case.tokens(3, 21)
    table, pages = case.table(3, 8)
    how: Any = dict(tokens=28, implementation=name)
    steps = [(8, 12, 8), (8, 8, 0), (1, 1, 0)]
    after = run(case, kv, gate, steps, table, case.cache(pages), case.state(3), **how)
    want = run(case, kv, gate, [(8, 8, 8)], table, case.cache(pages), case.state(3), **how)
    same(after, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_tokens_of_any_floating_type(dtype):
    case = Case(4, True, 4)
    kv, gate = (x.astype(dtype) for x in case.tokens(8))
    table, pages = case.table(1, 8)
    at = (table, np.array([8]), np.array([8]))
    how: Any = dict(page_size=4, implementation=None)
    results = [
        step(case.cache(pages), case.state(1), *rows, case.weights(), *at, **how)
        for rows in ((kv, gate), (kv.astype(np.float32), gate.astype(np.float32)))
    ]
    same(*results)


# --- pages of entries
def test_entry_pages():
    table = np.arange(10, dtype=np.int32).reshape(1, 10)
    for page_size, ratio, want, entries in [
        (64, 4, range(10), 16),
        (4, 4, range(10), 1),
        (256, 128, range(10), 2),
        (64, 128, [1, 3, 5, 7, 9], 1),
        (16, 64, [3, 7], 1),
        (1, 4, [3, 7], 1),
    ]:
        got, count = entry_pages(jnp.asarray(table), page_size=page_size, ratio=ratio)
        assert got.tolist() == [list(want)] and count == entries
    # The page of an entry is that of the token that closes its window.
    for page_size, ratio in ((16, 4), (4, 16)):
        pages, entries = entry_pages(jnp.asarray(table), page_size=page_size, ratio=ratio)
        for window in range(10 * page_size // ratio):
            assert pages[0, window // entries] == table[0, ((window + 1) * ratio - 1) // page_size]


def test_num_entries():
    lengths = jnp.asarray([-1, 0, 3, 4, 7, 8, 127, 128])
    assert num_entries(lengths, ratio=4).tolist() == [0, 0, 0, 1, 1, 2, 31, 32]


def test_state_sizes():
    state = CompressorState.create(3, ratio=4, dim=512, overlap=True)
    assert state.kv.shape == state.gate.shape == (3, 8, 1024) and state.bytes_per_request == 2 * 8 * 1024 * 4
    state = CompressorState.create(3, ratio=128, dim=512, overlap=False)
    assert state.kv.shape == (3, 128, 512) and state.bytes_per_request == 2 * 128 * 512 * 4
