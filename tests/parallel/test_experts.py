"""Feed-forward layers on several virtual CPU devices give what one device gives.

XLA has no `ragged_all_to_all` on CPUs: `emulated` gathers everything and copies the same slices, so that offsets and
sizes are those under test.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from small_models import SMALL, random_params
from support import marks

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers import moe as moe_layer
from sparse_mla_jax.layers.compressed_attention import compressed_attention_step
from sparse_mla_jax.layers.mla import attention_step
from sparse_mla_jax.layers.moe import moe, moe_v4, swiglu
from sparse_mla_jax.models import deepseek_v4, deepseek_v32
from sparse_mla_jax.parallel import experts
from sparse_mla_jax.parallel.axes import Parallel, make_mesh
from sparse_mla_jax.parallel.collectives import sum_over

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("experts")

# Float32 roundings of the largest value: at most 3 experts, 40 columns and 8 devices are added in another order.
ROUNDINGS = 8
SIGMOID = dataclasses.replace(SMALL, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
SOFTMAX = dataclasses.replace(SIGMOID, scoring_func="softmax", n_shared_experts=0, n_group=1, topk_group=1)
V4 = DeepseekV4Config(
    vocab_size=31,
    hidden_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=4,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=9,
    n_routed_experts=8,
    num_experts_per_tok=3,
    num_hash_layers=1,
    sliding_window=6,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=3,
    hc_mult=2,
    compress_ratios=(0, 4),
)
MESHES = {
    "data": Parallel(data=4),
    "tensor": Parallel(tensor=4),
    "data x tensor": Parallel(data=2, tensor=2),
    "all three": Parallel(data=2, context=2, tensor=2, experts=("data", "context", "tensor")),
    "context beside": Parallel(data=2, context=2, tensor=2),
    "context": Parallel(context=2, experts=("context",)),
    "context and shared columns": Parallel(context=2, tensor=2, experts=("context",)),
    "data, tensor beside": Parallel(data=4, tensor=2, experts=("data",)),
    "columns": Parallel(tensor=2, experts=()),
    "columns and data": Parallel(data=2, tensor=2, experts=()),
    "columns, with experts over one device": Parallel(tensor=2, experts=("data",)),
    "one device": Parallel(),
}
# Those in which tokens cross between devices.
CROSSING = [name for name, parallel in MESHES.items() if parallel.data > 1 and "data" in parallel.experts]


@functools.cache
def layer(config):
    """Weights of a mixture: of V4 the layer with a table, whose tokens have random ids."""
    specs = deepseek_v4.param_specs(config) if config is V4 else deepseek_v32.param_specs(config)
    return random_params(specs["layers"][0]["mlp"], config.n_routed_experts)


def call(config, params, x, token_ids, parallel=None):
    if config is V4:
        return moe_v4(params, x, token_ids, config=config, parallel=parallel)
    return moe(params, x, config=config, parallel=parallel)


def specs(params, parallel):
    """How the weights are split."""
    tensor = parallel.axis("tensor")

    def columns(*before):
        return {
            "gate_proj": P(*before, None, tensor),
            "up_proj": P(*before, None, tensor),
            "down_proj": P(*before, tensor),
        }

    whole = P(parallel.expert_axes or None)
    routed = dict.fromkeys(params["experts"], whole) if parallel.expert_axes else columns(None)
    split = {"gate": jax.tree.map(lambda _: P(), params["gate"]), "experts": routed}
    return split | ({"shared_experts": columns()} if "shared_experts" in params else {})


@functools.cache
def on_mesh(config, parallel, ragged):
    """The layer on many devices, compiled; `ragged` only tells programs apart."""
    del ragged
    rows = P(parallel.axis("data"))
    fn = functools.partial(call, config, parallel=parallel)
    in_specs = (specs(layer(config), parallel), rows, rows)
    return jax.jit(jax.shard_map(fn, mesh=make_mesh(parallel), in_specs=in_specs, out_specs=rows))


def assert_close(got, want):
    """Within ROUNDINGS of the largest value."""
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, atol=ROUNDINGS * 2**-24 * np.abs(want).max(initial=0))


one_device = jax.jit(call, static_argnums=0)


def tokens(config, count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, config.hidden_size), np.float32), rng.integers(0, 31, count, np.int32)


def emulated(x, result, slices, axis):
    """What `jax.lax.ragged_all_to_all` does, from everything gathered: rows that nobody is sent stay."""
    everything, parts = (jax.lax.all_gather(part, axis) for part in (x, jnp.stack(slices)))
    own, row = jax.lax.axis_index(axis), jnp.arange(result.shape[0])
    for source in range(everything.shape[0]):
        start, size, target, _ = parts[source, :, own]
        wanted = (row >= target) & (row < target + jnp.minimum(size, slices.recv_sizes[source]))
        at = jnp.clip(start + row - target, 0, x.shape[0] - 1)
        result = jnp.where(wanted[:, None], everything[source][at], result)
    return result


@pytest.fixture
def way(request, monkeypatch):
    """Both ways in which tokens cross: "dense", and "ragged" by the emulation."""
    if request.param == "ragged":
        monkeypatch.setattr(experts, "exchange_rows", emulated)
        monkeypatch.setattr(experts, "RAGGED_PLATFORMS", ("cpu",))
    return request.param


def ways(names):
    """Every mesh of these names with each way in which its tokens cross."""
    return [
        (name, way) for name, way in itertools.product(names, ["dense", "ragged"]) if way == "dense" or name in CROSSING
    ]


def both_ways(names):
    return pytest.mark.parametrize(("name", "way"), ways(names), indirect=["way"])


def agree(config, name, way, x, token_ids, params=None):
    """Asserts that many devices and one give the same; returns the latter."""
    params = layer(config) if params is None else params
    got = on_mesh(config, MESHES[name], way)(params, x, token_ids)
    want = one_device(config, params, x, token_ids)
    assert got.dtype == want.dtype == x.dtype
    assert_close(got, want)
    return got


# 1 s each. By default every kind of axis, and those that only stand beside.
OFTEN = ["data x tensor", "all three", "context and shared columns", "data, tensor beside", "columns and data"]


@pytest.mark.parametrize(("name", "way"), marks.rarely(ways(MESHES), ways(OFTEN)), indirect=["way"])
def test_as_on_one_device(name, way):
    agree(SIGMOID, name, way, *tokens(SIGMOID, 8 * MESHES[name].data))


@pytest.mark.parametrize("config", [SOFTMAX, V4], ids=["softmax", "v4"])
@pytest.mark.parametrize(("name", "way"), marks.rarely(ways(MESHES), ways(["data x tensor"])), indirect=["way"])
def test_other_routers(config, name, way):
    agree(config, name, way, *tokens(config, 8 * MESHES[name].data))


@both_ways(["data x tensor", "data, tensor beside"])
@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(name, way, count):
    agree(SIGMOID, name, way, *tokens(SIGMOID, count * MESHES[name].data))


@both_ways(["data", "data x tensor", "tensor"])
def test_uneven_routing(name, way):
    """A bias chooses: all tokens go to the same experts, of one device, and all others have none."""
    x, ids = tokens(SIGMOID, 8 * MESHES[name].data)
    for favoured in ([0, 1, 2], [5, 6, 7]):
        bias = np.zeros(8, np.float32)
        bias[favoured] = 10.0
        params = layer(SIGMOID)
        agree(SIGMOID, name, way, x, ids, params | {"gate": params["gate"] | {"e_score_correction_bias": bias}})


@both_ways(["data x tensor", "tensor", "columns"])
def test_padding_may_hold_anything(name, way):
    """Bitwise: other tokens do not see NaN and infinities."""
    x, ids = tokens(SIGMOID, 8 * MESHES[name].data)
    spoilt = x.copy()
    spoilt[3], spoilt[-1] = np.nan, np.inf
    fn = on_mesh(SIGMOID, MESHES[name], way)
    got, want = (np.delete(fn(layer(SIGMOID), rows, ids), [3, len(x) - 1], axis=0) for rows in (spoilt, x))
    np.testing.assert_array_equal(got, want)
    assert np.isfinite(want).all()


@both_ways(["data x tensor"])
def test_bfloat16(name, way):
    """Sums in bfloat16: three roundings of 2**-8 and those of the products."""
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim > 1 else a, layer(SIGMOID))
    x, ids = tokens(SIGMOID, 16)
    x = jnp.asarray(x, jnp.bfloat16)
    got = on_mesh(SIGMOID, MESHES[name], way)(narrow, x, ids)
    want = one_device(SIGMOID, narrow, x, ids)
    assert got.dtype == jnp.bfloat16
    wide = [np.asarray(a, np.float32) for a in (got, want)]
    np.testing.assert_allclose(*wide, atol=4 * 2**-8 * np.abs(wide[1]).max())


def some_elsewhere(count):
    """Arguments of `routed_experts` for two experts, a third of the pairs being elsewhere; and what they give."""
    rng = np.random.default_rng(0)
    own = {name: w[2:4] for name, w in layer(SIGMOID)["experts"].items()}
    x, _ = tokens(SIGMOID, count)
    ids = rng.integers(0, 3, (count, 3), np.int32)
    weights = np.where(ids < 2, rng.random((count, 3), np.float32), 0)
    parts = [np.asarray(swiglu({name: w[e] for name, w in own.items()}, x)) for e in range(2)]
    args = jax.tree.map(jnp.asarray, (own, x, weights, ids))
    return args, sum(np.where(ids == e, weights, 0).sum(1)[:, None] * parts[e] for e in range(2))


def test_a_grouped_product_skips_experts_elsewhere(monkeypatch):
    """Pairs of id E have no row in a group; what the product writes there (here NaN) is not read."""
    product = jax.lax.ragged_dot

    def careless(a, w, sizes, **options):
        inside = jnp.arange(a.shape[0]) < sizes.sum()
        return jnp.where(inside[:, None], product(a, w, sizes, **options), jnp.nan)

    monkeypatch.setattr(jax.lax, "ragged_dot", careless)
    args, want = some_elsewhere(6)
    assert_close(moe_layer._grouped(*args, elsewhere=True), want)


@pytest.mark.parametrize("count", [6, 300])
def test_blocks_skip_experts_elsewhere(count):
    """One block and several of an expert, values and derivatives; pairs of id E are in none."""
    (own, x, weights, ids), want = some_elsewhere(count)
    by_block = functools.partial(jax.jit(moe_layer._by_block, static_argnums=(4, 5)), own)
    assert_close(by_block(x, weights, ids, None, True), want)
    assert not by_block(x, np.zeros_like(weights), np.full_like(ids, 2), None, True).any()

    def loss(way, weights):
        return (way(own, x, weights, ids, None, True) ** 2).sum()

    ways = (moe_layer._by_block, moe_layer._grouped)
    got, want = (jax.jit(jax.grad(functools.partial(loss, way)))(weights) for way in ways)
    assert_close(got, want)


@pytest.mark.parametrize("parallel", [Parallel(tensor=4), Parallel(data=2, context=2, tensor=2)])
def test_dense_layer(parallel):
    params = layer(SIGMOID)["shared_experts"]
    x, _ = tokens(SIGMOID, 10)
    rows, split = P(parallel.axis("data")), specs(layer(SIGMOID), parallel)["shared_experts"]
    fn = jax.shard_map(
        functools.partial(swiglu, parallel=parallel), mesh=make_mesh(parallel), in_specs=(split, rows), out_specs=rows
    )
    assert_close(jax.jit(fn)(params, x), swiglu(params, x))


def test_blocks_on_many_devices(monkeypatch):
    """The way of GPUs with many tokens, values and derivatives, typed for the default check of `jax.shard_map`."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **others: default(*args))
    monkeypatch.setattr(moe_layer, "GROUPED_PAIRS", ())
    parallel, params = MESHES["data x tensor"], layer(SIGMOID)
    x, ids = map(jnp.asarray, tokens(SIGMOID, 16))
    split = on_mesh.__wrapped__(SIGMOID, parallel, "blocks")
    assert_close(split(params, x, ids), one_device(SIGMOID, params, x, ids))

    def loss(fn, own):
        return (fn(params | {"experts": own}, x, ids) ** 2).sum()

    fns = (split, functools.partial(call, SIGMOID))
    got, want = (jax.jit(jax.grad(functools.partial(loss, fn)))(params["experts"]) for fn in fns)
    jax.tree.map(assert_close, got, want)


