"""Operators on several devices: under `jax.shard_map` with its default check, and in a mesh with Explicit axes.

Every operator with a kernel, each implementation, on 1, 2 and 8 devices: tokens, heads, pages or columns are split. The
result must be that of one device.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import ONE_LAYER, random_params
from support.equivalence import Close, Same, assert_leaves, assert_same_bits

from sparse_mla_jax import metadata
from sparse_mla_jax.layers.mla import attention_step
from sparse_mla_jax.models.deepseek_v32 import create_caches, param_specs
from sparse_mla_jax.ops import attention, cache, compressor, hyper_connections, indexer, norm_rope, ragged, topk
from sparse_mla_jax.ops.output_projection import rotated_projection

# XLA:CPU adds up in an order that depends on the shape of a shard.
BOUND = Close(rtol=1e-6, atol=4e-6)
DEVICES = (1, 2, 8)
NAMES = ("xla", "triton", "reference")


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), dtype)


def numbers(high, *shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).integers(-1, high, shape), jnp.int32)


ROWS_SPLIT, WHOLE = P("x"), P()


@dataclasses.dataclass(frozen=True)
class Split:
    """A call and how its arrays are split over the axis "x": fn(*args, implementation=...).

    `one` is what one device computes, if it is another function.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    specs: tuple[Any, ...]
    out: Any = ROWS_SPLIT
    one: Callable[..., Any] | None = None

    def on_one(self, name):
        """The result on one device."""
        return jax.jit(functools.partial(self.one or self.fn, implementation=name))(*self.args)

    def on(self, devices, name):
        """The result under `jax.shard_map` with its default check."""
        mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
        fn = functools.partial(self.fn, implementation=name)
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=self.specs, out_specs=self.out))(*self.args)


def filled(dtype="float8_e4m3fnuz"):
    empty = cache.PagedKVCache.create(4, 8, latent_dim=16, rope_dim=8, group_size=16, dtype=dtype)
    return cache.write(empty, normal(32, 16), normal(32, 8), jnp.arange(32), implementation="xla")


def filled_index(dtype="float8_e4m3fnuz"):
    empty = cache.PagedIndexCache.create(4, 8, dim=16, dtype=dtype)
    return cache.write_index(empty, normal(32, 16), jnp.arange(32), implementation="xla")


def attend(q, kv, rows, sinks, *, implementation):
    how = dict(sm_scale=0.3, value_dim=16, sinks=sinks, implementation=implementation, return_lse=True)
    return attention.sparse_mla(q, kv, rows, **how)


def attend_ragged(q, kv, rows, sinks, *, implementation):
    return attend(q, kv, ragged.pack_rows(rows), sinks, implementation=implementation)


def attend_to_all(q, kv, rows, *, implementation):
    return attention.sparse_mla(q, kv, rows, sm_scale=0.3, value_dim=16, implementation=implementation)


def attend_in_part(q, kv, rows, *, implementation):
    """Every device attends to its own columns of the rows; the parts are joined by their lse."""
    how = dict(sm_scale=0.3, value_dim=16, implementation=implementation, return_lse=True)
    out, lse = attention.sparse_mla(q, kv, rows, **how)
    top = jax.lax.pmax(lse, "x")
    weight = jnp.where(jnp.isfinite(lse), jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0)), 0)
    total = jax.lax.psum(weight, "x")
    return jax.lax.psum(out * weight[..., None], "x") / jnp.where(total > 0, total, 1)[..., None]


def score_paged(q, weights, keys, requests, lengths, *, implementation):
    table = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
    where = table, requests, lengths
    return indexer.paged_indexer_scores(q, weights, keys, *where, max_length=16, implementation=implementation)


def select_paged(q, weights, keys, requests, lengths, *, implementation):
    table = jnp.arange(4, dtype=jnp.int32).reshape(2, 2)
    how = dict(k=5, max_length=16, memory_limit=4 * 16, implementation=implementation)
    return indexer.lightning_indexer(q, weights, keys, table, requests, lengths, **how)


def score_keys(q, keys, weights, starts, lengths, *, implementation):
    rows = dict(row_starts=starts, row_lengths=lengths)
    return indexer.indexer_scores(q, keys, None, weights, **rows, implementation=implementation)


