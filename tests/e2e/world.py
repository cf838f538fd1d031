"""A whole bridge to try things on: a real nats-server, the simulator over sockets, adapters as processes.

`World` runs them and plays platform, sandboxes and people; `audit` compares what people said and saw with what the
bus carries.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import signal
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import nats
from nats.aio.client import Client

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import FINAL_OUTCOMES, Bind, Erase, Receipt, Unbind
from adapter.contract.names import Names
from adapter.simulator import BotRecord, Simulator, SimulatorSettings
from tests import canary
from tests.e2e.audit import Audit
from tests.e2e.audit import audit as audit  # noqa: PLC0414
from tests.e2e.cluster import NatsCluster
from tests.e2e.memory import SMALL, in_memory
from tests.e2e.reading import inbox as inbox  # noqa: PLC0414
from tests.e2e.reading import read_media as read_media  # noqa: PLC0414
from tests.e2e.reading import stream as stream  # noqa: PLC0414
from tests.e2e.waiting import eventually as eventually  # noqa: PLC0414
from tests.e2e.waiting import free_port as free_port  # noqa: PLC0414
from tests.e2e.waiting import until as until  # noqa: PLC0414
from tests.forks import Forked, fork

NAMES = Names()


class AdapterProcess:
    """`wechat-nats run` as an operator starts it; its log goes to a file. `parts`: other arguments of `Replica`;
    `module`: another program with the same commands."""

    def __init__(
        self, environ: dict[str, str], log: Path, parts: dict[str, Any] | None = None, module: str = "adapter"
    ) -> None:
        self._environ = environ
        self._program = ["tests.e2e.replica", json.dumps(parts)] if parts else [module, "run"]
        self.log = log
        self.process: Forked | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Starts it, unless it runs."""
        async with self._starting:
            if self.running:
                return
            with self.log.open("ab") as out:
                environ = {**os.environ, **self._environ}
                self.process = await fork(*self._program, env=environ, stdout=out, stderr=out)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def http_port(self) -> int:
        """Where its /metrics are, by the last word of its log; 0 where it has not started."""
        found = re.findall(rb'"adapter.started".*"http":(\d+)', self.log.read_bytes())
        return int(found[-1]) if found else 0

    async def ended(self) -> int:
        """Waits for the end; the exit code."""
        assert self.process is not None
        return await self.process.wait()

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.ended()

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What it logged of an event, in all its lives; a kill may have cut a line short."""
        lines = [line for line in self.log.read_bytes().splitlines() if f'"{event}"'.encode() in line]
        whole = [line for line in lines if line.endswith(b"}") and line.count(b'{"timestamp"') == 1]
        found = [msgspec.json.decode(line, type=dict[str, Any]) for line in whole]
        return [line for line in found if line.get("body") == event]

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def _get(self, path: str) -> bytes:
        def get() -> bytes:
            try:
                with urllib.request.urlopen(f"http://{self._environ['WECHAT_NATS_HTTP_ADDR']}{path}") as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as exc:
                return exc.read()

        return await asyncio.to_thread(get)

    async def unready(self) -> dict[str, str]:
        """What fails of /readyz, with its words. Only for one that was given a port."""
        checks = msgspec.json.decode(await self._get("/readyz"))
        return {check["name"]: check["detail"] for check in checks if not check["ok"]}

    async def is_ready(self) -> bool:
        return not await self.unready()

    async def metric(self, sample: str) -> float:
        """A sample of /metrics, without the prefix. Only for one that was given a port."""
        for line in (await self._get("/metrics")).decode().splitlines():
            if line.startswith(f"wechat_adapter_{sample} "):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no such sample: {sample}")

    def said(self, event: str) -> int:
        """How many lines of its log are of this event."""
        return self.log.read_text().count(f'"body":"{event}"')


def time_ms(line: dict[str, Any]) -> float:
    """When a line was logged: Unix milliseconds."""
    return datetime.fromisoformat(line["timestamp"]).timestamp() * 1000


class World:
    """Everything that runs. Made by `world`."""

    def __init__(
        self, folder: Path, sim: Simulator, url: str, environ: dict[str, str], parts: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.sim = sim
        self.url = url
        self.servers: EmbeddedNats | None = None
        self.nodes: NatsCluster | None = None
        self.adapters: list[AdapterProcess] = []
        self.bots: dict[str, BotRecord] = {}
        """By sandbox."""
        self.said: dict[str, list[str]] = defaultdict(list)
        """What each sandbox's user wrote, in order."""
        self.said_ids: dict[tuple[str, str], str] = {}
        """iLink's id of each, by sandbox and text."""
        self.sent: dict[str, list[str]] = defaultdict(list)
        """The ids of each sandbox's commands, in order; the text is made of the id."""
        self._environ = environ
        self._parts = parts or {}
        self._clients: list[Client] = []

    @property
    def server(self) -> EmbeddedNats:
        """The one nats-server, where there is one."""
        assert self.servers is not None
        return self.servers

    @property
    def cluster(self) -> NatsCluster:
        """The three nats-servers, where there are three."""
        assert self.nodes is not None
        return self.nodes

    async def nc(self) -> Client:
        """A connection that survives restarts of the server; `close` ends it."""

        async def quiet(_: Exception) -> None:
            return None

        client = await nats.connect(
            self.url.split(","),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.1,
            ping_interval=1,
            error_cb=quiet,
            pending_size=1 << 24,
        )
        self._clients.append(client)
        return client

    async def add_adapter(self, *, module: str = "adapter", **environ: str) -> AdapterProcess:
        log = self.folder / f"adapter-{len(self.adapters)}.log"
        adapter = AdapterProcess(self._environ | environ, log, self._parts, module)
        self.adapters.append(adapter)
        await adapter.start()
        return adapter

    async def begun(self) -> tuple[Client, BotRecord]:
        """One adapter, and the bot of sandbox s1, whose user has said hello."""
        await self.add_adapter()
        nc, bot = await self.nc(), self.sim.add_bot()
        await self.bind(nc, "s1", bot)
        self.say("s1", "hello")
        await self.settle(nc)
        return nc, bot

    async def bind(self, nc: Client, sandbox: str, bot: BotRecord, **fields: Any) -> Receipt:
        """Binds as the platform does, and waits for the receipt."""
        self.bots[sandbox] = bot
        bind = Bind(bot=bot.bot, bot_token=bot.token, user=bot.user, **fields)
        return await self.control(nc, sandbox, bind)

    async def control(self, nc: Client, sandbox: str, said: Bind | Unbind | Erase) -> Receipt:
        """Says a bind, unbind or erase, and waits for its receipt at an inbox."""
        inbox = nc.new_inbox()
        answers = await nc.subscribe(inbox)
        await nc.flush()
        headers = {"Reply-To": inbox, "Nats-Msg-Id": inbox}
        subject = NAMES.said(type(said).__name__.lower(), sandbox)
        await self._store(nc, subject, msgspec.json.encode(said), headers)
        message = await answers.next_msg(timeout=60)
        await answers.unsubscribe()
        return msgspec.json.decode(message.data, type=Receipt)

    async def _store(self, nc: Client, subject: str, payload: bytes, headers: dict[str, str]) -> int:
        """A js.publish that is repeated until the stream has it, as a careful service does."""
        while True:
            try:
                return (await nc.jetstream(timeout=2).publish(subject, payload, headers=dict(headers))).seq
            except (nats.errors.Error, nats.js.errors.Error, TimeoutError):
                await asyncio.sleep(0.1)

    def say(self, sandbox: str, text: str) -> None:
        """The sandbox's user writes."""
        self.said[sandbox].append(text)
        self.said_ids[sandbox, text] = self.sim.say(self.bots[sandbox].bot, text).message_id

    async def command(self, nc: Client, sandbox: str, ident: str, *, plain: bool = False) -> None:
        """The sandbox (or with `plain` a service, on wechat.out) sends a text that names the command."""
        self.sent[sandbox].append(ident)
        body: dict[str, Any] = {"text": f"answer {ident}"}
        if plain:
            body["sandbox"] = sandbox
        subject = NAMES.out_plain if plain else NAMES.out(sandbox)
        await self._store(nc, subject, msgspec.json.encode(body), {"Nats-Msg-Id": ident})

    def phone_texts(self, sandbox: str) -> list[str]:
        """What the sandbox's user sees, merged texts apart."""
        shown = self.sim.phone(self.bots[sandbox].user)
        return [text for message in shown for text in message.text.split("\n\n")]

    async def receipts(self, nc: Client) -> list[Receipt]:
        """All receipts on the bus."""
        return [
            msgspec.json.decode(data, type=Receipt)
            for _, data in await stream(nc, NAMES.stream_event, NAMES.receipts("*"))
        ]

    async def settle(self, nc: Client, *, patience_s: float = 150.0, lossy: bool = False) -> None:
        """Waits until every command has its final receipt and every message is on the bus; `lossy`: or nothing is on
        its way any more, as iLink counts it.

        Users whose answers are parked write once more, as people do.
        """
        wanted = {ident for idents in self.sent.values() for ident in idents}
        before = quiet = 0
        end = asyncio.get_running_loop().time() + patience_s  # a cancellation may get lost inside nats-py
        while asyncio.get_running_loop().time() < end:
            receipts = await self.receipts(nc)
            final = {receipt.command for receipt in receipts if receipt.outcome in FINAL_OUTCOMES}
            stored = await inbox(nc, "*")
            said = sum(len(texts) for texts in self.said.values())
            quiet = quiet + 1 if len(stored) == before and not self.sim.stats().pending else 0
            before = len(stored)
            if wanted <= final and (len(stored) >= said or (lossy and quiet >= 10)):
                return
            waiting = {r.sandbox for r in receipts if r.outcome == "parked" and r.command in wanted - final}
            for sandbox in sorted(waiting):
                self.say(sandbox, f"go on {len(self.said[sandbox])}")
            await asyncio.sleep(0.5)
        outcomes = {receipt.command: f"{receipt.outcome} {receipt.reason}" for receipt in receipts}
        left = {ident: outcomes.get(ident, "no receipt") for ident in sorted(wanted - final)}
        raise TimeoutError(f"{said - len(stored)} messages are not on the bus, and not settled are {left}")

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        for adapter in self.adapters:
            if adapter.running:
                await adapter.kill()

    def texts(self) -> set[str]:
        """What people and their sandboxes wrote."""
        texts = {text for said in self.said.values() for text in said if len(text) > 8}
        return texts | {f"answer {ident}" for idents in self.sent.values() for ident in idents}

    async def leaks(self) -> list[str]:
        """Secrets, and what people wrote, in what the adapters log, tell Prometheus and were started with.

        Before `close`, which it needs first for the disk to be whole.
        """
        found = []
        secrets = [(secret, what) for what, secret in canary.MARKS.items()]
        secrets += [*canary.keys_of(self.sim).items(), *((text, canary.WRITTEN) for text in self.texts())]
        for adapter in self.adapters:
            log = adapter.log.read_bytes()
            found += canary.leaks(adapter.log.name, log, secrets)
            if adapter.running and adapter.process is not None:
                arguments = canary.arguments(adapter.process.pid)
                found += canary.leaks("arguments of a process", arguments, [*secrets, (TOKEN_KEY, "the key")])
            if adapter.running and (port := adapter.http_port()):
                with contextlib.suppress(httpx.HTTPError):  # it may be stopped, or frozen
                    async with httpx.AsyncClient(trust_env=False, timeout=2) as http:
                        metrics = await http.get(f"http://127.0.0.1:{port}/metrics")
                        found += canary.leaks("/metrics", metrics.content, secrets)
        return found


