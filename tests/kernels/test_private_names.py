"""Every name of jax that is not public and that the library uses exists: a release that drops one says which."""

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Private modules, and public ones whose names jax may change without notice.
UNSTABLE = (
    "jax._src",
    "jax.extend",
    "jax.experimental.pallas",
    "jax.experimental.topologies",
    "jax.experimental.buffer_callback",
)


def is_unstable(module):
    return any(module == name or module.startswith(f"{name}.") for name in UNSTABLE)


def names_in(text):
    """Dotted names of unstable modules that a file uses, as far as attributes of imported modules go."""
    tree, aliases, found = ast.parse(text), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and is_unstable(node.module or ""):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ImportFrom) and node.module == "jax.experimental":
            aliases |= {a.asname or a.name: f"jax.experimental.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if is_unstable(a.name)}
    found |= {name for name in aliases.values() if is_unstable(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            name = f"{aliases[node.value.id]}.{node.attr}"
            found |= {name} if is_unstable(name) else set()
    return found


USED = {
    name
    for folder in ("pallas_kernels", "sparse_mla_jax")
    for file in (ROOT / folder).rglob("*.py")
    for name in names_in(file.read_text())
}


def test_names_are_found():
    """What the scan must not miss; an import in a function and an attribute are among it."""
    text = "def f():\n from jax._src.pallas.triton import lowering as low\n from jax.experimental import pallas as pl\n"
    assert names_in(f"{text} return low._load, pl.program_id") == {
        "jax._src.pallas.triton.lowering",
        "jax._src.pallas.triton.lowering._load",
        "jax.experimental.pallas",
        "jax.experimental.pallas.program_id",
    }
    assert {"jax._src.pallas.triton.lowering._load", "jax._src.state.types.ReadEffect"} <= USED
    assert len(USED) > 30


@pytest.mark.parametrize("name", sorted(USED))
def test_the_name_exists(name):
    path, value = name.split("."), None
    for number, part in enumerate(path):
        if value is not None and hasattr(value, part):
            value = getattr(value, part)
        else:
            value = importlib.import_module(".".join(path[: number + 1]))
