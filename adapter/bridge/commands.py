"""Reads commands: validates a message of `wechat.out` and splits it into parts. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec.structs import replace

from adapter.bridge import texts
from adapter.bridge.record import CommandRef
from adapter.contract.messages import (
    COMMAND_BYTES,
    CommandId,
    Outbound,
    OutFile,
    OutImage,
    OutText,
    OutVideo,
    OutVoice,
)
from adapter.contract.names import H_COMMAND, H_ORIGINAL, check_sandbox, is_sandbox
from adapter.errors import UNDECODABLE, Refused, Unreadable
from adapter.tools.decoding import without_halves
from adapter.tools.media_types import clean_file_name

PEER = re.compile(r"[!-~]{0,128}")
"""Id of a bot or user, which becomes part of a subject."""
_VALUE = re.compile(r"""value ['"]""")
"""The start of a rejected text that msgspec quotes, which ends at the path in backquotes or at the end."""
ID_CHARS = 128
"""Most characters of a command's id (contract.CommandId)."""
MAX_NAME = 128
"""Most characters of a file name."""
MERGE_SEPARATOR = "\n\n"
"""A blank line between merged texts: it ends a paragraph and a list in Markdown."""


LEFT_MS = 3600_000
"""Time that a command has left, of that for which it may wait, when it is due (`send_at_ms`)."""
TYPING_MS = 60_000
"""Age at which a command to show the typing indicator expires: nobody needs it shown late."""
PARTS = 10
"""Most parts of a split text: the sends of a window."""
FILLED = 0.9
"""Share of each part that is filled where a text needs more than PARTS otherwise (`texts.split`)."""


class Limits(msgspec.Struct, frozen=True):
    """Limits for commands."""

    park_ms: int
    part_chars: int
    part_bytes: int
    command_bytes: int = COMMAND_BYTES
    parts: int = PARTS


class MediaPart(NamedTuple):
    """Media to send, by a name in the object store or as bytes."""

    kind: Literal["image", "video", "file"]
    name: str
    """File name to show; "" if the sandbox gives none."""
    object: str
    """"" if `data` has the bytes."""
    data: bytes

    def __repr__(self) -> str:
        return f"MediaPart({self.kind!r})"  # keeps the content out of logs and tracebacks


Part: TypeAlias = str | MediaPart
"""What one request sends: a text or media."""


class Command(msgspec.Struct, frozen=True):
    """What a valid command asks for. `parts`: the texts and media to send, one request each."""

    bot: str
    """"" for the sandbox's only bot."""
    user: str
    """"" for the bot's user."""
    parts: list[Part]
    when_closed: Literal["park", "refuse"]
    expires_ms: int
    """A command that is unsent at this time is refused."""
    typing: Literal["", "on", "off"] = ""
    """Shows or hides the typing indicator. A command with this field has no parts."""
    cancel: str = ""
    """Id of the command to take back. A command with this field has no parts."""
    send_at_ms: int = 0
    """It is not sent before."""

    @property
    def kind(self) -> Literal["text", "media", "typing", "cancel", "unreadable"]:
        """Metrics label. Media with captions are media."""
        if self.typing or self.cancel:
            return "typing" if self.typing else "cancel"
        if MediaPart in map(type, self.parts):
            return "media"
        return "text" if self.parts else "unreadable"


def command_id(body_id: str | None, routed_id: str, msg_id: str, seq: int) -> str:
    """The idempotency key: the body's id, else that of the original (`identity_of`), else Nats-Msg-Id, else the
    sequence."""
    return body_id or routed_id or _bounded_id(msg_id) or str(seq)


def _bounded_id(ident: str) -> str:
    """An id of at most ID_CHARS. A hash replaces the cut-off end, since two long ids with the same beginning must
    stay different."""
    if len(ident) <= ID_CHARS:
        return ident
    return f"{ident[: ID_CHARS - 33]}~{hashlib.blake2b(ident.encode(), digest_size=16).hexdigest()}"


def decode_command(data: bytes, limits: Limits) -> Outbound:
    """Decodes the fields of a command. A malformed `sandbox` is kept, so that the command can be refused.

    A lone surrogate, as JavaScript and Python leave it where they cut a text, is replaced. Raises Unreadable for a
    body that is too large, no JSON, or does not match the schema.
    """
    if len(data) > limits.command_bytes:
        raise Unreadable("too_large", f"{len(data)} bytes; at most {limits.command_bytes} are read.")
    try:
        return msgspec.json.decode(data, type=Outbound)
    except UNDECODABLE as exc:
        if (whole := without_halves(data)) != data:
            return decode_command(whole, limits)
        if body := _decode_misaddressed(data):
            return body
        raise Unreadable("unreadable", _describe_error(exc)) from exc


def _decode_misaddressed(data: bytes) -> Outbound | None:
    """A body that is valid except for the form of its `sandbox`. It is refused instead of becoming a dead letter."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        sandbox = msgspec.json.decode(fields.pop("sandbox"), type=str)
        body = msgspec.json.decode(msgspec.json.encode(fields), type=Outbound)
    except (*UNDECODABLE, KeyError):
        return None
    return replace(body, sandbox=sandbox)


def salvage_ids(data: bytes, limits: Limits) -> Outbound:
    """The `id`, `sandbox` and `reply_to` of a body that is no valid command, each if it is valid itself. They go into
    the receipt, since the publisher waits for a receipt with that id."""
    if len(data) > limits.command_bytes:
        return Outbound()
    try:
        fields = msgspec.json.decode(without_halves(data), type=dict[str, msgspec.Raw])
    except UNDECODABLE:
        return Outbound()
    sandbox = _string_field(fields, "sandbox", str)
    return Outbound(
        id=_string_field(fields, "id", CommandId),
        sandbox=sandbox if is_sandbox(sandbox or "") else None,
        reply_to=_string_field(fields, "reply_to", str),
    )


def _string_field(fields: Mapping[str, msgspec.Raw], name: str, kind: Any) -> str | None:
    try:
        found: str = msgspec.json.decode(fields[name], type=kind)
    except (*UNDECODABLE, KeyError):
        return None
    return found


def sandbox_of(body: Outbound) -> str:
    """The sandbox of a command on plain `wechat.out`. Raises Refused("invalid")."""
    if not body.sandbox:
        raise Refused("invalid", "A command on plain wechat.out names its sandbox.")
    return check_sandbox(body.sandbox)


def read_command(body: Outbound, *, sandbox: str, stored_ms: int, limits: Limits) -> Command:
    """The command, addressed to `sandbox` by its subject. `stored_ms`: that of the original.

    Raises Refused("invalid"), Refused("too_long").
    """
    check_sandbox(sandbox)
    if body.sandbox is not None and body.sandbox != sandbox:
        raise Refused("invalid", f"The body names sandbox {body.sandbox[:64]!r}, the subject {sandbox!r}.")
    if [body.text, body.items, body.typing, body.cancel].count(None) != 3:
        raise Refused("invalid", "A command holds either text, items, typing or cancel.")
    if (body.bot and not PEER.fullmatch(body.bot)) or (body.user and not PEER.fullmatch(body.user)):
        raise Refused("invalid", "Bot and user are printable ASCII without spaces, at most 128 characters.")
    parts = _read_parts(body, sandbox, limits) if body.typing is body.cancel else []
    patience_ms = limits.park_ms if body.typing != "on" else min(limits.park_ms, TYPING_MS)
    if body.expires_in_s is not None:
        patience_ms = int(min(body.expires_in_s * 1000, patience_ms))
    if body.send_at_ms is not None:
        ahead_ms = limits.park_ms - LEFT_MS
        if not parts or not body.send_at_ms <= stored_ms + min(ahead_ms, patience_ms - 1):
            hours = f"{max(ahead_ms, 0) / 3600_000:g}"
            detail = (
                f"`send_at_ms` is for text and items, at most {hours} hours ahead, and before the command expires."
            )
            raise Refused("invalid", detail)
    return Command(
        bot=body.bot or "",
        user=body.user or "",
        parts=parts,
        when_closed="refuse" if body.typing else body.when_closed,  # it is never parked
        expires_ms=stored_ms + patience_ms,
        typing=body.typing or "",
        cancel=body.cancel or "",
        send_at_ms=body.send_at_ms or 0,
    )


def _read_parts(body: Outbound, sandbox: str, limits: Limits) -> list[Part]:
    """Raises Refused("invalid"), Refused("too_long")."""
    parts: list[Part] = []
    for item in body.items or [OutText(text=body.text or "")]:
        if isinstance(item, OutText):
            parts += _split_text(item.text, limits)
        else:
            if item.caption.strip():
                parts += _split_text(item.caption, limits)
            parts.append(_read_media_part(item, sandbox))
        if len(parts) > limits.parts and sum(isinstance(part, str) for part in parts) > limits.parts:
            raise _too_long(limits)
    return parts


def _split_text(text: str, limits: Limits) -> list[str]:
    """Splits one text. Raises Refused("invalid"), Refused("too_long")."""
    if len(text) > limits.parts * limits.part_chars:
        raise _too_long(limits)
    if not text.strip():
        raise Refused("invalid", "The text is empty.")
    parts = texts.split(text, limits.part_chars, limits.part_bytes)
    if len(parts) > limits.parts:
        parts = texts.split(text, limits.part_chars, limits.part_bytes, FILLED)
    return [texts.widen(part) for part in parts]


def _too_long(limits: Limits) -> Refused:
    return Refused("too_long", f"The text needs more than {limits.parts} messages; send it as a file.")


def _read_media_part(item: OutImage | OutVideo | OutFile | OutVoice, sandbox: str) -> MediaPart:
    """Raises Refused("invalid"), for example for an object of another sandbox."""
    if (item.media is None) == (item.data is None):
        raise Refused("invalid", "A media item holds either media (an object) or data.")
    object_name = item.media.object if item.media else ""
    if item.media and (not object_name.startswith(f"{sandbox}/") or object_name == f"{sandbox}/"):
        raise Refused("invalid", "A sandbox sends objects of its own only: <sandbox>/\u2026")
    kind: Literal["image", "video", "file"] = "file"  # audio too: a voice message would not be shown
    match item:
        case OutImage():
            kind = "image"
        case OutVideo():
            kind = "video"
    name = item.name or (item.media.name if item.media else "")
    return MediaPart(kind, clean_file_name(name, MAX_NAME), object_name, item.data or b"")


def client_id_base(sandbox: str, sequence: int, stored_ms: int) -> str:
    """The base of a command's client_ids, derived from its identity."""
    return hashlib.blake2b(f"{sandbox}|{sequence}|{stored_ms}".encode(), digest_size=12).hexdigest()


def client_id(base: str, part: int, merged: int = 0) -> str:
    """The client_id of one part: a repeat after a crash or a lost answer is the same message to WeChat.

    `merged`: number of later commands in the message. The same command sent alone is another message.
    """
    return f"wechat-nats:{base}-{part}" + (f"+{merged}" if merged else "")


def _describe_error(exc: Exception) -> str:
    """The message of the decoder with types and paths, but without values."""
    text = str(exc)
    if value := _VALUE.search(text):
        path = f" - at {text.rpartition(' - at ')[2]}" if text.endswith("`") else ""
        text = f"{text[: value.start()]}value{path}"
    return text[:200]


# copies -----------------------------------------------------------------------------------------------

_ORIGINAL = re.compile(r"([1-9][0-9]{0,18})\.([0-9]{1,16})")


def identity_of(headers: Mapping[str, str], sequence: int, time_ms: int) -> CommandRef:
    """The identity of the original for a copy by the router, else that of the message itself, whose `id` is "".

    `sequence`, `time_ms`: of the message; a copy has an identity with another sequence. Any author may write the
    header: one that names nothing earlier is ignored, and another one makes the command older, which is meant for no
    more persons, and expires no later.
    """
    found = _ORIGINAL.fullmatch(headers.get(H_ORIGINAL, ""))
    # a copy may be stored in the millisecond of its original
    if found is None or int(found[1]) >= sequence or int(found[2]) > time_ms:
        return CommandRef(sequence=sequence, stored_ms=time_ms, id="")
    ident = _bounded_id(headers.get(H_COMMAND, "")) or found[1]
    return CommandRef(sequence=int(found[1]), stored_ms=int(found[2]), id=ident)
