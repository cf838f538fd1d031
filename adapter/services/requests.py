"""Decodes the requests of `wechat.svc.*`."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from adapter.bindings.registry import Bindings
from adapter.errors import UNDECODABLE, Refused, Temporary
from adapter.observability.metrics import Metrics

Q = TypeVar("Q", bound=msgspec.Struct)

START_S = 5.0
"""Longest wait for a replica that has just started."""


async def wait_loaded(bindings: Bindings) -> None:
    """Raises Temporary on a replica that has just started."""
    if not await bindings.changed.wait_until(lambda: bindings.is_loaded, START_S):
        raise Temporary("starting", "The adapter is starting; ask again in a moment.")


def read_request(data: bytes, kind: type[Q], metrics: Metrics) -> Q:
    """Decodes a request; an empty one has no fields. Raises Refused("invalid"), which is counted."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except UNDECODABLE as exc:
        raise invalid_request(exc, metrics) from exc


def invalid_request(exc: Exception, metrics: Metrics) -> Refused:
    """The error for a request that does not match its schema; counts it."""
    metrics.schema_violations.labels(kind="svc").inc()
    return Refused("invalid", str(exc)[:200])
