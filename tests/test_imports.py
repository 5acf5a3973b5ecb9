"""The arrows of DESIGN.md, section 2: who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support.imports import FOLDERS, HEAVY, ROOT, SOURCES, graph_of, imports_of, light_modules, sources

# Of a peer's code clients use what runs models, by its public face alone, and only where they run one.
PUBLIC = "peer.model"
RUNS_MODELS = {Path("client/drafting"), Path("client/session"), Path("client/distill")}
KNOWS_TRANSFORMERS = {Path("peer/model"), Path("client/distill")}
KNOWS_HIVEMIND = Path("protocol/directory")
# The package itself, where its users begin.
PETAL = Path("client/top-level/__init__.py")
ARROWS = {
    "client": {"protocol", "kernels"},
    "peer": {"protocol", "kernels"},
    "protocol": set[str](),
    "kernels": set[str](),
}


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
    if top == "petal" and path == PETAL:
        return  # seen from inside the folder, `petal.client` lies nowhere else
    if top == "petal" or top in (*FOLDERS, "tests"):
        yield f"imports {top} by an absolute name"
    if top == "transformers" and path.parent not in KNOWS_TRANSFORMERS:
        yield f"{path.parent} does not know transformers"
    if folder == "protocol" and top in HEAVY and not (path.parent == KNOWS_HIVEMIND and top in ("torch", "hivemind")):
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


def test_no_file_imports_itself_by_whatever_way():
    assert circles(graph_of(sources())) == []


def test_a_circle_is_seen():
    files = {
        "a/b": "def f():\n    from ..c import d",
        "c/d": "from . import e",
        "c/e": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..a.b import f",
        "c/f": "from . import e",
    }
    assert circles(graph_of(files)) == [["a/b", "c/d", "c/e"]]


def test_what_clients_need_at_once_is_light():
    heavy = sources().keys() - set(light_modules(sources()))
    folders = RUNS_MODELS | {KNOWS_HIVEMIND}
    assert [path for path in heavy if path.startswith("client") and Path(path).parent not in folders] == []
    assert [path for path in heavy if path.startswith("protocol") and Path(path).parent not in folders] == []


def test_a_heavy_module_behind_a_light_one_is_seen():
    files = {
        "a/__init__": "",
        "a/b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nfrom . import c",
        "a/c": "from ..d.e import f",
        "a/g": "def h():\n    from . import c",
        "d/__init__": "import torch.nn",
        "d/e": "",
    }
    assert light_modules(files) == ["a/__init__", "a/g"]


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
        ("protocol/trust/x.py", "import hivemind", "protocol imports hivemind"),
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


@pytest.mark.parametrize(
    "statement", ["import petal.client", "import petal.client.cli.main", "from petal import SwarmModel, PetalError"]
)
def test_a_light_client_loads_neither_torch_nor_hivemind(statement):
    code = f"import sys; {statement}; print(*sorted({set(HEAVY)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_package_itself_loads_what_is_asked_for():
    code = "import sys, petal; petal.__version__; print('petal.client' in sys.modules, petal.NoRoute.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["False", "petal.client.routing.route"], done.stderr


def imports_a_test_file(source: str) -> bool:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    paths = [f"{getattr(node, 'module', None) or ''}.{alias.name}" for node in nodes for alias in node.names]
    return any(part.startswith("test_") for path in paths for part in path.split("."))


def test_no_test_file_imports_another():
    """What several need lies beside them, or in tests/support."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 80
    assert [str(path) for path in files if imports_a_test_file(path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from .test_cli import serve",
        "def f():\n    from . import test_cli",
        "import tests.end_to_end.test_cli as cli",
        "from tests.end_to_end import test_cli",
    ],
)
def test_an_imported_test_file_is_seen(source):
    assert imports_a_test_file(source)
