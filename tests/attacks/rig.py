"""The rig of the attacks: one whole bridge, a victim whose latencies are measured, and an attacker beside it.

A module of this package is an attack: its docstring says what the attacker does and what must hold, and its
coroutine `attack(rig)` does it for `rig.seconds`; `prepare(rig)`, where there is one, comes before the victim is
measured. It may state what it needs as constants: `REPLICAS` (adapters), `ATTACKERS` (sandboxes of the attacker),
`ENVIRON` (settings of the adapters), `SIMULATOR` (settings of the simulator), `JETSTREAM` (options of the server's
JetStream), `OPEN` (why the victim may wait too long: its row says so and is no failure).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import math
import pkgutil
import random
import select
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import nkeys
from nats.aio.msg import Msg

import tests.attacks as suite
from adapter.contract.messages import FINAL_OUTCOMES, Inbound, Receipt
from adapter.contract.names import H_MSG_ID
from adapter.simulator import Simulator
from tests.bus.guarded import NAMES as NAMES  # noqa: PLC0414
from tests.bus.guarded import WITNESS as WITNESS  # noqa: PLC0414
from tests.bus.guarded import Guarded, Player, guarded
from tests.e2e.memory import SMALL
from tests.e2e.reading import inbox
from tests.e2e.world import AdapterProcess, World, environ_of, fast, until

VICTIM, ATTACKER = "victim", "attacker"
INBOUND_PER_S, COMMANDS_PER_S = 20, 10
"""What the victim's user writes and the victim answers."""
PATIENCE_S = 120.0
"""For what is on its way when an attack ends."""
SAMPLED_S = 0.1
"""Between two looks at the memory of the processes."""
INBOUND_TIMES, INBOUND_MS = 10, 250
"""The victim's inbound p99 may be so many times its quiet value, or so long."""
ADAPTER_MIB = 1024
LOSSES = ("lease.paused", "lease.lost")
"""Events of the log that say that a replica had to stop what it owned."""
WRITTEN = 256 * 1024
"""Bytes of one write of a flood."""


class Phase(NamedTuple):
    """The victim's latencies in a part of the run, in milliseconds."""

    inbound: list[float]
    receipts: list[float]

    def cells(self) -> tuple[str, str]:
        """p50 and p99 of both."""
        return _percentiles(self.inbound), _percentiles(self.receipts)


class Outcome(NamedTuple):
    """What an attack came to."""

    attack: str
    quiet: Phase
    during: Phase
    adapter_mib: float
    server_mib: float
    lost: int
    """Leases."""
    restarts: list[str]
    """Processes that ended."""
    missing: list[str]
    """What of the victim was lost or doubled."""
    broken: list[str]
    """What the attack itself found not to hold."""
    notes: list[str]
    known: str = ""
    """Why the victim may wait too long; "": it may not."""

    def wrong(self) -> list[str]:
        """What must not be, apart from time."""
        said = [f"{self.lost} leases lost"] if self.lost else []
        said += [f"adapter {self.adapter_mib:.0f} MiB"] if self.adapter_mib > ADAPTER_MIB else []
        return said + self.restarts + self.missing + self.broken

    def faults(self) -> list[str]:
        """What must not be."""
        return self.wrong() + ([] if self.known else self.late())

    def late(self) -> list[str]:
        """The victim's inbound p99, where it is too long."""
        p99 = percentile(self.during.inbound, 99)
        limit = max(INBOUND_MS, INBOUND_TIMES * percentile(self.quiet.inbound, 99))
        return [f"inbound p99 {p99:.0f} ms"] if p99 > limit else []

    def row(self) -> str:
        """A row of `HEAD`."""
        (quiet_in, quiet_out), (during_in, during_out) = self.quiet.cells(), self.during.cells()
        verdict = ", ".join(["open", *self.late(), self.known]) if self.known else "holds"
        if faults := self.faults():
            verdict = f"FAILS: {', '.join(faults)}"
        cells = [
            *(self.attack, f"{quiet_in} → {during_in}", f"{quiet_out} → {during_out}"),
            *(f"{self.adapter_mib:.0f}", f"{self.server_mib:.0f}", str(self.lost)),
            "; ".join([verdict, *self.notes]),
        ]
        return f"| {' | '.join(cells)} |"


HEAD = """\
| attack | victim inbound p50/p99 ms, before → during | receipts p50/p99 ms, before → during \
| adapter MiB | server MiB | leases lost | verdict |
|---|---|---|---:|---:|---:|---|"""


