"""Nothing grows beyond what a reader takes in at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from .support.imports import ROOT

FOLDERS = ("client", "kernels", "peer", "protocol")
CLASS, FUNCTION, FILE = 200, 60, 350


def too_long(text: str) -> Iterator[str]:
    """What of a module has more lines than it may."""
    if (lines := text.count("\n")) > FILE:
        yield f"{lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not _on_device(node):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
                yield f"{node.name}: {lines} lines"


def _on_device(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel is a program of its own, as a file of C is."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in node.decorator_list)


@pytest.mark.parametrize("folder", FOLDERS)
def test_classes_functions_and_files_are_short(folder: str) -> None:
    """Generated code aside."""
    files = [path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name]
    assert files
    found = {str(path.relative_to(ROOT)): [*too_long(path.read_text())] for path in files}
    assert not {path: long for path, long in found.items() if long}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n" * 350, []),
        ("x = 1\n" * 351, ["351 lines"]),
        ("def f():\n" + "    x = 1\n" * 59, []),
        ("async def f():\n" + "    x = 1\n" * 60, ["f: 61 lines"]),
        ("@triton.jit\ndef f():\n" + "    x = 1\n" * 99, []),
        ("@triton.other\ndef f():\n" + "    x = 1\n" * 60, ["f: 61 lines"]),
        ("class C:\n" + "    x = 1\n" * 199, []),
        ("class C:\n" + "    x = 1\n" * 200, ["C: 201 lines"]),
        ("class C:\n    def f():\n" + "        x = 1\n" * 60, ["f: 61 lines"]),
    ],
)
def test_what_is_too_long_is_found(text: str, said: list[str]) -> None:
    assert [*too_long(text)] == said
