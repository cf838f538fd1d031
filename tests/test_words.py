"""Words that the code has given up for those of its field; a reader should not have to learn them again."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapter

ROOT = Path(adapter.__file__).parent

WORDS = """
    Hand Lane LaneWork Settling Parked Ending Apart Stale Showing Peer Contexts Rules Spoken Words Said Heard Seen
    Batch Keys Place Letter Waiter Waiting Downloads Got Missing Fetch Call Present Polling Question
    Questions Incoming Outgoing Dispatching Publishing Downloading Sending Fetching Tidying Needs Parts Turns Beat
    Pace Shared Tasks AnsweredWithin Desk Guard Asked Answered Recall Watch LATE_S GONE_S NEWS_MS AT_ONCE CHANCES
    HOLD afresh anew any_of as_ending bury census departures doubt_limit first_of hurdle hush is_dead in_doubt lit
    lose_login mending needs peek peer_key regain_login remains resealing restarted rollcall shardwork stand_in
    starting stir suspect tallies tell_login telling tidy tidying told_in told_sure token_of text_of untold
    wait_up _bury _carry_out _erase _flowing _made _put_back _stumble _unsure _worry
"""
GIVEN_UP = frozenset(WORDS.split())
"""Names of anything in `adapter/`, but for the simulator."""
ENDS_GIVEN_UP = ("waits", "untold", "unnoted", "unstored", "left", "cut", "few", "late", "buried", "unerased")
"""Second words of events in the log: `noun.participle`."""


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if "simulator" not in path.relative_to(ROOT).parts]


def given_up(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in GIVEN_UP:
            yield f"line {token.start[0]}: {token.string}"
    for event in re.findall(r'log\.\w+\(\s*"(\w+\.\w+)"', source):
        if event.rpartition(".")[2].rpartition("_")[2] in ENDS_GIVEN_UP:
            yield f"event {event}"


@pytest.mark.parametrize("module", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_comes_back_that_was_given_up(module: Path) -> None:
    assert list(given_up(module.read_text())) == []
    assert module.stem not in GIVEN_UP


def test_a_word_that_comes_back_would_be_found() -> None:
    source = 'def told(needs):\n    """What needs no name."""\n    log.info(\n        "bus.waits"\n    )\n'
    assert list(given_up(source)) == ["line 1: needs", "event bus.waits"]
