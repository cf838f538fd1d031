"""What the bus carries, as a stranger sees it: streams read whole, and subscribers that listen live."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from typing import NamedTuple

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.bridge.entries import messages_of
from adapter.contract.messages import Inbound, MediaQuery
from adapter.contract.names import H_ERROR, H_NEXT, H_POSITION, H_SHA256, H_SIZE, Names, position, read_position
from tests.e2e.waiting import eventually

NAMES = Names()


async def stream(nc: Client, name: str, subject: str) -> list[tuple[str, bytes]]:
    """Subject and body of every message of a stream under a subject, oldest first.

    Any server of a cluster answers, also one that has yet to catch up: the leader says how many there have to be.
    """
    while True:
        found = await _read(nc, name, subject)
        if len(found) >= await _kept(nc, name, subject):
            return [(subject, data) for _, subject, data in found]
        await asyncio.sleep(0.1)


async def inbox(nc: Client, sandbox: str) -> list[Inbound]:
    """What the inbox of a sandbox, or of all (`*`), holds, oldest first."""
    stored = await stream(nc, NAMES.stream_in, NAMES.inbox(sandbox))
    return [msgspec.json.decode(message, type=Inbound) for _, data in stored for message in messages_of(data)]


async def arrived(nc: Client, sandbox: str, count: int) -> list[Inbound]:
    """What the inbox holds, once it is so many messages."""

    async def are_there() -> bool:
        return len(await inbox(nc, sandbox)) >= count

    await eventually(are_there, f"{sandbox} has {count} messages")
    return await inbox(nc, sandbox)


class Got(NamedTuple):
    """Media as a sandbox reads them."""

    data: bytes
    headers: dict[str, str]
    """Of the first piece."""


async def read_media(nc: Client, sandbox: str, name: str, *, wait_s: float = 60.0) -> Got:
    """The media of a message, waited for. Raises LookupError with the adapter's sentence."""
    found = await _read(nc, NAMES.stream_in, NAMES.inbox(sandbox))
    place = next(
        position(seq, number)
        for seq, _, data in found
        for number, message in enumerate(messages_of(data))
        if f'"{name}"'.encode() in bytes(message)
    )
    data, after = b"", 0
    first: dict[str, str] = {}
    while True:
        query = MediaQuery(object=name, after=after, position=place, wait_s=wait_s)
        subject = NAMES.svc(f"media.get.{sandbox}")
        try:
            answer = await nc.request(subject, msgspec.json.encode(query), timeout=wait_s + 20)
        except nats.errors.NoRespondersError:  # every replica is away
            await asyncio.sleep(0.1)
            continue
        headers = answer.headers or {}
        if H_ERROR in headers:
            raise LookupError(headers[H_ERROR])
        data, first = data + answer.data, first or headers
        if H_NEXT not in headers:
            assert (len(data), hashlib.sha256(data).hexdigest()) == (int(first[H_SIZE]), first[H_SHA256])
            return Got(data, first)
        after = int(headers[H_NEXT])


async def _kept(nc: Client, name: str, subject: str) -> int:
    """How many the stream's leader has."""
    query = msgspec.json.encode({"subjects_filter": subject})
    while True:
        try:
            reply = await nc.request(f"$JS.API.STREAM.INFO.{name}", query, timeout=2)
        except nats.errors.TimeoutError:  # there is no leader yet
            continue
        answer = msgspec.json.decode(reply.data)
        if "error" not in answer:
            return sum((answer["state"].get("subjects") or {}).values())
        if answer["error"]["code"] == 404:
            return 0
        await asyncio.sleep(0.1)


async def _read(nc: Client, name: str, subject: str) -> list[tuple[int, str, bytes]]:
    inbox = nc.new_inbox()
    found: list[tuple[int, str, bytes]] = []
    answers = await nc.subscribe(inbox, pending_msgs_limit=0, pending_bytes_limit=0)
    seq = 1
    try:
        while True:
            body = {"seq": seq, "next_by_subj": subject, "batch": 500}
            await nc.publish(f"$JS.API.DIRECT.GET.{name}", msgspec.json.encode(body), reply=inbox)
            count = 0
            while True:
                message = await answers.next_msg(timeout=10)
                headers = message.headers or {}
                if "Status" in headers:
                    break
                count += 1
                seq = int(headers["Nats-Sequence"]) + 1
                found.append((seq - 1, headers["Nats-Subject"], message.data))
            if count < 500:
                return found
    finally:
        await answers.unsubscribe()


class Live(NamedTuple):
    """What a plain subscriber of a sandbox got."""

    place: tuple[int, int]
    """Its position."""
    inbound: Inbound


class Listener:
    """A plain subscriber per sandbox, as the sandboxes are: what is sent while its connection is away it misses."""

    def __init__(self) -> None:
        self.received: dict[str, list[Live]] = defaultdict(list)
        """By the subject's sandbox, as it came."""

    async def listen(self, nc: Client) -> None:
        await nc.subscribe(NAMES.live("*"), cb=self._on_message, pending_msgs_limit=0, pending_bytes_limit=0)
        await nc.flush()

    async def _on_message(self, msg: Msg) -> None:
        headers = msg.headers or {}
        live = Live(read_position(headers[H_POSITION]), msgspec.json.decode(msg.data, type=Inbound))
        self.received[msg.subject.rpartition(".")[2]].append(live)
