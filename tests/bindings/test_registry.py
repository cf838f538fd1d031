"""Who serves whom, in memory: what the bucket has lost stays, and what cannot be read changes nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bridge.bindings import Bindings
from adapter.contract.names import Names, to_subject_token
from adapter.contract.records import Binding
from adapter.errors import Refused
from adapter.ports import BucketEntry
from tests.fakes import FakeBucket, settle
from tests.newer import made_newer

VIRTUAL_TIME = True

BOT = "b1@im.bot"
BOUND = Binding(sandbox="s1", bot=BOT, user="u1@im.wechat", token="t")


async def following() -> tuple[Bindings, FakeBucket]:
    """Bindings that follow a bucket, with one in it."""
    bucket = FakeBucket()
    bucket.put(to_subject_token(BOT), msgspec.json.encode(BOUND))
    bindings = Bindings(bucket, Names(), unbound_s=3600)
    asyncio.get_running_loop().create_task(bindings.run())
    await settle()
    return bindings, bucket


async def test_a_binding_that_the_bucket_has_lost_stays_and_can_be_unbound() -> None:
    """Those who remember it hear of that by its mark."""
    bindings, bucket = await following()
    bucket.entries.clear()
    assert bindings.get(BOT) == BOUND
    await bindings.remove(BOT)
    assert bindings.get(BOT) is None
    assert bucket.entries[to_subject_token(BOT)].value is None


async def test_an_update_that_meets_a_deletion_brings_nothing_back() -> None:
    """Its read was answered before the deletion, and looked at after it."""
    bindings, bucket = await following()
    key, read = to_subject_token(BOT), bucket.get

    async def answered_late(key: str) -> BucketEntry | None:
        found = await read(key)
        bucket.get = read  # type: ignore[method-assign]
        bucket.put(key, None)
        return found

    bucket.get = answered_late  # type: ignore[method-assign]
    assert await bindings.update(BOT, lambda now: msgspec.structs.replace(now, state="needs_login")) is None
    assert bindings.get(BOT) is None
    assert bucket.entries[key].value is None


async def test_the_mark_of_an_unbinding_goes_in_time() -> None:
    bindings, bucket = await following()
    await bindings.remove(BOT)
    assert bucket.ttls == {to_subject_token(BOT): 3600}
    await bindings.change(BOUND.bot, lambda _: BOUND)
    assert bucket.ttls == {}


async def test_what_cannot_be_read_changes_nothing_and_is_said() -> None:
    bindings, bucket = await following()
    with capture_logs() as logs:
        for text in (b"no binding", b'{"sandbox":"\xff"}', b'{"sandbox":' + b"[" * 100_000):
            bucket.put(to_subject_token(BOT), text)
        bucket.put("=zz", b"somebody else's key")
    assert bindings.get(BOT) == BOUND
    assert [line["event"] for line in logs] == ["binding.unreadable"] * 4


async def test_a_binding_of_a_newer_version_is_left_alone_and_said_once() -> None:
    """Who it serves is known, and its token is not used."""
    bindings, bucket = await following()
    fields: dict[str, Any] = {"sandbox": "s2", "person": "p1", "since": 7, "bound": 8}
    text = made_newer(msgspec.json.encode(BOUND), token={"of": "another form"}, **fields)
    with capture_logs() as logs:
        for _ in range(2):
            bucket.put(to_subject_token(BOT), text)
        assert await bindings.change(BOT, lambda _: BOUND) is None
        with pytest.raises(Refused, match="too_new"):
            bindings.ensure_known(BOT)
        assert await bindings.update(BOT, lambda binding: BOUND) is None
    assert bindings.get(BOT) == Binding(bot=BOT, user="u1@im.wechat", token="", state="too_new", **fields)
    assert bucket.entries[to_subject_token(BOT)].value == text
    assert [(line["event"], line["bot"], line["version"]) for line in logs] == [("record.too_new", BOT, 2)]
    await bindings.remove(BOT)  # somebody unbinds it, or erases its person
    assert bindings.get(BOT) is None


async def test_a_bind_that_meets_a_newer_version_leaves_what_that_one_wrote() -> None:
    bindings, bucket = await following()
    texts = [made_newer(msgspec.json.encode(BOUND))]

    async def write(key: str) -> None:
        if texts:
            bucket.entries[key] = BucketEntry(key, texts.pop(), bucket.entries[key].revision + 1)  # not heard of yet

    bucket.on_write = write
    assert await bindings.change(BOT, lambda _: msgspec.structs.replace(BOUND, sandbox="s2")) is None
    with pytest.raises(Refused, match="too_new"):
        bindings.ensure_known(BOT)


async def test_a_token_that_was_sealed_anew_is_no_change() -> None:
    bucket = FakeBucket()
    bindings = Bindings(bucket, Names(), same_token=lambda bot, one, other: True)
    changes: list[tuple[str, Binding | None, Binding | None]] = []
    bindings.add_listener(lambda bot, before, after: changes.append((bot, before, after)))
    await bindings.change(BOUND.bot, lambda _: BOUND)
    sealed = msgspec.structs.replace(BOUND, token="the same, sealed")
    await bindings.change(BOUND.bot, lambda _: sealed)
    assert changes == [(BOT, None, BOUND)]
    assert bindings.get(BOT) == sealed


async def test_an_unbind_that_meets_another_write_removes_what_that_one_wrote() -> None:
    bindings, bucket = await following()
    others = [msgspec.json.encode(msgspec.structs.replace(BOUND, sandbox="s2"))]

    async def write(key: str) -> None:
        if others:
            bucket.put(key, others.pop())

    bucket.on_write = write
    await bindings.remove(BOT)
    assert others == []
    assert bindings.get(BOT) is None
    assert bucket.entries[to_subject_token(BOT)].value is None
