"""The headers of a command that are kept when it is copied, and the trace context of messages. Pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from itertools import islice

from adapter.contract.names import H_TRACEPARENT

_HEADER = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_SERVERS = ("nats-", "kv-", "status", "description")
"""Prefixes of the server's own headers."""
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, version 00: neither id is all zeros."""
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
    return dict(islice(kept.items(), HEADERS_KEPT))


def derive_traceparent(trace: str, span: str = "") -> str:
    """A W3C traceparent that follows from two ids: a write that is repeated has the same bytes.

    It says "sampled": tracers that follow their parent would record nothing of an agent's work otherwise.
    """
    trace_id = hashlib.blake2b(trace.encode(), digest_size=16).hexdigest()
    span_id = hashlib.blake2b(span.encode(), digest_size=8).hexdigest() if span else trace_id[:16]
    return f"00-{trace_id}-{span_id}-01"


def author_traceparent(headers: Mapping[str, str]) -> str:
    """The traceparent of whoever wrote a message; "" where there is none, or none that a tracer would take."""
    found = headers.get(H_TRACEPARENT, "")
    return found if _TRACEPARENT.fullmatch(found) else ""


def command_traceparent(author: str, sandbox: str, sequence: int, stored_ms: int, reply_to: str) -> str:
    """The traceparent of a command's receipts: the author's, else one in the trace of the message that it answers."""
    span = f"command:{sandbox}:{sequence}:{stored_ms}"
    return author or derive_traceparent(reply_to or span, span)