def test_platforms_with_ragged_exchange():
    """The program for GPUs has it, the one for CPUs does not."""
    for platform, there in (("cuda", True), ("cpu", False)):
        fn = on_mesh(SIGMOID, MESHES["data x tensor"], "dense")
        lowered = fn.trace(layer(SIGMOID), *tokens(SIGMOID, 16)).lower(lowering_platforms=(platform,))
        assert ("ragged_all_to_all" in lowered.as_text()) == there, platform
        assert ("all_gather" in lowered.as_text()) != there, platform


# --- faults
def traced(parallel, config=SIGMOID, spec=None):
    """Traces the layer with weights that lie as `parallel` says, or otherwise."""
    params = layer(config)
    rows = P(parallel.axis("data"))
    fn = functools.partial(moe, config=config, parallel=parallel)
    in_specs = (specs(params, parallel) if spec is None else spec, rows)
    x = jax.ShapeDtypeStruct((8, config.hidden_size), jnp.float32)
    jax.eval_shape(jax.shard_map(fn, mesh=make_mesh(parallel), in_specs=in_specs, out_specs=rows), params, x)


def test_experts_that_do_not_divide():
    with pytest.raises(ValueError, match=r"8 experts over 3 devices \(data=3 x tensor=1\).* divides 8: 1, 2, 4, 8"):
        experts.local_experts(8, Parallel(data=3))
    nine = dataclasses.replace(SIGMOID, n_routed_experts=9, n_group=3)
    with pytest.raises(ValueError, match=r"9 experts over 2 devices .* divides 9: 1, 3, 9"):
        traced(Parallel(data=2), nine, P())


