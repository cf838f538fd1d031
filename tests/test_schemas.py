"""`schemas/` says what `contract` does: generated, valid, and of one mind with msgspec about every sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from adapter.contract.messages import MESSAGES
from adapter.contract.names import Names
from adapter.settings import Settings, variable_of
from tests import generate

SCHEMAS = generate.ROOT / "schemas"
VALID = sorted((SCHEMAS / "samples" / "valid").glob("*.json"))
INVALID = sorted((SCHEMAS / "samples" / "invalid").glob("*.json"))


def name_of(sample: Path) -> str:
    """`inbound` of inbound-text.json."""
    return sample.stem.partition("-")[0]


def stored(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def references(node: Any) -> Iterator[str]:
    match node:
        case {"$ref": str(target)}:
            yield target
        case dict():
            for value in node.values():
                yield from references(value)
        case list():
            for value in node:
                yield from references(value)


def resolve(document: Any, target: str) -> Any:
    """Raises KeyError for a reference to nothing."""
    assert target.startswith("#/")
    for part in target[2:].split("/"):
        document = document[part]
    return document


def test_what_is_stored_is_what_the_code_says() -> None:
    """`make generate` writes it anew."""
    assert generate.stale_files() == []


@pytest.mark.parametrize("name", MESSAGES)
def test_every_schema_is_one(name: str) -> None:
    document = stored(name)
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert document["$id"] == f"urn:wechat-nats:schema:1:{name}"
    assert document["description"]
    Draft202012Validator.check_schema(document)
    for target in references(document):
        assert resolve(document, target)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_has_samples_of_both_kinds(name: str) -> None:
    assert name in {name_of(sample) for sample in VALID}
    assert name in {name_of(sample) for sample in INVALID}


@pytest.mark.parametrize("sample", VALID, ids=lambda path: path.stem)
def test_a_valid_sample_satisfies_schema_and_decoder(sample: Path) -> None:
    """And what the decoder made of it satisfies the schema again: readers see what we write, not what we read."""
    raw = sample.read_bytes()
    kind = MESSAGES[name_of(sample)]
    validator = Draft202012Validator(stored(name_of(sample)))
    validator.validate(json.loads(raw))
    decoded = msgspec.json.decode(raw, type=kind)
    written = msgspec.json.encode(decoded)
    validator.validate(json.loads(written))
    assert msgspec.json.decode(written, type=kind) == decoded


@pytest.mark.parametrize("sample", INVALID, ids=lambda path: path.stem)
def test_an_invalid_sample_satisfies_neither(sample: Path) -> None:
    raw = sample.read_bytes()
    assert not Draft202012Validator(stored(name_of(sample))).is_valid(json.loads(raw))
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(raw, type=MESSAGES[name_of(sample)])


def test_asyncapi_refers_to_what_it_holds() -> None:
    document = stored("asyncapi")
    assert document["asyncapi"] == "3.0.0"
    for target in references(document):
        assert resolve(document, target)
    for operation in document["operations"].values():
        assert operation["action"] in ("send", "receive")


def test_asyncapi_covers_every_message_and_has_no_discriminator() -> None:
    """AsyncAPI refuses the word as code generators use it; the single schemas keep it for them."""
    document = stored("asyncapi")
    carried = {message for channel in document["channels"].values() for message in channel["messages"]}
    assert carried == set(MESSAGES)
    assert "discriminator" not in json.dumps(document)
    assert "discriminator" in json.dumps(stored("inbound"))


def test_subjects_of_asyncapi_are_those_of_the_contract() -> None:
    names = Names()
    addresses = {channel["address"] for channel in stored("asyncapi")["channels"].values()}
    assert addresses == {
        None,
        *(names.live("{sandbox}"), names.out("{sandbox}"), names.out_plain),
        *(names.event("{sandbox}", kind) for kind in ("binding", "login")),
        *(
            *(
                f"wechat.event.{{sandbox}}.{verb}.{{command}}.{{sequence}}"
                for verb in ("receipt", "bind", "unbind", "erase")
            ),
            names.svc("receipt"),
            names.svc("receipt.{sandbox}"),
        ),
        *(names.said(verb, "{sandbox}") for verb in ("bind", "unbind", "erase")),
        *(names.svc("media.get.{sandbox}"), names.svc("media.put.{sandbox}")),
        *(names.svc(f"login.{verb}") for verb in ("start", "status", "verify", "cancel")),
        *(names.svc("bindings.list"), names.svc("bindings.get"), names.svc("window"), names.svc("replay")),
        *(names.svc(f"{verb}.{{sandbox}}") for verb in ("window", "replay", "next", "send")),
    }


def test_every_setting_explains_itself() -> None:
    rows = generate.settings_table()
    assert [row.variable.split("`")[0] for row in rows] == [
        variable_of(field) for field in Settings.__struct_fields__
    ]
    assert all(row.meaning.endswith(".") and len(row.meaning) > 15 for row in rows)
