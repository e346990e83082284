"""compressor: entries of any mix of requests and chunkings, against the definition on whole sequences and bit for bit.

Bound on entries of float32 caches: 5e-6 absolute (entries are of the order of 1; the largest seen is 3.4e-6), beside
the rounding of what other caches hold: half a unit in the last place, and half a subnormal code of FP8.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import cdna
from pallas_kernels import compress as kernel
from pallas_kernels.cdna import lowering
from pallas_kernels.plans.compress import CompressPlan, compress_plan
from sparse_mla_jax import reference
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, gather, gather_index
from sparse_mla_jax.ops.compressor import CompressorState, compress, entry_pages, num_entries

FNUZ, FN, BF16, F32 = jnp.float8_e4m3fnuz, jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
FP8, E8M0 = (FNUZ, FN), jnp.float8_e8m0fnu
FIELDS = ("positions", "request_ids", "query_indptr", "seq_lens", "page_table", "page_size")


def plain_step(
    cache, state, kv, gate, weights, table, seq_lens, query_lens, ids=None, *, page_size, decode=False, implementation
):
    if decode:
        m = decode_metadata(seq_lens, table, page_size=page_size)
    else:
        m = build_metadata(seq_lens, query_lens, table, num_tokens=kv.shape[0], page_size=page_size)
    owners = {name: getattr(m, name) for name in FIELDS}
    how: Any = dict(ratio=weights[0].shape[0], implementation=implementation)
    return compress(cache, state, kv, gate, *weights, state_ids=ids, **owners, **how)


def compiled_anew():
    """`plain_step`, compiled anew."""
    return jax.jit(lambda *a, **k: plain_step(*a, **k), static_argnames=("page_size", "decode", "implementation"))


step = compiled_anew()


@dataclasses.dataclass(frozen=True)
class Case:
    """One compressor and its cache; `rope` values of `dim` are rotated; no `group`: an indexer's cache."""

    ratio: int
    overlap: bool
    page_size: int
    dtype: Any = F32
    dim: int = 12
    rope: int = 4
    group: int = 4
    scale_dtype: Any = F32

    def __str__(self):
        kinds = [jnp.dtype(d).name.removeprefix("float8_") for d in (self.dtype, self.scale_dtype)]
        sizes = (self.ratio, "overlap" if self.overlap else "alone", self.page_size, self.dim, self.rope, self.group)
        return "-".join(map(str, (*sizes, *kinds)))

    @property
    def channels(self):
        return self.dim * (1 + self.overlap)

    def tokens(self, *shape, seed=0):
        """kv and gate of tokens [..., C]."""
        rng = np.random.default_rng([seed, 7])
        kv, gate = (rng.standard_normal((*shape, self.channels)).astype(np.float32) for _ in range(2))
        return kv, 2 * gate

    def weights(self):
        rng = np.random.default_rng(self.ratio)
        bias, norm = (rng.standard_normal(n).astype(np.float32) for n in ((self.ratio, self.channels), self.dim))
        return bias, norm, (10.0 ** -np.arange(self.rope // 2)).astype(np.float32)

    def cache(self, pages, fill=None):
        """An empty cache, or one whose every byte is 0xFF (NaN)."""
        entries = max(1, self.page_size // self.ratio)
        if not self.group:
            cache: Any = PagedIndexCache.create(pages, entries, dim=self.dim, dtype=self.dtype)
        else:
            sizes: Any = dict(latent_dim=self.dim - self.rope, rope_dim=self.rope, group_size=self.group)
            cache = PagedKVCache.create(pages, entries, dtype=self.dtype, scale_dtype=self.scale_dtype, **sizes)
        return cache if fill is None else filled(cache)

    def state(self, requests, fill=None):
        state = CompressorState.create(requests, ratio=self.ratio, dim=self.dim, overlap=self.overlap)
        return state if fill is None else filled(state)

    def table(self, requests, length, seed=0):
        pages = -(-length // self.page_size)
        order = np.random.default_rng(seed).permutation(requests * pages + 3)
        return order[: requests * pages].reshape(requests, pages).astype(np.int32), order.size

    def slots(self, table, windows):
        """Slot of every entry of every request, [B, windows]."""
        table, entries = entry_pages(table, page_size=self.page_size, ratio=self.ratio)
        w = np.arange(windows)
        return np.asarray(table)[:, w // entries] * entries + w % entries

    def entries(self, cache, slots):
        """What the cache holds at slots[...], float32[..., dim]."""
        every = (gather_all if self.group else gather_all_keys)(cache)
        return np.asarray(every)[slots]

    def expected(self, kv, gate):
        """Entries of sequences kv[B, n, C] in float64, [B, n // ratio, dim]."""
        return definition(self, kv.tobytes(), gate.tobytes(), len(kv))

    def check(self, got, want):
        allowed = np.full(want.shape, 5e-6)
        latent = self.dim - self.rope if self.group else self.dim
        unit = {F32: 2.0**-24, BF16: 2.0**-8}.get(self.dtype, 2.0**-4)
        allowed[:, :latent] += unit * np.abs(want[:, :latent])
        if self.dtype in FP8:
            allowed[:, :latent] += 2.0**-10 / 224 * np.abs(want[:, :latent]).max(axis=1, keepdims=True)
        if self.dtype != F32:
            allowed[:, latent:] += 2.0**-8 * np.abs(want[:, latent:])
        assert np.isfinite(got).all()
        assert not got.size or (np.abs(got - want) <= allowed).all(), np.max(np.abs(got - want) / allowed)

    def ring(self, kv, gate, kept):
        """The state's row after a sequence: what its last S tokens left, `kept` elsewhere."""
        size, bias = (1 + self.overlap) * self.ratio, self.weights()[0]
        rows = np.array(kept.kv), np.array(kept.gate)
        for p in range(max(0, len(kv) - size), len(kv)):
            rows[0][p % size], rows[1][p % size] = kv[p], gate[p] + bias[p % self.ratio]
        return rows


@functools.lru_cache(maxsize=4)
def definition(case, kv, gate, requests):
    rows = [np.frombuffer(x, np.float32).reshape(requests, -1, case.channels) for x in (kv, gate)]
    with jax.enable_x64(True):
        one: Any = functools.partial(reference.compress, ratio=case.ratio, dtype=jnp.float64)
        return np.asarray(jax.jit(jax.vmap(one, in_axes=(0, 0, None, None, None)))(*rows, *case.weights()))


def filled(tree):
    return jax.tree.map(
        lambda x: jnp.asarray(np.full(x.size * x.dtype.itemsize, 0xFF, np.uint8).view(x.dtype).reshape(x.shape)), tree
    )


@jax.jit
def gather_all(cache):
    return gather(cache, jnp.arange(cache.num_slots), dtype=F32)


@jax.jit
def gather_all_keys(cache):
    return gather_index(cache, jnp.arange(cache.num_slots), dtype=F32)


def bits(tree):
    return [np.asarray(leaf).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def same(got, want):
    for a, b in zip(bits(got), bits(want), strict=True):
        np.testing.assert_array_equal(a, b)


def run(case, kv, gate, steps, table, cache, state, *, tokens, implementation, ids=None, jitted=step):
    """Feeds kv[B, n, C], gate[B, n, C] in steps of so many tokens of each request; padding rows are NaN."""
    done = np.zeros(len(kv), np.int32)
    for lengths in np.asarray(steps, np.int32):
        rows = []
        for x in (kv, gate):
            row = np.full((tokens, case.channels), np.nan, np.float32)
            taken = np.concatenate([x[b, d : d + n] for b, (d, n) in enumerate(zip(done, lengths))])
            row[: len(taken)] = taken
            rows.append(row)
        done = done + lengths
        seq_lens = np.where(lengths > 0, done, 0).astype(np.int32)
        how: Any = dict(page_size=case.page_size, implementation=implementation)
        cache, state = jitted(cache, state, *rows, case.weights(), table, seq_lens, lengths, ids, **how)
    return cache, state


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


def cases(quick, slow=()):
    more = [pytest.param(case, marks=pytest.mark.slow) for case in slow]
    return pytest.mark.parametrize("case", [*quick, *more], ids=str)


@cases(CASES, MORE)
def test_against_the_definition(implementation, case):
    """Prefill chunks, decode tokens and requests at rest in one step; NaN wherever nothing may be read."""
    steps = [(0, 5, 11, 1), (case.ratio, 1, 4, 1), (1, 12, 0, 1), (9, 1, 1, 0), (1, 2, 2, 1)]
    check_run(case, steps, implementation)


@cases(PUBLISHED, MORE_PUBLISHED)
@pytest.mark.parametrize("name", ["reference", "xla", "triton"])
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
        for got, row in zip((kept.kv, kept.gate), rows):
            np.testing.assert_array_equal(got[ids[b]], row)
    # Nothing else is touched.
    for a, b in zip(bits(cache), bits(after)):
        shape = cache.num_slots, -1
        np.testing.assert_array_equal(a.reshape(shape)[~used], b.reshape(shape)[~used])
    same(*(jax.tree.map(lambda x: x[np.array([0, 3])], x) for x in (kept, before)))


# --- one result from every way to cut a sequence ---------------------------------------------------------------------
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


@pytest.mark.parametrize("name", ["xla", "triton"])
@cases(SPLIT, MORE_SPLIT)
@given(steps=chunkings())
@settings(deadline=None, max_examples=4, database=None)
def test_any_chunking_gives_the_same_bits(case, name, steps):
    kv, gate, table, pages, want = whole(case, name)
    same(run(case, kv, gate, steps, table, case.cache(pages), case.state(3), tokens=16, implementation=name), want)


@pytest.mark.parametrize("name", ["xla", "triton"])
@cases(SPLIT, MORE_SPLIT)
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


@cases(PUBLISHED, MORE_PUBLISHED)
@pytest.mark.parametrize("name", ["xla", "triton"])
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


# --- properties one by one -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["reference", "xla", "triton"])
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (128, False)])
def test_a_window_closes_with_its_last_token(name, ratio, overlap):
    case = Case(ratio, overlap, ratio, F32, 8, 2)
    kv, gate = case.tokens(1, 256)
    table, pages = case.table(1, 256)
    cache, state, stored = case.cache(pages), case.state(1), []
    for t in range(256):
        how: Any = dict(page_size=case.page_size, implementation=name)
        at = (table, np.array([t + 1]), np.array([1]))
        after, state = step(cache, state, kv[:, t], gate[:, t], case.weights(), *at, **how)
        if any((a != b).any() for a, b in zip(bits(cache), bits(after))):
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
    for a, b, empty in zip(bits(after), bits(want), bits(case.cache(pages, np.nan))):
        a, b, empty = (x.reshape(after.num_slots, -1) for x in (a, b, empty))
        others = np.setdiff1d(np.arange(after.num_slots), missing)
        np.testing.assert_array_equal(a[others], b[others])
        np.testing.assert_array_equal(a[missing], empty[missing])


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


@pytest.mark.parametrize("name", ["xla", "triton"])
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


# --- pages of entries ------------------------------------------------------------------------------------------------
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


# --- programs --------------------------------------------------------------------------------------------------------
def big(dtype, ratio, index, tokens, requests):
    """Shapes of one step at the published sizes, caches of 64 MB and more."""
    dim, overlap, entries = 128 if index else 512, ratio == 4, 256 // ratio
    pages = (160_000 if index else 40_000) // entries

    def caches():
        if index:
            return PagedIndexCache.create(pages, entries, dim=dim, dtype=dtype)
        sizes: Any = dict(latent_dim=448, rope_dim=64, group_size=64, scale_dtype=E8M0)
        return PagedKVCache.create(pages, entries, dtype=dtype, **sizes)

    cache = jax.eval_shape(caches)
    state = jax.eval_shape(lambda: CompressorState.create(256, ratio=ratio, dim=dim, overlap=overlap))
    channels = dim * (1 + overlap)
    f, i = (functools.partial(lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype), d) for d in (F32, jnp.int32))
    weights = f(ratio, channels), f(dim), f(32)
    rows = f(tokens, channels), f(tokens, channels)
    return cache, state, *rows, weights, i(requests, 64), i(requests), i(requests)


PROGRAMS = [
    (F32, 4, False, 64, 64),
    (FNUZ, 4, False, 512, 4),
    (FNUZ, 4, True, 64, 64),
    (BF16, 128, False, 64, 64),
]
programs = pytest.mark.parametrize("sizes", PROGRAMS, ids=lambda s: "-".join(map(str, (s[0].__name__, *s[1:]))))


@programs
@pytest.mark.parametrize("name", ["xla", "triton"])
def test_in_place_under_donation(sizes, name):
    arguments = big(*sizes)
    updated = jax.tree.leaves(arguments[:2])
    size = sum(x.size * x.dtype.itemsize for x in updated)
    inner = functools.partial(plain_step, page_size=256, implementation=name)
    memory: Any = jax.jit(inner, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    # The rows of at most 64 entries; interpret mode copies the small array of the index scales.
    scales = getattr(arguments[0], "scale", None)
    slack = scales.size * scales.dtype.itemsize if name == "triton" and scales is not None else 0
    assert memory.temp_size_in_bytes < 6e6 + slack
    assert max(x.size * x.dtype.itemsize for x in updated) > 1e7


@programs
@pytest.mark.parametrize("arch", cdna.ARCHITECTURES)
def test_one_launch_in_place_by_xla_rocm(arch, sizes):
    require_cdna("xla")
    arguments = big(*sizes)
    inner = functools.partial(plain_step, page_size=256, implementation="triton")
    program = cdna.compile(inner, *arguments, arch=arch, donate_argnums=(0, 1))
    assert [k.name for k in program.kernels].count("compress") == 1
    assert program.in_place == tuple(range(len(jax.tree.leaves(arguments[:2]))))
    assert not program.copies and not program.library_calls
    assert program.temporary_bytes is not None and program.temporary_bytes < 1e5


@pytest.mark.parametrize("target", [("NVIDIA H200", 132, "cuda"), ("gfx942", 304, "rocm"), ("gfx950", 256, "rocm")])
@pytest.mark.parametrize("sizes", PROGRAMS, ids=str)
def test_lowering(sizes, target):
    """One kernel, caches in place; on NVIDIA FP8's division is the one that rounds once."""
    kind, cores, platform = target
    arguments = big(*sizes)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    inner = functools.partial(plain_step, page_size=256, implementation="triton")
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(inner).trace(*arguments).lower(lowering_platforms=(platform,))
    (found,) = lowering.calls_in(lowered)
    assert len(found.aliases) == len(jax.tree.leaves(arguments[0]))
    quotients = sizes[0] == FNUZ and sizes[2]
    assert ("div.rn.f32" in found.ir) == (platform == "cuda" and quotients)


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_lengths_never_retrace(name):
    case, traces = Case(4, True, 4), []

    @jax.jit
    def counted(cache, state, rows, table, seq_lens, query_lens):
        traces.append(0)
        return plain_step(
            cache, state, *rows, case.weights(), table, seq_lens, query_lens, page_size=4, implementation=name
        )

    table, pages = case.table(2, 16)
    cache, state = case.cache(pages), case.state(2)
    for seq_lens, query_lens in [((3, 2), (3, 2)), ((4, 8), (1, 6)), ((11, 0), (7, 0)), ((0, 9), (0, 1))]:
        lengths = np.array(seq_lens, np.int32), np.array(query_lens, np.int32)
        cache, state = counted(cache, state, case.tokens(7), table, *lengths)
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["xla", "triton"])
def test_inside_shard_map(name):
    case = Case(4, True, 4, FNUZ)
    kv, gate = case.tokens(8)
    table, pages = case.table(1, 8)
    arguments = case.cache(pages), case.state(1), kv, gate, case.weights(), table, np.array([8]), np.array([8])
    inner = functools.partial(plain_step, page_size=4, implementation=name)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    specs = (PartitionSpec("x"), PartitionSpec("x"), *[PartitionSpec()] * 6)
    # Kernels carry no types of shard_map's axes.
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"), check_vma=name == "xla")
    same(jax.jit(mapped)(*arguments), step(*arguments, page_size=4, implementation=name))


def test_plans_are_memoised_and_sensible():
    key = dict(rows=8, width=512, target="gfx942")
    assert compress_plan(**key) is compress_plan(**key)
    assert compress_plan(**key) == CompressPlan(8, 4)
    assert compress_plan(rows=128, width=512, target="gfx950") == CompressPlan(16, 4)
    assert compress_plan(rows=8, width=128) == CompressPlan(8, 2)
    assert compress_plan(rows=8, width=12) == CompressPlan(8, 1)


CUTS = [(19, 1), (1, 3), (13, 21)], [(17, 1), (16, 24)], [(33, 25)]


@pytest.mark.parametrize("target", ["cpu", *cdna.ARCHITECTURES])
def test_blocks_change_no_bit(monkeypatch, target):
    """Nor does the cut between state and step, which moves a token to another place of its block."""
    case = Case(8, True, 8, F32, 20, 6)
    kv, gate = case.tokens(2, 33)
    table, pages = case.table(2, 33)
    if target != "cpu":
        require_cdna("triton")
    results = []
    for block, steps in [(1, CUTS[0]), (16, CUTS[0]), (8, CUTS[1]), (3, CUTS[2])]:
        monkeypatch.setattr(kernel, "compress_plan", lambda block=block, **_: CompressPlan(block, 2))
        how: Any = dict(tokens=60, implementation="triton", jitted=compiled_anew())
        with contextlib.nullcontext() if target == "cpu" else cdna.device(target):
            results.append(run(case, kv, gate, steps, table, case.cache(pages), case.state(2), **how))
    for other in results[1:]:
        same(other, results[0])


# --- errors ----------------------------------------------------------------------------------------------------------
def call(case=Case(4, True, 4), tokens=6, requests=2, **changes):
    kv, gate = case.tokens(tokens)
    bias, norm, frequencies = case.weights()
    seq_lens = jnp.full(requests, 3)
    m = build_metadata(seq_lens, seq_lens, jnp.zeros((requests, 2), jnp.int32), num_tokens=tokens, page_size=4)
    arguments: Any = dict(cache=case.cache(3), state=case.state(2), kv=kv, gate=gate, position_bias=bias, norm=norm)
    arguments |= dict(frequencies=frequencies, ratio=case.ratio) | {name: getattr(m, name) for name in FIELDS}
    return compress(**arguments | changes)


ONES, INTS = functools.partial(jnp.ones, dtype=F32), functools.partial(jnp.ones, dtype=jnp.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kv=ONES((6, 12))), r"kv is float32\[6, 12\]; expected floating values \[any, 24\]"),
        (dict(kv=INTS((6, 24))), "kv is int32"),
        (dict(gate=ONES((5, 24))), r"gate is float32\[5, 24\]; expected floating values \[6, 24\]"),
        (dict(position_bias=ONES((3, 24))), r"position_bias is float32\[3, 24\]; expected floating values \[4, any\]"),
        (dict(position_bias=ONES((4, 36))), r"position_bias has shape \[4, 36\]; expected \[ratio, 12\]"),
        (dict(norm=ONES(13)), r"norm is float32\[13\]; expected floating values \[12\]"),
        (dict(frequencies=ONES(3)), r"frequencies has shape \[3\].*rope_dim of 4: pass \[2\]"),
        (dict(cache=PagedIndexCache.create(3, 1, dim=12, dtype=F32), frequencies=ONES(7)), "a dim of 12"),
        (dict(cache=ONES((3, 4))), "cache is a .*; expected a PagedKVCache or a PagedIndexCache"),
        (dict(cache=Case(4, True, 8).cache(3)), "cache has a page_size of 2.*Create the cache with page_size=1"),
        (dict(state=Case(4, False, 4).state(2)), r"state.kv is float32\[2, 4, 12\].*ratio=4, dim=12, overlap=True"),
        (dict(state=Case(8, True, 4).state(2)), r"state.kv is float32\[2, 16, 24\]; expected float32\[N, 8, 24\]"),
        (dict(state=Case(4, True, 4).state(1)), "state has 1 rows for 2 requests"),
        (dict(state_ids=INTS(3)), r"state_ids is int32\[3\]; expected integers \[2\]"),
        (dict(state_ids=ONES(2)), "state_ids is float32"),
        (dict(positions=INTS(5)), r"positions is int32\[5\]; expected integers \[6\]"),
        (dict(request_ids=ONES(6)), "request_ids is float32"),
        (dict(query_indptr=INTS(2)), r"query_indptr is int32\[2\]; expected integers \[3\]"),
        (dict(seq_lens=INTS(3)), r"seq_lens is int32\[3\]; expected integers \[2\]"),
        (dict(page_table=INTS(2)), r"page_table is int32\[2\]; expected integers \[any, any\]"),
        (dict(page_size=3), "page_size is 3 and ratio 4; one must divide the other.*a multiple of 4, or divides it"),
        (dict(page_size=0), "page_size is 0"),
        (dict(ratio=0), "ratio is 0"),
        (dict(implementation="cuda"), "implementation is 'cuda'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name, value", [("num_requests", 0), ("ratio", 0), ("dim", 2.5)])
def test_bad_sizes_of_a_state(name, value):
    sizes: Any = dict(num_requests=1, ratio=4, dim=8, overlap=True) | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        CompressorState.create(sizes.pop("num_requests"), **sizes)


def test_the_kernel_declines():
    groups = Case(4, True, 4, FNUZ, 12, 0, 6)
    with pytest.raises(ValueError, match="groups of 6 values"):
        call(groups, implementation="triton")
    with pytest.raises(ValueError, match="entries of 7 values"):
        call(Case(4, True, 4, F32, 7, 2), implementation="triton")
    call(groups)


def test_wide_state_ids_wrap_into_no_row():
    """A request whose id is 2**32 keeps nothing and stores nothing; the other one does as always."""
    _, plain = call(state_ids=jnp.asarray([0, 1], jnp.int32))
    with jax.enable_x64(True):
        _, wide = call(state_ids=jnp.asarray([2**32, 1]))
    assert np.any(plain.kv[0])
    assert not np.any(wide.kv[0]) and not np.any(wide.gate[0])
    np.testing.assert_array_equal(wide.kv[1], plain.kv[1])
