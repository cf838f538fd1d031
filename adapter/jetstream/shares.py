"""Quotas of sandboxes at the services, so that one that floods them takes neither slots nor time from others.

The server delivers whatever a sandbox publishes, at any rate. So a request is checked by its subject before it is
processed. A sandbox has a number of requests in flight, and starts a number in a second. Requests beyond that are
refused, and dropped where refusals would cost too much.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Literal, TypeAlias

import structlog

log = structlog.get_logger()

PER_S = 256
"""Requests of one sandbox that start in a second; fewer if they cost more. Others wait for the next second."""
REFUSALS_PER_S = 64
"""Requests of one sandbox that are answered with 429 in a second; others get no answer."""
MAX_IN_FLIGHT_BYTES = 64 * 1024 * 1024
"""Bytes of all requests in flight."""

LOG_EVERY_S = 60.0
"""Interval between two log lines about a sandbox's requests without an inbox."""
MAX_LOGGED_SANDBOXES = 1000
"""Most sandboxes with a log line in that time."""

Verdict: TypeAlias = Literal["taken", "busy", "full"]


class RequestQuota:
    """The requests in flight of one connection. All times are those of the running loop."""

    def __init__(self, of_one: int) -> None:
        self._max_per_sandbox = of_one
        self._in_flight: Counter[str] = Counter()
        self._held_bytes = 0
        self._second_ends_at = 0.0
        """When the counts below are reset."""
        self._started_count: Counter[str] = Counter()
        self._refused_count: Counter[str] = Counter()

    def try_admit(self, sandbox: str, size: int) -> Verdict:
        """Whether a request of `size` bytes is admitted. An admitted one has to be released."""
        if self._in_flight[sandbox] >= self._max_per_sandbox:
            return "busy"
        if self._held_bytes + size > MAX_IN_FLIGHT_BYTES:
            return "full"
        self._in_flight[sandbox] += 1
        self._held_bytes += size
        return "taken"

    def release(self, sandbox: str, size: int) -> None:
        """Releases an answered request."""
        self._held_bytes -= size
        self._in_flight[sandbox] -= 1
        if not self._in_flight[sandbox]:
            del self._in_flight[sandbox]

    def count_refusal(self, sandbox: str) -> bool:
        """Counts a refusal. Returns whether it is still answered."""
        self._begin_second()
        self._refused_count[sandbox] += 1
        return self._refused_count[sandbox] <= REFUSALS_PER_S

    async def wait_turn(self, sandbox: str, cost: int = 1) -> None:
        """Returns when the sandbox's next request may start."""
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
    """Logs requests without an inbox: the first of each sandbox in a minute."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._minute_ends_at = 0.0

    def log_refusal(self, sandbox: str) -> None:
        """`sandbox`: "" for requests without one."""
        now = asyncio.get_running_loop().time()
        if now >= self._minute_ends_at:
            self._logged.clear()
            self._minute_ends_at = now + LOG_EVERY_S
        if sandbox not in self._logged and len(self._logged) < MAX_LOGGED_SANDBOXES:
            self._logged.add(sandbox)
            log.warning("service.reply_refused", sandbox=sandbox)
