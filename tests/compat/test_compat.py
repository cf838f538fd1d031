"""What was released stays readable and keeps its promises: messages of every version, its schemas against ours."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapter.contract import messages
from adapter.contract.messages import SCHEMA_VERSION
from tests.compat.freeze import HERE, NOW, found_breaks, is_sent
from tests.compat.rules import breaks

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


def test_what_is_gone_is_seen(tmp_path: Path) -> None:
    """Messages and subjects that the code does not know (any more)."""
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas/poke.json").write_text("{}")
    (tmp_path / "subjects.json").write_text('{"wechat.poke": ["poke", "receive", ""]}')
    assert found_breaks(tmp_path) == [
        "poke: the message is gone",
        "wechat.poke: carried ['poke', 'receive', ''], now None",
    ]


def test_who_reads_a_message_is_known() -> None:
    assert {name for name in messages.MESSAGES if not is_sent(name)} == {
        *("outbound", "bind", "unbind", "erase", "bindings_query", "window_query", "receipt_query", "replay_query"),
        *("login_start", "login_query", "login_verify", "media_query", "media_piece", "next_query"),
    }


# The rules, each by a contract of its own ------------------------------------------------------------

TAGGED = {
    "type": "object",
    "properties": {"kind": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["kind"],
}
BEFORE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "maxLength": 10, "pattern": "^a"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "count": {"type": "integer", "minimum": 1, "default": 5},
        "state": {"enum": ["on", "off"], "default": "on"},
        "items": {"type": "array", "items": {"anyOf": [{"$ref": "#/$defs/Text"}]}, "default": []},
        "part": {"$ref": "#/$defs/Part", "default": {}},
    },
    "required": ["id"],
    "$defs": {"Text": TAGGED, "Part": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """`BEFORE` with `value` at `path` (segments by `/`); None: taken away."""
    made = copy.deepcopy(BEFORE)
    *way, last = path.split("/")
    node = made
    for segment in way:
        node = node[segment]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return made


OK = ""
CHANGES: list[tuple[str, Any, str, str]] = [
    # path, value, what it means for what is sent, and for what is read
    ("description", "words", OK, OK),
    ("properties/more", {"type": "string", "default": ""}, OK, OK),
    ("properties/note", None, "note: it is gone", "note: it is gone"),
    ("properties/id/type", "integer", "id: string is gone", "id: string is gone"),
    ("required", ["id", "count"], "count: it is required now", "count: it is required now"),
    ("required", [], "id: it was always there", OK),
    ("properties/count/default", 6, "count: another default", "count: another default"),
    ("properties/count/type", "number", "count: integer is gone", OK),
    ("properties/count/minimum", 2, OK, "count: minimum was 1 and is 2"),
    ("properties/count/minimum", 0, "count: minimum was 1 and is 0", OK),
    ("properties/count/maximum", 9, OK, "count: maximum was None and is 9"),
    ("properties/id/maxLength", 9, OK, "id: maxLength was 10 and is 9"),
    ("properties/id/maxLength", None, "id: maxLength was 10 and is None", OK),
    ("properties/id/pattern", "^b", "id: pattern was ^a and is ^b", "id: pattern was ^a and is ^b"),
    ("properties/id/pattern", None, "id: pattern was ^a and is None", OK),
    ("properties/id/format", "date", OK, "id: format was None and is date"),
    ("properties/id/multipleOf", 2, "id: multipleOf is nothing", "id: multipleOf is nothing"),
    ("properties/note/anyOf", [{"type": "string"}], "note: null is gone", "note: null is gone"),
    (
        "properties/note/anyOf",
        [{"type": "string"}, {"type": "null"}, {"type": "integer"}],
        "note: integer is new",
        OK,
    ),
    ("properties/state/enum", ["on"], "state: 'off' is gone", "state: 'off' is gone"),
    ("properties/state/enum", ["on", "off", "idle"], "state: 'idle' is new", OK),
    ("properties/state", {"type": "string", "default": "on"}, "state: its values are free", OK),
    ("properties/id/enum", ["a"], OK, "id: its values are counted"),
    ("$defs/Text/properties/text/type", "integer", "items[].text: string is gone", "items[].text: string is gone"),
    ("$defs/Text/required", ["kind", "text"], "items[].text: it is required", "items[].text: it is required"),
    ("$defs/Part/properties/a", None, "part.a: it is gone", "part.a: it is gone"),
    (
        "properties/items/items/anyOf",
        [{"$ref": "#/$defs/Text"}, {**TAGGED, "properties": {"kind": {"enum": ["card"]}}}],
        OK,
        OK,
    ),
    (
        "$defs/Text/properties/kind/enum",
        ["words"],
        "items[]: kind 'text' is gone",
        "items[]: kind 'text' is gone",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "sent", "read"), CHANGES, ids=[f"{path}={json.dumps(value)}" for path, value, *_ in CHANGES]
)
def test_each_kind_of_change_is_judged(path: str, value: Any, sent: str, read: str) -> None:
    for verdict, is_sent_ in ((sent, True), (read, False)):
        found = breaks(BEFORE, changed(path, value), sent=is_sent_)
        if verdict:
            assert any(sentence.startswith(verdict) for sentence in found), found
        else:
            assert found == []
