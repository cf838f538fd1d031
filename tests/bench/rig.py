"""The processes of a benchmark and what they cost: a server, the peer, one bridge."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from adapter.cli.embedded import find_server
from adapter.contract.names import person_token, to_subject_token
from adapter.contract.records import Binding
from adapter.tools.seal import Sealer
from tests.authority import Authority
from tests.e2e.waiting import eventually, free_port

TOKEN_KEY = bytes(32)
ROOT = Path(__file__).parents[2]


class Process:
    """A child process: its CPU seconds so far, and its memory."""

    def __init__(
        self, argv: list[str], log: Path, environ: dict[str, str] | None = None, *, tells: bool = False
    ) -> None:
        """`tells`: its output is for `line`, not for the log."""
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if tells else out,
                stderr=out,
                cwd=ROOT,
                env=os.environ | (environ or {}),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self) -> str:
        """The next line of its output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().decode()

    def cpu_s(self) -> float:
        return time.clock_gettime((~self.pid << 3) | 2)  # to the nanosecond; /proc has ticks of 10 ms

    def memory_mib(self) -> float:
        """What is its own (private pages), as a container's limit counts it."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        sizes = [int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")]
        return sum(sizes) / 1024

    def stop(self, number: int = signal.SIGKILL) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)
        self._process.wait()


class Rig:
    """Everything for one measurement."""

    def __init__(self, folder: Path, *, tls: bool, sync: str, store: Path | None) -> None:
        self.folder = folder
        self.tls = tls
        self._port, nats_port = free_port(), free_port()
        self.nats_url = f"nats://127.0.0.1:{nats_port}"
        self.base_url = f"{'https' if tls else 'http'}://127.0.0.1:{self._port}"
        self.store = folder / "js"
        if store is not None:
            shutil.copytree(store, self.store)
        config = folder / "nats.conf"
        config.write_text(
            f'listen: "127.0.0.1:{nats_port}"\n'
            f'jetstream {{ store_dir: "{self.store}", {f"sync_interval: {sync}," if sync else ""} '
            f"max_file: 200G }}\n"
        )
        self.server = Process([str(find_server()), "-c", str(config)], folder / "nats.log")
        argv = [sys.executable, "-m", "tests.bench.peer", "--port", str(self._port)]
        self.peer = Process([*argv, *(["--tls", str(folder)] if tls else [])], folder / "peer.log", tells=True)
        self._admin = f"http://127.0.0.1:{json.loads(self.peer.line())['admin']}/admin/"
        self.bridges: list[Process] = []

    async def ask(self, what: str, **body: Any) -> Any:
        """The peer's admin."""
        request = urllib.request.Request(self._admin + what, json.dumps(body).encode())

        def post() -> Any:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)

        return await asyncio.to_thread(post)

    async def polled(self, bots: int) -> None:
        """Returns once so many bots are polled."""

        async def all_are() -> bool:
            await asyncio.sleep(0.05)
            return bool((await self.ask("stats"))["polling"] >= bots)

        await eventually(all_are, f"{bots} bots are polled", patience_s=120)

    async def taken(self, nc: Client) -> None:
        """Returns once a replica has taken a partition, as it does when all streams and buckets are there."""

        async def some_are() -> bool:
            with contextlib.suppress(nats.errors.Error, nats.js.errors.Error):
                info = await nc.jetstream().stream_info("KV_wechat_leases", subjects_filter="$KV.wechat_leases.0")
                return bool(info.state.subjects)
            return False

        await eventually(some_are, "a partition is taken")

    async def connect(self) -> Client:
        async def up() -> bool:
            with contextlib.suppress(OSError, nats.errors.Error):
                nc = await nats.connect(self.nats_url, connect_timeout=1, allow_reconnect=False, error_cb=_unheard)
                await nc.close()
                return True
            return False

        await eventually(up, "the server listens")
        return await nats.connect(self.nats_url, pending_size=64 * 1024 * 1024)

    def adapter(self) -> Process:
        """The real one, as it is deployed; limits that would stop the load are lifted, guarantees are not."""
        environ = {
            "NATS_URL": self.nats_url,
            "WECHAT_NATS_ILINK_BASE_URL": self.base_url,
            "WECHAT_NATS_ALLOWED_HOSTS": "127.0.0.1",
            "WECHAT_NATS_TOKEN_KEY": base64.b64encode(TOKEN_KEY).decode(),
            "WECHAT_NATS_SEND_GAP_MS": "0",
            "WECHAT_NATS_SENDS_PER_WINDOW": "0",
            "WECHAT_NATS_OUT_MAX_PER_SANDBOX": "1000000",
            "WECHAT_NATS_IN_MAX_PER_PERSON": "1000000",
            "WECHAT_NATS_CAPACITY": "20000",
            "WECHAT_NATS_HTTP_ADDR": "127.0.0.1:0",
            "WECHAT_NATS_LOG": "warning",
            "WECHAT_NATS_DRAIN_S": "5",  # a poll that waits is cut then: nobody is there to be answered
        }
        if self.tls:
            environ["SSL_CERT_FILE"] = str(self.folder / "ca.pem")
        command = [str(Path(sys.executable).with_name("wechat-nats")), "run"]
        self.bridges.append(Process(command, self.folder / f"adapter{len(self.bridges)}.log", environ))
        return self.bridges[-1]

    def floor(self, direction: str, bots: int) -> Process:
        """The bare bridge."""
        argv = [sys.executable, "-m", "tests.bench.floor", direction, "--ilink", self.base_url]
        argv += ["--nats", self.nats_url, "--bots", str(bots)]
        self.bridges.append(Process(argv, self.folder / "floor.log"))
        return self.bridges[-1]

    async def bind(self, nc: Client, bots: int) -> None:
        """Leaves in the buckets what an adapter leaves there that has bound so many bots.

        Binding ten thousand takes a while. No adapter must run.
        """
        sealer = Sealer((TOKEN_KEY,))
        for number in range(bots):
            bot = f"{number}@im.bot"
            token = sealer.seal(bot, f"{bot}:0600abcd")
            sandbox, user = f"s{number}", f"user{number}@im.wechat"
            person = person_token(sandbox, user)
            binding = Binding(sandbox=sandbox, bot=bot, token=token, user=user, person=person)
            await nc.publish(f"$KV.wechat_bindings.{to_subject_token(bot)}", msgspec.json.encode(binding))
        await nc.flush()
        js = nc.jetstream()

        async def stored() -> bool:
            return (await js.stream_info("KV_wechat_bindings")).state.messages == bots + 1  # with the layout key

        await eventually(stored, f"{bots} bindings are stored")

    def drop(self, bridge: Process) -> None:
        """Ends a bridge as an operator does."""
        self.bridges.remove(bridge)
        bridge.stop(signal.SIGTERM)

    def stop(self) -> None:
        for process in (*self.bridges, self.peer, self.server):
            process.stop()


