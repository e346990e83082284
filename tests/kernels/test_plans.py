"""config=: a plan given by hand replaces the heuristic one, gives the same answer, and is refused where it can not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import Close, Same, assert_leaves

from pallas_kernels import cache_write, hyper_connections, indexer_logits, output_projection, topk
from pallas_kernels import compress as compress_kernel
from pallas_kernels import norm_rope as norm_rope_kernel
from pallas_kernels.plans.attention import AttentionPlan, attention_plan
from pallas_kernels.plans.cache_write import CacheWritePlan, cache_write_plan
from pallas_kernels.plans.compress import CompressPlan, compress_plan
from pallas_kernels.plans.hyper_connections import HyperConnectionPlan, hyper_connection_plan
from pallas_kernels.plans.indexer import IndexerPlan, indexer_plan
from pallas_kernels.plans.norm_rope import NormRopePlan, norm_rope_plan
from pallas_kernels.plans.output_projection import ProjectionPlan, projection_plan
from pallas_kernels.plans.topk import TopKPlan, topk_plan
from pallas_kernels.sparse_attention import launch
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write, write_index, write_token
from sparse_mla_jax.ops.compressor import CompressorState, compress
from sparse_mla_jax.ops.hyper_connections import merge, split
from sparse_mla_jax.ops.indexer import indexer_scores, paged_indexer_scores
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.output_projection import rotated_projection
from sparse_mla_jax.ops.topk import top_k

# Kernels in interpret mode, of which is asked what they compute.
pytestmark = pytest.mark.xdist_group("plans")

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
    return top_k(jnp.asarray(np.sin(np.arange(3 * 700.0)).reshape(3, 700), jnp.float32), 40, **given)


# Forty tokens in a cache of 96: some name the slot of a later one, some none.
WRITTEN = jnp.asarray(np.where(np.arange(40) % 7 == 3, -1, RNG.integers(0, 30, 40)), jnp.int32)


def kv_cache(dtype="float8_e4m3fn"):
    return PagedKVCache.create(6, 16, latent_dim=24, rope_dim=8, group_size=8, dtype=dtype)


def index_cache():
    return PagedIndexCache.create(6, 16, dim=32)


def write_kv(**given):
    return write(kv_cache(), KEYS[:40, :24], KEYS[:40, 24:], WRITTEN, **given)


def write_keys(**given):
    return write_index(index_cache(), KEYS[:40], WRITTEN, **given)


def write_both(**given):
    return write_token(
        kv_cache("float8_e4m3fnuz"), index_cache(), KEYS[:40, :24], KEYS[:40, 24:], KEYS[40:80], WRITTEN, **given
    )


def compress_entries(**given):
    """Two requests of 23 and 17 tokens, ratio 4 with overlap: nine entries."""
    lens = np.array([23, 17], np.int32)
    m = build_metadata(lens, lens, np.arange(6, dtype=np.int32).reshape(2, 3), num_tokens=40, page_size=16)
    owners = ("positions", "request_ids", "query_indptr", "seq_lens", "page_table", "page_size")
    return compress(
        PagedKVCache.create(6, 4, latent_dim=12, rope_dim=4, group_size=4, dtype="float32"),
        CompressorState.create(2, ratio=4, dim=16, overlap=True),
        KEYS[:40],
        KEYS[40:80],
        KEYS[80:84],
        KEYS[84, :16],
        jnp.array([1.0, 0.1]),
        **{name: getattr(m, name) for name in owners},
        ratio=4,
        **given,
    )


def finish(**given):
    """Five normed and rotated heads of six values, three FP8 ones of eight."""
    parts = [
        Section(2, 5, 6, "bfloat16", weight=KEYS[0, :6], rotated=2, interleaved=True),
        Section(0, 3, 8, "float8_e4m3fn", rotated=0),
    ]
    return norm_rope(KEYS[:7], parts, jnp.arange(7), jnp.array([1.0, 0.1]), **given)


STREAMS, BASE = KEYS[:88].reshape(11, 4, 64), KEYS[88, :24]


def split_streams(**given):
    product = KEYS[:66].reshape(-1)[: 11 * 24].reshape(11, 24)
    return split(STREAMS, product, BASE, KEYS[89, :3], norm=KEYS[90:92].reshape(64), iterations=3, **given)


def merge_streams(**given):
    product = KEYS[:11, :4]
    return merge(STREAMS, product, BASE[:4], KEYS[89, :1], norm=KEYS[90:92].reshape(64), **given)


def project(**given):
    """Nineteen tokens, two groups of two heads of 24 values, 8 of them rotated, 21 columns."""
    out = KEYS.reshape(-1)[: 19 * 4 * 24].reshape(19, 4, 24)
    weight = KEYS.reshape(-1)[-2 * 48 * 21 :].reshape(2, 48, 21)
    return rotated_projection(out, weight, jnp.arange(19), jnp.array([1.0, 0.3, 0.1, 0.01]), **given)


# Of each operator the kernel's module, its heuristic, another plan, and whether that keeps the order of arithmetic.
OPERATORS = {
    "sparse_mla": (attend, launch, "attention_plan", AttentionPlan(splits=3, key_block=32), False),
    "indexer": (contiguous, indexer_logits, "indexer_plan", IndexerPlan(key_block=32, head_block=16), False),
    "paged": (paged, indexer_logits, "indexer_plan", IndexerPlan(key_block=16, head_block=16), False),
    "top_k": (select, topk, "topk_plan", TopKPlan(block=512, num_warps=2, groups=256, run=32), True),
    "write": (write_kv, cache_write, "cache_write_plan", CacheWritePlan(scan=16, num_warps=2), True),
    "write_index": (write_keys, cache_write, "cache_write_plan", CacheWritePlan(scan=16, num_warps=2), True),
    "write_token": (write_both, cache_write, "cache_write_plan", CacheWritePlan(scan=32, num_warps=1), True),
    "compress": (compress_entries, compress_kernel, "compress_plan", CompressPlan(block=3, num_warps=2), True),
    "norm_rope": (finish, norm_rope_kernel, "norm_rope_plan", NormRopePlan(tile=16, num_warps=1), True),
    # XLA:CPU of jax 0.12 vectorises interpreted blocks of other sizes otherwise; on CDNA plans change no bit.
    "split": (split_streams, hyper_connections, "hyper_connection_plan", HyperConnectionPlan(4, 2), False),
    "merge": (merge_streams, hyper_connections, "hyper_connection_plan", HyperConnectionPlan(2, 1), True),
    "projection": (project, output_projection, "projection_plan", ProjectionPlan(16, 16, 16, 2, 1), False),
}
operators = pytest.mark.parametrize(
    ("operator", "kernel", "heuristic", "config", "same_bits"), OPERATORS.values(), ids=OPERATORS
)


def arrays(results):
    """What an operator gives, as numpy arrays; FP8 by its bytes."""
    leaves = jax.tree.leaves(results)
    return [np.asarray(x.view(jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x) for x in leaves]


@operators
def test_a_config_replaces_the_plan(monkeypatch, operator, kernel, heuristic, config, same_bits):
    want, default = (arrays(operator(implementation=name)) for name in ("xla", "triton"))

    def refuse(**sizes):
        raise AssertionError("the heuristic plan was asked for")

    monkeypatch.setattr(kernel, heuristic, refuse)
    with pytest.raises(AssertionError, match="heuristic"):
        operator(implementation="triton")
    for implementation in (None, "triton"):
        got = arrays(operator(implementation=implementation, config=config))
        assert len(got) == len(want) and any(np.any(x) for x in got)
        if same_bits:
            assert_leaves(got, default, Same(), "the heuristic plan")
        exact = [np.issubdtype(x.dtype, np.integer) for x in want]
        assert_leaves(got, want, [Same() if e else Close(rtol=2e-5, atol=2e-5) for e in exact], "the XLA body")


@operators
def test_a_config_is_refused_where_it_means_nothing(operator, kernel, heuristic, config, same_bits):
    with pytest.raises(ValueError, match="config is a plan of the kernel and implementation is 'xla'"):
        operator(implementation="xla", config=config)
    with pytest.raises(ValueError, match=f"config is dict; expected None or a .*{type(config).__name__}"):
        operator(config={"num_warps": 2})


@pytest.mark.parametrize("name", OPERATORS)
def test_plan_is_the_name_to_use(monkeypatch, name):
    operator, kernel, heuristic, plan, _ = OPERATORS[name]

    def refuse(**sizes):
        raise AssertionError("the heuristic plan was asked for")

    monkeypatch.setattr(kernel, heuristic, refuse)
    assert jax.tree.leaves(jax.eval_shape(lambda: operator(plan=plan)))
    with pytest.raises(AssertionError, match="heuristic"):
        jax.eval_shape(lambda: operator(implementation="triton"))
    with pytest.raises(ValueError, match="plan and config are two names of one argument"):
        operator(plan=plan, config=plan)
    with pytest.raises(ValueError, match="plan is a plan of the kernel and implementation is 'xla'"):
        operator(implementation="xla", plan=plan)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(key_block=24), "AttentionPlan.key_block is 24; expected a power of two, at least 16"),
        (dict(head_block=8), "AttentionPlan.head_block is 8"),
        (dict(splits=0), "splits 0, shares 0 and half_parts False"),
        (dict(shares=4), "splits 1, shares 4 and half_parts False; expected splits of at least 1, and shares of more"),
        (dict(half_parts=True), "half_parts True; .* only with more than one"),
    ],
)
def test_plans_that_leave_rows_unwritten_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan(**sizes)


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (attention_plan, dict(tokens=8, heads=16, width=2048, itemsize=2, fp8=True, target="gfx942")),
        (indexer_plan, dict(tokens=8, heads=64, columns=4096, itemsize=2, shared_keys=False, target="gfx950")),
        (topk_plan, dict(columns=4096, k=512, target="gpu")),
        (cache_write_plan, dict(tokens=8, width=512, target="gfx942")),
        (compress_plan, dict(rows=8, width=512, target="gfx950")),
        (norm_rope_plan, dict(widest=512, target="gpu")),
        (hyper_connection_plan, dict(tokens=8, width=4096, target="gfx942")),
        (projection_plan, dict(tokens=8, groups=8, columns=1024, kept=448, target="nvidia")),
    ],
)
def test_plans_are_memoised_by_their_sizes_and_frozen(plan, sizes):
    first = plan(**sizes)
    assert plan(**sizes) is first
    with pytest.raises(AttributeError):
        first.num_warps = 1
