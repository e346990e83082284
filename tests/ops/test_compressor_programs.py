"""compressor in programs: in place, one launch, lowering, plans that change no bit, arguments that do not fit."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from jax.sharding import Mesh, PartitionSpec
from support.compressor import BF16, E8M0, F32, FIELDS, FNUZ, Case, plain_step, run, same, step
from support.equivalence import QUICK_COMPILE
from support.marks import interpreted, machine_code_runs, slow

from pallas_kernels import cdna
from pallas_kernels import compress as kernel
from pallas_kernels.cdna import lowering
from pallas_kernels.plans.compress import CompressPlan, compress_plan
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache
from sparse_mla_jax.ops.compressor import CompressorState, compress

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("compressor_programs")


# --- programs
def big(dtype, ratio, index, tokens, requests):
    """Shapes of one step at the published sizes, caches of 64 MB and more."""
    dim, overlap, entries = 128 if index else 512, ratio == 4, 256 // ratio
    pages = (160_000 if index else 40_000) // entries

    def caches():
        if index:
            return PagedIndexCache.create(pages, entries, dim=dim, dtype=dtype)
        sizes: Any = dict(latent_dim=448, rope_dim=64, group_size=64, scale_dtype=E8M0)
        return PagedKVCache.create(pages, entries, dtype=dtype, **sizes)

    cache = jax.eval_shape(caches)
    state = jax.eval_shape(lambda: CompressorState.create(256, ratio=ratio, dim=dim, overlap=overlap))
    channels = dim * (1 + overlap)
    f, i = (functools.partial(lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype), d) for d in (F32, jnp.int32))
    weights = f(ratio, channels), f(dim), f(32)
    rows = f(tokens, channels), f(tokens, channels)
    return cache, state, *rows, weights, i(requests, 64), i(requests), i(requests)


PROGRAMS = [
    (F32, 4, False, 64, 64),
    (FNUZ, 4, False, 512, 4),
    (FNUZ, 4, True, 64, 64),
    (BF16, 128, False, 64, 64),
]


def named(sizes):
    return "-".join(map(str, (sizes[0].__name__, *sizes[1:]))) if isinstance(sizes, tuple) else str(sizes)


def programs(name, values):
    """Every program with each of `values`; by default a program with those that name its number."""
    every = [(sizes, v) if n in chosen else slow(sizes, v) for v, chosen in values for n, sizes in enumerate(PROGRAMS)]
    return pytest.mark.parametrize(("sizes", name), every, ids=named)


# Machine code in place by the next test; in interpret mode that program which copies its small array of scales.
@programs("name", [("xla", (0, 1, 2, 3)), ("triton", (2,) if machine_code_runs() else (0, 1, 2, 3))])
def test_in_place_under_donation(sizes, name):
    arguments = big(*sizes)
    updated = jax.tree.leaves(arguments[:2])
    size = sum(x.size * x.dtype.itemsize for x in updated)
    inner = functools.partial(plain_step, page_size=256, implementation=name)
    memory: Any = jax.jit(inner, donate_argnums=(0, 1)).lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    # The rows of at most 64 entries; interpret mode copies the small array of the index scales.
    scales = getattr(arguments[0], "scale", None)
    slack = scales.size * scales.dtype.itemsize if name == "triton" and scales is not None else 0
    assert memory.temp_size_in_bytes < 6e6 + slack
    assert max(x.size * x.dtype.itemsize for x in updated) > 1e7


@programs("arch", [("gfx942", (0, 2)), ("gfx950", (1, 3))])
def test_one_launch_in_place_by_xla_rocm(arch, sizes):
    require_cdna("xla")
    arguments = big(*sizes)
    inner = functools.partial(plain_step, page_size=256, implementation="triton")
    program = cdna.compile(inner, *arguments, arch=arch, donate_argnums=(0, 1))
    assert [k.name for k in program.kernels].count("compress") == 1
    assert program.in_place == tuple(range(len(jax.tree.leaves(arguments[:2]))))
    assert not program.copies and not program.library_calls
    assert program.temporary_bytes is not None and program.temporary_bytes < 1e5


TARGETS = {"NVIDIA H200": (132, "cuda"), "gfx942": (304, "rocm"), "gfx950": (256, "rocm")}


# Of AMD's targets a program each: the test before compiles them.
@programs("kind", [("NVIDIA H200", (0, 1, 2, 3)), ("gfx942", (1,)), ("gfx950", (2,))])
def test_lowering(sizes, kind):
    """One kernel, caches in place; on NVIDIA FP8's division is the one that rounds once."""
    cores, platform = TARGETS[kind]
    arguments = big(*sizes)
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    inner = functools.partial(plain_step, page_size=256, implementation="triton")
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(inner).trace(*arguments).lower(lowering_platforms=(platform,))
    (found,) = lowering.calls_in(lowered)
    assert len(found.aliases) == len(jax.tree.leaves(arguments[0]))
    quotients = sizes[0] == FNUZ and sizes[2]
    assert ("div.rn.f32" in found.ir) == (platform == "cuda" and quotients)


