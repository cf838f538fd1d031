"""What a message on `wechat.out` asks for, pure: read, checked, cut into parts."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, NamedTuple

import msgspec

from adapter.contract import Outbound, OutText, check_sandbox
from adapter.errors import Refused, Unreadable
from adapter.split import split, to_plain

_PEER = re.compile(r"[!-~]{0,128}")
"""A bot's or user's id: it becomes part of a subject."""
_VALUE = re.compile(r"""value (['"]).*\1(?= - at |$)""", re.DOTALL)


class Limits(NamedTuple):
    """The settings that bound a command."""

    command_bytes: int
    text_chars: int
    parts: int
    park_ms: int
    typing_ms: int = 300_000
    """After so long, showing that the bot types makes no sense any more."""


class Command(NamedTuple):
    """A command that can be carried out. `parts`: the texts to send, one request each."""

    id: str
    client: str
    """Base of the client_ids of its parts: the same whenever this command is sent again, another for any other."""
    sandbox: str
    bot: str
    """"" where the sandbox's only bot is meant."""
    user: str
    """"" where the bot's user is meant."""
    parts: list[str]
    when_closed: Literal["park", "refuse"]
    stored_ms: int
    expires_ms: int
    """Unsent by then, it is refused."""
    patient: bool
    """Its expiry is the service's, not its own."""
    typing: Literal["", "on", "off"] = ""
    """Instead of parts: show or hide that the bot types."""
    final: bool = False
    """It may take the sends that are kept back."""


def command_id(body_id: str | None, routed_id: str, msg_id: str, seq: int) -> str:
    """The idempotency key: the body's, else the one that the router found, else Nats-Msg-Id, else the sequence."""
    return body_id or routed_id[:128] or msg_id[:128] or str(seq)


def peek(data: bytes, limits: Limits) -> Outbound:
    """The message's fields; a `sandbox` of another form than a sandbox's is kept, for the readers to refuse.

    Raises Unreadable for what is too large, no JSON, or otherwise not of the schema.
    """
    if len(data) > limits.command_bytes:
        raise Unreadable("too_large", f"{len(data)} bytes; at most {limits.command_bytes} are read.")
    try:
        return msgspec.json.decode(data, type=Outbound)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        if body := _misaddressed(data):
            return body
        raise Unreadable("unreadable", _harmless(exc)) from exc


def _misaddressed(data: bytes) -> Outbound | None:
    """A body that is right but for the form of its `sandbox`: a wrong address is refused, and no dead letter."""
    try:
        fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        sandbox = msgspec.json.decode(fields.pop("sandbox"), type=str)
        body = msgspec.json.decode(msgspec.json.encode(fields), type=Outbound)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
        return None
    return msgspec.structs.replace(body, sandbox=sandbox)


def sandbox_of(body: Outbound) -> str:
    """The sandbox that a command on plain `wechat.out` names. Raises Refused("invalid")."""
    if not body.sandbox:
        raise Refused("invalid", "A command on plain wechat.out names its sandbox.")
    return check_sandbox(body.sandbox)


def read_command(body: Outbound, *, sandbox: str, ident: str, stored_ms: int, limits: Limits) -> Command:
    """The command, addressed to `sandbox` by its subject. Raises Refused("invalid"), Refused("too_long")."""
    check_sandbox(sandbox)
    if body.sandbox is not None and body.sandbox != sandbox:
        raise Refused("invalid", f"The body names sandbox {body.sandbox[:64]!r}, the subject {sandbox!r}.")
    if [body.text, body.items, body.typing].count(None) != 2:
        raise Refused("invalid", "A command holds either text, items or typing.")
    if not _PEER.fullmatch(body.bot or "") or not _PEER.fullmatch(body.user or ""):
        raise Refused("invalid", "Bot and user are printable ASCII without spaces, at most 128 characters.")
    if any(not isinstance(item, OutText) for item in body.items or []):
        raise Refused("invalid", "Media cannot be sent yet.")
    texts = [item.text for item in body.items or [] if isinstance(item, OutText)] if body.items else [body.text or ""]
    if body.typing is not None:
        texts = []
    parts: list[str] = []
    too_long = Refused("too_long", f"The text needs more than {limits.parts} messages; send it as a file.")
    longest = limits.parts * limits.text_chars * (2 if body.format == "plain" else 1)
    for text in texts:
        if len(text) > longest:  # known before anything is read: reading Markdown takes its time
            raise too_long
        shown = to_plain(text) if body.format == "plain" else text
        if not shown.strip():
            raise Refused("invalid", "The text is empty.")
        parts += split(shown, limits.text_chars)
        if len(parts) > limits.parts:
            raise too_long
    patience_ms = limits.park_ms if body.typing != "on" else min(limits.park_ms, limits.typing_ms)
    if body.expires_in_s is not None:
        patience_ms = int(min(body.expires_in_s * 1000, patience_ms))
    return Command(
        id=ident,
        client=hashlib.blake2b(f"{sandbox}|{ident}|{stored_ms}".encode(), digest_size=12).hexdigest(),
        sandbox=sandbox,
        bot=body.bot or "",
        user=body.user or "",
        parts=parts,
        when_closed="refuse" if body.typing else body.when_closed,  # it is never parked
        stored_ms=stored_ms,
        expires_ms=stored_ms + patience_ms,
        patient=body.expires_in_s is None,
        typing=body.typing or "",
        final=body.final,
    )


def client_id(command: Command, part: int) -> str:
    """The client_id of one part: a repeat after a crash or a lost answer is the same message to WeChat (S11, Q6)."""
    return f"wechat-nats:{command.client}-{part}"


def _harmless(exc: Exception) -> str:
    """The decoder's words without any of the text: types and paths, no values."""
    return _VALUE.sub("value", str(exc))[:200]
