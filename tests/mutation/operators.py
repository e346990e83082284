"""The kinds of faults: what each turns a piece of a program into.

A rule takes a node and yields edits. It decides by syntax alone, so some of its edits change no result: those are
listed, with their reasons, in equivalent.toml.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from mutation.edits import Edit, Source

Rule = Callable[[ast.AST, Source], Iterator[Edit]]

_COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: (r"is\b", "is not"),
    ast.IsNot: (r"is\s+not\b", "is"),
    ast.In: (r"in\b", "not in"),
    ast.NotIn: (r"not\s+in\b", "in"),
}
_CLAMPS = {"clip", "minimum", "maximum", "min", "max"}
_EXTREMA = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "argmax": "argmin"}
_BOUNDED = {"range", "arange", "cdiv", "fori_loop", "dynamic_slice_in_dim", "islice", "full", "zeros", "ones", *_CLAMPS}
_CHOICES = {"where", "cond", "select"}
_MASKED = {"load", "store", "load_codes", "load_from", "store_masked", "write"}
# Calls whose first two arguments may trade places, or whose second is only a type or a name.
_UNORDERED = {
    "isinstance", "issubclass", "hasattr", "getattr", "issubdtype", "require", "zip", "dict", "field",
    "zeros", "ones", "full", "full_like", "asarray", "array", "ShapeDtypeStruct", "reshape", "partial", "signature",
    "minimum", "maximum", "min", "max", "logical_and", "logical_or", "gcd", "lcm", "isclose", "size", "integers",
}  # fmt: skip


def call_name(node: ast.AST) -> str:
    """Last part of the name that a call calls, "" for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _same(a: ast.AST, b: ast.AST) -> bool:
    # Not `ast.dump`: a name that is assigned differs there from the same name that is read.
    return ast.unparse(a) == ast.unparse(b)


def _is_text(node: ast.AST) -> bool:
    """Strings, lists and tuples: what is added there is joined."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) or _is_text(node.orelse)
    joined = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp)
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return isinstance(node, joined) or constant or call_name(node) in {"join", "format", "str", "list", "tuple"}


def _is_fixed(node: ast.AST) -> bool:
    """Literals, NAMES_OF_CONSTANTS and types such as jnp.int32."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node).startswith(("np.", "jnp.", "jax.", "lax."))
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id.isupper())


def _is_int(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


def _is_operation(node: ast.AST, *operators: type) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, operators)


def _is_minus(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _is_ceiling(node: ast.AST) -> bool:
    """-(-a // b)."""
    return _is_minus(node) and _is_operation(node.operand, ast.FloorDiv) and _is_minus(node.operand.left)


def comparison(node: ast.AST, source: Source) -> Iterator[Edit]:
    """< and <=, > and >=, == and !=, `is` and `is not`, `in` and `not in`; the side of a search."""
    if isinstance(node, ast.Compare):
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators):
            pattern, new = _COMPARISONS[type(operator)]
            start, gap = source.between(left, right)
            found = re.search(pattern, gap)
            if found:
                yield Edit(start + found.start(), start + found.end(), new, node)
    for keyword in getattr(node, "keywords", ()) if isinstance(node, ast.Call) else ():
        if keyword.arg == "side" and isinstance(keyword.value, ast.Constant):
            yield Edit(*source.span(keyword.value), '"left"' if keyword.value.value == "right" else '"right"', node)


def _literals(node: ast.AST) -> Iterator[ast.Constant]:
    """Integer literals of a sum."""
    if _is_int(node):
        yield node
    elif _is_minus(node):
        yield from _literals(node.operand)
    elif _is_operation(node, ast.Add, ast.Sub):
        yield from _literals(node.left)
        yield from _literals(node.right)


def bound(node: ast.AST, source: Source) -> Iterator[Edit]:
    """An integer in a slice, a range, a clamp, a shape, a comparison or a sum becomes the next one."""
    places: list[ast.AST] = []
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        places = [end for part in parts if isinstance(part, ast.Slice) for end in (part.lower, part.upper) if end]
    elif call_name(node) in _BOUNDED:
        places = node.args
    elif isinstance(node, ast.Compare):
        places = [node.left, *node.comparators]
    elif _is_operation(node, ast.Add, ast.Sub):
        places = [node]
    for literal in (literal for place in places for literal in _literals(place)):
        yield Edit(*source.span(literal), str(literal.value + 1), node)


def mask(node: ast.AST, source: Source) -> Iterator[Edit]:
    """`where` takes its first value always, an operand of & goes, a masked load or store covers every lane."""
    if call_name(node) == "where" and len(node.args) == 3:
        yield source.replace(node, source.text(node.args[1]))
    elif _is_operation(node, ast.BitAnd):
        for kept in (node.left, node.right):
            if not _is_fixed(kept):
                yield source.replace(node, source.text(kept))
    elif call_name(node) in _MASKED:
        for keyword in node.keywords:
            if keyword.arg == "mask" and not isinstance(keyword.value, ast.Constant):
                yield Edit(*source.span(keyword.value), f"(({source.text(keyword.value)}) | True)", node)


