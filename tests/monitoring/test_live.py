"""Every alert fires in a real Prometheus from a real fault, reaches a webhook, and ends when the fault is mended.

The same rule file as operators get, with its windows shortened (`servers.shortened`). Two adapters, a real
nats-server, the simulator; `make alerts-test`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from adapter.contract.messages import Unbind
from adapter.simulator import FaultRule
from tests.e2e.scrape import scrape
from tests.e2e.waiting import eventually, free_port, until
from tests.e2e.world import NAMES, SOON, AdapterProcess, World, world
from tests.monitoring.servers import Alertmanager, Prometheus, Webhook
from tests.monitoring.test_alerts import alerts
from tests.monitoring.tools import need

pytestmark = pytest.mark.slow

BOTS, CAPACITY = 20, 24
MAY_COME_EARLIER = {"EventLoopSlow", "AdapterNotReady"}
"""On a machine that is busy with other tests the first is true at any time. A replica that starts is not ready, and
the two minutes that it has for that are shorter here."""


class Scene:
    """What runs, and what has fired so far."""

    def __init__(self, made: World, nc: Client, prometheus: Prometheus, webhook: Webhook, ports: list[int]) -> None:
        self.made, self.nc, self.prometheus, self.webhook, self.ports = made, nc, prometheus, webhook, ports
        self.seen: set[str] = set()
        self._since = time.monotonic()
        self._numbers = iter(range(1_000_000))

    @property
    def first(self) -> AdapterProcess:
        return self.made.adapters[0]

    @property
    def second(self) -> AdapterProcess:
        return self.made.adapters[1]

    async def add_second(self) -> None:
        second = await self.made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{self.ports[1]}")
        await until(lambda: "partitions.taken" in second.log.read_text(), "the second replica has its share")
        self.prometheus.watch(self.ports)

    async def bind(self, number: int) -> None:
        await self.made.bind(self.nc, f"s{number}", self.made.sim.add_bot())

    async def unbind(self, number: int) -> None:
        sandbox = f"s{number}"
        receipt = await self.made.control(self.nc, sandbox, Unbind(bot=self.made.bots.pop(sandbox).bot))
        assert receipt.outcome == "applied"

    def bot(self, number: int) -> str:
        return self.made.bots[f"s{number}"].bot

    async def says(self, number: int) -> None:
        """The user writes, and the adapter knows of it."""
        sandbox, before = f"s{number}", len(self.made.sim.inbound(self.bot(number)))
        self.made.say(sandbox, f"hello {next(self._numbers)}")
        bot = self.bot(number)
        await until(
            lambda: (
                len(self.made.sim.inbound(bot)) > before
                and all(record.deliveries for record in self.made.sim.inbound(bot))
            ),
            "the message was polled",
        )

    async def sends(self, number: int, times: int = 1) -> None:
        for _ in range(times):
            await self.made.command(self.nc, f"s{number}", f"c{next(self._numbers)}")

    async def publish(self, subject: str, body: bytes) -> None:
        await self.nc.jetstream().publish(subject, body)

    @contextlib.asynccontextmanager
    async def fires(self, *names: str) -> AsyncIterator[None]:
        """What is done inside makes these alerts fire, which have not fired before, and lasts until they are told."""
        began = time.monotonic()
        for name in {*names} - MAY_COME_EARLIER:
            early = await self.prometheus.fired(f"Wechat{name}", began - self._since)
            assert not early, f"{name} fired before there was reason to"
        yield
        for name in names:

            async def so(name: str = name) -> bool:
                return await self.prometheus.fired(f"Wechat{name}", time.monotonic() - began + 1)

            await eventually(so, f"{name} fires; firing are {await self.prometheus.firing()}")
            told = f"Wechat{name}"
            await until(lambda told=told: told in self.webhook.received("firing"), f"{told} reached the webhook")  # type: ignore[misc]
        self.seen |= {*names}

    async def metric(self, holds: Callable[[dict[str, float]], bool], what: str) -> None:
        """Waits for something to be true of /metrics, summed over the replicas that run."""

        async def so() -> bool:
            running = [port for port, one in zip(self.ports, self.made.adapters, strict=False) if one.running]
            return holds(await scrape(*running))

        await eventually(so, what)


async def full(s: Scene) -> None:
    """More bots than the only replica is made for."""
    async with s.fires("CapacityNear"):
        for number in range(BOTS, BOTS + 2):
            await s.bind(number)
    async with s.fires("BotsUnowned"):
        for number in range(BOTS + 2, CAPACITY + 1):
            await s.bind(number)
    for number in range(BOTS, CAPACITY + 1):
        await s.unbind(number)
    await s.add_second()


async def nothing_to_spare(s: Scene) -> None:
    """Two replicas with room for all, and more bots than one of them is made for."""
    async with s.fires("SpareCapacityLow"):
        for number in range(BOTS, CAPACITY + 1):
            await s.bind(number)
    for number in range(BOTS, CAPACITY + 1):
        await s.unbind(number)


async def stalled_poll(s: Scene) -> None:
    """iLink takes a bot's poll and never answers."""
    async with s.fires("PollStalled"):
        s.made.sim.set_fault(FaultRule(fault="F5", endpoint="getupdates", bot=s.bot(0)))
    s.made.sim.clear_faults()
    s.made.sim.cut_polls(s.bot(0))


