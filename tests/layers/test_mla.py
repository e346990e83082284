import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_v32_oracle import attention, mixture, swiglu
from small_models import SMALL, scattered_pages, write_folder
from support.equivalence import QUICK_COMPILE, Close, assert_leaves, assert_same_bits
from support.marks import interpreted, running

from sparse_mla_jax.layers import moe as moe_layer
from sparse_mla_jax.layers.mla import _per_head, attention_step, fuse_projections, index_query, select_positions
from sparse_mla_jax.layers.norm import layer_norm, rms_norm
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.models.deepseek_v32 import create_caches
from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops.cache import PagedIndexCache, gather
from sparse_mla_jax.ops.indexer import lightning_indexer

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("mla")

PREFIX = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """One layer's parameters and the published tensors that they came from, float64."""
    folder = tmp_path_factory.mktemp("layer") / "model"
    tensors = write_folder(folder, SMALL, seed=2)
    params = load_checkpoint(folder)[1]["layers"][1]
    return params, {name: value.astype(np.float64) for name, value in tensors.items()}


def attend(params, hidden, caches, seq_lens, query_lens, table, *, config=SMALL, page_size=4, implementation=None):
    meta = build_metadata(seq_lens, query_lens, table, num_tokens=hidden.shape[0], page_size=page_size)
    return attention_step(params["self_attn"], hidden, *caches, meta, config=config, implementation=implementation)


STATIC = ("config", "page_size", "implementation")
step = jax.jit(attend, static_argnames=STATIC, compiler_options=QUICK_COMPILE)


def fresh(pages, dtype=jnp.float32):
    return create_caches(SMALL, pages, 4, dtype=dtype)[0]


def ints(*values):
    return np.array(values, np.int32)


# --- attention_step
def test_against_float64(layer, implementation):
    """Prefill, a chunk beside a decode token, then decode: two requests, scattered pages, padded tokens."""
    params, tensors = layer
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 18, SMALL.hidden_size)).astype(np.float32)
    expected = [attention(tensors, PREFIX, SMALL, row.astype(np.float64)) for row in hidden]
    table, pages = scattered_pages(2, 20, 4)
    caches, done = fresh(pages), [0, 0]
    for queries in ((9, 3), (1, 10), (7, 5), (1, 0)):
        ends = [d + q for d, q in zip(done, queries)]
        rows = [hidden[b, done[b] : ends[b]] for b in range(2)]
        padded = np.full((14, SMALL.hidden_size), np.nan, np.float32)  # padding may hold anything
        padded[: sum(queries)] = np.concatenate(rows)
        args = (params, padded, caches, ints(*ends), ints(*queries), table)
        with jax.default_matmul_precision("highest"):
            out, *caches = step(*args, implementation=implementation)
        want = np.concatenate([expected[b][done[b] : ends[b]] for b in range(2)])
        assert_leaves(out[: sum(queries)], want, Close(atol=2e-5), f"attention_step[{implementation}]")
        np.testing.assert_array_equal(out[sum(queries) :], 0)
        done = ends


def test_order_of_chunks_does_not_matter_to_the_cache(layer):
    params, _ = layer
    hidden = np.random.default_rng(1).normal(size=(12, SMALL.hidden_size)).astype(np.float32)
    table, pages = scattered_pages(1, 12, 4)
    _, *whole = step(params, hidden, fresh(pages), ints(12), ints(12), table)
    caches = fresh(pages)
    for done in range(0, 12, 4):
        _, *caches = step(params, hidden[done : done + 4], caches, ints(done + 4), ints(4), table)
    slots = (table[0][:, None] * 4 + np.arange(4)).reshape(-1)
    both = [gather(c[0], slots, dtype=jnp.float32) for c in (whole, caches)]
    np.testing.assert_allclose(*both, atol=1e-5)
    assert np.abs(both[0]).min(axis=1).max() > 0
    np.testing.assert_allclose(whole[1].key, caches[1].key, atol=1e-5)


