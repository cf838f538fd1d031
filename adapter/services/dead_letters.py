"""Dead letters: reads their headers, and makes the message that retries one. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from adapter.contract.names import (
    H_DETAIL,
    H_MSG_ID,
    H_REASON,
    H_SANDBOX,
    H_SEALED,
    H_SEQUENCE,
    H_SUBJECT,
    H_TIME_MS,
    H_USER,
    Names,
)
from adapter.errors import UNDECODABLE, Refused
from adapter.ports import BusMessage

DEAD_LETTER_HEADERS = frozenset({H_SUBJECT, H_REASON, H_DETAIL, H_SEQUENCE, H_TIME_MS, H_USER})
"""Headers of the dead letter itself, not of the message in it."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter without its body."""

    seq: int
    stream: str
    subject: str
    sandbox: str
    """"" where it names none."""
    reason: str
    detail: str
    time_ms: int
    size: int


def dead_letter_of(
    seq: int, subject: str, headers: Mapping[str, str], *, size: int, stored_ms: int = 0
) -> DeadLetter:
    """`subject`: that of the dead letter. `stored_ms` replaces a time that the headers lack."""
    return DeadLetter(
        seq=seq,
        stream=subject.rpartition(".")[2],
        subject=headers.get(H_SUBJECT, ""),
        sandbox=headers.get(H_SANDBOX, "") or _sandbox_in(headers.get(H_SUBJECT, "")),
        reason=headers.get(H_REASON, ""),
        detail=headers.get(H_DETAIL, ""),
        time_ms=_int_or_zero(headers.get(H_TIME_MS)) or stored_ms,
        size=size,
    )


def _sandbox_in(subject: str) -> str:
    """Of a subject that ends with it: of commands, and of messages in the inbox."""
    tokens = subject.split(".")
    return tokens[-1] if len(tokens) > 2 and tokens[1] in ("out", "inbox") else ""


def original_subject(names: Names, stored: str) -> str:
    """The subject to which a publisher sent a message that is stored as `stored`: WECHAT_OUT inserts the shard."""
    tokens = stored.split(".")
    if stored.startswith(f"{names.out_plain}.") and len(tokens) == 4:
        return names.out(tokens[3])
    return stored


def is_command(names: Names, subject: str) -> bool:
    """Whether it can be retried. An inbound message cannot: its user has to write again."""
    return subject in (names.bind, names.unbind, names.out_plain) or subject.startswith(f"{names.out_plain}.")


def retry_message(names: Names, seq: int, headers: Mapping[str, str], data: bytes) -> BusMessage:
    """The message that retries a dead command. It names the person for whom the command was.

    Its id is derived from the dead letter, so that a repeated retry is stored once. Raises Refused.
    """
    subject = original_subject(names, headers.get(H_SUBJECT, ""))
    if not is_command(names, subject):
        raise Refused("invalid", "It is no command: what a user wrote cannot be tried again, they have to write.")
    if subject.startswith(names.out_plain):
        data = _for_its_person(data, headers.get(H_USER, ""))
    own_headers = {*DEAD_LETTER_HEADERS, H_SEALED}  # the retry is another command, with its own time to live
    kept = {k: v for k, v in headers.items() if k not in own_headers and not k.startswith("Nats-")}
    msg_id = f"retry-{seq}-{headers.get(H_TIME_MS) or '0'}"
    return BusMessage("out", subject, data, kept | {H_MSG_ID: msg_id})


def _for_its_person(data: bytes, user: str) -> bytes:
    """Another person may be bound by now. Raises Refused for a command of which nobody knows whom it was for."""
    try:
        body = msgspec.json.decode(data, type=dict[str, Any])
    except UNDECODABLE:
        body = {}
    if user:
        return msgspec.json.encode(body | {"user": user})
    if not (body.get("user") or body.get("bot")):
        raise Refused("invalid", "It is not known for whom it was: send it anew, to a `user`.")
    return data


def _int_or_zero(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
