"""What CONTRIBUTING.md names is there: the files of the adapter, what is in them, and the decisions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTION = TEXT.partition("## Where does it happen")[2].partition("\n## ")[0]
PLACES = sorted(set(re.findall(r"`([a-z_/]+\.py)(?:::(\w+))?`", SECTION)))


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_what_is_said_to_happen_somewhere_is_there(file: str, name: str) -> None:
    source = (ROOT / "adapter" / file).read_text()
    assert not name or re.search(rf"^ *(?:async def|def|class) {name}\b", source, re.MULTILINE)


def test_every_decision_that_is_named_was_made() -> None:
    made = set(re.findall(r"^(\d+)\. \*\*", TEXT, re.MULTILINE))
    reasons = [line.rstrip(" |").rpartition("|")[2] for line in SECTION.splitlines() if line.startswith("| ")][1:]
    assert reasons
    assert {number for cell in reasons for number in cell.replace(",", " ").split()} <= made
