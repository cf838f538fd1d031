"""The headers of a command that are kept when it is copied. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice

from adapter.contract.names import H_SINCE_MS

_HEADER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SERVERS = ("nats-", "kv-", "status", "description")
"""Prefixes of the server's own headers."""
HEADERS_KEPT = 32
HEADER_CHARS = 1024


def forwardable_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a command that its copy keeps, above all `traceparent`.

    A sandbox may set any header. A name that no client can write again would stop the commands behind it, and a
    server's name (Nats-…, Status) would be taken for the server's.
    """
    kept = {
        name: value
        for name, value in headers.items()
        if _HEADER.fullmatch(name) and not name.lower().startswith(_SERVERS) and len(value) <= HEADER_CHARS
    }
    if len(kept) > HEADERS_KEPT and H_SINCE_MS in kept:  # the router's headers come last
        kept = {H_SINCE_MS: kept[H_SINCE_MS], **kept}
    return dict(islice(kept.items(), HEADERS_KEPT))