class Rig:
    """What an attack finds. Made by `run`."""

    def __init__(self, seconds: float, seed: int, server: Guarded, world: World, attackers: list[str]) -> None:
        self.seconds = seconds
        self.rng = random.Random(seed)
        self.server = server
        self.world = world
        self.attackers = attackers
        """Sandboxes with a bot each, whose credentials the attacker has."""
        self.notes: list[str] = []
        self.broken: list[str] = []

    @property
    def sim(self) -> Simulator:
        """iLink."""
        return self.world.sim

    def note(self, text: str) -> None:
        """Adds a figure to the row."""
        self.notes.append(text)

    def fail(self, text: str) -> None:
        """Adds what does not hold."""
        self.broken.append(text)

    async def connect(self, sandbox: str = ATTACKER) -> Player:
        """A connection with the sandbox's ordinary credentials."""
        return await self.server.connect(sandbox)

    async def flood(
        self,
        chunks: Iterable[bytes],
        *,
        sandbox: str = ATTACKER,
        bytes_per_s: float = math.inf,
        seconds: float | None = None,
    ) -> Flooded:
        """Writes such bytes of NATS's protocol on a connection of the sandbox, as fast as the server reads."""
        creds = Path(self.server.users[sandbox].environ["NATS_CREDS"])
        took = self.seconds if seconds is None else seconds
        return await asyncio.to_thread(_flood, self.server.url, creds, iter(chunks), bytes_per_s, took)


# The attacker's raw connection -----------------------------------------------------------------------------


class Flooded:
    """What a flood came to."""

    def __init__(self) -> None:
        self.chunks = 0
        self.written = 0
        """Bytes."""
        self.connections = 0
        self.heard: Counter[str] = Counter()
        """Errors that the server told, and acknowledgements and answers of services by their codes."""


def publish(subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None) -> bytes:
    """A publish in NATS's protocol."""
    reply = f"{reply} " if reply else ""
    if headers is None:
        return f"PUB {subject} {reply}{len(payload)}\r\n".encode() + payload + b"\r\n"
    block = b"NATS/1.0\r\n" + b"".join(f"{key}: {value}\r\n".encode() for key, value in headers.items()) + b"\r\n"
    return f"HPUB {subject} {reply}{len(block)} {len(block) + len(payload)}\r\n".encode() + block + payload + b"\r\n"


def _flood(url: str, creds: Path, chunks: Iterator[bytes], bytes_per_s: float, seconds: float) -> Flooded:
    done = Flooded()
    begun = time.monotonic()
    while (left := begun + seconds - time.monotonic()) > 0:
        try:
            with _connected(url, creds) as connection:
                done.connections += 1
                _write(connection, chunks, bytes_per_s, time.monotonic() + left, done)
        except OSError as exc:  # the server has enough of it: come again
            done.heard[type(exc).__name__] += 1
            time.sleep(0.05)
    return done


@contextlib.contextmanager
def _connected(url: str, creds: Path) -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("nats://").partition(":")
    lines = creds.read_text().splitlines()
    jwt, seed = lines[1], next(line for line in lines if line.startswith("SU"))
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with connection.makefile("rb") as reader:
            nonce = json.loads(reader.readline().partition(b" ")[2])["nonce"]
            signed = nkeys.from_seed(bytearray(seed.encode())).sign(nonce.encode())
            sig = base64.urlsafe_b64encode(signed).rstrip(b"=").decode()
            options = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True}
            connection.sendall(f"CONNECT {json.dumps({**options, 'jwt': jwt, 'sig': sig})}\r\nPING\r\n".encode())
            while not (line := reader.readline()).startswith(b"PONG"):
                if not line or line.startswith(b"-ERR"):
                    raise ConnectionError(line.decode())
        yield connection


def _write(connection: socket.socket, chunks: Iterator[bytes], bytes_per_s: float, end: float, done: Flooded) -> None:
    """Until `end`. Raises OSError where the server ends the connection."""
    connection.setblocking(False)
    begun, written, tail, pongs = time.monotonic(), 0, b"", b""
    waiting = memoryview(b"")
    while (now := time.monotonic()) < end:
        may_write = bool(waiting) or written < bytes_per_s * (now - begun)
        readable, writable, _ = select.select([connection], [connection] if may_write else [], [], 0.02)
        if readable:
            heard = connection.recv(WRITTEN)
            if not heard:
                raise ConnectionError
            pongs += b"PONG\r\n" * heard.count(b"PING\r\n")
            tail = _listen(tail + heard, done)
        if writable:
            if not waiting:
                waiting, pongs = memoryview(pongs + next(chunks)), b""
                done.chunks += 1
            sent = connection.send(waiting[:WRITTEN])
            waiting = waiting[sent:]
            written += sent
            done.written += sent


