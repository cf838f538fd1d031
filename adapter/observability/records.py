"""Reads the private records of the buckets, and says which of them a newer version has written."""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec
import structlog

from adapter.contract.records import PrivateRecord
from adapter.errors import UNDECODABLE, RecordTooNew

log = structlog.get_logger()

SAID_KEPT = 10_000
"""Most lines about records of which a replica remembers that it has logged them."""
R = TypeVar("R", bound=PrivateRecord)


class _Version(msgspec.Struct):
    v: int = 0


class RecordDecoder(Generic[R]):
    """Reads the records of one bucket."""

    def __init__(self, kind: type[R]) -> None:
        self._decoder = msgspec.json.Decoder(kind)
        self._version = int(kind.__struct_config__.tag or 0)
        self._said: set[tuple[str | int, ...]] = set()

    def decode(self, value: bytes, **names: str) -> R:
        """Raises RecordTooNew, which is logged once for each record, and UNDECODABLE for what the adapter has not
        written. `names`: the fields of the log line, which name the record."""
        try:
            return self._decoder.decode(value)
        except UNDECODABLE as exc:
            version = _version_in(value)
            if version <= self._version:
                raise
            self.say_once("record.too_new", version=version, known=self._version, **names)
            detail = f"A record has version {version}, this replica knows {self._version}."
            raise RecordTooNew("record_too_new", detail) from exc

    def say_once(self, event: str, **fields: str | int) -> None:
        """Logs an error, once with the same fields."""
        if (said := (event, *fields.values())) in self._said:
            return
        if len(self._said) >= SAID_KEPT:
            self._said.clear()
        self._said.add(said)
        log.error(event, **fields)


def _version_in(value: bytes) -> int:
    try:
        return msgspec.json.decode(value, type=_Version).v
    except UNDECODABLE:
        return 0
