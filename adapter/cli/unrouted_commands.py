"""Commands stored while WECHAT_OUT had no subject transform, which no consumer sees; `doctor --fix` moves them."""

from __future__ import annotations

import asyncio

from adapter.cli.bus import ANSWER_S, Bus
from adapter.cli.exit_codes import NO, UNREACHABLE, Failed
from adapter.contract.headers import forwardable_headers
from adapter.contract.names import H_COMMAND, H_MSG_ID, H_SEQUENCE, H_SINCE_MS, Names, digest
from adapter.conversation.commands import original_position
from adapter.jetstream import topology
from adapter.jetstream.consumer import Consumer, Delivery
from adapter.jetstream.history import count_by_subject
from adapter.jetstream.managed_connection import ManagedConnection

SECOND_NS = 1_000_000_000


async def count_unrouted(connection: ManagedConnection, names: Names) -> int:
    """How many there are. Raises Temporary, BusRefused."""
    return sum((await count_by_subject(connection, names.stream_out, names.out("*"))).values())


async def republish_unrouted(connection: ManagedConnection, bus: Bus, limit: int) -> None:
    """Publishes `limit` of them again, oldest first, which the transform takes to their shard; then they are settled.

    The id of a copy follows from the original, so that one that is repeated is stored once; it names the command as
    it was called before, and says since when it waits, so that it expires when that would have. Where the server does
    not take one, it stays with those that came behind it to its sandbox. Raises Failed (also then, in the end),
    Temporary, BusRefused.
    """
    names = bus.names
    config = {
        "durable_name": "astray",
        "name": "astray",
        "filter_subject": names.out("*"),
        "ack_policy": "explicit",
        "ack_wait": 60 * SECOND_NS,
        "inactive_threshold": 60 * SECOND_NS,
    }
    wanted = topology.Wanted("astray", config, stream=names.stream_out)
    await topology.create_resource(connection, wanted)
    found: asyncio.Queue[Delivery] = asyncio.Queue()
    remaining: dict[str, str] = {}
    reading = asyncio.get_running_loop().create_task(
        Consumer(connection, wanted, room=100).run(found.put_nowait, _ignore_reset)
    )
    try:
        for _ in range(limit):
            async with asyncio.timeout(ANSWER_S):
                delivery = await found.get()
            if delivery.subject in remaining:
                continue
            try:
                await bus.store(delivery.subject, delivery.data, _copy_headers(delivery))
            except Failed as exc:
                if exc.code != NO:
                    raise
                remaining[delivery.subject] = str(exc)
            else:
                await delivery.ack()
        await bus.nc.flush()
    except TimeoutError:
        raise Failed(UNREACHABLE, "The commands were not all published again: use --fix once more.") from None
    finally:
        reading.cancel()
    if remaining:
        raise Failed(NO, "; ".join(f"{subject}: {why}" for subject, why in remaining.items()))


def _copy_headers(delivery: Delivery) -> dict[str, str]:
    ident = delivery.headers.get(H_COMMAND) or delivery.headers.get(H_MSG_ID) or str(delivery.seq)
    sequence, stored_ms = original_position(delivery.headers, delivery.seq, delivery.time_ms)
    return forwardable_headers(delivery.headers) | {
        H_MSG_ID: f"astray:{delivery.seq}:{delivery.time_ms}:{digest(delivery.data)}",
        H_COMMAND: ident,
        H_SEQUENCE: str(sequence),
        H_SINCE_MS: str(stored_ms),
    }


async def _ignore_reset() -> None:
    return None
