import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deepseek_v32_oracle import model_logits
from small_models import PAGE_SIZE, SMALL, check_in_place, scattered_pages, write_folder
from support.marks import slow

from sparse_mla_jax.config import RopeConfig
from sparse_mla_jax.metadata import build_metadata, decode_metadata
from sparse_mla_jax.models import deepseek_v32 as model
from sparse_mla_jax.models.checkpoint import load_checkpoint

pytestmark = pytest.mark.xdist_group("model")


@functools.partial(jax.jit, static_argnames=("config", "implementation"), donate_argnames="caches")
def all_logits(params, ids, caches, seq_lens, query_lens, table, *, config, implementation=None):
    meta = build_metadata(seq_lens, query_lens, table, num_tokens=ids.shape[0], page_size=caches[0][0].page_size)
    hidden, caches = model.forward(params, ids, caches, meta, config=config, implementation=implementation)
    return model.logits(params, hidden, config), caches


decode = jax.jit(model.decode, static_argnames=("config", "implementation"), donate_argnames="caches")


def run(
    config, params, ids, *, prompt, chunk=None, dtype=jnp.float32, implementation=None, page_size=PAGE_SIZE, capacity=0
):
    """float32[B, L, V]: `prompt` tokens in chunks of `chunk`, then one at a time, all sequences in one batch.

    The caches have room for `capacity` tokens of each sequence, or for L of them.
    """
    batch, length = ids.shape
    table, pages = scattered_pages(batch, capacity or length, page_size)
    caches = model.create_caches(config, pages, page_size, dtype=dtype)
    outs, done = [], 0
    while done < prompt:
        size = min(chunk or prompt, prompt - done)
        tokens = ids[:, done : done + size].reshape(-1)
        done += size
        lens = np.full(batch, done, np.int32), np.full(batch, size, np.int32)
        out, caches = all_logits(params, tokens, caches, *lens, table, config=config, implementation=implementation)
        outs.append(np.asarray(out).reshape(batch, size, -1))
    for position in range(prompt, length):
        lens = np.full(batch, position + 1, np.int32)
        out, caches = decode(
            params, ids[:, position], caches, lens, table, config=config, implementation=implementation
        )
        outs.append(np.asarray(out)[:, None])
    return np.concatenate(outs, axis=1)


@pytest.fixture(scope="module")
def tiny(fixtures):
    folder = fixtures / "deepseek_v32_tiny"
    config, params = load_checkpoint(folder)
    with np.load(folder / "expected.npz") as data:
        return config, params, data["input_ids"].astype(np.int32), data["logits"], int(data["prompt_length"])


# Sizes that tests of SMALL share, so that their programs are compiled once: steps of 4 requests and 16 tokens.
SHARED = {"chunk": 4, "page_size": 4, "capacity": 24}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    write_folder(folder, SMALL)
    return load_checkpoint(folder)[1]


# --- exactness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["decode", "prefill", "chunks"])
def test_fixture(tiny, way):
    config, params, ids, expected, prompt_length = tiny
    prompt, chunk = {"decode": (0, None), "prefill": (prompt_length, None), "chunks": (96, 23)}[way]
    with jax.default_matmul_precision("highest"):
        out = run(config, params, ids, prompt=prompt, chunk=chunk)
    error = np.abs(out - expected).max(axis=(0, 2))
    assert error.max() <= 5e-5, f"position {error.argmax()}: {error.max()}"


def test_fixture_needs_its_sparsity(tiny):
    """Control: the same run without selection is far off, from the first position that has one."""
    config, params, ids, expected, _ = tiny
    error = np.abs(run(config.dense(), params, ids, prompt=96) - expected).max(axis=(0, 2))
    assert error[: config.index_topk].max() < 5e-5 and error[config.index_topk :].max() > 0.1


def test_fixture_by_implementation(tiny, implementation):
    """A prompt in two pages, then two steps, through every implementation."""
    config, params, ids, expected, _ = tiny
    out = run(config, params, ids[:, :22], prompt=20, implementation=implementation)
    assert np.abs(out - expected[:, :22]).max() <= 5e-5


