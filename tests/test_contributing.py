"""What CONTRIBUTING.md and the map of the code name is there: files of the adapter, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where does it happen")[2].partition("\n## ")[0]
PLACES = sorted(set(re.findall(r"`([a-z_/]+\.py)(?:::(\w+))?`", SECTION)))
MAP = (ROOT / "docs/code-map.md").read_text().partition("```\nadapter/\n")[2].partition("\nhelm/")[0]


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_what_is_said_to_happen_somewhere_is_there(file: str, name: str) -> None:
    source = (ROOT / "adapter" / file).read_text()
    assert not name or re.search(rf"^ *(?:async def|def|class) {name}\b", source, re.MULTILINE)


def test_the_map_of_the_code_has_the_files_that_there_are() -> None:
    """A line that is indented further names files of the folder above it."""
    folder = ROOT / "adapter"
    absent, seen = [], 0
    for line in MAP.splitlines():
        names = re.findall(r"[a-z_]+(?:\.py|/)", line.strip().partition("   ")[0])
        if not line.startswith("    "):
            folder = ROOT / "adapter" / (names[0] if names[0].endswith("/") else "")
            names = names if folder == ROOT / "adapter" else [""]
        seen += len(names)
        absent += [name for name in names if not (folder / name).exists()]
    assert seen > 50
    assert absent == []