def test_lengths_never_retrace(implementation):
    """The operator's harness refuses a second trace of equal shapes."""
    case = Case(4, True, 4)
    table, pages = case.table(2, 16)
    cache, state, given = case.cache(pages), case.state(2), []
    for seq_lens, query_lens in [((3, 2), (3, 2)), ((4, 8), (1, 6)), ((11, 0), (7, 0)), ((0, 9), (0, 1))]:
        lengths = np.array(seq_lens, np.int32), np.array(query_lens, np.int32)
        given.append((cache, state, *case.tokens(7), case.weights(), table, *lengths))
        cache, state = step(*given[-1], page_size=4, implementation=implementation)
    step.check_warm(implementation, *given[:2], page_size=4)
    step.check_warm(implementation, *given[2:], page_size=4)


@pytest.mark.parametrize("name", ["xla", interpreted("triton")])
def test_inside_shard_map(name):
    case = Case(4, True, 4, FNUZ)
    kv, gate = case.tokens(8)
    table, pages = case.table(1, 8)
    arguments = case.cache(pages), case.state(1), kv, gate, case.weights(), table, np.array([8]), np.array([8])
    inner = functools.partial(plain_step, page_size=4, implementation=name)
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    specs = (PartitionSpec("x"), PartitionSpec("x"), *[PartitionSpec()] * 6)
    # Kernels carry no types of shard_map's axes.
    mapped = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x"), check_vma=name == "xla")
    same(jax.jit(mapped)(*arguments), step(*arguments, page_size=4, implementation=name))


def test_plans_are_memoised_and_sensible():
    key = dict(rows=8, width=512, target="gfx942")
    assert compress_plan(**key) is compress_plan(**key)
    assert compress_plan(**key) == CompressPlan(8, 4)
    assert compress_plan(rows=128, width=512, target="gfx950") == CompressPlan(16, 4)
    assert compress_plan(rows=8, width=128, target="nvidia") == CompressPlan(8, 2)
    assert compress_plan(rows=8, width=12, target="nvidia") == CompressPlan(8, 1)


def compiled_anew():
    """`plain_step`, compiled anew."""
    static = ("page_size", "decode", "implementation")
    return jax.jit(lambda *a, **k: plain_step(*a, **k), static_argnames=static, compiler_options=QUICK_COMPILE)


CUTS = [(19, 1), (1, 3), (13, 21)], [(17, 1), (16, 24)], [(33, 25)]


@pytest.mark.parametrize("target", [interpreted("cpu"), "gfx942", slow("gfx950")])
def test_blocks_change_no_bit(monkeypatch, target):
    """Nor does the cut between state and step, which moves a token to another place of its block."""
    case = Case(8, True, 8, F32, 20, 6)
    kv, gate = case.tokens(2, 33)
    table, pages = case.table(2, 33)
    if target != "cpu":
        require_cdna("triton")
    results = []
    for block, steps in [(1, CUTS[0]), (16, CUTS[0]), (8, CUTS[1]), (3, CUTS[2])]:
        monkeypatch.setattr(kernel, "compress_plan", lambda block=block, **_: CompressPlan(block, 2))
        how: Any = dict(tokens=60, implementation="triton", jitted=compiled_anew())
        with contextlib.nullcontext() if target == "cpu" else cdna.device(target):
            results.append(run(case, kv, gate, steps, table, case.cache(pages), case.state(2), **how))
    for other in results[1:]:
        same(other, results[0])


# --- errors
SMALL = Case(4, True, 4)


