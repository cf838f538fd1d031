"""What says binds, unbinds and erases to sandboxes, and looks at what comes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from adapter.bridge.partition import Partition
from adapter.contract.messages import Receipt
from adapter.contract.names import H_REPLY_TO
from adapter.contract.records import Binding
from adapter.tools.seal import cursor_context
from tests.fakes import Bench, FakeDelivery

BOT, USER = "b1@im.bot", "u1@im.wechat"
TOKEN = "b1@im.bot:SECRET"
INBOX = "_INBOX.abc.1"
OTHER: dict[str, Any] = {"bot": "b2@im.bot", "user": "u2@im.wechat"}


class Platform:
    """A platform, and the replica that owns all partitions."""

    def __init__(self, bench: Bench | None = None) -> None:
        self.bench = bench or Bench()

    def partition(self, sandbox: str = "s1") -> Partition:
        number = self.bench.names.partition_of(sandbox)
        return self.bench.partitions.get(number) or self.bench.partition(sandbox)

    async def begin(self, sandbox: str = "s1") -> None:
        """Begins a partition, as its owner does."""
        await self.bench.bindings.catch_up()
        await self.partition(sandbox).open()

    def publish(
        self,
        verb: str,
        body: bytes = b"",
        *,
        sandbox: str = "s1",
        reply_to: str = INBOX,
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> FakeDelivery:
        """Says it, and does not wait."""
        delivery = self.bench.command(
            verb=verb,
            sandbox=sandbox,
            data=body or msgspec.json.encode(fields),
            headers={H_REPLY_TO: reply_to} | (headers or {}),
        )
        self.partition(sandbox).on_delivery(delivery)
        return delivery

    async def say(
        self, verb: str, *, sandbox: str = "s1", headers: dict[str, str] | None = None, **fields: Any
    ) -> Receipt:
        """Says it, and waits for the answer, which is the receipt."""
        before = len(self.bench.core.published)
        delivery = self.publish(verb, sandbox=sandbox, headers=headers, **fields)
        await asyncio.sleep(3)
        assert delivery.acks == 1
        assert len(self.bench.core.published) == before + 1
        subject, payload, _ = self.bench.core.published[-1]
        assert subject == INBOX
        receipt = msgspec.json.decode(payload, type=Receipt)
        assert receipt == self.bench.bus.receipts(verb)[-1]
        return receipt

    def publish_bind(self, bot: str = BOT, **fields: Any) -> FakeDelivery:
        return self.publish("bind", **{"bot": bot, "bot_token": f"{bot}:SECRET", **fields})

    async def bind(self, *, sandbox: str = "s1", bot: str = BOT, **fields: Any) -> Receipt:
        given = {"bot": bot, "bot_token": f"{bot}:SECRET", "user": USER, **fields}
        return await self.say("bind", sandbox=sandbox, **given)

    def again(self, delivery: FakeDelivery) -> FakeDelivery:
        """It is delivered once more, since its ack got lost or the consumer was reset."""
        repeated = delivery.again()
        self.partition(delivery.subject.rpartition(".")[2]).on_delivery(repeated)
        return repeated

    def next_owner(self) -> Platform:
        """The replica that takes over, which has heard of no binding yet."""
        bench = self.bench
        for partition in bench.partitions.values():
            partition.stop()
        bench.leases.has_lease = False
        entries, bench.bindings_bucket.entries = bench.bindings_bucket.entries, {}
        later = Bench(bench, instance="me-2")
        bench.bindings_bucket.entries = entries
        return Platform(later)

    @property
    def bound(self) -> dict[str, str]:
        return {binding.bot: binding.sandbox for binding in self.bench.bindings}

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        return [(event.sandbox, event.bot, event.change) for event in self.bench.bus.events()]

    def binding(self, bot: str = BOT) -> Binding:
        binding = self.bench.bindings.get(bot)
        assert binding is not None
        return binding

    def token(self, bot: str = BOT) -> str:
        return self.bench.sealer.open(bot, self.binding(bot).token)

    def cursor(self) -> str:
        return self.bench.sealer.open(cursor_context(BOT), self.binding().start_cursor or "")