async def silent_ilink(s: Scene) -> None:
    """iLink takes all polls and answers none."""
    async with s.fires("PollsUnanswered"):
        s.made.sim.set_fault(FaultRule(fault="F5", endpoint="getupdates"))
    s.made.sim.clear_faults()
    for number in range(BOTS):
        s.made.sim.cut_polls(s.bot(number))


async def failing_polls(s: Scene) -> None:
    """iLink answers a bot's polls with an error page."""
    async with s.fires("BotsFailing"):
        s.made.sim.set_fault(FaultRule(fault="F1", endpoint="getupdates", bot=s.bot(0)))
        s.made.sim.cut_polls(s.bot(0))
    s.made.sim.clear_faults()


async def lost_logins(s: Scene) -> None:
    """Tokens die: of one bot, then of an eighth of them all."""
    async with s.fires("BotSessionsExpired"):
        s.made.sim.kill_token(s.bot(1))
    async with s.fires("BotSessionsExpiredMany"):
        for number in (2, 3):
            s.made.sim.kill_token(s.bot(number))
    for number in (1, 2, 3):
        user = s.made.bots[f"s{number}"].user
        await s.made.bind(s.nc, f"s{number}", s.made.sim.add_bot(user=user))


async def throttled(s: Scene) -> None:
    """iLink answers -2 to every message, for a quarter of the bots; then their users write."""
    some = range(4, 9)
    async with s.fires("BotsThrottled"):
        s.made.sim.set_fault(FaultRule(fault="F11"))
        for number in some:
            await s.says(number)
            await s.sends(number)
    s.made.sim.clear_faults()
    for number in some:
        await s.says(number)
    await s.metric(lambda values: values['bindings{state="throttled"}'] == 0, "nobody is throttled")


async def unconfirmed(s: Scene) -> None:
    """iLink answers success without a message id."""
    await s.says(9)
    async with s.fires("OutboundUnconfirmed"):
        s.made.sim.set_fault(FaultRule(fault="F13"))
        await s.sends(9, times=8)
    s.made.sim.clear_faults()


async def refused(s: Scene) -> None:
    """A service sends to sandboxes that have no bot; another sends what is no command."""
    async with s.fires("OutboundFailures"):
        for _ in range(8):
            await s.publish(NAMES.out("nobody"), b'{"text":"hi"}')
    async with s.fires("DeadLetters", "SchemaViolations"):
        await s.publish(NAMES.out("s1"), b'{"text":')


async def unsent(s: Scene) -> None:
    """iLink takes a message and never answers."""
    await s.says(10)
    async with s.fires("OutboundBacklogOld"):
        s.made.sim.set_fault(FaultRule(fault="F5", endpoint="sendmessage", bot=s.bot(10)))
        await s.sends(10)
    s.made.sim.clear_faults()
    await s.metric(lambda values: values['outbound_retries_total{reason="timeout"}'] > 0, "the request is over")
    for number in range(BOTS):  # its repeat waits until this replica sees that iLink accepts something again
        if number != 10:
            await s.says(number)
            await s.sends(number)


