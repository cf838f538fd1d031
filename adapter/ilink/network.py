"""Connections to iLink's hosts: resolves a name once, checks each address, and connects to one of these.

Whatever speaks HTTP connects through `addresses_of`: a check of the name before the request would be worth nothing,
since the name may lead elsewhere a moment later (DNS rebinding). The name itself stays in SNI, in the check of the
certificate and in the header Host.
"""

from __future__ import annotations

import asyncio
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit

import aiohttp.abc
import httpcore
import httpx
import structlog

from adapter.ilink.addresses import is_exempt, is_public

log = structlog.get_logger()

Lookup = Callable[[str, int], Awaitable[list[str]]]

CONNECT_S = 10.0
"""Longest time until a connection stands, without its TLS."""
KEPT_S = 20.0
"""An idle connection is kept for so long: shorter than what servers allow, so that no request meets a closing one."""
NEXT_S = 2.0
"""An address that does not answer holds up the next one no longer."""


class NotPublic(OSError):
    """The host has an address that may not be called."""


async def lookup(host: str, port: int) -> list[str]:
    """What the system resolves a name to. Raises OSError."""
    flags = getattr(socket, "AI_ADDRCONFIG", 0)  # no addresses of a kind that this machine has none of
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


async def addresses_of(
    host: str, port: int, allowed_hosts: tuple[str, ...], *, look_up: Lookup = lookup
) -> list[str]:
    """Where to connect to for a host, in order of preference. Raises NotPublic, OSError.

    A host of `allowed_hosts` may be anywhere; of any other all addresses must be public.
    """
    found = await look_up(host, port)
    if is_exempt(host, port, allowed_hosts):
        return found
    if wrong := [address for address in found if not is_public(address)]:
        log.warning(
            "address.refused",
            host=host,
            address=wrong[0],
            detail="It is not public. Where this is meant, WECHAT_NATS_ALLOWED_HOSTS names the host.",
        )
        raise NotPublic(f"{host} leads to {wrong[0]}, which is not public")
    return found


class CheckedResolver(aiohttp.abc.AbstractResolver):
    """aiohttp's way from names to addresses, which connects to nothing else, with `addresses_of` in it."""

    def __init__(self, allowed_hosts: tuple[str, ...], *, look_up: Lookup = lookup) -> None:
        self._allowed_hosts = allowed_hosts + _proxies()
        self._look_up = look_up

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """Raises OSError."""
        found = await addresses_of(host, port, self._allowed_hosts, look_up=self._look_up)
        return [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in found
        ]

    async def close(self) -> None:
        """Nothing to do."""


def _proxies() -> tuple[str, ...]:
    """The proxies of the environment, which an operator named, as `host:port`."""
    found = [urlsplit(url if "://" in url else f"//{url}") for url in urllib.request.getproxies().values()]
    ports = {"https": 443}
    return tuple(f"{url.hostname}:{url.port or ports.get(url.scheme, 80)}" for url in found if url.hostname)


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """httpcore's way to the network, with `addresses_of` in it."""

    def __init__(
        self,
        allowed_hosts: tuple[str, ...],
        *,
        look_up: Lookup = lookup,
        inner: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._allowed_hosts = allowed_hosts
        self._look_up = look_up
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises ConnectError, ConnectTimeout."""
        try:
            async with asyncio.timeout(timeout):
                addresses = await addresses_of(host, port, self._allowed_hosts, look_up=self._look_up)
        except TimeoutError as exc:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from exc
        except (NotPublic, OSError, UnicodeError) as exc:
            raise httpcore.ConnectError(str(exc)) from exc
        problem: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            wait_s = timeout if timeout is None or address == addresses[-1] else min(NEXT_S, timeout)
            try:
                return await self._inner.connect_tcp(address, port, wait_s, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                problem = exc
        raise problem

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Never: no URL leads there."""
        raise httpcore.ConnectError("no sockets of this machine")

    async def sleep(self, seconds: float) -> None:
        """For httpcore's own retries."""
        await self._inner.sleep(seconds)


def checked(client: httpx.AsyncClient, network: httpcore.AsyncNetworkBackend) -> httpx.AsyncClient:
    """`client`, connecting through `network`; through a proxy of the environment, it is the proxy that resolves.

    httpx has no parameter for it. Where it is built otherwise one day, this fails at the start, not silently.
    """
    transport = client._transport
    assert isinstance(transport, httpx.AsyncHTTPTransport)
    pool = transport._pool
    assert isinstance(pool, httpcore.AsyncConnectionPool)
    assert isinstance(pool._network_backend, httpcore.AsyncNetworkBackend)
    pool._network_backend = network
    return client
