"""Petal's types are what its users' type checkers see."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import petal
import petal.client
import petal.protocol
import pytest

from .support.imports import FOLDERS, ROOT, light_modules, sources

SEEN = ("swarm", "chat", "config", "output", "prompts", "session/session", "drafting/drafter", "arguments")
USER = ROOT / "tests" / "data" / "user.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed, for a checker that follows no editable installs."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "petal").mkdir()
    for name in FOLDERS:
        (folder / "petal" / name).symlink_to(ROOT / name)
    for path in (ROOT / "client" / "top-level").iterdir():
        (folder / "petal" / path.name).symlink_to(path)
    return folder


def complaints(scripts: list[Path], installed: Path) -> dict[str, str]:
    """What mypy says of programs, strictly, with no settings of ours; what Petal itself imports does not matter."""
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file="]
    command += ["--no-site-packages", f"--cache-dir={installed.parent / 'mypy'}", *map(str, scripts)]
    environment = {"MYPYPATH": str(installed), "PATH": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=installed
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return {path.name: "\n".join(line for line in lines if path.name in line) for path in scripts}


def test_a_users_program_is_checked_strictly(installed: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    text = USER.read_text().replace("temperature=0.8", 'temperature="hot"').replace("wait_s=5", "wait=5")
    wrong.write_text(text.replace("chunk.text for chunk in chunks", "chunk.said for chunk in chunks"))
    said = complaints([USER, wrong], installed)
    assert said["user.py"] == ""
    for complaint in ('argument "wait"', 'has no attribute "said"', '"temperature" to "stream"'):
        assert complaint in said["wrong.py"]


def test_every_error_has_one_base() -> None:
    """All that client and protocol define, but for what is heavy to import and what never leaves its file."""
    light = light_modules(sources())
    for package in (petal.client, petal.protocol):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            path = found.name.removeprefix("petal.").replace(".", "/")
            if {path, f"{path}/__init__"} & {*light}:
                importlib.import_module(found.name)
    errors = {*_below(Exception)}
    strangers = {
        error.__qualname__
        for error in errors
        if error.__module__.startswith(("petal.client", "petal.protocol")) and not issubclass(error, petal.PetalError)
    }
    assert not strangers
    assert {petal.NoRoute, petal.PeerError, petal.ConnectError, petal.SettingsError} <= errors


def _below(kind: type) -> set[type]:
    return {kind}.union(*map(_below, type.__subclasses__(kind)))


def test_what_users_see_says_what_it_does() -> None:
    silent = []
    for name in SEEN:
        tree = ast.parse((ROOT / "client" / f"{name}.py").read_text())
        for owner in ast.walk(tree):
            if not isinstance(owner, (ast.ClassDef, ast.Module)) or getattr(owner, "name", "") == "Streamer":
                continue
            silent += [
                f"{name}: {each.name}"
                for each in owner.body
                if isinstance(each, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                and not each.name.startswith("_")
                and not ast.get_docstring(each)
                and not any(isinstance(mark, ast.Attribute) and mark.attr == "setter" for mark in each.decorator_list)
            ]
    assert not silent


def test_what_is_listed_is_there() -> None:
    assert [name for name in petal.__all__ if not hasattr(petal, name)] == []
    assert set(petal.client.__all__) == set(petal.__all__) - {"__version__"}
    assert {*petal.__all__} <= {*dir(petal)}
    with pytest.raises(AttributeError, match="no attribute 'SwarmModle'"):
        _ = petal.SwarmModle
