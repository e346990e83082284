"""Positions of syntax nodes in the text of a module, and replacements in it that leave everything else as it is."""

from __future__ import annotations

import ast
import itertools
from typing import NamedTuple


class Edit(NamedTuple):
    """Bytes start..end-1 of a module become `new`; `focus` is the smallest node around them."""

    start: int
    end: int
    new: str
    focus: ast.AST


class Source:
    """The text of a module and its syntax tree. Positions are bytes, as those of `ast` are."""

    def __init__(self, text: str):
        self.data = text.encode()
        self.tree = ast.parse(text)
        lines = self.data.splitlines(keepends=True)
        self._starts = [0, *itertools.accumulate(len(line) for line in lines)]

    def span(self, node: ast.AST) -> tuple[int, int]:
        """First byte of a node, and one past its last."""
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        """A node as it is written."""
        start, end = self.span(node)
        return self.data[start:end].decode()

    def between(self, left: ast.AST, right: ast.AST) -> tuple[int, str]:
        """Where the text between two nodes begins, and that text."""
        start, end = self.span(left)[1], self.span(right)[0]
        return start, self.data[start:end].decode()

    def replace(self, node: ast.AST, new: str) -> Edit:
        """A whole expression becomes `new`, in parentheses."""
        return Edit(*self.span(node), f"({new})", node)

    def apply(self, edit: Edit, within: tuple[int, int] | None = None) -> str:
        """The text after an edit, of the module or of the bytes `within`; lines keep their numbers."""
        start, end = within or (0, len(self.data))
        new = edit.new
        lost = self.data[edit.start : edit.end].count(b"\n") - new.count("\n")
        if lost > 0:
            new = f"{new[:-1]}{'\n' * lost})" if new.endswith(")") else new + "\n" * lost
        return (self.data[start : edit.start] + new.encode() + self.data[edit.end : end]).decode()


def normalise(text: str) -> str:
    """Source text of an expression or a statement without its layout."""
    try:
        return ast.unparse(ast.parse(f"({text})", mode="eval"))
    except SyntaxError:
        return ast.unparse(ast.parse(text.strip()))
