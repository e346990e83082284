"""output_projection: every implementation against a float64 product of what was turned back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from deepseek_v4_oracle import turn_last
from hypothesis import given, settings
from hypothesis import strategies as st
from support import lowering
from support.equivalence import Close, Operator, Same, assert_leaves
from support.marks import interpreted, rarely

from pallas_kernels import cdna
from pallas_kernels import output_projection as kernel
from pallas_kernels.cdna.interpreter.assembly import parse
from pallas_kernels.plans.output_projection import ProjectionPlan, projection_plan
from sparse_mla_jax.layers.compressed_attention import grouped_output
from sparse_mla_jax.ops.output_projection import rotated_projection


def problem(tokens, heads, width, groups, rotated, columns, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    inner = heads // groups * width
    return (
        jnp.asarray(rng.standard_normal((tokens, heads, width)), dtype),
        jnp.asarray(rng.standard_normal((groups, inner, columns)) / np.sqrt(inner), dtype),
        jnp.asarray(rng.integers(0, 163840, tokens), jnp.int32),
        jnp.asarray(1e4 ** (-np.arange(rotated // 2) / max(rotated // 2, 1)), jnp.float32),
    )


kernel_or_body = Operator(rotated_projection, ("projected",), {"projected": Same()})
project = functools.partial(kernel_or_body, implementation=None)


def expected(out, weight, positions, frequencies):
    """The product in float64 and, entry by entry, how far the roundings of turned values and of it can move it."""
    # What is turned by is a float32 angle by contract.
    angles = np.asarray(positions, np.float32)[:, None] * np.asarray(frequencies)
    wide, matrix = np.asarray(out, np.float64), np.asarray(weight, np.float64)
    turned = turn_last(wide, -angles.astype(np.float64)[:, None, :]) if angles.shape[1] else wide
    # Half a unit in the last place; of float32 also what cosines and sums are off by.
    unit = 2.0**-8 if out.dtype == jnp.bfloat16 else 2.0**-24
    moved = unit * np.abs(turned)
    moved[..., : out.shape[2] - 2 * angles.shape[1]] = 0
    rows, moved, size = (x.reshape(len(out), *matrix.shape[:2]) for x in (turned, moved, np.abs(turned)))
    want, moved, size = (
        np.einsum("tgi,gio->tgo", x, w) for x, w in zip((rows, moved, size), (matrix, np.abs(matrix), np.abs(matrix)))
    )
    return want, 1.01 * (unit * np.abs(want) + moved) + 5e-7 * size


def check(got, *arguments):
    assert got.dtype == arguments[0].dtype
    want, allowed = expected(*arguments)
    assert_leaves(got, want, Close(atol=allowed), "projected")


def verify(implementation, *arguments):
    """Runs one implementation and compares it with the product in float64."""
    want, allowed = expected(*arguments)
    got = kernel_or_body.check(implementation, want, *arguments, rules={"projected": Close(atol=allowed)})
    assert got.dtype == arguments[0].dtype
    return got


CASES = [
    (5, 6, 24, 3, 8, 10),  # rope a third of the head, narrow heads
    (17, 4, 48, 2, 32, 33),  # as much rope as not, columns and tokens over a block
    (3, 3, 96, 3, 6, 130),  # one head a group, values before the rope that no step divides
    (2, 2, 512, 1, 64, 64),  # published widths
    (1, 2, 8, 1, 8, 16),  # all of the head
]


# Types in turn over the sizes; both of the widths that are published.
EVERY = [(sizes, dtype) for dtype in ("bfloat16", "float32") for sizes in CASES]
OFTEN = [e for n, e in enumerate(EVERY) if n % 2 == 0 or e[0][2] == 512]


@pytest.mark.interpret
@pytest.mark.parametrize(("sizes", "dtype"), rarely(EVERY, OFTEN))
def test_against_float64(sizes, dtype, implementation):
    got = verify(implementation, *problem(*sizes, dtype=dtype))
    assert got.shape == (sizes[0], sizes[3], sizes[5])


@pytest.mark.parametrize("implementation", ["reference", "xla", interpreted("triton")])
@settings(max_examples=5, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 20), st.integers(1, 9), st.integers(1, 20)),
    st.sampled_from(["bfloat16", "float32"]),
    st.integers(0, 99),
)
def test_any_shape(implementation, counts, widths, dtype, seed):
    (tokens, groups, heads), (kept, pairs, columns) = counts, widths
    sizes = tokens, groups * heads, kept + 2 * pairs, groups, 2 * pairs, columns
    verify(implementation, *problem(*sizes, dtype=dtype, seed=seed))


def test_tokens_do_not_see_each_other(implementation):
    arguments = problem(6, 4, 24, 2, 8, 20, dtype="bfloat16")
    clean = np.asarray(kernel_or_body(*arguments, implementation=implementation))
    np.testing.assert_array_equal(clean, kernel_or_body(*arguments, implementation=implementation))
    out, weight, positions, frequencies = arguments
    poisoned = out.at[1:3].set(jnp.nan), weight, positions.at[2].set(-(2**31)), frequencies
    dirty, kept = np.asarray(kernel_or_body(*poisoned, implementation=implementation)), np.array([0, 3, 4, 5])
    np.testing.assert_array_equal(dirty[kept], clean[kept])
    assert np.isnan(dirty[1:3].astype(np.float32)).all()


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_plans(arch):
    """Tiles of other sizes than the heuristic's: several of them, masked steps, more waves."""
    require_cdna("triton")
    out, weight, positions, frequencies = problem(35, 4, 56, 2, 8, 50, dtype="bfloat16")
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    for plan in (ProjectionPlan(16, 32, 32, 2, 1), ProjectionPlan(32, 16, 16, 4, 2), ProjectionPlan(32, 64, 64, 4, 2)):
        run = jax.jit(functools.partial(kernel.rotated_projection, plan=plan))
        with cdna.device(arch):
            check(run(out, weight, jnp.cos(angles), jnp.sin(angles)), out, weight, positions, frequencies)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_loads_are_wide(arch):
    """Where tiles fill the columns, everything is read 16 bytes at a time."""
    require_cdna("triton")
    out, weight, positions, frequencies = problem(16, 2, 128, 1, 64, 64, dtype="bfloat16")
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    with cdna.device(arch) as device:
        jax.block_until_ready(jax.jit(kernel.rotated_projection)(out, weight, jnp.cos(angles), jnp.sin(angles)))
    loads = {i.opcode for i in parse(device.launches[0].kernel.assembly).instructions if "_load_" in i.opcode}
    vectors = {o for o in loads if not o.startswith("s_")}
    assert vectors and all(o.endswith("_dwordx4") for o in vectors), vectors


