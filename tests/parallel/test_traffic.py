"""parallel/traffic.py: its formulas against the collectives that a traced and a compiled step have."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from cdna_support import require_cdna
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.marks import slow

from pallas_kernels import cdna, targets
from sparse_mla_jax.cases.sharded import sharded_decode_step
from sparse_mla_jax.cases.steps import published_config
from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DEEPSEEK_V32, default_config, load_config
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.parallel import traffic
from sparse_mla_jax.parallel.axes import AXES, Parallel, make_mesh, parse_parallel
from sparse_mla_jax.parallel.caches import partition_caches
from sparse_mla_jax.parallel.experts import expert_traffic
from sparse_mla_jax.parallel.partition import partition_params
from sparse_mla_jax.parallel.run import Where, run_on_mesh
from sparse_mla_jax.parallel.traffic import StepSize, layer_traffic, rest_traffic, seconds, step_traffic, sum_by_axes

KINDS = {
    **dict.fromkeys(("psum", "psum_invariant"), "all-reduce"),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), "all-gather"),
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "reduce_scatter": "reduce-scatter",
}


# --- what a traced step has
def axes_in(eqn):
    names = eqn.params.get("axes", eqn.params.get("axis_name"))
    names = names if isinstance(names, tuple) else (names,)
    return tuple(kind for kind in AXES if kind in names)


def sent(kind, nbytes, n):
    """Bytes that a device sends of an operand of so many."""
    return nbytes * {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1}.get(kind, (n - 1) / n)


def inner(eqn):
    """(jaxpr, how often) of an equation's inner programs; of branches the one with ragged exchanges, as on a GPU."""
    subs = [getattr(x, "jaxpr", x) for v in eqn.params.values() for x in (v if isinstance(v, tuple | list) else [v])]
    subs = [x for x in subs if hasattr(x, "eqns")]
    if eqn.primitive.name == "cond":
        return [(max(subs, key=lambda sub: str(sub).count("ragged_all_to_all[")), 1)]
    return [(sub, eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1) for sub in subs]


def collectives(jaxpr, parallel, times=1):
    """(axes, kind, bytes sent by one device, executions) of the collectives of a jaxpr whose results are used."""
    for eqn in jaxpr.eqns:
        kind = KINDS.get(eqn.primitive.name)
        if kind is not None:
            # A ragged exchange has offsets and sizes besides its rows.
            given = eqn.invars[:1] if kind == "ragged-all-to-all" else eqn.invars
            axes, n = axes_in(eqn), 1
            n = math.prod(getattr(parallel, axis) for axis in axes)
            for x in given:
                yield axes, kind, sent(kind, x.aval.size * x.aval.dtype.itemsize, n), times
        for sub, count in inner(eqn):
            yield from collectives(sub, parallel, times * count)


def traced(config, parallel, size, dtype=jnp.bfloat16):
    """The collectives of a decode step, traced on virtual devices from shapes."""
    family, mesh = family_of(config), make_mesh(parallel)
    specs = family.param_specs(config, dtype)
    where = Where(mesh, parallel, partition_params(specs, parallel))
    rows, pages = size.tokens * parallel.data, size.context // size.page_size
    caches = jax.eval_shape(
        lambda: family.create_caches(config, rows * pages, size.page_size, num_requests=rows, dtype="float8_e4m3fn")
    )

    def body(params, caches, inputs):
        ids, lens, table = inputs
        options = {"config": config, "page_size": size.page_size, "implementation": "xla", "parallel": parallel}
        scores, caches = family.decode(params, ids, caches, lens, table, **options)
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    def step(params, caches, ids, lens, table):
        return run_on_mesh(body, where, params, caches, (ids, lens, table))

    def place(shapes, partition):
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, p)), shapes, partition
        )

    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows,), (rows,), (rows, pages))]
    placed = place(specs, where.params), place(caches, partition_caches(caches, parallel)), *place(ints, [P()] * 3)
    # The compiler drops what nothing uses, as the lse of the merged outputs.
    whole = jax.make_jaxpr(jax.jit(step))(*placed).jaxpr
    used = jax.interpreters.partial_eval.dce_jaxpr(whole, [True] * len(whole.outvars))[0]
    return list(collectives(used, parallel))


