"""What the pages say of the code is so: every file has its line, links lead somewhere, the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.module_table import MARK, PAGE, ROOT, described

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_every_file_has_its_line():
    assert PAGE.read_text().partition(MARK)[2].strip() == described().strip(), "run `python -m tests.module_table`"


def test_the_readme_is_what_a_newcomer_needs():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    broken = [
        target
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        if not target.startswith(("http://", "https://")) and not (page.parent / target).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_and_modules_that_a_page_names_are_there(page: Path):
    text = page.read_text()
    files = re.findall(r"`((?:client|peer|protocol|kernels|tests|docker|docs)/[\w./-]*\w)`", text)
    modules = [name.replace(".", "/") for name in re.findall(r"-m (tests(?:\.\w+)+)", text)]
    places = [*files, *modules]
    gone = [place for place in places if not any((ROOT / end).exists() for end in (place, f"{place}.py"))]
    assert gone == []
