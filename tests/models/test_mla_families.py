"""Every family of latent attention against logits from float64: whole models, through caches, steps and engine."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small_models import check_in_place
from support.marks import running, slow

from sparse_mla_jax.config import RopeConfig
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import mla
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.serving.engine import Engine
from sparse_mla_jax.serving.scoring import score

FAMILIES = ("glm_moe_dsa", "hy_v4", "hy_v4_vl", "axk2", "mistral_large4", "dots3_note")
# Index sharing, sliding layers and shared latents are the ones that a scheduler could break.
ENGINES = ("dots3_note", slow("mistral_large4"), slow("glm_moe_dsa"), slow("hy_v4"), slow("axk2"))
BOUND = 5e-5


@functools.cache
def load(folder):
    config, params = load_checkpoint(folder, progress=False)
    with np.load(folder / "expected.npz") as data:
        return config, params, data["input_ids"].astype(np.int32), data["logits"], int(data["prompt_length"])


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in FAMILIES])
def tiny(request, fixtures):
    return load(fixtures / f"{request.param}_tiny")


def scores(config, params, ids, **options):
    return score(params, config, ids, cache_dtype="float32", page_size=16, **options)


# --- exactness -------------------------------------------------------------------------------------------------------
# A prompt in chunks, then single tokens: both programs of a server. Two compilations of a model take 3 s.
WAYS = {"chunks and steps": {"prompt_length": 46, "chunk": 23}}
WAYS |= {"decode": {"prompt_length": 0}, "prompt": {}, "chunks": {"chunk": 23}}


@pytest.mark.parametrize("way", [name if name == "chunks and steps" else slow(name) for name in WAYS])
def test_fixture(tiny, way):
    config, params, ids, expected, prompt_length = tiny
    options = {"prompt_length": prompt_length} if way == "prompt" else WAYS[way]
    error = np.abs(scores(config, params, ids, **options) - expected).max(axis=(0, 2))
    assert error.max() <= BOUND, f"position {error.argmax()}: {error.max()}"


def one_step(config, params, ids, *, dtype=jnp.float32, implementation=None, page_size=16):
    """float32[B, L, V] of one prefill step of all of ids[B, L]."""
    batch, length = ids.shape
    width = -(-length // page_size)
    sizes = {"num_requests": batch, "max_query_len": length, "dtype": dtype}
    table = jnp.arange(batch * width, dtype=jnp.int32).reshape(batch, width)
    lens = jnp.full(batch, length, jnp.int32)
    meta = build_metadata(lens, lens, table, num_tokens=batch * length, page_size=page_size)
    caches = mla.create_caches(config, batch * width, page_size, **sizes)
    hidden, _ = mla.forward(params, ids.reshape(-1), caches, meta, config=config, implementation=implementation)
    return mla.logits(params, hidden, config).reshape(batch, length, -1)


def one_pass(config, params, ids, **options):
    """`one_step` as a program of its own, with float32 products in full precision."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(functools.partial(one_step, config, **options))(params, ids))


# By default every family on one of the machines, see tests/support/turns.py: 4 s, of which 3 compile its 15 kernels.
@pytest.mark.parametrize("implementation", ["gfx942", "gfx950", slow("triton"), slow("reference")])
def test_fixture_by_implementation(tiny, implementation):
    """Two tokens more than the indexer keeps, with fused weights."""
    config, params, ids, expected, _ = tiny
    length = config.index_topk + 2
    with running(implementation) as name:
        out = one_pass(config, mla.fuse_projections(params), ids[:1, :length], implementation=name)
    assert np.abs(out - expected[:1, :length]).max() <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["gfx942", "gfx950", "triton"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e4m3fn", "bfloat16"])
def test_caches_by_implementation(tiny, implementation, dtype):
    """Kernels and XLA's body sum in another order. A latent near the middle of two bfloat16 may round to the other one,
    2**-8 of it away; of these fixtures' latents none is so near the middle of two FP8 values."""
    config, params, ids, *_ = tiny
    length = config.index_topk + 2
    with running(implementation) as name:
        out = one_pass(config, params, ids[:1, :length], dtype=jnp.dtype(dtype), implementation=name)
    other = one_pass(config, params, ids[:1, :length], dtype=jnp.dtype(dtype), implementation="xla")
    assert np.abs(out - other).max() <= (2**-8 if dtype == "bfloat16" else BOUND)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_under_shard_map(tiny, implementation):
    """One sequence on each of two devices, with the default check of what varies between them."""
    config, params, ids, expected, _ = tiny
    length = config.index_topk + 4
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    own = functools.partial(one_step, config, implementation=implementation)
    split = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))
    with jax.default_matmul_precision("highest"):
        out = np.asarray(split(params, ids[:, :length]))
    assert np.abs(out - expected[:, :length]).max() <= BOUND


