"""Tells systemd that the service is ready, or stops: `Type=notify` of helm/systemd/wechat-nats.service."""

from __future__ import annotations

import os
import socket

import structlog

log = structlog.get_logger()

READY = "READY=1"
STOPPING = "STOPPING=1"


def notify(state: str) -> None:
    """Sends a datagram to the socket in NOTIFY_SOCKET, if there is one (sd_notify(3))."""
    if not (path := os.environ.get("NOTIFY_SOCKET")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.sendto(state.encode(), address)
    except OSError as exc:
        log.warning("service_manager.unreachable", state=state, detail=exc.strerror)