def by_kind(found):
    """{(axes, kind): (launches, bytes)} without what ragged exchanges send, which the router decides."""
    sums = collections.defaultdict(lambda: [0, 0.0])
    for axes, kind, nbytes, times in found:
        sums[axes, kind][0] += times
        sums[axes, kind][1] += 0 if kind == "ragged-all-to-all" else nbytes * times
    return {key: (count, pytest.approx(nbytes)) for key, (count, nbytes) in sums.items()}


def predicted(config, parallel, size):
    """The same by the formulas."""
    found = step_traffic(config, parallel, size)
    return by_kind((one.axes, one.kind, one.sent / one.launches, one.launches) for one in found)


# Together they have all that traffic depends on: sinks, shared selections, rings, all keys, heads that do not divide.
# Tracing a whole step takes 1 to 2 s.
CASES = (
    ("deepseek_v32", "data=2,context=2,tensor=2"),
    ("deepseek_v4", "data=2,context=2,tensor=2"),
    ("dots3_note", "data=4,tensor=2,experts=tensor"),
    slow("hy_v4", "context=4,tensor=2"),
    slow("mistral_large4", "context=2,tensor=2,experts=context+tensor"),
    slow("glm_moe_dsa", "context=8"),
    slow("axk2", "tensor=2,experts="),
    slow("deepseek_v32", "context=3"),
    slow("deepseek_v4", "data=8"),
    slow("deepseek_v32", "data=4,tensor=2,experts=data"),
)


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_formulas_are_what_a_step_has(fixtures, name, sizes):
    """The table has pages for more keys than an indexer chooses; a device of "tensor" has a row of padding."""
    config, parallel = load_config(fixtures / f"{name}_tiny"), parse_parallel(sizes)
    size = StepSize(tokens=5, context=192, page_size=8)
    assert predicted(config, parallel, size) == by_kind(traced(config, parallel, size))


def test_a_device_has_fewer_keys_than_are_chosen(fixtures):
    """Three pages of 8 tokens on two devices, the first of which has two: both give 16 candidates, not 20."""
    config = dataclasses.replace(load_config(fixtures / "deepseek_v32_tiny"), index_topk=20, num_hidden_layers=1)
    parallel, size = Parallel(context=2), StepSize(tokens=4, context=24, page_size=8)
    assert predicted(config, parallel, size) == by_kind(traced(config, parallel, size))
    (found,) = (one for one in layer_traffic(config, 0, parallel, size) if "candidates" in one.what)
    assert found.sent == 4 * 16 * 8


def test_chunks_of_scores():
    """Scores of 256 rows and 524288 keys take the indexer's memory: 600 rows are 3 chunks, and the last is whole."""
    parallel, size = Parallel(context=2), StepSize(tokens=600, context=1 << 20)
    found = layer_traffic(DEEPSEEK_V32, 0, parallel, size)
    (candidates,) = (one for one in found if one.what == "candidates of the context")
    assert candidates[2:] == ("all-gather", 6, 3 * 256 * 2048 * 8, 2)


# --- what a compiled step has
@pytest.mark.parametrize("sizes", [slow("tensor=8"), slow("data=2,tensor=2"), slow("tensor=2,context=2")])
def test_compiled_steps(sizes):
    """XLA:ROCm moves the same bytes by the same kinds of collectives. It may make one of two neighbours.

    A compilation takes half a minute.
    """
    require_cdna("xla")
    parallel, shape = parse_parallel(sizes), {"batch": 8, "context": 4096}
    step = sharded_decode_step(parallel, heads=16, layers=2, **shape)
    program = cdna.compile(step.fn, *step.args, arch="gfx942", donate_argnums=step.donated)
    config = published_config(heads=16, layers=2)
    wanted = step_traffic(config, parallel, StepSize(tokens=8, context=4096))
    ragged = "ragged-all-to-all"
    there = [one for one in cdna.collectives_of(program) if one.kind == ragged]
    assert len(there) == sum(one.launches for one in wanted if one.kind == ragged)
    for kind in {one.kind for one in (*wanted, *cdna.collectives_of(program))} - {ragged}:
        found = [one for one in cdna.collectives_of(program) if one.kind == kind]
        expected = [one for one in wanted if one.kind == kind]
        assert sum(one.sent_bytes for one in found) == sum(one.sent for one in expected), kind
        neighbours = sum(one.launches for one in expected if one.what == "candidates of the context") // 2
        assert sum(one.launches for one in expected) - neighbours <= len(found), kind
        assert len(found) <= sum(one.launches for one in expected), kind


