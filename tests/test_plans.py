"""config=: a plan given by hand replaces the heuristic one, gives the same answer, and is refused where it can not."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import indexer_logits, sparse_attention, topk
from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan
from pallas_kernels.plans.topk import TopKPlan, topk_plan
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, write_index
from sparse_mla_jax.ops.indexer import indexer_scores, paged_indexer_scores
from sparse_mla_jax.ops.topk import top_k

RNG = np.random.default_rng(0)
KEYS = jnp.asarray(RNG.standard_normal((96, 32)), jnp.float32)
Q = jnp.asarray(RNG.standard_normal((3, 4, 32)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)
SLOTS = jnp.asarray(RNG.integers(0, 96, (3, 70)), jnp.int32)


def attend(**given):
    return sparse_mla(Q, KEYS, SLOTS, sm_scale=0.2, value_dim=32, **given)


def contiguous(**given):
    return indexer_scores(
        Q, KEYS, None, WEIGHTS, row_starts=jnp.zeros(3, int), row_lengths=jnp.full(3, 96, int), **given
    )


@functools.cache
def pages():
    cache = PagedIndexCache.create(6, 16, dim=32, dtype="float32")
    return write_index(cache, KEYS, jnp.arange(96))


def paged(**given):
    table, rows = jnp.arange(6, dtype=jnp.int32)[None], jnp.zeros(3, jnp.int32)
    return paged_indexer_scores(Q, WEIGHTS, pages(), table, rows, rows + 90, max_length=96, **given)


def select(**given):
    return top_k(jnp.asarray(np.sin(np.arange(3 * 700.0)).reshape(3, 700)), 40, **given)


OPERATORS = [
    pytest.param(attend, sparse_attention, "attention_plan", AttentionPlan(splits=3, key_block=32), id="sparse_mla"),
    pytest.param(contiguous, indexer_logits, "indexer_plan", IndexerPlan(key_block=32, head_block=16), id="indexer"),
    pytest.param(paged, indexer_logits, "indexer_plan", IndexerPlan(key_block=16, head_block=16), id="paged"),
    pytest.param(select, topk, "topk_plan", TopKPlan(block=512, num_warps=2, groups=256, run=32), id="top_k"),
]
operators = pytest.mark.parametrize(("operator", "kernel", "heuristic", "config"), OPERATORS)


@operators
def test_a_config_replaces_the_plan(monkeypatch, operator, kernel, heuristic, config):
    want = np.asarray(operator(implementation="xla"))

    def refuse(**sizes):
        raise AssertionError("the heuristic plan was asked for")

    monkeypatch.setattr(kernel, heuristic, refuse)
    with pytest.raises(AssertionError, match="heuristic"):
        operator(implementation="triton")
    for implementation in (None, "triton"):
        got = np.asarray(operator(implementation=implementation, config=config))
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


@operators
def test_a_config_is_refused_where_it_means_nothing(operator, kernel, heuristic, config):
    with pytest.raises(ValueError, match="config is a plan of the kernel and implementation is 'xla'"):
        operator(implementation="xla", config=config)
    with pytest.raises(ValueError, match=f"config is dict; expected None or a .*{type(config).__name__}"):
        operator(config={"num_warps": 2})


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (attention_plan, dict(tokens=8, heads=16, width=2048, itemsize=2, fp8=True, target="gfx942")),
        (indexer_plan, dict(tokens=8, heads=64, columns=4096, itemsize=2, shared_keys=False, target="gfx950")),
        (topk_plan, dict(columns=4096, k=512, target="gpu")),
    ],
)
def test_plans_are_memoised_by_their_sizes_and_frozen(plan, sizes):
    first = plan(**sizes)
    assert plan(**sizes) is first
    with pytest.raises(AttributeError):
        first.num_warps = 1
