"""A model of large installations from measured unit costs: `python -m tests.bench.scale`.

It prints the table of docs/reports/scale.md and draws docs/reports/scale.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.bench.plot import bars

PLOT = Path(__file__).parents[2] / "docs" / "reports" / "scale.svg"
BOTS = (10_000, 100_000, 1_000_000)
DAY_S, GIB = 86_400, 1024**3


class Costs(NamedTuple):
    """What was measured (tests/bench/README.md), for TLS where it matters. CPU in seconds, sizes in bytes."""

    bot_s_per_s: float = 1.7 / 60 / 10_000
    """Adapter's CPU for a bot whose poll waits."""
    message_s: float = 264e-6
    """With 60 µs for the deletion of two records of the journal."""
    command_s: float = 225e-6
    server_bot_s_per_s: float = 0.4 / 60 / 10_000
    server_message_s: float = 81e-6
    """With 49 µs for these deletions."""
    server_command_s: float = 76e-6
    bot_memory: int = 70 * 1024
    process_memory: int = 60 * 1024**2
    server_bot_memory: int = 15 * 1024
    receipt_memory: int = 360
    """Of the server, for each receipt that is kept: its subject."""
    bot_disk: int = 8 * 1024
    message_disk: int = 500
    receipt_disk: int = 840


class Traffic(NamedTuple):
    """What is assumed."""

    messages: int = 20
    """Of a bot's user, each day."""
    commands: int = 25
    peak: float = 3.0
    """The busiest hour, of the mean."""
    kept_days: float = 3.0
    copies: int = 3
    """Servers that store each record; each of them is taken to spend what one server was measured to spend."""


class Limits(NamedTuple):
    """How full a part may be, and its price for a month."""

    bots: int = 10_000
    """Of one replica."""
    replica_cores: float = 0.6
    server_cores: float = 4.0
    server_memory: int = 32 * GIB
    core: float = 30.0
    gib_memory: float = 4.0
    gib_disk: float = 0.1


class Size(NamedTuple):
    """An installation."""

    bots: int
    replicas: int
    adapter_cores: float
    """Of all replicas in the busiest hour."""
    adapter_gib: float
    clusters: int
    """Groups of three servers."""
    server_cores: float
    """Of one server of a single cluster, in the busiest hour."""
    server_gib: float
    """Memory of such a server."""
    disk_gib: float
    """Of all servers."""
    a_month: float


def size(bots: int) -> Size:
    """The installation that serves so many bots."""
    costs, traffic, limits = Costs(), Traffic(), Limits()
    messages, commands = (bots * count / DAY_S * traffic.peak for count in (traffic.messages, traffic.commands))
    cores = bots * costs.bot_s_per_s + messages * costs.message_s + commands * costs.command_s
    replicas = 1 + max(-(-bots // limits.bots), int(cores / limits.replica_cores) + 1)  # one may end
    adapter_memory = replicas * costs.process_memory + bots * costs.bot_memory
    server_cores = bots * costs.server_bot_s_per_s
    server_cores += messages * costs.server_message_s + commands * costs.server_command_s
    receipts = bots * traffic.commands * traffic.kept_days
    server_memory = bots * costs.server_bot_memory + receipts * costs.receipt_memory
    disk = bots * (costs.bot_disk + traffic.messages * traffic.kept_days * costs.message_disk)
    disk = (disk + receipts * costs.receipt_disk) * traffic.copies
    clusters = int(max(server_cores / limits.server_cores, server_memory / limits.server_memory)) + 1
    a_month = limits.core * (cores / limits.replica_cores + clusters * 3 * max(1.0, server_cores / clusters))
    a_month += limits.gib_memory * (adapter_memory + 3 * server_memory) / GIB + limits.gib_disk * disk / GIB
    return Size(
        bots, replicas, cores, adapter_memory / GIB, clusters, server_cores, server_memory / GIB, disk / GIB, a_month
    )


def table(sizes: list[Size]) -> str:
    """The sizes as a table in Markdown."""
    rows = {
        "replicas of the adapter, one of which may end": [f"{each.replicas:,}" for each in sizes],
        "their cores in the busiest hour": [f"{each.adapter_cores:.2g}" for each in sizes],
        "their memory, GiB": [f"{each.adapter_gib:.3g}" for each in sizes],
        "clusters of three NATS servers": [f"{each.clusters}" for each in sizes],
        "cores of one server in the busiest hour, were there one cluster": [
            f"{each.server_cores:.2g}" for each in sizes
        ],
        "memory of one server, were there one cluster, GiB": [f"{each.server_gib:.3g}" for each in sizes],
        "disk of all servers, GiB": [f"{each.disk_gib:,.3g}" for each in sizes],
        "a month, US dollars": [f"{each.a_month:,.0f}" for each in sizes],
    }
    lines = ["| bots | " + " | ".join(f"{each.bots:,}" for each in sizes) + " |", "|---|" + "---|" * len(sizes)]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def main() -> None:
    sizes = [size(bots) for bots in BOTS]
    print(table(sizes))
    parts = {
        f"{each.bots:,} bots": {
            "adapter, GiB": each.adapter_gib,
            "one server, GiB": each.server_gib,
            "disks, GiB": each.disk_gib,
        }
        for each in sizes
    }
    PLOT.write_text(bars("Memory and disk, GiB", parts))


if __name__ == "__main__":
    main()
