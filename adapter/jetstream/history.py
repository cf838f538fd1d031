"""Reads streams: from any server by direct get, or from the stream's leader where a decision depends on it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from adapter.errors import BusRefused, Temporary
from adapter.jetstream.api_replies import (
    MESSAGE_GONE,
    NO_STREAM,
    ApiError,
    ApiReply,
    decode_reply,
    is_only_leader,
    unix_ms,
)
from adapter.jetstream.client import parse_headers
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.multiplexer import Reply
from adapter.ports import Heads, StoredMessage

PAGE_BYTES = 1024 * 1024
"""As `consumer.PULL_BYTES`."""
LAST_BYTES = 8 * PAGE_BYTES
"""Most bytes of an answer with the newest messages of subjects. A server cuts a connection with 64 MiB unread."""
SUBJECTS_AT_ONCE = 256
"""Most subjects whose newest messages are requested at once; a server accepts 1,024 (ADR-31)."""


class TooManySubjects(Temporary):
    """A wildcard has more subjects than a server looks through (ADR-31)."""


class StreamHistory:
    """Implements ports.History by direct get. `replicated`: the streams have several servers, any of which answers,
    even a lagging one; the leader then confirms that there are no more messages."""

    def __init__(self, connection: ManagedConnection, *, replicated: bool = False) -> None:
        self._connection = connection
        self._replicated = replicated

    async def read(
        self,
        stream: str,
        subject: str,
        *,
        after: int = 0,
        since_ms: int | None = None,
        limit: int | None = None,
        page: int = 200,
    ) -> AsyncGenerator[StoredMessage, None]:
        start: dict[str, Any] = {"seq": after + 1} if since_ms is None else {"start_time": _rfc3339(since_ms)}
        remaining = sys.maxsize if limit is None else limit
        while remaining:
            batch = min(page, remaining)
            query = {**start, "next_by_subj": subject, "batch": batch, "max_bytes": PAGE_BYTES}
            messages, _ = await direct_get(self._connection, stream, query)
            for stored in messages:
                yield stored
            if messages:
                start = {"seq": messages[-1].seq + 1}
            remaining -= len(messages)
            # a batch also ends by size
            if len(messages) == batch or (messages and has_more(messages[-1])):
                continue
            query = {**start, "next_by_subj": subject}
            if not self._replicated or await get_from_leader(self._connection, stream, query) is None:
                return
            await asyncio.sleep(0.05)

    async def read_last(self, stream: str, subject: str) -> StoredMessage | None:
        get = get_from_leader if self._replicated else direct_get_one
        return await get(self._connection, stream, {"last_by_subj": subject})

    async def read_last_of_each(self, stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        found: list[StoredMessage] = []
        for start in range(0, len(subjects), SUBJECTS_AT_ONCE):
            found += await self._read_page(stream, subjects[start : start + SUBJECTS_AT_ONCE])
        return found

    async def _read_page(self, stream: str, subjects: Sequence[str]) -> list[StoredMessage]:
        """As `read_last_of_each`. An answer tells how far its server knew the stream; one that knew nothing of the
        subjects tells nothing, so that of the stream's newest message is asked for, too."""
        last, newest = await self._newest(stream)
        wanted = set(subjects)
        found: list[StoredMessage] = []
        while wanted:  # an answer also ends by size
            asked = [*wanted | newest]
            query = {"multi_last": asked, "batch": len(asked), "max_bytes": LAST_BYTES}
            messages, end = await direct_get(self._connection, stream, query)
            if int(end.get("Nats-UpTo-Sequence", "0")) < last:
                await asyncio.sleep(0.05)  # a lagging server answered, or the newest was deleted meanwhile
                last, newest = await self._newest(stream)
                continue
            found += (stored for stored in messages if stored.subject in wanted)
            wanted.difference_update(stored.subject for stored in messages)
            if not messages or end.get("Nats-Num-Pending", "0") == "0":
                break
        return found

    async def _newest(self, stream: str) -> tuple[int, set[str]]:
        """Sequence and subject of the newest message, as the leader has it; (0, {}) where every server has all."""
        if not self._replicated:
            return 0, set()
        await self.read_state(stream)
        stored = await self.read_last(stream, ">")
        return (0, set()) if stored is None else (stored.seq, {stored.subject})

    async def read_heads(self, stream: str, subject: str, *, start: int) -> Heads | None:
        query = {"multi_last": [subject], "seq": start, "max_bytes": PAGE_BYTES}
        while True:
            try:
                messages, end = await direct_get(self._connection, stream, query)
            except TooManySubjects:
                return None
            up_to = int(end.get("Nats-UpTo-Sequence", "0"))
            is_cut = bool(messages) and has_more(messages[-1])
            if is_cut or not self._replicated or not await self._is_behind(stream, subject, up_to, start):
                return Heads(messages, up_to, is_cut)
            await asyncio.sleep(0.05)

    async def _is_behind(self, stream: str, subject: str, up_to: int, start: int) -> bool:
        """Whether the leader has a message that a server did not know of which knows the stream up to a sequence; 0:
        it knew of none under the wildcard."""
        if up_to:
            return (
                await get_from_leader(self._connection, stream, {"next_by_subj": subject, "seq": up_to + 1})
                is not None
            )
        last = await get_from_leader(self._connection, stream, {"last_by_subj": subject})
        return last is not None and last.seq >= start

    async def last_sequence(self, stream: str) -> int:
        return int((await self.read_state(stream))["last_seq"])

    async def first_and_last(self, stream: str) -> tuple[int, int]:
        state = await self.read_state(stream)
        return int(state["first_seq"]), int(state["last_seq"])

    async def count(self, stream: str) -> int:
        return int((await self.read_state(stream))["messages"])

    async def read_state(self, stream: str) -> dict[str, Any]:
        """Raises Temporary, also if another leader may have been elected."""
        try:
            return (await read_leader_info(self._connection, stream))["state"]  # type: ignore[no-any-return]
        except BusRefused as exc:
            raise Temporary("bus_refused", exc.detail) from exc

    async def read_newest(
        self, stream: str, subject: str, *, count: int, before: int | None = None
    ) -> list[StoredMessage]:
        state = await self.read_state(stream)
        first, last = int(state["first_seq"]), int(state["last_seq"])
        end = last + 1 if before is None else min(before, last + 1)
        width = count
        while True:
            start = max(first, end - width)
            found: deque[StoredMessage] = deque(maxlen=count)
            async with contextlib.aclosing(self.read(stream, subject, after=start - 1, page=count)) as messages:
                async for stored in messages:
                    if stored.seq >= end:
                        break
                    found.append(stored)
            if found or start <= first:
                return list(reversed(found))
            width *= 4  # all messages in the range were deleted

    async def get(self, stream: str, seq: int) -> StoredMessage | None:
        stored = await direct_get_one(self._connection, stream, {"seq": seq})
        if stored is None and self._replicated:  # a lagging server may have answered
            return await get_from_leader(self._connection, stream, {"seq": seq})
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