def scale(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A factor or a divisor is forgotten."""
    if _is_operation(node, ast.Mult, ast.Div) and not _is_text(node.left) and not _is_text(node.right):
        constant = isinstance(node.left, ast.Constant) and isinstance(node.op, ast.Mult)
        yield source.replace(node, source.text(node.right if constant else node.left))


def clamp(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A clamped value is taken as it is."""
    if call_name(node) in _CLAMPS and len(node.args) > 1 and not any(isinstance(x, ast.Starred) for x in node.args):
        value = next((x for x in node.args if not isinstance(x, ast.Constant)), None)
        if value is not None:
            yield source.replace(node, source.text(value))


def extremum(node: ast.AST, source: Source) -> Iterator[Edit]:
    """The largest in place of the smallest."""
    name = call_name(node)
    if name in _EXTREMA:
        end = source.span(node.func)[1]
        yield Edit(end - len(name), end, _EXTREMA[name], node)


def sign(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A sum becomes a difference, and the other way round."""
    if _is_operation(node, ast.Add, ast.Sub) and not _is_text(node.left) and not _is_text(node.right):
        old, new = ("+", "-") if isinstance(node.op, ast.Add) else ("-", "+")
        start, gap = source.between(node.left, node.right)
        yield Edit(start + gap.index(old), start + gap.index(old) + 1, new, node)


def swap(node: ast.AST, source: Source) -> Iterator[Edit]:
    """The first two arguments of a call trade places, of a choice its two values."""
    if not isinstance(node, ast.Call) or call_name(node) in _UNORDERED:
        return
    pair = node.args[1:3] if call_name(node) in _CHOICES else node.args[:2]
    if len(pair) < 2 or any(isinstance(x, ast.Starred) for x in pair):
        return
    first, second = pair
    types = [x for x in pair if isinstance(x, ast.Attribute) and _is_fixed(x)]
    if not types and not (_is_fixed(first) and _is_fixed(second)) and not _same(first, second):
        _, gap = source.between(first, second)
        start, end = source.span(first)[0], source.span(second)[1]
        yield Edit(start, end, source.text(second) + gap + source.text(first), node)


def accumulate(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A sum keeps only what was added last."""
    if isinstance(node, ast.AugAssign) and not isinstance(node.op, ast.FloorDiv | ast.Mod):
        start, gap = source.between(node.target, node.value)
        found = re.search(r"[^\s=(]+=", gap)
        yield Edit(start + found.start(), start + found.end(), "=", node)
    elif isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_operation(node.value, ast.Add, ast.BitOr):
        sides = (node.value.left, node.value.right)
        for side, other in (sides, sides[::-1]):
            if _same(side, node.targets[0]):
                yield source.replace(node.value, source.text(other))._replace(focus=node)


def branch(node: ast.AST, source: Source) -> Iterator[Edit]:
    """One side of a choice of the program is taken always."""
    if isinstance(node, ast.IfExp):
        yield source.replace(node, source.text(node.orelse))
        yield source.replace(node, source.text(node.body))
    elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
        yield source.replace(node.test, "False")
        if node.orelse:
            yield source.replace(node.test, "True")


def boolean(node: ast.AST, source: Source) -> Iterator[Edit]:
    """`and` becomes `or`, and the other way round."""
    if isinstance(node, ast.BoolOp):
        word = " or " if isinstance(node.op, ast.And) else " and "
        yield source.replace(node, word.join(f"({source.text(value)})" for value in node.values))


def negation(node: ast.AST, source: Source) -> Iterator[Edit]:
    """`not`, ~ or a minus is forgotten."""
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant) and not _is_ceiling(node):
        yield source.replace(node, source.text(node.operand))


def rounding(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A division rounds the other way."""
    if _is_ceiling(node):
        left, right = source.text(node.operand.left.operand), source.text(node.operand.right)
        yield source.replace(node, f"({left}) // ({right})")
    elif _is_operation(node, ast.FloorDiv) and not _is_minus(node.left):
        raised = node.left.left if _is_operation(node.left, ast.Sub) else None
        if raised is not None and _is_operation(raised, ast.Add) and _same(raised.right, node.right):
            yield source.replace(node, f"({source.text(raised.left)}) // {source.text(node.right)}")
        else:
            yield source.replace(node, f"-(-({source.text(node.left)}) // ({source.text(node.right)}))")


def axis(node: ast.AST, source: Source) -> Iterator[Edit]:
    """Another axis."""
    for keyword in node.keywords if isinstance(node, ast.Call) else ():
        number = keyword.value.operand if _is_minus(keyword.value) else keyword.value
        if keyword.arg == "axis" and _is_int(number):
            yield Edit(*source.span(keyword.value), "-1" if number is keyword.value and not number.value else "0", node)


def omission(node: ast.AST, source: Source) -> Iterator[Edit]:
    """A call for its effect is left out."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and call_name(node.value) != "require":
        yield Edit(*source.span(node), "pass", node)


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        comparison, bound, mask, scale, clamp, extremum, sign, swap, accumulate, branch, boolean, negation, rounding,
        axis, omission,
    )
}  # fmt: skip
