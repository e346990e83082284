"""The tool behind `make mutants`: what each kind of fault makes of a program, which are drawn, who notices."""

import json
import textwrap

import pytest
from mutation import run, trial
from mutation.edits import Source
from mutation.killers import modules, selections
from mutation.operators import RULES
from mutation.sampling import draw, equivalent_sites, find, nearest, ordered, shares
from mutation.sites import ROOMS, Site, faults_of, find_sites, from_record, room_of


def broken(line, kind):
    """What one kind of fault makes of one line of a function."""
    source = Source(f"def f():\n    {line}\n")
    texts = [source.apply(edit) for _, found, _, edit in faults_of(source) if found == kind]
    return [text.splitlines()[1].strip() for text in texts]


@pytest.mark.parametrize(
    ("kind", "line", "expected"),
    [
        ("comparison", "return a < b", ["return a <= b"]),
        ("comparison", "return 0 <= a < b", ["return 0 < a < b", "return 0 <= a <= b"]),
        ("comparison", "return a == (b)", ["return a != (b)"]),
        ("comparison", "return a is not None", ["return a is None"]),
        ("comparison", 'return search(a, b, side="right")', ['return search(a, b, side="left")']),
        ("bound", "return x[:-1]", ["return x[:-2]"]),
        ("bound", "return x[2]", []),
        ("bound", "return jnp.clip(x, 0, n - 1)", ["return jnp.clip(x, 1, n - 1)", "return jnp.clip(x, 0, n - 2)"]),
        ("mask", "return jnp.where(m, a, 0)", ["return (a)"]),
        ("mask", "return a & b", ["return (a)", "return (b)"]),
        ("mask", "return bits & 0x7F", ["return (bits)"]),
        ("mask", "store(ref, x, mask=m)", ["store(ref, x, mask=((m) | True))"]),
        ("mask", "store(ref, x, mask=None)", []),
        ("scale", "return x * scale", ["return (x)"]),
        ("scale", "return 2 * x", ["return (x)"]),
        ("scale", "return x / total", ["return (x)"]),
        ("clamp", "return jnp.clip(x, 0, n)", ["return (x)"]),
        ("clamp", "return max(1, n)", ["return (n)"]),
        ("extremum", "return jnp.max(x, axis=0)", ["return jnp.min(x, axis=0)"]),
        ("sign", "return a + b - c", ["return a - b - c", "return a + b + c"]),
        ("sign", 'return a + "text"', []),
        ("swap", "return f(a, b, c)", ["return f(b, a, c)"]),
        ("swap", "return jnp.where(m, a, b)", ["return jnp.where(m, b, a)"]),
        ("swap", "return max(a, b)", []),
        ("accumulate", "n += step", ["n = step"]),
        ("accumulate", "n = n + step", ["n = (step)"]),
        ("branch", "return a if c else b", ["return (b)", "return (a)"]),
        ("boolean", "return a and not b", ["return ((a) or (not b))"]),
        ("negation", "return not a", ["return (a)"]),
        ("negation", "return -1", []),
        ("rounding", "return -(-a // b)", ["return ((a) // (b))"]),
        ("rounding", "return a // b", ["return (-(-(a) // (b)))"]),
        ("rounding", "return (a + b - 1) // b", ["return ((a) // b)"]),
        ("axis", "return sum(x, axis=-1)", ["return sum(x, axis=0)"]),
        ("axis", "return sum(x, axis=0)", ["return sum(x, axis=-1)"]),
        ("omission", "pages.free(page)", ["pass"]),
        ("omission", "require(a, message)", []),
    ],
)
def test_faults_of_a_line(kind, line, expected):
    assert broken(line, kind) == expected


def test_every_kind_is_tested():
    cases = next(mark for mark in test_faults_of_a_line.pytestmark if mark.name == "parametrize").args[1]
    assert {case[0] for case in cases} == set(RULES)


def test_a_branch_is_not_taken():
    source = Source("def f():\n    if a:\n        b()\n    else:\n        c()\n")
    made = [source.apply(edit) for _, kind, _, edit in faults_of(source) if kind == "branch"]
    assert [text.splitlines()[1] for text in made] == ["    if (False):", "    if (True):"]


