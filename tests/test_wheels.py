"""What `make wheel` builds, and what it does where it is installed without a compiler.

Their quick twins: the lists in `test_package.py`, prebuilt kernels in `kernels/test_isa.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from petal.kernels.cpu.isa import X86_64, isas

from .support.imports import ROOT, SOURCES
from .support.package import DATA, DRAFTERS, installed, listed_in

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("make") is None or shutil.which("cc") is None, reason="no make or no C compiler"),
]
DRAFTER = set(map(installed, listed_in(DRAFTERS, DATA)))
PREBUILT = {f"petal/kernels/cpu/prebuilt/{isa.name}.so" for isa in X86_64}
MIB = 1 << 20


def ran(*command: object, **environment: str) -> str:
    """Standard output of a command of this checkout that succeeds."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` makes, with this Python's tools."""
    folder = tmp_path_factory.mktemp("dist")
    ran("make", "-o", ".venv/dev.stamp", "wheel", f"DIST={folder}", f"BIN={Path(sys.executable).parent}")
    return folder


def only(dist: Path, pattern: str) -> Path:
    (found,) = dist.glob(pattern)
    return found


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of an environment with the wheels in it, and else what Petal needs, and nothing of this checkout."""
    home = tmp_path_factory.mktemp("clean")
    ran(sys.executable, "-m", "venv", "--without-pip", home)
    wheels = only(dist, "*manylinux*.whl"), only(dist, "petal_drafter*.whl")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index")
    ran(*pip, *wheels)
    # Packages in a folder that a .pth file names are found, .pth files in it are not read: this checkout stays away.
    site = next(home.glob("lib*/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_sources_hold_whatever_tests_need(dist: Path) -> None:
    expected = {path.as_posix() for path in [*DATA, *SOURCES]}
    expected |= {"SECURITY.md", "docs/robustness.md", "tests/conftest.py", "tests/data/greedy.json", "Makefile"}
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        assert expected <= {name.partition("/")[2] for name in archive.getnames()}


def test_wheels_hold_what_they_are_named_for(dist: Path) -> None:
    ours = set(map(installed, [*DATA, *SOURCES])) - DRAFTER
    plain, native = only(dist, "petal_swarm*-none-any.whl"), only(dist, "petal_swarm*x86_64.whl")
    wheels = {plain: ours, native: ours | PREBUILT, only(dist, "petal_drafter*.whl"): DRAFTER}
    for wheel, expected in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/") and ".dist-info/" not in name}
            assert names == expected
        print(f"\n{wheel.stat().st_size / MIB:6.2f} MiB  {wheel.name}", end="")
    assert native.stat().st_size < 2 * MIB


@pytest.mark.parametrize("isa", isas(), ids=lambda isa: isa.name)
def test_prebuilt_kernels_compute_the_bits_of_compiled_ones(isa: Any, clean: Path, tmp_path: Path) -> None:
    """In an environment without a compiler, or a home in which one could have left something."""
    bits = "-m", "tests.support.product_bits"
    compiled = json.loads(ran(sys.executable, *bits, PETAL_ISA=isa.name))
    bare = {"PETAL_ISA": isa.name, "PATH": str(tmp_path), "CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    prebuilt = json.loads(ran(clean / "python", *bits, **bare))
    assert "prebuilt" in prebuilt["file"]
    assert "prebuilt" not in compiled["file"]
    assert prebuilt["isa"] == compiled["isa"] == isa.name
    assert len(compiled["bits"]) > 20
    assert prebuilt["bits"] == compiled["bits"]
    assert list(tmp_path.iterdir()) == []


def test_the_demo_runs_from_wheels(clean: Path, tmp_path: Path) -> None:
    """With the draft model that the second wheel brought, and without a compiler."""
    bare = {"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_DATA_HOME": str(tmp_path)}
    said = ran(clean / "petal", "demo", "Hi", "--peers", 2, "--drafter", "model", "--max-new-tokens", 8, **bare)
    assert len(said.split()) > 2


def test_the_sources_tests_run(dist: Path, tmp_path: Path) -> None:
    """Installed as an editable checkout, with the drafter where it lies."""
    shutil.unpack_archive(only(dist, "*.tar.gz"), tmp_path, filter="data")
    (sources,) = (path for path in tmp_path.iterdir() if path.is_dir())
    home = tmp_path / "home"
    ran(sys.executable, "-m", "venv", "--without-pip", home)
    site = next(home.glob("lib*/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", "--no-deps", "--no-index")
    ran(*pip, "--no-build-isolation", "--editable", sources)
    tests = ("test_package.py", "client/distill/test_parts.py", "protocol/test_tree.py", "kernels/test_gate.py")
    command = [home / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", "not full"]
    done = subprocess.run(
        [*map(str, command), *(f"tests/{test}" for test in tests)],
        cwd=sources,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout or "100%" in done.stdout
