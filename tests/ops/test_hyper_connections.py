"""hyper_connections: every implementation against the equations in float64, and what the mixing matrices promise."""

import contextlib
import functools

import deepseek_v4_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cdna_support import require_cdna
from hypothesis import given, settings
from hypothesis import strategies as st
from support import lowering
from support.equivalence import OPTIMIZED, QUICK_COMPILE, Close, Operator, assert_leaves, assert_same_bits
from support.marks import interpreted, slow

from pallas_kernels import cdna
from pallas_kernels import hyper_connections as kernel
from pallas_kernels.plans.hyper_connections import HyperConnectionPlan, hyper_connection_plan
from sparse_mla_jax import reference
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.hyper_connections import doubly_stochastic, join_streams, merge_streams, split_streams
from sparse_mla_jax.ops import hyper_connections as ops

# One worker, which compiles what these tests share.
pytestmark = pytest.mark.xdist_group("hyper_connections")

CONFIG = DeepseekV4Config()
CONSTANTS = {"eps": 1e-6, "norm_eps": 1e-6}


def make(tokens=5, n=4, dim=24, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    outputs = n * (n + 2)
    params = {
        "fn": rng.standard_normal((n * dim, outputs)) * spread / np.sqrt(n * dim),
        "base": rng.standard_normal(outputs) * spread,
        "scale": rng.uniform(0.5, 2.0, 3),
    }
    return {k: v.astype(np.float32) for k, v in params.items()}, rng.standard_normal((tokens, n, dim), np.float32)


def published(params):
    return {"hc_fn": params["fn"].T.astype(float), "hc_base": params["base"], "hc_scale": params["scale"]}


def head_of(params):
    n = {n * (n + 2): n for n in range(1, 9)}[len(params["base"])]
    return {"fn": params["fn"][:, :n], "base": params["base"][:n], "scale": params["scale"][:1]}


def problem(tokens, n, dim, *, parts=0, dtype="float32", spread=1.0, seed=0):
    """Arguments of the operator, the product as it is or in parts."""
    rng = np.random.default_rng(seed)
    columns = n * (n + 2)
    shape = (parts, tokens, columns) if parts else (tokens, columns)
    product = rng.standard_normal(shape) * spread / np.sqrt(max(parts, 1))
    base, scale, norm = rng.standard_normal(columns) * spread, rng.uniform(0.5, 2, 3), rng.standard_normal(dim)
    streams = jnp.asarray(rng.standard_normal((tokens, n, dim)), dtype)
    return streams, *(jnp.asarray(x, jnp.float32) for x in (product, base, scale, norm))


def split_by(streams, product, base, scale, norm, *, iterations=20, implementation=None):
    how = dict(norm=norm, iterations=iterations, implementation=implementation, **CONSTANTS)
    return ops.split(streams, product, base, scale, **how)


def merge_by(streams, product, base, scale, norm, *, implementation=None):
    return ops.merge(streams, product, base, scale, norm=norm, implementation=implementation, **CONSTANTS)


# Arguments of exponentials are below 64 here, so 2**-24 of them is 4e-6 of what the exponentials give.
READ = {dtype: Close(rtol=1e-5 + rounding, atol=1e-5) for dtype, rounding in (("float32", 0), ("bfloat16", 2.0**-8))}
RULES = {"read": READ["float32"], "writes": Close(rtol=1e-5), "mixing": Close(rtol=1e-4, atol=1e-6)}
split_op = Operator(split_by, ("read", "writes", "mixing"), RULES, static=("iterations",), name="split")
merge_op = Operator(merge_by, ("read",), RULES, name="merge")


def split(*arguments, implementation=None, **keywords):
    return split_op(*arguments, implementation=implementation, **keywords)


def merge(*arguments, implementation=None):
    return merge_op(*arguments, implementation=implementation)


@functools.partial(jax.jit, static_argnames="iterations", compiler_options=QUICK_COMPILE)
def exact_split(streams, product, base, scale, norm, iterations):
    how = dict(CONSTANTS, iterations=iterations, dtype=jnp.float64)
    return reference.split_streams(streams, product, base, scale, norm, **how)


def exact(streams, product, base, scale, norm, iterations=20):
    """float64, by the definition."""
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (streams, base, scale, norm)]
        total = jnp.asarray(np.asarray(product, np.float64).reshape(-1, *product.shape[-2:]).sum(0))
        return [np.asarray(x) for x in exact_split(wide[0], total, *wide[1:], iterations)]


