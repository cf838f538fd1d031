"""Reads and writes what is stored of persons: newest entries and records, hundreds in a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import structlog

from adapter.bridge.bindings import Bindings
from adapter.bridge.entries import Clear, Entry, StoredEntry, clear_of, encode_end, read_entry
from adapter.bridge.record import PersonRecord, PersonState
from adapter.contract.names import H_EXPECTED, Names
from adapter.contract.records import Binding, PersonKey
from adapter.errors import UNDECODABLE, AdapterError, Conflict, RecordTooNew, Refused, Unreadable
from adapter.ports import Bucket, BucketEntry, Bus, BusMessage, History, StoredMessage
from adapter.tools.concurrency import Batches
from adapter.tools.decoding import decode_record, log_once
from adapter.tools.seal import Sealer, person_context

log = structlog.get_logger()

READABLE_WITHIN = 64
"""Most entries behind which a readable one is looked for where the newest cannot be read."""
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PersonState).decode
_encode_record = msgspec.json.Encoder().encode


def binding_of(bindings: Bindings, key: PersonKey) -> Binding | None:
    """The binding that serves a person: of two bots of one person the one that was bound later."""
    found = [each for each in bindings.of_sandbox(key.sandbox) if each.key == key]
    return max(found, key=lambda each: each.bound, default=None)


class StoredPerson(NamedTuple):
    """What is stored of a person."""

    entry: StoredEntry | None
    """The newest that can be read; None: there is none."""
    last: int
    """Sequence of the subject's newest entry, which the fence expects; 0: there is none."""
    state: PersonState | None
    """Of the record; None: there is none of the person's time."""
    revision: int


def seal_state(key: PersonKey, user: str, state: PersonState, sealer: Sealer) -> bytes:
    """The value of a record."""
    sealed = sealer.seal_bytes(person_context(key.key, key.since), _encode(state))
    return _encode_record(PersonRecord(since=key.since, user=user, sealed=sealed))


def open_state(key: str, value: bytes, sealer: Sealer) -> tuple[int, PersonState]:
    """`since` and the state of a record. Raises RecordTooNew, Refused (no key opens it), UNDECODABLE."""
    record = decode_record(value, PersonRecord, person=key)
    return record.since, _decode(sealer.open_bytes(person_context(key, record.since), record.sealed))