def test_short_tables_skip_the_indexer_but_keep_its_keys(layer, monkeypatch):
    """max_length 4 <= index_topk 5: no scores, the same result, and keys for the day when the table is longer."""
    params, tensors = layer
    hidden = np.random.default_rng(1).normal(size=(4, SMALL.hidden_size)).astype(np.float32)
    asked = []
    import sparse_mla_jax.parallel.attention as module

    real = module.lightning_indexer
    monkeypatch.setattr(module, "lightning_indexer", lambda *a, **kw: asked.append(1) or real(*a, **kw))
    fresh_step = jax.jit(lambda *args: attend(*args))  # traced anew, so that the patch is seen
    short = fresh_step(params, hidden, fresh(2), ints(4), ints(4), ints(1)[None])
    assert not asked
    long = fresh_step(params, hidden, fresh(2), ints(4), ints(4), ints(1, 0)[None])
    assert asked
    np.testing.assert_allclose(short[0], long[0], atol=1e-6)
    np.testing.assert_allclose(short[0], attention(tensors, PREFIX, SMALL, hidden.astype(np.float64)), atol=2e-5)
    np.testing.assert_array_equal(short[2].key, long[2].key)
    assert np.all(np.any(np.asarray(short[2].key)[1] != 0, axis=-1))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fnuz", "float8_e4m3fn"])
def test_other_caches(layer, dtype):
    """Before selection can differ (index_topk tokens), the result is close to float64; beyond, finite."""
    params, tensors = layer
    hidden = np.random.default_rng(2).normal(size=(12, SMALL.hidden_size)).astype(np.float32)
    expected = attention(tensors, PREFIX, SMALL, hidden.astype(np.float64))
    table, pages = scattered_pages(1, 12, 4)
    out, *_ = step(params, hidden, fresh(pages, getattr(jnp, dtype)), ints(12), ints(12), table)
    assert out.dtype == jnp.float32 and np.isfinite(out).all()
    error = np.abs(out - expected)[: SMALL.index_topk].max() / np.abs(expected).max()
    assert error < (0.01 if dtype == "bfloat16" else 0.08), error


def test_bfloat16_weights_accumulate_in_float32(layer):
    """The only loss is that of rounding weights and activations: each output stays within a few units of bf16."""
    params, tensors = layer
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, params)
    hidden = np.random.default_rng(2).normal(size=(5, SMALL.hidden_size)).astype(np.float32)
    table, pages = scattered_pages(1, 8, 4)
    args = (fresh(pages, jnp.bfloat16), ints(5), ints(5), table)
    out, *_ = step(narrow, jnp.asarray(hidden, jnp.bfloat16), *args)
    expected = attention(tensors, PREFIX, SMALL, hidden.astype(np.float64))
    assert out.dtype == jnp.bfloat16
    assert np.abs(out.astype(np.float32) - expected).max() / np.abs(expected).max() < 0.03


# --- fused projections
@pytest.mark.parametrize(("pages", "name"), [(1, "xla"), (3, "xla"), (3, "gfx942"), interpreted(3, "triton")])
def test_fused_projections_change_nothing(layer, pages, name):
    """With the indexer (12 positions, 5 chosen) and without (4 positions)."""
    params, _ = layer
    fused = {"self_attn": jax.jit(fuse_projections)(params["self_attn"])}
    tokens = 4 * pages
    hidden = np.random.default_rng(8).normal(size=(tokens, SMALL.hidden_size)).astype(np.float32)
    table, size = scattered_pages(1, tokens, 4)
    args = (hidden, fresh(size), ints(tokens), ints(tokens), table)
    with jax.default_matmul_precision("highest"), running(name) as implementation:
        want, got = jax.block_until_ready([step(p, *args, implementation=implementation) for p in (params, fused)])
    assert_leaves(got, want, Close(rtol=1e-7, atol=2e-6), "fused")


def test_fusing_twice_is_fusing_once(layer):
    fused = fuse_projections(layer[0]["self_attn"])
    assert fuse_projections(fused) is fused
    assert sum(x.size for x in jax.tree.leaves(fused)) > sum(x.size for x in jax.tree.leaves(layer[0]["self_attn"]))


def test_rotated_values_pass_a_fused_product_unchanged(layer):
    """bfloat16 products with ones and zeros are exact."""
    from sparse_mla_jax.layers.mla import _absorb

    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layer[0]["self_attn"])
    query = jnp.asarray(np.random.default_rng(9).normal(size=(3, 6, SMALL.qk_head_dim)), jnp.bfloat16)
    plain, fused = (jax.jit(_absorb)(p, query) for p in (params, fuse_projections(params)))
    np.testing.assert_array_equal(fused[..., SMALL.kv_lora_rank :], query[..., SMALL.qk_nope_head_dim :])
    np.testing.assert_allclose(plain.astype(jnp.float32), fused.astype(jnp.float32), rtol=1e-2, atol=1e-2)


