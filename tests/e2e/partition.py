"""A cluster whose servers have a network namespace each, so that real partitions can be made of it.

Each server has two cables: one to the clients, that is to this machine, and one to the other servers. A cable that is
down swallows packets, as a partition does: nobody is told that a connection is gone.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.e2e.cluster import NatsCluster, Node
from tests.e2e.waiting import call

Cable = Literal["clients", "servers"]
CABLES: tuple[tuple[Cable, int], ...] = (("servers", 98), ("clients", 97))
"""With the second byte of their addresses."""


async def why_not() -> str:
    """Why there can be no partitions here, "" if there can."""
    if shutil.which("ip") is None and await call("apt-get", "install", "--yes", "--quiet", "iproute2"):
        return "A partition takes network namespaces, and so the Debian package iproute2."
    name = f"wn{os.getpid()}"
    if await call("ip", "netns", "add", name):
        return "A partition takes network namespaces, which only root may make."
    await call("ip", "netns", "delete", name)
    return ""


class PartitionedCluster(NatsCluster):
    """`async with PartitionedCluster(folder) as cluster`; then `cut` and `mend` cables."""

    def __init__(self, folder: Path, size: int = 3) -> None:
        self._id = os.getpid() % 250
        super().__init__(folder, size)
        for node in self.nodes:
            node.command = ("ip", "netns", "exec", self._namespace(node))

    def _addresses(self, size: int) -> tuple[list[str], list[str]]:
        numbers = range(2, size + 2)
        return (
            [f"10.97.{self._id}.{number}:4222" for number in numbers],
            [f"10.98.{self._id}.{number}:6222" for number in numbers],
        )

    def _namespace(self, node: Node) -> str:
        return f"wn{self._id}-{node.name}"

    def _end(self, node: Node, cable: Cable) -> str:
        """The end of a cable that is in this machine's namespace."""
        return f"wn{self._id}{node.name}{cable[0]}"

    def _bridge(self, cable: Cable) -> str:
        return f"wn{self._id}{cable[0]}"

    async def __aenter__(self) -> PartitionedCluster:
        await self._remove()  # what a run with our id left that was killed
        try:
            await self._lay()
            await super().__aenter__()
        except BaseException:
            await self._remove()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await super().__aexit__(exc_type, exc, trace)
        await self._remove()

    async def cut(self, node: Node, cable: Cable) -> None:
        """From now on nothing gets through; connections stay as they are."""
        await _ip("link", "set", self._end(node, cable), "down")

    async def mend(self, node: Node, cable: Cable) -> None:
        await _ip("link", "set", self._end(node, cable), "up")

    async def _lay(self) -> None:
        for cable, net in CABLES:
            bridge = self._bridge(cable)
            await _ip("link", "add", bridge, "type", "bridge", "forward_delay", "0")
            await _ip("address", "add", f"10.{net}.{self._id}.1/24", "dev", bridge)
            await _ip("link", "set", bridge, "up")
        for number, node in enumerate(self.nodes, 2):
            space = self._namespace(node)
            await _ip("netns", "add", space)
            await _ip("-n", space, "link", "set", "lo", "up")
            for cable, net in CABLES:
                end = self._end(node, cable)
                await _ip("link", "add", end, "type", "veth", "peer", "name", cable, "netns", space)
                await _ip("link", "set", end, "master", self._bridge(cable), "up")
                await _ip("-n", space, "address", "add", f"10.{net}.{self._id}.{number}/24", "dev", cable)
                await _ip("-n", space, "link", "set", cable, "up")

    async def _remove(self) -> None:
        for node in self.nodes:
            await call("ip", "netns", "delete", self._namespace(node))
        for cable, _ in CABLES:
            await call("ip", "link", "delete", self._bridge(cable))


async def _ip(*arguments: str) -> None:
    assert not await call("ip", *arguments), f"ip {' '.join(arguments)} failed"
