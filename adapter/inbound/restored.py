"""Finds stored positions that lie above the last sequence of the inboxes, which a restore of an old backup leaves.

Whatever is stored up to such a position would be taken for known. So `outbound.inbox.InboxReader.check` refuses it,
and `wechat-nats doctor --fix` lowers it.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from adapter.contract.names import Names, from_subject_token
from adapter.contract.records import ReaderRecord
from adapter.errors import UNDECODABLE, Refused
from adapter.inbound.checkpoint import lowered_checkpoint
from adapter.outbound.store import open_record, seal_record
from adapter.ports import History, StoredMessage
from adapter.security.seal import Sealer


class Above(NamedTuple):
    """A key with such a position. `value`: the same record with the last sequence as its position."""

    bucket: str
    key: str
    value: bytes
    revision: int
    ttl_s: int
    """The key's time to live; 0: no limit."""


async def find_above(history: History, names: Names, sealer: Sealer) -> tuple[list[Above], int]:
    """The keys with such positions, and the number of records that no key of `sealer` opens. Raises Temporary."""
    buckets = (names.checkpoints, names.conversations, names.readers)
    found = [
        (bucket, stored)
        for bucket in buckets
        async for stored in history.read(f"KV_{bucket}", f"$KV.{bucket}.>")
        if stored.data
    ]
    last = await history.last_sequence(names.stream_in)  # not before: adapters may go on
    above, unopened = [], 0
    for bucket, stored in found:
        key = stored.subject.removeprefix(f"$KV.{bucket}.")
        try:
            value = _lowered(bucket, key, stored, last, names, sealer)
        except Refused:
            unopened += 1
        except UNDECODABLE:
            continue  # unreadable, or of a newer version
        else:
            if value is not None:
                ttl_s = int(stored.headers.get("Nats-TTL", "0").removesuffix("s"))
                above.append(Above(bucket, key, value, stored.seq, ttl_s))
    return above, unopened


def _lowered(bucket: str, key: str, stored: StoredMessage, last: int, names: Names, sealer: Sealer) -> bytes | None:
    """None: the position is not above. Raises Refused, UNDECODABLE."""
    if bucket == names.checkpoints:
        return lowered_checkpoint(from_subject_token(key), stored.data, last, sealer)
    if bucket == names.readers:
        reader = msgspec.json.decode(stored.data, type=ReaderRecord)
        if reader.handled <= last:
            return None
        # the reader's number is the revision of the write that made it
        lowered = msgspec.structs.replace(reader, handled=last, reader=reader.reader or stored.seq)
        return msgspec.json.encode(lowered)
    record = open_record(key, stored.data, sealer)
    if max(record.inbox_seq, record.window.sequence) <= last:
        return None
    window = msgspec.structs.replace(record.window, sequence=min(record.window.sequence, last))
    record = msgspec.structs.replace(record, inbox_seq=min(record.inbox_seq, last), window=window)
    return seal_record(key, record, sealer)
