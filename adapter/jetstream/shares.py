"""What each sandbox may ask of the services, so that one that asks without end takes no room and no time from others.

The server hands on whatever a sandbox publishes, at any rate. So a request is judged by its subject before anything
else is done with it: so many of a sandbox are in hand at once, and begun in a second. One beyond is refused, and
where refusals would cost too much, dropped.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Literal, TypeAlias

import structlog

log = structlog.get_logger()

PER_S = 256
"""Requests of one sandbox that are begun in a second, or fewer that cost more; the others wait for the next."""
REFUSALS_PER_S = 64
"""Requests of one sandbox that are answered with 429 in a second; beyond that nothing is said."""
MAX_IN_FLIGHT_BYTES = 64 * 1024 * 1024
"""Of all requests in hand."""

LOG_EVERY_S = 60.0
"""Between two lines about the requests of one sandbox that have no inbox."""
MAX_LOGGED_SANDBOXES = 1000
"""Sandboxes of which there is a line each in that time; the rest have one together."""

Verdict: TypeAlias = Literal["taken", "busy", "full"]


class RequestQuota:
    """The requests in hand of one connection; it ends with it. All times are those of the running loop."""

    def __init__(self, of_one: int) -> None:
        self._max_per_sandbox = of_one
        self._in_flight: Counter[str] = Counter()
        self._held_bytes = 0
        self._second_ends_at = 0.0
        """When the counts below end."""
        self._started_count: Counter[str] = Counter()
        self._refused_count: Counter[str] = Counter()

    def try_admit(self, sandbox: str, size: int) -> Verdict:
        """Whether a request of so many bytes may come in; one that is taken has to be given back."""
        if self._in_flight[sandbox] >= self._max_per_sandbox:
            return "busy"
        if self._held_bytes + size > MAX_IN_FLIGHT_BYTES:
            return "full"
        self._in_flight[sandbox] += 1
        self._held_bytes += size
        return "taken"

    def release(self, sandbox: str, size: int) -> None:
        """A request has its answer."""
        self._held_bytes -= size
        self._in_flight[sandbox] -= 1
        if not self._in_flight[sandbox]:
            del self._in_flight[sandbox]

    def count_refusal(self, sandbox: str) -> bool:
        """Whether this sandbox is still told that it asks too much; counts it."""
        self._begin_second()
        self._refused_count[sandbox] += 1
        return self._refused_count[sandbox] <= REFUSALS_PER_S

    async def wait_turn(self, sandbox: str, cost: int = 1) -> None:
        """Returns when the next request of a sandbox may begin."""
        while True:
            self._begin_second()
            if self._started_count[sandbox] < PER_S:
                self._started_count[sandbox] += cost
                return
            await asyncio.sleep(self._second_ends_at - asyncio.get_running_loop().time())

    def _begin_second(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._second_ends_at:
            for sandbox, count in self._refused_count.most_common(1):
                if count > REFUSALS_PER_S:
                    log.warning("service.flooded", sandbox=sandbox, refused=count)
            self._second_ends_at = now + 1
            self._started_count.clear()
            self._refused_count.clear()


class RefusalLog:
    """Requests without an inbox to answer to: the first of a sandbox is said at once, others with their count."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[float, int]] = {}
        """Until when nothing is said of a sandbox, the soonest first, and how many were refused since."""

    def count_refusal(self, sandbox: str) -> None:
        """One more was refused; `sandbox`: "" for requests that are of none."""
        now = asyncio.get_running_loop().time()
        if sandbox not in self._seen and len(self._seen) >= MAX_LOGGED_SANDBOXES:
            soonest = next(iter(self._seen))
            if self._seen[soonest][0] > now:
                sandbox = ""
            else:
                del self._seen[soonest]
        until, count = self._seen.get(sandbox, (now, 0))
        if now < until:
            self._seen[sandbox] = until, count + 1
            return
        self._seen.pop(sandbox, None)
        self._seen[sandbox] = now + LOG_EVERY_S, 0
        log.warning("service.reply_refused", sandbox=sandbox, refused=count + 1)
