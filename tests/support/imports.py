"""What the files of the four folders import, read from their text: nothing is loaded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("client", "kernels", "peer", "protocol")
HEAVY = frozenset({"torch", "hivemind", "transformers", "triton"})
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


class _Imports(ast.NodeVisitor):
    """The import statements of a file, each with whether importing the file runs it."""

    def __init__(self) -> None:
        self.found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []
        self._later = 0

    def _inside(self, node: ast.AST) -> None:
        self._later += 1
        self.generic_visit(node)
        self._later -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _inside

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            self._inside(node)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.append((node, not self._later))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.append((node, not self._later))


def _statements(source: str) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    return visitor.found


def imports_of(source: str) -> list[tuple[int, str, bool]]:
    """Names that a file imports: dots before the name, the name, whether importing the file imports it at once."""
    found = []
    for node, at_once in _statements(source):
        level = node.level if isinstance(node, ast.ImportFrom) else 0
        module = node.module if isinstance(node, ast.ImportFrom) else None
        found += [(level, name, at_once) for name in ([module] if module else [alias.name for alias in node.names])]
    return found


def graph_of(files: dict[str, str], *, at_once: bool = False) -> dict[str, set[str]]:
    """Which file imports which, by path without suffix; `at_once` leaves out imports in functions."""
    return {path: set(_targets(path, source, files, at_once)) for path, source in files.items()}


def _targets(path: str, source: str, files: dict[str, str], at_once: bool) -> Iterator[str]:
    for node, now in _statements(source):
        if not isinstance(node, ast.ImportFrom) or not node.level or (at_once and not now):
            continue
        package = path.split("/")[: -node.level]
        target = "/".join([*package, *(node.module.split(".") if node.module else [])])
        for name in node.names:
            for candidate in (f"{target}/{name.name}", target, f"{target}/__init__"):
                if candidate in files:
                    yield candidate
                    break


def light_modules(files: dict[str, str]) -> list[str]:
    """Those that load nothing heavy when they are imported, nor does any package that they are in."""
    graph = graph_of(files, at_once=True)
    for path in graph:
        folders = path.split("/")[:-1]
        packages = {"/".join([*folders[:depth], "__init__"]) for depth in range(1, len(folders) + 1)}
        graph[path] |= (packages & files.keys()) - {path}
    heavy = {
        path
        for path, source in files.items()
        if any(now and not level and name.split(".")[0] in HEAVY for level, name, now in imports_of(source))
    }
    while more := {path for path, targets in graph.items() if targets & heavy} - heavy:
        heavy |= more
    return sorted(files.keys() - heavy)


def sources() -> dict[str, str]:
    """Text of every file, by path without suffix."""
    return {path.with_suffix("").as_posix(): (ROOT / path).read_text("utf-8") for path in SOURCES}
