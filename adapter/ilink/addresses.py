"""Which IP addresses iLink's hosts may resolve to: only public ones, against SSRF. No I/O.

An allowed name does not imply an allowed address: an attacker who controls DNS could make the adapter connect to its
neighbours, such as a cloud's metadata service (169.254.169.254).
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

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
