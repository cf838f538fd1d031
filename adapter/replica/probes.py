"""Serves /metrics, /livez, /readyz and /startupz from a thread of its own, since /livez has to report a stuck event
loop. Only reads state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import structlog

from adapter.kit.web import Listener
from adapter.observability.metrics import Metrics

log = structlog.get_logger()

STUCK_S = 30.0
"""Age of a heartbeat at which the event loop counts as stuck."""
BUS_GRACE_S = 10.0
"""Longest NATS outage during which the replica stays ready: it keeps its bindings and reconnects."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an answer. `since_ms`: Unix milliseconds of the first answer with this `ok`."""

    name: str
    ok: bool
    since_ms: int
    detail: str = ""


class Health:
    """The health of this replica. The event loop sets it, and the probe thread reads it. Texts are for operators.

    `clock` gives monotonic seconds. NATS and iLink never affect liveness, since a restart of thousands of long polls
    repairs neither. Single bindings do not count.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.phase = "starting"
        """What the start waits for; "" once the first connection succeeded with all subscriptions, streams and
        buckets are verified, and loops run."""
        self.draining = False
        """SIGTERM was received."""
        self.jetstream_problem = "JetStream does not answer"
        """What was wrong with JetStream at the last check; "": nothing."""
        self.nats_down_since: float | None = None
        """`clock()` when the connection was lost; None while it is connected."""
        self.missing = ""
        """Streams and buckets that were deleted."""
        self.incomplete = ""
        """Buckets that lack keys which were not deleted."""
        self.altered = ""
        """Streams that were changed, and how."""
        self.paused: list[str] = []
        """Paused consumers with their streams."""
        self.clock = clock
        self._heartbeat_at = clock()
        self._failed_loops: dict[str, str] = {}
        self._since_ms: dict[tuple[str, bool], int] = {}
        """By check and its result: when it was first answered."""

    @property
    def started(self) -> bool:
        return not self.phase

    def record_heartbeat(self) -> None:
        """Called by the event loop far more often than every STUCK_S seconds."""
        self._heartbeat_at = self.clock()

    def report_failed_loop(self, name: str, detail: str) -> None:
        """Reports that a loop ended for good, so that only a restart helps. `detail` must not contain secrets."""
        self._failed_loops = {**self._failed_loops, name: detail}

    def set_connected(self, connected: bool) -> None:
        """Starts the clock of an outage unless it runs, or ends the outage."""
        if connected:
            self.nats_down_since = None
        elif self.nats_down_since is None:
            self.nats_down_since = self.clock()

    def check_started(self) -> list[Check]:
        """/startupz: once true, true for good."""
        return [self._check("started", self.phase)]

    def check_live(self) -> list[Check]:
        """/livez: whether a restart would help."""
        silent_s = self.clock() - self._heartbeat_at
        stuck = f"no heartbeat for {silent_s:.0f} s" if silent_s >= STUCK_S else ""
        return [
            self._check("event_loop", stuck),
            *(self._check(name, detail) for name, detail in self._failed_loops.items()),
        ]

    def check_ready(self) -> list[Check]:
        """/readyz: whether this replica can take over bindings."""
        down_s = 0.0 if self.nats_down_since is None else self.clock() - self.nats_down_since
        outage = f"disconnected for {down_s:.0f} s" if down_s else ""
        return [
            *self.check_started(),
            self._check("nats", outage, ok=down_s <= BUS_GRACE_S),
            self._check("jetstream", self.jetstream_problem),
            self._check("streams", self._stream_problems()),
            self._check("not_draining", "shutting down" if self.draining else ""),
        ]

    def _stream_problems(self) -> str:
        """What is wrong with the streams and what helps; "": nothing."""
        troubles = (
            ("deleted", self.missing, "restore from the backup, or create empty by `wechat-nats doctor --fix`"),
            ("incomplete", self.incomplete, "restore from the backup"),
            ("altered", self.altered, "`wechat-nats doctor --fix`"),
        )
        sentences = [f"{problem}: {names}; {advice}" for problem, names, advice in troubles if names]
        sentences += [f"paused: `nats consumer resume {consumer}`" for consumer in self.paused]
        return "; ".join(sentences)

    def _check(self, name: str, problem: str, *, ok: bool | None = None) -> Check:
        """`ok`: by default, whether there is no problem."""
        ok = not problem if ok is None else ok
        since_ms = self._since_ms.setdefault((name, ok), time.time_ns() // 1_000_000)
        self._since_ms.pop((name, not ok), None)
        return Check(name=name, ok=ok, since_ms=since_ms, detail=problem)


class ProbeServer(Listener):
    """Serves at `addr` while it is entered; see Listener."""

    def __init__(self, addr: str, health: Health, metrics: Metrics) -> None:
        super().__init__("http_addr", addr, self._serve)
        self._answers: dict[str, Callable[[str], tuple[bool, bytes, str]]] = {
            "/startupz": lambda _: _checks_response(health.check_started()),
            "/livez": lambda _: _checks_response(health.check_live()),
            "/readyz": lambda _: _checks_response(health.check_ready()),
            "/metrics": lambda accept: (True, *metrics.expose(accept)),
        }

    def _serve(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ.get("REQUEST_METHOD", "")
        if method not in ("GET", "HEAD"):
            status, body, content_type = "405 Method Not Allowed", b"GET only\n", "text/plain"
        elif (answer := self._answers.get(path)) is None:
            status, body, content_type = "404 Not Found", f"{' '.join(self._answers)}\n".encode(), "text/plain"
        else:
            ok, body, content_type = answer(environ.get("HTTP_ACCEPT", ""))
            status = "200 OK" if ok else "503 Service Unavailable"
        start_response(status, [("Content-Type", content_type), ("Content-Length", str(len(body)))])
        return [] if method == "HEAD" else [body]


def _checks_response(checks: list[Check]) -> tuple[bool, bytes, str]:
    return all(check.ok for check in checks), msgspec.json.encode(checks) + b"\n", "application/json"
