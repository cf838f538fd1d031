"""A listening address with optional TLS, the limit of open files, and the host name of an address in a URL."""

import asyncio
import logging
import resource
import ssl
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

from aiohttp import http_exceptions, web

from adapter.simulator.records import SimulatorError

LARGEST_BODY = 300 * 2**20
BACKLOG = 4096
KEEPALIVE_S = 3600.0
"""A long time, so that a request rarely meets a connection that is being closed for idleness."""

BAD_REQUESTS = (web.RequestPayloadError, http_exceptions.HttpProcessingError)
"""Errors caused by the request; its client is told."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a log record of aiohttp concerns the simulator, not a request that cannot be read."""
    return not (record.exc_info and isinstance(record.exc_info[1], BAD_REQUESTS))


log = logging.getLogger(__name__)
log.addFilter(is_ours)


class Site:
    """Routes each request to the handler of the first matching path."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = handlers
        self._opening = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self.port = 0
        """Port that the site listens on, once open."""
        self.url = ""
        """Base URL for clients without a trailing slash, or "" until open."""

    async def open(self, host: str, port: int, public_url: str, tls: ssl.SSLContext | None) -> None:
        """Starts to listen, unless it listens already. An empty `public_url` is made from the address. Raises
        OSError."""
        async with self._opening:
            if self.url:
                return
            app = web.Application(client_max_size=LARGEST_BODY)
            for path, handler in self._handlers.items():
                app.router.add_route("*", path, handler)
            self._runner = web.AppRunner(
                app,
                logger=log,
                access_log=None,
                handler_cancellation=True,
                shutdown_timeout=1.0,
                keepalive_timeout=KEEPALIVE_S,
            )
            await self._runner.setup()
            await web.TCPSite(self._runner, host, port, backlog=BACKLOG, ssl_context=tls).start()
            self.port = int(self._runner.addresses[-1][1])
            scheme = "https" if tls else "http"
            self.url = public_url.rstrip("/") or f"{scheme}://{url_host(host)}:{self.port}"

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


def tls_context(cert: str, key: str) -> ssl.SSLContext | None:
    """The TLS context, or None without a certificate. Raises SimulatorError for unusable files."""
    if not cert:
        if key:
            raise SimulatorError("tls_key is of no use without tls_cert")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key or None, password="")  # a password-protected key must not prompt
    except (OSError, ValueError) as exc:
        raise SimulatorError(f"tls_cert and tls_key: {exc}") from exc
    return context


def url_host(host: str) -> str:
    """`host` in a form that a URL can contain."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def raise_file_limit() -> None:
    """Raises the limit of open files: 10,000 parked polls need 10,000 sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