def finish(x, *, implementation):
    gain = x[:, ::8]
    part = norm_rope.Section(
        0, gain.shape[1], 8, "float32", weight=jnp.arange(8.0), rotated=4, interleaved=True, gain=gain
    )
    positions = jnp.arange(x.shape[0], dtype=jnp.int32)
    (out,) = norm_rope.norm_rope(x, [part], positions, np.ones(2), implementation=implementation)
    return out


def finish_quantized(x, *, implementation):
    part = norm_rope.Section(0, x.shape[1] // 8, 8, "float8_e4m3fnuz")
    positions = jnp.zeros(x.shape[0], jnp.int32)
    ((out, scales),) = norm_rope.norm_rope(x, [part], positions, np.ones(2), implementation=implementation)
    return jax.lax.bitcast_convert_type(out, jnp.uint8), scales


def project(out, weight, positions, *, implementation):
    return rotated_projection(out, weight, positions, np.full(2, 0.1), implementation=implementation)


def split_streams(streams, product, *, implementation):
    base, scale = jnp.linspace(-1, 1, 8, dtype=jnp.float32), jnp.ones(3, jnp.float32)
    return hyper_connections.split(streams, product, base, scale, iterations=4, implementation=implementation)


def compress(entries, state, kv, gate, seq_lens, *, implementation):
    weights = compressor.CompressorWeights(
        jnp.ones((4, 16), jnp.float32), jnp.ones(16, jnp.float32), jnp.full(2, 0.1, jnp.float32)
    )
    table = jnp.arange(seq_lens.shape[0], dtype=jnp.int32)[:, None]
    meta = metadata.decode_metadata(seq_lens, table, page_size=16)
    return compressor.compress(entries, state, kv, gate, weights, meta, implementation=implementation)


def compressed():
    entries = cache.PagedIndexCache.create(8, 4, dim=16, dtype="float32")
    state = compressor.CompressorState.create(8, ratio=4, dim=16, overlap=False)
    state = jax.tree.map(lambda x: x + 0.5, state)
    return entries, state, normal(8, 16), normal(8, 16), jnp.asarray([4, 8, 3, 0, 12, 1, 16, 5], jnp.int32)


def write(old, latent, rope, slots, *, implementation):
    return cache.write(old, latent, rope, slots, implementation=implementation)


def write_own(old, latent, rope, slots, *, implementation):
    """Every device holds some pages: slots of other devices are out of its range."""
    return write(old, latent, rope, slots - jax.lax.axis_index("x") * old.num_slots, implementation=implementation)


WRITTEN = (
    cache.PagedKVCache.create(8, 2, latent_dim=16, rope_dim=8, group_size=16),
    normal(8, 16),
    normal(8, 8),
    jnp.asarray([3, 15, -1, 7, 3, 99, 8, 0], jnp.int32),
)
LENGTHS = jnp.asarray([16, 0, 7, 1, 16, 3, 30, -2], jnp.int32)
REQUESTS = jnp.asarray([0, 1, 1, 0, 2, 1, 0, 1], jnp.int32)
PAGED = (normal(8, 2, 16), normal(8, 2), filled_index(), REQUESTS, LENGTHS)
KEYS = (normal(8, 2, 16), normal(40, 16), normal(8, 2), jnp.arange(8) - 1, LENGTHS)
QUERY = normal(8, 8, 24)
ROWS = numbers(40, 8, 16)
# The operators, split by tokens or requests ("data"), by heads, by columns.
SPLITS = {
    "top_k, tokens": Split(
        lambda s, n, implementation: topk.top_k(s, 5, n, return_scores=True, implementation=implementation),
        (normal(8, 40), LENGTHS),
        (P("x"), P("x")),
    ),
    "indexer_scores, tokens": Split(score_keys, KEYS, (P("x"), P(), P("x"), P("x"), P("x"))),
    "indexer_scores, columns": Split(
        lambda q, k, w, implementation: score_keys(
            q, k, w, jnp.zeros(8, jnp.int32), jnp.full(8, 40, jnp.int32), implementation=implementation
        ),
        KEYS[:3],
        (P(), P("x"), P()),
        P(None, "x"),
    ),
    "paged_indexer_scores, tokens": Split(score_paged, PAGED, (P("x"), P("x"), P(), P("x"), P("x"))),
    "lightning_indexer, tokens": Split(select_paged, PAGED, (P("x"), P("x"), P(), P("x"), P("x"))),
    "sparse_mla, tokens": Split(attend, (QUERY, filled(), ROWS, normal(8)), (P("x"), P(), P("x"), P())),
    "sparse_mla, heads": Split(
        attend, (QUERY, filled(), ROWS, normal(8)), (P(None, "x"), P(), P(), P("x")), P(None, "x")
    ),
    "sparse_mla, heads, ragged": Split(
        attend_ragged, (QUERY, filled("bfloat16"), ROWS, normal(8)), (P(None, "x"), P(), P(), P("x")), P(None, "x")
    ),
    "sparse_mla, columns": Split(attend_in_part, (QUERY, filled(), ROWS), (P(), P(), P(None, "x")), P(), attend_to_all),
    "write, pages": Split(write_own, WRITTEN, (P("x"), P(), P(), P()), one=write),
    "norm_rope, heads": Split(finish, (normal(8, 64),), (P(None, "x"),), P(None, "x")),
    "norm_rope to FP8, tokens": Split(finish_quantized, (normal(8, 64),), (P("x"),)),
    "rotated_projection, groups": Split(
        project,
        (normal(4, 16, 8), normal(8, 16, 5), jnp.arange(4)),
        (P(None, "x"), P("x"), P()),
        P(None, "x"),
    ),
    "split_streams, tokens": Split(split_streams, (normal(8, 2, 16), normal(8, 8)), (P("x"), P("x"))),
    "compress, requests": Split(compress, compressed(), (P("x"),) * 5),
}


# One of each kind runs by default; the others compile for a minute.
QUICK = {
    ("top_k, tokens", 2, "triton"),
    ("sparse_mla, heads", 2, "triton"),
    ("write, pages", 2, "triton"),
    ("indexer_scores, columns", 8, "xla"),
    ("lightning_indexer, tokens", 1, "reference"),
}
EVERY = [
    pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
    for each in itertools.product(SPLITS, DEVICES, NAMES)
]


@pytest.mark.parametrize(("split", "devices", "name"), EVERY)
def test_shard_map(split, devices, name):
    split = SPLITS[split]
    assert_leaves(split.on(devices, name), split.on_one(name), BOUND)


def test_reference_of_top_k_on_two_devices():
    """jaxlib 0.11.2 ended the process here."""
    split = SPLITS["top_k, tokens"]
    assert_leaves(split.on(2, "reference"), split.on_one("xla"), Same())


def test_vmap_inside_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    scores = normal(4, 6, 40)
    select = jax.vmap(lambda s: topk.top_k(s, 5, implementation="triton"))
    got = jax.jit(jax.shard_map(select, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(scores)
    np.testing.assert_array_equal(got, topk.top_k(scores.reshape(24, 40), 5, implementation="xla").reshape(4, 6, 5))


# --- Explicit axes
HEADS = {"q_b_proj": P(None, "x"), "kv_b_k": P("x"), "kv_b_v": P("x"), "o_proj": P("x")}


@pytest.mark.parametrize(
    "name", ["xla", *(pytest.param(name, marks=pytest.mark.slow) for name in ("triton", "reference"))]
)
def test_attention_step_with_sharded_heads(name):
    """`jax.make_mesh` gives Explicit axes: types say how arrays lie, and the layer must say what it does with them."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    params = random_params(param_specs(ONE_LAYER)["layers"][0]["self_attn"])
    caches = create_caches(ONE_LAYER, num_pages=8, page_size=4, dtype="float8_e4m3fnuz")[0]
    hidden = normal(12, 24)

    @jax.jit
    def step(params, hidden, caches):
        meta = metadata.build_metadata(*(jnp.full(1, 12),) * 2, jnp.arange(8)[None], num_tokens=12, page_size=4)
        return attention_step(params, hidden, *caches, meta, config=ONE_LAYER, implementation=name)

    want = step(params, hidden, caches)
    with jax.set_mesh(mesh):

        def put(tree, spec=WHOLE):
            return jax.device_put(tree, NamedSharding(mesh, spec))

        sharded = {key: put(value, HEADS.get(key, P())) for key, value in params.items()}
        got = step(sharded, put(hidden), put(caches))
    assert_leaves(got[0], want[0], Close(atol=2e-6))
    assert_same_bits(got[1:], want[1:])
