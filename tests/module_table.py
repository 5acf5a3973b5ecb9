"""One line for each file, from its docstring: `python -m tests.module_table` writes them into docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
MARK = "<!-- made by `python -m tests.module_table`; a test compares -->\n"
FOLDERS = ("client", "peer", "protocol", "kernels")


def described() -> str:
    """The page's last part: a table for each folder."""
    return "\n".join(line for folder in FOLDERS for line in _tables(ROOT / folder))


def _tables(folder: Path) -> Iterator[str]:
    files = sorted(path for path in folder.glob("*.py") if "_pb2" not in path.name and _first_line(path))
    if files:
        yield f"\n**`{folder.relative_to(ROOT)}/`** {_first_line(folder / '__init__.py')}\n"
        yield from (f"- `{path.stem}`: {_first_line(path)}" for path in files if path.name != "__init__.py")
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and (path / "__init__.py").exists()):
        yield from _tables(inner)


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def main() -> None:
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(MARK) + len(MARK)] + described() + "\n")


if __name__ == "__main__":
    main()
