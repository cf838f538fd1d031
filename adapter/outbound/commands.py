"""Reads commands: validates a message of `wechat.out`, splits it into parts, merges texts. Pure."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from adapter.contract import (
    CommandId,
    Outbound,
    OutFile,
    OutImage,
    OutText,
    OutVideo,
    OutVoice,
)
from adapter.errors import UNDECODABLE, Refused, Unreadable
from adapter.mending import without_halves
from adapter.names import check_sandbox, is_sandbox
from adapter.outbound.split import MAX_BYTES, is_open, split, to_plain

_PEER = re.compile(r"[!-~]{0,128}")
"""A bot's or user's id: it becomes part of a subject."""
_VALUE = re.compile(r"""value (['"]).*\1(?= - at |$)""", re.DOTALL)
"""What msgspec quotes of a text that it does not take."""
ID_CHARS = 128
"""Characters of a command's id (contract.CommandId)."""
MAX_NAME = 128
"""Characters of a file name."""
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that a file name is rid of."""
MERGED_AT_ONCE = 32
"""Texts in one merged message, at most: as many ids as a user's record remembers (window.DONE_IDS)."""
_BETWEEN = "\n\n"
"""Between merged texts: a blank line, which ends a paragraph and a list in Markdown and reads well without it."""


TYPING_MS = 300_000
"""Age at which a command to show that the bot types has expired."""


class Limits(NamedTuple):
    """The settings that bound a command."""

    command_bytes: int
    text_chars: int
    parts: int
    park_ms: int
    typing_ms: int = TYPING_MS


class MediaPart(NamedTuple):
    """Media to send, by a name in the object store or as bytes."""

    kind: Literal["image", "video", "file"]
    name: str
    """As the user shall see it; "" where the sandbox names none."""
    object: str
    """"" where the bytes are here."""
    data: bytes

    def __repr__(self) -> str:
        return f"MediaPart({self.kind!r})"  # what is in it never gets into a log or traceback


class Command(NamedTuple):
    """A command that can be carried out. `parts`: the texts and media to send, one request each."""

    id: str
    client: str
    """Base of the client_ids of its parts: the same whenever this command is sent again, another for any other."""
    sandbox: str
    bot: str
    """"" where the sandbox's only bot is meant."""
    user: str
    """"" where the bot's user is meant."""
    parts: list[str | MediaPart]
    when_closed: Literal["park", "refuse"]
    stored_ms: int
    """When it was stored first: of a copy of the router's, when what was copied was."""
    expires_ms: int
    """Unsent by then, it is refused."""
    typing: Literal["", "on", "off"] = ""
    """Instead of parts: show or hide that the bot types."""
    final: bool = False
    """It may take the sends that are kept back."""
    reply_to: str = ""
    """The inbound message that it answers."""
    time_ms: int = 0
    """When this copy of it was stored, from which `client` follows."""
    merged: tuple[Command, ...] = ()
    """Later commands whose texts are in this one's only part, and which share its fate."""

    @property
    def kind(self) -> Literal["text", "media", "typing", "unreadable"]:
        """For the metrics; media with captions are media."""
        if self.typing:
            return "typing"
        if any(isinstance(part, MediaPart) for part in self.parts):
            return "media"
        return "text" if self.parts else "unreadable"


def stand_in(ident: str, client: str, sandbox: str, stored_ms: int) -> Command:
    """Stands for a command that cannot be carried out, so that it can have its receipt."""
    return Command(
        id=ident,
        client=client,
        sandbox=sandbox,
        bot="",
        user="",
        parts=[],
        when_closed="refuse",
        stored_ms=stored_ms,
        expires_ms=0,
    )


def command_id(body_id: str | None, routed_id: str, msg_id: str, seq: int) -> str:
    """The idempotency key: the body's, else the one that the router found, else Nats-Msg-Id, else the sequence."""
    return body_id or _fitting(routed_id) or _fitting(msg_id) or str(seq)


def _fitting(ident: str) -> str:
    """An id as records have room for: cut off alone, two long ones that begin alike would be one, and the second
    command be dropped as a repeat."""
    if len(ident) <= ID_CHARS:
        return ident
    return f"{ident[: ID_CHARS - 33]}~{hashlib.blake2b(ident.encode(), digest_size=16).hexdigest()}"


def peek(data: bytes, limits: Limits) -> Outbound:
    """The message's fields; a `sandbox` of another form than a sandbox's is kept, for the readers to refuse.

    Half an emoji, as programs in JavaScript and Python leave it where they cut a text, costs no more than itself.
    Raises Unreadable for what is too large, no JSON, or otherwise not of the schema.
    """
    if len(data) > limits.command_bytes:
        raise Unreadable("too_large", f"{len(data)} bytes; at most {limits.command_bytes} are read.")
    try:
        return msgspec.json.decode(data, type=Outbound)
    except UNDECODABLE as exc:
        if (whole := without_halves(data)) != data:
            return peek(whole, limits)
        if body := _misaddressed(data):
            return body
        raise Unreadable("unreadable", _harmless(exc)) from exc


def _misaddressed(data: bytes) -> Outbound | None:
    """A body that is right but for the form of its `sandbox`: a wrong address is refused, and no dead letter."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        sandbox = msgspec.json.decode(fields.pop("sandbox"), type=str)
        body = msgspec.json.decode(msgspec.json.encode(fields), type=Outbound)
    except (*UNDECODABLE, KeyError):
        return None
    return msgspec.structs.replace(body, sandbox=sandbox)


def remains(data: bytes, limits: Limits) -> Outbound:
    """What a body that is no command says of itself: `id` and `sandbox`, each where it is one. Under another name its
    publisher would wait for the receipt in vain."""
    if len(data) > limits.command_bytes:
        return Outbound()
    try:
        fields = msgspec.json.decode(without_halves(data), type=dict[str, msgspec.Raw])
    except UNDECODABLE:
        return Outbound()
    sandbox = _field(fields, "sandbox", str)
    return Outbound(id=_field(fields, "id", CommandId), sandbox=sandbox if is_sandbox(sandbox or "") else None)


def _field(fields: Mapping[str, msgspec.Raw], name: str, kind: Any) -> str | None:
    try:
        found: str = msgspec.json.decode(fields[name], type=kind)
    except (*UNDECODABLE, KeyError):
        return None
    return found


def sandbox_of(body: Outbound) -> str:
    """The sandbox that a command on plain `wechat.out` names. Raises Refused("invalid")."""
    if not body.sandbox:
        raise Refused("invalid", "A command on plain wechat.out names its sandbox.")
    return check_sandbox(body.sandbox)


def since_ms(since: str, time_ms: int) -> int:
    """When a command was stored first: a copy of the router's, which may come late, when the one that was copied was.

    `since`: the header. Only what is earlier counts: a sandbox writes headers as it likes.
    """
    return min(time_ms, int(since)) if since.isascii() and since.isdecimal() and len(since) < 16 else time_ms


def first_seq(copied: str, seq: int) -> int:
    """The sequence under which a command was stored first. `copied`: the header, as of `since_ms`."""
    earlier = copied.isascii() and copied.isdecimal() and 0 < len(copied) < 20
    return min(seq, int(copied)) if earlier else seq


def read_command(
    body: Outbound, *, sandbox: str, ident: str, time_ms: int, limits: Limits, since: str = ""
) -> Command:
    """The command, addressed to `sandbox` by its subject, and stored at `time_ms`. `since`: the header of a copy.

    Raises Refused("invalid"), Refused("too_long").
    """
    check_sandbox(sandbox)
    if body.sandbox is not None and body.sandbox != sandbox:
        raise Refused("invalid", f"The body names sandbox {body.sandbox[:64]!r}, the subject {sandbox!r}.")
    if [body.text, body.items, body.typing].count(None) != 2:
        raise Refused("invalid", "A command holds either text, items or typing.")
    if not _PEER.fullmatch(body.bot or "") or not _PEER.fullmatch(body.user or ""):
        raise Refused("invalid", "Bot and user are printable ASCII without spaces, at most 128 characters.")
    parts = _parts(body, sandbox, limits) if body.typing is None else []
    patience_ms = limits.park_ms if body.typing != "on" else min(limits.park_ms, limits.typing_ms)
    if body.expires_in_s is not None:
        patience_ms = int(min(body.expires_in_s * 1000, patience_ms))
    stored_ms = since_ms(since, time_ms) if since else time_ms
    return Command(
        id=ident,
        client=hashlib.blake2b(f"{sandbox}|{ident}|{time_ms}".encode(), digest_size=12).hexdigest(),
        sandbox=sandbox,
        bot=body.bot or "",
        user=body.user or "",
        parts=parts,
        when_closed="refuse" if body.typing else body.when_closed,  # it is never parked
        stored_ms=stored_ms,
        expires_ms=stored_ms + patience_ms,
        typing=body.typing or "",
        final=body.final,
        reply_to=body.reply_to or "",
        time_ms=time_ms,
    )


def _parts(body: Outbound, sandbox: str, limits: Limits) -> list[str | MediaPart]:
    """Raises Refused("invalid"), Refused("too_long")."""
    parts: list[str | MediaPart] = []
    chars = sum(len(item.text if isinstance(item, OutText) else item.caption) for item in body.items or ())
    if chars > limits.parts * limits.text_chars * 2:
        raise _too_long(limits)
    for item in body.items or [OutText(text=body.text or "")]:
        if isinstance(item, OutText):
            parts += _texts(item.text, body.format, limits)
        else:
            if item.caption.strip():
                parts += _texts(item.caption, body.format, limits)
            parts.append(_media(item, sandbox))
        if sum(isinstance(part, str) for part in parts) > limits.parts:
            raise _too_long(limits)
    return parts


def _texts(text: str, form: Literal["markdown", "plain"], limits: Limits) -> list[str]:
    """One text, cut. Raises Refused("invalid"), Refused("too_long")."""
    if len(text) > limits.parts * limits.text_chars * (2 if form == "plain" else 1):
        raise _too_long(limits)  # known before anything is read: reading Markdown takes its time
    shown = to_plain(text) if form == "plain" else text
    if not shown.strip():
        raise Refused("invalid", "The text is empty.")
    return split(shown, limits.text_chars)


def _too_long(limits: Limits) -> Refused:
    return Refused("too_long", f"The text needs more than {limits.parts} messages; send it as a file.")


def _media(item: OutImage | OutVideo | OutFile | OutVoice, sandbox: str) -> MediaPart:
    """Raises Refused("invalid"): above all for an object of another sandbox."""
    if (item.media is None) == (item.data is None):
        raise Refused("invalid", "A media item holds either media (an object) or data.")
    given = item.media.object if item.media else ""
    if item.media and (not given.startswith(f"{sandbox}/") or given == f"{sandbox}/"):
        raise Refused("invalid", "A sandbox sends objects of its own only: <sandbox>/\u2026")
    kind: Literal["image", "video", "file"] = "file"  # audio too: a voice message would not be shown (4.7)
    match item:
        case OutImage():
            kind = "image"
        case OutVideo():
            kind = "video"
    name = item.name or (item.media.name if item.media else "")
    return MediaPart(kind, _clean(name), given, item.data or b"")


def _clean(name: str) -> str:
    """A file name without folders, control and invisible characters, its ending kept where it must be cut."""
    name = "".join(c for c in re.split(r"[/\\]", name)[-1] if unicodedata.category(c) not in _UNSEEN).strip(" .")
    if len(name) <= MAX_NAME:
        return name
    stem, dot, ending = name.rpartition(".")
    return f"{stem[: MAX_NAME - len(ending) - 1]}.{ending}" if dot and len(ending) < 16 else name[:MAX_NAME]


def client_id(command: Command, part: int, merged: int = 0) -> str:
    """The client_id of one part: a repeat after a crash or a lost answer is the same message to WeChat (S11, Q6).

    `merged`: how many later commands are in it. Sent alone, the same command is another message.
    """
    return f"wechat-nats:{command.client}-{part}" + (f"+{merged}" if merged else "")


def joins(group: Sequence[Command], command: Command, longest_chars: int) -> bool:
    """Whether `command` may be sent in one message with those before it: all are single texts, and they fit."""
    texts = [one.parts[0] for one in (*group, command) if len(one.parts) == 1]
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) != len(group) + 1 or len(plain) > MERGED_AT_ONCE or command.id in {one.id for one in group}:
        return False
    if any(is_open(text) for text in plain[:-1]):  # the next text would become part of its code
        return False
    whole = _BETWEEN.join(plain)
    return len(whole) <= longest_chars and len(whole.encode()) <= MAX_BYTES


def merge(group: Sequence[Command]) -> Command:
    """Single texts as one command, the first of them; `final` if one is. One alone stays what it is."""
    first, *rest = group
    if not rest:
        return first
    text = _BETWEEN.join(str(command.parts[0]) for command in group)
    return first._replace(parts=[text], merged=tuple(rest), final=any(command.final for command in group))


def _harmless(exc: Exception) -> str:
    """The decoder's words without any of the text: types and paths, no values."""
    return _VALUE.sub("value", str(exc))[:200]
