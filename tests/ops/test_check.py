"""One rule for integers and one notation for arrays, over every operator: numpy integers pass, booleans do not."""

import inspect
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_mla_jax import _check, interchange, metadata
from sparse_mla_jax.config import RopeConfig
from sparse_mla_jax.ops import (
    attention,
    cache,
    compressor,
    context_pages,
    fp8,
    hyper_connections,
    indexer,
    norm_rope,
    output_projection,
    ragged,
    rope,
    router,
    topk,
    topk_merge,
    window,
)

MODULES = [
    attention,
    cache,
    compressor,
    context_pages,
    fp8,
    hyper_connections,
    indexer,
    interchange,
    metadata,
    norm_rope,
    output_projection,
    ragged,
    rope,
    router,
    topk,
    topk_merge,
    window,
]
INTS = jnp.zeros(4, jnp.int32)
TABLE = jnp.zeros((2, 3), jnp.int32)
PARTS = jnp.zeros((2, 3, 4), jnp.int32)
SCORES = jnp.zeros((4, 10), jnp.float32)
FN = jnp.float8_e4m3fn


def ones(shape, dtype=jnp.float32):
    """float32 with 64-bit types enabled too."""
    return jnp.ones(shape, dtype)


def index_cache():
    return cache.PagedIndexCache.create(6, 4, dim=32)


def kv_cache(**sizes):
    return cache.PagedKVCache.create(
        **dict(num_pages=2, page_size=4, latent_dim=8, rope_dim=2, group_size=4, dtype=FN) | sizes
    )


def index_cache_of(**sizes):
    return cache.PagedIndexCache.create(**dict(num_pages=2, page_size=4, dim=8) | sizes)


def attend(value_dim):
    return attention.sparse_mla(ones((4, 2, 8)), ones((9, 8)), TABLE[:, :2].repeat(2, 0), sm_scale=1.0,
                                value_dim=value_dim, implementation="xla")  # fmt: skip


def score(function, **sizes):
    given = dict(max_length=12, implementation="xla") | sizes
    return function(ones((4, 2, 32)), ones((4, 2)), index_cache(), TABLE, INTS, INTS, **given)


def select(**sizes):
    return score(indexer.lightning_indexer, **dict(k=3) | sizes)


ROUTED = dict(num_groups=2, groups_kept=1, k=2, scale=1.0)


def route(**sizes):
    return router.biased_grouped_topk(ones((4, 8)), ones(8), **ROUTED | sizes)


def route_by_share(**sizes):
    return router.softmax_grouped_topk(ones((4, 8)), **ROUTED | sizes)


def split(iterations):
    streams, product = ones((4, 2, 6)), ones((4, 8))
    return hyper_connections.split(streams, product, ones(8), ones(3), iterations=iterations, implementation="xla")


def finish(**sizes):
    part = norm_rope.Part(**dict(start=1, heads=2, width=6, dtype="float32") | sizes)
    return norm_rope.norm_rope(ones((4, 14)), [part], INTS, ones(2), implementation="xla")


def build(**sizes):
    return metadata.build_metadata(INTS[:2], INTS[:2], TABLE, **dict(num_tokens=4, page_size=4) | sizes)


def from_rows(**sizes):
    given = dict(latent_dim=8, rope_dim=2, group_size=4) | sizes
    return interchange.kv_from_v32_rows(jnp.zeros((2, 3, 20), jnp.uint8), dtype=FN, **given)


def from_index(**sizes):
    given = dict(page_size=3, dim=8) | sizes
    return interchange.index_from_planar_blocks(jnp.zeros((2, 36), jnp.uint8), dtype=FN, **given)


def from_v4(**sizes):
    given = dict(page_size=3, latent_dim=8, rope_dim=2, group_size=4) | sizes
    return interchange.kv_from_v4_blocks(jnp.zeros((2, 60), jnp.uint8), dtype=FN, **given)