SHAPES = {
    "six heads, three groups of three, no dense layer, odd ranks, k 5": SMALL,
    "plain rope, one group, no renormalisation, tied, two shared experts": dataclasses.replace(
        SMALL,
        n_group=1,
        topk_group=1,
        n_routed_experts=5,
        n_shared_experts=2,
        norm_topk_prob=False,
        tie_word_embeddings=True,
        first_k_dense_replace=1,
        num_attention_heads=1,
        index_n_heads=1,
        rope=RopeConfig(theta=500.0),
    ),
    "dense layers only, no experts at all, three layers": dataclasses.replace(
        SMALL,
        n_routed_experts=0,
        n_shared_experts=0,
        num_hidden_layers=3,
        index_topk=7,
        index_head_dim=7,
        rms_norm_eps=1e-3,
        rope=RopeConfig(theta=100.0, factor=4.0, original_max_position=16, beta_fast=4.0, mscale_all_dim=0.7),
    ),
    "no shared expert, groups of two, every group kept, yarn inside the context, other pairs": dataclasses.replace(
        SMALL,
        n_routed_experts=14,
        n_group=7,
        topk_group=7,
        n_shared_experts=0,
        num_experts_per_tok=3,
        num_attention_heads=5,
        rope_interleave=False,
        indexer_rope_interleave=True,
        rope=RopeConfig(theta=100.0, factor=4.0, original_max_position=16, beta_fast=4.0, attention_factor=1.3),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name, tmp_path):
    config = SHAPES[name]
    tensors = write_folder(tmp_path / "model", config, seed=len(name))
    loaded, params = load_checkpoint(tmp_path / "model")
    assert loaded == config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 29)).astype(np.int32)
    expected = np.stack([model_logits(tensors, config, row) for row in ids])
    with jax.default_matmul_precision("highest"):
        out = run(config, params, ids, prompt=24, chunk=8, page_size=3)
    np.testing.assert_allclose(out, expected, atol=5e-5, rtol=0)


def test_mixed_batch(small):
    """Decode tokens, a first chunk, a later chunk and a waiting request in one step equal each request alone."""
    ids = np.random.default_rng(3).integers(0, SMALL.vocab_size, (4, 20)).astype(np.int32)
    table, pages = scattered_pages(4, 24, 4)
    caches = model.create_caches(SMALL, pages, 4, dtype=jnp.float32)
    alone = run(SMALL, small, ids, prompt=20, **SHARED)

    def step(caches, seq_lens, query_lens):
        tokens = [ids[b, s - q : s] for b, (s, q) in enumerate(zip(seq_lens, query_lens))]
        padded = np.zeros(24, np.int32)
        padded[: sum(query_lens)] = np.concatenate(tokens)
        lens = np.asarray(seq_lens, np.int32), np.asarray(query_lens, np.int32)
        out, caches = all_logits(small, padded, caches, *lens, table, config=SMALL)
        ends = np.cumsum(query_lens)
        for b, (s, q) in enumerate(zip(seq_lens, query_lens)):
            np.testing.assert_allclose(out[ends[b] - q : ends[b]], alone[b, s - q : s], atol=2e-5)
        return caches

    caches = step(caches, [12, 7, 0, 1], [12, 7, 0, 1])
    caches = step(caches, [13, 18, 9, 1], [1, 11, 9, 0])
    step(caches, [14, 20, 10, 8], [1, 2, 1, 7])


def test_prefill_gives_the_last_tokens(small):
    ids = np.random.default_rng(3).integers(0, SMALL.vocab_size, (4, 9)).astype(np.int32)
    expected = run(SMALL, small, ids, prompt=8, **SHARED)
    table, pages = scattered_pages(2, 9, 4)
    caches = model.create_caches(SMALL, pages, 4, dtype=jnp.float32)
    prefill = jax.jit(model.prefill, static_argnames="config")
    # Two chunks: the second one's requests have tokens in the caches.
    for before, after in (([0, 0], [6, 3]), ([6, 3], [9, 5])):
        tokens = np.concatenate([*(ids[b, i:j] for b, (i, j) in enumerate(zip(before, after))), np.zeros(11, int)])[:11]
        lens = np.array(after, np.int32), np.subtract(after, before).astype(np.int32)
        out, caches = prefill(small, tokens.astype(np.int32), caches, *lens, table, config=SMALL)
        np.testing.assert_allclose(out, [expected[0, after[0] - 1], expected[1, after[1] - 1]], atol=2e-5)


# --- types -----------------------------------------------------------------------------------------------------------
def relative_errors(out, expected):
    """Root mean square over the vocabulary, per position, of the whole's."""
    return np.sqrt(np.mean((out - expected) ** 2, axis=(0, 2))) / np.sqrt(np.mean(expected**2))


