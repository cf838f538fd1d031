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
    """One line of an answer. `since_ms`: Unix milliseconds of the last known change of `ok`."""

    name: str
    ok: bool
    since_ms: int
    detail: str = ""


class _Flag:
    """A boolean attribute of Health with the time of its last change."""

    def __set_name__(self, owner: type[Health], name: str) -> None:
        self._name = name

    def __get__(self, health: Health, owner: type[Health]) -> bool:
        return health.flags[self._name][0]

    def __set__(self, health: Health, value: bool) -> None:
        if health.flags[self._name][0] != value:
            health.flags[self._name] = (value, health.clock())


class Health:
    """The health of this replica. The event loop sets it, and the probe thread reads it.

    `clock` gives monotonic seconds. NATS and iLink never affect liveness, since a restart of thousands of long polls
    repairs neither. Single bindings do not count.
    """

    started = _Flag()
    """The first connection succeeded with all subscriptions, streams and buckets are verified, and loops run."""
    draining = _Flag()
    """SIGTERM was received."""
    jetstream_ok = _Flag()
    """JetStream answered the last check."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.phase = "starting"
        """What the start waits for, for operators; shown until `started`."""
        self.nats_down_since: float | None = None
        """`clock()` when the connection was lost; None while it is connected."""
        self.missing = ""
        """Streams and buckets that were deleted, for operators."""
        self.incomplete = ""
        """Buckets that lack keys which were not deleted, for operators."""
        self.altered = ""
        """Streams that were changed, and how, for operators."""
        self.paused: list[str] = []
        """Paused consumers with their streams."""
        self._jetstream_problem = "JetStream does not answer"
        self._created_at = self._heartbeat_at = self._responsive_since = self._connected_since = clock()
        self.flags = dict.fromkeys(("started", "draining", "jetstream_ok"), (False, self._created_at))
        """Each flag, and `clock()` at its last change."""
        self._failed_loops: dict[str, tuple[str, float]] = {}

    def record_heartbeat(self) -> None:
        """Called by the event loop far more often than every STUCK_S seconds."""
        now = self.clock()
        if now - self._heartbeat_at >= STUCK_S:
            self._responsive_since = now
        self._heartbeat_at = now

    def report_failed_loop(self, name: str, detail: str) -> None:
        """Reports that a loop ended for good, so that only a restart helps. `detail` must not contain secrets."""
        self._failed_loops = {**self._failed_loops, name: (detail, self.clock())}

    def on_nats_lost(self) -> None:
        """Starts the clock of the outage, unless it runs."""
        if self.nats_down_since is None:
            self.nats_down_since = self.clock()

    def on_nats_restored(self) -> None:
        """Ends the outage."""
        if self.nats_down_since is not None:
            if self.clock() - self.nats_down_since > BUS_GRACE_S:
                self._connected_since = self.clock()
            self.nats_down_since = None

    def set_jetstream_problem(self, problem: str) -> None:
        """Sets what is wrong with JetStream, for operators; "": nothing."""
        self._jetstream_problem = problem or self._jetstream_problem
        self.jetstream_ok = not problem

    def check_started(self) -> list[Check]:
        """/startupz: once true, true for good."""
        started, since = self.flags["started"]
        return [self._check("started", started, since, self.phase)]

    def check_live(self) -> list[Check]:
        """/livez: whether a restart would help."""
        beat = self._heartbeat_at
        silent_s = self.clock() - beat
        stuck = silent_s >= STUCK_S
        checks = [
            self._check(
                "event_loop",
                not stuck,
                beat if stuck else self._responsive_since,
                f"no heartbeat for {silent_s:.0f} s",
            )
        ]
        checks += [self._check(name, False, since, detail) for name, (detail, since) in self._failed_loops.items()]
        return checks

    def check_ready(self) -> list[Check]:
        """/readyz: whether this replica can take over bindings."""
        down_since = self.nats_down_since
        draining, draining_since = self.flags["draining"]
        jetstream, jetstream_since = self.flags["jetstream_ok"]
        if down_since is None:
            nats = self._check("nats", True, self._connected_since)
        else:
            down_s = self.clock() - down_since
            nats = self._check(
                "nats", down_s <= BUS_GRACE_S, down_since, f"disconnected for {down_s:.0f} s", always=True
            )
        return [
            *self.check_started(),
            nats,
            self._check("jetstream", jetstream, jetstream_since, self._jetstream_problem),
            self._check("streams", not self._stream_problems(), self._created_at, self._stream_problems()),
            self._check("not_draining", not draining, draining_since, "shutting down"),
        ]

    def _stream_problems(self) -> str:
        """What is wrong with the streams and what helps, for operators; "": nothing."""
        troubles = (
            ("deleted", self.missing, "restore from the backup, or create empty by `wechat-nats doctor --fix`"),
            ("incomplete", self.incomplete, "restore from the backup"),
            ("altered", self.altered, "`wechat-nats doctor --fix`"),
        )
        sentences = [f"{problem}: {names}; {advice}" for problem, names, advice in troubles if names]
        sentences += [f"paused: `nats consumer resume {consumer}`" for consumer in self.paused]
        return "; ".join(sentences)

    def _check(self, name: str, ok: bool, since: float, detail: str = "", *, always: bool = False) -> Check:
        """`since` is a time of `clock`. The detail explains a failure; `always` shows it on success, too."""
        since_ms = int((time.time() - (self.clock() - since)) * 1000)
        return Check(name=name, ok=ok, since_ms=since_ms, detail=detail if always or not ok else "")


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
