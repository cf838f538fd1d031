"""What the bus carries, as a stranger sees it: streams read whole, and subscribers that listen live."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import NamedTuple

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.contract.messages import Inbound
from adapter.contract.names import Names

NAMES = Names()


async def stream(nc: Client, name: str, subject: str) -> list[tuple[str, bytes]]:
    """Subject and body of every message of a stream under a subject, oldest first.

    Any server of a cluster answers, also one that has yet to catch up: the leader says how many there have to be.
    """
    while True:
        found = await _read(nc, name, subject)
        if len(found) >= await _kept(nc, name, subject):
            return found
        await asyncio.sleep(0.1)


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


async def _read(nc: Client, name: str, subject: str) -> list[tuple[str, bytes]]:
    inbox = nc.new_inbox()
    found: list[tuple[str, bytes]] = []
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
                found.append((headers["Nats-Subject"], message.data))
            if count < 500:
                return found
    finally:
        await answers.unsubscribe()


class Live(NamedTuple):
    """What a plain subscriber of a sandbox got."""

    seq: int
    inbound: Inbound


class Listener:
    """A plain subscriber per sandbox, as the sandboxes are: what is sent while its connection is away it misses."""

    def __init__(self) -> None:
        self.heard: dict[str, list[Live]] = defaultdict(list)
        """By the subject's sandbox, as it came."""

    async def listen(self, nc: Client) -> None:
        await nc.subscribe(NAMES.live("*"), cb=self._hear, pending_msgs_limit=0, pending_bytes_limit=0)
        await nc.flush()

    async def _hear(self, msg: Msg) -> None:
        headers = msg.headers or {}
        live = Live(int(headers["Nats-Sequence"]), msgspec.json.decode(msg.data, type=Inbound))
        self.heard[msg.subject.rpartition(".")[2]].append(live)