@pytest.mark.slow
def test_cache_types(tiny):
    """The bounds of DeepSeek-V3.2's test: here and there another expert or key wins, and a position differs."""
    config, params, ids, expected, _ = tiny
    expected = expected[:, :24]
    for dtype, limit in ((jnp.bfloat16, 0.02), (jnp.float8_e4m3fnuz, 0.08), (jnp.float8_e4m3fn, 0.08)):
        out = one_pass(config, params, ids[:, :24], dtype=dtype)
        errors = np.sqrt(np.mean((out - expected) ** 2, axis=(0, 2)) / np.mean(expected**2))
        assert np.median(errors[: config.index_topk]) < limit and errors.mean() < 4 * limit, (dtype, errors)


# --- features --------------------------------------------------------------------------------------------------------
def with_leaf(params, path, value):
    """Parameters whose arrays at the end `path` of a name hold `value`."""

    def change(where, leaf):
        name = jax.tree_util.keystr(where, simple=True, separator=".")
        return jnp.full_like(leaf, value) if f".{name}".endswith(f".{path}") else leaf

    return jax.tree_util.tree_map_with_path(change, params)


def without_norm_gates(config, params):
    layers = [
        {name: part["weight"] if name.endswith("layernorm") and isinstance(part, dict) else part
         for name, part in layer.items()} for layer in params["layers"]
    ]  # fmt: skip
    return dataclasses.replace(config, gated_norm_rank=0), {**params, "layers": layers}


def change(**fields):
    return lambda config, params: (dataclasses.replace(config, **fields), params)


def fill(path, value):
    return lambda config, params: (config, with_leaf(params, path, value))


def without_mscale(config, params):
    return dataclasses.replace(config, rope=dataclasses.replace(config.rope, mscale_all_dim=0.0)), params


def rotate_one_way(config, params):
    sizes = tuple(dataclasses.replace(one, rope=config.rope) for one in config.layer_sizes)
    return dataclasses.replace(config, layer_sizes=sizes), params