def check_types(got, dtype):
    assert got[0].dtype == dtype and got[1].dtype == got[2].dtype == jnp.float32


def equal(got, want):
    assert_same_bits(tuple(map(np.asarray, got)), tuple(map(np.asarray, want)), "streams")


# Hy4's independent hyper-connections: epsilons large enough to be seen.
INDEPENDENT = dict(iterations=None, eps=0.125, norm_eps=0.01, magnitude=1.5, writes_eps=0.25)


def split_independent(streams, product, base, scale, norm, *, implementation=None):
    joined, writes, mixing = ops.split(
        streams, product, base, scale, norm=norm, implementation=implementation, **INDEPENDENT
    )
    assert mixing is None
    return joined, writes


independent = Operator(split_independent, ("read", "writes"), RULES, name="split, no matrix")


# --- the operator
CASES = [
    # tokens, n, D, parts, type, spread, norm
    (5, 4, 24, 0, "float32", 1.0, True),
    (3, 4, 200, 32, "bfloat16", 4.0, True),
    (1, 2, 3, 3, "float32", 4.0, False),
    (3, 3, 7, 1, "bfloat16", 8.0, True),
    (2, 1, 130, 2, "float32", 1.0, True),
    (2, 5, 33, 5, "bfloat16", 1.0, False),
    (2, 8, 16, 0, "float32", 2.0, True),
]


@pytest.mark.parametrize(("tokens", "n", "dim", "parts", "dtype", "spread", "normed"), CASES)
def test_against_float64(tokens, n, dim, parts, dtype, spread, normed, implementation):
    arguments = problem(tokens, n, dim, parts=parts, dtype=dtype, spread=spread)
    arguments = arguments if normed else (*arguments[:-1], None)
    want = exact(*arguments)
    read = {"read": READ[dtype]}
    check_types(split_op.check(implementation, tuple(want), *arguments, rules=read), dtype)
    streams, product, base, scale, norm = arguments
    given = streams, product[..., :n], base[:n], scale[:1], norm
    assert merge_op.check(implementation, want[0], *given, rules=read).dtype == dtype


@pytest.mark.parametrize(("tokens", "n", "dim", "parts", "dtype"), [(3, 4, 24, 2, "float32"), (5, 3, 7, 0, "bfloat16")])
def test_independent_streams_against_the_equations(tokens, n, dim, parts, dtype, implementation):
    """Of Hy4, written in numpy; then the streams are joined without being mixed."""
    streams, product, base, scale, norm = problem(tokens, n, dim, parts=parts, dtype=dtype)
    given = streams, product[..., : 2 * n], base[: 2 * n], scale[:2], norm
    wide, total, *weights = (np.asarray(x.astype(jnp.float32), np.float64) for x in given)
    z = total.reshape(-1, tokens, 2 * n).sum(0) / np.sqrt((wide**2).mean((1, 2)) + 0.01)[:, None]
    reads, writes = (oracle.sigmoid(weights[1][i] * z + weights[0])[:, i * n : i * n + n] for i in range(2))
    want = np.einsum("tn,tnd->td", reads + 0.125, wide)
    want = want / np.sqrt((want**2).mean(1, keepdims=True) + 0.01) * weights[2]
    writes = 1.5 * writes + 0.25
    joined, got = independent.check(implementation, (want, writes), *given, rules={"read": READ[dtype]})
    assert joined.dtype == dtype and got.dtype == jnp.float32
    mixed = join_streams(streams, joined, (got, None))
    exact = wide + writes[:, :, None] * np.asarray(joined.astype(jnp.float32), np.float64)[:, None]
    assert mixed.dtype == dtype
    assert_leaves(mixed.astype(jnp.float32), exact, READ[dtype], "streams")


def test_weights_of_the_output_with_a_matrix(implementation):
    """`magnitude` and `writes_eps` change the weights of the output and nothing else."""
    streams, product, base, scale, norm = problem(2, 4, 24)
    constants = dict(CONSTANTS, norm=norm, iterations=3, implementation=implementation)
    plain = ops.split(streams, product, base, scale, **constants)
    other = ops.split(streams, product, base, scale, magnitude=0.5, writes_eps=0.125, **constants)
    np.testing.assert_allclose(other[1], np.asarray(plain[1]) / 4 + 0.125, rtol=1e-6)
    equal(other[::2], plain[::2])


