"""One V4 attention layer: padding, rings that are too small, selection on its own, arguments that do not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import QUICK_COMPILE, Close, assert_leaves, assert_same_bits
from support.marks import interpreted, running, slow

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.compressed_attention import (
    compressed_attention_step,
    fuse_projections,
    select_entries,
    token_states,
)
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.models import deepseek_v4

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("compressed_attention")

CONFIG = DeepseekV4Config(
    vocab_size=8,
    hidden_size=24,
    moe_intermediate_size=4,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=4,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=9,
    n_routed_experts=2,
    num_experts_per_tok=1,
    num_hash_layers=0,
    sliding_window=6,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=3,
    hc_mult=2,
    compress_ratios=(0, 4, 8),
)
STATES = np.arange(2, dtype=np.int32)
PAGE_SIZE, TABLE = 8, np.array([[3, 1, 4, 6], [0, 2, 5, 7]], np.int32)
# Every step has so many tokens, so that programs are shared.
TOKENS = 24
NAMES = ["window", "ratio 4", "ratio 8"]
layers = pytest.mark.parametrize("layer", range(3), ids=NAMES)


@functools.cache
def weights(layer):
    """No weight of which a result could be independent: norms are not 1, biases and sinks not 0."""
    rng = np.random.default_rng(layer)
    specs = deepseek_v4.param_specs(CONFIG)["layers"][layer]["self_attn"]
    return jax.tree.map(lambda s: (len(s.shape) == 1) + 0.3 * rng.standard_normal(s.shape, np.float32), specs)


def typed_weights(layer, dtype):
    """Those of `weights` with matrices of that type."""
    specs = deepseek_v4.param_specs(CONFIG, dtype)["layers"][layer]["self_attn"]
    return jax.tree.map(lambda w, s: jnp.asarray(w, s.dtype), weights(layer), specs)


def caches(layer, query_len=20, dtype="float32", num_requests=2):
    sizes = {"num_requests": num_requests, "max_query_len": query_len}
    return deepseek_v4.create_caches(CONFIG, 8, PAGE_SIZE, **sizes, dtype=dtype)[layer]


def ints(*values):
    return np.array(values, np.int32)


# Compiled quickly: what is compared here are arguments, not how XLA:CPU optimises.
@functools.partial(jax.jit, static_argnames=("layer", "config", "implementation"), compiler_options=QUICK_COMPILE)
def _step(weights, hidden, cache, seq_lens, query_lens, state_ids, *, layer, config, implementation):
    meta = build_metadata(seq_lens, query_lens, TABLE, num_tokens=hidden.shape[0], page_size=PAGE_SIZE)
    options = dict(config=config, layer=layer, state_ids=state_ids, implementation=implementation)
    return compressed_attention_step(weights, hidden, cache, meta, **options)


def step(hidden, cache, seq_lens, query_lens=None, *, layer, states=STATES, config=CONFIG, implementation="xla"):
    """The layer's step; `query_lens` None: whole sequences."""
    lens = seq_lens, seq_lens if query_lens is None else query_lens
    how = dict(layer=layer, config=config, implementation=implementation)
    return _step(weights(layer), hidden, cache, *lens, states, **how)


def padded(rows):
    """[TOKENS, D]: rows[n, D] of every request, then zeros."""
    return np.concatenate([*rows, np.zeros((TOKENS - sum(map(len, rows)), CONFIG.hidden_size), np.float32)])


def hidden_states(*numbers):
    """The first tokens of every request, as many as asked for, padded."""
    draw = (np.random.default_rng(request).standard_normal for request in range(len(numbers)))
    return padded([normal((n, CONFIG.hidden_size), np.float32) for normal, n in zip(draw, numbers)])


@pytest.mark.parametrize(
    ("layer", "name"), [(0, "xla"), (1, "xla"), (2, "xla"), (1, "gfx942"), interpreted(1, "triton")]
)
def test_padding_may_hold_anything(layer, name):
    """NaN behind the last token moves no bit of outputs and caches; rows of padding are 0."""
    clean = hidden_states(13, 5)
    poisoned = clean.copy()
    poisoned[18:] = np.nan
    with running(name) as implementation:
        how = dict(layer=layer, implementation=implementation)
        want, got = jax.block_until_ready([step(x, caches(layer), ints(13, 5), **how) for x in (clean, poisoned)])
    assert (np.asarray(got[0])[18:] == 0).all() and np.abs(np.asarray(got[0])[:18]).min() > 0
    assert_same_bits(got, want, f"{NAMES[layer]}, {name}")


