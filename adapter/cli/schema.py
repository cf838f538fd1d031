"""`schema`: the messages of the bus as JSON Schemas, also for the files in `schemas/`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from adapter.cli import output
from adapter.cli.exits import OK, USAGE, Failed
from adapter.contract.messages import MESSAGES, SCHEMA_VERSION

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(message: Annotated[str, Parameter(help="Name of a message.")] = "", /) -> int:
    """Print the JSON Schema of a message of the bus; without a name, which there are."""
    if message not in MESSAGES:
        raise Failed(USAGE, f"Name a message, one of {', '.join(MESSAGES)}.")
    output.say(json.dumps(json_schema(message), indent=2, ensure_ascii=False))
    return OK


def json_schema(name: str) -> dict[str, Any]:
    """JSON Schema 2020-12 of one of `MESSAGES`, complete in itself."""
    kind = MESSAGES[name]
    definitions = definitions_of([kind], "#/$defs/{name}")
    root = definitions.pop(kind.__name__)
    schema = {"$schema": DIALECT, "$id": f"urn:wechat-nats:schema:{SCHEMA_VERSION}:{name}", **root}
    return schema | ({"$defs": dict(sorted(definitions.items()))} if definitions else {})


def definitions_of(kinds: Iterable[type[msgspec.Struct]], ref_template: str) -> dict[str, dict[str, Any]]:
    """What msgspec says of messages; docstrings without their indentation, which Python keeps before 3.13."""
    _, definitions = msgspec.json.schema_components(kinds, ref_template=ref_template)
    for definition in definitions.values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    # JSON Schema's $ is the end of the text, as Python's \Z; Python's $ would accept a line end before it
    text = msgspec.json.encode(definitions).replace(rb"\\Z", b"$")
    return msgspec.json.decode(text, type=dict[str, dict[str, Any]])
