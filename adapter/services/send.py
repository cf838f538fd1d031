"""wechat.svc.send.<sandbox>: stores a command for a sandbox that may not publish into the stream itself.

One header of a publish can stop a stream of a cluster for good on some versions of nats-server (SECURITY.md). So
nothing of the request's headers is passed on but the trace.
"""

from __future__ import annotations

import uuid

import msgspec

from adapter.bridge.commands import Limits, decode_command
from adapter.contract.messages import SCHEMA_VERSION, CommandStored
from adapter.contract.names import H_MSG_ID, H_SCHEMA, H_TRACEPARENT, Names, author_traceparent, check_sandbox
from adapter.errors import BusRefused, Refused, Temporary, Unreadable
from adapter.ports import Bus, BusMessage, SandboxRequest, SandboxResponse
from adapter.tools.metrics import Metrics


class SendService:
    """The handler."""

    def __init__(self, bus: Bus, names: Names, limits: Limits, metrics: Metrics) -> None:
        self._bus = bus
        self._names = names
        self._limits = limits
        self._metrics = metrics

    async def store(self, request: SandboxRequest) -> SandboxResponse:
        """Answers once the command is stored. Raises Refused("invalid"), Temporary (the sandbox's queue is full)."""
        sandbox = check_sandbox(request.sandbox)
        try:
            body = decode_command(request.data, self._limits)
        except Unreadable as exc:
            self._metrics.schema_violations.labels(kind="svc").inc()
            raise Refused("invalid", exc.detail) from exc
        # random: an id counts for the whole stream, and a repeat of this write must not be a second command
        ident = f"send-{uuid.uuid4().hex}"
        headers = {H_SCHEMA: SCHEMA_VERSION, H_MSG_ID: ident}
        if trace := author_traceparent(request.headers):
            headers[H_TRACEPARENT] = trace
        try:
            ack = await self._bus.store(BusMessage("out", self._names.out(sandbox), request.data, headers))
        except BusRefused as exc:
            raise Temporary("full", f"The command is not stored: {exc.detail}") from exc
        return SandboxResponse(msgspec.json.encode(CommandStored(command=body.id or ident, sequence=ack.seq)), {})
