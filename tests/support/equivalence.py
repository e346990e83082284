"""Equivalence of an operator's implementations, verified with chex.

An `Operator` is a function with an `implementation` argument, the names of its results, and a rule per result. `check`
runs one implementation against wanted results, `check_all` several. What fails is named: operator, implementation,
leaf, the largest error, its place, and both values. Every call also verifies that results have the shapes and types of
the reference, and (`chex.assert_max_traces`) that a call with known shapes does not trace the operator again.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels._call import executor

# For kernels in interpret mode and for the reference, also with `--optimize`: tests ask what they compute, not how
# XLA:CPU optimises it.
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# For the few tests that ask for bits which XLA:CPU gives only where it optimises, in runs without `--optimize` too.
OPTIMIZED = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}


# --- rules
@dataclasses.dataclass(frozen=True)
class Close:
    """Entry by entry: |got - want| <= atol + rtol |want|; infinities and NaN are equal to themselves alone."""

    rtol: float = 0.0
    atol: Any = 0.0

    def faults(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Where entries differ by more, bool[...]."""
        return ~np.isclose(got, want, rtol=self.rtol, atol=self.atol, equal_nan=True)

    def __str__(self):
        return f"rtol {self.rtol:g}, atol {np.max(self.atol, initial=0):g}"


