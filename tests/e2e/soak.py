"""A long run under steady traffic: memory, tasks, open files and the bus must not grow.

`python -m tests.e2e.soak --minutes 30 --bots 20 --seed 1`. Some users talk all the time, some fall silent until their
windows close, and visitors come by bind or by QR code, say a word and go. The same seed gives the same plan; what
meets what in time is the machine's.

What is kept for hours or days by its age is kept for minutes here, so that it levels out while one waits; each table
that is bounded by a number is filled before anything is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx
import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.cli.embedded import EmbeddedNats
from adapter.contract.messages import FINAL_OUTCOMES, Bind, Login, Options, Receipt, Unbind
from adapter.contract.names import Names
from adapter.contract.repeats import KEEP
from adapter.jetstream import topology
from adapter.settings import read_settings
from tests.e2e.flatness import MIB, Bound, Series, Verdict, cpu_s, judge, of_process, picture, table
from tests.e2e.waiting import eventually, free_port, until
from tests.e2e.world import AdapterProcess

NAMES = Names()
SAMPLE_S = 5.0
HEAP_EVERY = 12
"""Samples; the server cleans its heap for it."""
AGE_S = 300
"""What the bus keeps by age goes after so long here; also the window in which streams remember ids."""
WARM_S = 600.0
"""Not judged: until then everything fills up, what has an age twice over."""
STAYS_S = (30.0, 120.0)
VISIT_EVERY_S = 6.0
HELPER_EVERY_S, HELPER_STAYS_S = 240.0, 40.0
WINDOW_S = 108.0
PARTS = {"stale_retry_s": (1, 2, 4), "unbound_s": 108}
"""What the adapters are made with."""

BOUNDS = (
    # In 20 minutes some 4,500 messages and commands and 100 visitors go through each adapter: the least leak that
    # shows is 350 bytes a message, or 15 kB a visitor. The allocator's own noise was below 0.5 MiB, at a level of 60.
    Bound(re.compile("adapter . (own )?memory"), 1.5 * MIB, 0.0, "noise of the allocator"),
    Bound(re.compile("adapter . tasks"), 10, 0.05, "visitors come and go by chance"),
    Bound(re.compile("adapter . open files"), 10, 0.05, "visitors come and go by chance"),
    Bound(re.compile("adapter . threads"), 1, 0.0, "a pool of threads fills up once"),
    Bound(re.compile("nats-server live memory"), 1.5 * MIB, 0.1, "as for an adapter"),
    Bound(re.compile("nats-server blocks in memory"), 16 * MIB, 0.0, "twenty streams have one each, of up to 8 MiB"),
    Bound(
        re.compile("nats-server memory"),
        8 * MIB,
        0.2,
        "Go gives memory back late, and asks for more before it cleans",
    ),
    Bound(re.compile(r"\S+ keys"), 10, 0.1, "visitors come and go by chance"),
    Bound(re.compile(r"\S+ bytes"), 0.125 * MIB, 0.1, "visitors come and go by chance"),
)


class Bot(NamedTuple):
    bot: str
    user: str
    token: str


class Simulator:
    """The simulated iLink in a process of its own, driven over HTTP."""

    def __init__(self, url: str, process: asyncio.subprocess.Process) -> None:
        self.url = url
        self.process = process
        self._http = httpx.AsyncClient(base_url=f"{url}/_sim/", timeout=30)

    async def act(self, call: str, **arguments: Any) -> Any:
        response = await self._http.post(call, json=arguments)
        if response.status_code != 200:
            raise AssertionError(f"{call}: {response.text}")
        return response.json()

    async def close(self) -> None:
        await self._http.aclose()


@contextlib.asynccontextmanager
async def simulator(folder: Path, seed: int) -> AsyncIterator[Simulator]:
    options = {"hold-ms": 10_000, "hint-ms": 10_000, "qr-hold-ms": 5000, "media-bytes-kept": 64 * MIB, "seed": seed}
    options |= {"history": 300, "records-per-bot": 100, "sends-per-bot": 300, "token-death-delay-s": 2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "simulator.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "adapter.simulator", *arguments, stdout=asyncio.subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    made = Simulator(json.loads(await process.stdout.readline())["url"], process)
    try:
        yield made
    finally:
        await made.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


class ProfiledNats(EmbeddedNats):
    """A server that says what its heap holds once it is cleaned: of its memory that is what could leak.

    Apart from the buffers of the blocks that its streams write: each as large as its block is by now, up to 8 MiB.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, free_port())
        self._profile = f"http://127.0.0.1:{free_port()}"

    def _write_config(self) -> Path:
        path = super()._write_config()
        path.write_text(f"prof_port: {self._profile.rpartition(':')[2]}\n{path.read_text()}")
        return path

    def _spawn(self, binary: Path, config: Path, lock: BinaryIO) -> None:
        os.environ["GODEBUG"] = "memprofilerate=32768"  # so fine that no block is missed; Python does not read it
        super()._spawn(binary, config, lock)

    async def heap(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Bytes. Its pools let go of what is unused at the second cleaning."""
        for _ in range(2):
            answer = await http.get(f"{self._profile}/debug/pprof/heap", params={"debug": 1, "gc": 1})
        (live,) = re.findall(r"^# HeapAlloc = (\d+)$", answer.text, re.MULTILINE)
        places = re.findall(r"^\d+: (\d+) \[.*\n((?:#\t.*\n)*)", answer.text, re.MULTILINE)
        blocks = sum(int(size) for size, stack in places if "getMsgBlockBuf" in stack)
        return {"nats-server live memory": float(live) - blocks, "nats-server blocks in memory": float(blocks)}


def environ_of(url: str, sim: Simulator) -> dict[str, str]:
    """What takes hours takes minutes."""
    return {
        "NATS_URL": url,
        "WECHAT_NATS_ILINK_BASE_URL": sim.url,
        "WECHAT_NATS_CDN_BASE_URL": f"{sim.url}/c2c",
        "WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1",
        "WECHAT_NATS_SEND_GAP_MS": "200",
        "WECHAT_NATS_WINDOW_HOURS": str(WINDOW_S / 3600),
        "WECHAT_NATS_PARK_HOURS": str(AGE_S / 3600),
        "WECHAT_NATS_IN_MAX_AGE_H": str(WINDOW_S / 3600 + 1),
        "WECHAT_NATS_IN_MAX_PER_PERSON": "50",
        "WECHAT_NATS_TOKEN_KEY": base64.b64encode(bytes(32)).decode(),
    }


async def short_lived(nc: Client, environ: dict[str, str]) -> None:
    """Makes the streams that keep things by their age, with another age; the adapter takes them as they are."""
    for wanted in topology.wanted_streams(NAMES, read_settings(environ)):
        if wanted.config.get("max_age"):
            config = wanted.config | {"max_age": AGE_S * topology.NS}
            answer = await nc.request(f"$JS.API.STREAM.CREATE.{wanted.name}", msgspec.json.encode(config), timeout=10)
            assert b'"error"' not in answer.data, answer.data


class Soak:
    """The platform, the sandboxes and the people."""

    def __init__(self, sim: Simulator, nc: Client, rng: random.Random) -> None:
        self.sim = sim
        self.nc = nc
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.received: set[str] = set()
        """Ids of inbound messages, as live subscribers see them."""
        self.open: set[str] = set()
        """Commands without a final receipt."""
        self.doubled = 0
        self.outcomes: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._visitors: set[str] = set()
        self.failures: list[str] = []

    # what people and programs do ---------------------------------------------------------------------

    async def listen(self) -> None:
        await self.nc.subscribe(NAMES.live("*"), cb=self._on_inbound, pending_msgs_limit=0, pending_bytes_limit=0)
        await self.nc.subscribe(NAMES.receipts("*"), cb=self._on_receipt, pending_msgs_limit=0, pending_bytes_limit=0)
        await self.nc.flush()

    async def _on_inbound(self, msg: Msg) -> None:
        ident = (msg.headers or {}).get("Nats-Msg-Id", "")
        self.doubled += ident in self.received
        self.received.add(ident)

    async def _on_receipt(self, msg: Msg) -> None:
        """A core subscriber sees what a publisher repeats; the stream has it once."""
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        if receipt.outcome in FINAL_OUTCOMES and receipt.command in self.open:
            self.open.discard(receipt.command)
            self.outcomes[receipt.outcome] += 1

    async def say(self, bot: Bot, kind: str = "text", **how: Any) -> None:
        self.counts["said"] += 1
        await self.sim.act("say_kind", to=bot.bot, kind=kind, text=f"message {next(self._numbers)}", **how)

    async def command(self, sandbox: str, *, plain: bool = False, **body: Any) -> None:
        ident = f"c{next(self._numbers)}"
        body = {"id": ident, "text": f"answer {ident}"} | body
        if "items" in body or "typing" in body:
            del body["text"]
        subject = NAMES.out_plain if plain else NAMES.out(sandbox)
        if plain:
            body["sandbox"] = sandbox
        self.open.add(ident)
        self.counts["commands"] += 1
        await self.nc.jetstream(timeout=10).publish(subject, msgspec.json.encode(body))

    async def control(self, sandbox: str, said: Bind | Unbind) -> None:
        inbox = self.nc.new_inbox()
        answers = await self.nc.subscribe(inbox, max_msgs=1)
        headers = {"Reply-To": inbox, "Nats-Msg-Id": inbox}
        subject = NAMES.said(type(said).__name__.lower(), sandbox)
        await self.nc.jetstream(timeout=10).publish(subject, msgspec.json.encode(said), headers=headers)
        message = await answers.next_msg(timeout=60)
        receipt = msgspec.json.decode(message.data, type=Receipt)
        assert receipt.outcome == "applied", receipt

    async def bind(self, sandbox: str, bot: Bot, **options: Any) -> None:
        self.counts["binds"] += 1
        self._visitors.add(sandbox)
        bind = Bind(bot=bot.bot, bot_token=bot.token, user=bot.user, options=Options(**options))
        await self.control(sandbox, bind)

    async def unbind(self, sandbox: str) -> None:
        self.counts["unbinds"] += 1
        self._visitors.discard(sandbox)
        await self.control(sandbox, Unbind(all=True))

    async def ask(self, verb: str, **body: Any) -> Login:
        answer = await self.nc.request(NAMES.svc(verb), msgspec.json.encode(body), timeout=20)
        return msgspec.json.decode(answer.data, type=Login)

    # the plan ----------------------------------------------------------------------------------------

    async def talk(self, residents: dict[str, Bot]) -> None:
        """About three messages and three commands a second, of every kind."""
        names = sorted(residents)
        for turn in itertools.count():
            sandbox = self.rng.choice(names)
            bot = residents[sandbox]
            await self.say(bot)
            await self.command(sandbox, plain=turn % 7 == 0)
            match turn % 8:
                case 1:
                    await self.say(bot, "image")
                case 2:
                    await self.command(sandbox, items=[{"kind": "image", "data": PNG, "caption": "see"}])
                case 3:
                    await self.command(sandbox, typing="on")
                    await self.command(sandbox)
                case 4:
                    await self.command(sandbox, typing="on")
                    await self.command(sandbox, typing="off")
                case 5:
                    await self.say(bot, "quote_full")
                case 6:
                    await self.say(bot, "voice")
                case 7:
                    await self.command(sandbox, text="word " * 1000)
            await asyncio.sleep(0.5)

    async def fall_silent(self, residents: dict[str, Bot]) -> None:
        """Sandboxes that go on while their users' windows close: commands are parked, sent, or expire."""
        for turn in itertools.count():
            for sandbox, bot in residents.items():
                await self.command(sandbox, when_closed="refuse" if turn % 5 == 4 else "park")
                if self.rng.random() < 0.08:
                    await self.say(bot)
                await asyncio.sleep(12.0 / len(residents))

    async def visit(self) -> None:
        """Every few seconds somebody who comes once; some come again as the same person."""
        users: list[str] = []
        ways = (self.by_bind, self.by_code, self.by_bind, self.cancels, self.by_code, self.loses_login, self.expires)
        for number in itertools.count():
            user = (
                self.rng.choice(users)
                if users and number % 4 == 3
                else f"v{number}{self.rng.getrandbits(40)}@im.wechat"
            )
            users = [*users, user][-50:]
            self.spawn(ways[number % len(ways)](f"v{number % 1000}", user))
            await asyncio.sleep(VISIT_EVERY_S)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (exc := done.exception()):
                self.failures.append(f"{type(exc).__name__}: {exc}")

        task.add_done_callback(ended)

    async def by_bind(self, sandbox: str, user: str) -> None:
        bot = Bot(**await self.sim.act("add_bot", user=user))
        await self.bind(sandbox, bot, auto_typing=True)
        await self.stay(sandbox, bot)

    async def by_code(self, sandbox: str, user: str) -> None:
        self.counts["logins"] += 1
        self._visitors.add(sandbox)
        login = await self.ask("login.start", sandbox=sandbox, options={"auto_typing": True})
        code = login.qrcode_url.rpartition("=")[2]
        await self.sim.act("scan", qrcode=code, user=user)
        record = await self.sim.act("confirm", qrcode=code)
        while login.status != "confirmed":
            await asyncio.sleep(0.5)
            login = await self.ask("login.status", login=login.login)
            assert login.status in ("wait", "scanned", "confirmed", "lost"), login
            if login.status == "lost":  # its replica was killed or stopped, or the bind is on its way
                self.counts["logins lost"] += 1
                await self.unbind(sandbox)
                return
        await self.stay(sandbox, Bot(record["bot"], user, ""))

    async def stay(self, sandbox: str, bot: Bot) -> None:
        await self.say(bot)
        await self.command(sandbox)
        await asyncio.sleep(self.rng.uniform(*STAYS_S))
        await self.unbind(sandbox)

    async def cancels(self, sandbox: str, user: str) -> None:
        self.counts["logins"] += 1
        login = await self.ask("login.start", sandbox=sandbox)
        await asyncio.sleep(5)
        await self.ask("login.cancel", login=login.login)

    async def expires(self, sandbox: str, user: str) -> None:
        self.counts["logins"] += 1
        await self.ask("login.start", sandbox=sandbox)

    async def loses_login(self, sandbox: str, user: str) -> None:
        bot = Bot(**await self.sim.act("add_bot", user=user))
        await self.bind(sandbox, bot)
        await self.say(bot)
        await asyncio.sleep(5)
        await self.sim.act("kill_token", bot=bot.bot)
        await self.command(sandbox)
        await asyncio.sleep(self.rng.uniform(*STAYS_S))
        await self.unbind(sandbox)

    async def help_out(self, helper: AdapterProcess) -> None:
        """A third replica that comes and goes: partitions move there and back."""
        while True:
            await asyncio.sleep(HELPER_EVERY_S)
            self.counts["replicas that came and went"] += 1
            await helper.start()
            await asyncio.sleep(HELPER_STAYS_S)
            helper.signal(signal.SIGTERM)
            assert await helper.ended() == 0

    async def say_goodbye(self, residents: dict[str, Bot]) -> None:
        """Visitors leave, and the users who stay write, so that what waits for them goes out."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        with contextlib.suppress(AssertionError):  # what a bot was told as it was unbound is lost with it
            await until(lambda: len(self.received) >= self.counts["said"], "all is on the bus", patience_s=30)
        for sandbox in sorted(self._visitors - residents.keys()):
            await self.unbind(sandbox)
        for _ in range(100):
            if not self.open:
                break
            for bot in residents.values():
                await self.say(bot)
            await asyncio.sleep(3)


PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0\x90wS\xde\0\0\0\x0cIDATx\x9cc\xf8\xcf\xc0\0\0\3\1\1"
    b"\0\xc9\xfe\x92\xef\0\0\0\0IEND\xaeB`\x82"
).decode()


# measuring -----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """What a run measured: each figure by name, and the CPU time of each process."""

    series: dict[str, Series]
    cpu: dict[str, float]


async def measure(
    pids: dict[str, int], ports: dict[str, int], server: ProfiledNats, nc: Client, began: float, into: Measured
) -> None:
    """Takes samples until cancelled."""
    async with httpx.AsyncClient(timeout=10) as http:
        for number in itertools.count():
            figures: dict[str, float] = {}
            if number % HEAP_EVERY == 0:
                figures |= await server.heap(http)
            for name, pid in pids.items():
                figures |= {f"{name} {what}": value for what, value in of_process(pid).items()}
                into.cpu[name] = cpu_s(pid)
            for name, port in ports.items():
                text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                figures[f"{name} tasks"] = sum(map(float, re.findall(r"^wechat_adapter_tasks\S* (\S+)$", text, re.M)))
            for name, state in (await states(nc)).items():
                figures[f"{name} keys"], figures[f"{name} bytes"] = state["messages"], state["bytes"]
            at_s = time.monotonic() - began
            print(f"{at_s / 60:6.1f} min  {progress(figures)}", file=sys.stderr, flush=True)
            for name, value in figures.items():
                series = into.series.setdefault(name, Series(name, [], []))
                series.at_s.append(at_s)
                series.values.append(value)
            await asyncio.sleep(SAMPLE_S)


def progress(figures: dict[str, float]) -> str:
    memory = [f"{value / MIB:.1f}" for name, value in figures.items() if re.fullmatch("adapter . own memory", name)]
    return f"own memory {', '.join(memory)} MiB, {figures['WECHAT_IN keys']:.0f} inbound messages"


async def states(nc: Client) -> dict[str, dict[str, Any]]:
    """Of every stream; a bucket's messages are its keys, deleted ones included, as it keeps one each."""
    answer = msgspec.json.decode((await nc.request("$JS.API.STREAM.LIST", timeout=10)).data)
    return {stream["config"]["name"]: stream["state"] for stream in answer["streams"]}


def panels(series: dict[str, Series]) -> list[tuple[str, list[Series]]]:
    """What the picture shows."""

    def some(names: str, what: str) -> list[Series]:
        found = [(re.fullmatch(f"({names}) {what}", name), line) for name, line in sorted(series.items())]
        return [line._replace(name=match[1]) for match, line in found if match]

    kept_by_age = "WECHAT_IN|WECHAT_EVENT|OBJ_wechat_media"
    return [
        ("own memory of the adapters", some("adapter .", "own memory")),
        ("tasks", some("adapter .", "tasks")),
        ("open files", some("adapter .", "open files")),
        ("memory of nats-server, and what of it is live", some("nats-server(?: live| blocks in)?", "memory")),
        ("keys of buckets", some("KV_wechat_(?:bindings|persons|polls|logins)", "keys")),
        ("messages of streams", some(kept_by_age, "keys")),
        ("bytes of streams", some(kept_by_age, "bytes")),
    ]


# the run -------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    seed: int
    minutes: float
    judged_from_s: float
    measured: Measured
    verdicts: list[Verdict]
    counts: Counter[str]
    outcomes: Counter[str]
    faults: list[str]
    spent_s: float

    def report(self) -> str:
        """Markdown: what went through, then each figure."""
        rows: list[tuple[str, Any]] = [
            ("seed", self.seed),
            ("minutes", f"{self.minutes:g}, of which the first {self.judged_from_s / 60:.0f} are not judged"),
            *sorted(self.counts.items()),
            ("final receipts", ", ".join(f"{count} {name}" for name, count in sorted(self.outcomes.items()))),
            *((f"cores used by {name}", f"{cpu / self.spent_s:.3f}") for name, cpu in self.measured.cpu.items()),
        ]
        lines = ["| what | figure |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
        return "\n".join([*lines, "", table(self.verdicts)])


async def run(folder: Path, *, seed: int, minutes: float, bots: int) -> Result:
    async with contextlib.AsyncExitStack() as stack:
        sim = await stack.enter_async_context(simulator(folder, seed))
        server = await stack.enter_async_context(ProfiledNats(folder / "nats"))
        stack.callback(server.kill)  # a clean stop takes 10 ms for each of the 34 consumers
        nc = await nats.connect(server.url, pending_size=1 << 24)
        stack.push_async_callback(nc.close)
        environ = environ_of(server.url, sim)
        await short_lived(nc, environ)
        adapters: dict[str, AdapterProcess] = {}
        ports: dict[str, int] = {}
        for name in ("adapter 1", "adapter 2", "helper"):
            ports[name] = free_port()
            own = {"WECHAT_NATS_HTTP_ADDR": f"127.0.0.1:{ports[name]}"}
            adapters[name] = AdapterProcess(environ | own, folder / f"{name}.log", PARTS)
            stack.push_async_callback(end, adapters[name])
        helper = adapters.pop("helper")
        del ports["helper"]
        for adapter in adapters.values():
            await adapter.start()
        soak = Soak(sim, nc, random.Random(seed))
        await eventually(lambda: _ready(ports), "both adapters are ready")
        began = time.monotonic()
        pids = {name: adapter.process.pid for name, adapter in adapters.items() if adapter.process}
        pids |= {"nats-server": server.pid, "simulator": sim.process.pid}
        measured = Measured({}, {})
        await soak.listen()
        residents = await settle_in(soak, bots, "r", auto_typing=True)
        silent = await settle_in(soak, max(2, bots // 4), "q")
        end_s = began + minutes * 60
        tasks = [
            asyncio.create_task(work)
            for work in (
                measure(pids, ports, server, nc, began, measured),
                soak.talk(residents),
                soak.fall_silent(silent),
                soak.visit(),
                soak.help_out(helper),
            )
        ]
        await asyncio.wait(tasks, timeout=max(1.0, end_s - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
        broken = [f"{task.exception()!r}" for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        spent_s = time.monotonic() - began
        await soak.say_goodbye(residents | silent)
        judged_from_s = min(WARM_S, minutes * 60 / 2)
        verdicts = [
            verdict
            for name in sorted(measured.series)
            if (verdict := judge(measured.series[name], judged_from_s, BOUNDS)) is not None
        ]
        faults = [*broken, *soak.failures, *await leftovers(soak), *crashes(folder)]
        faults += [f"{verdict.name} grows" for verdict in verdicts if not verdict.is_flat]
        return Result(
            seed, minutes, judged_from_s, measured, verdicts, soak.counts, soak.outcomes, faults, spent_s
        )  # fmt: skip


async def end(adapter: AdapterProcess) -> None:
    if adapter.running:
        await adapter.kill()


async def _ready(ports: dict[str, int]) -> bool:
    async with httpx.AsyncClient(timeout=2) as http:
        for port in ports.values():
            try:
                if (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code != 200:
                    return False
            except httpx.HTTPError:
                return False
    return True


async def settle_in(soak: Soak, count: int, letter: str, **options: Any) -> dict[str, Bot]:
    """Bots that stay to the end; each has heard as many messages as are ever remembered of one."""
    found = {}
    for number in range(count):
        bot = Bot(**await soak.sim.act("add_bot"))
        await soak.bind(f"{letter}{number}", bot, **options)
        await soak.sim.act("flood", to=bot.bot, messages=KEEP, size=16)
        soak.counts["said"] += KEEP
        found[f"{letter}{number}"] = bot
    return found


async def leftovers(soak: Soak) -> list[str]:
    """What was promised and did not come: messages on the bus, a final receipt for each command."""
    with contextlib.suppress(AssertionError):
        await until(lambda: len(soak.received) >= soak.counts["said"], "all came", patience_s=60)
    faults = [f"{len(soak.open)} commands without a final receipt: {sorted(soak.open)[:5]}"] if soak.open else []
    if missing := soak.counts["said"] - len(soak.received):
        faults.append(f"{missing} messages are not on the bus")
    if soak.doubled:
        faults.append(f"{soak.doubled} messages came twice")
    soak.counts["of these on the bus, once"] = len(soak.received)
    return faults


def crashes(folder: Path) -> list[str]:
    """What the logs tell of bugs."""
    found: dict[str, int] = defaultdict(int)
    for log in folder.glob("*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if re.search(r"\.crashed|Traceback|Task exception was never retrieved", line):
                found[f"{log.name}: {line[:200]}"] += 1
    return [f"{line} ({count} times)" for line, count in found.items()][:20]


async def until_signalled(work: Coroutine[Any, Any, Result]) -> Result:
    """A SIGTERM or ctrl-C ends everything that was started, too."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await task


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs for long and looks for what grows.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--bots", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {given.seed}, everything is in {folder}", file=sys.stderr)
    result = asyncio.run(until_signalled(run(folder, seed=given.seed, minutes=given.minutes, bots=given.bots)))
    (folder / "report.md").write_text(result.report() + "\n")
    (folder / "plot.svg").write_text(picture(panels(result.measured.series), result.judged_from_s))
    (folder / "samples.json").write_bytes(msgspec.json.encode(result.measured))
    print(result.report())
    print("\n".join(result.faults) or "nothing grows", f"\nreport.md, plot.svg and samples.json are in {folder}")
    return 1 if result.faults else 0


if __name__ == "__main__":
    sys.exit(main())
