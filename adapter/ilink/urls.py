"""Which URLs may be called: https URLs of iLink's hosts, and hosts that an operator allowed. No I/O.

docs/reference/ilink-protocol.md, "Hosts", has the hosts. Answers to polls, logins and uploads contain URLs. Resolved
addresses are checked later by `addresses`.
"""

from __future__ import annotations

import functools
import re
from urllib.parse import urlsplit

from adapter.errors import Refused

HOST_SUFFIXES = (".weixin.qq.com", ".wechat.com")
"""Suffixes of hosts that may always be called."""
URL_CHARS = 8192
"""Longest URL that is called. Upload URLs have a long parameter."""
PLAIN_URL = re.compile(r"[!-~]+")
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
