"""What our two distributions say that they install: pyproject.toml, and that of client/drafters."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .imports import FOLDERS, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text("utf-8"))


PYPROJECT, DRAFTERS = read("pyproject.toml"), read("client/drafters/pyproject.toml")
DATA = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and path.suffix not in (".py", ".md", ".toml") and "__pycache__" not in path.parts
)


def package_folder(package: str) -> str:
    """Where a package lies here."""
    top = PYPROJECT["tool"]["setuptools"]["package-dir"].get(package)
    return top or package.removeprefix("petal.").replace(".", "/")


def listed_in(pyproject: dict[str, Any], data: list[Path]) -> list[Path]:
    """Files that a pattern of package-data names."""
    patterns = [
        f"{package_folder(package)}/{pattern}"
        for package, patterns in pyproject["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
    ]
    return [path for path in data if any(fnmatch(path.as_posix(), pattern) for pattern in patterns)]


def installed(path: Path) -> str:
    """What a file is called where it is installed."""
    return f"petal/{path.as_posix()}".replace("petal/client/top-level/", "petal/")
