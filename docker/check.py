"""Where no Docker engine runs: do the steps of the Dockerfile's CPU image in a clean folder, as they stand there.

`python docker/check.py [--folder DIR]`. Paths of the image (/src, /opt/petal, /data) become folders in DIR. Steps that
change the machine itself (apt-get, useradd) are printed and left out; python:3.11-slim becomes this Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("build", "base", "cpu")
ON_THE_MACHINE = ("apt-get", "useradd")


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Instruction and arguments, continued lines joined, comments dropped."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            yield word, rest


class Image:
    """A folder that stands for an image's root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workdir = "/"
        self.environment = dict(os.environ)
        self.environment.pop("PYTHONPATH", None)

    def here(self, path: str) -> str:
        return str(self.folder / os.path.join(self.workdir, path).lstrip("/"))

    def do(self, word: str, rest: str) -> None:
        if word == "WORKDIR":
            self.workdir = rest
            Path(self.here(rest)).mkdir(parents=True, exist_ok=True)
        elif word == "ARG":
            name, _, default = rest.partition("=")
            self.environment.setdefault(name, default.strip('"'))
        elif word == "COPY":
            self._copy(shlex.split(rest))
        elif word == "RUN":
            self._run(rest)

    def _copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            return  # the stages share one folder here
        *sources, target = words
        for source in sources:
            place = Path(self.here(target))
            place = place / source if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=ignored)
            else:
                shutil.copy(ROOT / source, place)

    def _run(self, command: str) -> None:
        if any(word in command for word in ON_THE_MACHINE):
            print(f"left out: {command}")
            return
        command = re.sub(r"(?<![\w.])/(opt|data)\b", lambda found: f"{self.folder}/{found[1]}", command)
        command = re.sub(r"^python\b", shlex.quote(sys.executable), command)
        print(f"run: {command}", flush=True)
        subprocess.run(["sh", "-euc", command], cwd=self.here("."), env=self.environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="an empty folder; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="petal-image-") as temporary:
        image = Image(options.folder or Path(temporary))
        stage = ""
        for word, rest in instructions((ROOT / "docker" / "Dockerfile").read_text()):
            if word == "FROM":
                stage = rest.split()[-1]
            elif stage in STAGES:
                image.do(word, rest)
        health = [str(image.folder / "opt/petal/bin/python"), image.here("/opt/health.py")]
        dead = subprocess.run(health, env={**image.environment, "PETAL_PORT": "1"}, capture_output=True, check=False)
        assert dead.returncode != 0, "the health check calls nothing healthy"
        print("every step of the CPU image works")


if __name__ == "__main__":
    main()
