"""Reads parked commands back from the bus."""

from __future__ import annotations

from itertools import islice, takewhile

import structlog

from adapter.errors import AdapterError
from adapter.names import H_COMMAND, H_MSG_ID, H_SANDBOX, H_SINCE_MS, H_TIME_MS, check_sandbox
from adapter.outbound.commands import peek, read_command, since_ms, stand_in
from adapter.outbound.lane import Item, Lane, Parked
from adapter.outbound.settling import Outgoing
from adapter.ports import Stored

log = structlog.get_logger()


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
            try:
                found.append(item_of(stored, needs))
            except AdapterError:
                raise
            except Exception:  # it is met again when it is the first
                log.exception("parked.crashed", sandbox=lane.sandbox, sequence=stored.seq)
                break
        if len(found) == len(seqs) or stored.seq > seqs[len(found)]:
            break
    return found


async def read_raw(parked: Parked, sandbox: str, needs: Outgoing) -> Item | None:
    """A parked command that cannot be read, as it is stored; None if it is not there any more. Raises Temporary."""
    async for stored in needs.history.read(needs.names.stream_parked, parked.subject, after=parked.seq - 1):
        if stored.seq == parked.seq:
            command = stand_in(parked.command, parked.client, sandbox, parked.stored_ms)
            item = Item(command, stored.data, stored.headers, suspect=True)
            item.parked_seq = stored.seq
            return item
        break
    return None


def unread(stored: Stored, needs: Outgoing) -> tuple[str, Parked]:
    """The sandbox of a parked command that cannot be read, and what its headers say of it. Raises Refused."""
    headers = stored.headers
    sandbox, time_ms = headers.get(H_SANDBOX, ""), headers.get(H_TIME_MS, "")
    check_sandbox(sandbox)
    stored_ms = since_ms(headers.get(H_SINCE_MS, ""), int(time_ms) if time_ms.isdecimal() else stored.time_ms)
    client = headers.get(H_MSG_ID, "").removeprefix("parked:")
    expires_ms = stored_ms + needs.limits.park_ms
    return sandbox, Parked(stored.seq, stored.subject, headers.get(H_COMMAND, ""), client, expires_ms, stored_ms)


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
