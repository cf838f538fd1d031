"""Every private record has its version, and one of a newer version is left alone by itself."""

from __future__ import annotations

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.record import PersonRecord
from adapter.contract.records import Binding, Lease, LoginRecord, PrivateRecord
from adapter.errors import UNDECODABLE, RecordTooNew
from adapter.tools.decoding import SAID_KEPT, decode_record
from tests.newer import made_newer

RECORDS: list[PrivateRecord] = [
    Binding(sandbox="s1", bot="b1@im.bot", token="sealed"),
    LoginRecord(sandbox="s1"),
    PersonRecord(sealed=b"s1.x"),
    Lease(),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_private_record_has_its_version(record: PrivateRecord) -> None:
    value = msgspec.json.encode(record)
    assert msgspec.json.decode(value)["v"] == 1
    assert decode_record(value, type(record), bot="b1") == record
    with pytest.raises(RecordTooNew, match="version 2, this replica knows 1"):
        decode_record(made_newer(value), type(record), bot="b1")


def test_what_the_adapter_has_not_written_is_no_newer_version() -> None:
    for text in (b"x", b'{"v":"2"}', b'{"v":0}', b'{"owner":5,"v":1}', b'{"owner":"\xff"}', b"[" * 100_000):
        with pytest.raises(UNDECODABLE):
            decode_record(text, Lease, partition="7")


def test_a_newer_record_is_said_once_by_each_that_reads_it_without_its_content() -> None:
    text = made_newer(msgspec.json.encode(Lease(owner="secret")))
    with capture_logs() as logs:
        for number in ("7", "7", "8", *map(str, range(100, 100 + SAID_KEPT)), "8"):
            with pytest.raises(RecordTooNew):
                decode_record(text, Lease, partition=number)
    assert [line["partition"] for line in logs[:2]] == ["7", "8"]
    assert len(logs) == 2 + SAID_KEPT + 1  # what is remembered has a limit
    assert "secret" not in str(logs)