def test_weights_of_other_devices():
    with pytest.raises(ValueError, match=r"params hold 8 routed experts; 2 are expected"):
        traced(Parallel(data=4), spec=P())
    with pytest.raises(ValueError, match=r"params hold 20 columns of shared_experts; 5 are expected"):
        traced(Parallel(tensor=4), spec=specs(layer(SIGMOID), Parallel(tensor=4)) | {"shared_experts": P()})
    with pytest.raises(ValueError, match=r"params hold 20 columns of experts; 10 are expected"):
        traced(Parallel(tensor=2, experts=()), spec=P())
    with pytest.raises(ValueError, match=r"shared_experts have 20 columns, and parallel.tensor is 8"):
        traced(Parallel(tensor=8), spec=P())


def test_axes_of_another_mesh():
    rows, four = P(), make_mesh(Parallel(context=4))
    for parallel, message in (
        (Parallel(context=2, experts=("context",)), "parallel has context=2; axis 'context' .* has 4 devices"),
        (Parallel(tensor=2, names=("data", "context", "model")), "no mesh axis of that name is in use here"),
    ):
        fn = jax.shard_map(functools.partial(call, SIGMOID, parallel=parallel), mesh=four, in_specs=P(), out_specs=rows)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(fn, layer(SIGMOID), *tokens(SIGMOID, 8))


