"""Every course of small worlds: all answers of iLink, crashes between any two effects, and who goes on after them."""

from __future__ import annotations

import pytest

from adapter.conversation.rules import QueuedCommand
from tests.conversation.model import Explorer, command


@pytest.mark.parametrize(
    ("commands", "limits"),
    [
        pytest.param((command(1), command(2), command(3)), {"messages": 1, "crashes": 1, "failures": 1}, id="three"),
        pytest.param((command(1), command(2)), {"messages": 2, "crashes": 2, "failures": 2}, id="two_crashes"),
        pytest.param(
            (command(1, "a", "b"), command(2)), {"messages": 2, "crashes": 1, "failures": 2}, id="two_parts"
        ),
        pytest.param(
            (command(1), command(2, when_closed="refuse"), command(3, optional=True)),
            {"messages": 1, "crashes": 1, "failures": 1},
            id="refuse",
        ),
    ],
)
def test_every_course_of_a_small_world_keeps_the_guarantees(
    commands: tuple[QueuedCommand, ...], limits: dict[str, int]
) -> None:
    explorer = Explorer(commands)
    states = explorer.explore(explorer.begin(**limits))
    assert states > 1000
