"""Serves /metrics, /livez, /readyz and /startupz from a thread of its own, since /livez has to report a stuck event
loop. Only reads state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from adapter.replica.health import Check, Health
from adapter.tools.metrics import Metrics
from adapter.tools.web import Listener


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
