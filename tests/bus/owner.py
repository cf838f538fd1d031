"""One replica's leases and nothing else, as a process that can be killed and stopped.

`python -m tests.bus.owner NAME FILE URL…`: each 10 ms it asks all its tenures whether it may act, and adds the time
and the answer to the file. It ends with its standard input.
"""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import sys
from pathlib import Path

from adapter.bridge.leases import Leases
from adapter.bridge.presence import Presence
from adapter.contract.names import Names
from adapter.errors import LeaseLost
from adapter.jetstream.buckets import KvBucket
from adapter.jetstream.managed_connection import CoreNats, ManagedConnection
from adapter.settings import Settings
from adapter.tools.metrics import Metrics
from adapter.tools.timing import PerTickLimiter, SystemClock

PARTITIONS = 32
LEASE_S = 4.0
LOOK_S = 0.01
PAUSE_S = 0.005
"""Time between question and note after which the answer says nothing: the process was held up."""
ACT = struct.Struct("<dI")
"""When it acted, and for which partitions: a bit each."""


def acts(leases: Leases) -> int:
    """The partitions for which this replica may act now."""
    found = 0
    for number, tenure in leases.owned.items():
        try:
            tenure.check()
        except LeaseLost:
            continue
        found |= 1 << number
    return found


async def run(name: str, place: Path, urls: list[str]) -> None:
    connection, clock, names = ManagedConnection(Settings(nats_url=tuple(urls)), name), SystemClock(), Names()
    leases = Leases(
        KvBucket(connection, names.leases, replicated=True),
        Presence(CoreNats(connection), names, clock, name),
        clock,
        Metrics(),
        PerTickLimiter(64).wait_tick,
        partitions=PARTITIONS,
        lease_s=LEASE_S,
    )
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), os.kill, os.getpid(), signal.SIGKILL)
    with place.open("ab", buffering=0) as file:
        async with asyncio.TaskGroup() as group:
            group.create_task(connection.run())
            group.create_task(leases.run(leases.release))
            while True:
                began, found, now = clock.monotonic(), acts(leases), clock.monotonic()
                if now - began < PAUSE_S:
                    file.write(ACT.pack(now, found))
                await asyncio.sleep(LOOK_S)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