# Per family: a mistake, and the least that it moves a logit, a quarter of what was measured with transformers.
MISTAKES = {
    "glm_moe_dsa": {
        "index rope half-split": (change(indexer_rope_interleave=False), 1.0),
        "main rope half-split": (change(rope_interleave=False), 0.9),
        "shared layers dense": (change(layer_types=("indexed_attention",) * 2 + ("full_attention",) * 2,
                                       indexer_types=()), 0.5),
        "no k_norm bias": (fill("indexer.k_norm.bias", 0.0), 0.8),
    },
    "hy_v4": {
        "main rope interleaved": (change(rope_interleave=True), 0.5),
        "index rope interleaved": (change(indexer_rope_interleave=True), 0.6),
        "index rope on the first dims": (change(indexer_rope_last=False), 0.7),
        "no sinks": (fill("sinks", -1e30), 0.6),
        "gate of one half": (fill("output_gate", 0.0), 1.0),
        "no clamp": (change(swiglu_limit=0.0), 0.9),
        "hc scale 1": (fill("attn_hc.scale", 1.0), 0.1),
        "hc base 0": (fill("attn_hc.base", 0.0), 0.1),
        "hc fn 0": (fill("ffn_hc.fn", 0.0), 0.1),
        "magnitude": (change(hc_magnitude=2.1), 0.4),
        "head scale 1": (fill("hc_head.scale", 1.0), 0.1),
        "head base 0": (fill("hc_head.base", 0.0), 0.1),
    },
    "axk2": {
        "no norm gate": (without_norm_gates, 1.0),
        "gate of one half": (fill("output_gate", 0.0), 0.5),
        "index rope interleaved": (change(indexer_rope_interleave=True), 0.4),
        "no YaRN": (change(rope=RopeConfig()), 0.2),
        "no mscale^2": (without_mscale, 0.3),
    },
    "mistral_large4": {
        "alpha 0": (fill("rope_alpha", 0.0), 0.7),
        "attention scale 0": (fill("self_attn.query_scale.scale", 0.0), 0.5),
        "attention bias 1": (fill("self_attn.query_scale.bias", 1.0), 0.5),
        "index scale 0": (fill("indexer.query_scale.scale", 0.0), 0.7),
        "index bias 1": (fill("indexer.query_scale.bias", 1.0), 0.8),
        "no bias of q_input_norm": (fill("indexer.q_norm.bias", 0.0), 0.1),
        "no softcap": (change(final_logit_softcapping=0.0), 0.3),
    },
    "dots3_note": {
        "no latent scaling": (change(latent_scaling=False), 0.4),
        "no weight of the rope key's norm": (fill("k_rope_layernorm", 1.0), 0.1),
        "gate of one half": (fill("output_gate", 0.0), 0.5),
        "window + 1": (change(sliding_window=17), 0.2),
        "one theta": (rotate_one_way, 0.25),
        "index rope half-split": (change(indexer_rope_interleave=False), 0.9),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mistake"), [(f, m) for f, mistakes in MISTAKES.items() for m in mistakes])
def test_a_mistake_moves_the_logits(fixtures, family, mistake):
    """The fixtures notice each of these: without them, `test_fixture` would pass with the feature left out."""
    config, params, ids, expected, _ = load(fixtures / f"{family}_tiny")
    make, least = MISTAKES[family][mistake]
    config, params = make(config, params)
    assert np.abs(one_pass(config, params, ids) - expected).max() > least


def test_shared_latents_have_no_cache(fixtures):
    """Caches and parameters of what a layer takes from another do not exist."""
    config, params, *_ = load(fixtures / "mistral_large4_tiny")
    caches = jax.eval_shape(lambda: mla.create_caches(config, 4, 16))
    latents, indexes = zip(*[(pair[0] is not None, pair[1] is not None) for pair in caches])
    assert latents == (True, True, False, True, True) and indexes == (True, True, False, True, False)
    assert [one[0].rope_dim for one in caches if one[0] is not None] == [16, 16, 0, 16]
    assert "kv_a_proj_with_mqa" not in params["layers"][2]["self_attn"]
    per_token = 3 * (64 + 2 * 16 + 4) + (64 + 4) + 3 * (32 + 4)
    assert mla.bytes_per_token(caches, 16) == per_token and mla.bytes_per_request(caches) == 0


def test_a_window_does_not_grow(fixtures):
    config, *_ = load(fixtures / "dots3_note_tiny")
    small, large = (
        jax.eval_shape(lambda pages=pages: mla.create_caches(config, pages, 16, num_requests=3, max_query_len=5))
        for pages in (4, 400)
    )
    rings = [jax.tree.map(lambda leaf: leaf.shape, pair[0]) for pair in (small[2], large[2])]
    assert rings[0] == rings[1] and small[2][0].keys.page_size == 16 - 1 + 5
    assert mla.bytes_per_request(small) == mla.bytes_per_request(large) == 2 * (16 - 1 + 5) * (96 + 2 * 16 + 4)
    assert mla.bytes_per_token(small, 16) == mla.bytes_per_token(large, 16)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral_large4", "dots3_note"])
def test_caches_are_updated_in_place(fixtures, family):
    """Shared latents and rings too; two scales a latent, see test_model.py."""
    config, *_ = load(fixtures / f"{family}_tiny")
    sizes = tuple(dataclasses.replace(one, kv_lora_rank=256) for one in config.layer_sizes)
    config = dataclasses.replace(config, kv_lora_rank=256, layer_sizes=sizes)
    check_in_place(
        functools.partial(mla.decode, config=config),
        mla.param_specs(config),
        lambda pages: mla.create_caches(config, pages, 16, num_requests=2, dtype="bfloat16"),
    )


# --- serving ---------------------------------------------------------------------------------------------------------
SIZES = {"page_size": 4, "max_batch": 3, "max_context": 48, "prefill_chunk": 16, "cache_dtype": "float32"}
# As many pages as one request may need: several preempt each other.
SIZES |= {"token_buckets": (3, 16), "num_pages": 12}


@pytest.mark.parametrize("family", [*ENGINES])
def test_engine(fixtures, family):
    """Tokens alone, in a full batch with preemption, and beside a request that is cancelled are the same."""
    config, params, *_ = load(fixtures / f"{family}_tiny")
    rng = np.random.default_rng(0)
    kinds = [{}, {"temperature": 1.0, "seed": 3}]
    jobs = [(rng.integers(0, 256, n).tolist(), kinds[i % 2]) for i, n in enumerate((29, 8, 3, 17))]

    def run(jobs, cancelled=()):
        engine = Engine(params, config, **SIZES)
        requests = [engine.submit(prompt, max_tokens=10, **job) for prompt, job in jobs]
        for _ in range(3):
            engine.step()
        for number in cancelled:
            engine.cancel(requests[number])
        engine.run()
        assert engine.scheduler.allocator.num_used == 0
        return requests

    alone = [run([job])[0].tokens for job in jobs]
    together = run(jobs, cancelled=[2])
    assert sum(request.num_preemptions for request in together) >= 1
    assert [r.tokens for i, r in enumerate(together) if i != 2] == [t for i, t in enumerate(alone) if i != 2]
