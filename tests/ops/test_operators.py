"""The registry of operators is true, and every operator with a kernel takes its plan under both names."""

import ast
import importlib
import inspect
import pathlib

import pytest

import sparse_mla_jax as sm
from sparse_mla_jax import ops
from sparse_mla_jax.ops._dispatch import with_plan

FOLDER = pathlib.Path(ops.__file__).parent
MODULES = [importlib.import_module(f"sparse_mla_jax.ops.{path.stem}") for path in sorted(FOLDER.glob("[a-z]*.py"))]


def dispatched():
    """Names that operators give to `dispatch` (or `write_parts`, which passes them on) with a body for Triton."""
    found = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            name, bodies = node.args[0], [arg for arg in node.args if isinstance(arg, ast.Dict)]
            has_kernel = any(key.value == "triton" for body in bodies for key in body.keys)
            if isinstance(name, ast.Constant) and (
                node.func.id == "write_parts" or (node.func.id == "dispatch" and has_kernel)
            ):
                found.add(name.value)
    return found


def operators_with(parameter):
    """Public functions of ops/ with this parameter, by name."""
    return {
        name: value
        for module in MODULES
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and parameter in inspect.signature(value).parameters
    }


def test_kernel_operators_are_those_with_a_triton_body():
    assert dispatched() == set(ops.KERNEL_OPERATORS) - {"lightning_indexer"}
    assert len(set(ops.KERNEL_OPERATORS)) == len(ops.KERNEL_OPERATORS)


@pytest.mark.parametrize("name", ops.KERNEL_OPERATORS)
def test_kernel_operators_are_public(name):
    assert "implementation" in inspect.signature(getattr(sm, name)).parameters


@pytest.mark.parametrize("name", ops.XLA_OPERATORS)
def test_xla_operators_have_one_implementation(name):
    assert "implementation" not in inspect.signature(getattr(sm, name)).parameters


@pytest.mark.parametrize("name", sorted(operators_with("config")))
def test_plan_stands_beside_config(name):
    function = operators_with("config")[name]
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    assert names.index("plan") == names.index("config") - 1
    assert parameters["plan"].annotation == parameters["config"].annotation
    assert "plan" in (function.__doc__ or "")


def test_with_plan():
    assert with_plan("xla", None, None, int) == ("xla", None)
    assert with_plan(None, 3, None, int) == with_plan("triton", None, 3, int) == ("triton", 3)
    for arguments, message in (
        ((None, 3, 3, int), "plan and config are two names of one argument; pass plan alone"),
        ((None, "3", None, int), "plan is str; expected None or a builtins.int"),
        ((None, None, "3", int), "config is str; expected None or a builtins.int"),
        (("xla", 3, None, int), "plan is a plan of the kernel and implementation is 'xla'"),
    ):
        with pytest.raises(ValueError, match=message):
            with_plan(*arguments)
