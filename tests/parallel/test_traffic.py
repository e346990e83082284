"""parallel/traffic.py: its formulas against the collectives that a traced and a compiled step have."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.marks import slow

from pallas_kernels import cdna, targets
from sparse_mla_jax.cases.mesh_steps import mesh_decode_step
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


# Fixtures whose layers have everything that traffic depends on: sinks, shared selections, rings, all keys, no indexer.
CASES = (
    ("deepseek_v32", "data=2,context=2,tensor=2"),
    ("deepseek_v4", "data=2,context=2,tensor=2"),
    ("hy_v4", "context=4,tensor=2"),
    ("dots3_note", "data=4,tensor=2,experts=tensor"),
    ("mistral_large4", "context=2,tensor=2,experts=context+tensor"),
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
