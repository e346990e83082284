"""DeepSeek-V4 from a folder to logits: against the published fixture, and the oracle on models of other shapes."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_v4_oracle import model_logits
from small_models import check_in_place, scattered_pages, write_folder
from support.marks import interpreted, slow

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V4_PRO, DeepseekV4Config, RopeConfig
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import deepseek_v4 as model
from sparse_mla_jax.models.checkpoint import load_checkpoint, published_shapes
from sparse_mla_jax.ops.window import ring_size

pytestmark = pytest.mark.xdist_group("v4 model")

# Six heads in three groups, rope a third of the head, a window that wraps, a ratio of 128, two layers of token tables.
ODD = DeepseekV4Config(
    vocab_size=61,
    hidden_size=40,
    moe_intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=6,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=21,
    o_groups=3,
    o_lora_rank=10,
    n_routed_experts=7,
    num_experts_per_tok=2,
    num_hash_layers=2,
    swiglu_limit=1.0,
    sliding_window=11,
    index_n_heads=3,
    index_head_dim=12,
    index_topk=5,
    hc_mult=3,
    compress_ratios=(4, 128, 0),
    compress_rope=RopeConfig(theta=160000.0, factor=16.0, original_max_position=65536),
)
BOUND = 5e-5


def random_v4(config, seed=0):
    """Random published tensors, scaled so that every part of the model matters."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in published_shapes(config).items():
        if name.endswith("tid2eid"):
            rows = [rng.permutation(config.n_routed_experts)[: shape[1]] for _ in range(shape[0])]
            tensors[name] = np.array(rows, np.int64)
        elif len(shape) == 2:
            scale = 1.0 if name.endswith("ape") else shape[-1] ** -0.5
            tensors[name] = (rng.normal(size=shape) * scale).astype(np.float32)
        else:
            centre = float(name.endswith(("norm.weight", "scale")))
            tensors[name] = (rng.normal(size=shape) * 0.3 + centre).astype(np.float32)
    return tensors


@functools.partial(jax.jit, static_argnames=("config", "page_size", "implementation"), donate_argnames="caches")
def all_logits(params, ids, caches, seq_lens, query_lens, table, states, *, config, page_size, implementation=None):
    meta = build_metadata(seq_lens, query_lens, table, num_tokens=ids.shape[0], page_size=page_size)
    options = {"config": config, "state_ids": states, "implementation": implementation}
    hidden, caches = model.forward(params, ids, caches, meta, **options)
    return model.logits(params, hidden, config), caches


def run(config, params, ids, *, chunks, dtype=jnp.float32, implementation=None, page_size=16, capacity=0):
    """float32[B, L, V]: all sequences in one batch, cut into steps of `chunks` tokens each (the last one repeats).

    The caches have room for `capacity` tokens of each sequence, or for L of them.
    """
    batch, length = ids.shape
    table, pages = scattered_pages(batch, capacity or length, page_size)
    states = np.random.default_rng(5).permutation(batch).astype(np.int32)
    caches = model.create_caches(config, pages, page_size, num_requests=batch, max_query_len=max(chunks), dtype=dtype)
    outs, done, step = [], 0, 0
    while done < length:
        size = min(chunks[min(step, len(chunks) - 1)], length - done)
        tokens, step = ids[:, done : done + size].reshape(-1), step + 1
        done += size
        out, caches = all_logits(
            params,
            tokens,
            caches,
            np.full(batch, done, np.int32),
            np.full(batch, size, np.int32),
            table,
            states,
            config=config,
            page_size=page_size,
            implementation=implementation,
        )
        outs.append(np.asarray(out).reshape(batch, size, -1))
    return np.concatenate(outs, axis=1)


@pytest.fixture(scope="module")
def tiny(fixtures):
    folder = fixtures / "deepseek_v4_tiny"
    config, params = load_checkpoint(folder)
    with np.load(folder / "expected.npz") as data:
        return config, params, data["input_ids"].astype(np.int32), data["logits"], int(data["prompt_length"])


