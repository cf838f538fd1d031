"""What was released stays readable and keeps its promises: messages of every version, its schemas against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapter.contract import messages
from adapter.contract.messages import SCHEMA_VERSION
from tests.compat.freeze import HERE, NOW, found_breaks, is_sent

MESSAGES = sorted(HERE.glob("v*/messages/*.json"))


@pytest.mark.parametrize("path", MESSAGES, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_a_message_as_released_is_read_for_ever(path: Path) -> None:
    """And nothing that it says gets lost on the way."""
    raw = json.loads(path.read_bytes())
    read = msgspec.json.decode(path.read_bytes(), type=messages.MESSAGES[path.stem.partition("-")[0]])
    shape = json.loads((path.parents[1] / "schemas" / f"{path.stem.partition('-')[0]}.json").read_bytes())
    written = json.loads(msgspec.json.encode(read))
    for name, value in raw.items():
        field = shape["properties"].get(name)
        if field is not None and value != field.get("default"):
            assert covers(written[name], value), name


def covers(written: Any, value: Any) -> bool:
    """Whether all that `value` says is in `written`, which may say more, and leave out defaults of parts."""
    match written, value:
        case dict(), dict():
            return all(covers(written[name], part) for name, part in value.items() if name in written)
        case list(), list():
            return len(written) == len(value) and all(map(covers, written, value))
        case _:
            return bool(written == value)


def test_every_message_has_one_as_released() -> None:
    names = {path.stem.partition("-")[0] for path in NOW.glob("messages/*.json")}
    assert names == {path.stem for path in NOW.glob("schemas/*.json")}
    assert names
    assert NOW.name == f"v{SCHEMA_VERSION}"


def test_the_contract_keeps_what_this_version_has_promised() -> None:
    """A change that fails here needs another SCHEMA_VERSION; `python -m tests.compat.freeze` keeps a release."""
    assert found_breaks() == []


def test_who_reads_a_message_is_known() -> None:
    assert {name for name in messages.MESSAGES if not is_sent(name)} == {
        *("outbound", "bind", "unbind", "erase", "bindings_query", "window_query", "receipt_query", "replay_query"),
        *("login_start", "login_query", "login_verify", "media_query", "media_piece", "next_query"),
    }


# The rules, each by a contract of its own ------------------------------------------------------------
