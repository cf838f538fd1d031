"""Reads streams: from any server by direct get, or from the stream's leader where a decision depends on it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from adapter.errors import BusRefused, Temporary
from adapter.jetstream.api_replies import MESSAGE_GONE, NO_STREAM, ApiError, ApiReply, decode_reply, unix_ms
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.multiplexer import Reply
from adapter.ports import Stored

PAGE_BYTES = 1024 * 1024
"""As `consumer.PULL_BYTES`."""
SUBJECTS_AT_ONCE = 256
"""Most subjects whose newest messages are requested at once; a server accepts 1,024 (ADR-31)."""


async def read_stream(
    connection: ManagedConnection,
    stream: str,
    subject: str,
    *,
    after: int = 0,
    since_ms: int | None = None,
    page: int = 200,
    limit: int | None = None,
    replicated: bool = False,
) -> AsyncGenerator[Stored, None]:
    """The messages of `subject` (may have wildcards), oldest first, after a sequence or since a time; at most
    `limit`.

    Any server of a cluster answers, even a lagging one. With `replicated` the leader confirms at the end that there
    are no more. Raises Temporary.
    """
    start: dict[str, Any] = {"seq": after + 1} if since_ms is None else {"start_time": _rfc3339(since_ms)}
    remaining = sys.maxsize if limit is None else limit
    while remaining:
        found, more, asked = 0, False, min(page, remaining)
        query = {**start, "next_by_subj": subject, "batch": asked, "max_bytes": PAGE_BYTES}
        async for stored in direct_get(connection, stream, query):
            found += 1
            more = stored.headers.get("Nats-Num-Pending", "0") != "0"  # a batch also ends by size
            start = {"seq": stored.seq + 1}
            yield stored
        remaining -= found
        if more or found == asked:
            continue
        if not replicated or await next_from_leader(connection, stream, subject, start) is None:
            return
        await asyncio.sleep(0.05)


class StreamHistory:
    """Implements ports.Archive by direct get. `replicated`: the streams have several servers."""

    def __init__(self, connection: ManagedConnection, *, replicated: bool = False) -> None:
        self._connection = connection
        self._replicated = replicated

    def read(
        self, stream: str, subject: str, *, after: int = 0, since_ms: int | None = None, limit: int | None = None
    ) -> AsyncIterator[Stored]:
        return read_stream(
            self._connection,
            stream,
            subject,
            after=after,
            since_ms=since_ms,
            limit=limit,
            replicated=self._replicated,
        )

    async def read_last(self, stream: str, subject: str) -> Stored | None:
        if self._replicated:
            return await _from_leader(self._connection, stream, {"last_by_subj": subject})
        return await read_last(self._connection, stream, subject)

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[Stored]:
        found: list[Stored] = []
        for start in range(0, len(subjects), SUBJECTS_AT_ONCE):
            page = subjects[start : start + SUBJECTS_AT_ONCE]
            while True:
                newest = await self._newest_sequence(stream) if self._replicated else 0
                messages, up_to = await read_last_of_each(self._connection, stream, page)
                if up_to >= newest:
                    break
                await asyncio.sleep(0.05)  # a lagging server answered
            found += messages
        return found

    async def _newest_sequence(self, stream: str) -> int:
        newest = await _from_leader(self._connection, stream, {"last_by_subj": ">"})
        return newest.seq if newest else 0

    async def count_by_subject(self, stream: str, subject: str) -> dict[str, int]:
        return await count_by_subject(self._connection, stream, subject)

    async def read_newest(self, stream: str, subject: str, *, count: int, before: int | None = None) -> list[Stored]:
        state = (await self._connection.api_request(f"STREAM.INFO.{stream}"))["state"]
        first, last = int(state["first_seq"]), int(state["last_seq"])
        end = last + 1 if before is None else min(before, last + 1)
        width = count
        while True:
            start = max(first, end - width)
            found: deque[Stored] = deque(maxlen=count)
            async with contextlib.aclosing(
                read_stream(
                    self._connection, stream, subject, after=start - 1, page=count, replicated=self._replicated
                )
            ) as messages:
                async for stored in messages:
                    if stored.seq >= end:
                        break
                    found.append(stored)
            if found or start <= first:
                return list(reversed(found))
            width *= 4  # all messages in the range were deleted

    async def get(self, stream: str, seq: int) -> Stored | None:
        stored = await direct_get_one(self._connection, stream, {"seq": seq})
        if stored is None and self._replicated:  # a lagging server may have answered
            return await _from_leader(self._connection, stream, {"seq": seq})
        return stored

    async def delete(self, stream: str, seq: int, *, erase: bool = False) -> None:
        try:
            await self._connection.api_request(f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": not erase})
        except BusRefused as exc:
            if exc.code not in MESSAGE_GONE:
                raise Temporary("bus_refused", exc.detail) from exc

    async def purge(self, stream: str, subject: str, *, keep: int = 0, up_to: int = 0) -> None:
        bound = {"seq": up_to + 1} if up_to else {"keep": keep}
        await self._connection.api_request(f"STREAM.PURGE.{stream}", {"filter": subject, **bound})


def _rfc3339(time_ms: int) -> str:
    moment = datetime.fromtimestamp(max(time_ms, 0) / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def count_by_subject(connection: ManagedConnection, stream: str, subject: str) -> dict[str, int]:
    """Messages by subject under a wildcard. Raises Temporary, BusRefused (no such stream)."""
    found: dict[str, int] = {}
    while True:
        answer = await connection.api_request(
            f"STREAM.INFO.{stream}", {"subjects_filter": subject, "offset": len(found)}
        )
        page = (answer["state"].get("subjects") or {}) if answer.get("state") else {}
        found |= page
        if not page or len(found) >= int(answer.get("total", 0)):
            return found


async def read_last(connection: ManagedConnection, stream: str, subject: str) -> Stored | None:
    """The newest message of one subject. Raises Temporary."""
    return await direct_get_one(connection, stream, {"last_by_subj": subject})


async def direct_get(
    connection: ManagedConnection, stream: str, body: dict[str, Any]
) -> AsyncGenerator[Stored, None]:
    """Any server's answers to a direct get (ADR-31), possibly fewer than the leader has. Raises Temporary, even if
    one answer is missing: each names the previous one."""
    with connection.open_request() as request:
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body), reply=request.reply)
        last_seq = 0
        while (stored := _decode_after(last_seq, await connection.next_reply(request))) is not None:
            last_seq = stored.seq
            yield stored


async def read_last_of_each(
    connection: ManagedConnection, stream: str, subjects: Sequence[str]
) -> tuple[list[Stored], int]:
    """The newest message of each subject, and the sequence up to which the answering server knows the stream. Raises
    Temporary, even if one answer is missing."""
    found: list[Stored] = []
    with connection.open_request() as request:
        body = msgspec.json.encode({"multi_last": subjects, "batch": len(subjects)})
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", body, reply=request.reply)
        last_seq = 0
        while (stored := _decode_after(last_seq, answer := await connection.next_reply(request))) is not None:
            last_seq = stored.seq
            found.append(stored)
    if "Nats-UpTo-Sequence" in answer.headers:
        return found, int(answer.headers["Nats-UpTo-Sequence"])
    if found:
        return found, max(stored.seq for stored in found)
    newest = await read_last(connection, stream, ">")  # nothing found: up to which sequence does this server know?
    return found, newest.seq if newest else 0


async def direct_get_one(connection: ManagedConnection, stream: str, body: dict[str, Any]) -> Stored | None:
    """As direct_get, for one message. Raises Temporary."""
    return _decode_stored(await connection.request(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body)))


def _decode_after(last_seq: int, answer: Reply) -> Stored | None:
    """As `_decode_stored`, for one of several answers. Raises Temporary, even if the answer after `last_seq` is
    missing."""
    stored = _decode_stored(answer)
    if answer.headers.get("Nats-Last-Sequence", str(last_seq)) != str(last_seq):
        raise Temporary("bus_gap", "an answer got lost")
    return stored


def _decode_stored(answer: Reply) -> Stored | None:
    """Decodes an answer to a direct get; None: no message, or no more. Raises Temporary."""
    headers = answer.headers
    # The server adds the sequence to a message. The message's own headers, such as Status, are its author's.
    status = None if "Nats-Sequence" in headers else headers.get("Status", "none")
    if status in ("404", "204"):
        return None
    if status is not None:
        raise Temporary("bus_busy", f"{status} {headers.get('Description', '')}")
    stored_ms = unix_ms(headers["Nats-Time-Stamp"])
    return Stored(headers["Nats-Subject"], int(headers["Nats-Sequence"]), headers, answer.data, stored_ms)


async def next_from_leader(
    connection: ManagedConnection, stream: str, subject: str, start: dict[str, Any]
) -> Stored | None:
    """The first message of a subject after a sequence or time, from the stream's leader. Raises Temporary."""
    return await _from_leader(connection, stream, {**start, "next_by_subj": subject})


async def _from_leader(connection: ManagedConnection, stream: str, query: dict[str, Any]) -> Stored | None:
    """The message without its headers. Raises Temporary."""
    message = await message_from_leader(connection, stream, query)
    return None if message is None else Stored(message.subject, message.seq, {}, message.data or b"")


async def message_from_leader(
    connection: ManagedConnection, stream: str, query: dict[str, Any], *, timeout_s: float = 5.0
) -> LeaderMessage | None:
    """One message from the stream's leader; None: there is none. Raises Temporary."""
    msg = await connection.request(
        f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(query), timeout_s=timeout_s
    )
    answer = decode_reply(msg.data, _MsgGet, "STREAM.MSG.GET")
    if answer.message is None:
        error = answer.error or ApiError(description="neither a message nor an error")
        if error.code != 404 or error.err_code == NO_STREAM:  # without a stream or a leader there is no proof
            raise Temporary("bus_busy", error.description[:200])
    return answer.message


class LeaderMessage(msgspec.Struct):
    """A message of STREAM.MSG.GET; headers and time are raw."""

    seq: int
    subject: str = ""
    data: bytes | None = None
    hdrs: bytes | None = None
    time: str = ""


class _MsgGet(ApiReply):
    message: LeaderMessage | None = None