# --- numbers
def test_a_layer_of_deepseek_v32():
    """64 tokens of 7168 bfloat16 values on 8 devices: 8 rows of 2048 positions each go to 7 others."""
    found = layer_traffic(DEEPSEEK_V32, 5, Parallel(tensor=8), StepSize(tokens=64, context=163840))
    assert [(one.what, one.launches, one.sent) for one in found] == [
        ("selection joined", 1, 8 * 2048 * 4 * 7),
        ("heads summed", 1, 2 * 64 * 7168 * 2 * 7 / 8),
        ("feed-forward summed", 1, 2 * 64 * 7168 * 2 * 7 / 8),
    ]
    # A request that can not have more keys than are chosen needs no selection.
    short = layer_traffic(DEEPSEEK_V32, 5, Parallel(tensor=8), StepSize(tokens=64, context=2048))
    assert [one.what for one in short] == ["heads summed", "feed-forward summed"]


def test_experts_are_those_of_expert_traffic():
    parallel, size = Parallel(data=4, tensor=2), StepSize(tokens=32, context=4096)
    found = [one for one in layer_traffic(DEEPSEEK_V32, 60, parallel, size) if one.what == "experts"]
    expected = expert_traffic(parallel, tokens=32, hidden=7168, num_experts=256, k=8, itemsize=2)
    assert sum(one.sent for one in found) == expected.ragged
    assert {one.axes for one in found} == {("data",)}


def test_one_device_sends_nothing():
    for config in (DEEPSEEK_V32, DEEPSEEK_V4_FLASH, default_config("hy_v4")):
        assert step_traffic(config, Parallel(), StepSize(tokens=3, context=8192, page_size=256)) == ()


def test_a_vocabulary_that_does_not_divide_is_whole():
    config = load_config("tests/fixtures/deepseek_v32_tiny")
    assert [one.what for one in rest_traffic(config, Parallel(tensor=3), StepSize(2, 64))] == (
        ["embedding", "logits"] if config.vocab_size % 3 == 0 else []
    )


def test_sums():
    size = StepSize(tokens=64, context=8192)
    parallel = Parallel(data=2, tensor=4)
    whole = step_traffic(DEEPSEEK_V32, parallel, size)
    sums = sum_by_axes(whole)
    assert set(sums) == {"tensor", "data"}
    assert sum(one.sent for one in sums.values()) == pytest.approx(sum(one.sent for one in whole))
    assert sum(one.launches for one in sums.values()) == sum(one.launches for one in whole)
    # Three dense layers of 3 collectives, 58 of 3 and the experts' 4, then embedding, logits, tokens.
    assert (sums["tensor"].launches, sums["data"].launches) == (61 * 3 + 2, 58 * 4 + 1)


# --- time
def test_seconds():
    link = targets.Link("a link", pair=1e9, total=3e9, launch=1e-5)
    one = traffic.Exchange("x", ("tensor",), "all-reduce", 2, 3e6, 4)
    assert seconds([one], Parallel(tensor=4), link) == pytest.approx(2e-5 + 1e-3)
    # Two devices have one link between them.
    assert seconds([one._replace(devices=2)], Parallel(tensor=2), link) == pytest.approx(2e-5 + 3e-3)
    # Groups of 16 do not lie in one machine.
    network = targets.Link("a network", pair=1e6, total=1e6, launch=1.0)
    assert seconds([one], Parallel(tensor=16), link, network) == pytest.approx(2 + 3)


@pytest.mark.parametrize(
    ("axes", "sizes", "crosses"),
    [
        (("tensor",), "data=8,tensor=8", False),
        (("data",), "data=8,tensor=8", True),
        (("context",), "data=8,context=2,tensor=4", False),
        (("context", "tensor"), "context=2,tensor=8", True),
        (("data",), "data=8", False),
    ],
)
def test_which_axes_cross_machines(axes, sizes, crosses):
    assert traffic.crosses_hosts(axes, parse_parallel(sizes)) == crosses


# --- errors
def test_refusals():
    with pytest.raises(ValueError, match="tokens is 0"):
        StepSize(tokens=0, context=64)
    with pytest.raises(ValueError, match="page_size is 64 in a layer with compress_ratio 128"):
        step_traffic(DEEPSEEK_V4_FLASH, Parallel(context=2), StepSize(tokens=1, context=8192, page_size=64))
    with pytest.raises(ValueError, match="spreads 256 experts over 3 devices"):
        step_traffic(DEEPSEEK_V32, Parallel(data=3), StepSize(tokens=1, context=8192))
