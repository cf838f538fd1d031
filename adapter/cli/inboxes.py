"""What `doctor` finds in the inboxes: what a restore of a backup leaves behind, and which keys persons still need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from adapter.bridge.entries import clear_of
from adapter.cli.bus import BusConnection
from adapter.contract.names import LAYOUT_KEY
from adapter.contract.records import ALL, ReaderRecord
from adapter.errors import UNDECODABLE
from adapter.ports import StoredMessage
from adapter.tools.seal import Sealer, Sealing

KEY_BYTES = 16
"""The beginning of what is sealed, with the name of the key."""
Inbox = tuple[int, StoredMessage]
"""Of one person: the number of entries, and the newest."""


class Above(NamedTuple):
    """A reader whose place is above the last sequence of the inboxes."""

    sandbox: str
    value: bytes
    """The same record with the last sequence as its place."""
    revision: int
    ttl_s: int
    """The key's time to live; 0: no limit."""


async def find_readers_above(bus: BusConnection) -> list[Above]:
    """Raises Temporary."""
    names, history = bus.names, bus.history
    bucket = f"KV_{names.readers}"
    found = [stored async for stored in history.read(bucket, f"$KV.{names.readers}.>") if stored.data]
    last = await history.last_sequence(names.stream_in)  # not before: adapters may go on
    above = []
    for stored in found:
        try:
            reader = msgspec.json.decode(stored.data, type=ReaderRecord)
        except UNDECODABLE:
            continue  # unreadable, or of a newer version
        if reader.handled > last:
            # the reader's number is the revision of the write that made it
            reset = msgspec.structs.replace(reader, handled=last, number=ALL, reader=reader.reader or stored.seq)
            ttl_s = int(stored.headers.get("Nats-TTL", "0").removesuffix("s"))
            sandbox = stored.subject.removeprefix(f"$KV.{names.readers}.")
            above.append(Above(sandbox, msgspec.json.encode(reset), stored.seq, ttl_s))
    return above


async def read_inboxes(bus: BusConnection) -> list[Inbox]:
    """The inbox of each person. Raises Temporary, BusRefused."""
    stream, counts = bus.names.stream_in, dict[str, int]()
    while True:
        asked = {"subjects_filter": bus.names.inbox("*"), "offset": len(counts)}
        page = (await bus.connection.api_request(f"STREAM.INFO.{stream}", asked))["state"].get("subjects") or {}
        if not page.keys() - counts.keys():
            break
        counts |= page
    newest = await bus.history.read_last_of_each(stream, [*counts])
    return [(counts[stored.subject], stored) for stored in newest]


class _Served(msgspec.Struct):
    """What every version of a binding has."""

    sandbox: str
    person: str


async def unserved(bus: BusConnection, inboxes: Sequence[Inbox]) -> list[Inbox]:
    """Those of persons whom no binding has, as a restore leaves them. One whose end is stored is none: it keeps late
    writes out. None of them, if a binding cannot be read or there is none: the bucket may be lost. Raises
    Temporary."""
    names, served = bus.names, set()
    # read after the inboxes: a person whose inbox is known was bound before, and has an end if no longer
    async for stored in bus.history.read(f"KV_{names.bindings}", f"$KV.{names.bindings}.>"):
        if stored.data and not stored.subject.endswith(f".{LAYOUT_KEY}"):
            try:
                binding = msgspec.json.decode(stored.data, type=_Served)
            except UNDECODABLE:
                return []
            served.add(names.inbox(binding.sandbox, binding.person))
    left = {newest.subject: count for count, newest in inboxes if served and newest.subject not in served}
    again = await bus.history.read_last_of_each(names.stream_in, [*left])
    return [(left[newest.subject], newest) for newest in again if not clear_of(newest.data).ended]


async def purge(bus: BusConnection, inboxes: Sequence[Inbox]) -> None:
    """Deletes their entries. Raises Temporary, BusRefused."""
    for _, newest in inboxes:
        await bus.history.purge(bus.names.stream_in, newest.subject, up_to=newest.seq)


class _Sealed(msgspec.Struct):
    sealed: bytes = b""


async def count_persons(bus: BusConnection, inboxes: Sequence[Inbox], sealer: Sealer) -> Counter[Sealing]:
    """Number of persons by the key that they need: that of the newest entry or of the record, whichever is worse.
    Raises Temporary."""
    names, of_person = bus.names, dict[tuple[str, ...], set[Sealing]]()
    records = [stored async for stored in bus.history.read(f"KV_{names.persons}", f"$KV.{names.persons}.>")]
    for stored in [*(newest for _, newest in inboxes), *records]:
        try:
            sealed = msgspec.json.decode(stored.data, type=_Sealed).sealed
        except UNDECODABLE:
            continue  # a delete marker, or unreadable
        if sealed:  # not the end of a person's time
            how = sealer.sealing_of(sealed[:KEY_BYTES].decode("ascii", "replace"))
            of_person.setdefault(tuple(stored.subject.split(".")[-2:]), set()).add(how)
    worst: tuple[Sealing, ...] = ("foreign", "older", "sealed")
    return Counter(next(how for how in worst if how in found) for found in of_person.values())