def build(config, folder):
    """(params, published tensors, ids [2, L] that cross the first boundary of 128, the oracle's logits)."""
    tensors = random_v4(config)
    write_folder(folder, config, tensors)
    read, params = load_checkpoint(folder)
    assert read == config
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, 140)).astype(np.int32)
    return params, tensors, ids, np.stack([model_logits(tensors, config, row) for row in ids])


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return build(ODD, tmp_path_factory.mktemp("odd") / "model")


# --- exactness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["decode", "prefill", "chunks"])
def test_fixture(tiny, way):
    config, params, ids, expected, prompt_length = tiny
    chunks = {"decode": [1], "prefill": [prompt_length, 1], "chunks": [23]}[way]
    with jax.default_matmul_precision("highest"):
        out = run(config, params, ids, chunks=chunks)
    error = np.abs(out - expected).max(axis=(0, 2))
    assert error.max() <= BOUND, f"position {error.argmax()}: {error.max()}"


@pytest.mark.parametrize(
    ("chunks", "page_size"),
    # Chunks end at every remainder of a ratio of 4. Pages of one entry: by default in test_v4_engine.
    [([1], 128), ([35], 16), slow([3, 120, 1], 4)],
    ids=["decode", "chunks", "pages of one entry"],
)
def test_other_shapes(odd, chunks, page_size):
    params, _, ids, expected = odd
    with jax.default_matmul_precision("highest"):
        out = run(ODD, params, ids, chunks=chunks, page_size=page_size)
    error = np.abs(out - expected).max(axis=(0, 2))
    assert error.max() <= BOUND, f"position {error.argmax()}: {error.max()}"


@pytest.mark.slow
@pytest.mark.parametrize(("chunks", "page_size"), [([1], 128), ([23], 16)], ids=["decode", "chunks"])
def test_layers_after_layers_of_their_kind(tmp_path, chunks, page_size):
    """Two layers of the window alone, and two of ratio 4 of which one has no hash routing."""
    config = dataclasses.replace(ODD, num_hidden_layers=5, compress_ratios=(0, 4, 128, 4, 0))
    params, _, ids, expected = build(config, tmp_path / "model")
    with jax.default_matmul_precision("highest"):
        out = run(config, params, ids, chunks=chunks, page_size=page_size)
    assert np.abs(out - expected).max() <= BOUND


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
def test_fused_projections(tiny, implementation):
    config, params, ids, expected, _ = tiny
    fused = jax.jit(model.fuse_projections)(params)
    with jax.default_matmul_precision("highest"):
        out = run(config, fused, ids[:, :20], chunks=[10], implementation=implementation)
    assert np.abs(out - expected[:, :20]).max() <= BOUND


def test_selection_matters(odd):
    """Control: with one more chosen entry the logits leave the bound where there are so many, and not before."""
    params, _, ids, expected = odd
    with jax.default_matmul_precision("highest"):
        out = run(dataclasses.replace(ODD, index_topk=6), params, ids[:, :69], chunks=[23])
    error = np.abs(out - expected[:, :69]).max(axis=(0, 2))
    first = 4 * 6 - 1
    assert error[:first].max() <= BOUND and error[first:].max() > 10 * BOUND


@pytest.mark.parametrize(
    "implementation", [slow("reference"), interpreted("triton"), slow("gfx942"), "gfx950"], indirect=True
)
def test_implementations_agree(tiny, implementation):
    config, params, ids, expected, _ = tiny
    with jax.default_matmul_precision("highest"):
        out = run(config, params, ids[:, :20], chunks=[17, 1], implementation=implementation)
    assert np.abs(out - expected[:, :20]).max() <= BOUND


@pytest.mark.parametrize(
    "dtype",
    [jnp.float8_e4m3fnuz, *(pytest.param(t, marks=pytest.mark.slow) for t in (jnp.float8_e4m3fn, jnp.bfloat16))],
)
def test_quantised_caches_stay_close(tiny, dtype):
    config, params, ids, expected, _ = tiny
    out = run(config, params, ids, chunks=[24], dtype=dtype)
    # FP8 rounds a key by up to 6 % of a value; a random model of logits about 1 moves by that much, not more.
    difference = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
    assert difference < (0.02 if dtype == jnp.bfloat16 else 0.15)
    assert difference > 1e-5


def test_bfloat16_model(tiny):
    config, params, ids, expected, _ = tiny
    narrow = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), params, model.param_specs(config, jnp.bfloat16))
    out = run(config, narrow, ids, chunks=[24], dtype=jnp.bfloat16)
    assert np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)) < 0.1


