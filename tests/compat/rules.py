"""What may change within one version of the contract: optional fields may come, the adapter may take more, no more.

Compares JSON Schemas as `adapter.cli.schema` writes them. A change is judged by who reads the message: readers
of what the adapter sends (`sent`) must find all that was promised; the adapter must take all that it took.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

Schema: TypeAlias = dict[str, Any]
UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems")
EXACT = ("pattern", "format", "contentEncoding", "const")
KNOWN = {
    *(*UPPER, *LOWER, *EXACT),
    *("type", "enum", "anyOf", "$ref", "properties", "additionalProperties", "required", "items", "default"),
    *("title", "description", "discriminator", "$schema", "$id", "$defs"),
}
"""A keyword that is none of these cannot be judged here, so that it counts as a break."""


class Side(NamedTuple):
    """A part of a schema, and the definitions that it refers to."""

    schema: Schema
    definitions: dict[str, Schema]

    def at(self, schema: Schema) -> Side:
        """Another part of the same document, looked up where it is a reference."""
        while "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]] | {
                key: value for key, value in schema.items() if key != "$ref"
            }
        return Side(schema, self.definitions)

    def alternatives(self) -> dict[str, Side]:
        """By what tells them apart: the tag of an object, else the type."""
        if "anyOf" not in self.schema:
            return {_label(self.schema): self}
        found = [side for one in self.schema["anyOf"] for side in self.at(one).alternatives().values()]
        return {_label(side.schema): side for side in found}


def breaks(before: Schema, after: Schema, *, sent: bool) -> list[str]:
    """What in `after` breaks the promise of `before`, as sentences; empty: it is compatible."""
    sides = [Side(schema, schema.get("$defs", {})) for schema in (before, after)]
    return sorted(set(_compare("", sides[0], sides[1], sent)))


def _compare(where: str, before: Side, after: Side, sent: bool) -> Iterator[str]:
    here = where or "the message"
    if before.schema.get("default") != after.schema.get("default"):
        yield f"{here}: another default, which is what absence means"
    olds, news = before.alternatives(), after.alternatives()
    for label, old in olds.items():
        new = news.get(label)
        if new is None and label == "integer" and not sent:
            new = news.get("number")
        if new is None:
            yield f"{here}: {label} is gone"
        else:
            yield from _compare_one(where, old, new, sent)
    if sent:
        for label in news.keys() - olds.keys():
            if not label.startswith("kind "):  # readers skip items of a kind that they do not know
                yield f"{here}: {label} is new, and readers do not expect it"


def _compare_one(where: str, before: Side, after: Side, sent: bool) -> Iterator[str]:
    here = where or "the message"
    old, new = before.schema, after.schema
    for keyword in sorted(new.keys() - KNOWN):
        yield f"{here}: {keyword} is nothing that can be judged"
    yield from _limits(here, old, new, sent)
    if "enum" in old or "enum" in new:
        yield from _values(here, old.get("enum"), new.get("enum"), sent)
    if "items" in old:
        yield from _compare(f"{where}[]", before.at(old["items"]), after.at(new["items"]), sent)
    if "additionalProperties" in old:  # a map
        a, b = (side.at(side.schema.get("additionalProperties", {})) for side in (before, after))
        yield from _compare(f"{where}{{}}", a, b, sent)
    required = set(new.get("required", ()))
    for name in sorted(required - set(old.get("required", ()))):
        yield f"{_join(where, name)}: it is required now, and messages without it are stored"
    if sent:
        for name in sorted(set(old.get("required", ())) - required):
            yield f"{_join(where, name)}: it was always there and is optional now"
    for name, field in old.get("properties", {}).items():
        if name in new["properties"]:
            yield from _compare(_join(where, name), before.at(field), after.at(new["properties"][name]), sent)
        else:
            yield f"{_join(where, name)}: it is gone"


def _limits(here: str, old: Schema, new: Schema, sent: bool) -> Iterator[str]:
    """Narrower is wrong for what is read, wider for what is sent."""
    for keyword in (*UPPER, *LOWER):
        a, b = old.get(keyword), new.get(keyword)
        if a == b:
            continue
        sign = 1 if keyword in UPPER else -1
        is_wider = b is None or (a is not None and sign * b > sign * a)
        if is_wider == sent:
            yield f"{here}: {keyword} was {a} and is {b}"
    for keyword in EXACT:
        a, b = old.get(keyword), new.get(keyword)
        if a != b and not (a is None and sent) and not (b is None and not sent):
            yield f"{here}: {keyword} was {a} and is {b}"


def _values(here: str, old: list[Any] | None, new: list[Any] | None, sent: bool) -> Iterator[str]:
    if old is None or new is None:
        if (new is None) == sent:
            yield f"{here}: its values are {'free' if new is None else 'counted'} now"
        return
    for value in sorted(set(old) - set(new)):
        yield f"{here}: {value!r} is gone"
    if sent:
        for value in sorted(set(new) - set(old)):
            yield f"{here}: {value!r} is new, and readers do not expect it"


def _label(schema: Schema) -> str:
    tag = schema.get("properties", {}).get("kind", {}).get("enum")
    if tag and len(tag) == 1:
        return f"kind {tag[0]!r}"
    if "type" in schema:
        return str(schema["type"])
    if "enum" in schema:
        return {str: "string", int: "integer"}[type(schema["enum"][0])]
    return "anything"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