# Together: each shape is a compilation, of the definition too.
@pytest.mark.parametrize("names", [("reference", "xla"), interpreted(("triton",))], ids="-".join)
@settings(max_examples=8, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 40)),
    st.integers(0, 3),
    st.sampled_from([0.0, 1.0, 8.0]),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_any_shape(names, shape, parts, spread, iterations, seed):
    arguments = problem(*shape, parts=parts, spread=spread, seed=seed)
    want = tuple(exact(*arguments, iterations=iterations))
    for found in split_op.check_all(want, *arguments, implementations=names, iterations=iterations).values():
        check_types(found, "float32")


def test_extreme_weights_stay_finite(implementation):
    streams, product, base, scale, norm = problem(3, 4, 8)
    product = product.at[0].set(1e30).at[1].set(-1e30).at[2, 10].set(1e30)
    _, writes, mixing = split(streams.at[2].set(0), product, base, scale, norm, implementation=implementation)
    for x in (writes, mixing):
        assert np.isfinite(x).all() and (np.asarray(x) >= 0).all()
    # Each column keeps the sum 1, a column of eps alone about half of it.
    assert (np.asarray(mixing).sum(1) <= 1 + 1e-5).all() and (np.asarray(mixing).sum(1) > 0.3).all()


@pytest.mark.interpret
def test_tokens_do_not_see_each_other(implementation):
    arguments = problem(6, 4, 40, parts=2)
    clean = split(*arguments, implementation=implementation)
    equal(split(*arguments, implementation=implementation), clean)
    poisoned = arguments[0].at[1:3].set(jnp.nan), arguments[1].at[:, 1:3].set(jnp.nan), *arguments[2:]
    kept = np.array([0, 3, 4, 5])
    dirty = split(*poisoned, implementation=implementation)
    equal([x[kept] for x in dirty], [x[kept] for x in clean])
    assert all(np.isnan(x[1:3]).all() for x in dirty)


@pytest.mark.parametrize(
    ("arch", "block", "warps"),
    [
        *[("gfx942", 2, 1), ("gfx950", 4, 4), slow("gfx942", 4, 4), slow("gfx950", 2, 1)],
        *[(None, 4, 4), interpreted(None, 2, 1)],
    ],
)
def test_plans_change_no_bit_of_a_token(block, warps, arch):
    arguments, constants = problem(5, 3, 20, parts=2), dict(CONSTANTS, iterations=20)
    # Compiled quickly, XLA:CPU rounds interpreted blocks of other sizes otherwise.
    how = dict(static_argnums=0, compiler_options=OPTIMIZED)
    run = jax.jit(lambda plan, *x: kernel.split(*x, plan=plan, **constants), **how)
    if arch:
        require_cdna("triton")
    with cdna.device(arch) if arch else contextlib.nullcontext():
        found, want = (run(HyperConnectionPlan(b, warps), *arguments) for b in (block, 1))
    equal(found, want)
    split_op.compare("triton", found, tuple(exact(*arguments)))


def test_plans_follow_sizes():
    assert hyper_connection_plan(tokens=64, width=4096, target="gfx942") == HyperConnectionPlan(1, 4)
    assert hyper_connection_plan(tokens=64, width=7168, target="gfx950") == HyperConnectionPlan(1, 8)
    assert hyper_connection_plan(tokens=8192, width=4096, target="nvidia") == HyperConnectionPlan(4, 8)
    assert hyper_connection_plan(tokens=1, width=3, target="nvidia") == HyperConnectionPlan(1, 1)


def test_no_tokens():
    none = problem(0, 4, 8)
    assert [x.shape for x in split(*none)] == [(0, 8), (0, 4), (0, 4, 4)]
    joined, writes, mixing = ops.split(none[0], none[1][:, :8], none[2][:8], none[3][:2], iterations=None)
    assert joined.shape == (0, 8) and writes.shape == (0, 4) and mixing is None
    assert merge(none[0], none[1][:, :4], none[2][:4], none[3][:1], none[4]).shape == (0, 8)


def test_other_values_do_not_retrace(implementation):
    first, second = problem(3, 4, 8), problem(3, 4, 8, seed=1, spread=7.0)
    split_op.check_warm(implementation, first, second)
    heads = [(s, product[:, :4], base[:4], scale[:1], norm) for s, product, base, scale, norm in (first, second)]
    merge_op.check_warm(implementation, *heads)


