"""What the documents name is there: files of the adapter and of the tests, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs import PAGES, ROOT

NAMED = re.compile(r"(?<![\w./*-])((?:[\w.-]+/)*[\w-]+\.py(?=::)|(?:adapter|tests)/[\w./-]*[\w/])(?:::(\w+)(…?))?")
"""A path below `adapter/` or `tests/`, or a file with a name in it, which `…` may cut short."""
MAP = ROOT / "docs/code-map.md"
TABLES = ["docs/code-map.md", "docs/explanation/architecture.md"]


def test_the_map_of_the_code_has_each_module_once() -> None:
    """In the first column of its tables. A module without its folder is in that of the heading."""
    named, folder = [], ""
    for line in MAP.read_text("utf-8").partition("\n## Below all rooms")[2].splitlines():
        if line.startswith("## "):
            folder = next(iter(re.findall(r"^## `(\w+/)`", line)), "")
        elif line.startswith("| `"):
            modules = re.findall(r"`([\w/]+\.py)`", line.split(" | ")[0])
            named += [
                module if "/" in module or module in ("__main__.py", "entry.py") else folder + module
                for module in modules
            ]
    root = ROOT / "adapter"
    there = [str(path.relative_to(root)) for path in root.rglob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(module for module in there if not module.startswith("simulator/"))


def lost_names(page: Path, text: str) -> list[str]:
    """Paths and names in a text of a page that are nowhere. A path may begin at the checkout, in `adapter/`, in
    `tests/` or beside the page."""
    lost, boundary = [], r"\b"
    for found in NAMED.finditer(text):
        path, name, rest = found.groups()
        files = [base / path for base in (ROOT, ROOT / "adapter", ROOT / "tests", page.parent)]
        files = [file for file in files if file.exists()]
        if name:
            definition = re.compile(rf"^ *(?:async def |def |class )?{name}{'' if rest else boundary}", re.MULTILINE)
            files = [file for file in files if definition.search(file.read_text("utf-8"))]
        if not files:
            lost.append(found.group())
    return lost


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_names_is_there(page: Path) -> None:
    assert lost_names(page, page.read_text("utf-8")) == []


BEHIND = re.compile(r"`([\w/]+\.py)`((?:,? (?:`(?![\w/]+\.py`)[\w.]+`|[A-Z][A-Z_]+\b))+)")
"""A file, and names in it: functions and classes in backticks, constants as they are."""


@pytest.mark.parametrize("page", TABLES)
def test_files_are_there(page: str) -> None:
    """Those with a folder; one without is in the folder of its heading."""
    files = set(re.findall(r"`([\w-]+/[\w/-]+\.\w+)`", (ROOT / page).read_text("utf-8")))
    assert len(files) > 10
    assert [
        each for each in sorted(files) if not any((base / each).exists() for base in (ROOT, ROOT / "adapter"))
    ] == []


@pytest.mark.parametrize("page", TABLES)
def test_names_behind_a_file_are_in_it(page: str) -> None:
    found = BEHIND.findall((ROOT / page).read_text("utf-8"))
    named = [(file, name) for file, names in found for name in re.findall(r"(\w+)(?=`|,|$| )", names)]
    assert len(named) > 10
    absent = []
    for file, name in named:
        path = ROOT / file if file.startswith("tests/") else ROOT / "adapter" / file
        definition = rf"^ *(?:async def |def |class ){name}\b|^[A-Z_, ]*\b{name}\b"
        if not re.search(definition, path.read_text("utf-8"), re.MULTILINE):
            absent.append((file, name))
    assert absent == []
