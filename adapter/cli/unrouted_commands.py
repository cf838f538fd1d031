"""Commands stored while WECHAT_OUT had no subject transform, which no consumer sees; `doctor --fix` moves them."""

from __future__ import annotations

from adapter.cli.bus import Bus
from adapter.contract.headers import forwardable_headers
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, digest
from adapter.conversation.commands import original_position
from adapter.jetstream.history import count_by_subject
from adapter.ports import Stored


async def count_unrouted(bus: Bus) -> int:
    """Raises Temporary, BusRefused."""
    return sum((await count_by_subject(bus.connection, bus.names.stream_out, bus.names.out("*"))).values())


async def republish_unrouted(bus: Bus) -> None:
    """Publishes each of them again, oldest first, which the transform takes to its shard, and deletes the original.

    The transform must be in place. Raises Failed at the first that is not stored; a repetition goes on there.
    """
    stream = bus.names.stream_out

    async def republish() -> None:
        async for stored in bus.history.read(stream, bus.names.out("*")):
            await bus.store(stored.subject, stored.data, _copy_headers(stored))
            await bus.delete_stored(stream, stored.seq)

    await bus.ask_jetstream(f"DIRECT.GET.{stream}", republish())


def _copy_headers(stored: Stored) -> dict[str, str]:
    """The copy has an id that follows from the original, so that a repeated one is stored once. It names the command
    as it was called before, and since when it waits, so that it expires when that would have."""
    ident = stored.headers.get(H_COMMAND) or stored.headers.get(H_MSG_ID) or str(stored.seq)
    sequence, stored_ms = original_position(stored.headers, stored.seq, stored.time_ms)
    return forwardable_headers(stored.headers) | {
        H_MSG_ID: f"astray:{stored.seq}:{stored.time_ms}:{digest(stored.data)}",
        H_COMMAND: ident,
        H_SEQUENCE: str(sequence),
        H_SINCE_MS: str(stored_ms),
    }
