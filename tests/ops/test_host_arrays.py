"""Arrays of numpy and nested lists, eagerly: every operator takes them as it takes jax arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import Close, assert_leaves

from sparse_mla_jax import interchange, metadata
from sparse_mla_jax.ops import (
    attention,
    cache,
    compressor,
    fp8,
    hyper_connections,
    indexer,
    norm_rope,
    output_projection,
    ragged,
    rope,
    router,
    topk,
    window,
)

RNG = np.random.default_rng(0)
KV = cache.PagedKVCache.create(2, 4, latent_dim=8, rope_dim=4, group_size=8)
INDEX = cache.PagedIndexCache.create(2, 4, dim=8)
TABLE = np.array([[0, 1]])
STATE = compressor.CompressorState.create(1, ratio=2, dim=8, overlap=False)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def compress(kv, gate, bias, norm, frequencies, seq_lens, table):
    weights = compressor.CompressorWeights(bias, norm, frequencies)
    meta = metadata.decode_metadata(seq_lens, table, page_size=8)
    return compressor.compress(INDEX, STATE, kv, gate, weights, meta)


def finish(x, positions, frequencies, weight, bias):
    part = norm_rope.Section(0, 2, 4, "float32", weight=weight, bias=bias, rotated=0)
    return norm_rope.norm_rope(x, [part], positions, frequencies)


def attend(q, rows, sinks):
    return attention.sparse_mla(q, KV, rows, sm_scale=0.3, value_dim=8, sinks=sinks)


def attend_to_array(q, keys, rows, more):
    forms = rows, (keys, ragged.DenseRows(more))
    return attention.sparse_mla(q, keys, forms[0], sm_scale=0.3, value_dim=8, extra=forms[1])


def score(q, keys, scales, weights, starts, lengths):
    return indexer.indexer_scores(q, keys, scales, weights, row_starts=starts, row_lengths=lengths)


def score_paged(q, weights, table, requests, lengths):
    return indexer.paged_indexer_scores(q, weights, INDEX, table, requests, lengths, max_length=8)


def select(q, weights, table, requests, lengths):
    return indexer.lightning_indexer(q, weights, INDEX, table, requests, lengths, k=3, max_length=8)


PAGED = normal(2, 2, 8), normal(2, 2), TABLE, np.zeros(2, int), np.array([3, 8])
CALLS = {
    "write": (lambda *x: cache.write(KV, *x), (normal(2, 8), normal(2, 4), np.array([1, 5]))),
    "write_index": (lambda *x: cache.write_index(INDEX, *x), (normal(2, 8), np.array([1, 5]))),
    "write_token": (
        lambda *x: cache.write_token(KV, INDEX, *x),
        (normal(2, 8), normal(2, 4), normal(2, 8), np.array([1, 5])),
    ),
    "gather": (lambda slots: cache.gather(KV, slots, dtype="float32"), (np.array([1, 5]),)),
    "gather_index": (lambda slots: cache.gather_index(INDEX, slots, dtype="float32"), (np.array([1, 5]),)),
    "sparse_mla": (attend, (normal(2, 1, 12), np.array([[1, 2], [3, -1]]), normal(1))),
    "sparse_mla of arrays": (attend_to_array, (normal(1, 1, 12), normal(5, 12), np.array([[1]]), np.array([[4]]))),
    "merge": (attention.merge, (normal(2, 1, 1, 3), normal(2, 1, 1))),
    "apply_sinks": (attention.apply_sinks, (normal(1, 2, 3), normal(1, 2), normal(2))),
    "indexer_scores": (
        score,
        (normal(1, 2, 8), normal(5, 8), np.ones(5, np.float32), normal(1, 2), np.array([1]), np.array([3])),
    ),
    "paged_indexer_scores": (score_paged, PAGED),
    "lightning_indexer": (select, PAGED),
    "top_k": (lambda s, n: topk.top_k(s, 2, n), (normal(2, 6), np.array([3, 6]))),
    "top_k_prefill": (
        lambda s, a, b: topk.top_k_prefill(s, 2, row_starts=a, row_ends=b),
        (normal(2, 6), np.array([1, 0]), np.array([3, 6])),
    ),
    "top_k_decode": (lambda s, n: topk.top_k_decode(s, 2, seq_lens=n, next_n=2), (normal(2, 6), np.array([4]))),
    "quantize": (lambda x: fp8.quantize(x, group_size=4), (normal(2, 8),)),
    "dequantize_codes": (
        lambda x, s: fp8.dequantize_codes(np.asarray(x, np.uint8), s, "float8_e4m3fn", group_size=4, dtype="float32"),
        (np.arange(8), np.ones(2, np.float32)),
    ),
    "rotate": (lambda *x: rope.rotate(*x, interleaved=True), (normal(2, 4), np.arange(2), np.ones(2, np.float32))),
    "norm_rope": (finish, (normal(2, 8), np.arange(2), np.ones(2, np.float32), normal(4), normal(4))),
    "rotated_projection": (
        output_projection.rotated_projection,
        (normal(2, 2, 4), normal(1, 8, 3), np.arange(2), np.ones(1, np.float32)),
    ),
    "split_streams": (
        lambda *x: hyper_connections.split(*x, iterations=2),
        (normal(1, 2, 4), normal(1, 8), normal(8), normal(3)),
    ),
    "merge_streams": (hyper_connections.merge, (normal(1, 2, 4), normal(1, 2), normal(2), normal(1))),
    "doubly_stochastic": (lambda x: hyper_connections.doubly_stochastic(x, iterations=2, eps=1e-6), (normal(2, 2),)),
    "compress": (
        compress,
        (normal(1, 8), normal(1, 8), normal(2, 8), normal(8), np.ones(1, np.float32), np.array([4]), np.array([[0]])),
    ),
    "num_entries": (lambda n: compressor.num_entries(n, ratio=2), (np.array([5]),)),
    "entry_pages": (lambda t: compressor.entry_pages(t, page_size=4, ratio=2)[0], (TABLE,)),
    "biased_grouped_topk": (
        lambda x, b: router.biased_grouped_topk(x, b, num_groups=2, groups_kept=1, k=1, scale=1.0),
        (normal(2, 4), normal(4)),
    ),
    "softmax_grouped_topk": (
        lambda x: router.softmax_grouped_topk(x, num_groups=2, groups_kept=1, k=1, scale=1.0),
        (normal(2, 4),),
    ),
    "sqrt_softplus_topk": (lambda x, b: router.sqrt_softplus_topk(x, b, k=2, scale=1.0), (normal(2, 4), normal(4))),
    "hash_route": (
        lambda x, i, t: router.hash_route(x, i, t, scale=1.0),
        (normal(2, 4), np.array([0, 1]), np.array([[0], [3]])),
    ),
    "pack_rows": (ragged.pack_rows, (np.array([[1, -1], [2, 3]]), np.array([2, 1]))),
    "to_dense": (lambda v, i: ragged.Ragged(v, i).to_dense(2), (np.array([1, 2, 3]), np.array([0, 1, 3]))),
    "indptr_from_lengths": (ragged.indptr_from_lengths, (np.array([2, 1]),)),
    "slots_from_positions": (
        lambda *x: ragged.slots_from_positions(*x, page_size=4),
        (np.array([[1, 5]]), np.array([0]), TABLE),
    ),
    "select_to_ragged": (
        lambda *x: ragged.select_to_ragged(*x, page_size=4),
        (np.array([[1, 5]]), np.array([0]), TABLE),
    ),
    "combine_with_window": (
        lambda p, q, w: ragged.combine_with_window(p, q, window=2, window_start=w),
        (np.array([[1]]), np.array([4]), np.array([7])),
    ),
    "ring_slots": (lambda *x: window.ring_slots(*x, ring=4), (np.array([5]), np.array([1]))),
    "window_slots": (lambda *x: window.window_slots(*x, window=2, ring=4), (np.array([5]), np.array([1]))),
    "build_metadata": (
        lambda *x: metadata.build_metadata(*x, num_tokens=2, page_size=4),
        (np.array([5]), np.array([2]), TABLE),
    ),
    "decode_metadata": (lambda *x: metadata.decode_metadata(*x, page_size=4), (np.array([5]), TABLE)),
    "kv_from_v32_rows": (
        lambda rows: interchange.kv_from_v32_rows(
            np.asarray(rows, np.uint8), latent_dim=8, rope_dim=4, group_size=8, dtype="float8_e4m3fn"
        ),
        (np.zeros((1, 2, 8 + 4 + 8), int),),
    ),
}


# The arrays of numpy are a second way to the same code.
@pytest.mark.parametrize("form", ["lists", pytest.param("numpy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", CALLS)
def test_host_arrays_are_arrays(call, form):
    fn, arrays = CALLS[call]
    want = fn(*map(jnp.asarray, arrays))
    got = fn(*arrays) if form == "numpy" else fn(*(array.tolist() for array in arrays))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_leaves(got, want, Close(rtol=1e-6, atol=1e-6), call)