@dataclasses.dataclass(frozen=True)
class Norm:
    """The norm of the error is at most `bound` times that of what is wanted; everything is finite."""

    bound: float

    def faults(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """True everywhere where the norm of the error is too large, else where a value is not finite."""
        chex.assert_tree_all_finite(want)
        finite = np.isfinite(got)
        error = np.linalg.norm(np.where(finite, got, 0) - want)
        return ~finite | (error > self.bound * np.linalg.norm(want))

    def __str__(self):
        return f"{self.bound:g} of the norm"


@dataclasses.dataclass(frozen=True)
class Same:
    """The same numbers, or NaN in both."""

    def faults(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Where entries differ at all."""
        return ~((got == want) | ((got != got) & (want != want)))

    def __str__(self):
        return "equality"


Rule = Close | Norm | Same


def wide(x: Any) -> np.ndarray:
    """Values as float64, integers as they are."""
    x = np.asarray(x)
    return x if x.dtype == bool or np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)


def describe(got: np.ndarray, want: np.ndarray, faults: np.ndarray) -> str:
    """How many entries are at fault; the worst of them, by its index."""
    with np.errstate(all="ignore"):
        error = np.where(faults, np.abs(wide(got).astype(np.float64) - wide(want)), -1)
    error = np.where(np.isnan(error), np.inf, error)
    worst = np.unravel_index(np.argmax(error), error.shape)
    where = f" at [{', '.join(map(str, worst))}]" if worst else ""
    return (
        f"{int(faults.sum())} of {faults.size} entries differ; largest error {error[worst]:.3g}{where}:"
        f" {got[worst]} where {want[worst]} is wanted"
    )


def assert_leaves(got: Any, want: Any, rules: Any, label: str = "results"):
    """Compares pytrees of one structure, leaf by leaf, by the rules of an equal tree (or one rule for all).

    Raises:
      AssertionError: names the label, the leaf, the rule, and the largest error with its place.
    """
    if isinstance(rules, Rule):
        rules = jax.tree.map(lambda _: rules, want)
    # chex compares the leaves in this order and asks for words about the one that it has just compared.
    left = iter(jax.tree.leaves(rules, is_leaf=lambda x: isinstance(x, Rule)))
    found = {}

    def equal(a, b):
        found["rule"] = next(left)
        found["faults"] = found["rule"].faults(wide(a), wide(b))
        return not found["faults"].any()

    def words(a, b):
        return f"{describe(np.asarray(a), np.asarray(b), found['faults'])} ({found['rule']})"

    try:
        chex.assert_trees_all_equal_shapes(got, want)
        chex.assert_trees_all_equal_comparator(equal, words, got, want)
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from None


def bits(tree: Any) -> Any:
    """Every leaf as the unsigned integers of its bytes, [..., itemsize] bytes wide."""

    def view(x):
        x = np.ascontiguousarray(x)
        return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])

    return jax.tree.map(view, tree)


def assert_same_bits(got: Any, want: Any, label: str = "results"):
    """Two trees of equal structure, shapes and types hold the same bytes, NaN and -0 included."""
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    except AssertionError as error:
        raise AssertionError(f"{label}: {error}") from None
    assert_leaves(bits(got), bits(want), Same(), label)


# --- operators
@jax.jit
def _known(x):
    """Has a trace for as long as nobody calls `jax.clear_caches`."""
    return x


_generations = itertools.count(1)
_generation = [0]


def generation() -> int:
    """Another number after each `jax.clear_caches`, for every operator that keeps programs."""
    if not _known._cache_size():
        _known(0)
        _generation[0] = next(_generations)
    return _generation[0]


@functools.cache
def _interpret_once():
    """Pallas adds a context to jit's keys when it first interprets a kernel: whatever was traced before is again."""

    def copy(source, target):
        target[...] = source[...]

    x = np.zeros(1, np.float32)
    jax.jit(pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True))(x)


_serial = itertools.count()


def counted(function: Callable, name: str) -> Callable:
    """`function`, which may be traced once: a name of its own is what chex counts by."""

    def call(arrays):
        return function(arrays)

    call.__name__ = f"{name}, call {next(_serial)}"
    return chex.assert_max_traces(call, n=1)


class Operator:
    """A function with an `implementation` argument, jitted once per shape; see the module."""

    def __init__(self, function: Callable, results: tuple[str, ...], rules: Mapping[str, Rule], static=(), name=None):
        """Names `results` (a tuple of several, or one) and how each is compared; `static` arguments are no arrays."""
        self.function, self.results, self.rules = function, results, dict(rules)
        self.static, self.name = frozenset(static), name or function.__name__
        self.signature = inspect.signature(function)
        self._compiled: dict[Any, Callable] = {}
        self._generation = 0
        self._expected: dict[Any, Any] = {}

    def __call__(self, *args, implementation, **keywords):
        """The results, from a program that the first call with these shapes compiles and later ones share."""
        compiled, arrays = self._program(implementation, args, keywords)
        return compiled(arrays)

    def _split(self, implementation, args, keywords) -> tuple[dict[str, Any], dict[str, Any]]:
        """Static arguments and arrays, all by name."""
        bound = self.signature.bind(*args, implementation=implementation, **keywords).arguments
        given = {k: v for k, v in bound.items() if k != "keywords"} | bound.get("keywords", {})
        fixed = {k: v for k, v in given.items() if k in self.static or k == "implementation"}
        return fixed, {k: v for k, v in given.items() if k not in fixed}

    def _key(self, fixed, arrays) -> tuple:
        """What programs are shared by: static arguments, shapes, types, and the modes that jit traces anew for."""
        leaves, tree = jax.tree.flatten(arrays)
        shapes = tuple((np.shape(x), getattr(x, "dtype", type(x)), getattr(x, "weak_type", False)) for x in leaves)
        modes = executor.value, jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
        return tuple(sorted(fixed.items(), key=lambda item: item[0])), tree, shapes, modes

    def _program(self, implementation, args, keywords) -> tuple[Any, dict[str, Any]]:
        """The jitted program for arguments of these shapes, and its arrays."""
        fixed, arrays = self._split(implementation, args, keywords)
        key = self._key(fixed, arrays)
        _interpret_once()
        if self._generation != generation():
            self._compiled.clear()
            self._generation = generation()
        if key not in self._compiled:
            quick = implementation in ("triton", "reference") and jax.default_backend() == "cpu"
            options = QUICK_COMPILE if quick else None
            named = counted(lambda arrays: self.function(**fixed, **arrays), f"{self.name}[{implementation}]")
            self._compiled[key] = jax.jit(named, compiler_options=options)
        return self._compiled[key], arrays

    def named(self, results: Any) -> dict[str, Any]:
        """Results by name."""
        return dict(zip(self.results, results if len(self.results) > 1 else (results,), strict=True))

    def label(self, implementation) -> str:
        """Operator and implementation, for messages."""
        on = f" on {executor.value.arch}" if executor.value is not None and implementation == "triton" else ""
        return f"{self.name}[{implementation}{on}]"

    def check(self, implementation, want: Any, *args, rules: Mapping[str, Rule] | None = None, **keywords):
        """Runs one implementation, compares it with `want` (as the results are, or by name) and gives its results."""
        got = self(*args, implementation=implementation, **keywords)
        self.compare(implementation, got, want, rules)
        fixed, arrays = self._split("reference", args, keywords)
        key = self._key(fixed, arrays)
        if key not in self._expected:
            self._expected[key] = jax.eval_shape(functools.partial(self.function, **fixed), **arrays)
        try:
            chex.assert_trees_all_equal_shapes_and_dtypes(self.named(got), self.named(self._expected[key]))
        except AssertionError as error:
            raise AssertionError(f"{self.label(implementation)} and the reference: {error}") from None
        return got

    def compare(self, implementation, got: Any, want: Any, rules: Mapping[str, Rule] | None = None):
        """Compares results with what is wanted of them, by the operator's rules or by others."""
        want = want if isinstance(want, dict) else self.named(want)
        got = {name: value for name, value in self.named(got).items() if name in want}
        chosen = self.rules | dict(rules or {})
        assert_leaves(got, want, {name: chosen[name] for name in got}, self.label(implementation))

    def check_all(self, want: Any, *args, implementations=("reference", "xla", "triton"), rules=None, **keywords):
        """`check` of each; all results by implementation. Without `want`, the reference's results are wanted."""
        found = {}
        for name in implementations:
            if want is None:
                want = found[name] = self(*args, implementation=name, **keywords)
                continue
            found[name] = self.check(name, want, *args, rules=rules, **keywords)
        return found

    def check_warm(self, implementation, first: tuple, second: tuple, **keywords):
        """Arguments with other values of equal shapes: the same program, not traced again."""
        before, arrays = self._program(implementation, first, keywords)
        jax.block_until_ready(before(arrays))
        after, arrays = self._program(implementation, second, keywords)
        assert after is before, f"{self.label(implementation)}: {first} and {second} have different shapes or types"
        jax.block_until_ready(after(arrays))
        assert after._cache_size() == 1, f"{self.label(implementation)}: {after._cache_size()} programs for one shape"
