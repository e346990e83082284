"""House rules that a machine can check: who imports whom, who may touch Pallas Triton, what is typed."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("sparse_mla_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
LAYERS = [
    "pallas_kernels",
    "sparse_mla_jax.ops",
    "sparse_mla_jax.layers",
    "sparse_mla_jax.models",
    "sparse_mla_jax.serving",
]


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name):
    return next((i for i, prefix in enumerate(LAYERS) if name == prefix or name.startswith(prefix + ".")), None)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_one_way(path):
    own = layer(module_name(path))
    for name in imports(path):
        other = layer(name)
        if own is not None and other is not None:
            assert other <= own, f"{module_name(path)} imports {name}, which lies above it"


def test_only_one_module_imports_the_triton_backend():
    users = [module_name(p) for p in SOURCES if any("pallas.triton" in name for name in imports(p))]
    assert users == ["pallas_kernels._call"]


def test_reference_imports_nothing_of_ours():
    names = imports(ROOT / "sparse_mla_jax" / "reference.py")
    assert not [n for n in names if n.startswith(("sparse_mla_jax", "pallas_kernels")) and "config" not in n]


def test_both_packages_are_typed():
    assert (ROOT / "sparse_mla_jax" / "py.typed").exists() and (ROOT / "pallas_kernels" / "py.typed").exists()


def test_import_reads_no_environment_and_starts_no_backend():
    """Importing the library must not initialise jax: a user may still choose platforms after it."""
    code = (
        "import sparse_mla_jax, sparse_mla_jax.ops.attention, sparse_mla_jax.models.deepseek_v32;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends, 'import started a backend'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_module_reads_the_environment():
    for path in SOURCES:
        assert "environ" not in path.read_text(), f"{module_name(path)} reads environment variables"
