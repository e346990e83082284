"""Products of an attention layer: fused and separate weights, and whose body finishes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, scattered_pages

from sparse_mla_jax.layers import moe
from sparse_mla_jax.layers.mla import index_query, select_positions
from sparse_mla_jax.layers.projections import fuse, matmul, place, project, unchanged
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.ops.norm_rope import Section, norm_rope

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((5, 6)), jnp.float32)
PARAMS = {
    "first": jnp.asarray(RNG.standard_normal((6, 3)), jnp.float32),
    "inner": {"second": jnp.asarray(RNG.standard_normal((6, 2, 4)), jnp.float32), "kept": jnp.ones(2, jnp.float32)},
    "third": jnp.asarray(RNG.standard_normal((6, 2)), jnp.float32),
}
PATHS = [("first",), ("inner", "second"), ("third",)]
FINISH = functools.partial(norm_rope, positions=jnp.arange(5), frequencies=jnp.array([0.5]), implementation="xla")


def columns():
    """The first weight as it is, heads of the second with a norm and a rotation, the third in bfloat16."""
    parts = [
        unchanged(3),
        Section(0, 2, 4, "float32", weight=jnp.full(4, 2.0, jnp.float32), rotated=2),
        Section(0, 1, 2, "bfloat16"),
    ]
    return place(parts)


def test_places_follow_each_other():
    assert [part.start for part in columns()] == [0, 3, 11]


def test_fusing_replaces_the_weights_at_the_paths():
    fused = fuse(PARAMS, {"all": PATHS[:2]})
    assert set(fused) == {"all", "inner", "third"} and set(fused["inner"]) == {"kept"}
    want = np.concatenate([PARAMS["first"], PARAMS["inner"]["second"].reshape(6, 8)], axis=1)
    np.testing.assert_array_equal(fused["all"], want)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1,)], ids=str)
def test_separate_weights_give_what_fused_ones_do(order):
    parts = [columns()[i] for i in order]
    got = project(PARAMS, "all", X, PATHS, parts, FINISH)
    want = project(fuse(PARAMS, {"all": PATHS}), "all", X, PATHS, parts, FINISH)
    for part, a, b in zip(parts, got, want, strict=True):
        assert a.shape == b.shape == (5, part.heads, part.width) and a.dtype == b.dtype == part.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_weights_without_a_part_are_not_read():
    only = {"first": PARAMS["first"], "inner": PARAMS["inner"], "third": jnp.full((6, 2), jnp.nan, jnp.float32)}
    products = []
    project(only, "all", X, PATHS, columns()[1:2], lambda x, parts: products.append(x) or FINISH(x, parts))
    assert [x.shape for x in products] == [(5, 8)]


def test_unchanged_columns_are_not_finished():
    """Nothing to do is no launch."""

    def fail(product, parts):
        raise AssertionError("unchanged columns need no norm_rope")

    (got,) = project(PARAMS, "all", X, PATHS, columns()[:1], fail)
    np.testing.assert_array_equal(got[:, 0], matmul(X, PARAMS["first"]))


def test_moe_still_exports_what_it_did():
    assert moe.matmul is matmul and moe.clamped_moe is moe.moe_v4


# --- the implementation that was named
def kernels_in(fn, *args):
    """Names of the kernels that the program launches."""
    return {line.split("name=")[1].split()[0] for line in str(jax.make_jaxpr(fn)(*args)).split("\n") if "name=" in line}


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_selection_projects_by_the_implementation_that_was_named(implementation):
    specs = deepseek_v32.param_specs(SMALL)["layers"][1]["self_attn"]
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), specs)
    table, pages = scattered_pages(1, 12, 4)
    lens = np.array([12], np.int32)
    meta = build_metadata(lens, lens, table, num_tokens=12, page_size=4)
    index = deepseek_v32.create_caches(SMALL, pages, 4, dtype=jnp.float32)[0][1]
    hidden = jnp.ones((12, SMALL.hidden_size), jnp.float32)
    how = dict(config=SMALL, implementation=implementation)
    for names in (
        kernels_in(lambda x: select_positions(params, x, index, meta, **how), hidden),
        kernels_in(lambda x: index_query(params, x, meta, **how), hidden),
    ):
        assert ("norm_rope" in names) == (implementation == "triton"), names
