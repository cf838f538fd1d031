"""Where iLink may be: URLs that may be called, addresses that its names may lead to, and TLS to them.

Answers to polls, logins and uploads contain URLs. Their hosts are checked by name (docs/reference/ilink-protocol.md,
"Hosts"), then by address, against SSRF: who controls DNS could lead the adapter to its neighbours, such as a cloud's
metadata service (169.254.169.254). Each client resolves a name by `Resolver` and connects to an address that it
returned. A check before the request would be useless, since a name may resolve differently a moment later (DNS
rebinding). SNI, the certificate check and the Host header still have the name.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import re
import socket
import ssl
import urllib.request
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple, Self
from urllib.parse import unquote, urlsplit

import structlog

from adapter.errors import Refused, Temporary
from adapter.ilink.wire import PLAIN_URL, URL_CHARS

log = structlog.get_logger()

LookUpHost = Callable[[str, int], Awaitable[list[str]]]

PORTS = {"http": 80, "https": 443}
CONNECT_S = 10.0
"""Longest time to open a connection, without TLS."""
NEXT_S = 1.0
"""Longest time for an address before the next one of its name is tried."""
TLS_S = 30.0
"""Longer than CONNECT_S, since a process that starts with thousands of bots makes as many handshakes."""
RESOLVED_S = 10.0
"""Time after which a name is resolved again."""

# URLs -------------------------------------------------------------------------------------------------------

HOST_SUFFIXES = (".weixin.qq.com", ".wechat.com")
"""Suffixes of hosts that may always be called."""
_HOST_PORT = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)+")


@functools.lru_cache(maxsize=1024)  # few different URLs
def check_url(url: str, allowed_hosts: tuple[str, ...]) -> str:
    """`url` without a trailing slash if it may be called. Raises Refused("url").

    It has to be https with a host under HOST_SUFFIXES. Hosts in `allowed_hosts` (host or host:port) may use http.
    """
    if any(c in url for c in "@?#\\"):
        raise Refused("url", "A base URL is https://host[/path], without credentials or a query.")
    _check_host(url, allowed_hosts)
    return url.rstrip("/")


def check_link(url: str, allowed_hosts: tuple[str, ...]) -> str:
    """`url` unchanged, with its query, if it may be called by the same rules. Raises Refused("url")."""
    if any(c in url.partition("?")[0] for c in "@\\") or "#" in url:
        raise Refused("url", "A link is https://host/path, without credentials.")
    _check_host(url, allowed_hosts)
    return url


def _check_host(url: str, allowed_hosts: tuple[str, ...]) -> None:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused("url", "The URL's host or port cannot be read.") from None
    if not PLAIN_URL.fullmatch(url) or len(url) > URL_CHARS or not host or "@" in parts.netloc or port == 0:
        raise Refused("url", "A URL is https://host[/path], in plain ASCII, without credentials.")
    named = {host, parts.netloc} if port else {host}
    if parts.scheme in ("http", "https") and not named.isdisjoint(allowed_hosts):
        return
    if parts.scheme != "https" or not host.endswith(HOST_SUFFIXES) or not _HOST.fullmatch(host):
        raise Refused("url", f"Host {host[:80]!r} is not on the allow-list; it must be https and end in "
                      + " or ".join(HOST_SUFFIXES) + ", or be named in WECHAT_NATS_ALLOWED_HOSTS.")  # fmt: skip


def redirect_url(host: str, base_url: str, allowed_hosts: tuple[str, ...]) -> str:
    """The base URL of a redirected login: https, or http if `base_url` is that of a simulator.

    Raises Refused("url").
    """
    if not _HOST_PORT.fullmatch(host):
        raise Refused("url", "The host of a redirect is host or host:port.")
    configured = not {host, host.rpartition(":")[0]}.isdisjoint(allowed_hosts)
    plain = configured and base_url.startswith("http://")
    return check_url(f"{'http' if plain else 'https'}://{host}", allowed_hosts)


# addresses --------------------------------------------------------------------------------------------------

_NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052: prefix with which IPv6-only networks reach IPv4 addresses; the last 32 bits are the IPv4 address."""
_UNICAST = IPv6Network("2000::/3")
_NOT_PUBLIC = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # RFC 6890: for protocols
        "192.88.99.0/24",  # RFC 7526: was the way into 6to4
        "168.63.129.16/32",  # a cloud's own services, on an address that looks public
        "2001::/23",  # RFC 2928: for protocols, Teredo among them, which holds IPv4 addresses
        "2002::/16",  # RFC 7526: 6to4, which holds IPv4 addresses
        "3fff::/20",  # RFC 9637: for documents
    )
)
"""Networks that the table in a Python release may call public."""


def is_public(text: str) -> bool:
    """Whether an address is on the public internet. False for text that is no address, or has a scope."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if (inside := _embedded_ipv4(address)) is not None:
            address = inside
        elif address not in _UNICAST:
            return False
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


def _embedded_ipv4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address in an IPv6 address; None: it has none."""
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped


def is_exempt(host: str, port: int, allowed_hosts: tuple[str, ...]) -> bool:
    """Whether an operator allowed this host by name with any address, such as a simulator or a proxy."""
    shown = f"[{host}]" if ":" in host else host
    return not {host, shown, f"{shown}:{port}"}.isdisjoint(allowed_hosts)