class Persons:
    """The stream and the bucket of persons."""

    def __init__(
        self, bus: Bus, history: History, bucket: Bucket, names: Names, sealer: Sealer, *, gone_s: int = 0
    ) -> None:
        """`gone_s`: time to live of the marker that is left of the record of who is gone; 0: no limit."""
        self._bus = bus
        self._history = history
        self._bucket = bucket
        self._names = names
        self._sealer = sealer
        self._gone_s = gone_s
        self._loads = Batches(self._load)
        self._newest = Batches(self._read_newest)

    def subject(self, key: PersonKey) -> str:
        """Of the person's entries."""
        return self._names.inbox(key.sandbox, key.person)

    # reading ----------------------------------------------------------------------------------------

    async def load(self, key: PersonKey) -> StoredPerson:
        """What is stored of a person, as new as the leaders have it; many are read in one request. Raises Temporary;
        Refused("token_key") where no known key opens the record or the newest entry; RecordTooNew."""
        found = await self._loads.get(key)
        if isinstance(found, AdapterError):
            raise found
        assert found is not None
        return found

    async def load_all(self, keys: Sequence[PersonKey]) -> Mapping[PersonKey, StoredPerson | AdapterError]:
        """As `load`, of many; the error takes the place of who cannot be read. Raises Temporary."""
        found = await asyncio.gather(*(self._loads.get(key) for key in keys))
        return {key: each for key, each in zip(keys, found, strict=True) if each is not None}

    async def _load(self, keys: Sequence[PersonKey]) -> Mapping[PersonKey, StoredPerson | AdapterError]:
        newest, records = await asyncio.gather(
            self._read_newest(keys), self._bucket.get_all([*dict.fromkeys(key.key for key in keys)])
        )
        known = {entry.key: entry for entry in records}
        found: dict[PersonKey, StoredPerson | AdapterError] = {}
        for key in keys:
            try:
                stored = newest.get(key)
                entry = None if stored is None else await self._readable(stored)
                state, revision = self._state_in(known.get(key.key), key)
                found[key] = StoredPerson(entry, stored.seq if stored else 0, state, revision)
            except (Refused, RecordTooNew) as exc:
                log_once("person.unopenable", sandbox=key.sandbox, person=key.person, detail=exc.detail)
                found[key] = exc
        return found

    async def newest(self, key: PersonKey) -> tuple[StoredEntry | None, int]:
        """The newest entry that can be read, as new as the leader, and the sequence of the newest one; many are read
        in one request. Raises Temporary, RecordTooNew, Refused("token_key")."""
        stored = await self._newest.get(key)
        return (None, 0) if stored is None else (await self._readable(stored), stored.seq)

    async def _read_newest(self, keys: Sequence[PersonKey]) -> Mapping[PersonKey, StoredMessage]:
        subjects = {self.subject(key): key for key in keys}
        found = {
            stored.subject: stored
            for stored in await self._history.read_last_of_each(self._names.stream_in, [*subjects])
        }
        return {key: found[subject] for key in keys if (subject := self.subject(key)) in found}

    async def behind(self, key: PersonKey, position: int) -> list[StoredMessage]:
        """The entries behind a position, at the leader. Raises Temporary."""
        read = self._history.read(self._names.stream_in, self.subject(key), after=position)
        return [stored async for stored in read]

    def read(self, stored: StoredMessage) -> StoredEntry:
        """Raises RecordTooNew, Unreadable."""
        return read_entry(stored, self._sealer)

    async def reload(self, key: PersonKey) -> tuple[PersonState | None, int, bool]:
        """The record as it is after a refused write, its revision, and whether the person's time is over: it was
        deleted, or is that of a later time. Raises Temporary, RecordTooNew, Refused("token_key")."""
        entry = await self._bucket.get(key.key)
        is_over = entry is not None and (entry.value is None or clear_of(entry.value).since > key.since)
        return *self._state_in(entry, key), is_over

    async def has_ended(self, key: PersonKey) -> bool:
        """Whether the end of a person's time is stored. Raises Temporary."""
        stored = await self._history.read_last(self._names.stream_in, self.subject(key))
        about = clear_of(stored.data) if stored is not None else Clear()
        return about.since > key.since or (about.ended and about.since == key.since)

    # writing ----------------------------------------------------------------------------------------

    async def save(
        self, key: PersonKey, user: str, state: PersonState, revision: int, check: Callable[[], None]
    ) -> int:
        """Writes the record at a revision; the new one. `check` is called right before each write. Raises Conflict,
        Temporary, BusRefused, and what `check` raises."""
        value = seal_state(key, user, state, self._sealer)
        return await self._bucket.update(key.key, value, revision, ensure_owner=check)

    async def end(self, key: PersonKey, check: Callable[[], None], *, erased: bool) -> None:
        """Ends a person's time: stores an entry behind which the server takes nothing of it, and deletes the entries
        before it and the record. May be repeated. `erased`: the entries are left to an erasure, since a purge leaves
        them on the disk. `check` is called before each write. Raises Temporary, BusRefused, and what `check`
        raises."""
        sequence = await self._store_end(key, check, erased=erased)
        if sequence is None:
            return
        # twice: with several copies a purge in flight lets an old expectation pass
        for _ in range(2 if sequence > 1 and not erased else 0):
            check()
            await self._history.purge(self._names.stream_in, self.subject(key), up_to=sequence - 1)
        await self._delete(key, check)

    async def _store_end(self, key: PersonKey, check: Callable[[], None], *, erased: bool) -> int | None:
        """Returns the sequence of the end; None: a later time has begun."""
        subject = self.subject(key)
        while True:
            stored = await self._history.read_last(self._names.stream_in, subject)
            last = stored.seq if stored is not None else 0
            about = clear_of(stored.data) if stored is not None else Clear()
            if about.since > key.since:
                return None
            if about.ended and about.since == key.since and (about.erased or not erased):
                return last
            message = BusMessage("in", subject, encode_end(key.since, erased=erased), {H_EXPECTED: str(last)}, check)
            try:
                ack = await self._bus.store(message)
            except Conflict:
                continue  # somebody has stored an entry meanwhile, or the acknowledgement was lost
            return ack.seq

    async def _delete(self, key: PersonKey, check: Callable[[], None]) -> None:
        """Deletes the record of the time, and leaves a marker also where there was none, which refuses the late write
        of a former owner."""
        while True:
            entry = await self._bucket.get(key.key)
            if entry is not None and entry.value is not None and clear_of(entry.value).since > key.since:
                return
            check()
            try:
                await self._bucket.delete(key.key, entry.revision if entry else 0, ttl_s=self._gone_s)
                return
            except Conflict:
                continue

    # what cannot be read ----------------------------------------------------------------------------

    async def _readable(self, stored: StoredMessage) -> StoredEntry | None:
        """The newest entry that can be read, from this one on backwards. Raises RecordTooNew, Refused, Temporary."""
        try:
            entry = read_entry(stored, self._sealer)
        except Unreadable as exc:
            log_once("entry.unreadable", subject=stored.subject, sequence=stored.seq, detail=exc.detail)
            before = await self._history.read_newest(
                self._names.stream_in, stored.subject, count=READABLE_WITHIN, before=stored.seq
            )
            if (readable := next(filter(_is_entry, before), None)) is None:
                return None
            entry = read_entry(readable, self._sealer)
        if entry.secrets is None:
            raise Refused("token_key", "No known key opens the person's newest entry.")
        return entry

    def _state_in(self, entry: BucketEntry | None, key: PersonKey) -> tuple[PersonState | None, int]:
        """Raises RecordTooNew, Refused("token_key")."""
        if entry is None or entry.value is None:
            return None, entry.revision if entry else 0
        if clear_of(entry.value).since not in (0, key.since):
            return None, entry.revision  # of another time, whatever key sealed it
        try:
            since, state = open_state(key.key, entry.value, self._sealer)
        except UNDECODABLE as exc:  # not written by the adapter
            log_once("person.unreadable", sandbox=key.sandbox, person=key.person, detail=type(exc).__name__)
            return None, entry.revision
        return (state if since == key.since else None), entry.revision


def _is_entry(stored: StoredMessage) -> bool:
    try:
        decode_record(stored.data, Entry, subject=stored.subject)
    except UNDECODABLE:
        return False
    return True