async def slow_bus(s: Scene) -> None:
    """nats-server stands still for three seconds while users write."""
    async with s.fires("InboundBudgetBurnFast", "InboundBudgetBurnSlow"):
        os.kill(s.made.server.pid, signal.SIGSTOP)
        for number in range(8):
            s.made.say(f"s{number}", "while the bus stands still")
        await asyncio.sleep(3.0)  # the fault itself
        os.kill(s.made.server.pid, signal.SIGCONT)


async def silent_bus(s: Scene) -> None:
    """nats-server stands still while users write, until it is told."""
    await until(lambda: s.made.sim.stats().parked > BOTS / 2, "polls are out again")
    async with s.fires("PublishOld", "AdapterNotReady"):
        os.kill(s.made.server.pid, signal.SIGSTOP)
        for number in range(8):
            s.made.say(f"s{number}", "while the bus says nothing")
    os.kill(s.made.server.pid, signal.SIGCONT)


async def frozen(s: Scene) -> None:
    """A replica gets no CPU for a second and a half."""
    async with s.fires("EventLoopSlow"):
        s.second.signal(signal.SIGSTOP)
        await asyncio.sleep(1.5)  # the fault itself
        s.second.signal(signal.SIGCONT)


async def full_stream(s: Scene) -> None:
    """The stream of receipts takes nothing more."""
    js = s.nc.jetstream()
    info = await js.stream_info(NAMES.stream_event)
    config = info.config
    await s.says(11)
    async with s.fires("EventsRefused"):
        await _update(s.nc, NAMES.stream_event, discard="new", max_msgs=info.state.messages)
        await s.sends(11)
    await _update(s.nc, NAMES.stream_event, discard=config.discard, max_msgs=config.max_msgs)


async def _update(nc: Client, stream: str, **changes: object) -> None:
    """Changes the stream's configuration as an operator's tool does."""
    answer = msgspec.json.decode((await nc.request(f"$JS.API.STREAM.INFO.{stream}")).data)
    body = msgspec.json.encode(answer["config"] | changes)
    done = msgspec.json.decode((await nc.request(f"$JS.API.STREAM.UPDATE.{stream}", body)).data)
    assert "error" not in done, done


async def altered_stream(s: Scene) -> None:
    """Somebody lets the inbox refuse what is new once it is full."""
    async with s.fires("StreamsDiffer"):
        await _update(s.nc, NAMES.stream_in, discard="new")
    await _update(s.nc, NAMES.stream_in, discard="old")


async def no_readers(s: Scene) -> None:
    """The bucket is gone that says how far agents have read."""
    stream = f"KV_{NAMES.readers}"
    config = msgspec.json.decode((await s.nc.request(f"$JS.API.STREAM.INFO.{stream}")).data)["config"]

    async def ask() -> None:
        while True:
            await s.nc.publish(f"{NAMES.prefix}.svc.next.s1", b"{}", reply=s.nc.new_inbox())
            await asyncio.sleep(0.1)

    async with s.fires("AgentsUnanswered"):
        await s.nc.request(f"$JS.API.STREAM.DELETE.{stream}")
        asking = asyncio.create_task(ask())
    asking.cancel()
    await s.nc.request(f"$JS.API.STREAM.CREATE.{stream}", msgspec.json.encode(config))


async def full_memory(s: Scene) -> None:
    """A stream remembers ids as long as headers may be; a restart forgets those of messages that are gone."""
    js = s.nc.jetstream()
    await js.add_stream(name="LONG", subjects=["long"], max_msgs=1, duplicate_window=120)
    async with s.fires("NatsMemoryHigh"):
        for number in range(20_000):
            await s.nc.publish("long", b"", headers={"Nats-Msg-Id": f"{number}".ljust(60_000, "x")})
            if number % 100 == 0:
                await s.nc.flush()
    await js.delete_stream("LONG")