def combine(window):
    return ragged.combine_with_window(jnp.zeros((4, 2), jnp.int32), INTS, window=window, window_start=0)


def merge_parts(k):
    return topk_merge.top_k_merge(PARTS, ones((2, 3, 4)), k, implementation="xla")


def share_parts(k):
    return topk_merge.top_k_share(PARTS, ones((2, 3, 4)), 1, k, implementation="xla")


def spread(name, **sizes):
    arrays = (INTS, INTS) if name == "own_slots" else (INTS,)
    return getattr(context_pages, name)(*arrays, 0, **dict(n=2, page_size=4) | sizes)


def case(call, argument, good, low=1):
    """`call` with one argument varied: its name, a value that fits, and the least that does."""
    return call, argument, good, low


# Calls that take None for their argument.
OPTIONAL = (split, merge_parts, share_parts)
VALUES = jnp.ones((2, 8), FN)
# By function and argument: every parameter of a public function that is annotated as an int.
CASES = {
    "quantize.group_size": case(lambda v: fp8.quantize(ones((2, 8)), group_size=v), "group_size", 4),
    "quantize_codes.group_size": case(
        lambda v: fp8.quantize_codes(ones((2, 8)), group_size=v, dtype=FN), "group_size", 4
    ),
    "dequantize.group_size": case(lambda v: fp8.dequantize(VALUES, ones((2, 2)), group_size=v), "group_size", 4),
    "dequantize_codes.group_size": case(
        lambda v: fp8.dequantize_codes(ones((2, 8), jnp.uint8), ones((2, 2)), FN, group_size=v, dtype=jnp.float32),
        "group_size",
        4,
    ),
    "check_groups.group_size": case(lambda v: fp8.check_groups(8, v, "x") + INTS, "group_size", 4),
    **{
        f"PagedKVCache.create.{name}": case(lambda v, name=name: kv_cache(**{name: v}), name, good, low)
        for name, good, low in (
            ("num_pages", 2, 1),
            ("page_size", 4, 1),
            ("latent_dim", 8, 1),
            ("rope_dim", 2, 0),
            ("group_size", 4, 1),
        )
    },
    **{
        f"PagedIndexCache.create.{name}": case(lambda v, name=name: index_cache_of(**{name: v}), name, good)
        for name, good in (("num_pages", 2), ("page_size", 4), ("dim", 8))
    },
    "CompressorState.create.num_requests": case(
        lambda v: compressor.CompressorState.create(v, ratio=2, dim=4, overlap=True), "num_requests", 2
    ),
    "entry_pages.page_size": case(lambda v: compressor.entry_pages(TABLE, page_size=v, ratio=2)[0], "page_size", 4),
    "entry_pages.ratio": case(lambda v: compressor.entry_pages(TABLE, page_size=4, ratio=v)[0], "ratio", 2),
    "sparse_mla.value_dim": case(attend, "value_dim", 8),
    "paged_indexer_scores.max_length": case(
        lambda v: score(indexer.paged_indexer_scores, max_length=v), "max_length", 12
    ),
    "lightning_indexer.max_length": case(lambda v: select(max_length=v), "max_length", 12),
    "lightning_indexer.k": case(lambda v: select(k=v), "k", 3),
    "lightning_indexer.memory_limit": case(lambda v: select(memory_limit=v), "memory_limit", 96, 48),
    "top_k.k": case(lambda v: topk.top_k(SCORES, v, implementation="xla"), "k", 3),
    "top_k_prefill.k": case(
        lambda v: topk.top_k_prefill(SCORES, v, row_starts=INTS, row_ends=INTS, implementation="xla"), "k", 3
    ),
    "top_k_decode.k": case(
        lambda v: topk.top_k_decode(SCORES, v, seq_lens=INTS, next_n=1, implementation="xla"), "k", 3
    ),
    "top_k_decode.next_n": case(
        lambda v: topk.top_k_decode(SCORES, 3, seq_lens=INTS[:2], next_n=v, implementation="xla"), "next_n", 2
    ),
    "top_k_merge.k": case(merge_parts, "k", 3),
    "top_k_share.k": case(share_parts, "k", 3),
    "own_pages.n": case(lambda v: context_pages.own_pages(TABLE, 0, v), "n", 2),
    **{
        f"{name}.{argument}": case(
            lambda v, name=name, argument=argument: spread(name, **{argument: v}), argument, good
        )
        for name in ("own_lengths", "to_global", "to_local", "own_slots")
        for argument, good in (("n", 2), ("page_size", 4))
    },
    "Ragged.to_dense.width": case(lambda v: ragged.pack_rows(TABLE).to_dense(v), "width", 5, 0),
    "Ragged.to_dense.fill": case(lambda v: ragged.pack_rows(TABLE).to_dense(5, v), "fill", -7, -(2**31)),
    "slots_from_positions.page_size": case(
        lambda v: ragged.slots_from_positions(INTS, INTS, TABLE, page_size=v), "page_size", 8
    ),
    "select_to_ragged.page_size": case(
        lambda v: ragged.select_to_ragged(INTS[:, None], INTS, TABLE, page_size=v), "page_size", 8
    ),
    "num_entries.ratio": case(lambda v: compressor.num_entries(INTS, ratio=v), "ratio", 4),
    "combine_with_window.window": case(combine, "window", 3),
    "ring_size.window": case(lambda v: window.ring_size(v, 2) + INTS, "window", 3),
    "ring_size.max_query_len": case(lambda v: window.ring_size(2, v) + INTS, "max_query_len", 3),
    "ring_slots.ring": case(lambda v: window.ring_slots(INTS, INTS, ring=v), "ring", 3),
    "window_slots.window": case(lambda v: window.window_slots(INTS, INTS, window=v, ring=9), "window", 3),
    "window_slots.ring": case(lambda v: window.window_slots(INTS, INTS, window=3, ring=v), "ring", 5, 3),
    "biased_grouped_topk.num_groups": case(lambda v: route(num_groups=v), "num_groups", 4),
    "biased_grouped_topk.groups_kept": case(lambda v: route(groups_kept=v), "groups_kept", 2),
    "biased_grouped_topk.k": case(lambda v: route(k=v), "k", 3),
    "softmax_grouped_topk.num_groups": case(lambda v: route_by_share(num_groups=v), "num_groups", 4),
    "softmax_grouped_topk.groups_kept": case(lambda v: route_by_share(groups_kept=v), "groups_kept", 2),
    "softmax_grouped_topk.k": case(lambda v: route_by_share(k=v), "k", 3),
    "sqrt_softplus_topk.k": case(lambda v: router.sqrt_softplus_topk(ones((4, 8)), ones(8), k=v, scale=1.0), "k", 3),
    "rope_frequencies.dim": case(
        lambda v: jnp.asarray(rope.rope_frequencies(RopeConfig(theta=10000.0), v)), "dim", 8, 2
    ),
    "split.iterations": case(split, "iterations", 2),
    "doubly_stochastic.iterations": case(
        lambda v: hyper_connections.doubly_stochastic(ones((4, 2, 2)), iterations=v, eps=0.0), "iterations", 2
    ),
    "Part.start": case(lambda v: finish(start=v), r"parts\[0\].start", 2, 0),
    "Part.heads": case(lambda v: finish(heads=v), r"parts\[0\].heads", 1),
    "Part.width": case(lambda v: finish(width=v), r"parts\[0\].width", 5),
    "Part.rotated": case(lambda v: finish(rotated=v), r"parts\[0\].rotated", 2, 0),
    "token_states.rings": case(lambda v: window.token_states(build(), None, rings=v, capacity=4), "rings", 3),
    "token_states.capacity": case(lambda v: window.token_states(build(), None, rings=2, capacity=v), "capacity", 3),
    "window_rows.window": case(lambda v: window.window_rows(build(), INTS, window=v, ring=9), "window", 3),
    "window_rows.ring": case(lambda v: window.window_rows(build(), INTS, window=3, ring=v), "ring", 5, 3),
    "build_metadata.num_tokens": case(lambda v: build(num_tokens=v), "num_tokens", 8, 0),
    "build_metadata.page_size": case(lambda v: build(page_size=v), "page_size", 8),
    "decode_metadata.page_size": case(lambda v: metadata.decode_metadata(INTS[:2], TABLE, page_size=v), "page_size", 8),
    "buckets.max_size": case(lambda v: jnp.asarray(metadata.buckets(v)), "max_size", 8),
    "buckets.min_size": case(lambda v: jnp.asarray(metadata.buckets(16, min_size=v)), "min_size", 4),
    "bucket_for.size": case(lambda v: metadata.bucket_for(v, (2, 4, 8)) + INTS, "size", 3, 0),
    "kv_from_v32_rows.latent_dim": case(lambda v: from_rows(latent_dim=v), "latent_dim", 8),
    "kv_from_v32_rows.rope_dim": case(lambda v: from_rows(rope_dim=v), "rope_dim", 2, 0),
    "kv_from_v32_rows.group_size": case(lambda v: from_rows(group_size=v), "group_size", 4),
    "index_to_planar_blocks.block_stride": case(
        lambda v: interchange.index_to_planar_blocks(index_cache_of(), block_stride=v), "block_stride", 64
    ),
    "index_from_planar_blocks.page_size": case(lambda v: from_index(page_size=v), "page_size", 3),
    "index_from_planar_blocks.dim": case(lambda v: from_index(dim=v), "dim", 8),
    "kv_to_v4_blocks.block_stride": case(
        lambda v: interchange.kv_to_v4_blocks(kv_cache(scale_dtype=jnp.float8_e8m0fnu), block_stride=v),
        "block_stride",
        96,
    ),
    "kv_from_v4_blocks.page_size": case(lambda v: from_v4(page_size=v), "page_size", 3),
    "kv_from_v4_blocks.latent_dim": case(lambda v: from_v4(latent_dim=v), "latent_dim", 8),
    "kv_from_v4_blocks.rope_dim": case(lambda v: from_v4(rope_dim=v), "rope_dim", 2, 0),
    "kv_from_v4_blocks.group_size": case(lambda v: from_v4(group_size=v), "group_size", 4),
}
cases = pytest.mark.parametrize(("call", "argument", "good", "low"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("x64", [False, True])
def test_numpy_integers_are_integers(call, argument, good, low, x64):
    with jax.enable_x64(x64):
        assert jax.eval_shape(lambda: call(np.int64(good))) == jax.eval_shape(lambda: call(good))


@cases
def test_what_is_no_size_is_refused(call, argument, good, low):
    for wrong in (
        True,
        np.bool_(True),
        low - 1,
        -(2**40),
        2.0,
        None if "block_stride" not in argument else "2",
        INTS[0],
    ):
        if wrong is None and (argument == r"parts\[0\].rotated" or call in OPTIONAL):
            continue
        with pytest.raises(ValueError, match=rf"^{argument} is {re.escape(repr(wrong))}; expected an integer "):
            jax.eval_shape(lambda wrong=wrong: call(wrong))


def test_every_integer_argument_is_tested():
    wanted = set()
    for module in MODULES:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__ or name.startswith("_"):
                continue
            methods = [m for m in ("create", "to_dense") if hasattr(value, m)] if inspect.isclass(value) else [None]
            for method in methods:
                function = value if method is None else getattr(value, method)
                for key, parameter in inspect.signature(function).parameters.items():
                    if parameter.annotation in ("int", "int | None"):
                        wanted.add(".".join(x for x in (name, method, key) if x))
    # Sizes of arrays, which are integers already.
    wanted -= {"check_groups.width", "FlatRows.create"}
    assert wanted <= set(CASES), sorted(wanted - set(CASES))


# --- one notation
Q = ones((3, 2, 8))
WRONG_ARRAYS = [
    lambda: attention.sparse_mla(Q[0], Q[:, 0], TABLE, sm_scale=1.0, value_dim=8),
    lambda: attention.sparse_mla(Q, Q, TABLE, sm_scale=1.0, value_dim=8),
    lambda: attention.sparse_mla(Q, Q[:, 0], TABLE, sm_scale=1.0, value_dim=8),
    lambda: attention.sparse_mla(Q, Q[:, 0], jnp.zeros((3, 1), int), sm_scale=1.0, value_dim=8, sinks=INTS),
    lambda: attention.sparse_mla(Q, Q[:, 0], ragged.DenseRows(jnp.zeros((3, 1), int), INTS), sm_scale=1.0, value_dim=8),
    lambda: attention.merge(Q, Q),
    lambda: attention.apply_sinks(Q, Q, INTS),
    lambda: cache.write(kv_cache(), Q, Q, INTS),
    lambda: cache.gather(kv_cache(), SCORES, dtype=jnp.float32),
    lambda: fp8.dequantize(VALUES, SCORES, group_size=4),
    lambda: hyper_connections.split(Q, Q, INTS, INTS, iterations=1),
    lambda: indexer.indexer_scores(Q, Q, None, Q[..., 0], row_starts=INTS, row_lengths=INTS),
    lambda: indexer.indexer_scores(Q, Q[:, 0], SCORES, Q[..., 0], row_starts=INTS, row_lengths=INTS),
    lambda: indexer.indexer_scores(Q, Q[:, 0], None, Q, row_starts=INTS, row_lengths=INTS),
    lambda: interchange.index_from_planar_blocks(SCORES, page_size=3, dtype=FN),
    lambda: metadata.decode_metadata(SCORES, TABLE, page_size=4),
    lambda: norm_rope.norm_rope(Q, [], INTS, INTS),
    lambda: output_projection.rotated_projection(SCORES, Q, INTS, SCORES[0]),
    lambda: ragged.pack_rows(SCORES),
    lambda: rope.rotate(Q, INTS, SCORES, interleaved=True),
    lambda: rope.rotate(Q, INTS, ones(4), interleaved=True),
    lambda: router.biased_grouped_topk(SCORES, SCORES, num_groups=1, groups_kept=1, k=1, scale=1.0),
    lambda: topk.top_k(Q, 1),
    lambda: topk.top_k_decode(SCORES, 1, seq_lens=TABLE, next_n=1),
    lambda: window.ring_slots(SCORES, INTS, ring=2),
]


@pytest.mark.parametrize("call", WRONG_ARRAYS)
def test_messages_describe_arrays_in_brackets(call):
    with pytest.raises(ValueError, match=r"\[[\d, ]*\]") as error:
        call()
    assert not re.search(r"\(\d*,|\(\d+(, \d+)+\)", str(error.value)), error.value


def test_no_message_prints_a_tuple():
    """A shape in a message is list(x.shape), or describe(x)."""
    root = pathlib.Path(cache.__file__).parent
    for path in [*root.glob("*.py"), root.parent / "metadata.py", root.parent / "interchange.py"]:
        found = re.search(r"\{[\w.]+\.shape(\[[^\]{}]*:[^\]{}]*\])?\}", path.read_text())
        assert found is None, f"{path.name}: {found and found.group()}"


# --- _check itself
def test_describe():
    assert _check.describe(np.zeros((2, 3))) == "float64[2, 3]" and _check.describe(INTS) == "int32[4]"
    assert _check.describe("cache") == "str" and _check.describe(VALUES) == "float8_e4m3fn[2, 8]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _check.size("k", 9, 1, 8, hint="Ask for less."),
            "k is 9; expected an integer from 1 to 8. Ask for less.",
        ),
        (
            lambda: _check.array("q", SCORES, (jnp.bfloat16, jnp.int8), "T", None, 8),
            "q is float32[4, 10]; expected bfloat16 or int8 [T, any, 8].",
        ),
        (lambda: _check.int32("q", INTS, ..., "B", 4), "q is int32[4]; expected integers [..., B, 4]."),
        (lambda: _check.floats("q", "text", "T"), "q is str; expected floating values [T]."),
        (lambda: _check.booleans("q", INTS, 4), "q is int32[4]; expected booleans [4]."),
        (
            lambda: _check.dtype("dtype", "wide", ("float32", jnp.bfloat16)),
            "dtype is 'wide'; expected float32 or bfloat16.",
        ),
        (lambda: _check.dtype("dtype", jnp.int8, jnp.floating), "dtype is int8; expected a floating type."),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message


def test_a_traced_size_is_refused_without_reading_it():
    with pytest.raises(ValueError, match="k is .*expected an integer"):
        jax.jit(lambda k: _check.size("k", k))(3)


# --- 64-bit ids: what int32 does not hold is nobody's
def beyond(*values):
    """int64 values that would be 1 if a cast wrapped them."""
    return jnp.asarray([2**32 + 1, *values])


def attend_wide(rows):
    q, keys = ones((2, 1, 4)), ones((3, 4))
    return attention.sparse_mla(q, keys, rows, sm_scale=1.0, value_dim=4, implementation="xla")[:, 0, 0]


def score_wide(request_ids):
    given = dict(max_length=1, implementation="xla")
    q, weights, lengths = ones((2, 1, 32)), ones((2, 1)), jnp.ones(2, int)
    return jnp.isfinite(
        indexer.paged_indexer_scores(q, weights, index_cache(), TABLE, request_ids, lengths, **given)[:, 0]
    )


def score_interval(starts, lengths):
    q, keys, weights = ones((2, 1, 4)), ones((3, 4)), ones((2, 1))
    given = dict(row_starts=starts, row_lengths=lengths, implementation="xla")
    return jnp.isfinite(indexer.indexer_scores(q, keys, None, weights, **given)).sum(axis=1)


def slots_of(seq_lens, page_table):
    return metadata.decode_metadata(seq_lens, page_table, page_size=4).slots


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: _check.saturate(jnp.asarray([2**40, -(2**40), 5])), [2**31 - 1, -(2**31), 5]),
        (lambda: _check.saturate(jnp.asarray([2**63, 5], jnp.uint64)), [2**31 - 1, 5]),
        (lambda: attend_wide(beyond(1)[:, None]), [0, 1]),
        (lambda: attend_wide(ragged.DenseRows(jnp.ones((2, 3), int), -beyond(-1))), [0, 1]),
        (lambda: attend_wide(ragged.Ragged(beyond(1), jnp.arange(3))), [0, 1]),
        (lambda: score_wide(beyond(1)), [False, True]),
        (lambda: score_interval(beyond(1), beyond(2**40)), [0, 2]),
        (lambda: topk.top_k(ones((2, 3)), 3, beyond(1), implementation="xla"), [[0, 1, 2], [0, -1, -1]]),
        (lambda: slots_of(beyond(1), jnp.asarray([[1], [3]])), [-1, 12]),
        (lambda: slots_of(jnp.ones(2, int), beyond(1)[:, None]), [-1, 4]),
        (lambda: router.hash_route(ones((2, 4)), beyond(1), jnp.arange(3)[:, None], scale=1.0)[1][:, 0], [2, 1]),
        (lambda: ragged.slots_from_positions(beyond(1), jnp.zeros(2, int), TABLE, page_size=4), [-1, 1]),
        (lambda: ragged.pack_rows(beyond(1)[None], limit=5).indptr, [0, 1]),
    ],
)
def test_wide_ids_are_clamped_before_they_are_narrowed(call, expected):
    with jax.enable_x64(True):
        np.testing.assert_array_equal(call(), expected)
