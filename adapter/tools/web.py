"""A threaded HTTP server of the standard library, which answers even if the event loop is stuck."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import WSGIApplication

import structlog

from adapter.errors import SettingsError
from adapter.settings import split_addr, variable_of

log = structlog.get_logger()


MAX_CONNECTIONS = 128
"""Most connections; one more closes the oldest, so that slow clients neither block others nor take a thread each."""


class _Request(WSGIRequestHandler):
    timeout = 10  # seconds that a silent client may hold a thread

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Logs nothing, since requests come every few seconds."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A server whose threads end with the process."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, *args: Any) -> None:
        self._connections: dict[socket.socket, None] = {}
        super().__init__(*args)

    def server_bind(self) -> None:
        """Skips HTTPServer's DNS lookup, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Makes room, then handles the request in a thread."""
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest, *_ = list(self._connections)  # a copy, since threads remove theirs
            self._connections.pop(oldest, None)
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                oldest.shutdown(socket.SHUT_RDWR)
        self._connections[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Ends a request, in its thread."""
        self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("request.failed", exc_info=True)


class _Server6(_Server):
    address_family = socket.AF_INET6


class Listener:
    """Serves a WSGI application at the address of a setting while entered. Port 0 takes a free one, see `url`.

    Entering raises SettingsError if the address is not available.
    """

    def __init__(self, setting: str, addr: str, app: WSGIApplication) -> None:
        """`setting`: the field of Settings with `addr`."""
        self._setting = setting
        self._addr = addr
        self._app = app

    def __enter__(self) -> Self:
        host, port = split_addr(self._addr)
        try:
            self._server = (_Server6 if ":" in host else _Server)((host, port), _Request)
        except OSError as exc:
            raise SettingsError(
                "invalid_settings",
                f"{variable_of(self._setting)}: expected an address to listen on, {self._addr} cannot be had:"
                f" {exc.strerror}",
            ) from exc
        self._server.set_app(self._app)
        serve, name = self._server.serve_forever, type(self).__name__
        self._thread = threading.Thread(target=serve, kwargs={"poll_interval": 0.1}, name=name, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """The port in use."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """Base URL without a trailing slash; loopback for a listener on all interfaces."""
        host = split_addr(self._addr)[0]
        if host in ("", "0.0.0.0", "::"):
            host = "127.0.0.1" if host != "::" else "::1"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