@pytest.mark.parametrize(
    "text",
    [
        'def f(x: "int | None" = 1 + 1) -> "a < b":\n    """x < 1"""\n',
        "def f():\n    raise ValueError(a < b)\n",
        "def f():\n    assert a < b\n",
        'def f():\n    return f"{a + b}"\n',
        "x = a < b\n",
        "def f():\n    return launch(num_warps=a + b)\n",
        "def __repr__(self):\n    return a < b\n",
        "def f():\n    require(True, a + b)\n",
        "def f():\n    if TYPE_CHECKING:\n        g(a, b)\n",
    ],
)
def test_what_is_not_broken(text):
    assert faults_of(Source(text)) == []


def test_everything_else_stays():
    """Bytes around a fault, comments and line numbers are kept, also where what is replaced has several lines."""
    text = textwrap.dedent(
        """\
        # größer
        def f(x):
            y = jnp.where(  # a comment with ü and (
                x > 0,
                x,
                0.0,
            )
            return y  # kept
        """
    )
    source = Source(text)
    made = {kind: source.apply(edit) for _, kind, _, edit in faults_of(source)}
    assert made["mask"] == "# größer\ndef f(x):\n    y = (x\n\n\n\n)\n    return y  # kept\n"
    assert made["comparison"] == text.replace("x > 0", "x >= 0")
    assert made["swap"] == text.replace("x,\n        0.0,", "0.0,\n        x,")
    assert source.apply(faults_of(source)[0][3]) != text and source.data.decode() == text


MODULE = """
def f(a, b):
    return a < b
class C:
    def f(self, a):
        if a < 1:
            return a - 1
        return max(a, 2)
"""


def tree(root, path="sparse_mla_jax/ops/tiny.py", text=MODULE):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
    return root


def test_names_do_not_depend_on_the_file(tmp_path):
    here = find_sites(tree(tmp_path / "a"))
    there = find_sites(tree(tmp_path / "b", "sparse_mla_jax/ops/deep/other.py", "import os\n" + MODULE))
    assert [site.id for site in here] == [site.id for site in there] and len({site.id for site in here}) == len(here)
    assert {site.function for site in here} == {"f", "C.f"}
    assert all(find(site, there) == there[i] for i, site in enumerate(here))


def test_sites_are_found_in_changed_code(tmp_path):
    sites = find_sites(tree(tmp_path / "a"))
    renamed = find_sites(tree(tmp_path / "b", text=MODULE.replace("def f(self, a)", "def g(self, a)")))
    wanted = next(site for site in sites if site.text == "a - 1" and site.kind == "sign")
    assert find(from_record(wanted.record()), renamed).function == "C.g"
    other = find_sites(tree(tmp_path / "c", text=MODULE.replace("a - 1", "value - 1")))
    assert find(wanted, other) is None and nearest(wanted, other)[0].text == "value - 1"
    gone = find_sites(tree(tmp_path / "d", text=MODULE.replace("a - 1", "a")))
    assert find(wanted, gone) is None and nearest(wanted, gone) == (None, 0.0)


def test_a_list_is_found_in_another_tree(tmp_path):
    """By name, by likeness, or another fault of the room in its place, and it says which."""
    sites = find_sites(tree(tmp_path / "a"))
    records = [site.record() for site in draw(sites, 60, 0)]
    changed = find_sites(
        tree(tmp_path / "b", text=MODULE.replace("return max(a, 2)", "return a").replace("f(a, b)", "f(a, b, c)"))
    )
    faults = run._listed(records, changed)
    assert {fault.id for fault in faults if not fault.note} == {r["id"] for r in records if "max" not in r["text"]}
    assert all("which is gone" in fault.note for fault in faults if fault.note)


def test_the_same_faults_are_drawn(tmp_path):
    sites = find_sites(tree(tmp_path))
    assert [s.id for s in draw(sites, 20, 0)] == [s.id for s in draw(list(reversed(sites)), 20, 0)]
    assert [s.id for s in ordered(sites, 0)] != [s.id for s in ordered(sites, 1)]
    everything = draw(sites, 60, 0)
    assert len({(site.function, site.statement) for site in everything}) == len(everything) == 4
    assert draw(sites, 60, 0, without={everything[1].id}) == [everything[0], *everything[2:]]
    assert draw(sites, 8, 0, without={everything[0].id}) == everything[1:3]
    assert shares(60) == {"ops": 15, "layers": 9, "metadata": 4, "models": 9, "serving": 8, "kernels": 15}
    assert sum(shares(7).values()) == 7 and set(shares(60)) == set(ROOMS)


