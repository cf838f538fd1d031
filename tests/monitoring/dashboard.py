"""The dashboard's panels, what they ask, and the load under which each of them has something to show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from nats.aio.client import Client

from adapter.simulator import FaultRule
from tests.e2e.scrape import scrape
from tests.e2e.waiting import eventually, free_port, until
from tests.e2e.world import NAMES, SOON, World, world
from tests.monitoring.servers import Prometheus, Series
from tests.monitoring.tools import DASHBOARD

BOTS = 24
STEP_S = 1.0
VARIABLES = {"$__rate_interval": "8s", "$namespace": ".*"}
"""What Grafana puts in their places."""


class Shown(NamedTuple):
    """A panel and the answers to its queries, one list of series each."""

    panel: dict[str, Any]
    answers: list[list[Series]]


def load_dashboard() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return made


def panels() -> list[dict[str, Any]]:
    """All that ask something, in the order of the page."""
    return [panel for panel in load_dashboard()["panels"] if panel["type"] != "row"]


def expressions(panel: dict[str, Any]) -> list[str]:
    """Its queries, as Prometheus gets them."""
    found = [str(target["expr"]) for target in panel["targets"]]
    for variable, value in VARIABLES.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


def values(series: Series) -> list[float]:
    """Without the samples of a quotient of nothing by nothing."""
    return [value for _, value in series.samples if not math.isnan(value)]


@contextlib.asynccontextmanager
async def shown(folder: Path, *, seconds: float) -> AsyncIterator[list[Shown]]:
    """Two adapters under a mixed load for so long, scraped by a real Prometheus; what every panel shows of that."""
    ports = [free_port(), free_port()]
    environ = {"WECHAT_NATS_CAPACITY": "40"}
    async with contextlib.AsyncExitStack() as stack:
        made = await stack.enter_async_context(world(folder, environ=environ, parts=SOON, hold_ms=2000))
        nc = await made.nc()
        stack.push_async_callback(nc.close)
        prometheus = await stack.enter_async_context(Prometheus(folder / "prometheus", ports))
        began = time.time()
        for number, port in enumerate(ports, 1):
            await made.add_adapter(WECHAT_NATS_HTTP_ADDR=f"127.0.0.1:{port}")
            # the second one's share moves once the first one's counts are known: else nobody sees them rise
            await eventually(lambda number=number: _are_seen(prometheus, number), "it is scraped")  # type: ignore[misc]
        for number in range(BOTS):
            await made.bind(nc, f"s{number}", made.sim.add_bot())
        await until(lambda: made.sim.stats().parked == BOTS, "all are polled")
        await load(made, nc, seconds)
        await eventually(lambda: _scraped(prometheus, ports), "the last counts are scraped")
        ended = time.time()
        yield [
            Shown(
                panel,
                [await prometheus.query_range(one, began, ended, STEP_S) for one in expressions(panel)],
            )
            for panel in panels()
        ]


async def _are_seen(prometheus: Prometheus, adapters: int) -> bool:
    found = await prometheus.query("count(wechat_adapter_build_info)")
    return bool(found) and found[0].samples[0][1] == adapters


async def _scraped(prometheus: Prometheus, ports: list[int]) -> bool:
    """Whether Prometheus has the number of commands taken that the adapters have now."""
    found = await prometheus.query("sum(wechat_adapter_outbound_received_total)")
    return bool(found) and found[0].samples[0][1] == (await scrape(*ports))["outbound_received_total"]


async def load(made: World, nc: Client, seconds: float) -> None:
    """People write and are answered, by fits and starts, while a bit of everything goes wrong."""
    rng = random.Random(7)
    names = sorted(made.bots)
    deadline = time.monotonic() + seconds
    faults = asyncio.create_task(_trouble(made, nc, names, seconds))
    number = 0
    while time.monotonic() < deadline:
        busy = 3 + round(4 * (1 + math.sin(number / 9)))
        for sandbox in rng.sample(names[:-3], busy):
            bot = made.bots[sandbox].bot
            kind = rng.choice(["text", "text", "text", "image", "voice", "file", "video"])
            if kind == "text":
                made.sim.say(bot, f"message {number}")
            else:
                made.sim.say_kind(bot, kind)
            for part in range(rng.choice([0, 1, 1, 2])):
                ident = f"load.{sandbox}.{number}.{part}"
                await made.command(nc, sandbox, ident, plain=rng.random() < 0.3)
        number += 1
        await asyncio.sleep(0.3)
    await faults


async def _trouble(made: World, nc: Client, names: list[str], seconds: float) -> None:
    """One fault after the other, spread over the time."""
    sim, js = made.sim, nc.jetstream()
    quiet = names[-3:]

    async def publish(subject: str, body: bytes, ident: str = "") -> None:
        await js.publish(subject, body, headers={"Nats-Msg-Id": ident} if ident else None)

    async def picture(sandbox: str) -> None:
        await publish(NAMES.out(sandbox), b'{"items":[{"kind":"file","data":"aGVsbG8=","name":"hello.txt"}]}')

    sim.set_fault(FaultRule(fault="F1", endpoint="sendmessage", probability=0.1, params={"status": 503}))
    sim.set_fault(FaultRule(fault="F13", bot=made.bots[names[0]].bot, probability=0.3))
    sim.set_fault(FaultRule(fault="F1", endpoint="getupdates", probability=0.05))
    sim.set_fault(FaultRule(fault="F16", bot=made.bots[names[2]].bot))  # each message comes twice
    for sandbox in quiet[:2]:
        sim.say(made.bots[sandbox].bot, "hello")
    pause_s = seconds / 8
    await asyncio.sleep(pause_s)
    sim.kill_token(made.bots[quiet[0]].bot)
    for number in range(3):  # parked: nobody wrote
        await publish(NAMES.out(quiet[2]), b'{"text":"hi"}', f"quiet.{number}")
    await asyncio.sleep(pause_s)
    sim.set_fault(FaultRule(fault="F11", bot=made.bots[quiet[1]].bot))
    await publish(NAMES.out(quiet[1]), b'{"text":"hi"}')
    await picture(names[3])
    await asyncio.sleep(pause_s)
    await publish(NAMES.out(names[4]), b"{")
    await publish(NAMES.out("nobody"), b'{"text":"hi"}')
    await publish(NAMES.out(names[5]), b'{"text":"again","id":"again"}')
    await publish(NAMES.out(names[5]), b'{"text":"again","id":"again"}')
    await asyncio.sleep(pause_s)
    for sandbox in names[6:9]:
        await picture(sandbox)
    answer = await nc.request("wechat.svc.login.start", b'{"sandbox":"new"}', timeout=10)
    login = json.loads(answer.data)
    await asyncio.sleep(pause_s)
    await nc.request("wechat.svc.login.cancel", json.dumps({"login": login["login"]}).encode(), timeout=10)
