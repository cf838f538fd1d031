"""What a scrape costs a replica with ten thousand bots: `python -m tests.bench.scrape` prints one JSON line.

Series and bytes are asserted in tests; the time depends on the machine and is only told. Budget: 20 ms.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
from collections.abc import Callable

from adapter.replica.health import observe
from tests.test_supervisor import BOTS, bound, poll, supervisor

RUNS = 50


def median_ms(work: Callable[[], object]) -> float:
    """Of many runs, each in its turn."""
    took = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    return round(statistics.median(took), 2)


async def main() -> None:
    bench = bound(BOTS)
    made = supervisor(bench)
    poll(made, bench)
    observe(made, bench.clock, bench.metrics, 3 * BOTS)
    body = bench.metrics.expose()[0]
    gc.collect()
    print(
        json.dumps(
            {
                "bindings": BOTS,
                "series": sum(not line.startswith(b"#") for line in body.splitlines()),
                "bytes": len(body),
                "scrape_ms": median_ms(bench.metrics.expose),
                "observe_ms": median_ms(lambda: observe(made, bench.clock, bench.metrics, 3 * BOTS)),
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