@contextlib.asynccontextmanager
async def rig(folder: Path, *, tls: bool = False, sync: str = "", store: Path | None = None) -> AsyncIterator[Rig]:
    """`sync` "": the server's default, every two minutes; "always": each write. The folder is there.

    `store`: what the server has at its start, which is copied.
    """
    if tls:
        Authority(folder).issue("server")
    made = Rig(folder, tls=tls, sync=sync, store=store)
    try:
        yield made
    finally:
        made.stop()


class Received:
    """Counts what arrives on a subject; `when` is the moment of the newest, `ages_ms` what its text tells.

    `numbered`: iLink's ids, which grow. `disordered` are those that came twice or after later ones of their subject.
    """

    def __init__(self, *, timed: bool = False, numbered: bool = False) -> None:
        self.count = 0
        self.disordered = 0
        self.when = 0.0
        self.ages_ms: list[float] = []
        self._timed = timed
        self._numbered = numbered
        self._newest: dict[str, int] = {}
        self._enough = asyncio.Event()
        self._wanted = 0

    async def on_message(self, msg: Msg) -> None:
        self.count += 1
        self.when = time.monotonic()
        if self._numbered:
            ident = msg.data[7 : msg.data.index(b'"', 7)]  # {"id":"in:<bot>:m<number>", or the number alone
            number = int(ident.rpartition(b"m")[2])
            self.disordered += number <= self._newest.get(msg.subject, 0)
            self._newest[msg.subject] = number
        if self._timed:
            sent_ns = int(msgspec.json.decode(msg.data)["text"].removeprefix("at "))
            self.ages_ms.append((time.monotonic_ns() - sent_ns) / 1e6)
        if self.count >= self._wanted:
            self._enough.set()

    async def until(self, count: int, patience_s: float = 300.0) -> None:
        self._wanted = count
        if self.count >= count:
            return
        self._enough.clear()
        async with asyncio.timeout(patience_s):
            await self._enough.wait()


async def _unheard(_: Exception) -> None:
    """A server that does not listen yet is no news."""