def memory_bytes(pid: int) -> float:
    """As `mem` of nats-server's /varz."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096.0


async def no_bus(s: Scene) -> None:
    """nats-server dies, and comes back."""
    async with s.fires("AdapterBusDisconnected"):
        s.made.server.kill()
    await s.made.server.start()


async def no_adapter(s: Scene) -> None:
    """A replica is killed, and started again."""
    async with s.fires("AdapterDown"):
        await s.second.kill()
    await s.second.start()


LOST_SERVER = "WechatStreamsDegraded"
"""Its fault needs a cluster of its own."""
FAULTS: list[Callable[[Scene], Awaitable[None]]] = [
    full,
    nothing_to_spare,
    no_adapter,
    stalled_poll,
    silent_ilink,
    failing_polls,
    lost_logins,
    throttled,
    unconfirmed,
    refused,
    unsent,
    slow_bus,
    frozen,
    full_stream,
    altered_stream,
    no_readers,
    full_memory,
    no_bus,
    silent_bus,
]


async def test_every_alert_fires_from_a_real_fault_is_delivered_and_ends(tmp_path: Path) -> None:
    for program in ("prometheus", "prometheus-alertmanager"):
        need(program)
    ports = [free_port(), free_port()]
    environ = {"WECHAT_NATS_LEASE_S": "8", "WECHAT_NATS_CAPACITY": str(CAPACITY)}
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(tmp_path, environ=environ, parts=SOON))
        webhook = await stack.enter_async_context(Webhook())
        alertmanager = await stack.enter_async_context(Alertmanager(tmp_path / "alertmanager", webhook.url))
        await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{ports[0]}")
        nc = await made.nc()
        stack.push_async_callback(nc.close)
        told, told_at = CollectorRegistry(), free_port()
        memory = Gauge("gnatsd_varz_mem", "As prometheus-nats-exporter tells it.", registry=told)
        memory.set_function(lambda: memory_bytes(made.server.pid) if made.server.is_running else 0.0)
        exporter, _ = start_http_server(told_at, "127.0.0.1", told)
        stack.callback(exporter.shutdown)
        targets = Prometheus(tmp_path / "prometheus", ports[:1], alertmanager=alertmanager.address, nats=told_at)
        prometheus = await stack.enter_async_context(targets)
        scene = Scene(made, nc, prometheus, webhook, ports)
        for number in range(BOTS):
            await scene.bind(number)
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        for fault in FAULTS:
            began = time.monotonic()
            await fault(scene)
            print(f"{fault.__name__}: {time.monotonic() - began:.1f} s")

        named = {alert["alert"] for alert in alerts()}
        assert {f"Wechat{name}" for name in scene.seen} | {LOST_SERVER} == named

        async def quiet() -> bool:
            return not await prometheus.firing()

        await eventually(quiet, "all is well again", patience_s=120)
        await until(
            lambda: webhook.received("resolved").keys() >= named - {LOST_SERVER},
            "the webhook heard that each is over",
        )
        down = webhook.received("firing")["WechatAdapterDown"]
        assert down["labels"]["severity"] == "critical"
        assert down["annotations"]["runbook_url"].endswith("#wechatadapterdown")


async def test_a_lost_server_of_three_is_told_of_until_it_is_back(tmp_path: Path) -> None:
    """Meanwhile all goes on."""
    for program in ("prometheus", "prometheus-alertmanager"):
        need(program)
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(tmp_path, clustered=True, parts=SOON))
        adapter = await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{port}")
        webhook = await stack.enter_async_context(Webhook())
        alertmanager = await stack.enter_async_context(Alertmanager(tmp_path / "alertmanager", webhook.url))
        targets = Prometheus(tmp_path / "prometheus", [port], alertmanager=alertmanager.address)
        prometheus = await stack.enter_async_context(targets)

        async def is_told() -> bool:
            return LOST_SERVER in await prometheus.firing() and LOST_SERVER in webhook.received("firing")

        async def is_over() -> bool:
            return LOST_SERVER not in await prometheus.firing() and LOST_SERVER in webhook.received("resolved")

        await until(lambda: bool(adapter.said("adapter.started")), "all streams are there")
        made.cluster.nodes[0].kill()
        await eventually(is_told, "the alert is told of", patience_s=120)
        await eventually(adapter.is_ready, "the other two have a leader")
        made.cluster.nodes[0].start()
        await eventually(is_over, "its end is told of", patience_s=120)