def test_what_the_kernel_does_not_serve():
    arguments = problem(1, 4, 2**14 + 1)
    with pytest.raises(ValueError, match=r"does not support this case: 4 streams of 16385 values"):
        split(*arguments, implementation="triton")
    assert split(*arguments)[0].shape == (1, 2**14 + 1)
    half = problem(2, 4, 8, dtype="float16")
    with pytest.raises(ValueError, match=r"streams are float16; the kernel reads bfloat16, float32"):
        split(*half, implementation="triton")
    np.testing.assert_allclose(split(*half)[0].astype(jnp.float32), exact(*half)[0], rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"streams": jnp.zeros((2, 32), jnp.float32)},
            r"streams is float32\[2, 32\]; expected floating values \[T, n, D\]",
        ),
        ({"streams": jnp.zeros((2, 4, 8), jnp.int32)}, r"streams is int32\[2, 4, 8\]"),
        (
            {"streams": jnp.zeros((2, 4, 0), jnp.float32)},
            r"streams is float32\[2, 4, 0\]; expected n and D of at least 1",
        ),
        (
            {"streams": jnp.zeros((2, 0, 8), jnp.float32)},
            r"streams is float32\[2, 0, 8\]; expected n and D of at least 1",
        ),
        (
            {"product": jnp.zeros((2, 20), jnp.float32)},
            r"product is float32\[2, 20\]; streams \[2, 4, 8\] need float32\[2, 24\]",
        ),
        ({"product": jnp.zeros((0, 2, 24), jnp.float32)}, r"product is float32\[0, 2, 24\]"),
        ({"product": jnp.zeros((2, 24), jnp.bfloat16)}, r"product is bfloat16"),
        (
            {"base": jnp.zeros(4, jnp.float32)},
            r"base is float32\[4\]; expected floating values \[24\]. .* streams are \[2, 4, 8\]",
        ),
        ({"scale": jnp.zeros(1, jnp.float32)}, r"scale is float32\[1\]"),
        (
            {"norm": jnp.zeros(7, jnp.float32)},
            r"norm is float32\[7\]; expected floating values \[8\]. .* streams are \[2, 4, 8\]",
        ),
        ({"iterations": 0}, r"iterations is 0; .* pass at least 1, or None for no matrix"),
        ({"iterations": None}, r"product is float32\[2, 24\]; streams \[2, 4, 8\] need float32\[2, 8\]"),
        ({"implementation": "cuda"}, r"implementation is 'cuda'; expected None or one of"),
    ],
)
def test_bad_arguments(change, message):
    names = "streams", "product", "base", "scale", "norm"
    with pytest.raises(ValueError, match=message):
        ops.split(**(dict(zip(names, problem(2, 4, 8))) | {"iterations": 20} | change))


@pytest.mark.parametrize("target", lowering.TARGETS, ids=lambda t: t[0])
@pytest.mark.parametrize("tokens", [64, 4096])
def test_lowers_as_one_kernel_beside_the_product(target, tokens):
    shape, n, width = jax.ShapeDtypeStruct, 4, 7168
    params = {"fn": shape((n * width, 24), jnp.float32), "base": shape((24,), jnp.float32)}
    params["scale"] = shape((3,), jnp.float32)
    text = lowering.lower(
        target,
        lambda p, x, w: split_streams(p, x, config=CONFIG, norm=w, implementation="triton"),
        params,
        shape((tokens, n, width), jnp.bfloat16),
        shape((width,), jnp.bfloat16),
    )
    assert text.count(lowering.CUSTOM_CALL) == 1 and text.count("stablehlo.dot_general") == 1


# --- the layer
@pytest.mark.parametrize(
    ("tokens", "n", "dim", "spread"), [(5, 4, 24, 1.0), (1, 2, 3, 4.0), (3, 3, 7, 20.0), (0, 4, 8, 1), (2, 4, 96, 1.0)]
)
def test_equals_the_equations(tokens, n, dim, spread, implementation):
    params, streams = make(tokens, n, dim, spread=spread)
    rng = np.random.default_rng(9)
    out = rng.standard_normal((tokens, dim), np.float32)
    how = {"config": CONFIG, "implementation": implementation}
    layer = jax.jit(functools.partial(split_streams, **how), compiler_options=QUICK_COMPILE)
    joined, weights = layer(params, streams)
    want, post, matrices = oracle.mixing(published(params), "hc", CONFIG, streams.astype(float))
    # Twenty divisions by sums of n float32 each: well below 1e-5.
    limits = Close(rtol=2e-5, atol=2e-5), Close(rtol=2e-5), Close(rtol=1e-4, atol=2e-6)
    assert_leaves((joined, *weights), (want, post, matrices), limits, split_op.label(implementation))
    mixed = join_streams(streams, out, weights)
    np.testing.assert_allclose(mixed, oracle.mixed(streams, out, post, matrices), rtol=1e-4, atol=2e-5)
    norm = rng.standard_normal(dim, np.float32)
    normed, again = layer(params, streams, norm=norm)
    np.testing.assert_allclose(normed, oracle.unit(want, CONFIG.rms_norm_eps) * norm, rtol=2e-4, atol=2e-4)
    equal(again, weights)


