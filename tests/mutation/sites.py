"""Where the library can be broken: each place that a kind of fault fits, by a name that moves along with the code."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

from mutation.edits import Edit, Source, normalise
from mutation.operators import RULES, call_name

# Folders and files of each room.
ROOMS = {
    "ops": ["sparse_mla_jax/ops", "sparse_mla_jax/_check.py"],
    "layers": ["sparse_mla_jax/layers"],
    "metadata": ["sparse_mla_jax/metadata.py"],
    "models": [
        "sparse_mla_jax/models",
        "sparse_mla_jax/families",
        "sparse_mla_jax/_json_fields.py",
        "sparse_mla_jax/config.py",
        "sparse_mla_jax/shapes.py",
    ],
    "serving": ["sparse_mla_jax/serving"],
    "kernels": ["pallas_kernels"],
}
# A plan changes speed and no result; cdna is a tool; PTX runs on NVIDIA only, and no test has such a machine.
_LEFT_OUT = ("pallas_kernels/plans/", "pallas_kernels/cdna/", "pallas_kernels/fp8_nvidia.py")
_FUNCTIONS_LEFT_OUT = {"__repr__", "__str__", "_nvidia_plane"}
# Neither results nor errors depend on these.
_KEYWORDS_LEFT_OUT = {"num_warps", "num_stages", "name", "cost_estimate", "compiler_params", "description", "desc"}
_CALLS_LEFT_OUT = {"warn", "warning", "info", "debug", "print", "tqdm", "cast"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One fault that can be introduced.

    Attributes:
      room: one of ROOMS.
      path: file, relative to the tree.
      function: its name within the module, with those of the classes and functions around it.
      kind: one of RULES.
      text, new: the smallest expression or statement around the fault, before and after, without layout.
      statement: the whole statement; of an `if` or a loop its first line.
      occurrence: which of the places of the room that agree in all of the above.
      line: line of the file.
      edit: what is done to the file; None for a site that was read from a list.
    """

    room: str
    path: str
    function: str
    kind: str
    text: str
    new: str
    statement: str
    occurrence: int
    line: int
    edit: Edit | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What tells it from others: not the file, which may move."""
        return (self.room, self.function, self.kind, self.text, self.new, self.statement)

    @property
    def id(self) -> str:
        """Eight hexadecimal digits."""
        return hashlib.sha256("|".join((*self.names, str(self.occurrence))).encode()).hexdigest()[:8]

    def record(self) -> dict:
        """As it is stored."""
        return {"id": self.id} | {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "edit"}


def from_record(record: dict) -> Site:
    """A site of a stored list; its `edit` is None."""
    return Site(**{f.name: record.get(f.name) for f in dataclasses.fields(Site) if f.name != "edit"})


def _parts_of(node: ast.AST) -> Iterator[ast.AST]:
    """Children of a node in which faults are looked for."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call):
        if call_name(node) in _CALLS_LEFT_OUT:
            return
        if call_name(node) == "require":
            yield from node.args[:1]
            return
        yield from (node.func, *node.args)
        yield from (keyword.value for keyword in node.keywords if keyword.arg not in _KEYWORDS_LEFT_OUT)
    elif isinstance(node, ast.AnnAssign):
        yield from (x for x in (node.value,) if x)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield from node.body
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        yield from node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def _head(statement: ast.stmt) -> str:
    """A statement; of one with a body only what comes before the body."""
    for name in ("test", "iter", "subject"):
        if hasattr(statement, name) and hasattr(statement, "body"):
            return f"{type(statement).__name__.lower()} {ast.unparse(getattr(statement, name))}"
    return "" if hasattr(statement, "body") else ast.unparse(statement)


def _walk(node: ast.AST, function: tuple[str, ...], inside: bool, statement: str) -> Iterator[tuple[ast.AST, str, str]]:
    """Nodes within functions, with the names of those and the statement around them."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        if node.name in _FUNCTIONS_LEFT_OUT:
            return
        function = (*function, node.name)
        inside = inside or not isinstance(node, ast.ClassDef)
    if isinstance(node, ast.stmt):
        statement = _head(node)
    if inside:
        yield node, ".".join(function), statement
    for part in _parts_of(node):
        yield from _walk(part, function, inside, statement)


def faults_of(source: Source) -> list[tuple[str, str, str, Edit]]:
    """Every fault of a module: (function, kind, statement, edit), in the order of the text."""
    found, seen = [], set()
    for node, function, statement in _walk(source.tree, (), False, ""):
        for kind, rule in RULES.items():
            for edit in rule(node, source):
                place = (edit.start, edit.end, edit.new)
                if place not in seen:
                    seen.add(place)
                    found.append((function, kind, statement, edit))
    return sorted(found, key=lambda fault: fault[3].start)


def _texts(source: Source, edit: Edit) -> tuple[str, str] | None:
    """The focus before and after without layout; None for an edit that changes nothing, or is no Python."""
    try:
        old, new = ast.unparse(edit.focus), normalise(source.apply(edit, source.span(edit.focus)))
    except SyntaxError:
        return None
    return None if old == new else (old, new)


def room_of(path: str) -> str | None:
    """The room that a file belongs to; None for files that are not broken."""
    if path.startswith(_LEFT_OUT) or path.endswith("__init__.py"):
        return None
    return next((room for room, places in ROOMS.items() for p in places if path == p or path.startswith(p + "/")), None)


def find_sites(tree: pathlib.Path) -> list[Site]:
    """Every site of a tree, by path and line."""
    found: list[Site] = []
    count: dict[tuple[str, ...], int] = {}
    for file in sorted([*tree.glob("sparse_mla_jax/**/*.py"), *tree.glob("pallas_kernels/**/*.py")]):
        path = file.relative_to(tree).as_posix()
        room = room_of(path)
        if room is None:
            continue
        source = Source(file.read_text())
        for function, kind, statement, edit in faults_of(source):
            texts = _texts(source, edit)
            if texts is None:
                continue
            line = source.data[: edit.start].count(b"\n") + 1
            site = Site(room, path, function, kind, *texts, statement, 0, line, edit)
            number = count[site.names] = count.get(site.names, -1) + 1
            found.append(dataclasses.replace(site, occurrence=number))
    return found