def test_plans_follow_sizes():
    flash = dict(groups=8, columns=1024, kept=448)
    assert projection_plan(tokens=64, **flash, target="nvidia") == ProjectionPlan(64, 64, 64, num_stages=6)
    assert projection_plan(tokens=1, **flash, target="nvidia") == ProjectionPlan(16, 64, 64, num_stages=6)
    assert projection_plan(tokens=4096, **flash, target="nvidia") == ProjectionPlan(128, 256, 64, 8, 3)
    assert projection_plan(tokens=1024, groups=1, columns=1024, kept=448, target="nvidia") == ProjectionPlan(
        64, 128, 64, num_stages=4
    )
    assert projection_plan(tokens=2, groups=1, columns=10, kept=90, target="nvidia") == ProjectionPlan(
        16, 16, 32, num_stages=6
    )
    for target in ("gfx942", "gfx950", "cpu"):
        assert projection_plan(tokens=1, **flash, target=target) == ProjectionPlan(16, 32, 64, num_warps=2)
        assert projection_plan(tokens=64, **flash, target=target) == ProjectionPlan(64, 32, 64)
        assert projection_plan(tokens=4096, **flash, target=target) == ProjectionPlan(64, 128, 64)


@given(st.integers(1, 20000), st.integers(1, 16), st.integers(1, 2048), st.integers(0, 1024), st.sampled_from([2, 4]))
def test_plans_fit(tokens, groups, columns, kept, itemsize):
    """What programs keep on its way fits shared memory: 96 KiB on NVIDIA GPUs (144 for many tokens), 64 on CDNA."""
    for target, bytes_ in (("gpu", 96 << 10), ("gfx942", 64 << 10), ("gfx950", 64 << 10)):
        plan = projection_plan(
            tokens=tokens, groups=groups, columns=columns, kept=kept, itemsize=itemsize, target=target
        )
        # Triton keeps a stage less in flight on CDNA.
        held = plan.num_stages - (target != "gpu")
        if plan.columns == 256:
            assert target == "gpu" and tokens >= 128
            bytes_ = 144 << 10
        assert held * (plan.tokens + plan.columns) * plan.step * itemsize <= bytes_
        assert plan.num_stages >= 2 and (target == "gpu" or plan.num_warps <= plan.tokens * plan.columns // 256)


def test_layer_equals_turning_and_two_products(implementation):
    out, weight, positions, frequencies = problem(3, 6, 24, 3, 8, 10)
    second = np.random.default_rng(1).standard_normal((30, 40), np.float32)
    with jax.default_matmul_precision("highest"):
        got = grouped_output(
            {"o_a_proj": weight, "o_b_proj": second}, out, positions, frequencies, implementation=implementation
        )
    angles = np.asarray(positions.astype(jnp.float32)[:, None] * frequencies, np.float64)
    turned = turn_last(np.asarray(out, np.float64), -angles[:, None, :]).reshape(3, 3, -1)
    want = np.einsum("tgi,gio->tgo", turned, np.asarray(weight, np.float64)).reshape(3, -1) @ second
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_to_do_and_nothing_to_turn():
    assert project(*problem(0, 4, 8, 2, 4, 5)).shape == (0, 2, 5)
    arguments = problem(3, 4, 8, 2, 0, 5)
    check(project(*arguments), *arguments)
    with pytest.raises(ValueError, match=r"does not support this case: no values are rotated"):
        kernel_or_body(*arguments, implementation="triton")


def test_types_that_differ():
    out, weight, *where = problem(3, 4, 8, 2, 4, 5, dtype="bfloat16")
    check(project(out, weight.astype(jnp.float32), *where), out, weight, *where)
    with pytest.raises(ValueError, match=r"out is bfloat16, weight float32"):
        kernel_or_body(out, weight.astype(jnp.float32), *where, implementation="triton")


def test_other_values_do_not_retrace(implementation):
    kernel_or_body.check_warm(implementation, *(problem(3, 4, 8, 2, 4, 5, seed=seed) for seed in (0, 1)))


def test_gradients_of_the_xla_body():
    out, weight, *where = problem(3, 4, 8, 2, 4, 5)
    grads = jax.grad(lambda *x: rotated_projection(*x, *where, implementation="xla").sum(), argnums=(0, 1))(out, weight)
    assert all(np.isfinite(x).all() and np.any(x) for x in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": jnp.zeros((3, 32), jnp.float32)}, r"out is float32\[3, 32\]; expected floating values \[T, H, d\]"),
        ({"out": jnp.zeros((3, 4, 8), jnp.int32)}, r"out is int32"),
        (
            {"weight": jnp.zeros((16, 5), jnp.float32)},
            r"weight is float32\[16, 5\]; expected floating values \[g, H // g \* d, O\]",
        ),
        (
            {"weight": jnp.zeros((3, 16, 5), jnp.float32)},
            r"weight has shape \[3, 16, 5\]; 4 heads of 8 values in 3 groups",
        ),
        ({"weight": jnp.zeros((2, 15, 5), jnp.float32)}, r"need \[2, 4 // 2 \* 8, O\]"),
        ({"positions": jnp.zeros(4, jnp.int32)}, r"positions is int32\[4\]; expected integers \[3\]"),
        ({"positions": jnp.zeros(3, jnp.float32)}, r"positions is float32"),
        ({"frequencies": jnp.zeros(5, jnp.float32)}, r"frequencies has shape \[5\]; expected \[r / 2\], r at most 8"),
        ({"implementation": "cuda"}, r"implementation is 'cuda'; expected None or one of"),
    ],
)
def test_bad_arguments(change, message):
    names = "out", "weight", "positions", "frequencies"
    with pytest.raises(ValueError, match=message):
        rotated_projection(**(dict(zip(names, problem(3, 4, 8, 2, 4, 5))) | change))


@pytest.mark.parametrize("target", lowering.TARGETS, ids=lambda t: t[0])
@pytest.mark.parametrize(("tokens", "heads", "groups"), [(64, 64, 8), (4096, 128, 16)])
def test_lowers_as_one_kernel(target, tokens, heads, groups):
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((tokens, heads, 512), jnp.bfloat16),
        shape((groups, heads // groups * 512, 1024), jnp.bfloat16),
        shape((tokens,), jnp.int32),
        shape((32,), jnp.float32),
    )
    text = lowering.lower(target, functools.partial(rotated_projection, implementation="triton"), *arguments)
    assert text.count(lowering.CUSTOM_CALL) == 1 and "stablehlo.dot_general" not in text
