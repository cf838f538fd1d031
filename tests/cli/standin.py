"""A stand-in for the adapter: answers what commands ask for, keeps nothing. For tests of the command line alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
from nats.aio.msg import Msg

from adapter.cli.bus import BusConnection
from adapter.cli.permission_checks import PROBE
from adapter.contract.messages import (
    Bind,
    BindingHealth,
    BindingInfo,
    BindingsPage,
    BindingsQuery,
    BotStatus,
    Outbound,
    Receipt,
    Unbind,
)
from adapter.contract.names import H_ERROR, H_ERROR_CODE, H_REPLY_TO
from adapter.contract.records import Lease
from adapter.jetstream.topology import partition_consumer

PAGE = 2


def with_health(info: BindingInfo) -> BindingInfo:
    """As a test says it, or all is well."""
    status: BotStatus = "needs_login" if info.state == "needs_login" else "polling"
    return msgspec.structs.replace(info, health=info.health or BindingHealth(status=status))


class StandIn:
    """What it was asked, and what it answers: both may be looked at and set by a test."""

    def __init__(self, bus: BusConnection) -> None:
        self._bus = bus
        self.bindings: list[BindingInfo] = []
        self.control = Receipt(command="", sandbox="s1", outcome="applied")
        """The receipt of a bind or unbind."""
        self.receipts: Callable[[Outbound], Sequence[Receipt]] = lambda _: []
        self.asked: list[Bind | Unbind] = []
        self.sent: list[Outbound] = []
        self.metadata: dict[str, str] = {}
        """What each adapter says of its settings."""
        self.capacities: tuple[int, ...] = (10_000,)
        """Of each adapter for which it stands."""
        self.error: tuple[str, str] | None = None

    async def start(self) -> None:
        names, nc = self._bus.names, self._bus.nc
        await nc.subscribe(names.said("bind", "*"), cb=self._on_bind)
        await nc.subscribe(names.said("unbind", "*"), cb=self._on_unbind)
        await nc.subscribe(names.out("*"), cb=self._on_out)
        await nc.subscribe(names.svc("bindings.list"), cb=self._on_list)
        await nc.subscribe("$SRV.PING.wechat-nats", cb=self._on_ping)
        await self.renew(*range(names.partitions))
        await nc.flush()

    async def renew(self, *partitions: int) -> None:
        """Writes that it owns them."""
        for number in partitions:
            subject = f"$KV.{self._bus.names.leases}.{number}"
            await self._bus.nc.publish(subject, msgspec.json.encode(Lease(owner="standin-0")))
        await self._bus.nc.flush()

    async def _on_bind(self, msg: Msg) -> None:
        self.asked.append(msgspec.json.decode(msg.data, type=Bind))
        await self._control(msg)

    async def _on_unbind(self, msg: Msg) -> None:
        self.asked.append(msgspec.json.decode(msg.data, type=Unbind))
        await self._control(msg)

    async def _control(self, msg: Msg) -> None:
        await self._bus.nc.publish((msg.headers or {})[H_REPLY_TO], msgspec.json.encode(self.control))

    async def _on_out(self, msg: Msg) -> None:
        command, names = msgspec.json.decode(msg.data, type=Outbound), self._bus.names
        if msg.subject == names.out(PROBE):
            number, pull = names.partition_of(PROBE), self._bus.nc.jetstream().pull_subscribe
            consumer = await pull(names.of_partition(number), partition_consumer(number), names.stream_out)
            (stored,) = await consumer.fetch(1)
            await stored.ack()
            return
        self.sent.append(command)
        for receipt in self.receipts(command):
            subject = self._bus.names.receipt(msg.subject.rpartition(".")[2], receipt.command, receipt.sequence)
            await self._bus.nc.jetstream().publish(subject, msgspec.json.encode(receipt))

    async def _on_list(self, msg: Msg) -> None:
        if self.error is not None:
            code, text = self.error
            await self._bus.nc.publish(msg.reply, headers={H_ERROR: text, H_ERROR_CODE: code})
            return
        query = msgspec.json.decode(msg.data, type=BindingsQuery)
        found = [b for b in self.bindings if query.sandbox in (None, b.sandbox) and b.bot > query.after]
        page = [with_health(info) for info in found[:PAGE]] if query.health else found[:PAGE]
        more = page[-1].bot if len(found) > PAGE else ""
        await msg.respond(msgspec.json.encode(BindingsPage(bindings=page, next=more)))

    async def _on_ping(self, msg: Msg) -> None:
        for capacity in self.capacities:
            metadata = {"capacity": str(capacity), **self.metadata}
            answer = {"name": "wechat-nats", "id": "0", "version": "0.1.0", "metadata": metadata}
            await msg.respond(msgspec.json.encode(answer))


@contextlib.asynccontextmanager
async def answering(bus: BusConnection) -> AsyncIterator[StandIn]:
    """A stand-in on the bus."""
    standin = StandIn(bus)
    await standin.start()
    yield standin
