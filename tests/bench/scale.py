"""A model of large installations from measured unit costs: `python -m tests.bench.scale`.

It prints the table of docs/reports/scale.md and draws docs/reports/scale.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from adapter.settings import Settings
from tests.bench.plot import bars

PLOT = Path(__file__).parents[2] / "docs" / "reports" / "scale.svg"
MILLION, DAY_S, KIB, GIB = 1_000_000, 86_400, 1024, 1024**3


class Minute(NamedTuple):
    """CPU seconds of a minute, for each of the people in a row "a minute" of `make bench`."""

    adapter: float
    server: float


# From `make bench`, the rows "a minute" of so many people, over TLS:
PEOPLE = 5000
QUIET = Minute(5.28 / PEOPLE, 2.28 / PEOPLE)
"""Nobody writes: polls wait, and each agent asks every half a minute. "CPU s/min", "server's CPU s/min"."""
BUSY = Minute(24.9 / PEOPLE, 21.2 / PEOPLE)
"""Each person writes once and is answered."""
PERSON, SERVER_PERSON = 69.4 * KIB, 29.1 * KIB
"""Memory of adapter and server for a person who writes: "KiB/bot", "server's KiB/bot"."""
PROCESS = 50 * 1024 * KIB
"""Memory of an adapter without people: the rest of "private MiB"."""

# Measured apart, with 40,000 messages and 80,000 to 200,000 receipts:
RECEIPT = 400
"""Memory of the server for the subject of a receipt, as long as it is kept."""
RECEIPT_DISK, MESSAGE_DISK, PERSON_DISK = 580, 850, 6 * KIB

# Assumed:
MESSAGES, ANSWERS, KEPT_DAYS = 20, 25, 3
"""Of a person, each day."""
PEAK = 3
"""The busiest hour, of the mean."""
COPIES = 3
"""Servers that store each record; each is taken to spend what one server was measured to spend."""

# Allowed, as the chart has it:
CAPACITY, REPLICA_CORES, REPLICA_MEMORY = 10_000, 0.6, 2 * GIB
SERVER_CORES, SERVER_MEMORY = 4.0, 32 * GIB
PARTITIONS = Settings().partitions
"""A replica owns whole ones: no cluster has more replicas."""

# Dollars a month:
CORE, GIB_MEMORY, GIB_DISK = 30.0, 4.0, 0.1


def cores(a_minute: float) -> Minute:
    """Of adapter and server, for a person who writes so often."""
    parts = (quiet + a_minute * (busy - quiet) for quiet, busy in zip(QUIET, BUSY, strict=True))
    return Minute(*(part / 60 for part in parts))


def server_memory() -> float:
    """For a person, in each server."""
    return SERVER_PERSON + ANSWERS * KEPT_DAYS * RECEIPT


def limits(a_minute: float) -> tuple[dict[str, float], dict[str, float]]:
    """The people whom a replica serves at most, by each of its limits, and those whom a cluster does."""
    spent = cores(a_minute)
    replica = {
        f"CPU, {REPLICA_CORES:.0%} of a core": REPLICA_CORES / spent.adapter,
        "`WECHAT_NATS_CAPACITY`": CAPACITY,
        f"memory, {REPLICA_MEMORY / GIB:.0f} GiB": (REPLICA_MEMORY - PROCESS) / PERSON,
    }
    cluster = {
        f"CPU, {SERVER_CORES:.0f} cores a server": SERVER_CORES / spent.server,
        f"memory, {SERVER_MEMORY / GIB:.0f} GiB a server": SERVER_MEMORY / server_memory(),
        f"{PARTITIONS} partitions, so as many replicas": PARTITIONS * min(replica.values()),
    }
    return replica, cluster


def dollars(a_minute: float) -> dict[str, float]:
    """What a million people cost in a month, by what is paid for."""
    spent, (replica, cluster) = cores(a_minute), limits(a_minute)
    replicas, clusters = MILLION / min(replica.values()), MILLION / min(cluster.values())
    receipts, messages = ANSWERS * KEPT_DAYS * RECEIPT_DISK, MESSAGES * KEPT_DAYS * MESSAGE_DISK
    return {
        "adapters, CPU": CORE * MILLION * spent.adapter / REPLICA_CORES,
        "adapters, memory": GIB_MEMORY * (replicas * PROCESS + MILLION * PERSON) / GIB,
        "servers, CPU": CORE * COPIES * max(clusters, MILLION * spent.server),
        "servers, memory": GIB_MEMORY * COPIES * MILLION * server_memory() / GIB,
        "servers, disk": GIB_DISK * COPIES * MILLION * (PERSON_DISK + receipts + messages) / GIB,
    }


RATES = {"20 messages a day": PEAK * MESSAGES / DAY_S * 60, "once a minute": 1.0}


def table() -> str:
    """What one replica, one cluster and a million people come to, in Markdown."""
    lines = [["each person writes", *RATES], ["---"] * (1 + len(RATES))]
    found = [limits(rate) for rate in RATES.values()]
    for part, whole in enumerate(("replica", "cluster")):
        for name in found[0][part]:
            cells = []
            for limit in found:
                value, least = limit[part][name], min(limit[part].values())
                cells.append(f"**{value:,.0f}**" if value == least else f"{value:,.0f}")
            lines.append([f"people per {whole}: {name}", *cells])
    for name, memory in (("a replica", PERSON), ("each server", server_memory())):
        lines.append([f"memory of {name} per person, KiB", *[f"{memory / KIB:.0f}"] * len(RATES)])
    costs = [dollars(rate) for rate in RATES.values()]
    lines.append(["a million people, dollars a month", *(f"{sum(cost.values()):,.0f}" for cost in costs)])
    lines += [[f"… {name}", *(f"{cost[name]:,.0f}" for cost in costs)] for name in costs[0]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    print(table())
    costs = {how: dollars(rate) for how, rate in RATES.items()}
    parts = {name: {how: (cost[name],) for how, cost in costs.items()} for name in costs["once a minute"]}
    PLOT.write_text(bars("A million people, US dollars a month", parts))


if __name__ == "__main__":
    main()
