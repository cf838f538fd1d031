"""An HTTP server of the standard library, with a thread for each request: for what must answer beside the loop."""

from __future__ import annotations

import socket
import socketserver
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog

log = structlog.get_logger()


class _Request(WSGIRequestHandler):
    timeout = 10  # seconds that a silent client may hold a thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests come every few seconds; nobody wants to read of them."""


class ThreadedServer(socketserver.ThreadingMixIn, WSGIServer):
    """Serves one WSGI application. Its threads end with the process."""

    daemon_threads = True
    block_on_close = False

    def server_bind(self) -> None:
        """Without the DNS look-up of HTTPServer, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("request.failed", exc_info=True)


class _Server6(ThreadedServer):
    address_family = socket.AF_INET6


def server_at(host: str, port: int) -> ThreadedServer:
    """Listens; port 0 takes a free one. Raises OSError."""
    return (_Server6 if ":" in host else ThreadedServer)((host, port), _Request)


def shown_url(host: str, port: int) -> str:
    """The base URL of a listener, without a slash at its end; loopback for one on all interfaces."""
    if host in ("", "0.0.0.0", "::"):
        host = "127.0.0.1" if host != "::" else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
