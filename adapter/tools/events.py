"""Publishes events and dead letters. Each method returns when the stream has stored the
message."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec
import structlog

from adapter.contract import messages as contract
from adapter.contract.names import (
    H_BODY,
    H_COMMAND,
    H_DETAIL,
    H_MSG_ID,
    H_REASON,
    H_REPLY_TO,
    H_SANDBOX,
    H_SCHEMA,
    H_SUBJECT,
    H_TIME_MS,
    H_TRACEPARENT,
    H_USER,
    Names,
    author_traceparent,
    derive_traceparent,
    forwardable_headers,
)
from adapter.errors import BusRefused
from adapter.ports import Bus, BusMessage
from adapter.tools.metrics import Metrics
from adapter.tools.timing import Clock, backoff

log = structlog.get_logger()

MAX_HEADER = 512
BEGINNINGS = 256 * 1024, 64 * 1024
"""Bytes that are kept of what the bus refuses whole: the first that it takes show at least what it was."""


class Events:
    """Publishes to WECHAT_EVENT and WECHAT_DEAD."""

    def __init__(self, bus: Bus, names: Names, clock: Clock, metrics: Metrics) -> None:
        self._bus = bus
        self._names = names
        self._clock = clock
        self._metrics = metrics
        self._event_numbers = itertools.count()

    async def publish_binding_event(
        self,
        event: contract.BindingEvent,
        *,
        cause: str = "",
        ensure_owner: Callable[[], None] | None = None,
    ) -> None:
        """Publishes a binding event. The same event for the same cause or request is a duplicate.

        `ensure_owner`: see BusMessage; it may raise LeaseLost."""
        event = msgspec.structs.replace(event, at_ms=self._clock.now_ms())
        cause = cause or event.request or f"{event.at_ms}.{next(self._event_numbers)}"
        msg_id = f"binding:{event.bot}:{event.change}:{cause}"
        await self._publish_event("binding", event, msg_id, ensure_owner=ensure_owner)

    async def publish_login_event(self, event: contract.LoginEvent, *, step: int) -> None:
        """Publishes a step of a QR login. The stream drops the same step as a duplicate."""
        await self._publish_event("login", event, f"login:{event.login}:{step}")

    async def _publish_event(
        self,
        kind: str,
        event: contract.BindingEvent | contract.LoginEvent,
        msg_id: str,
        *,
        ensure_owner: Callable[[], None] | None = None,
    ) -> None:
        """A refusal by the stream is logged."""
        headers = {
            H_MSG_ID: msg_id,
            H_SCHEMA: contract.SCHEMA_VERSION,
            H_TRACEPARENT: derive_traceparent(msg_id, msg_id),
        }
        subject, payload = self._names.event(event.sandbox, kind), msgspec.json.encode(event)
        try:
            await self.store(BusMessage("event", subject, payload, headers, ensure_owner=ensure_owner))
        except BusRefused as exc:
            log.error("event.refused", sandbox=event.sandbox, kind=kind, detail=exc.detail)

    async def store(self, message: BusMessage) -> int:
        """Stores a message, and returns its sequence. Retries while the stream is full, which only an operator's own
        limits can cause, since a command must not end without its receipt. Raises BusRefused, Temporary."""
        failures = 0
        while True:
            try:
                return (await self._bus.store(message)).seq
            except BusRefused as exc:
                if not exc.is_full:
                    raise
                failures += 1
                log.error("event.retrying", stream=message.stream, detail=exc.detail, failures=failures)
                await self._clock.sleep(backoff(failures, first_s=0.5, longest_s=10.0))

    async def publish_dead_letter(
        self,
        stream: str,
        data: bytes,
        *,
        subject: str,
        headers: dict[str, str],
        reason: str,
        detail: str,
        msg_id: str,
        sandbox: str = "",
        user: str = "",
        seal: Callable[[bytes], bytes] | None = None,
    ) -> bool:
        """Keeps the original bytes and headers for an operator. `stream`: OUT, IN or EVENT; `user`: whom
        a command was for, or who wrote the message, if that was known; `seal`: makes of the bytes what is stored.
        Returns whether they are kept."""
        kept = {k: v[:MAX_HEADER] for k, v in forwardable_headers(headers).items() if k != H_REPLY_TO}
        kept |= {
            H_MSG_ID: msg_id,
            H_SUBJECT: subject,
            H_REASON: reason,
            H_DETAIL: detail[:MAX_HEADER].encode("ascii", "replace").decode().replace("\n", " "),
            H_TIME_MS: str(self._clock.now_ms()),
            H_TRACEPARENT: author_traceparent(headers) or derive_traceparent(msg_id),
        }
        for name, value in ((H_SANDBOX, sandbox), (H_USER, user)):
            kept.pop(name, None)  # an author may have set it
            if value:
                kept[name] = value
        self._metrics.dead_letters.labels(stream=stream.lower()).inc()
        ident = headers.get(H_COMMAND) or headers.get(H_MSG_ID, "")
        log.warning("message.dead_lettered", stream=stream, sandbox=sandbox, id=ident, reason=reason)
        subject_to = self._names.dead_letters(f"{self._names.prefix.upper()}_{stream}")
        for size in (len(data), *BEGINNINGS):
            payload = data[:size]
            if seal is not None:
                kept[H_BODY] = "sealed" if len(payload) == len(data) else "sealed, cut"
                payload = seal(payload)
            try:
                await self._bus.store(BusMessage("dead", subject_to, payload, kept))
                return True
            except BusRefused as exc:
                why = exc.detail
        # the stream may be full: later messages must not wait for it
        log.error("dead_letter.refused", stream=stream, sandbox=sandbox, detail=why)
        return False
