"""window: slots of rings against a loop, and that no visible position is overwritten within a step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.equivalence import counted

from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedKVCache, gather, write
from sparse_mla_jax.ops.ragged import combine_with_window, slots_from_positions
from sparse_mla_jax.ops.window import ring_size, ring_slots, window_slots


def by_loop(positions, states, window, ring):
    rows = np.full((len(positions), window), -1, np.int32)
    for t, (position, state) in enumerate(zip(positions, states)):
        if state >= 0:
            seen = range(max(0, position - window + 1), position + 1)
            rows[t, : len(seen)] = [state * ring + p % ring for p in seen]
    return rows


@settings(max_examples=50, deadline=None, database=None)
@given(
    # Few lengths, since each is a compilation.
    st.sampled_from([0, 1, 8]).flatmap(
        lambda n: st.lists(st.tuples(st.integers(-2, 400), st.integers(-1, 5)), min_size=n, max_size=n)
    ),
    st.sampled_from([1, 2, 7, 20]),
    st.integers(1, 9),
)
def test_equals_a_loop(tokens, window, query_len):
    positions, states = (np.array([t[i] for t in tokens], np.int32) for i in (0, 1))
    ring = ring_size(window, query_len)
    rows = window_slots(positions, states, window=window, ring=ring)
    assert rows.dtype == jnp.int32
    np.testing.assert_array_equal(rows, by_loop(positions, states, window, ring))
    own = ring_slots(positions, states, ring=ring)
    want = np.where((positions >= 0) & (states >= 0), states * ring + positions % ring, -1)
    np.testing.assert_array_equal(own, want)


@pytest.mark.parametrize("start", [0, 1, 5, 100])
def test_a_step_overwrites_nothing_that_it_sees(start):
    """Every row names each of its positions once the whole step is written, and the ring has no slot to spare."""
    window, query_len = 6, 9
    ring = ring_size(window, query_len)
    held = {}
    for position in range(start + query_len):
        held[position % ring] = position
    positions = np.arange(start, start + query_len, dtype=np.int32)
    rows = np.asarray(window_slots(positions, np.zeros(query_len, np.int32), window=window, ring=ring))
    for position, row in zip(positions, rows):
        assert [held[slot] for slot in row[row >= 0]] == list(range(max(0, position - window + 1), position + 1))
    if start >= window:
        lost = {p % (ring - 1): p for p in range(start + query_len)}
        assert lost[(start - window + 1) % (ring - 1)] != start - window + 1


def test_gathered_prefill_equals_the_caches_themselves():
    """Two requests' chunks: rows into one gathered array against window and entries as two sources."""
    rng, window, chunk, ratio = np.random.default_rng(0), 6, 5, 4
    ring, lengths = ring_size(window, chunk), (23, 9)
    near, far = (
        PagedKVCache.create(pages, size, latent_dim=12, rope_dim=4, group_size=4, dtype="float32")
        for pages, size in ((2, ring), (6, 4))
    )
    table = np.array([[4, 0], [2, 5]])
    for state, length in enumerate(lengths):
        rows = rng.standard_normal((length, 16)).astype(np.float32)
        slots = ring_slots(np.arange(length), np.full(length, state), ring=ring)[-ring:]
        near = write(near, rows[-ring:, :12], rows[-ring:, 12:], slots)
        entries = np.arange(length // ratio)
        rows = rng.standard_normal((len(entries), 16)).astype(np.float32)
        slots = slots_from_positions(entries[:, None], np.full(len(entries), state), table, page_size=4)[:, 0]
        far = write(far, rows[:, :12], rows[:, 12:], slots)

    requests = np.repeat([0, 1], chunk)
    positions = np.concatenate([np.arange(length - chunk, length) for length in lengths])
    chosen = np.where(rng.random((10, 5)) < 0.7, np.arange(5), -1)
    chosen = np.where(chosen < ((positions + 1) // ratio)[:, None], chosen, -1)
    q = rng.standard_normal((10, 3, 16)).astype(np.float32)
    options = dict(sm_scale=0.25, value_dim=16, sinks=jnp.ones(3, jnp.float32))
    two = sparse_mla(
        q,
        near,
        window_slots(positions, requests, window=window, ring=ring),
        extra=(far, slots_from_positions(chosen, requests, table, page_size=4)),
        **options,
    )
    # What the chunks can see: their entries, then the positions of the window before and of the chunk.
    first = [max(0, length - chunk - window + 1) for length in lengths]
    parts, compressed_start, window_start = [], [], []
    for state, length in enumerate(lengths):
        compressed_start.append(sum(map(len, parts)))
        entries = np.arange(length // ratio)[:, None]
        slots = slots_from_positions(entries, np.full(len(entries), state), table, page_size=4)[:, 0]
        parts.append(gather(far, slots, dtype=jnp.float32))
        window_start.append(sum(map(len, parts)))
        seen = np.arange(first[state], length)
        parts.append(gather(near, ring_slots(seen, np.full(len(seen), state), ring=ring), dtype=jnp.float32))
    rows = combine_with_window(
        chosen,
        positions,
        window=window,
        compressed_start=np.array(compressed_start)[requests],
        window_start=np.array(window_start)[requests],
        first_position=np.array(first)[requests],
    )
    one = sparse_mla(q, jnp.concatenate(parts), rows, **options)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_rings_of_requests_do_not_touch():
    rows = np.asarray(window_slots(np.array([50, 50, 50]), np.array([2, 0, 1]), window=4, ring=4))
    assert sorted(rows.reshape(-1)) == list(range(12))


def test_no_tokens_and_other_lengths_do_not_retrace():
    assert window_slots(np.zeros(0, np.int32), np.zeros(0, np.int32), window=3, ring=3).shape == (0, 3)
    body = functools.partial(window_slots, window=3, ring=5)
    rows = jax.jit(counted(lambda arrays: body(*arrays), "window_slots"))
    for position in (0, 7, 10**6):
        rows((np.full(4, position, np.int32), np.arange(4, dtype=np.int32)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: window_slots(np.zeros(2), np.zeros(2, int), window=3, ring=3), "positions is float"),
        (
            lambda: window_slots(np.zeros(2, int), np.zeros(3, int), window=3, ring=3),
            r"states is int32\[3\]",
        ),
        (lambda: window_slots(np.zeros(2, int), np.zeros(2, int), window=3, ring=2), "ring is 2"),
        (lambda: window_slots(np.zeros(2, int), np.zeros(2, int), window=0, ring=2), "window is 0"),
        (lambda: ring_slots(np.zeros((2, 1), int), np.zeros(2, int), ring=2), "positions is int"),
        (lambda: ring_slots(np.zeros(2, int), np.zeros(2, int), ring=True), "ring is True"),
        (lambda: ring_size(0, 1), "window is 0"),
        (lambda: ring_size(4, 0), "max_query_len is 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