@pytest.mark.parametrize("layer", [0, 1], ids=NAMES[:2])
def test_what_exceeds_a_ring_gives_zeros(layer):
    """Rings for two tokens a step, then a step of five: its first two as with room for all, the others exactly 0.

    The other request, which brings two, has what it has with room for all.
    """
    outs = []
    for query_len in (20, 2):
        cache, done = caches(layer, query_len), np.zeros(2, np.int32)
        for number in (ints(2, 0), ints(2, 2), ints(5, 2)):
            before, done = done, done + number
            rows = [hidden_states(9)[b : b + n] for b, n in zip(before, number)]
            out, cache = step(padded(rows), cache, done, number, layer=layer)
        outs.append(np.asarray(out))
    want, got = outs
    assert (got[2:5] == 0).all() and np.abs(want[:7]).min() > 0
    np.testing.assert_array_equal(got[[0, 1, 5, 6]], want[[0, 1, 5, 6]])


@layers
def test_selected_entries(layer):
    """All that exist where there is no indexer, its index_topk where there is, none in a layer of the window alone."""
    hidden, lens = hidden_states(20, 0), ints(20, 0)
    _, written = step(hidden, caches(layer), lens, layer=layer)

    @jax.jit
    def select(hidden, index):
        meta = build_metadata(lens, lens, TABLE, num_tokens=TOKENS, page_size=PAGE_SIZE)
        return select_entries(weights(layer), hidden, index, meta, config=CONFIG, layer=layer, implementation="xla")

    ratio, chosen = CONFIG.compress_ratio(layer), np.asarray(select(hidden, written.index))
    assert chosen.shape[0] == TOKENS
    for token, row in enumerate(chosen):
        exist = (token + 1) // ratio if ratio and token < 20 else 0
        mine = row[row >= 0]
        assert len(mine) == min(exist, CONFIG.index_topk if layer == 1 else exist)
        assert (np.diff(mine) > 0).all() and (mine < exist).all() and (row[len(mine) :] == -1).all()


@layers
def test_a_request_without_a_state_is_padding(layer):
    """A state below 0 or behind the last: zeros, although its pages hold entries, and no cache is touched."""
    _, written = step(hidden_states(9, 0), caches(layer), ints(9, 0), layer=layer)
    hidden = hidden_states(3, 2)
    want, kept = step(hidden, written, ints(12, 2), ints(3, 2), layer=layer)
    assert np.abs(np.asarray(want)[:5]).min() > 0
    # 171798692 rings of 25 slots are 4 slots more than 2 ** 32.
    assert written.window.page_size == 25
    for nowhere in (-1, 2, 171798692):
        got, cache = step(hidden, written, ints(12, 2), ints(3, 2), layer=layer, states=ints(nowhere, 1))
        assert (np.asarray(got)[:3] == 0).all()
        np.testing.assert_array_equal(np.asarray(got)[3:5], np.asarray(want)[3:5])
        # Pages and states of request 0 as before, those of request 1 as beside a request 0 that has its state.
        for before, beside, after in zip(*map(jax.tree.leaves, (written, kept, cache))):
            pages = TABLE if len(before) == TABLE.size else ints(0, 1)[:, None]
            np.testing.assert_array_equal(np.asarray(after)[pages[0]], np.asarray(before)[pages[0]])
            np.testing.assert_array_equal(np.asarray(after)[pages[1]], np.asarray(beside)[pages[1]])


def test_bfloat16_in_and_out_of_fp8_caches():
    hidden, lens = hidden_states(9, 3), ints(9, 3)
    out, _ = step(jnp.asarray(hidden, jnp.bfloat16), caches(1, dtype="float8_e4m3fnuz"), lens, layer=1)
    wide, _ = step(hidden, caches(1), lens, layer=1)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(out.astype(jnp.float32) - wide) < 0.1 * np.linalg.norm(wide)


# --- fused projections
# Not asked where all entries of a request would be chosen.
EVERY = dataclasses.replace(CONFIG, index_topk=8)


