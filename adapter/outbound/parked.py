"""Reads parked commands back from the bus."""

from __future__ import annotations

from itertools import islice, takewhile

from adapter.names import H_COMMAND, H_SANDBOX, H_SINCE_MS, H_TIME_MS
from adapter.outbound.commands import peek, read_command
from adapter.outbound.lane import Item, Lane, Parked
from adapter.outbound.settling import Outgoing
from adapter.ports import Stored


async def read_parked(parked: Parked, needs: Outgoing) -> Item | None:
    """A parked command; None if it is not there any more. Raises Temporary."""
    async for stored in needs.history.read(needs.names.stream_parked, parked.subject, after=parked.seq - 1):
        return item_of(stored, needs) if stored.seq == parked.seq else None
    return None


async def read_behind(lane: Lane, most: int, needs: Outgoing) -> list[Item]:
    """What is parked behind the lane's first command, in order: of one subject, and up to what the bus does not show.

    Raises Temporary.
    """
    waiting = list(islice(lane.parked, 1, most + 1))
    seqs = [one.seq for one in takewhile(lambda one: one.subject == waiting[0].subject, waiting)]
    found: list[Item] = []
    if not seqs:
        return found
    async for stored in needs.history.read(needs.names.stream_parked, waiting[0].subject, after=seqs[0] - 1):
        if stored.seq == seqs[len(found)]:
            found.append(item_of(stored, needs))
        if len(found) == len(seqs) or stored.seq > seqs[len(found)]:
            break
    return found


def item_of(stored: Stored, needs: Outgoing) -> Item:
    """A parked command. Raises Unreadable, Refused."""
    headers, body = stored.headers, peek(stored.data, needs.limits)
    command = read_command(
        body,
        sandbox=headers.get(H_SANDBOX, ""),
        ident=body.id or headers.get(H_COMMAND, ""),  # a header loses the spaces around it, and its lines
        time_ms=int(headers.get(H_TIME_MS, "0")),
        limits=needs.limits,
        since=headers.get(H_SINCE_MS, ""),
    )
    item = Item(command, stored.data, headers, suspect=True)
    item.parked_seq = stored.seq
    item.parked_ms = max(0, needs.sending.clock.now_ms() - stored.time_ms) if stored.time_ms else 0
    return item
