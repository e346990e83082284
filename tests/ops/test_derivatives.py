"""Derivatives of operators, forward and reverse, of every implementation: those of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import Close, assert_leaves

from sparse_mla_jax import metadata, ops
from sparse_mla_jax.ops import (
    attention,
    cache,
    compressor,
    hyper_connections,
    indexer,
    norm_rope,
    ragged,
    topk,
    topk_merge,
)
from sparse_mla_jax.ops.output_projection import rotated_projection

# Sums of at most 700 products of numbers of size 1, in another order than the reference's.
BOUND = Close(rtol=1e-5, atol=5e-5)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def finite_sum(tree):
    """A scalar of all results; infinities (scores of invisible keys, lse of empty rows) are left out."""
    leaves = [jnp.where(jnp.isfinite(x), jnp.sin(x), 0).sum() for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.add, leaves)


ROWS = jnp.asarray(np.random.default_rng(0).integers(-2, 32, (3, 40)), jnp.int32)
FORMS = {
    "dense": ROWS,
    "ragged": ragged.pack_rows(ROWS),
    "lengths": ragged.DenseRows(ROWS, jnp.asarray([40, 0, 7], jnp.int32)),
}
FLOATS = cache.PagedKVCache.create(4, 8, latent_dim=6, rope_dim=2, group_size=2, dtype="float32")
TABLE = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)


def attend(form, name, q, kv, sinks):
    how = dict(sm_scale=0.3, value_dim=6, sinks=sinks, return_lse=True, implementation=name)
    return attention.sparse_mla(q, kv, FORMS[form], **how)


def score(name, q, keys, weights):
    rows = dict(row_starts=jnp.asarray([0, 3, -2, 690, 0]), row_lengths=jnp.asarray([700, 200, 10, 100, 0]))
    return indexer.indexer_scores(q, keys, None, weights, **rows, implementation=name)


def score_paged(requests, name, q, weights, keys):
    stored = cache.PagedIndexCache(keys, None, jnp.dtype("float32"))
    where = TABLE, jnp.asarray(requests), jnp.asarray([12, 3, 0, 16, 9][: len(requests)])
    return indexer.paged_indexer_scores(
        q[: len(requests)], weights[: len(requests)], stored, *where, max_length=16, implementation=name
    )


def write(name, latent, rope):
    stored = cache.write(FLOATS, latent, rope, jnp.asarray([3, -1, 31]), implementation=name)
    return stored.latent, stored.rope


def compress(name, kv, gate, bias, norm):
    entries = cache.PagedIndexCache.create(4, 2, dim=8, dtype="float32")
    state = compressor.CompressorState.create(2, ratio=4, dim=8, overlap=False)
    weights = compressor.CompressorWeights(bias, norm, jnp.full(2, 0.1, jnp.float32))
    meta = metadata.build_metadata(jnp.asarray([9, 5]), jnp.asarray([9, 5]), TABLE, num_tokens=14, page_size=8)
    entries, state = compressor.compress(entries, state, kv, gate, weights, meta, implementation=name)
    return entries.data, state


def finish(name, x, weight, bias, gain):
    part = norm_rope.Section(0, 2, 8, "float32", weight=weight, bias=bias, rotated=4, interleaved=True, gain=gain)
    return norm_rope.norm_rope(x, [part], jnp.arange(3), np.ones(2), implementation=name)


def split(name, streams, product, base, scale):
    return hyper_connections.split(streams, product, base, scale, iterations=3, implementation=name)


def split_independent(name, streams, product, base, scale):
    return hyper_connections.split(streams, product, base, scale, iterations=None, implementation=name)[:2]


def merge(name, streams, product, base, scale):
    return hyper_connections.merge(streams, product, base, scale, implementation=name)


def project(name, out, weight):
    return rotated_projection(out, weight, jnp.arange(3), np.full(2, 0.1), implementation=name)


def best(name, scores):
    return topk.top_k(scores, 3, return_scores=True, implementation=name)[1]


def best_of_parts(name, scores):
    positions = jnp.arange(18, dtype=jnp.int32).reshape(2, 1, 9)
    return topk_merge.top_k_merge(positions, scores, 4, return_scores=True, implementation=name)[1]


CALLS = {
    **{
        f"sparse_mla, {form}": (functools.partial(attend, form), (normal(3, 2, 8), normal(30, 8), normal(2)))
        for form in FORMS
    },
    "indexer_scores": (score, (normal(5, 3, 8), normal(700, 8), normal(5, 3))),
    "paged_indexer_scores, many requests": (
        functools.partial(score_paged, (0, 1, 1, 0, 1)),
        (normal(5, 2, 4), normal(5, 2), normal(4, 8, 4)),
    ),
    "write": (write, (normal(3, 6), normal(3, 2))),
    "compress": (compress, (normal(14, 8), normal(14, 8), normal(4, 8), normal(8))),
    "norm_rope": (finish, (normal(3, 16), normal(8), normal(8), normal(3, 2))),
    "split_streams": (split, (normal(3, 2, 4), normal(3, 8), normal(8), normal(3))),
    "split_streams, no matrix": (split_independent, (normal(3, 2, 4), normal(3, 4), normal(4), normal(2))),
    "merge_streams": (merge, (normal(3, 2, 4), normal(3, 2), normal(2), normal(1))),
    "rotated_projection": (project, (normal(3, 4, 8), normal(2, 16, 5))),
    "top_k": (best, (normal(2, 9),)),
    "top_k_merge": (best_of_parts, (normal(2, 1, 9),)),
}
# The others take seconds to compile: interpret mode and two derivatives.
QUICK = ("sparse_mla, lengths", "indexer_scores")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Long rows and many blocks at small sizes."""
    monkeypatch.setattr(attention, "MAX_BLOCK", 16)
    monkeypatch.setattr(indexer, "STEP_BYTES", 128 * 4 * 5 * 3)


@pytest.mark.parametrize("name", ["xla", "triton"])
@pytest.mark.parametrize("call", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CALLS])
def test_derivatives_are_those_of_the_reference(call, name):
    fn, args = CALLS[call]

    def derivatives(name):
        def value(*args):
            return finite_sum(fn(name, *args))

        def both(*args):
            numbers = tuple(range(len(args)))
            return jax.grad(value, argnums=numbers)(*args), jax.jvp(value, args, tuple(map(jnp.cos, args)))[1]

        return jax.jit(both)(*args)

    got, want = derivatives(name), derivatives("reference")
    assert_leaves(got, want, BOUND, f"{call}, {name}")
    assert any(np.any(x) for x in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["xla", "triton", "reference"])
def test_indices_have_no_derivative(name):
    """jax says so; a score that an index picks has one."""
    scores = normal(2, 9)
    with pytest.raises(TypeError, match="grad requires real-valued outputs"):
        jax.grad(lambda s: topk.top_k(s, 3, implementation=name).sum())(scores)
    picked = jax.grad(lambda s: jnp.take_along_axis(s, topk.top_k(s, 3, implementation=name), 1).sum())(scores)
    assert picked.sum(axis=1).tolist() == [3, 3]


def test_every_kernel_operator_is_here():
    derived = {name.split(",")[0] for name in CALLS}
    # Both writes are `write` of another cache; selections of positions have no derivative.
    without = {"write_index", "write_token", "lightning_indexer", "top_k_share"}
    assert derived == set(ops.KERNEL_OPERATORS) - without