def _listen(heard: bytes, done: Flooded) -> bytes:
    """Counts what the server said in whole lines; the rest."""
    *lines, tail = heard.split(b"\r\n")
    for line in lines:
        if line.startswith(b"-ERR"):
            done.heard[line.decode()[:80]] += 1
        elif line.startswith((b"Nats-Service-Error-Code:", b"NATS/1.0 503")):
            done.heard[line.decode()[-3:]] += 1
        elif line.startswith(b'{"error":'):
            done.heard[str(json.loads(line)["error"].get("err_code"))] += 1
    return tail[-WRITTEN:]


# The victim --------------------------------------------------------------------------------------------------


class Victim:
    """A sandbox and its user, who talk steadily."""

    def __init__(self, world: World, player: Player) -> None:
        self._world = world
        self._nc = player.nc
        self._begun: dict[str, float] = {}
        """When a message was written, or a command first published, by its text or id."""
        self._ended: dict[str, float] = {}
        self._receipts: defaultdict[str, set[str]] = defaultdict(set)
        """Their Nats-Msg-Ids, by command."""
        self._heard: Counter[str] = Counter()
        self._number = 0

    async def listen(self) -> None:
        await self._nc.subscribe(NAMES.live(VICTIM), cb=self._on_message)
        await self._nc.subscribe(NAMES.receipts(VICTIM), cb=self._on_receipt)
        await self._nc.flush()

    async def _on_message(self, msg: Msg) -> None:
        text = msgspec.json.decode(msg.data, type=Inbound).text
        self._heard[text] += 1
        self._ended.setdefault(text, time.monotonic())

    async def _on_receipt(self, msg: Msg) -> None:
        receipt = msgspec.json.decode(msg.data, type=Receipt)
        if receipt.outcome in FINAL_OUTCOMES:
            # a publish that was repeated is heard twice under one id, as schemas/README.md tells authors
            self._receipts[receipt.command].add((msg.headers or {})[H_MSG_ID])
            self._ended.setdefault(receipt.command, time.monotonic())

    async def talk(self, until_done: Callable[[], bool], group: asyncio.TaskGroup) -> tuple[list[str], list[str]]:
        """Writes and answers at a steady pace, whatever comes back; texts and ids."""
        texts: list[str] = []
        idents: list[str] = []
        next_at = time.monotonic()
        while not until_done():
            self._number += 1
            text = f"message {self._number}"
            self._begun[text] = time.monotonic()
            self._world.say(VICTIM, text)
            texts.append(text)
            if self._number % (INBOUND_PER_S // COMMANDS_PER_S) == 0:
                ident = f"c{self._number}"
                self._begun[ident] = time.monotonic()
                group.create_task(self._world.command(self._nc, VICTIM, ident))
                idents.append(ident)
            next_at += 1 / INBOUND_PER_S
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        return texts, idents

    async def settled(self, patience_s: float = PATIENCE_S) -> None:
        """Returns when everything has come, or there is no more patience."""
        with contextlib.suppress(AssertionError):  # what is missing is told by name
            await until(lambda: len(self._ended) == len(self._begun), "all has come", patience_s=patience_s)

    def phase(self, texts: list[str], idents: list[str]) -> Phase:
        """What never came counts as if it came now."""
        now = time.monotonic()
        took = [[(self._ended.get(one, now) - self._begun[one]) * 1000 for one in some] for some in (texts, idents)]
        return Phase(*took)

    async def missing(self, witness: Player) -> list[str]:
        """What was lost or doubled, on the bus, on the phone, and among the receipts."""
        texts = [text for text in self._begun if text.startswith("message ")]
        idents = [ident for ident in self._begun if not ident.startswith("message ")]
        stored = Counter(message.text for message in await inbox(witness.nc, VICTIM))
        shown = Counter(self._world.phone_texts(VICTIM))
        checks = [
            ("messages on the bus", stored, texts),
            ("messages heard", self._heard, texts),
            ("final receipts", Counter({command: len(ids) for command, ids in self._receipts.items()}), idents),
            ("answers on the phone", shown, [f"answer {ident}" for ident in idents]),
        ]
        found = []
        for what, counts, wanted in checks:
            none = sum(not counts[one] for one in wanted)
            twice = sum(counts[one] > 1 for one in wanted)
            found += [f"{none} {what} missing"] if none else []
            found += [f"{twice} {what} doubled"] if twice else []
        return found


# A run -------------------------------------------------------------------------------------------------------


def attacks() -> dict[str, ModuleType]:
    """Every attack of this package by name."""
    names = [found.name for found in pkgutil.iter_modules(suite.__path__)]
    modules = {name: importlib.import_module(f"tests.attacks.{name}") for name in names if name != "__main__"}
    return {name: module for name, module in modules.items() if hasattr(module, "attack")}


async def run(name: str, folder: Path, *, seconds: float, seed: int = 1) -> Outcome:
    """One attack on a bridge of its own."""
    module = attacks()[name]
    attackers = [ATTACKER, *(f"{ATTACKER}-{number}" for number in range(2, getattr(module, "ATTACKERS", 1) + 1))]
    settings = {"quota": 0} | getattr(module, "SIMULATOR", {})
    options = getattr(module, "JETSTREAM", "")
    jetstream = f", sync_interval: always{options}"
    async with contextlib.AsyncExitStack() as stack:
        sim = await stack.enter_async_context(Simulator(fast(**settings)))
        made = guarded(folder, "jwt", sandboxes=[VICTIM, *attackers], jetstream=jetstream)
        server = await stack.enter_async_context(made)
        environ = environ_of(server.url, sim) | SMALL | server.users["adapter"].environ
        environ |= {"WECHAT_NATS_LEASE_S": "4", "WECHAT_NATS_SENDS_PER_WINDOW": "0"} | getattr(module, "ENVIRON", {})
        world = World(folder, sim, server.url, environ)
        stack.push_async_callback(world.close)
        for _ in range(getattr(module, "REPLICAS", 1)):
            await world.add_adapter()
        platform, witness = [await server.connect(who) for who in ("platform", WITNESS)]
        for sandbox in (VICTIM, *attackers):
            answer = await world.bind(platform.nc, sandbox, sim.add_bot())
            assert answer.outcome == "applied", answer
        await until(lambda: sim.stats().parked == 1 + len(attackers), "all are polled")
        for sandbox in attackers:
            world.say(sandbox, "hello")
        rig = Rig(seconds, seed, server, world, attackers)
        if hasattr(module, "prepare"):
            await module.prepare(rig)
        outcome = await _measure(name, rig, module.attack, witness)
        return outcome._replace(known=getattr(module, "OPEN", ""))


async def _measure(
    name: str, rig: Rig, attack: Callable[[Rig], Coroutine[Any, Any, None]], witness: Player
) -> Outcome:
    victim = Victim(rig.world, await rig.server.connect(VICTIM))
    await victim.listen()
    assert rig.server.process is not None
    memory: dict[int, float] = {}
    pids = [rig.server.process.pid, *(adapter.process.pid for adapter in rig.world.adapters if adapter.process)]
    async with sampled(pids, memory), asyncio.TaskGroup() as group:
        end = time.monotonic() + max(2.0, rig.seconds / 2)
        quiet = await victim.talk(lambda: time.monotonic() > end, group)
        await victim.settled()
        before = victim.phase(*quiet)
        attacking = asyncio.create_task(attack(rig))
        during = await victim.talk(attacking.done, group)
        await attacking
        await victim.settled()
    phase = victim.phase(*during)
    if cut := sum(adapter.said("bus.lost") for adapter in rig.world.adapters):
        rig.note(f"{cut} connections to NATS lost")
    return Outcome(
        attack=name,
        quiet=before,
        during=phase,
        adapter_mib=max(memory.get(pid, 0.0) for pid in pids[1:]),
        server_mib=memory.get(rig.server.process.pid, 0.0),
        lost=sum(adapter.said(event) for adapter in rig.world.adapters for event in LOSSES),
        restarts=_ended(rig.server.process, rig.world.adapters),
        missing=[] if rig.server.process.returncode is not None else await victim.missing(witness),
        broken=rig.broken,
        notes=rig.notes,
    )


def _ended(server: asyncio.subprocess.Process, adapters: list[AdapterProcess]) -> list[str]:
    ended = ["nats-server ended"] if server.returncode is not None else []
    return ended + [f"{adapter.log.stem} ended" for adapter in adapters if not adapter.running]


@contextlib.asynccontextmanager
async def sampled(pids: list[int], limit: dict[int, float]) -> AsyncIterator[None]:
    """Keeps the largest resident memory of processes, in MiB, while entered."""

    async def sample() -> None:
        while True:
            for pid in pids:
                with contextlib.suppress(OSError, ValueError):  # it has ended, which is told elsewhere
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])  # noqa: ASYNC240 -- no disk
                    limit[pid] = max(limit.get(pid, 0.0), pages * 4096 / (1 << 20))
            await asyncio.sleep(SAMPLED_S)

    sampling = asyncio.create_task(sample())
    try:
        yield
    finally:
        sampling.cancel()


def percentile(values: list[float], percent: float) -> float:
    """The nearest rank; 0 of none."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else 0.0


def _percentiles(values: list[float]) -> str:
    return f"{percentile(values, 50):,.0f}/{percentile(values, 99):,.0f}"
