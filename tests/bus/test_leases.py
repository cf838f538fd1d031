"""Leases on three real servers, by three processes: whatever is killed, stopped or cut off, no two act for one
partition at once.

`python -m tests.bus.test_leases --rounds 200` does it for longer, and prints how long nobody acted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import nats
import pytest
from nats.js.errors import APIError

from adapter.cli.embedded import find_server
from adapter.contract.names import Names
from adapter.jetstream.managed_connection import ManagedConnection
from adapter.jetstream.topology import create_stream, wanted_streams
from adapter.settings import Settings
from adapter.tools.timing import SystemClock
from tests.bus.owner import ACT, LEASE_S, PARTITIONS
from tests.e2e.cluster import NatsCluster
from tests.e2e.hole import Hole
from tests.e2e.memory import in_memory
from tests.e2e.waiting import free_port, until

REPLICAS = 3
SETTLED_S = 15.0
MERGED_S = 0.2
"""Acts of a replica with less time between them are one stretch, in which nobody else may act."""
EVENTS = ("kill", "freeze", "short freeze", "leader kill", "cut", "freeze and leader kill")
ROUNDS = len(EVENTS) + 4
STREAM = f"KV_{Names().leases}"


class Stretch:
    """A time in which a replica acted for a partition again and again."""

    def __init__(self, replica: int, at: float) -> None:
        self.replica = replica
        self.first = self.last = at


class Acts:
    """What the replicas noted, read as they note it."""

    def __init__(self, places: list[Path]) -> None:
        self.count = 0
        self.newest: list[tuple[float, int]] = [(0.0, 0)] * len(places)
        """The last note of each replica: when, and for which partitions."""
        self.twice: list[str] = []
        self.gaps: dict[int, float] = {}
        """The longest time for which nobody acted, by partition, since `since`."""
        self._places = places
        self._read = [0] * len(places)
        self._last: dict[int, dict[int, Stretch]] = defaultdict(dict)
        """By partition and replica."""
        self._acted_at: dict[int, float] = {}
        self.moves: list[tuple[int, int]] = []
        """Partitions that another replica than before acted for, and that replica."""
        self._owner: dict[int, int] = {}

    def look(self) -> None:
        """Reads what is new, in the order of time."""
        found: list[tuple[float, int, int]] = []
        for replica, place in enumerate(self._places):
            with contextlib.suppress(FileNotFoundError), place.open("rb") as file:
                file.seek(self._read[replica])
                data = file.read()
                data = data[: len(data) - len(data) % ACT.size]
                self._read[replica] += len(data)
                found += ((at, replica, mask) for at, mask in ACT.iter_unpack(data))
        for at, replica, mask in sorted(found):
            self.count += 1
            self.newest[replica] = at, mask
            for number in range(PARTITIONS):
                if mask >> number & 1:
                    self._act(number, replica, at)

    def _act(self, number: int, replica: int, at: float) -> None:
        stretches = self._last[number]
        mine = stretches.get(replica)
        if mine is None or at - mine.last > MERGED_S:
            mine = stretches[replica] = Stretch(replica, at)
        mine.last = max(mine.last, at)
        for other in stretches.values():
            if other.replica != replica and other.last >= mine.first and mine.last >= other.first:
                self.twice.append(f"partition {number}: {replica} and {other.replica} at {at:.3f}")
        if self._owner.get(number) != replica:
            self.moves.append((number, replica))
            self._owner[number] = replica
        before = self._acted_at.get(number, at)
        self.gaps[number] = max(self.gaps.get(number, 0.0), at - before)
        self._acted_at[number] = max(at, before)

    def is_settled(self, alive: int = REPLICAS) -> bool:
        """So many act, each for its share, and did so in the last moments."""
        self.look()
        now = SystemClock().monotonic()
        masks = [mask for at, mask in self.newest if now - at < 0.5]
        together = 0
        for mask in masks:
            together |= mask
        is_fair = {mask.bit_count() for mask in masks} <= {PARTITIONS // alive, -(-PARTITIONS // alive)}
        return len(masks) == alive and is_fair and together == 2**PARTITIONS - 1


class Replica:
    """A process that owns, behind holes: one to each server."""

    def __init__(self, number: int, folder: Path, cluster: NatsCluster | None = None, url: str = "") -> None:
        """`url`: of the server where there is no cluster, and no hole."""
        self.name = f"r{number}"
        self.place = folder / self.name
        self.holes = [Hole(node.url) for node in cluster.nodes] if cluster is not None else []
        self.url = url
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        urls = [hole.url for hole in self.holes] or [self.url]
        command = [sys.executable, "-m", "tests.bus.owner", self.name, str(self.place), *urls]
        with (self.place.with_suffix(".log")).open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Owners:
    """Three servers, three replicas, and what happens to them."""

    def __init__(self, cluster: NatsCluster, folder: Path) -> None:
        self.cluster = cluster
        self.replicas = [Replica(number, folder, cluster) for number in range(REPLICAS)]
        self.acts = Acts([replica.place for replica in self.replicas])
        self.unacted_s: dict[str, list[float]] = defaultdict(list)
        """By event: the longest time for which nobody acted, of each partition that it concerned."""
        self._chance = random.Random(7)

    async def start(self) -> None:
        await create_bucket(self.cluster.url)
        for replica in self.replicas:
            replica.start()
        await self.settled()

    async def settled(self) -> None:
        await until(self.acts.is_settled, f"all act again, each for a share: {self.acts.newest}")

    async def round(self, number: int) -> None:
        """Something happens to a replica or the leader; then all is well again."""
        event, replica = EVENTS[number % len(EVENTS)], self.replicas[number // len(EVENTS) % REPLICAS]
        await asyncio.sleep(self._chance.uniform(0.0, 1.5))
        self.acts.look()
        self.acts.gaps.clear()
        theirs = self.acts.newest[self.replicas.index(replica)][1]
        concerned = [each for each in range(PARTITIONS) if "leader" in event or theirs >> each & 1]
        if event == "kill":
            replica.kill()
            await asyncio.sleep(6)
            replica.start()
        elif event == "leader kill":
            await self._leader_away(3.0)
        elif event == "cut":
            for hole in replica.holes:
                hole.swallow()
            await asyncio.sleep(self._chance.uniform(3.0, 9.0))
            for hole in replica.holes:
                hole.mend()
        else:
            replica.send(signal.SIGSTOP)
            if event == "freeze and leader kill":
                await self._leader_away(6.0)
            else:
                await asyncio.sleep(self._chance.uniform(5.0, 8.0) if event == "freeze" else 3.9)
            replica.send(signal.SIGCONT)
        await self.settled()
        self.unacted_s[event] += [self.acts.gaps[each] for each in concerned]
        assert self.acts.twice == []

    async def _leader_away(self, seconds: float) -> None:
        leader = await self.cluster.leader(STREAM)
        leader.kill()
        await asyncio.sleep(seconds)
        leader.start()
        await self.cluster.healthy()

    def table(self) -> str:
        rows = ["| event | partitions | nobody acted: median s | worst s |", "|---|--:|--:|--:|"]
        for event, found in self.unacted_s.items():
            rows.append(f"| {event} | {len(found)} | {statistics.median(found):.1f} | {max(found):.1f} |")
        return "\n".join([*rows, "", f"{self.acts.count} looks, {len(self.acts.twice)} times two acted at once."])


async def create_bucket(url: str, replicas: Literal[1, 3] = 3) -> None:
    settings = Settings(nats_url=tuple(url.split(",")), replicas=replicas)
    (wanted,) = (each for each in wanted_streams(Names(), settings) if each.name == STREAM)
    connection = ManagedConnection(settings, "test")
    running = asyncio.create_task(connection.run())
    await connection.wait_connected(30)
    await create_stream(connection, wanted)
    running.cancel()
    await asyncio.wait([running])


@contextlib.asynccontextmanager
async def three(folder: Path) -> AsyncIterator[Owners]:
    """Three servers, and three replicas that have not started."""
    with in_memory(folder / "nats"):
        async with NatsCluster(folder / "nats") as cluster, contextlib.AsyncExitStack() as stack:
            owners = Owners(cluster, folder)
            for replica in owners.replicas:
                for hole in replica.holes:
                    await stack.enter_async_context(hole)
            try:
                yield owners
            finally:
                for replica in owners.replicas:
                    if replica.process is not None:
                        replica.kill()


async def own(folder: Path, rounds: int) -> Owners:
    """So many rounds. Fails as soon as two act at once."""
    async with three(folder) as owners:
        await owners.start()
        for number in range(rounds):
            await owners.round(number)
            if sys.stderr.isatty() or __name__ == "__main__":
                print(f"{number + 1}/{rounds}", owners.acts.count, file=sys.stderr, flush=True)
        return owners


@pytest.mark.slow
async def test_no_two_act_at_once_whatever_is_killed_stopped_or_cut_off(tmp_path: Path) -> None:
    owners = await own(tmp_path, ROUNDS)
    assert owners.acts.count > ROUNDS * 500
    assert statistics.median(owners.unacted_s["kill"]) < LEASE_S + 2.0


@pytest.mark.slow
async def test_replicas_that_join_die_and_come_back_share_in_time_and_move_nothing_twice(tmp_path: Path) -> None:
    async with three(tmp_path) as owners:
        await create_bucket(owners.cluster.url)
        acts, third = owners.acts, owners.replicas[2]

        async def settled(alive: int) -> list[tuple[int, int]]:
            """What has moved, once all act for their shares and stay with them."""
            await until(lambda: acts.is_settled(alive), f"{alive} share: {acts.newest}", patience_s=SETTLED_S)
            moved, acts.moves = acts.moves, []
            await asyncio.sleep(5)  # what should not move has time to
            acts.look()
            assert acts.moves == []
            return moved

        for replica in owners.replicas:
            replica.start()
        await settled(3)
        third.kill()
        lost = acts.newest[2][1]
        moved = await settled(2)
        assert sorted(number for number, _ in moved) == [each for each in range(PARTITIONS) if lost >> each & 1]
        third.start()
        moved = await settled(3)
        assert {replica for _, replica in moved} == {2}
        assert len({number for number, _ in moved}) == len(moved) == PARTITIONS // REPLICAS
        assert acts.twice == []


ACCOUNT_BYTES = 4_000_000
CONFIG = """
listen: "127.0.0.1:{port}"
jetstream {{ store_dir: "{folder}" }}
accounts {{ A {{
  jetstream: {{ max_store: {limit} }}
  users: [
    {{ user: good, password: p }}
    {{ user: reads, password: p, permissions: {{ publish: {{ deny: "$KV.wechat_leases.>" }} }} }}
  ]
}} }}
"""


def start_server(config: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([str(find_server()), "-c", str(config)], stderr=subprocess.DEVNULL)


@contextlib.asynccontextmanager
async def limited(folder: Path, *users: str) -> AsyncIterator[tuple[str, list[Replica], Acts]]:
    """A server with an account that is soon full, and a replica for each of these users, which have not started."""
    port, config = free_port(), folder / "nats.conf"
    config.write_text(CONFIG.format(port=port, folder=folder / "js", limit=ACCOUNT_BYTES))
    server = start_server(config)
    replicas = [Replica(at, folder, url=f"nats://{user}:p@127.0.0.1:{port}") for at, user in enumerate(users)]
    try:
        url = f"nats://good:p@127.0.0.1:{port}"
        await create_bucket(url, replicas=1)
        yield url, replicas, Acts([replica.place for replica in replicas])
    finally:
        for replica in replicas:
            if replica.process is not None:
                replica.kill()
        server.kill()
        server.wait()


@pytest.mark.slow
async def test_one_without_the_permission_to_write_counts_for_nothing_and_moves_nothing(tmp_path: Path) -> None:
    async with limited(tmp_path, "good", "good", "reads") as (_, (*good, poor), acts):
        for replica in good:
            replica.start()
        await until(lambda: acts.is_settled(2), "two share")
        acts.moves.clear()
        poor.start()

        def runs() -> bool:
            acts.look()
            return acts.newest[2] != (0.0, 0)

        await until(runs, "the third one runs")
        await asyncio.sleep(8)  # what should not move has time to
        acts.look()
        assert [mask.bit_count() for _, mask in acts.newest] == [PARTITIONS // 2, PARTITIONS // 2, 0]
        assert (acts.moves, acts.twice) == ([], [])


@pytest.mark.slow
async def test_a_full_account_moves_nothing_and_keeps_every_owner(tmp_path: Path) -> None:
    """Nobody can renew, and nobody can take. Also one who comes meanwhile gets nothing."""
    async with limited(tmp_path, "good", "good", "good") as (url, (*early, late), acts):
        for replica in early:
            replica.start()
        await until(lambda: acts.is_settled(2), "two share")
        owned = [mask for _, mask in acts.newest[:2]]
        nc = await nats.connect(url)
        js = nc.jetstream()
        await js.add_stream(name="FILLER", subjects=["filler"])
        with contextlib.suppress(APIError):
            while True:
                await js.publish("filler", bytes(200_000))
        with contextlib.suppress(APIError):
            while True:
                await js.publish("filler", b"")

        def nobody_acts() -> bool:
            acts.look()
            return [mask for _, mask in acts.newest[:2]] == [0, 0]

        await until(nobody_acts, "nobody acts")
        acts.moves.clear()
        late.start()
        await asyncio.sleep(8)  # what should not move has time to
        acts.look()
        assert (acts.moves, [mask for _, mask in acts.newest]) == ([], [0, 0, 0])
        late.kill()
        await js.purge_stream("FILLER")
        await until(lambda: acts.is_settled(2), "all act again")
        assert (acts.moves, [mask for _, mask in acts.newest[:2]], acts.twice) == ([], owned, [])
        await nc.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills, stops and cuts off owners of leases.")
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="owners-"))
    print(asyncio.run(own(folder, given.rounds)).table())


if __name__ == "__main__":
    main()