def test_cache_types(tiny):
    """Close to the float32 cache, by the median: here and there another expert or key wins and a position differs.

    The two FP8 flavours hold the same bytes with halved scales, and give the same logits.
    """
    config, params, ids, expected, _ = tiny
    outs = {}
    for dtype, limit in ((jnp.bfloat16, 0.02), (jnp.float8_e4m3fnuz, 0.08), (jnp.float8_e4m3fn, 0.08)):
        out = outs[dtype] = run(config, params, ids[:, :24], prompt=22, dtype=dtype)
        assert out.dtype == np.float32 and np.isfinite(out).all()
        errors = relative_errors(out, expected[:, :24])
        assert np.median(errors[: config.index_topk]) < limit, errors
        assert errors.mean() < 4 * limit, errors
    assert np.abs(outs[jnp.float8_e4m3fnuz] - outs[jnp.float8_e4m3fn]).max() < 1e-4


def test_bfloat16_model(tiny, fixtures):
    _, _, ids, expected, _ = tiny
    config, params = load_checkpoint(fixtures / "deepseek_v32_tiny", dtype=jnp.bfloat16)
    out = run(config, params, ids[:, :24], prompt=20, dtype=jnp.bfloat16)
    assert out.dtype == np.float32
    errors = relative_errors(out, expected[:, :24])
    assert np.median(errors) < 0.05 and errors.mean() < 0.12, errors


# --- padding, repeats, traces ----------------------------------------------------------------------------------------
def poisoned(caches):
    """Every bit set: NaN in float caches and in both FP8 flavours' own ways."""
    return jax.tree.map(lambda a: jax.lax.bitcast_convert_type(jnp.full(a.shape, -1, f"int{a.itemsize * 8}"), a.dtype)
                        if a.dtype != jnp.uint32 else jnp.full(a.shape, 0x80808080, jnp.uint32), caches)  # fmt: skip


@pytest.mark.parametrize("cache_dtype", ["float32", "float8_e4m3fnuz"])
def test_padding_touches_nothing(small, cache_dtype):
    """Garbage in every padded entry and NaN in every unwritten slot: logits and caches of real tokens stay bitwise."""
    rng = np.random.default_rng(5)
    table, pages = scattered_pages(4, 24, 4)
    own = np.unique(table[[0, 2]])
    caches = model.create_caches(SMALL, pages, 4, dtype=getattr(jnp, cache_dtype))
    tokens = rng.integers(0, SMALL.vocab_size, 16).astype(np.int32)
    seq_lens, query_lens = np.array([6, 0, 9, 0], np.int32), np.array([4, 0, 9, 0], np.int32)
    decode_lens = np.array([7, 0, 10, 0], np.int32)

    def steps(caches, tokens, seq_lens, query_lens, table, decode_lens, decode_tokens):
        # The prefix of request 0 (2 tokens) first, so that the second step meets earlier keys.
        lens = np.array([2, 0, 0, 0], np.int32)
        _, caches = all_logits(small, tokens, caches, lens, lens, table, config=SMALL)
        first, caches = all_logits(small, tokens, caches, seq_lens, query_lens, table, config=SMALL)
        second, caches = decode(small, decode_tokens, caches, decode_lens, table, config=SMALL)
        return first[:13], second[np.array([0, 2])], caches

    decode_tokens = np.array([3, 0, 4, 0], np.int32)
    clean = steps(caches, tokens, seq_lens, query_lens, table, decode_lens, decode_tokens)
    dirty_table = table.copy()
    dirty_table[1], dirty_table[3] = table[0, 0], 10**9  # a real request's page, and one that does not exist
    dirty_table[0, 2:], dirty_table[2, 3:] = -7, table[0, 0]
    tokens[13:] = [-(2**31), 2**31 - 1, SMALL.vocab_size]
    for lens, garbage in ((seq_lens, [-1, 0]), (query_lens, [2**31 - 1, -5]), (decode_lens, [-(2**31), -1])):
        lens[[1, 3]] = garbage
    decode_tokens[[1, 3]] = [-1, 2**31 - 1]
    caches = poisoned(model.create_caches(SMALL, pages, 4, dtype=getattr(jnp, cache_dtype)))
    dirty = steps(caches, tokens, seq_lens, query_lens, dirty_table, decode_lens, decode_tokens)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    used = (table[0, :2], table[2, :3], [7 % 4, 10 % 4])
    for before, after in zip(jax.tree.leaves(clean[2]), jax.tree.leaves(dirty[2])):
        before, after = np.asarray(before), np.asarray(after)
        for pages_of, length in zip(used[:2], (7, 10)):
            flat = [np.concatenate([a[p] for p in pages_of])[:length] for a in (before, after)]
            np.testing.assert_array_equal(*(f.view(np.uint8) for f in flat))
        others = np.setdiff1d(np.arange(pages), own)
        assert np.isin(np.unique(before[others].view(np.uint8)), [0]).all(), "a padded request wrote"