async def read_leader_info(connection: ManagedConnection, stream: str) -> dict[str, Any]:
    """STREAM.INFO of the only leader. A leader that is cut off from its followers answers as well, with what it has.
    Raises Temporary, BusRefused (no stream)."""
    info = await connection.api_request(f"STREAM.INFO.{stream}")
    if not is_only_leader(info.get("cluster")):
        raise Temporary("bus_busy", f"{stream}: its leader has not heard from a majority for seconds")
    return info


def _rfc3339(time_ms: int) -> str:
    moment = datetime.fromtimestamp(max(time_ms, 0) / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def direct_get(
    connection: ManagedConnection, stream: str, body: dict[str, Any]
) -> tuple[list[StoredMessage], dict[str, str]]:
    """Any server's answers to a direct get (ADR-31), possibly fewer than the leader has, and the headers of the end.
    Raises Temporary, even if one answer is missing: each names the previous one."""
    found: list[StoredMessage] = []
    with connection.open_request() as request:
        await connection.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body), reply=request.reply)
        last_seq = "0"
        while True:
            answer = await connection.next_reply(request)
            stored = _decode_stored(answer)
            if answer.headers.get("Nats-Last-Sequence", last_seq) != last_seq:
                raise Temporary("bus_gap", "an answer got lost")
            if stored is None:
                return found, answer.headers
            found.append(stored)
            last_seq = str(stored.seq)


async def direct_get_one(connection: ManagedConnection, stream: str, body: dict[str, Any]) -> StoredMessage | None:
    """As direct_get, for one message. Raises Temporary."""
    return _decode_stored(await connection.request(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(body)))


async def direct_get_last(connection: ManagedConnection, stream: str, subject: str) -> StoredMessage | None:
    """As direct_get, for the newest message of a subject, on a subject that permits to read nothing else. Raises
    Temporary."""
    return _decode_stored(await connection.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", b""))


def has_more(stored: StoredMessage) -> bool:
    """Whether the server that answered knows of more messages behind this one of a batch."""
    return stored.headers.get("Nats-Num-Pending", "0") != "0"


def _decode_stored(answer: Reply) -> StoredMessage | None:
    """Decodes an answer to a direct get; None: no message, or no more. Raises Temporary."""
    headers = answer.headers
    # The server adds the sequence to a message. The message's own headers, such as Status, are its author's.
    status = None if "Nats-Sequence" in headers else headers.get("Status", "none")
    if status in ("404", "204"):
        return None
    if status == "413":
        raise TooManySubjects("bus_busy", headers.get("Description", ""))
    if status is not None:
        raise Temporary("bus_busy", f"{status} {headers.get('Description', '')}")
    stored_ms = unix_ms(headers["Nats-Time-Stamp"])
    return StoredMessage(headers["Nats-Subject"], int(headers["Nats-Sequence"]), headers, answer.data, stored_ms)


class _LeaderMessage(msgspec.Struct):
    seq: int
    subject: str = ""
    data: bytes = b""
    hdrs: bytes = b""


class _MsgGet(ApiReply):
    message: _LeaderMessage | None = None


async def get_from_leader(
    connection: ManagedConnection, stream: str, query: dict[str, Any], *, timeout_s: float = 5.0
) -> StoredMessage | None:
    """One message from the stream's leader, without its time; None: there is none. Raises Temporary."""
    subject, body = f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(query)
    reply = await connection.request(subject, body, timeout_s, is_read=True)
    answer = decode_reply(reply.data, _MsgGet, "STREAM.MSG.GET")
    if answer.message is None:
        error = answer.error or ApiError(description="neither a message nor an error")
        if error.code != 404 or error.err_code == NO_STREAM:  # without a stream or a leader there is no proof
            raise Temporary("bus_busy", error.description[:200])
        return None
    found = answer.message
    return StoredMessage(found.subject, found.seq, parse_headers(found.hdrs) if found.hdrs else {}, found.data)
