"""Cases of the operators of attention: top-k, indexer scores, sparse attention of decode and prefill."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparse_mla_jax._check import require
from sparse_mla_jax.cases.answers import (
    attention_answer,
    relative,
)
from sparse_mla_jax.cases.case import FP8, Case, KernelCase, KernelProblem, Work
from sparse_mla_jax.cases.inputs import (
    LAYOUTS,
    PAGE,
    ROPE,
    VALUE_DIM,
    dense,
    gather,
    kv_cache,
    nbytes,
    permutation,
    random_cache,
    random_slots,
    sample,
    seed,
    take,
)
from sparse_mla_jax.ops import cache as cache_ops
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.ragged import DenseRows, pack_rows
from sparse_mla_jax.ops.window import ring_size, window_slots

# --- sparse attention
# Leaves room for rounding the result, and possibly the weights, to bfloat16.
ATTENTION_BOUND = 4e-3


def row_lengths(rows: int, longest: int) -> np.ndarray:
    """Lengths of the ragged case: uniform from 64 (or an eighth of the longest, if that is less) to the longest."""
    return np.random.default_rng(7).integers(min(64, longest // 8), longest + 1, rows).astype(np.int32)


def _attention(sizes: Mapping[str, int], flavour: str, query: str, *, layout: str, own: bool, ragged: bool) -> Work:
    """Sparse attention over one source. `own`: every token reads its own region of the cache, else the whole."""
    del query
    tokens, heads, width, slots = sizes["batch" if own else "tokens"], sizes["heads"], sizes["selected"], sizes["slots"]
    dim = LAYOUTS[layout][0] + ROPE
    plain = flavour == "bfloat16"
    lengths = row_lengths(tokens, width) if ragged else np.full(tokens, width, np.int32)

    def shared():
        if plain:
            return (jax.random.normal(seed(8), (slots, dim), jnp.bfloat16),)
        return (kv_cache(layout, flavour, slots),)

    def each(number):
        rows: Any = random_slots(seed(9, number), tokens, width, slots, own=own)
        if ragged:
            rows = pack_rows(rows, jnp.asarray(lengths))
        return jax.random.normal(seed(10, number), (tokens, heads, dim), jnp.bfloat16), rows

    def fn(kv, q, rows, *, implementation=None):
        return sparse_mla(q, kv, rows, sm_scale=dim**-0.5, value_dim=VALUE_DIM, implementation=implementation)

    def error(arguments, got):
        kv, q, rows = arguments
        some = sample(tokens)
        at = take(dense(rows, width=width) if ragged else rows, some)
        keys = take(kv, at) if plain else np.asarray(gather(kv, at, dtype=jnp.float32))
        want = [
            attention_answer(one[None], mine, np.arange(n)[None], dim**-0.5, VALUE_DIM)[0]
            for one, mine, n in zip(take(q, some), keys, lengths[some])
        ]
        return relative(take(got, some), np.stack(want))

    token = 2 * dim if plain else jax.eval_shape(lambda: kv_cache(layout, flavour, PAGE)).bytes_per_token
    keys = int(lengths.sum())
    # A shared cache counts once, however many tokens read it.
    size = token * (keys if own else min(keys, slots)) + 4 * keys + 2 * tokens * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


def _two_sources(
    sizes: Mapping[str, int],
    flavour: str,
    *,
    slots: tuple[int, int],
    lengths: tuple[np.ndarray, np.ndarray],
    rows: Callable[[int], tuple[Array, Array]],
    read: int,
) -> Work:
    """DeepSeek-V4: a window in rings and compressed entries, two caches and sinks under one softmax.

    Args:
      sizes: `heads`.
      flavour: type of both caches.
      slots: number of slots of the window cache and of the entry cache.
      lengths: int32 [T], number of keys of every token in each cache.
      rows: number of an argument set -> slots int32 [T, width] in each cache; the first `lengths` of a row count.
      read: distinct keys that must be read, however many tokens read the same one.
    """
    heads, tokens, dim = sizes["heads"], lengths[0].size, LAYOUTS["v4"][0] + ROPE

    def shared():
        return tuple(kv_cache("v4", flavour, n) for n in slots)

    def each(number):
        both = (DenseRows(*x) for x in zip(rows(number), (jnp.asarray(n) for n in lengths)))
        q = jax.random.normal(seed(17, number), (tokens, heads, dim), jnp.bfloat16)
        return q, *both, jax.random.normal(seed(18, number), (heads,), jnp.float32)

    def fn(near, far, q, near_rows, far_rows, sinks, *, implementation=None):
        return sparse_mla(
            q,
            near,
            near_rows,
            sm_scale=dim**-0.5,
            value_dim=VALUE_DIM,
            sinks=sinks,
            extra=(far, far_rows),
            implementation=implementation,
        )

    def error(arguments, got):
        near, far, q, near_rows, far_rows, sinks = arguments
        some, want = sample(tokens), []
        keys = [
            np.asarray(gather(cache, take(rows.values, some)[:, : n.max()], dtype=jnp.float32))
            for cache, rows, n in ((near, near_rows, lengths[0]), (far, far_rows, lengths[1]))
        ]
        for i, (t, one) in enumerate(zip(some, take(q, some))):
            mine = np.concatenate([source[i, : n[t]] for source, n in zip(keys, lengths)])
            every = np.arange(len(mine))[None]
            want.append(attention_answer(one[None], mine, every, dim**-0.5, VALUE_DIM, np.asarray(sinks))[0])
        return relative(take(got, some), np.stack(want))

    token = jax.eval_shape(lambda: kv_cache("v4", flavour, PAGE)).bytes_per_token
    keys = int(sum(n.sum() for n in lengths))
    size = token * read + 4 * keys + 2 * tokens * heads * (dim + VALUE_DIM)
    return Work(fn, each, size, 2 * keys * heads * (dim + VALUE_DIM), error, ATTENTION_BOUND, shared)


def _two_sources_decode(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """Every request has its own window and its own `selected` entries, the latter in rows of width `width`."""
    del query
    batch, window, selected = (sizes[name] for name in ("batch", "window", "selected"))
    slots = sizes["rings"], sizes["slots"]

    def rows(number):
        near, far = (
            random_slots(seed(key, number), batch, count, room, own=True)
            for key, count, room in zip((15, 16), (window, selected), slots)
        )
        return near, jnp.pad(far, ((0, 0), (0, sizes["width"] - selected)), constant_values=-1)

    lengths = np.full(batch, window, np.int32), np.full(batch, selected, np.int32)
    return _two_sources(sizes, flavour, slots=slots, lengths=lengths, rows=rows, read=batch * (window + selected))


def _two_sources_prefill(sizes: Mapping[str, int], flavour: str, query: str) -> Work:
    """The last `tokens` of a context of `length`: a window each, and `selected` entries, or all if that is 0."""
    del query
    tokens, length, window, selected = (sizes[name] for name in ("tokens", "length", "window", "selected"))
    ring, entries = ring_size(window, tokens), length // sizes["ratio"]
    slots = -(-ring // PAGE) * PAGE, -(-entries // PAGE) * PAGE
    positions = np.arange(length - tokens, length, dtype=np.int32)
    far = np.full(tokens, selected, np.int32) if selected else (positions + 1) // sizes["ratio"]

    def rows(number):
        near = window_slots(jnp.asarray(positions), jnp.zeros(tokens, jnp.int32), window=window, ring=ring)
        if selected:
            return near, random_slots(seed(16, number), tokens, selected, slots[1], own=False)
        # A page of 256 tokens has two entries of ratio 128.
        pages = permutation(seed(16, number), slots[1] // 2)
        every = (2 * pages[:, None] + jnp.arange(2, dtype=jnp.int32)).reshape(-1)[:entries]
        return near, jnp.broadcast_to(every, (tokens, entries))

    lengths = np.minimum(positions + 1, window), far
    read = ring + min(int(far.sum()), entries)
    return _two_sources(sizes, flavour, slots=slots, lengths=lengths, rows=rows, read=read)


# --- the list
# (batch, heads, selected) -> (reach, floor), in microseconds.
_DECODE = {
    (1, 16, 2048): (9.0, 14.0),
    (8, 16, 2048): (12.0, 17.0),
    (32, 16, 2048): (20.0, 36.0),
    (64, 16, 2048): (32.0, 55.0),
    (128, 16, 2048): (50.0, 90.0),
    (256, 16, 2048): (95.0, 175.0),
    (1, 128, 2048): (15.0, 18.8),
    (32, 128, 2048): (65.0, 120.0),
    (128, 128, 2048): (195.0, 400.0),
    (128, 64, 512): (36.0, 60.0),
}


def _decode_case(layout: str, batch: int, heads: int, width: int, *, ragged: bool = False, **given: Any) -> Case:
    # Every request has its own context. For small batches, make the cache far larger than the last-level cache.
    slots = batch * max(4 * width, (1 << 18) // batch)
    sizes = {"batch": batch, "heads": heads, "selected": width, "slots": slots}
    make = functools.partial(_attention, layout=layout, own=True, ragged=ragged)
    return Case(
        f"decode-{layout}-b{batch}-h{heads}-k{width}{'-ragged' if ragged else ''}", "decode", sizes, make, **given
    )


def _two_source_case(batch: int, heads: int, selected: int, *, width: int | None = None, **given: Any) -> Case:
    window, wide = 128, f"-of-{width}" if width else ""
    sizes = {"batch": batch, "heads": heads, "window": window, "selected": selected, "width": width or selected}
    sizes |= {"rings": batch * max(2 * window, (1 << 16) // batch), "slots": 1 << 18}
    name = f"decode-v4-b{batch}-h{heads}-w{window}-k{selected}{wide}"
    return Case(name, "decode", sizes, _two_sources_decode, **given)


def decode_cases() -> Iterator[Case]:
    """Sparse attention with one query per request."""
    for layout in LAYOUTS:
        for (batch, heads, width), (reach, floor) in _DECODE.items():
            yield _decode_case(layout, batch, heads, width, reach=reach, floor=floor)
        yield _decode_case(layout, 128, 8, 2048, at_most=(1.0, f"decode-{layout}-b128-h16-k2048"))
        yield _decode_case(layout, 128, 16, 2048, ragged=True)
    # DeepSeek-V4: two sources, compared with one source of as many keys.
    yield _decode_case("v4", 128, 64, 640)
    yield _two_source_case(128, 64, 512, at_most=(1.25, "decode-v4-b128-h64-k640"))
    yield _two_source_case(64, 16, 512, floor=25.0)
    # All 256 entries (ratio 128, 32768 tokens), in rows wide enough for a million tokens: cost must follow the length.
    yield _decode_case("v4", 128, 64, 384)
    yield _two_source_case(128, 64, 256, width=8192, at_most=(1.25, "decode-v4-b128-h64-k384"))


def prefill_cases() -> Iterator[Case]:
    """Sparse attention of a chunk of one prompt: V3.2 over bfloat16 and FP8 rows, V4 over two sources."""
    make = functools.partial(_attention, layout="v32", own=False, ragged=False)
    for heads, reach, floor in ((16, 300.0, 650.0), (128, 1157.0, 2600.0)):
        sizes = {"tokens": 1024, "heads": heads, "selected": 2048, "slots": 131072}
        yield Case(
            f"prefill-t1024-h{heads}-k2048", "prefill", sizes, make, (*FP8, "bfloat16"), reach=reach, floor=floor
        )
    # DeepSeek-V4's layers of ratio 4, and of ratio 128 with 240 to 256 entries.
    both = {"tokens": 2048, "heads": 64, "window": 128, "length": 32768}
    for ratio, selected, name in ((4, 512, "k512"), (128, 0, "all-of-256")):
        sizes = both | {"ratio": ratio, "selected": selected}
        yield Case(f"prefill-v4-t2048-h64-w128-{name}", "prefill", sizes, _two_sources_prefill)


def _kernel_attention(
    kind: str,
    heads: int | None,
    *,
    latent: int,
    selected: int,
    rope: int = ROPE,
    group: int = 128,
    value_dim: int | None = None,
    scale_dtype: Any = jnp.float32,
    usual_heads: int = 16,
    sinks: bool = False,
) -> KernelProblem:
    """value_dim: None for the latent alone."""
    rng = np.random.default_rng(0)
    heads, value_dim = usual_heads if heads is None else heads, latent if value_dim is None else value_dim
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    cache = random_cache(rng, kind, latent, group, scale_dtype, rope)
    q_dtype = jnp.float32 if kind == "float32" else jnp.bfloat16
    q = jnp.asarray(rng.standard_normal((2, heads, latent + rope)), q_dtype)
    rows = np.stack([rng.permutation(512)[:selected] for _ in range(2)]).astype(np.int32)
    # Of the size of the largest logit: they take about half of the weight.
    sink = jnp.asarray(rng.standard_normal(heads) + 4, jnp.float32) if sinks else None
    how: Any = dict(sm_scale=(latent + rope) ** -0.5, value_dim=value_dim)
    keys = np.asarray(cache_ops.gather(cache, jnp.arange(512), dtype=jnp.float32))

    def fn(q, cache, rows, sinks, *, implementation="triton", plan=None):
        return sparse_mla(q, cache, rows, sinks=sinks, implementation=implementation, plan=plan, **how)

    want = attention_answer(q, keys, rows, how["sm_scale"], value_dim, None if sink is None else np.asarray(sink))
    return KernelProblem(
        fn,
        (q, cache, jnp.asarray(rows), sink),
        lambda out: relative(out, want),
        # float32: rounding of sums. bfloat16: rounding the result alone is 1.65e-3.
        1e-5 if kind == "float32" else 2e-3,
        nbytes(q, rows) + 2 * selected * cache.bytes_per_token + want.size * q.dtype.itemsize,
    )


def _kernel_two_sources(kind: str, heads: int | None, *, window: int, selected: int) -> KernelProblem:
    """A sliding window and chosen entries in two caches, under one softmax with sinks."""
    rng = np.random.default_rng(0)
    heads, latent, dim = 16 if heads is None else heads, 448, 512
    require(1 <= heads <= 1024, f"heads is {heads}; between 1 and 1024 are expected.")
    near, far = (random_cache(rng, kind, latent, 64, jnp.float8_e8m0fnu) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((2, heads, dim)), jnp.bfloat16)
    rows = [np.stack([rng.permutation(512)[:n] for _ in range(2)]).astype(np.int32) for n in (window, selected)]
    sinks = jnp.asarray(rng.standard_normal(heads), jnp.float32)
    keys = [np.asarray(cache_ops.gather(cache, jnp.arange(512), dtype=jnp.float32)) for cache in (near, far)]

    def fn(q, near, far, near_rows, far_rows, sinks, *, implementation="triton", plan=None):
        return sparse_mla(
            q,
            near,
            near_rows,
            sm_scale=dim**-0.5,
            value_dim=dim,
            sinks=sinks,
            extra=(far, far_rows),
            implementation=implementation,
            plan=plan,
        )

    both = np.concatenate([rows[0], rows[1] + 512], axis=1)
    want = attention_answer(q, np.concatenate(keys), both, dim**-0.5, dim, np.asarray(sinks))
    return KernelProblem(
        fn,
        (q, near, far, *map(jnp.asarray, rows), sinks),
        lambda out: relative(out, want),
        2e-3,  # as above
        nbytes(q, *rows) + 2 * (window + selected) * near.bytes_per_token + want.size * q.dtype.itemsize,
    )


# --- small enough for an interpreter
KERNEL_CASES = (
    KernelCase(
        "sparse_mla",
        "DeepSeek-V3.2: 2 queries, 96 selected rows of 512 + 64, groups of 128, float32 scales",
        functools.partial(_kernel_attention, latent=512, selected=96),
    ),
    KernelCase(
        "sparse_mla_v4",
        "DeepSeek-V4: 2 queries, 96 selected rows of 448 + 64, groups of 64, E8M0 scales",
        functools.partial(
            _kernel_attention, latent=448, group=64, value_dim=512, selected=96, scale_dtype=jnp.float8_e8m0fnu
        ),
        FP8,
    ),
    KernelCase(
        "sparse_mla_v4_window",
        "DeepSeek-V4: 2 queries, a window of 32 rows and 64 chosen entries, two caches and sinks under one softmax",
        functools.partial(_kernel_two_sources, window=32, selected=64),
        FP8,
    ),
    KernelCase(
        "sparse_mla_narrow",
        "A.X-K2: 2 queries of 32 heads, 48 selected rows of 128 + 32, one group of 128, float32 scales",
        functools.partial(_kernel_attention, latent=128, rope=32, selected=48, usual_heads=32),
    ),
    KernelCase(
        "sparse_mla_sinks",
        "Hy4: 2 queries of 32 heads with sinks, 48 selected rows of 512 + 64, groups of 128, float32 scales",
        functools.partial(_kernel_attention, latent=512, selected=48, usual_heads=32, sinks=True),
    ),
    KernelCase(
        "sparse_mla_nope",
        "Mistral Large 4: 2 queries of 64 heads, 48 selected rows of 512 without rotated part, groups of 128",
        functools.partial(_kernel_attention, latent=512, rope=0, selected=48, usual_heads=64),
    ),
    KernelCase(
        "sparse_mla_wide",
        "dots3's sliding layers: 2 queries of 64 heads, 48 rows of 1024 + 64, groups of 128, float32 scales",
        functools.partial(_kernel_attention, latent=1024, selected=48, usual_heads=64),
    ),
)
