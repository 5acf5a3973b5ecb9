"""The arrows of DESIGN.md, section 2: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("client", "kernels", "peer", "protocol")
HEAVY = frozenset({"torch", "hivemind", "transformers", "triton"})
# Of a peer's code clients use what runs models, by its public face alone, and only where they run one.
PUBLIC = "peer.model"
RUNS_MODELS = {Path("client/drafting"), Path("client/session"), Path("client/distill")}
KNOWS_TRANSFORMERS = {Path("peer/model"), Path("client/distill")}
ARROWS = {
    "client": {"protocol", "kernels"},
    "peer": {"protocol", "kernels"},
    "protocol": set[str](),
    "kernels": set[str](),
}
SOURCES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


class _Imports(ast.NodeVisitor):
    """Names that a file imports, each with whether importing the file imports it."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str, bool]] = []
        self._inside = 0

    def _later(self, node: ast.AST) -> None:
        self._inside += 1
        self.generic_visit(node)
        self._inside -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _later

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(0, alias.name, not self._inside) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        modules = [node.module] if node.module else [alias.name for alias in node.names]
        self.found += [(node.level, module, not self._inside) for module in modules]


def imports_of(source: str) -> list[tuple[int, str, bool]]:
    visitor = _Imports()
    visitor.visit(ast.parse(source))
    return visitor.found


def violations(path: Path, source: str) -> Iterator[str]:
    """What a file of the four folders imports against the rules."""
    folder = path.parts[0]
    for level, module, at_once in imports_of(source):
        top = module.split(".")[0]
        if level == 0:
            yield from (f"{path}: {why}" for why in _outside(path, folder, top, at_once))
        elif folder == "client" and level == len(path.parts) and module == PUBLIC:
            continue
        elif level >= len(path.parts) and top not in ARROWS[folder] | {folder}:
            yield f"{path}: {folder} imports {top}"


def _outside(path: Path, folder: str, top: str, at_once: bool) -> Iterator[str]:
    if top == "petal" or top in (*FOLDERS, "tests"):
        yield f"imports {top} by an absolute name"
    if top == "transformers" and path.parent not in KNOWS_TRANSFORMERS:
        yield f"{path.parent} does not know transformers"
    if folder == "protocol" and top in HEAVY and not (path.name == "dht.py" and top in ("torch", "hivemind")):
        yield f"protocol imports {top}"
    if folder == "client" and top in HEAVY and at_once and path.parent not in RUNS_MODELS:
        yield f"client imports {top} at once"
    if folder == "kernels" and top not in sys.stdlib_module_names | {"torch", "triton"}:
        yield f"kernels imports {top}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, however long the way round (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for after in graph.get(node, ()):
            if after not in order:
                visit(after)
                low[node] = min(low[node], low[after])
            elif after in stack:
                low[node] = min(low[node], order[after])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph.get(node, ()):
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def graph_of(files: dict[str, str]) -> dict[str, set[str]]:
    """Which file imports which, by path without suffix; imports inside functions and for type checkers count too."""
    return {path: set(_targets(path, source, files)) for path, source in files.items()}


def _targets(path: str, source: str, files: dict[str, str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        package = path.split("/")[: -node.level]
        target = "/".join([*package, *(node.module.split(".") if node.module else [])])
        for name in node.names:
            for candidate in (f"{target}/{name.name}", target, f"{target}/__init__"):
                if candidate in files:
                    yield candidate
                    break


def test_no_file_imports_itself_by_whatever_way():
    files = {str(path.with_suffix("")): (ROOT / path).read_text() for path in SOURCES}
    assert circles(graph_of(files)) == []


def test_a_circle_is_seen():
    files = {
        "a/b": "def f():\n    from ..c import d",
        "c/d": "from . import e",
        "c/e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..a.b import f",
        "c/f": "from . import e",
    }
    assert circles(graph_of(files)) == [["a/b", "c/d", "c/e"]]


def test_there_is_something_to_check():
    assert {path.parts[0] for path in SOURCES} == set(FOLDERS)
    assert len(SOURCES) > 40


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_arrows(path):
    assert list(violations(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("client/x.py", "from ..peer.engine import Engine", "client imports peer"),
        ("client/x.py", "def f():\n    from .. import peer", "client imports peer"),
        ("client/x.py", "import torch", "client imports torch at once"),
        ("client/drafting/model.py", "import transformers", "does not know transformers"),
        ("client/drafting/model.py", "from ...peer.engine import Engine", "client imports peer"),
        (
            "client/x.py",
            "try:\n    import hivemind.dht\nexcept ImportError:\n    pass",
            "client imports hivemind at once",
        ),
        ("client/x.py", "class A:\n    from torch import nn", "client imports torch at once"),
        ("client/x.py", "def f():\n    import transformers", "does not know transformers"),
        ("client/distill/x.py", "from ...peer.model.load import load_span", "client imports peer"),
        ("peer/x.py", "from ..client.route import Route", "peer imports client"),
        ("peer/x.py", "import petal.protocol.wire.tree", "imports petal by an absolute name"),
        ("peer/x.py", "from kernels import linear", "imports kernels by an absolute name"),
        ("peer/x.py", "from transformers import AutoConfig", "does not know transformers"),
        ("protocol/x.py", "from ..kernels import linear", "protocol imports kernels"),
        ("protocol/x.py", "def f():\n    import torch", "protocol imports torch"),
        ("protocol/x.py", "from hivemind.dht import DHT", "protocol imports hivemind"),
        ("protocol/directory/dht.py", "import transformers", "protocol imports transformers"),
        ("kernels/x.py", "import numpy as np", "kernels imports numpy"),
        ("kernels/x.py", "from ..protocol import codec", "kernels imports protocol"),
        ("kernels/deep/x.py", "from ...peer import pool", "kernels imports peer"),
    ],
)
def test_the_check_sees_a_wrong_arrow(path, source, expected):
    assert any(expected in found for found in violations(Path(path), source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("client/x.py", "from ..protocol import tree\nfrom .route import Route\nimport numpy"),
        ("client/drafting/model.py", "import torch\nfrom ...peer.model import load_span"),
        ("client/x.py", "def f():\n    import torch\n    from ..kernels import linear"),
        ("client/distill/x.py", "import torch\nfrom transformers import LlamaConfig\nfrom ..drafting import growth"),
        ("peer/model/meta_model.py", "import transformers\nfrom ..kernels.linear import PackedLinear"),
        ("protocol/directory/dht.py", "import torch\nfrom hivemind.dht.node import DHTNode"),
        ("kernels/x.py", "import ctypes\nimport torch\nfrom .plan import Plan\nfrom . import native"),
    ],
)
def test_right_arrows_pass(path, source):
    assert list(violations(Path(path), source)) == []


@pytest.mark.parametrize("module", ["petal.client", "petal.client.cli.main"])
def test_a_light_client_loads_neither_torch_nor_hivemind(module):
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