# --- quantised index queries
QUANTIZED = dataclasses.replace(SMALL, quantize_index_query=True)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e4m3fnuz"])
def test_index_queries_are_quantised_as_asked(layer, dtype):
    """Codes and weights together are the exact query within FP8's rounding; scales are those of fp8.quantize."""
    params, _ = layer
    hidden = np.random.default_rng(10).normal(size=(4, SMALL.hidden_size)).astype(np.float32)
    meta = build_metadata(ints(4), ints(4), ints(1)[None], num_tokens=4, page_size=4)
    exact, weights = index_query(params["self_attn"], hidden, meta, config=SMALL)
    codes, scaled = index_query(params["self_attn"], hidden, meta, config=SMALL, dtype=dtype)
    want, scales = fp8.quantize(exact, group_size=SMALL.index_head_dim, dtype=dtype)
    np.testing.assert_array_equal(codes.astype(jnp.float32), want.astype(jnp.float32))
    np.testing.assert_allclose(scaled, weights * scales[..., 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float8_e4m3fn", "xla"), ("float8_e4m3fnuz", "gfx942"), interpreted("float8_e4m3fnuz", "triton")],
)
def test_quantised_index_queries_select_by_rounded_scores(layer, dtype, name):
    """The whole layer selects what the reference selects from the quantised query, and the output is as close."""
    params, _ = layer
    hidden = np.random.default_rng(11).normal(size=(12, SMALL.hidden_size)).astype(np.float32)
    table, pages = scattered_pages(1, 12, 4)
    args = (params, hidden, fresh(pages, dtype), ints(12), ints(12), table)
    with jax.default_matmul_precision("highest"), running(name) as implementation:
        got, *caches = step(*args, config=QUANTIZED, implementation=implementation)
        want, *_ = step(*args, config=QUANTIZED, implementation="reference")
        exact, *_ = jax.block_until_ready(step(*args, implementation=implementation))
    assert_leaves(got, want, Close(rtol=1e-7, atol=2e-5), name)
    # Rows that see no more than index_topk positions have nothing to select.
    assert_leaves(got[: SMALL.index_topk], exact[: SMALL.index_topk], Close(rtol=1e-7, atol=2e-6), name)
    meta = build_metadata(ints(12), ints(12), table, num_tokens=12, page_size=4)
    query, weights = index_query(params["self_attn"], hidden, meta, config=SMALL, dtype=dtype)
    shared = (caches[1], meta.page_table, meta.request_ids, meta.lengths)
    chosen = lightning_indexer(query, weights, *shared, k=SMALL.index_topk, max_length=12, implementation="reference")
    mine = select_positions(params["self_attn"], hidden, caches[1], meta, config=QUANTIZED)
    np.testing.assert_array_equal(mine, chosen)


def test_queries_of_unquantised_keys_stay_as_they_are(layer):
    params, _ = layer
    hidden = np.random.default_rng(12).normal(size=(12, SMALL.hidden_size)).astype(np.float32)
    table, pages = scattered_pages(1, 12, 4)
    args = (params, hidden, fresh(pages, "bfloat16"), ints(12), ints(12), table)
    np.testing.assert_array_equal(step(*args)[0], step(*args, config=QUANTIZED)[0])


# --- products
@pytest.mark.parametrize("tokens", [1, 5])
def test_per_head_products_of_bfloat16_accumulate_in_float32(tokens):
    """A sum of 2048 ones stays at 256 where bfloat16 accumulates."""
    out = jax.jit(_per_head)(jnp.ones((tokens, 3, 2048), jnp.bfloat16), jnp.ones((3, 2048, 5), jnp.bfloat16))
    np.testing.assert_array_equal(out, 2048)


def test_no_tokens(layer):
    params, _ = layer
    table = ints(0, 1)[None]
    out, cache, _ = step(params, np.zeros((0, SMALL.hidden_size), np.float32), fresh(2), ints(3), ints(0), table)
    assert out.shape == (0, SMALL.hidden_size)
    np.testing.assert_array_equal(cache.latent, 0)


def test_bad_arguments(layer):
    params, _ = layer
    meta = build_metadata(ints(3), ints(2), ints(0, 1)[None], num_tokens=2, page_size=4)
    cache, index = fresh(2)
    call = functools.partial(attention_step, params["self_attn"], config=SMALL)
    hidden = np.zeros((2, SMALL.hidden_size), np.float32)
    for change, message in (
        ((hidden[:1], cache, index), "hidden is float32"),
        ((hidden[:, :5], cache, index), "hidden is float32"),
        ((hidden, create_caches(SMALL, 2, 8)[0][0], index), "cache has pages of 8 tokens"),
        ((hidden, cache, create_caches(SMALL, 2, 8)[0][1]), "index_cache has pages of 8 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*change, meta)
    with pytest.raises(ValueError, match="index_cache keys have 8 values"):
        call(hidden, cache, PagedIndexCache.create(2, 4, dim=8), meta)
    with pytest.raises(ValueError, match="cache is PagedIndexCache; expected a PagedKVCache"):
        call(hidden, index, cache, meta)
    with pytest.raises(ValueError, match="hidden is float16"):
        call(hidden.astype(np.float16), cache, index, meta)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        call(hidden, cache, index, meta, implementation="cuda")


@pytest.mark.parametrize("fused", [False, True])
def test_bad_weights(layer, fused):
    """Each message names the weight, what came, and what the config asks for."""
    params = layer[0]["self_attn"]
    params = fuse_projections(params) if fused else params
    meta = build_metadata(ints(3), ints(2), ints(0, 1)[None], num_tokens=2, page_size=4)
    call = functools.partial(attention_step, config=SMALL)
    rest = np.zeros((2, SMALL.hidden_size), np.float32), *fresh(2), meta
    for change, message in (
        ({"o_proj": params["o_proj"][:-1]}, r"params\[o_proj\] is float32\[.*expected floating values"),
        ({"o_proj": params["o_proj"].astype(int)}, r"params\[o_proj\] is int"),
        ({"bias": params["o_proj"]}, "params has bias; expected"),
        ({"o_proj": None}, r"params\[o_proj\] is NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            call(params | change, *rest)
    with pytest.raises(ValueError, match="params lacks o_proj; expected"):
        call({name: value for name, value in params.items() if name != "o_proj"}, *rest)
    with pytest.raises(ValueError, match="params is list; expected a dict"):
        call([params], *rest)


# --- selections that are passed
@pytest.mark.parametrize(
    "implementation", ["xla", *(pytest.param(n, marks=pytest.mark.slow) for n in ("triton", "reference"))]
)
def test_a_selection_is_replayed(layer, implementation):
    """What a step selected gives the same output when it is passed; what a token does not see is no key."""
    params = layer[0]["self_attn"]
    hidden = np.random.default_rng(1).normal(size=(12, SMALL.hidden_size)).astype(np.float32)
    meta = build_metadata(ints(12), ints(12), ints(0, 1, 2)[None], num_tokens=12, page_size=4)
    call = functools.partial(attention_step, config=SMALL, implementation=implementation)
    out, *caches, chosen = call(params, hidden, *fresh(3), meta, return_selection=True)
    positions, scores = select_positions(
        params, hidden, caches[1], meta, config=SMALL, implementation=implementation, return_scores=True
    )
    np.testing.assert_array_equal(chosen, positions)
    assert (np.isfinite(scores) == (np.asarray(chosen) >= 0)).all()
    # In another order, with positions of the future and beyond int32 among them.
    mixed = np.concatenate([np.asarray(chosen)[:, ::-1], np.full((12, 1), 11), np.full((12, 1), 2**40)], axis=1)
    mixed[-1, -2] = -1
    again, *others, given = call(params, hidden, *fresh(3), meta, selection=mixed, return_selection=True)
    np.testing.assert_allclose(again, out, rtol=0, atol=1e-5)
    assert given.shape == mixed.shape and (np.asarray(given)[0] <= 0).all()
    assert_same_bits(others, caches)
    with pytest.raises(ValueError, match=r"selection is int32\[11, 7\]; expected integers \[12, W\]"):
        call(params, hidden, *fresh(3), meta, selection=mixed[1:])


# --- norms
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 7)) * 100 + 50, dtype)
    weight, bias = rng.normal(size=(2, 7)).astype(np.float32)
    wide = np.asarray(x, np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-3) * weight
    limit = {"float32": 2e-6, "bfloat16": 5e-3}[dtype]
    out = rms_norm(x, weight, eps=1e-3)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=limit, atol=limit)
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias
    np.testing.assert_allclose(np.asarray(layer_norm(x, weight, bias), np.float64), want, rtol=limit, atol=2 * limit)
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 7), jnp.float32), weight), 0)
    with pytest.raises(ValueError, match=r"weight has shape \(6,\)"):
        rms_norm(x, weight[:6])
    with pytest.raises(ValueError, match=r"bias has shape \(6,\)"):
        layer_norm(x, weight, bias[:6])


