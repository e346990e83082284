"""House rules that a machine can check: who imports whom, what a file holds, who may touch JAX's internals."""

import ast
import collections
import pathlib
import re
import subprocess
import sys

import pytest
from support import long_tests

ROOT = next(p for p in pathlib.Path(__file__).parents if (p / "pyproject.toml").exists())
SOURCES = sorted([*ROOT.glob("sparse_mla_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")])
# From the lowest to the highest: a module imports from its own layer and from those below.
LAYERS = [
    ["pallas_kernels.targets", "pallas_kernels.mesh_axes"],
    ["pallas_kernels"],
    ["sparse_mla_jax._interrupts", "sparse_mla_jax._plugin_message"],
    ["sparse_mla_jax._check", "sparse_mla_jax._choices", "sparse_mla_jax._folder", "sparse_mla_jax._serialization"],
    [
        "sparse_mla_jax._json_fields",
        "sparse_mla_jax._config_fields",
        "sparse_mla_jax.mla_layer",
        "sparse_mla_jax.mla_shapes",
        "sparse_mla_jax.shapes",
    ],
    ["sparse_mla_jax.families"],
    ["sparse_mla_jax.config", "sparse_mla_jax.reference"],
    ["sparse_mla_jax.ops", "sparse_mla_jax.metadata"],
    ["sparse_mla_jax.interchange", "sparse_mla_jax.export"],
    ["sparse_mla_jax.layers", "sparse_mla_jax.parallel"],
    ["sparse_mla_jax.models"],
    ["sparse_mla_jax.serving"],
    ["sparse_mla_jax.cases"],
    ["sparse_mla_jax.tools"],
    ["sparse_mla_jax.__main__"],
]
# Modules of one line that keep an old name importable for one release.
OLD_NAMES = {"sparse_mla_jax.data", "sparse_mla_jax.scoring"}
MOST_LINES = 400
# Lines of a function without its docstring: one screen.
MOST_FUNCTION_LINES = 50


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(node):
    """Dotted names that an import statement may mean: modules, or names in modules."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: relative import"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def imports(name):
    """Everything that a module imports, wherever the statement stands."""
    return set().union(*(imported(node) for node in ast.walk(TREES[name])))


def imports_when_loaded(name):
    """Our modules that loading a module loads: not those in function bodies, nor for type checkers alone."""
    found, nodes = set(), list(TREES[name].body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        found |= imported(node)
    return {m for m in (n if n in MODULES else n.rpartition(".")[0] for n in found) if m in MODULES and m != name}


def layer(name):
    """Number of the layer with the longest prefix of a dotted name."""
    found = [
        (len(prefix), i)
        for i, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(prefix + ".")
    ]
    return max(found)[1] if found else None


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    own = layer(name)
    assert own is not None or name in {"sparse_mla_jax", *OLD_NAMES}, f"{name} is in no layer"
    for other in imports(name):
        if own is not None and layer(other) is not None:
            assert layer(other) <= own, f"{name} imports {other}, which lies above it"


def test_no_circle():
    """No module needs itself to be loaded; within a layer too."""
    state = {}

    def visit(name, path):
        assert state.get(name) != "open", " -> ".join([*path[path.index(name) :], name])
        if name not in state:
            state[name] = "open"
            for other in sorted(imports_when_loaded(name)):
                visit(other, [*path, name])
            state[name] = "done"

    for name in MODULES:
        visit(name, [])


def test_only_one_module_imports_the_triton_backend():
    users = [name for name in MODULES if any("pallas.triton" in n for n in imports(name) if "_src" not in n)]
    assert users == ["pallas_kernels._call"]


def test_who_imports_the_internals_of_jax():
    """One file of the kernels, and the two of `cdna` that drive JAX's ROCm compiler without ROCm."""
    users = {name for name in MODULES if any(n.startswith("jax._src") for n in imports(name))}
    assert users == {"pallas_kernels._primitives", "pallas_kernels.cdna.lowering", "pallas_kernels.cdna.xla_rocm"}


def test_kernels_do_not_import_kernels():
    """What two kernels share has a file of its own."""
    kernels = {path.stem for path in ROOT.glob("pallas_kernels/plans/*.py")} | {"topk", "indexer_logits"}
    kernels = {f"pallas_kernels.{name}" for name in kernels} & set(MODULES)
    assert len(kernels) >= 6
    for name in kernels:
        assert not imports_when_loaded(name) & kernels - {name}, name


def test_reference_imports_nothing_of_ours():
    names = imports("sparse_mla_jax.reference")
    assert not [n for n in names if n.startswith(("sparse_mla_jax", "pallas_kernels")) and "config" not in n]


@pytest.mark.parametrize("name", MODULES)
def test_a_file_has_one_subject(name):
    assert len(MODULES[name].read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("name", MODULES)
def test_a_function_fits_a_screen(name):
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.FunctionDef):
            continue
        documented = ast.get_docstring(node) is not None
        first = node.body[1] if documented and len(node.body) > 1 else node.body[0]
        lines = node.end_lineno - (node.body[0].end_lineno if documented else first.lineno - 1)
        assert lines <= MOST_FUNCTION_LINES, f"{node.name}: {lines} lines"


def test_a_class_name_occurs_once():
    places = collections.defaultdict(list)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_test_modules_import_no_test_module():
    """What they share is in tests/support."""
    for path in sorted(ROOT.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = {name.rpartition(".")[0] or name for name in imported(node)}
            assert not [name for name in named if name.rpartition(".")[2].startswith("test_")], path.name


@pytest.mark.parametrize("pattern", long_tests.LONG)
def test_long_tests_exist(pattern):
    """A pattern that names no test would mark none."""
    path, _, name = pattern.partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert any(re.fullmatch(name.partition("\\[")[0], test) for test in tests)


def test_both_packages_are_typed():
    assert (ROOT / "sparse_mla_jax" / "py.typed").exists() and (ROOT / "pallas_kernels" / "py.typed").exists()


def test_import_reads_no_environment_and_starts_no_backend():
    """Importing the library must not initialise jax: a user may still choose platforms after it."""
    code = (
        "import sparse_mla_jax, sparse_mla_jax.ops.attention, sparse_mla_jax.models.deepseek_v32;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends, 'import started a backend'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_who_reads_the_environment():
    """What starts compilers, which read it, as does XDG_CACHE_HOME; and what joins processes by their environment."""
    readers = [name for name, path in MODULES.items() if re.search(r"\bos\.environ|\bgetenv", path.read_text())]
    assert readers == ["pallas_kernels.cdna.toolchain", "sparse_mla_jax.tools.processes"]


def test_the_repository_is_small():
    """Below 20 MB of tracked files."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.decode().split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.is_file()) < 20e6