@pytest.mark.parametrize(
    ("layer", "config", "name", "dtype"),
    [
        *((layer, CONFIG, "xla", "float32") for layer in range(3)),
        (1, EVERY, "xla", "float32"),
        (1, CONFIG, "xla", "bfloat16"),
        (1, CONFIG, "gfx942", "float32"),
        interpreted(1, CONFIG, "triton", "float32"),
        *(slow(layer, CONFIG, "xla", "bfloat16") for layer in (0, 2)),
        slow(1, CONFIG, "triton", "bfloat16"),
    ],
)
def test_fused_projections_change_nothing(layer, config, name, dtype):
    params, lens = typed_weights(layer, dtype), ints(20, 4)
    hidden = jnp.asarray(hidden_states(20, 4), dtype)
    with jax.default_matmul_precision("highest"), running(name) as implementation:
        how = dict(layer=layer, config=config, implementation=implementation)
        results = [
            _step(p, hidden, caches(layer, dtype=dtype), lens, lens, STATES, **how)
            for p in (params, jax.jit(fuse_projections)(params))
        ]
        want, got = jax.block_until_ready(results)

    # A sum of another order may round to the next bfloat16.
    def limit(x):
        atol = 2e-6 if dtype == "float32" else 2**-7 * np.abs(np.asarray(x, np.float32)).max()
        return Close(rtol=1e-7, atol=atol)

    assert_leaves(got, want, jax.tree.map(limit, want), f"{NAMES[layer]}, {name}, fused")


@layers
def test_fusing_leaves_every_weight(layer):
    """And the ones of the queries' norm; once is enough."""
    fused = fuse_projections(weights(layer))
    assert fuse_projections(fused) is fused
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (weights(layer), fused))
    assert after == before + CONFIG.head_dim


def test_selection_by_fused_weights():
    hidden, lens = hidden_states(20, 0), ints(20, 0)
    _, written = step(hidden, caches(1), lens, layer=1)

    @jax.jit
    def select(weights):
        meta = build_metadata(lens, lens, TABLE, num_tokens=TOKENS, page_size=PAGE_SIZE)
        return select_entries(weights, jnp.asarray(hidden), written.index, meta, config=CONFIG, layer=1)

    np.testing.assert_array_equal(*(select(p) for p in (weights(1), fuse_projections(weights(1)))))


# --- arguments
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=hidden_states(6)[:, 1:]), r"hidden is float32\[24, 23\]; expected float32 or bfloat16 \[24, 24\]"),
        (dict(cache=caches(2)), "caches.index is absent"),
        (dict(cache=caches(0)), "caches.compressed is absent"),
        (dict(config=dataclasses.replace(CONFIG, head_dim=20)), r"caches.window holds 12 \+ 4 values"),
        (
            dict(config=dataclasses.replace(CONFIG, sliding_window=30)),
            "ring is 25; expected an integer of at least 30. A window of 30",
        ),
        (dict(states=ints(0, 1, 2)), r"state_ids is int32\[3\]; expected integers \[2\]"),
        (dict(states=np.ones(2, np.float32)), r"state_ids is float32\[2\]; expected integers \[2\]"),
        (dict(cache=caches(1, num_requests=1), states=None), "caches.window has 1 rings"),
        (dict(cache=dataclasses.replace(caches(1), state=caches(1, num_requests=9).state)), "caches.state has 9 rows"),
        (
            dict(cache=dataclasses.replace(caches(1), index_state=caches(1, num_requests=9).index_state)),
            "caches.index_state has 9 rows",
        ),
    ],
)
def test_refuses(change, message):
    given = dict(hidden=hidden_states(3, 3), cache=caches(1), seq_lens=ints(3, 3), layer=1) | change
    with pytest.raises(ValueError, match=message):
        step(**given)


def test_wide_ids_wrap_into_no_ring():
    meta = decode_metadata(ints(3, 3), TABLE, page_size=PAGE_SIZE)
    with jax.enable_x64(True):
        ids = jnp.asarray([2**32, 1])
        assert ids.dtype == jnp.int64
        assert list(np.asarray(token_states(meta, ids, rings=4, capacity=8))) == [-1, 1]


def test_selection_refuses_a_layer_s_wrong_index():
    def select(hidden, index, layer):
        meta = decode_metadata(ints(3, 3), TABLE, page_size=PAGE_SIZE)
        return select_entries(weights(layer), hidden, index, meta, config=CONFIG, layer=layer)

    for layer, index in ((1, None), (2, caches(1).index)):
        message = f"index is {'there' if index else 'absent'} in a layer with compress_ratio {4 * layer}"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(select, layer=layer), hidden_states(1, 1)[:2], index)