# --- steps -----------------------------------------------------------------------------------------------------------
def test_mixed_steps_give_every_request_its_own_logits(odd):
    """Requests of different lengths in one step, decode tokens beside prefill chunks, padding everywhere."""
    params, _, ids, expected = odd
    page_size, batch, width = 16, 3, 9
    table = np.random.default_rng(3).permutation(batch * width).reshape(batch, width).astype(np.int32)
    caches = model.create_caches(ODD, batch * width, page_size, num_requests=4, max_query_len=40, dtype="float32")
    states, done = np.array([3, 0, 2], np.int32), np.zeros(3, np.int32)
    # (request 0, request 1) tokens per step; the third row is padding.
    for first, second in [(30, 0), (1, 33), (1, 1), (40, 1), (2, 40), (0, 3), (1, 1)]:
        lens = np.array([first, second, 0], np.int32)
        tokens = np.concatenate([ids[b, done[b] : done[b] + lens[b]] for b in (0, 1)])
        padded = np.full(80, 7, np.int32)
        padded[: len(tokens)] = tokens
        done += lens
        with jax.default_matmul_precision("highest"):
            out, caches = all_logits(
                params, padded, caches, done.copy(), lens, table, states, config=ODD, page_size=page_size
            )
        at = 0
        for b in (0, 1):
            want = expected[b, done[b] - lens[b] : done[b]]
            assert np.abs(np.asarray(out)[at : at + lens[b]] - want).max(initial=0) <= BOUND
            at += lens[b]


def test_a_reused_state_shows_nothing_of_its_last_request(odd):
    """The ring and the compressor state of a request that has ended hold poison; a new one starts there."""
    params, _, ids, expected = odd
    caches = model.create_caches(ODD, 20, 16, num_requests=1, max_query_len=25, dtype="float32")
    caches = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), caches)
    table, states = np.arange(9, dtype=np.int32)[None], np.zeros(1, np.int32)
    size = 25
    for done in (25, 50):
        with jax.default_matmul_precision("highest"):
            out, caches = all_logits(
                params,
                ids[0, done - size : done],
                caches,
                np.array([done], np.int32),
                np.array([size], np.int32),
                table,
                states,
                config=ODD,
                page_size=16,
            )
        assert np.abs(np.asarray(out) - expected[0, done - size : done]).max() <= BOUND


def test_prefill_and_decode_functions(odd):
    params, _, ids, expected = odd
    table = np.arange(18, dtype=np.int32).reshape(2, 9)
    caches = model.create_caches(ODD, 18, 16, num_requests=2, max_query_len=20, dtype="float32")
    options = {"config": ODD, "page_size": 16}
    prefill, decode = (jax.jit(f, static_argnames=tuple(options)) for f in (model.prefill, model.decode))
    with jax.default_matmul_precision("highest"):
        lens = np.array([20, 13], np.int32)
        tokens = np.concatenate([ids[0, :20], ids[1, :13]])
        out, caches = prefill(params, tokens, caches, lens, lens, table, **options)
        np.testing.assert_allclose(out, [expected[0, 19], expected[1, 12]], atol=BOUND)
        out, caches = decode(params, np.array([ids[0, 20], ids[1, 13]]), caches, lens + 1, table, **options)
    np.testing.assert_allclose(out, [expected[0, 20], expected[1, 13]], atol=BOUND)


def test_repeats_are_equal_and_other_lengths_do_not_retrace(tiny):
    config, params, ids, _, _ = tiny
    # Chunks and caches of `test_fixture`, whose program is there already.
    how = {"chunks": [23], "capacity": ids.shape[1]}
    with jax.default_matmul_precision("highest"):
        runs = [run(config, params, ids[:, :46], **how) for _ in range(2)]
        chex.assert_trees_all_equal(*runs)
        before = all_logits._cache_size()
        run(config, params, ids[:, 8:54], **how)
    assert all_logits._cache_size() == before


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_caches_are_updated_in_place(tiny, dtype):
    """Layers of every kind. Not of FP8 caches: XLA:CPU converts the whole array of their E8M0 scales in every step."""
    config = dataclasses.replace(tiny[0], num_hidden_layers=3, compress_ratios=tiny[0].compress_ratios[:3])
    check_in_place(
        functools.partial(model.decode, config=config, page_size=16),
        model.param_specs(config),
        lambda pages: model.create_caches(config, pages, 16, num_requests=2, dtype=dtype),
    )