# --- mixture of experts
WAYS = {
    "by pair": moe_layer._by_pair,
    "by expert": moe_layer._by_expert,
    "grouped": moe_layer._grouped,
    "by block": moe_layer._by_block,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 1, 1), (5, 9, 2), (40, 6, 6), (7, 33, 3), (99, 3, 1)])
def test_routed_experts(way, tokens, num_experts, k):
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (13, 5), "up_proj": (13, 5), "down_proj": (5, 13)}
    experts = {name: rng.normal(size=(num_experts, *shape)).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(tokens, 13)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :k].astype(np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)
    named = [{f"{name}.weight": a[e].T.astype(np.float64) for name, a in experts.items()} for e in range(num_experts)]
    want = np.stack([sum(w * swiglu(named[e], "", x[t]) for w, e in zip(weights[t], ids[t])) for t in range(tokens)])
    np.testing.assert_allclose(jax.jit(WAYS[way])(experts, x, weights, ids), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jit(moe_layer.routed_experts)(experts, x, weights, ids), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 2, 30])
def test_mixture(layer, tokens):
    params, tensors = layer
    x = np.random.default_rng(3).normal(size=(tokens, SMALL.hidden_size)).astype(np.float32)
    out = jax.jit(functools.partial(moe_layer.moe, config=SMALL))(params["mlp"], x)
    assert out.shape == x.shape and out.dtype == jnp.float32
    np.testing.assert_allclose(out, mixture(tensors, "model.layers.1.mlp.", SMALL, x.astype(np.float64)), atol=2e-5)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, params["mlp"])
    assert moe_layer.moe(narrow, jnp.asarray(x, jnp.bfloat16), config=SMALL).dtype == jnp.bfloat16


