"""The attention and indexer kernels lower for cuda and rocm from a CPU host, at DeepSeek-V3.2's sizes."""

import jax
import jax.numpy as jnp
import pytest
from support.lowering import CUSTOM_CALL, lower
from support.lowering import TARGETS as GPUS

from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.indexer import indexer_scores, paged_indexer_scores
from sparse_mla_jax.ops.ragged import DenseRows, Ragged

# With the FP8 flavour of that hardware.
TARGETS = [(*gpu, f"float8_{flavour}") for gpu, flavour in zip(GPUS, ("e4m3fn", "e4m3fnuz", "e4m3fn"))]
shape = jax.ShapeDtypeStruct


def choose(target, *values):
    """Marks of a combination by its numbers: half of them by default, of AMD's, which other tests compile, a third."""
    at = TARGETS.index(target)
    often = sum(values) % 2 == 0 if at == 0 else sum(values) % 3 == at
    return [] if often else pytest.mark.slow


def kv_cache(dtype):
    return jax.eval_shape(
        lambda: PagedKVCache.create(1024, 64, latent_dim=512, rope_dim=64, group_size=128, dtype=dtype)
    )


def ragged(tokens, width):
    return Ragged(values=shape((tokens * width,), jnp.int32), indptr=shape((tokens + 1,), jnp.int32))


FORMS = ["fp8", "bfloat16", "float32", "two sources, sinks, dense", "many tokens"]


@pytest.mark.parametrize(
    ("target", "heads", "form"),
    [
        pytest.param(target, heads, form, id=f"{target[0]}-{heads}-{form}", marks=choose(target, f, h))
        for target in TARGETS
        for h, heads in enumerate((16, 128))
        for f, form in enumerate(FORMS)
    ],
)
def test_sparse_mla(target, heads, form):
    tokens = 4096 if form == "many tokens" else 8
    cache = kv_cache(form if form in ("bfloat16", "float32") else target[3])
    q = shape((tokens, heads, 576), jnp.float32 if form == "float32" else jnp.bfloat16)
    extra, sinks, rows = None, None, ragged(tokens, 2048)
    if form.startswith("two"):
        rows, sinks = shape((tokens, 2048), jnp.int32), shape((heads,), jnp.float32)
        extra = (cache, shape((tokens, 128), jnp.int32))

    def f(q, cache, rows, sinks, extra):
        return sparse_mla(
            q,
            cache,
            rows,
            sm_scale=0.135,
            value_dim=512,
            sinks=sinks,
            extra=extra,
            return_lse=True,
            implementation="triton",
        )

    text = lower(target, f, q, cache, rows, sinks, extra)
    # Few rows are split and merged: one kernel each.
    assert text.count(f"@{CUSTOM_CALL}") == (1 if form == "many tokens" else 2) and "sparse_mla" in text
    assert ("merge_splits" in text) == (form != "many tokens")
    # Four-value words are read as they lie: no copy of the cache in another type comes before the kernel.
    assert "bitcast_convert" not in text.split(CUSTOM_CALL)[0]


@pytest.mark.parametrize(
    ("target", "flavour", "two", "form"),
    [
        pytest.param(
            target,
            flavour,
            two,
            form,
            id=f"{target[0]}-{flavour}-{'two sources' if two else 'one source'}-{form}",
            marks=choose(target, f, two, 2 * n),
        )
        for target in TARGETS
        for f, flavour in enumerate(("float8_e4m3fn", "float8_e4m3fnuz"))
        for two in (False, True)
        for n, form in enumerate(("dense", "lengths", "ragged"))
    ],
)
def test_either_flavour_on_every_target(target, flavour, two, form):
    cache, window = kv_cache(flavour), jax.eval_shape(lambda c: jax.tree.map(lambda a: a[:16], c), kv_cache(flavour))
    slots = shape((8, 2048), jnp.int32)
    forms = {"dense": slots, "lengths": DenseRows(slots, shape((8,), jnp.int32)), "ragged": ragged(8, 2048)}
    extra = (window, shape((8, 128), jnp.int32)) if two else None

    def f(q, cache, rows, extra):
        return sparse_mla(q, cache, rows, sm_scale=0.135, value_dim=512, extra=extra, implementation="triton")

    text = lower(target, f, shape((8, 16, 576), jnp.bfloat16), cache, forms[form], extra)
    assert text.count(f"@{CUSTOM_CALL}") == 2


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[0])
@pytest.mark.parametrize("q_dtype", [jnp.bfloat16, jnp.float32])
def test_indexer(target, q_dtype):
    q, weights, ints = shape((32, 64, 128), q_dtype), shape((32, 64), jnp.float32), shape((32,), jnp.int32)
    cache = jax.eval_shape(lambda: PagedIndexCache.create(2048, 64, dim=128, dtype=target[3]))

    def paged(q, weights, cache, pages, requests, lengths):
        return paged_indexer_scores(
            q, weights, cache, pages, requests, lengths, max_length=8192, implementation="triton"
        )

    text = lower(target, paged, q, weights, cache, shape((32, 128), jnp.int32), ints, ints)
    assert text.count(f"@{CUSTOM_CALL}") == 1 and "paged_indexer_logits" in text

    def contiguous(q, keys, scales, weights, starts, lengths):
        return indexer_scores(q, keys, scales, weights, row_starts=starts, row_lengths=lengths, implementation="triton")

    keys, scales = shape((8192, 128), jnp.dtype(target[3])), shape((8192,), jnp.float32)
    text = lower(target, contiguous, q, keys, scales, weights, ints, ints)
    assert text.count(f"@{CUSTOM_CALL}") == 1 and "ragged_indexer_logits" in text


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[0])
def test_caches_beyond_32_bit_offsets_are_refused(target):
    """2**31 elements or more: the kernel says no at trace time, the XLA body serves."""
    cache = jax.eval_shape(
        lambda: PagedKVCache.create(70_000, 64, latent_dim=512, rope_dim=64, group_size=128, dtype=jnp.bfloat16)
    )
    q, rows = shape((8, 16, 576), jnp.bfloat16), ragged(8, 64)

    def f(name):
        return lambda q, cache, rows: sparse_mla(q, cache, rows, sm_scale=1.0, value_dim=512, implementation=name)

    with pytest.raises(ValueError, match=r"2\*\*31"):
        lower(target, f("triton"), q, cache, rows)
    assert CUSTOM_CALL not in lower(target, f("xla"), q, cache, rows)