@pytest.mark.parametrize("step", [attention_step, functools.partial(compressed_attention_step, layer=0)])
def test_attention_on_axes_of_another_mesh(step):
    def call_step(x):
        names = {attention_step: ("cache", "index_cache")}.get(step, ("caches",))
        return step({}, x, metadata=None, config=SIGMOID, parallel=Parallel(context=2), **dict.fromkeys(names))

    fn = jax.shard_map(call_step, mesh=make_mesh(Parallel(context=4)), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="parallel has context=2; axis 'context' .* has 4 devices"):
        jax.eval_shape(fn, jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="no mesh axis of that name is in use here"):
        call_step(jnp.zeros((2, 2)))


def test_a_sum_of_what_is_the_same():
    mesh = make_mesh(Parallel(tensor=2))
    with pytest.raises(ValueError, match=r"x is the same on all devices of \['tensor'\]"):
        jax.eval_shape(jax.shard_map(lambda x: sum_over(x, ("tensor",)), mesh=mesh, in_specs=P(), out_specs=P()), 1.0)


# --- bytes
def test_traffic():
    """By hand, and by routing at random."""
    sizes = {"tokens": 16, "hidden": 100, "num_experts": 8, "k": 3, "itemsize": 2}
    got = experts.expert_traffic(Parallel(data=4, tensor=2), **sizes)
    assert got.summed == 2 * 16 * 100 * 2 / 2
    assert got.dense == 3 * 16 * (2 * 100 * 2 + 24)
    assert got.ragged_most == 3 * 16 * 424 + 24
    rng = np.random.default_rng(0)
    chosen = rng.random((20000, 8)).argsort(axis=1)[:, :3]
    rows = np.mean([(chosen == device).any(axis=1).sum() for device in (1, 2, 3)]) / 20000
    assert math.isclose(got.ragged, 3 * (16 * rows * 424 + 8), rel_tol=0.02)
    beside = experts.expert_traffic(Parallel(data=4, tensor=2, experts=("data",)), **sizes)
    assert beside.dense == got.dense and beside.ragged_most == 3 * 8 * 424 + 24
    alone = experts.expert_traffic(Parallel(), **sizes)
    assert alone == (0, 0, 0, 0)
    assert experts.expert_traffic(Parallel(tensor=4, experts=()), **sizes) == (2 * 16 * 200 * 3 / 4, 0, 0, 0)
