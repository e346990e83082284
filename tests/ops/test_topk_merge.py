"""top_k_merge and top_k_share: every implementation, bit for bit, against a stable sort of all candidates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.equivalence import Operator, Same, assert_leaves
from support.lowering import CUSTOM_CALL, TARGETS, lower
from support.marks import slow
from support.topk import KINDS

from pallas_kernels.plans.topk_merge import TopKMergePlan, topk_merge_plan
from sparse_mla_jax.ops.topk import top_k
from sparse_mla_jax.ops.topk_merge import top_k_merge, top_k_share

ROWS = 40


def merged(positions, scores, k, *, implementation=None):
    return top_k_merge(positions, scores, k, return_scores=True, implementation=implementation)


def share(positions, scores, part, k, *, implementation=None):
    return top_k_share(positions, scores, part, k, implementation=implementation)


merging = Operator(merged, ("positions", "scores"), {"positions": Same(), "scores": Same()}, static=("k",))
sharing = Operator(share, ("positions", "count"), {"positions": Same(), "count": Same()}, static=("k",))


@functools.cache
def problem(parts, width):
    """Candidates [S, R, C] of every kind of row, parts from empty to full; entries that are no candidate are poison."""
    rng = np.random.default_rng([parts, width])
    positions = np.full((parts, ROWS, width), -1, np.int32)
    scores = rng.choice(np.array([np.inf, np.nan, 3e38], np.float32), positions.shape)
    for row, (kind, fill) in enumerate(zip(3 * [*KINDS], np.tile([0.0, 0.5, 1.0, 1.0], 10))):
        # As pages of two positions, so that ties alternate between parts.
        for part in range(parts):
            local = np.arange(width)[: int(np.ceil(fill * width * rng.uniform(0.5, 1)))]
            positions[part, row, : len(local)] = (local // 2 * parts + part) * 2 + local % 2
        values = KINDS[kind](rng, parts * width).astype(np.float32).reshape(parts, width)
        scores[:, row] = np.where(positions[:, row] >= 0, values, scores[:, row])
    if width > 1:
        # What int32 does not hold is no candidate either.
        positions[0, 3, -1] = 2**31 - 1
    return positions, scores


def oracle(positions, scores, k):
    """The k best of each row by a stable sort in float64: (int32 [R, k], float32 [R, k])."""
    rows = positions.shape[1]
    out, values = np.full((rows, k), -1, np.int32), np.full((rows, k), -np.inf, np.float32)
    for row in range(rows):
        where, score = positions[:, row].ravel(), scores[:, row].ravel()
        is_candidate = (where >= 0) & (where < 2**31 - 1)
        where, score = where[is_candidate], score[is_candidate]
        rank = np.where(np.isnan(score), -np.inf, score).astype(np.float64)
        chosen = np.lexsort((where, -rank))[:k]
        chosen = chosen[np.argsort(where[chosen])]
        out[row, : len(chosen)], values[row, : len(chosen)] = where[chosen], rank[chosen]
    return out, values


def oracle_share(positions, best, part):
    """What of `best`[R, k] is among the positions of a part, and how many."""
    own = np.full(positions.shape[1:], -1, np.int32)
    for row, where in enumerate(best):
        found = np.intersect1d(where[where >= 0], positions[part, row]) if 0 <= part < len(positions) else where[:0]
        own[row, : len(found)] = found
    return own, (own >= 0).sum(axis=1).astype(np.int32)


# Parts, candidates of each, k: one of everything, less and more than there are.
SIZES = [(2, 1, 1), (2, 33, 20), (3, 20, 100), (8, 16, 16), slow(1, 5, 3), slow(8, 40, 1)]
sizes = pytest.mark.parametrize(("parts", "width", "k"), SIZES)


@sizes
def test_merge(implementation, parts, width, k):
    positions, scores = problem(parts, width)
    got = merging.check(implementation, oracle(positions, scores, k), positions, scores, k)
    assert got[0].dtype == jnp.int32 and got[1].dtype == jnp.float32


@sizes
def test_share(implementation, parts, width, k):
    positions, scores = problem(parts, width)
    best, _ = oracle(positions, scores, k)
    for part in sorted({0, parts - 1, parts}):
        want = oracle_share(positions, best, part)
        sharing.check(implementation, want, positions, scores, np.int32(part), k)


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_shares_make_up_the_merge(name):
    positions, scores = problem(3, 20)
    best = np.asarray(merging(positions, scores, 30, implementation=name)[0])
    shares = [sharing(positions, scores, np.int32(part), 30, implementation=name) for part in range(3)]
    for row in range(ROWS):
        found = np.concatenate([np.asarray(s[0][row]) for s in shares])
        np.testing.assert_array_equal(np.sort(found[found >= 0]), best[row][best[row] >= 0])
        assert sum(int(s[1][row]) for s in shares) == (best[row] >= 0).sum()


best_of = jax.jit(functools.partial(top_k, k=20, return_scores=True, implementation="xla"))


@pytest.mark.parametrize("kind", ["ties", "equal", "zeros", "NaN and -inf", "infinities", "normal"])
@pytest.mark.parametrize("parts", [2, 3])
def test_is_the_top_k_of_one_device(kind, parts):
    """Columns dealt out in turn, in pages of 4; each part's own top_k is what is merged."""
    rng = np.random.default_rng(0)
    scores = np.stack([KINDS[kind](rng, 96) for _ in range(4)]).astype(np.float32)
    pages = scores.reshape(4, -1, parts, 4)
    where = np.arange(96, dtype=np.int32).reshape(-1, parts, 4)
    local = [best_of(np.ascontiguousarray(pages[:, :, i]).reshape(4, -1)) for i in range(parts)]
    positions = np.stack([where[:, i].ravel()[np.asarray(x)] for i, (x, _) in enumerate(local)])
    values = np.stack([v for _, v in local])
    got = merging(positions, values, 20, implementation="xla")
    assert_leaves(got, best_of(scores), Same())