class NotPublic(OSError):
    """The host has an address that is not allowed."""


async def resolve_host(host: str, port: int) -> list[str]:
    """Resolves a name with the system's resolver. Raises OSError."""
    flags = getattr(socket, "AI_ADDRCONFIG", 0)  # only address families that this machine has
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


class Resolver:
    """Resolves names, once for all concurrent callers, and again after RESOLVED_S.

    A host in `allowed_hosts` may have any address; any other host must have only public ones.
    """

    def __init__(self, allowed_hosts: tuple[str, ...], *, look_up: LookUpHost = resolve_host) -> None:
        self._allowed_hosts = allowed_hosts
        self._look_up = look_up
        self._lookups: dict[tuple[str, int], tuple[float, asyncio.Task[list[str] | Exception]]] = {}

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of a host, in order of preference. Raises Temporary("network")."""
        loop = asyncio.get_running_loop()
        since, asking = self._lookups.get((host, port), (0.0, None))
        if asking is None or (asking.done() and loop.time() - since > RESOLVED_S):
            asking = loop.create_task(self._resolve(host, port))
            self._lookups[host, port] = loop.time(), asking
        found = await asyncio.shield(asking)
        if isinstance(found, list):
            return found
        if self._lookups.get((host, port), (0.0, None))[1] is asking:
            del self._lookups[host, port]
        why = str(found) if isinstance(found, NotPublic) else f"{host} cannot be resolved"
        raise Temporary("network", why)

    async def _resolve(self, host: str, port: int) -> list[str] | Exception:
        """Returns an error instead of raising it, since many callers await the same task."""
        try:
            found = await self._look_up(host, port)
        except (OSError, UnicodeError) as exc:
            return exc
        if not found:
            return OSError(f"{host} has no address")
        wrong = [address for address in found if not is_public(address)]
        if not wrong or is_exempt(host, port, self._allowed_hosts):
            return found
        log.warning(
            "address.refused",
            host=host,
            address=wrong[0],
            detail="The address is not public. To allow it, name the host in WECHAT_NATS_ALLOWED_HOSTS.",
        )
        return NotPublic(f"{host} leads to {wrong[0]}, which is not public")


# proxies ----------------------------------------------------------------------------------------------------


class Proxy(NamedTuple):
    """A proxy of the environment."""

    scheme: str
    host: str
    port: int
    authorization: str
    """The header of its name and password, or ""."""
    url: str
    """With them."""

    def __repr__(self) -> str:
        return f"Proxy({self.host!r})"


def proxies() -> tuple[str, ...]:
    """The proxies in the environment, as `host:port`."""
    urls = urllib.request.getproxies()
    found = [_read_proxy(urls[kind]) for kind in ("http", "https", "all") if kind in urls]
    return tuple(f"{proxy.host}:{proxy.port}" for proxy in found if proxy.host)


def _read_proxy(url: str) -> Proxy:
    url = url if "://" in url else f"http://{url}"
    parts, header = urlsplit(url), ""
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        header = f"Basic {base64.b64encode(secret.encode()).decode()}"
    return Proxy(parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 80), header, url)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.lru_cache(maxsize=256)  # few different URLs
def proxy_of(base_url: str) -> Proxy | None:
    """The proxy that the environment has for a checked base URL; a loopback address has none, as NO_PROXY often lacks
    it, and no other machine can reach it. Raises Temporary."""
    parts, urls = urlsplit(base_url), urllib.request.getproxies()
    host, url = parts.hostname or "", urls.get(parts.scheme) or urls.get("all")
    if not url or _is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxy = _read_proxy(url)
    if proxy.scheme not in PORTS or not proxy.host:
        raise Temporary("network", f"a proxy that speaks {proxy.scheme!r} cannot be used")
    return proxy


# TLS --------------------------------------------------------------------------------------------------------


class ResumingContext(ssl.SSLContext):
    """As `ssl.create_default_context`, with one session for each host, which all new connections resume (RFC 8446,
    2.2).

    Thousands of bots connect to one host. With a chain of three certificates, a resumed session takes half of a
    handshake's CPU time here, a third of it on the host, and 20 KiB less memory for each connection.
    """

    _sessions: dict[str, ssl.SSLSession]

    def __new__(cls) -> Self:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags = ssl.create_default_context().verify_flags  # stricter since Python 3.13
        context.load_default_certs()
        context.set_alpn_protocols(["http/1.1"])
        context._sessions = {}
        return context

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        """Called by event loops, which do not pass sessions."""
        if isinstance(server_hostname, bytes):
            server_hostname = server_hostname.decode("ascii")
        if server_hostname is not None:
            session = session or self._sessions.get(server_hostname)
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def store_session(self, host: str, used: ssl.SSLObject) -> None:
        """Stores the session of a connection after an answer, with which TLS 1.3 sends it.

        A resumed session is not stored again, so that certificates are checked again when the host's ticket expires,
        after a week at most.
        """
        if not used.session_reused and used.session is not None:
            self._sessions[host] = used.session

    def forget_session(self, host: str) -> None:
        """Makes the next connection start a new session, in case the host fails on the stored one."""
        self._sessions.pop(host, None)
