"""Dead letters: reads their headers, and makes the message that retries one. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from adapter.contract.names import (
    H_DETAIL,
    H_MSG_ID,
    H_ORIGINAL,
    H_REASON,
    H_SANDBOX,
    H_SUBJECT,
    H_TIME_MS,
    H_USER,
    Names,
)
from adapter.errors import UNDECODABLE, Refused
from adapter.ports import BusMessage

DEAD_LETTER_HEADERS = frozenset({H_SUBJECT, H_REASON, H_DETAIL, H_TIME_MS, H_USER})
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


def dead_letter_of(seq: int, subject: str, headers: Mapping[str, str], *, size: int) -> DeadLetter:
    """`subject`: that of the dead letter."""
    return DeadLetter(
        seq=seq,
        stream=subject.rpartition(".")[2],
        subject=headers.get(H_SUBJECT, ""),
        sandbox=headers.get(H_SANDBOX, ""),
        reason=headers.get(H_REASON, ""),
        detail=headers.get(H_DETAIL, ""),
        time_ms=_int_or_zero(headers.get(H_TIME_MS)),
        size=size,
    )


def is_command(names: Names, subject: str) -> bool:
    """Whether it can be retried. An inbound message cannot: its user has to write again; nor can a bind or erase,
    of which a dead letter has no body."""
    return subject == names.out_plain or subject.startswith((names.out(""), names.said("unbind", "")))


def retry_message(names: Names, seq: int, headers: Mapping[str, str], data: bytes) -> BusMessage:
    """The message that retries a dead command. It names the person for whom the command was.

    Its id is derived from the dead letter, so that a repeated retry is stored once. Raises Refused.
    """
    subject = headers.get(H_SUBJECT, "")
    if not is_command(names, subject):
        advice = "what a user wrote they have to write again, and a bind or erase is to be published anew."
        raise Refused("invalid", f"It cannot be tried again: {advice}")
    if subject.startswith(names.out_plain):
        data = _for_its_person(data, headers.get(H_USER, ""))
    own_headers = {*DEAD_LETTER_HEADERS, H_ORIGINAL}  # the retry is another command, with its own time to live
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