def test_repeats_are_bitwise_equal(small):
    ids = np.random.default_rng(6).integers(0, SMALL.vocab_size, (4, 14)).astype(np.int32)
    first = run(SMALL, small, ids, prompt=12, **SHARED)
    for _ in range(19):
        np.testing.assert_array_equal(run(SMALL, small, ids, prompt=12, **SHARED), first)


def test_lengths_never_retrace(small):
    def step(params, tokens, caches, seq_lens, query_lens, table):
        return model.prefill(params, tokens, caches, seq_lens, query_lens, table, config=SMALL)

    counted = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=2)
    rng = np.random.default_rng(0)
    table, pages = scattered_pages(3, 24, 4)
    caches = model.create_caches(SMALL, pages, 4, dtype=jnp.float32)
    for _ in range(12):
        seq_lens = rng.integers(-1, 24, 3).astype(np.int32)
        query_lens = rng.integers(0, 9, 3).astype(np.int32)
        tokens = rng.integers(0, SMALL.vocab_size, 16).astype(np.int32)
        out, caches = counted(small, tokens, caches, seq_lens, query_lens, rng.permuted(table, axis=1))
        assert np.isfinite(out).all()
    chex.clear_trace_counter()


def test_no_host_in_the_step(small):
    caches = model.create_caches(SMALL, 8, 4)
    table = jax.ShapeDtypeStruct((2, 4), jnp.int32)
    lens = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = str(jax.make_jaxpr(functools.partial(model.decode, config=SMALL))(small, lens, caches, lens, table))
    assert "callback" not in text and "outfeed" not in text


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "bfloat16"])
def test_caches_are_updated_in_place(dtype):
    """Two scales a latent, as published models have four: XLA:CPU copies an array of scales whose last axis is 1."""
    config = dataclasses.replace(SMALL, kv_lora_rank=256)
    check_in_place(
        functools.partial(model.decode, config=config),
        model.param_specs(config),
        lambda pages: model.create_caches(config, pages, 16, dtype=dtype),
    )


# --- parameters and errors -------------------------------------------------------------------------------------------
# jax's own kind of key, threefry2x32, takes ten times as long to compile.
@pytest.mark.parametrize("key", ["unsafe_rbg", slow("threefry2x32")])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_params(dtype, key):
    params = jax.jit(lambda key: model.init_params(key, SMALL, dtype))(jax.random.key(0, impl=key))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.param_specs(SMALL, dtype))
    layer = params["layers"][1]
    assert layer["mlp"]["gate"]["e_score_correction_bias"].dtype == jnp.float32
    assert layer["self_attn"]["indexer"]["k_norm"]["weight"].dtype == jnp.float32
    assert layer["self_attn"]["q_b_proj"].dtype == dtype
    ids = np.arange(12, dtype=np.int32).reshape(2, 6)
    assert np.isfinite(run(SMALL, params, ids, prompt=6, dtype=jnp.bfloat16)).all()


def test_bad_arguments(small):
    caches = model.create_caches(SMALL, 8, 4, dtype=jnp.float32)
    lens, table = np.array([3, 5], np.int32), np.arange(8, dtype=np.int32).reshape(2, 4)
    meta = decode_metadata(lens, table, page_size=4)
    with pytest.raises(ValueError, match="token_ids is int32"):
        model.forward(small, np.zeros(3, np.int32), caches, meta, config=SMALL)
    with pytest.raises(ValueError, match="token_ids is float32"):
        model.forward(small, np.zeros(2, np.float32), caches, meta, config=SMALL)
    with pytest.raises(ValueError, match="caches has 1 layers"):
        model.forward(small, lens, caches[:1], meta, config=SMALL)
    with pytest.raises(ValueError, match="caches is empty"):
        model.decode(small, lens, (), lens, table, config=SMALL)
    with pytest.raises(ValueError, match="page_size is 8; the caches have pages of 4 tokens"):
        model.decode(small, lens, caches, lens, table, config=SMALL, page_size=8)
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(small, np.zeros(0, np.int32), caches, lens, lens, table, config=SMALL)
    with pytest.raises(ValueError, match="use one page_size"):
        model.forward(small, lens, caches, decode_metadata(lens, table, page_size=8), config=SMALL)
    with pytest.raises(ValueError, match="cache holds"):
        other = dataclasses.replace(SMALL, kv_lora_rank=8)
        model.forward(small, lens, model.create_caches(other, 8, 4, dtype=jnp.float32), meta, config=SMALL)
    with pytest.raises(ValueError, match="implementation is 'fast'"):
        model.forward(small, lens, caches, meta, config=SMALL, implementation="fast")
