"""The diagram in docs/explanation/conversation.md names what is in the code."""

from __future__ import annotations

import re
from pathlib import Path

from adapter.conversation import rules
from adapter.conversation.rules import Activity

PAGE = (Path(__file__).parents[2] / "docs" / "explanation" / "conversation.md").read_text("utf-8")
DIAGRAM = PAGE.partition("```mermaid")[2].partition("```")[0]


def test_every_activity_is_in_the_diagram_and_no_other() -> None:
    drawn = {name for edge in re.findall(r"(\w+) --> (\w+)", DIAGRAM) for name in edge}
    assert drawn == {activity.name for activity in Activity}


def test_its_inputs_are_those_of_the_rules() -> None:
    named = set(re.findall(r"\b[A-Z][a-z]+[A-Za-z]*\b", DIAGRAM))
    assert named
    assert {name for name in named if not isinstance(getattr(rules, name, None), type)} == set()