def test_equivalent_faults_are_known_by_name(tmp_path):
    sites = find_sites(tree(tmp_path))
    lines = [f"{key} = {json.dumps(value)}" for key, value in sites[0].record().items()]
    (tmp_path / "equivalent.toml").write_text("\n".join(["[[mutant]]", *lines, 'reason = "none"']))
    assert equivalent_sites(sites, tmp_path / "equivalent.toml") == {sites[0].id: "none"}


@pytest.mark.parametrize(
    ("path", "room"),
    [
        ("sparse_mla_jax/ops/topk.py", "ops"),
        ("sparse_mla_jax/config.py", "models"),
        ("sparse_mla_jax/metadata.py", "metadata"),
        ("pallas_kernels/sparse_attention/rows.py", "kernels"),
        ("pallas_kernels/plans/topk.py", None),
        ("pallas_kernels/cdna/worker.py", None),
        ("sparse_mla_jax/reference.py", None),
    ],
)
def test_rooms(path, room):
    assert room_of(path) == room


def test_modules_go_by_name(tmp_path):
    for name in ("ops/test_topk.py", "ops/test_topk_faults.py", "layers/test_mla.py", "test_attention.py"):
        tree(tmp_path, f"tests/{name}", "")
    site = Site("kernels", "pallas_kernels/topk.py", "f", "sign", "a + b", "a - b", "", 0, 1)
    found = modules(tmp_path, site)
    assert found[:2] == ["tests/ops/test_topk.py", "tests/ops/test_topk_faults.py"] and found[-1].endswith(
        "attention.py"
    )
    first, second = selections(site)
    assert "triton" in first and second == f"not ({first})"


TINY = """
def total(values):
    result = i = 0
    while i < len(values):
        result = result + values[i]
        i += 1
    return result
def unused(a, b):
    return a * b
"""
TINY_TEST = """
from sparse_mla_jax.ops.tiny import total
def test_total():
    assert total([1, 2, 4]) == 7
"""


def test_who_notices(tmp_path, monkeypatch, capsys):
    """One fault is noticed, one does not end, one gets through; the tree stays, and nothing is tried twice."""
    tree(tmp_path / "tree", text=TINY)
    tree(tmp_path / "tree", "tests/test_tiny.py", TINY_TEST)
    tree(tmp_path / "tree", "sparse_mla_jax/__init__.py", "")
    tree(tmp_path / "tree", "tests/conftest.py", "")
    # Plugins take longer to start than all of this.
    monkeypatch.setattr(trial, "PLUGIN_OPTIONS", ())
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path / ".mutants")
    sites = {(site.kind, site.text): site.id for site in find_sites(tmp_path / "tree")}
    ids = {
        "noticed": sites["accumulate", "result = result + values[i]"],
        "hang": sites["accumulate", "i += 1"],
        "survived": sites["scale", "a * b"],
    }
    arguments = ["--tree", str(tmp_path / "tree"), "--count", "0", "--hang", "0.3", "--jobs", "3"]
    arguments += [word for name in ids.values() for word in ("--only", name)]
    assert run.main(arguments) == 1
    text = capsys.readouterr().out
    assert "2 of 3 noticed (1 of them as a test that does not end)" in text and "survived" in text
    (folder,) = (tmp_path / ".mutants").iterdir()
    stored = {kind: json.loads((folder / f"{name}.json").read_text()) for kind, name in ids.items()}
    assert {kind: record["outcome"]["result"] for kind, record in stored.items()} == {kind: kind for kind in ids}
    assert stored["noticed"]["outcome"]["by"] == "tests/test_tiny.py::test_total"
    assert "+    return (a)" in stored["survived"]["diff"] and stored["survived"]["outcome"]["tests"] == 1
    assert (tmp_path / "tree/sparse_mla_jax/ops/tiny.py").read_text() == TINY
    assert run.main([*arguments, "--report"]) == 1 and "2 of 3 noticed" in capsys.readouterr().out
