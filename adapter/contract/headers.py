"""Which headers of a command are kept when it is copied. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice

from adapter.contract.names import H_SINCE_MS

_HEADER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SERVERS = ("nats-", "kv-", "status", "description")
"""How the names of headers begin that are the server's own."""
HEADERS_KEPT = 32
HEADER_CHARS = 1024


def forwardable_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """What is kept of a command's headers where it is copied: above all `traceparent`.

    A sandbox writes them as it likes: names that no client can write again would stop what comes behind, and the
    server's own words (Nats-…, Status) would be taken for the server's.
    """
    kept = {
        name: value
        for name, value in headers.items()
        if _HEADER.fullmatch(name) and not name.lower().startswith(_SERVERS) and len(value) <= HEADER_CHARS
    }
    if len(kept) > HEADERS_KEPT and H_SINCE_MS in kept:  # the router's, behind all of theirs
        kept = {H_SINCE_MS: kept[H_SINCE_MS], **kept}
    return dict(islice(kept.items(), HEADERS_KEPT))