# --- the kernel
PLANS = [TopKMergePlan(block=16, num_warps=1, wave=8), TopKMergePlan(block=32, num_warps=2, wave=16)]


@pytest.mark.parametrize("plan", [PLANS[0], slow(PLANS[1])], ids=["several arrays", "one array"])
def test_every_plan_gives_the_same_bits(plan):
    positions, scores = problem(2, 33)
    best, values = oracle(positions, scores, 20)
    got = jax.jit(functools.partial(top_k_merge, k=20, return_scores=True, plan=plan))(positions, scores)
    assert_leaves(got, (best, values), Same())
    got = jax.jit(functools.partial(top_k_share, k=20, plan=plan))(positions, scores, np.int32(1))
    assert_leaves(got, oracle_share(positions, best, 1), Same())


@pytest.mark.parametrize("target", ["gpu", "gfx942"])
def test_plans_are_consistent(target):
    for parts in (1, 2, 3, 8, 64):
        for columns in (1, 50, 128, 1000, 2048, 2049, 5000):
            plan = topk_merge_plan(parts=parts, columns=columns, target=target)
            assert plan.num_warps <= 16 and plan.wave == (32 if target == "gpu" else 64)
            assert plan.lanes <= plan.block <= 4 * plan.lanes


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[0])
def test_one_launch(target):
    shape = jax.ShapeDtypeStruct
    arrays = shape((8, 5, 2048 - 1), jnp.int32), shape((8, 5, 2048 - 1), jnp.float32), shape((), jnp.int32)
    text = lower(target, functools.partial(top_k_share, k=2048, implementation="triton"), *arrays)
    assert text.count(CUSTOM_CALL) == 1


def test_more_candidates_than_registers_hold():
    shape = jax.ShapeDtypeStruct
    arrays = shape((17, 1, 2048), jnp.int32), shape((17, 1, 2048), jnp.float32)
    with pytest.raises(ValueError, match="'triton' of top_k_merge does not support .* 34816 candidates of a row"):
        jax.eval_shape(functools.partial(top_k_merge, implementation="triton"), *arrays)