SOON = {"stale_retry_s": (0.2, 0.4, 0.6)}
"""As `parts`: a dead token needs a login after a second."""
TOKEN_KEY = base64.b64encode(bytes(range(32))).decode()


def fast(**settings: Any) -> SimulatorSettings:
    """A simulator that holds polls for half a second and answers at once."""
    return msgspec.convert({"hold_ms": 500, "hint_ms": 5000, "send_latency_ms": 0} | settings, SimulatorSettings)


def environ_of(url: str, sim: Simulator) -> dict[str, str]:
    """An adapter between a NATS and a simulator that wastes no time."""
    return {
        "NATS_URL": url,
        "WECHAT_NATS_TOKEN_KEY": TOKEN_KEY,
        "WECHAT_NATS_ILINK_BASE_URL": sim.url,
        "WECHAT_NATS_CDN_BASE_URL": sim.cdn_url,
        "WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1",
        "WECHAT_NATS_SEND_GAP_MS": "0",
        "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0",
        "WECHAT_NATS_LEASE_S": "2",
        "WECHAT_NATS_DRAIN_S": "20",
    }


@contextlib.asynccontextmanager
async def world(
    folder: Path,
    *,
    environ: dict[str, str] | None = None,
    parts: dict[str, Any] | None = None,
    clustered: bool = False,
    bus: EmbeddedNats | NatsCluster | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A server or a cluster of three (or `bus`, not entered yet), a simulator (with `settings`), no adapter yet.

    `parts`: what the adapters are made with (see `replica`).
    """
    async with contextlib.AsyncExitStack() as stack:
        sim = await stack.enter_async_context(Simulator(fast(**settings)))
        if bus is None:
            stack.enter_context(in_memory(folder / "nats"))
        server = bus or (NatsCluster(folder / "nats") if clustered else EmbeddedNats(folder / "nats", free_port()))
        await stack.enter_async_context(server)
        replicas = {"WECHAT_NATS_REPLICAS": "3" if isinstance(server, NatsCluster) else "1"}
        settings_of_adapter = environ_of(server.url, sim) | replicas
        made = World(folder, sim, server.url, settings_of_adapter | SMALL | (environ or {}), parts)
        if isinstance(server, NatsCluster):
            made.nodes = server
        else:
            made.servers = server
        leaks = []
        try:
            yield made
            leaks = await made.leaks()
        finally:
            await made.close()
            server.kill()  # a clean stop takes 10 ms for each of the 34 consumers
        leaks += canary.leaks_on_disk(folder / "nats", made.texts())
        assert not leaks, "\n".join(leaks)


async def load(made: World, nc: Client, *, rounds: int, pause_s: float, rng: random.Random, first: int = 0) -> None:
    """Every user writes `rounds` messages and every sandbox sends as many commands, mixed by chance."""
    for number in range(first, first + rounds):
        sandboxes = list(made.bots)
        rng.shuffle(sandboxes)
        for sandbox in sandboxes:
            made.say(sandbox, f"message {number}")
        # every third sandbox is served over plain wechat.out; what goes over both has no order between the two
        await asyncio.gather(
            *(made.command(nc, sandbox, f"{sandbox}.{number}", plain=sandbox[-1] in "369") for sandbox in sandboxes)
        )
        await asyncio.sleep(pause_s)


async def loaded(
    made: World, trouble: Coroutine[Any, Any, None], *, rounds: int, pause_s: float, rng: random.Random
) -> Audit:
    """What is found after a load during which `trouble` came, once everything has healed and settled."""
    nc = await made.nc()
    loading = asyncio.create_task(load(made, nc, rounds=rounds, pause_s=pause_s, rng=rng))
    await trouble
    await loading
    made.sim.clear_faults()
    await made.settle(nc)
    found = await audit(made, nc)
    return found
