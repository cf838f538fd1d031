"""A binding whose token iLink refuses (-14): marks it `needs_login`, marks it active again, and publishes both
events.

A change is marked in the binding (`event_pending`) until its event is published. Pollers and conversations retry the
token before.
"""

from __future__ import annotations

import msgspec
import structlog

from adapter.bindings.registry import Bindings
from adapter.contract.records import Binding
from adapter.kit.timing import Clock
from adapter.observability.events import Events

log = structlog.get_logger()


async def mark_needs_login(bindings: Bindings, clock: Clock, binding: Binding) -> Binding | None:
    """Marks a binding `needs_login` with a pending event; None: it is marked, or was bound again.

    Raises Temporary.
    """

    def without_login(now: Binding) -> Binding | None:
        if now.token != binding.token or now.state == "needs_login":
            return None
        since_ms = clock.now_ms()
        return msgspec.structs.replace(
            now, state="needs_login", reason="stale_token", since_ms=since_ms, event_pending=True
        )

    lost = await bindings.update(binding.bot, without_login)
    if lost is not None:
        log.error("session.needs_login", bot=binding.bot, sandbox=binding.sandbox)
    return lost


async def mark_active(bindings: Bindings, clock: Clock, binding: Binding) -> Binding | None:
    """Marks a binding active with a pending event, since iLink accepts its token again; None: it was bound again.

    Raises Temporary.
    """

    def with_login(now: Binding) -> Binding | None:
        if now.token != binding.token or now.state == "active":
            return None
        return msgspec.structs.replace(now, state="active", reason="", since_ms=clock.now_ms(), event_pending=True)

    return await bindings.update(binding.bot, with_login)


async def publish_login_event(bindings: Bindings, events: Events, binding: Binding, detail: str = "") -> Binding:
    """Publishes the pending event of a binding, and returns the binding without the mark.

    The mark survives a crash, or an outage of the bus, between the change and its event. Raises Temporary.
    """
    if not binding.event_pending:
        return binding
    if binding.state == "needs_login":
        advice = "Have the user scan a new QR code and bind the new bot; what is parked waits for it."
        event = binding.event("needs_login", reason=detail, detail=advice)
    else:
        event = binding.event("recovered")
    await events.publish_binding_event(event, cause=str(binding.since_ms))

    def without_mark(now: Binding) -> Binding | None:
        return msgspec.structs.replace(now, event_pending=False) if now == binding else None

    return await bindings.update(binding.bot, without_mark) or binding
