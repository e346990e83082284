"""compress: its two calls are one program, and what it says of structs and sizes that do not fit."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.ops._compressor_state import find_spans, place_rows
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, CompressorWeights, compress, entry_pages

RATIO, DIM, TOKENS, PAGE_SIZE = 4, 16, 40, 16
FIELDS = ("positions", "request_ids", "query_indptr", "seq_lens", "page_table", "page_size")
ROWS = jnp.asarray(np.random.default_rng(0).standard_normal((2, TOKENS, DIM)), jnp.float32)
WEIGHTS = CompressorWeights(
    jnp.ones((RATIO, DIM), jnp.float32) * jnp.arange(RATIO)[:, None],
    jnp.full(DIM, 2.0, jnp.float32),
    jnp.array([1.0, 0.1]),
    eps=1e-3,
)
STATE_IDS = jnp.array([1, 0], jnp.int32)


def arguments() -> Any:
    cache = PagedKVCache.create(6, PAGE_SIZE // RATIO, latent_dim=12, rope_dim=4, group_size=4, dtype="float32")
    return cache, CompressorState.create(2, ratio=RATIO, dim=DIM, overlap=False), *ROWS


def metadata() -> Any:
    lens = np.array([23, 17], np.int32)
    table = np.arange(6, dtype=np.int32).reshape(2, 3)
    return build_metadata(lens, lens, table, num_tokens=TOKENS, page_size=PAGE_SIZE)


def by_structs(cache, state, kv, gate, meta, weights, ids, *, implementation="xla"):
    return compress(cache, state, kv, gate, weights, meta, state_ids=ids, implementation=implementation)


def by_fields(cache, state, kv, gate, meta, weights, ids, *, implementation="xla"):
    owners = {name: getattr(meta, name) for name in FIELDS}
    how = dict(ratio=weights.ratio, eps=weights.eps, state_ids=ids, implementation=implementation)
    bias, norm, frequencies = weights.position_bias, weights.norm, weights.frequencies
    return compress(cache, state, kv, gate, bias, norm, frequencies, **owners, **how)


def by_keywords(cache, state, kv, gate, meta, weights, ids, *, implementation="xla"):
    names: Any = {name: getattr(meta, name) for name in FIELDS}
    names |= {name: getattr(weights, name) for name in ("position_bias", "norm", "frequencies", "ratio", "eps")}
    return compress(cache=cache, state=state, kv=kv, gate=gate, state_ids=ids, implementation=implementation, **names)


@pytest.mark.parametrize("implementation", ["reference", "xla", "triton"])
def test_fields_and_structs_are_one_program(implementation):
    given = *arguments(), metadata(), WEIGHTS, STATE_IDS
    programs = [
        jax.jit(functools.partial(call, implementation=implementation)).lower(*given).as_text().split("\n", 1)[1]
        for call in (by_structs, by_fields, by_keywords)
    ]
    assert programs[0] == programs[1] == programs[2]


def test_weights_know_their_sizes():
    assert (WEIGHTS.ratio, WEIGHTS.channels, WEIGHTS.dim, WEIGHTS.rows) == (RATIO, DIM, DIM, RATIO)
    overlapping = CompressorWeights(jnp.ones((RATIO, 2 * DIM), jnp.float32), WEIGHTS.norm, WEIGHTS.frequencies)
    assert overlapping.rows == 2 * RATIO and len(jax.tree.leaves(overlapping)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=WEIGHTS.position_bias), "weights is a .*; expected CompressorWeights"),
        (dict(meta=None), "metadata is a NoneType; expected a StepMetadata"),
        (dict(kv=ROWS[0, 1:]), r"gate is float32\[40, 16\]; expected floating values \[39, 16\]"),
        (
            dict(weights=CompressorWeights(jnp.ones(4, jnp.float32), WEIGHTS.norm, WEIGHTS.frequencies)),
            r"position_bias is float32\[4\]",
        ),
        (dict(ids=jnp.array([True, False])), r"state_ids is bool\[2\]; expected integers \[2\]"),
    ],
)
def test_refuses(change, message):
    names = ("cache", "state", "kv", "gate", "meta", "weights", "ids")
    with pytest.raises(ValueError, match=message):
        by_structs(**dict(zip(names, (*arguments(), metadata(), WEIGHTS, STATE_IDS))) | change)


def test_numpy_integers_are_sizes_and_booleans_are_not():
    state = CompressorState.create(np.int64(3), ratio=np.int32(4), dim=np.uint8(8), overlap=True)
    assert state.kv.shape == (3, 8, 16) and state.num_rows == 3
    _, entries = entry_pages(np.zeros((1, 2), np.int32), page_size=np.int64(16), ratio=np.int64(4))
    assert entries == 4
    with pytest.raises(ValueError, match="num_requests is True; expected an integer of at least 1"):
        CompressorState.create(True, ratio=4, dim=8, overlap=True)
    with pytest.raises(ValueError, match="ratio is True"):
        entry_pages(np.zeros((1, 2), np.int32), page_size=16, ratio=True)
    with pytest.raises(ValueError, match=r"page_table is float32\[1, 2\]; expected integers \[any, any\]"):
        entry_pages(np.zeros((1, 2), np.float32), page_size=16, ratio=4)


@pytest.mark.parametrize(
    ("query_lens", "padded"), [((20, 1, 3), 24), ((20, 1, 3), 60), ((1, 0, 1), 4), ((3, 40, 2), 45)]
)
def test_no_place_of_the_state_is_written_twice(query_lens, padded):
    """Scatters of unique indices: a chunk longer than the ring keeps its last rows, whoever else is in the step."""
    ring, seq_lens = 8, np.array([25, 41, 3], np.int32)
    query_lens = np.array(query_lens, np.int32)
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    meta = build_metadata(seq_lens, query_lens, table, num_tokens=padded, page_size=PAGE_SIZE)
    spans = find_spans(meta, jnp.array([2, 0, 1]), 3)
    row, position, at = map(np.asarray, place_rows(spans, meta.request_ids, ring))
    assert len(set(at)) == at.size
    kept = {int(place): (int(r), int(p)) for place, r, p in zip(at, row, position) if place >= 0}
    first, want = np.cumsum([0, *query_lens]), {}
    for request, state in enumerate((2, 0, 1)):
        for n in range(max(0, query_lens[request] - ring), query_lens[request]):
            p = seq_lens[request] - query_lens[request] + n
            want[state * ring + p % ring] = (first[request] + n, p)
    assert kept == want
