"""Reads a sandbox's messages by `wechat.svc.next.<sandbox>`.

It asks at the start, at each ring of the live subject, when messages are finished, and every ASK_S, one request at a
time. Each request confirms what is finished. The adapter gives what follows the confirmed position, at most WINDOW
messages: a message at work keeps the position, and WINDOW - 1 later ones may be handled meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, get_args

import msgspec
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import ConnectionReconnectingError
from nats.errors import Error as NatsError

from adapter.contract.messages import Inbound, InboundItem, NextPage, NextQuery
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_POSITION, Names, read_position
from adapter.errors import UNDECODABLE, AdapterError, Refused, Temporary
from adapter.tools.timing import ChangeSignal, backoff

log = structlog.get_logger()

ASK_S = 30.0
"""Longest time between two requests. A ring may get lost."""
WINDOW = 32
"""Most messages that are not confirmed. Those come again after a crash, and the adapter drops the repeated answers to
as many messages of a person."""
GATHER_S = 0.1
"""Delay of a request while messages are in hand, so that one request serves several of them."""
ANSWER_S = 5.0
"""Time after which a request is repeated."""
TICK_S = 1.0
CLOSE_S = 2.0
BUSY = ("429", "500", "503")
"""Error codes of a service that is to be asked again later."""
NONE = (0, 0)
"""Before every position."""
T = TypeVar("T")
KINDS = {str(kind.__struct_config__.tag) for kind in get_args(InboundItem)}


def read_inbound(data: bytes | msgspec.Raw) -> Inbound:
    """The message, without items of kinds that are unknown to this version. Raises errors.UNDECODABLE."""
    try:
        return msgspec.json.decode(data, type=Inbound)
    except msgspec.ValidationError:
        fields = msgspec.json.decode(data, type=dict[str, Any])
        fields["items"] = [item for item in fields.get("items", ()) if item["kind"] in KINDS]
        return msgspec.convert(fields, Inbound)


async def retry(
    work: Callable[[], Awaitable[T]], *, first_s: float = 0.2, longest_s: float = 5.0, give_up_s: float = math.inf
) -> T:
    """The result of `work`, which is repeated while it raises Temporary, with growing pauses. Raises Temporary once
    `give_up_s` are over, and what else `work` raises."""
    failures, began = 0, time.monotonic()
    while True:
        try:
            return await work()
        except Temporary as exc:
            failures += 1
            wait_s = exc.retry_after_s or backoff(failures, first_s=first_s, longest_s=longest_s)
            if time.monotonic() + wait_s - began > give_up_s:
                raise
            log.info("agent.retrying", reason=exc.reason, detail=exc.detail, wait_s=wait_s)
            await asyncio.sleep(wait_s)


class Reader:
    """The messages of one sandbox. `run` must run while `next_message` is awaited."""

    def __init__(self, nc: Client, names: Names, sandbox: str, ready: Callable[[], Awaitable[None]]) -> None:
        """`ready` waits for the connection, and raises if it is closed or the server forbids a subject."""
        self._nc = nc
        self._subject = names.svc(f"next.{sandbox}")
        self._live = names.live(sandbox)
        self._reply = ""
        self._heard: list[Subscription] = []
        self._ready = ready
        self._number: int | None = None
        """What the adapter calls this reader; None: it has not answered yet."""
        self._newest = NONE
        """Position of the last message that was read."""
        self._open: dict[str, Inbound | None] = {}
        """The messages from the first unfinished one on, by position; None: finished."""
        self._handed_out = NONE
        self._finished = self._confirmed = ""
        """All messages up to this position are finished, and confirmed; "": none."""
        self._gone_before = NONE
        self._rang = True
        self._changed = ChangeSignal()
        self._answered: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Reads until cancelled. Raises Refused (replaced: another agent reads the sandbox now), and what `ready`
        raises."""
        self._reply = self._nc.new_inbox()
        self._heard.append(await self._nc.subscribe(self._reply, cb=self._on_answer))
        self._heard.append(await self._nc.subscribe(self._live, cb=self._on_ring))
        while True:
            await self._due()
            self._rang = False
            await retry(self._ask)

    async def _due(self) -> None:
        """Returns when it is time for a request, at the latest after ASK_S, or at once after a broken connection."""
        loop, reconnects = asyncio.get_running_loop(), self._nc.stats["reconnects"]
        until = loop.time() + ASK_S
        while not await self._changed.wait_until(self._has_cause, TICK_S):
            await self._ready()
            if loop.time() > until or self._nc.stats["reconnects"] != reconnects:
                break
        await self._changed.wait_until(lambda: not self._open, GATHER_S)

    def _has_cause(self) -> bool:
        return self._rang or self._finished != self._confirmed

    async def _ask(self) -> None:
        """One request. Raises Temporary if it is to be repeated, Refused."""
        await self._ready()  # nats-py would keep the request, and send it later
        after = self._finished
        self._answered = asyncio.get_running_loop().create_future()
        query = NextQuery(reader=self._number, after=(after or None) if self._number else None, max=WINDOW)
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._nc.publish(self._subject, msgspec.json.encode(query), reply=self._reply)
                await self._answered
        except (TimeoutError, ConnectionReconnectingError) as exc:
            raise Temporary("no_answer", "There was no answer in time.") from exc
        self._confirmed = after

    async def _on_ring(self, msg: Msg) -> None:
        """A message without a position is not the adapter's, and one that was read needs no request."""
        try:
            is_new = read_position((msg.headers or {}).get(H_POSITION, "")) > self._newest
        except Refused:
            return
        if is_new:
            self._rang = True
            self._changed.notify_all()

    async def _on_answer(self, msg: Msg) -> None:
        """Also takes the late answer to a request that was repeated: it may have made this reader a newer one."""
        assert self._answered is not None
        try:
            self._receive(msg)
        except AdapterError as exc:
            if not self._answered.done():
                self._answered.set_exception(exc)
        else:
            if not self._answered.done():
                self._answered.set_result(None)

    def _receive(self, msg: Msg) -> None:
        """Raises Temporary, Refused."""
        headers = msg.headers or {}
        if headers.get("Status") == "503":
            raise Temporary("no_answer", "No adapter answers.")
        if code := headers.get(H_ERROR_CODE):
            if code in BUSY:
                raise Temporary("busy", headers.get(H_ERROR, ""))
            raise Refused("replaced" if code == "409" else "refused", headers.get(H_ERROR, ""))
        try:
            page = msgspec.json.decode(msg.data, type=NextPage)
        except UNDECODABLE as exc:
            raise Temporary("unreadable", type(exc).__name__) from exc
        self._number = max(self._number or 0, page.reader)
        if page.first and (first := read_position(page.first)) > max(self._gone_before, self._newest):
            self._gone_before = first
            log.warning("sandbox.gap", first=page.first, detail="Older messages were dropped before they were read.")
        for handed in page.messages:
            if (place := read_position(handed.position)) > self._newest:
                self._newest = place
                try:
                    self._open[handed.position] = read_inbound(handed.message)
                except UNDECODABLE:
                    self._open[handed.position] = None
                    detail = "A message of a later version is skipped."
                    log.error("sandbox.unreadable", position=handed.position, detail=detail)
        self._note_finished()

    async def next_message(self) -> tuple[str, Inbound]:
        """The oldest message that was not handed out, and its position."""
        while True:
            for position, inbound in self._open.items():
                if inbound is not None and (place := read_position(position)) > self._handed_out:
                    self._handed_out = place
                    return position, inbound
            newest = self._newest
            await self._changed.wait_until(lambda: self._newest > newest)  # noqa: B023

    def rewind(self) -> None:
        """Hands out the unfinished messages again."""
        self._handed_out = NONE

    def finish(self, position: str) -> None:
        """The message is handled. It is confirmed with the next request, once all before it are finished."""
        self._open[position] = None
        self._note_finished()

    def _note_finished(self) -> None:
        while self._open and self._open[front := next(iter(self._open))] is None:
            del self._open[front]
            self._finished = front
        self._changed.notify_all()

    async def close(self) -> None:
        """Confirms what is finished, unless the connection is away. Call it after `run` has ended."""
        if self._finished != self._confirmed and self._nc.is_connected:
            with contextlib.suppress(AdapterError, NatsError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._ask()
        for subscription in self._heard:
            with contextlib.suppress(NatsError):
                await subscription.unsubscribe()
