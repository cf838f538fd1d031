"""Three nats-servers that form a JetStream cluster, each to be killed, frozen and started again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from pathlib import Path
from types import TracebackType

import msgspec
import nats
from nats.errors import Error as NatsError

from adapter.cli.embedded import find_server
from tests.e2e.waiting import eventually, free_port


class Node:
    """One server of the cluster."""

    def __init__(self, folder: Path, number: int, clients: list[str], routes: list[str]) -> None:
        """`clients` and `routes`: where each server listens for clients and for the others, as `host:port`."""
        self.name = f"n{number}"
        self.folder = folder / self.name
        self.url = f"nats://{clients[number]}"
        self.command: tuple[str, ...] = ()
        """What the server is started by, if by something."""
        self.process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        listed = ", ".join(f'"nats://{route}"' for route in routes)
        self.config = self.folder / "nats-server.conf"
        self.config.write_text(
            f"""
server_name: {self.name}
listen: "{clients[number]}"
jetstream {{ store_dir: "{self.folder}", sync_interval: always }}
lame_duck_duration: "30s"
lame_duck_grace_period: "1s"
cluster {{ name: c, no_advertise: true, listen: "{routes[number]}", routes: [{listed}], pool_size: 1 }}
"""
        )

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, str(find_server()), "-c", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def leave(self, number: int = signal.SIGTERM) -> None:
        """Ends it as an operator does: SIGTERM, or SIGUSR2 for a lame duck, which asks its clients to move first."""
        assert self.process is not None
        process = self.process
        self.send(number)
        while process.poll() is None:
            await asyncio.sleep(0.05)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def says(self) -> str:
        """The end of its log, for who wonders why it does not serve."""
        lines = (self.folder / "log").read_text().splitlines()[-20:]
        return "\n".join([f"{self.name} {'runs' if self.running else 'has ended'}, and says:", *lines])


class NatsCluster:
    """`async with NatsCluster(folder) as cluster: cluster.url`."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        clients, routes = self._addresses(size)
        self.nodes = [Node(folder, number, clients, routes) for number in range(size)]

    def _addresses(self, size: int) -> tuple[list[str], list[str]]:
        """Where each server listens, for clients and for the others."""
        listens = [f"127.0.0.1:{free_port()}" for _ in range(2 * size)]
        return listens[:size], listens[size:]

    @property
    def url(self) -> str:
        """All addresses, separated by commas."""
        return ",".join(node.url for node in self.nodes)

    async def __aenter__(self) -> NatsCluster:
        for node in self.nodes:
            node.start()
        try:
            await self.healthy()
        except BaseException as exc:
            for node in self.nodes:
                exc.add_note(node.says())
            self.kill()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        for node in self.nodes:
            if node.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(node.process.pid, signal.SIGCONT)
            node.kill()

    async def healthy(self) -> None:
        """Returns once JetStream has a leader that sees every server."""
        await eventually(self._is_healthy, "JetStream is there")

    async def _is_healthy(self) -> bool:
        async def unheard(_: Exception) -> None:
            return None

        with contextlib.suppress(NatsError, OSError, TimeoutError, KeyError):
            for node in self.nodes:
                nc = await nats.connect(node.url, allow_reconnect=False, connect_timeout=1, error_cb=unheard)
                try:
                    reply = await nc.request("$JS.API.INFO", timeout=1)
                    if "error" in msgspec.json.decode(reply.data):
                        return False
                finally:
                    await nc.close()
            return True
        return False

    async def leader(self, stream: str) -> Node:
        """The node that leads a stream."""
        while True:
            with contextlib.suppress(NatsError, OSError, TimeoutError, KeyError):
                url = next(node.url for node in self.nodes if node.running)
                nc = await nats.connect(url, allow_reconnect=False, connect_timeout=1)
                try:
                    reply = await nc.request(f"$JS.API.STREAM.INFO.{stream}", timeout=2)
                    name = msgspec.json.decode(reply.data)["cluster"]["leader"]
                    return next(node for node in self.nodes if node.name == name)
                finally:
                    await nc.close()
            await asyncio.sleep(0.1)