def test_a_token_s_experts_do_not_depend_on_the_others(layer):
    """Bitwise, in both forms that a CPU uses: what pads the batch can not be seen."""
    params, _ = layer
    rng = np.random.default_rng(4)
    for tokens in (3, 24):
        x = rng.normal(size=(tokens, SMALL.hidden_size)).astype(np.float32)
        other = x.copy()
        other[2:] = rng.normal(size=other[2:].shape) * 1e6
        layer_fn = jax.jit(functools.partial(moe_layer.moe, config=SMALL))
        np.testing.assert_array_equal(layer_fn(params["mlp"], x)[:2], layer_fn(params["mlp"], other)[:2])


def test_mixture_has_a_gradient(layer):
    """Training goes through both CPU forms."""
    params, _ = layer
    for tokens in (2, 12):
        x = np.random.default_rng(5).normal(size=(tokens, SMALL.hidden_size)).astype(np.float32)
        grads = jax.jit(jax.grad(lambda p, x=x: jnp.sum(moe_layer.moe(p, x, config=SMALL) ** 2)))(params["mlp"])
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert np.any(grads["experts"]["up_proj"]) and np.any(grads["gate"]["weight"])


# Both forms that a CPU uses.
@pytest.mark.parametrize("tokens", [2, 30])
def test_mixture_under_shard_map(layer, tokens):
    params, _ = layer
    x = np.random.default_rng(6).normal(size=(tokens, SMALL.hidden_size)).astype(np.float32)
    layer_fn = functools.partial(moe_layer.moe, config=SMALL)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(layer_fn, mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), spec), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(split)(params["mlp"], x), jax.jit(layer_fn)(params["mlp"], x))


def test_attention_under_shard_map(layer):
    """Replicated weights, requests and caches of one device each: data parallelism."""
    params, _ = layer
    hidden = np.random.default_rng(7).normal(size=(8, SMALL.hidden_size)).astype(np.float32)
    args = (params, hidden, tuple(fresh(4)), ints(8), ints(8), ints(2, 0, 1)[None])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    split = jax.shard_map(
        lambda *a: attend(*a), mesh=mesh, in_specs=(jax.sharding.PartitionSpec(), *[spec] * 5), out_specs=spec
    )
    out, *_ = jax.jit(split, compiler_options=QUICK_COMPILE)(*args)
    np.testing.assert_array_equal(out, step(*args)[0])