# --- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flavour", ["float8_e4m3fnuz", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("config", "bound"), [(DEEPSEEK_V4_FLASH, 3915), (DEEPSEEK_V4_PRO, 5609)], ids=["flash", "pro"]
)
def test_memory_per_token(config, bound, flavour):
    """Bytes of a million tokens from the shapes of the caches: per token by ratio, per request bounded."""
    page_size, context = 256, 1048576
    pages = context // page_size
    caches = jax.eval_shape(
        lambda: model.create_caches(config, pages, page_size, num_requests=1, max_query_len=512, dtype=flavour)
    )
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
    per_request = model.bytes_per_request(caches)
    assert total == model.bytes_per_token(caches, page_size) * context + per_request
    assert model.bytes_per_token(caches, page_size) <= bound
    # 448 + 64 values, 7 scales; an index key of 128 and its scale.
    fours, large = (sum(r == ratio for r in config.compress_ratios) for ratio in (4, 128))
    assert model.bytes_per_token(caches, page_size) == (fours * (583 + 132) / 4 + large * 583 / 128)
    # Nothing of a request grows with its length: windows and states of a shorter cache are as large.
    short = jax.eval_shape(
        lambda: model.create_caches(config, 1, page_size, num_requests=1, max_query_len=512, dtype=flavour)
    )
    assert model.bytes_per_request(short) == per_request < 48 << 20


def test_decode_only_rings_are_windows():
    caches = jax.eval_shape(lambda: model.create_caches(ODD, 2, 128, num_requests=3, dtype="float32"))
    assert {layer.window.page_size for layer in caches} == {ODD.sliding_window} == {ring_size(11, 1)}


# --- arguments -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ids=np.zeros(2, np.float32)), "token_ids is float32"),
        (dict(states=np.zeros(5, np.int32)), r"state_ids is int32\[5\]; expected integers \[2\]"),
        (dict(config=dataclasses.replace(ODD, compress_ratios=(4, 0, 0))), "caches.compressed is"),
        (
            dict(config=dataclasses.replace(ODD, num_hidden_layers=2, compress_ratios=(4, 128))),
            "caches has 3 layers",
        ),
        (dict(page_size=32), "caches.compressed has pages of"),
    ],
)
def test_refuses(odd, change, message):
    params = odd[0]
    caches = model.create_caches(ODD, 8, 16, num_requests=2, dtype="float32")
    given = dict(ids=np.zeros(2, np.int32), states=np.zeros(2, np.int32), config=ODD, page_size=16) | change
    ones = np.ones(2, np.int32)
    with pytest.raises(ValueError, match=message):
        all_logits(
            params,
            given["ids"],
            caches,
            ones,
            ones,
            np.zeros((2, 8), np.int32),
            given["states"],
            config=given["config"],
            page_size=given["page_size"],
        )


def test_page_size_must_fit_the_ratios():
    with pytest.raises(ValueError, match="page_size is 48"):
        model.create_caches(ODD, 8, 48, num_requests=2)


def test_page_size_comes_from_the_caches(odd):
    caches = model.create_caches(ODD, 8, 16, num_requests=2, dtype="float32")
    inputs = np.zeros(2, np.int32), np.ones(2, np.int32), np.zeros((2, 8), np.int32)

    def decode(caches, **options):
        ids, lens, table = inputs
        return jax.eval_shape(lambda c: model.decode(odd[0], ids, c, lens, table, config=ODD, **options), caches)

    assert decode(caches) == decode(caches, page_size=16)
    with pytest.raises(ValueError, match="page_size is 32; the caches have pages of 16 tokens"):
        decode(caches, page_size=32)
    unnamed = tuple(dataclasses.replace(layer, page_size=None) for layer in caches)
    assert decode(unnamed, page_size=16)[0] == decode(caches)[0]
    with pytest.raises(ValueError, match="page_size is None"):
        decode(unnamed)