# --- shapes, types, meshes
def test_empty():
    nothing = jnp.zeros((2, 3, 0), jnp.int32)
    positions, scores = top_k_merge(nothing, jnp.zeros((2, 3, 0), jnp.float32), 2, return_scores=True)
    assert (positions == -1).all() and jnp.isneginf(scores).all() and positions.shape == (3, 2)
    out, count = top_k_share(jnp.zeros((2, 0, 4), jnp.int32), jnp.zeros((2, 0, 4), jnp.float32), 0)
    assert out.shape == (0, 4) and count.shape == (0,)
    out, count = top_k_share(nothing, jnp.zeros((2, 3, 0), jnp.float32), 0, 2)
    assert out.shape == (3, 0) and (count == 0).all()


@pytest.mark.parametrize("name", ["reference", "xla"])
def test_types_with_64_bits(name):
    positions, scores = problem(2, 33)
    want = oracle(positions, scores, 33)
    with jax.enable_x64(True):
        got = merging(positions.astype(np.int64), scores, 33, implementation=name)
        assert got[0].dtype == jnp.int32 and got[1].dtype == jnp.float32
        own, count = sharing(positions.astype(np.int64), scores, np.int64(1), 33, implementation=name)
        assert own.dtype == count.dtype == jnp.int32
    assert_leaves(got, want, Same())
    assert_leaves((own, count), oracle_share(positions, want[0], 1), Same())


@pytest.mark.parametrize("name", ["xla", "triton", pytest.param("reference", marks=pytest.mark.slow)])
def test_shard_map(name):
    """Each device takes the share of its own part, and all the same merge."""
    positions, scores = problem(2, 33)
    best, _ = oracle(positions, scores, 20)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def step(positions, scores):
        parts = [jax.lax.all_gather(x[0], "x", to="invarying") for x in (positions, scores)]
        own, count = top_k_share(*parts, jax.lax.axis_index("x"), 20, implementation=name)
        return own[None], count[None], top_k_merge(*parts, 20, implementation=name)

    run = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=(P("x"), P("x"), P()))
    own, count, everything = jax.jit(run)(positions, scores)
    np.testing.assert_array_equal(everything, best)
    for part in range(2):
        assert_leaves((own[part], count[part]), oracle_share(positions, best, part), Same())


@pytest.mark.parametrize("name", ["xla", pytest.param("triton", marks=pytest.mark.slow)])
def test_explicit_mesh(name):
    """In a mesh with Explicit axes every device computes the whole result."""
    positions, scores = problem(2, 33)
    with jax.set_mesh(jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])):
        got = jax.jit(functools.partial(top_k_share, k=20, implementation=name))(positions, scores, np.int32(1))
    assert_leaves(got, oracle_share(positions, oracle(positions, scores, 20)[0], 1), Same())


def test_vmap():
    positions, scores = problem(3, 20)
    split = [np.moveaxis(x.reshape(3, 2, ROWS // 2, 20), 1, 0) for x in (positions, scores)]
    got = jax.jit(jax.vmap(functools.partial(top_k_merge, k=30, implementation="triton")))(*split)
    np.testing.assert_array_equal(got.reshape(ROWS, 30), oracle(positions, scores, 30)[0])


INTS, FLOATS = jnp.zeros((2, 3, 4), jnp.int32), jnp.zeros((2, 3, 4), jnp.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k_merge(INTS[0], FLOATS), r"positions is int32\[3, 4\]; expected integers \[S, R, C\]"),
        (lambda: top_k_merge(FLOATS, FLOATS), r"positions is float32\[2, 3, 4\]; expected integers"),
        (lambda: top_k_merge(INTS, FLOATS[:1]), r"scores is float32\[1, 3, 4\]; expected .* \[2, 3, 4\]"),
        (lambda: top_k_merge(INTS, INTS), r"scores is int32\[2, 3, 4\]; expected float32 or bfloat16"),
        (lambda: top_k_merge(INTS, FLOATS, 0), "k is 0; expected an integer from 1"),
        (lambda: top_k_share(INTS, FLOATS, INTS[0, 0]), r"part is int32\[4\]; expected integers \[\]"),
        (lambda: top_k_share(INTS, FLOATS, 0, implementation="cuda"), "implementation is 'cuda'"),
        (lambda: top_k_share(INTS, FLOATS, 0, plan={}), "plan is dict; expected None or a .*TopKMergePlan"),
        (lambda: top_k_merge(INTS, FLOATS, plan=PLANS[0], implementation="xla"), "plan is a plan of the kernel"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
