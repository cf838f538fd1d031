"""Messages of every shape that a user's phone is known to produce."""

import hashlib
import re
from collections.abc import Callable
from typing import NamedTuple

from adapter.simulator.records import Json, SimulatorError

QUOTED_ID = 7497484083968569737
IDLE: Json = {"button_item_list": [], "at_bot_username_list": []}
"""Two lists that every item has. Nobody has observed them with content."""
EDGE = 8
"""Number of characters at each end that identify a part of a text."""
TITLES = {2: "[Image]", 3: "[Voice]", 4: "[File]", 5: "[Video]"}


class Quoted(NamedTuple):
    """An earlier message of the user or of the bot, as a quote refers to it."""

    id: int | str
    """The id in `svr_id`."""
    msg_id: int | str
    """The id in the quoted item."""
    item: Json
    at_ms: int

    @property
    def text(self) -> str:
        return str(self.item.get("text_item", {}).get("text") or "")

    @property
    def title(self) -> str:
        return self.text or TITLES.get(self.item.get("type", 0), "")


class Makings(NamedTuple):
    """The parts of a message. `media` makes the item of a kind. `carrier` is the kind of the item with the quote. The
    quote means `part` of the quoted text (None: the last word), at its `nth` occurrence (from 0).
    """

    bot: str
    user: str
    words: str
    media: Callable[[str], Json]
    quoted: Quoted
    carrier: str = "text"
    part: str | None = None
    nth: int = 0

    def item(self, kind: str) -> Json:
        if kind == "text":
            return text_item(self.words)
        if kind == "voice_transcript":
            item = self.media("voice")
            item["voice_item"]["text"] = self.words
            return item
        return self.media(kind)


def text_item(text: str) -> Json:
    return {"type": 1, "is_completed": True, "text_item": {"text": text}}


def text(words: str) -> Json:
    return {"item_list": [text_item(words)]}


def items(*kinds: str) -> Callable[[Makings], Json]:
    return lambda m: {"item_list": [m.item(kind) for kind in kinds]}


def changed(**fields: object) -> Callable[[Makings], Json]:
    """A text message with changed fields; None leaves a field out."""
    return lambda m: text(m.words) | fields


def bot_echo(m: Makings) -> Json:
    """A message of the bot that comes back to it."""
    return text(m.words) | {"message_type": 2, "from_user_id": m.bot, "to_user_id": m.user, "context_token": None}


def quoting(reference: Callable[[Makings], Json]) -> Callable[[Makings], Json]:
    return lambda m: {"item_list": [m.item(m.carrier) | {"ref_msg": reference(m)}]}


def nested_transcript(m: Makings) -> Json:
    item = m.media("voice")
    item["voice_item"]["text_item"] = {"text": m.words}
    return {"item_list": [item]}


def full(m: Makings) -> Json:
    """Form of a quote until April 2026: the whole quoted message."""
    return {"title": m.quoted.title, "message_item": m.quoted.item | {"msg_id": m.quoted.msg_id}}


def type_8(m: Makings) -> Json:
    """Form since April 2026 for messages of bots: an id without text (T #23)."""
    return {"title": "", "message_item": {"type": 8, "msg_id": m.quoted.msg_id, "is_completed": True}}


def type_0(m: Makings) -> Json:
    """Form observed in July 2026: times and an id, without text (T #222)."""
    times = {"create_time_ms": m.quoted.at_ms, "update_time_ms": m.quoted.at_ms}
    return {"message_item": {"type": 0, **times, "msg_id": m.quoted.msg_id, "is_completed": True} | IDLE}


def svr_id(m: Makings) -> Json:
    """Form since September 2026: only the id."""
    return {"svr_id": m.quoted.id}


def partial(m: Makings) -> Json:
    part = m.quoted.text.split()[-1:] if m.part is None else [m.part]
    return {"svr_id": m.quoted.id, "partial_text": partial_text(m.quoted.text, "".join(part), m.nth)}


def partial_text(whole: str, part: str, nth: int = 0) -> Json:
    """The position of `part` in `whole`, by its first and last characters. Occurrences do not overlap."""
    places = [match.start() for match in re.finditer(f"(?={re.escape(part)})", whole)] if part else []
    if nth >= len(places):
        raise SimulatorError("the quoted text has no such part")
    start, end, place = part[:EDGE], part[-EDGE:], places[nth]
    starts, ends = occurrences(whole, start), occurrences(whole, end)
    last = place + len(part) - len(end)
    if place not in starts or last not in ends:
        raise SimulatorError("the first and last characters do not identify this part")
    return {
        "start": start,
        "end": end,
        "startindex": starts.index(place),
        "endindex": ends.index(last),
        "quotemd5": hashlib.md5(part.encode()).hexdigest(),
    }


def occurrences(whole: str, part: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(part), whole)]


KINDS: dict[str, Callable[[Makings], Json]] = {
    "text": items("text"),
    "image": items("image"),
    "voice": items("voice"),
    "voice_transcript": items("voice_transcript"),
    "voice_nested_transcript": nested_transcript,
    "file": items("file"),
    "video": items("video"),
    "multi_item": lambda m: {"item_list": [text_item(m.words), text_item("second item")]},
    "text_and_image": items("text", "image"),
    "image_and_text": items("image", "text"),
    "text_and_file": items("text", "file"),
    "several_images": items("image", "image", "image"),
    "all_items": items("text", "image", "voice", "file", "video"),
    "unknown_item": lambda m: {"item_list": [{"type": 99, "new_item": {"text": m.words}}]},
    "unknown_beside_text": lambda m: {"item_list": [{"type": 99, "new_item": {}}, text_item(m.words)]},
    "no_context_token": changed(context_token=None),
    "no_message_id": changed(message_id=None),
    "zero_message_id": changed(message_id=0),
    "empty_message_id": changed(message_id=""),
    "string_message_id": changed(message_id="7497484083968569739"),
    "bot_echo": bot_echo,
    "big_id": changed(message_id=2**64 - 1),
    "emoji": lambda m: text(f"{m.words} 😀👩‍👩‍👧 𠮷 你好"),
    "empty_text": lambda m: text(""),
    "no_items": lambda m: {"item_list": []},
    "quote_full": quoting(full),
    "quote_type_8": quoting(type_8),
    "quote_type_0": quoting(type_0),
    "quote_svr_id": quoting(svr_id),
    "quote_partial": quoting(partial),
    "quote_empty": quoting(lambda m: {}),
}
"""The makers of messages, by kind."""
NEVER_SAID = Quoted(QUOTED_ID, str(QUOTED_ID), text_item("hello world"), 1_789_000_000_000)
"""Quoted message that never existed."""


def of_kind(kind: str, makings: Makings) -> Json:
    if kind not in KINDS:
        raise SimulatorError(f"unknown kind {kind}, there are {', '.join(KINDS)}")
    return KINDS[kind](makings)
