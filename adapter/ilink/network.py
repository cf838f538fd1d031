"""Connections to iLink's hosts: resolves a name once, checks each address, and connects to one of them.

Every HTTP client connects through `addresses_of`. A check of the name before the request would be useless, since the
name may resolve differently a moment later (DNS rebinding). SNI, the certificate check and the Host header still have
the name.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import httpcore
import structlog

from adapter.errors import Temporary
from adapter.ilink.addresses import is_exempt, is_public

log = structlog.get_logger()

LookUpHost = Callable[[str, int], Awaitable[list[str]]]

PORTS = {"http": 80, "https": 443}
CONNECT_S = 10.0
"""Longest time to open a connection, without TLS."""
TLS_S = 30.0
"""Longer than CONNECT_S, since a process that starts with thousands of bots makes as many handshakes."""
RESOLVED_S = 10.0
"""Time after which a name is resolved again."""
KEPT_S = 20.0
"""Time for which an idle connection is kept. It is shorter than what servers allow, so that no request meets a
closing connection."""
NEXT_S = 2.0
"""Longest time for an address before the next one is tried."""


class NotPublic(OSError):
    """The host has an address that is not allowed."""


async def resolve_host(host: str, port: int) -> list[str]:
    """Resolves a name with the system's resolver. Raises OSError."""
    flags = getattr(socket, "AI_ADDRCONFIG", 0)  # only address families that this machine has
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


async def addresses_of(
    host: str, port: int, allowed_hosts: tuple[str, ...], *, look_up: LookUpHost = resolve_host
) -> list[str]:
    """The addresses of a host, in order of preference. Raises NotPublic, OSError.

    A host in `allowed_hosts` may have any address; any other host must have only public ones.
    """
    found = await look_up(host, port)
    if not found:
        raise OSError(f"{host} has no address")
    if is_exempt(host, port, allowed_hosts):
        return found
    if wrong := [address for address in found if not is_public(address)]:
        log.warning(
            "address.refused",
            host=host,
            address=wrong[0],
            detail="The address is not public. To allow it, name the host in WECHAT_NATS_ALLOWED_HOSTS.",
        )
        raise NotPublic(f"{host} leads to {wrong[0]}, which is not public")
    return found


class Resolver:
    """Resolves names by `addresses_of`, once for all concurrent callers, and again after RESOLVED_S."""

    def __init__(self, allowed_hosts: tuple[str, ...], *, look_up: LookUpHost = resolve_host) -> None:
        self._allowed_hosts = allowed_hosts
        self._look_up = look_up
        self._lookups: dict[tuple[str, int], tuple[float, asyncio.Task[list[str] | Exception]]] = {}

    async def addresses(self, host: str, port: int, *, fresh: bool = False) -> list[str]:
        """`fresh`: resolve now. Raises Temporary("network")."""
        loop = asyncio.get_running_loop()
        since, asking = self._lookups.get((host, port), (0.0, None))
        if asking is None or fresh or (asking.done() and loop.time() - since > RESOLVED_S):
            asking = loop.create_task(self._resolve(host, port))
            self._lookups[host, port] = loop.time(), asking
        found = await asyncio.shield(asking)
        if isinstance(found, list):
            return found
        if self._lookups.get((host, port), (0.0, None))[1] is asking:
            del self._lookups[host, port]
        raise Temporary("network", type(found).__name__)

    async def _resolve(self, host: str, port: int) -> list[str] | Exception:
        """Returns an error instead of raising it, since many callers await the same task."""
        try:
            return await addresses_of(host, port, self._allowed_hosts, look_up=self._look_up)
        except (OSError, UnicodeError) as exc:
            return exc


class Proxy(NamedTuple):
    """A proxy of the environment."""

    scheme: str
    host: str
    port: int
    authorization: str
    """The header line of its name and password, or ""."""

    def __repr__(self) -> str:
        return f"Proxy({self.host!r})"


def proxies() -> tuple[str, ...]:
    """The proxies in the environment, as `host:port`."""
    found = map(_read_proxy, urllib.request.getproxies().values())
    return tuple(f"{proxy.host}:{proxy.port}" for proxy in found if proxy.host)


def _read_proxy(url: str) -> Proxy:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    line = ""
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        line = f"Proxy-Authorization: Basic {base64.b64encode(secret.encode()).decode()}\r\n"
    return Proxy(parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 80), line)


@functools.lru_cache(maxsize=256)  # few different URLs
def proxy_of(base_url: str) -> Proxy | None:
    """The proxy that the environment has for a checked base URL. Raises Temporary."""
    parts = urlsplit(base_url)
    url = urllib.request.getproxies().get(parts.scheme)
    if not url or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = _read_proxy(url)
    if proxy.scheme not in PORTS or not proxy.host:
        raise Temporary("network", f"a proxy that speaks {proxy.scheme!r} cannot be used")
    return proxy


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """A network backend of httpcore, which resolves a name by `resolver` for each connection."""

    def __init__(self, resolver: Resolver, *, inner: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._resolver = resolver
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises ConnectError, ConnectTimeout. `timeout` also applies to TLS."""
        timeout = CONNECT_S if timeout is None else min(CONNECT_S, timeout)
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolver.addresses(host, port, fresh=True)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from exc
        except Temporary as exc:
            raise httpcore.ConnectError(exc.detail) from exc
        *others, last = addresses
        for address in others:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                wait_s = min(NEXT_S, timeout)
                return await self._inner.connect_tcp(address, port, wait_s, local_address, socket_options)
        return await self._inner.connect_tcp(last, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        """For httpcore's own retries."""
        await self._inner.sleep(seconds)