def call(case=SMALL, tokens=6, requests=2, **changes):
    kv, gate = case.tokens(tokens)
    bias, norm, frequencies = case.weights()
    seq_lens = jnp.full(requests, 3)
    m = build_metadata(seq_lens, seq_lens, jnp.zeros((requests, 2), jnp.int32), num_tokens=tokens, page_size=4)
    arguments: Any = dict(cache=case.cache(3), state=case.state(2), kv=kv, gate=gate, position_bias=bias, norm=norm)
    arguments |= dict(frequencies=frequencies, ratio=case.ratio) | {name: getattr(m, name) for name in FIELDS}
    return compress(**arguments | changes)


ONES, INTS = functools.partial(jnp.ones, dtype=F32), functools.partial(jnp.ones, dtype=jnp.int32)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(kv=ONES((6, 12))), r"kv is float32\[6, 12\]; expected floating values \[any, 24\]"),
        (dict(kv=INTS((6, 24))), "kv is int32"),
        (dict(gate=ONES((5, 24))), r"gate is float32\[5, 24\]; expected floating values \[6, 24\]"),
        (dict(position_bias=ONES((3, 24))), r"position_bias is float32\[3, 24\]; expected floating values \[4, any\]"),
        (dict(position_bias=ONES((4, 36))), r"position_bias has shape \[4, 36\]; expected \[ratio, 12\]"),
        (dict(norm=ONES(13)), r"norm is float32\[13\]; expected floating values \[12\]"),
        (dict(frequencies=ONES(3)), r"frequencies has shape \[3\].*rope_dim of 4: pass \[2\]"),
        (dict(cache=PagedIndexCache.create(3, 1, dim=12, dtype=F32), frequencies=ONES(7)), "a dim of 12"),
        (dict(cache=ONES((3, 4))), "cache is a .*; expected a PagedKVCache or a PagedIndexCache"),
        (dict(cache=Case(4, True, 8).cache(3)), "cache has a page_size of 2.*Create the cache with page_size=1"),
        (dict(state=Case(4, False, 4).state(2)), r"state.kv is float32\[2, 4, 12\].*ratio=4, dim=12, overlap=True"),
        (dict(state=Case(8, True, 4).state(2)), r"state.kv is float32\[2, 16, 24\]; expected float32\[N, 8, 24\]"),
        (dict(state=Case(4, True, 4).state(1)), "state has 1 rows for 2 requests"),
        (dict(state_ids=INTS(3)), r"state_ids is int32\[3\]; expected integers \[2\]"),
        (dict(state_ids=ONES(2)), "state_ids is float32"),
        (dict(positions=INTS(5)), r"positions is int32\[5\]; expected integers \[6\]"),
        (dict(request_ids=ONES(6)), "request_ids is float32"),
        (dict(query_indptr=INTS(2)), r"query_indptr is int32\[2\]; expected integers \[3\]"),
        (dict(seq_lens=INTS(3)), r"seq_lens is int32\[3\]; expected integers \[2\]"),
        (dict(page_table=INTS(2)), r"page_table is int32\[2\]; expected integers \[any, any\]"),
        (dict(page_size=3), "page_size is 3 and ratio 4; one must divide the other.*a multiple of 4, or divides it"),
        (dict(page_size=0), "page_size is 0"),
        (dict(ratio=0), "ratio is 0"),
        (dict(implementation="cuda"), "implementation is 'cuda'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("name, value", [("num_requests", 0), ("ratio", 0), ("dim", 2.5)])
def test_bad_sizes_of_a_state(name, value):
    sizes: Any = dict(num_requests=1, ratio=4, dim=8, overlap=True) | {name: value}
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        CompressorState.create(sizes.pop("num_requests"), **sizes)


def test_the_kernel_declines():
    groups = Case(4, True, 4, FNUZ, 12, 0, 6)
    with pytest.raises(ValueError, match="groups of 6 values"):
        call(groups, implementation="triton")
    with pytest.raises(ValueError, match="entries of 7 values"):
        call(Case(4, True, 4, F32, 7, 2), implementation="triton")
    call(groups)


def test_wide_state_ids_wrap_into_no_row():
    """A request whose id is 2**32 keeps nothing and stores nothing; the other one does as always."""
    _, plain = call(state_ids=jnp.asarray([0, 1], jnp.int32))
    with jax.enable_x64(True):
        _, wide = call(state_ids=jnp.asarray([2**32, 1]))
    assert np.any(plain.kv[0])
    assert not np.any(wide.kv[0]) and not np.any(wide.gate[0])
    np.testing.assert_array_equal(wide.kv[1], plain.kv[1])