def test_mixing_preserves_the_sum_of_streams(implementation):
    params, streams = make(tokens=12)
    _, (_, mixing) = split_streams(params, streams, config=CONFIG, implementation=implementation)
    assert np.all(np.asarray(mixing) > 0)
    # Columns were divided last; each division leaves eps of its sum. Rows have converged after 20 rounds.
    np.testing.assert_allclose(np.asarray(mixing).sum(1), 1.0, atol=5e-6)
    np.testing.assert_allclose(np.asarray(mixing).sum(2), 1.0, atol=1e-4)
    nothing = jnp.zeros((12, 24), jnp.float32), (jnp.zeros((12, 4), jnp.float32), mixing)
    mixed = join_streams(jnp.asarray(streams), *nothing)
    np.testing.assert_allclose(np.asarray(mixed).sum(1), streams.sum(1), atol=2e-3)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_sinkhorn_iterations_are_counted(iterations):
    logits = np.random.default_rng(1).standard_normal((6, 4, 4), np.float32) * 4
    want = oracle.softmax(logits.astype(float), -1) + 1e-6
    want = want / (want.sum(1, keepdims=True) + 1e-6)
    for _ in range(iterations - 1):
        want = want / (want.sum(2, keepdims=True) + 1e-6)
        want = want / (want.sum(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(doubly_stochastic(logits, iterations=iterations, eps=1e-6), want, rtol=2e-5)


def test_extreme_logits_stay_finite():
    logits = np.zeros((3, 4, 4), np.float32)
    logits[0, :, 0], logits[1] = 1e4, -1e4
    logits[2] = np.diag([1e30, -1e30, 0, 5]).astype(np.float32)
    out = np.asarray(doubly_stochastic(logits, iterations=20, eps=1e-6))
    assert np.isfinite(out).all() and (out >= 0).all()
    np.testing.assert_allclose(out[1], 0.25, rtol=1e-5)


def test_head_and_types(implementation):
    params, streams = make()
    head, how = head_of(params), {"config": CONFIG, "implementation": implementation}
    merged = merge_streams(head, streams, **how)
    z = oracle.unit(streams.reshape(5, -1).astype(float)) @ head["fn"]
    want = np.einsum("ln,lnd->ld", oracle.sigmoid(head["scale"] * z + head["base"]) + 1e-6, streams)
    np.testing.assert_allclose(merged, want, rtol=2e-5, atol=2e-5)
    narrow = jnp.asarray(streams, jnp.bfloat16)
    joined, weights = split_streams(params, narrow, **how)
    assert joined.dtype == jnp.bfloat16 and weights[1].dtype == jnp.float32
    assert join_streams(narrow, joined, weights).dtype == jnp.bfloat16
    assert merge_streams(head, narrow, norm=jnp.ones(24, jnp.float32), **how).dtype == jnp.bfloat16


def test_works_inside_other_transformations():
    params, streams = make()
    whole = split_streams(params, streams, config=CONFIG)[0]
    looped = jax.lax.map(lambda x: split_streams(params, x[None], config=CONFIG)[0][0], jnp.asarray(streams))
    np.testing.assert_allclose(whole, looped, rtol=1e-5, atol=1e-6)
    # Kernels, the default on a GPU, have no derivative.
    grads = jax.grad(lambda p: split_streams(p, streams, config=CONFIG, implementation="xla")[0].sum())(params)
    assert all(np.isfinite(x).all() for x in grads.values()) and np.any(grads["fn"])


def test_refuses_a_matrix_of_another_model():
    params, streams = make()
    with pytest.raises(ValueError, match=r"fn has shape \(96, 24\)"):
        split_streams(params, streams[:, :3], config=CONFIG)
