"""Every course of small worlds: answers of iLink, bindings, crashes between any two effects, and who goes on then."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapter.conversation.record import CommandRef
from adapter.conversation.rules import QueuedCommand
from tests.conversation.model import MEDIA, Explorer, command, copy

TWICE = command(2, ref=CommandRef(sequence=2, stored_ms=2, id="c1"))
"""Another command with the id of the first one."""


@pytest.mark.parametrize(
    ("commands", "limits", "world"),
    [
        pytest.param(
            (command(1), command(2), command(3)), {"messages": 2, "crashes": 1, "failures": 1}, {}, id="merged"
        ),
        pytest.param(
            (command(1), command(2)),
            {"messages": 2, "crashes": 2, "failures": 2},
            {"answers": ("accepted", "unheard", "throttled", "rejected")},
            id="two_crashes",
        ),
        pytest.param(
            (command(1, "a", "b"), command(2)),
            {"messages": 2, "crashes": 1, "failures": 2},
            {"answers": ("accepted", "unconfirmed", "unheard", "throttled", "not_taken")},
            id="two_parts",
        ),
        pytest.param(
            (command(1), command(2, when_closed="refuse"), command(3, optional=True)),
            {"messages": 1, "crashes": 1, "failures": 2},
            {},
            id="impatient",
        ),
        pytest.param(
            (command(1), command(2)),
            {"messages": 2, "crashes": 1, "failures": 2, "binds": 1},
            {"answers": ("accepted", "token", "unheard")},
            id="lost_login",
        ),
        pytest.param(
            (command(1, "a", "b"),),
            {"messages": 1, "crashes": 1, "failures": 1, "binds": 2},
            {"answers": ("accepted", "lost", "unheard", "token"), "bots": ("b1", "b2", "dead")},
            id="another_bot",
        ),
        pytest.param(
            (command(1), command(2, "a", "b")),
            {"messages": 1, "crashes": 1, "failures": 2, "binds": 2},
            {"answers": ("accepted", "unconfirmed", "unheard", "rejected"), "bots": ("none", "b1")},
            id="unbound",
        ),
        pytest.param(
            (command(1, "a", MEDIA), command(2)),
            {"messages": 1, "crashes": 1, "failures": 1, "binds": 1},
            {"answers": ("accepted", "unheard", "token"), "bots": ("b1", "b2", "none")},
            id="media",
        ),
        pytest.param(
            (command(1), TWICE, copy(3, command(1)), command(4)),
            {"messages": 2, "crashes": 1, "failures": 1},
            {},
            id="repeats",
        ),
    ],
)
def test_every_course_of_a_small_world_keeps_the_guarantees(
    commands: tuple[QueuedCommand, ...], limits: dict[str, int], world: dict[str, Any]
) -> None:
    explorer = Explorer(commands, **world)
    assert explorer.explore(explorer.begin(**limits)) > 1000


LARGE = (
    command(1),
    command(2, "a", "b", "c"),
    command(3, expires_ms=2_000_000),
    command(4, ref=CommandRef(sequence=4, stored_ms=4, id="c1")),
    command(5),
    command(6, "d", MEDIA),
    command(7, when_closed="refuse"),
    command(8),
    copy(9, command(8)),
)


@settings(max_examples=100)
@given(choices=st.lists(st.integers(0, 20), min_size=60, max_size=120))
def test_any_course_of_a_large_world_keeps_the_guarantees(choices: list[int]) -> None:
    explorer = Explorer(LARGE)
    explorer.walk(explorer.begin(messages=9, crashes=4, failures=12, binds=4), choices)
