"""Dead letters: reading their headers, and making the message that tries one again. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from adapter.contract.names import H_DETAIL, H_MSG_ID, H_REASON, H_SEQUENCE, H_SINCE_MS, H_SUBJECT, H_TIME_MS, Names
from adapter.ports import Message

DEAD_LETTER_HEADERS = frozenset({H_SUBJECT, H_REASON, H_DETAIL, H_SEQUENCE, H_TIME_MS})
"""Headers of the letter, not of the message in it."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a dead letter without its body."""

    seq: int
    stream: str
    subject: str
    reason: str
    detail: str
    time_ms: int
    size: int


def dead_letter_of(
    seq: int, subject: str, headers: Mapping[str, str], *, size: int, stored_ms: int = 0
) -> DeadLetter:
    """`subject`: where the letter lies. `stored_ms` stands in for a time that the headers do not tell."""
    return DeadLetter(
        seq=seq,
        stream=subject.rpartition(".")[2],
        subject=headers.get(H_SUBJECT, ""),
        reason=headers.get(H_REASON, ""),
        detail=headers.get(H_DETAIL, ""),
        time_ms=_int_or_zero(headers.get(H_TIME_MS)) or stored_ms,
        size=size,
    )


def original_subject(names: Names, stored: str) -> str:
    """Where a publisher sent what was stored as `stored`: WECHAT_OUT puts the shard in between."""
    tokens = stored.split(".")
    if stored.startswith(f"{names.out_plain}.") and len(tokens) == 4:
        return names.out(tokens[3])
    return stored


def is_command(names: Names, subject: str) -> bool:
    """Whether it can be tried again; an inbound message cannot: its user has to write again."""
    return subject in (names.bind, names.unbind, names.out_plain) or subject.startswith(f"{names.out_plain}.")


def retry_message(names: Names, seq: int, headers: Mapping[str, str], data: bytes) -> Message | None:
    """What to publish so that a dead command is tried again; None for what is no command.

    The id follows from the letter: a retry that is cut half-way and repeated stores once.
    """
    subject = original_subject(names, headers.get(H_SUBJECT, ""))
    if not is_command(names, subject):
        return None
    gone = {*DEAD_LETTER_HEADERS, H_SINCE_MS}  # it has its time once more
    kept = {k: v for k, v in headers.items() if k not in gone and not k.startswith("Nats-")}
    msg_id = f"retry-{seq}-{headers.get(H_TIME_MS) or '0'}"
    return Message("out", subject, data, kept | {H_MSG_ID: msg_id})


def _int_or_zero(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
