"""The harness that compares implementations: what is wrong is named, with its place and its size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import Close, Norm, Operator, Same, assert_leaves, assert_same_bits

from sparse_mla_jax.ops import topk

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def double(x, *, offset=0, wrong=None, implementation):
    """Two results; the implementation named by `wrong` is off by 0.5 in one value of the second."""
    sums = x.sum(axis=1)
    return 2 * x, sums.at[1].add(0.5) if implementation == wrong else sums + offset


RULES = {"twice": Same(), "sums": Close(rtol=1e-6)}
operator = Operator(double, ("twice", "sums"), RULES, static=("offset", "wrong"))
WANT = 2 * X.astype(np.float64), X.sum(axis=1)


def test_equal_results_pass():
    found = operator.check_all(WANT, jnp.asarray(X))
    assert set(found) == {"reference", "xla", "triton"}
    assert_same_bits(found["xla"], found["reference"])


@pytest.mark.parametrize("wrong", ["reference", "xla", "triton"])
def test_a_wrong_leaf_is_named_with_its_error(wrong):
    with pytest.raises(AssertionError) as failure:
        operator.check_all(WANT, jnp.asarray(X), wrong=wrong)
    message = str(failure.value)
    assert f"double[{wrong}]" in message and "'sums'" in message
    assert "1 of 3 entries differ; largest error 0.5 at [1]: 22.5 where 22.0 is wanted (rtol 1e-06, atol 0)" in message


def test_a_broken_operator_is_named(monkeypatch):
    """top_k whose XLA body forgets where rows start."""
    real = topk._xla
    monkeypatch.setattr(topk, "_xla", lambda scores, k, starts, lengths: real(scores, k, 0 * starts, lengths))

    def choose(scores, starts, lengths, *, implementation):
        return topk.top_k(scores, 3, lengths, row_starts=starts, implementation=implementation)

    select = Operator(choose, ("local",), {"local": Same()}, name="top_k")
    scores = np.array([[9, 1, 8, 3, 2, 7]], np.float32)
    given, want = (scores, np.array([1]), np.array([5])), np.array([[1, 2, 4]])
    select.check("reference", want, *given)
    with pytest.raises(
        AssertionError, match=r"top_k\[xla\]: .*'local': 2 of 3 entries differ; largest error 1 at \[0, 0\]"
    ):
        select.check("xla", want, *given)


def test_shapes_and_types_are_those_of_the_reference():
    def narrow(x, *, implementation):
        return x.astype(jnp.bfloat16) if implementation == "xla" else x[:, : 3 if implementation == "triton" else 4]

    other = Operator(narrow, ("x",), {"x": Same()})
    other.check("reference", X, X)
    with pytest.raises(AssertionError, match=r"narrow\[xla\] and the reference: .*bfloat16 != float32"):
        other.check("xla", X, X)
    with pytest.raises(AssertionError, match=r"narrow\[triton\]: .*shape"):
        other.check("triton", X, X)


def test_rules():
    nan, inf = np.nan, np.inf
    assert_leaves(np.array([nan, inf, -inf]), np.array([nan, inf, -inf]), Close())
    assert_leaves(np.array([nan, 0.0]), np.array([nan, -0.0]), Same())
    for got in ([nan, 1], [inf, 1], [-inf, 1], [2, 1]):
        for rule in (Close(rtol=0.1), Same(), Norm(0.1)):
            with pytest.raises(AssertionError, match=r"of 2 entries differ"):
                assert_leaves(np.array(got), np.array([1.0, 1.0]), rule)
    # Close counts every entry; a norm the whole.
    assert_leaves(np.array([1.0, 0.1]), np.array([1.0, 0.0]), Norm(0.11))
    assert_leaves(np.array([1.0, 5.0]), np.array([1.0, 4.0]), Close(atol=np.array([0.0, 1.0])))
    with pytest.raises(AssertionError, match=r"1 of 2 .* at \[0\]: 2.0 where 1.0"):
        assert_leaves(np.array([2.0, 5.0]), np.array([1.0, 4.0]), Close(atol=np.array([0.0, 1.0])))
    with pytest.raises(AssertionError):
        assert_leaves({"a": X}, {"b": X}, Same())


def test_bits_tell_zeros_and_nan_apart():
    numbers = np.array([0x7FC00000, 0x80000000], np.uint32).view(np.float32)
    assert_same_bits({"x": numbers}, {"x": numbers.copy()})
    for other in ([0x7FC00001, 0x80000000], [0x7FC00000, 0]):
        with pytest.raises(AssertionError, match=r"leaves 'x': 1 of 2 entries differ"):
            assert_same_bits({"x": numbers}, {"x": np.array(other, np.uint32).view(np.float32)})
    with pytest.raises(AssertionError, match="float32"):
        assert_same_bits(numbers, numbers.view(np.uint32))


def test_a_second_trace_is_refused():
    """A call with known shapes runs the program that is there; a value that jit can not see through is an error."""
    operator.check_warm("xla", (jnp.asarray(X),), (jnp.asarray(X + 1),))
    with pytest.raises(AssertionError, match="different shapes or types"):
        operator.check_warm("xla", (jnp.asarray(X),), (jnp.asarray(X[:2]),))
    traces = []

    def forgetful(x, *, implementation):
        traces.append(implementation)
        return x + len(traces)

    other = Operator(forgetful, ("x",), {"x": Same()})
    for _ in range(3):
        other(X, implementation="xla")
    assert traces == ["xla"]
    program, arrays = other._program("xla", (X,), {})
    program.clear_cache()
    with pytest.raises(AssertionError, match="traced > 1 times"):
        program(arrays)


def test_programs_survive_cleared_caches():
    operator(X, implementation="xla")
    jax.clear_caches()
    np.testing.assert_array_equal(operator(X, implementation="xla")[0], 2 * X)


def test_cleared_caches_are_no_second_trace():
    """Two operators: what jax forgot, each of them compiles again, whichever of them is called first."""

    def negate(x, *, implementation):
        return -x

    others = [Operator(negate, ("x",), {"x": Same()}) for _ in range(2)]
    for _ in range(2):
        for other in others:
            other.check("xla", -X, X)
        jax.clear_caches()
