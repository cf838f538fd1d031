"""Who serves whom, in memory: its owner puts back what a purge took, and what cannot be read changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from adapter.bindings.registry import Bindings, is_anew
from adapter.names import token_of
from adapter.records import Binding
from tests.fakes import FakeBucket, settle

VIRTUAL_TIME = True

BOT = "b1@im.bot"
BOUND = Binding(sandbox="s1", bot=BOT, user="u1@im.wechat", token="t")


class Purged(FakeBucket):
    """A bucket of which somebody may purge keys."""

    missing: Callable[[str, bool], Awaitable[bool]]
    follower: asyncio.Task[None]

    async def follow(self, *args: Any, on_missing: Any = None, **kwargs: Any) -> None:
        self.missing = on_missing
        await super().follow(*args, **kwargs)


async def following(*, owner: bool = True, bound: Binding | None = BOUND) -> tuple[Bindings, Purged]:
    """Bindings that follow a bucket, as the replica that owns every shard, or none."""
    bucket = Purged()
    if bound is not None:
        bucket.put(token_of(BOT), msgspec.json.encode(bound))
    bindings = Bindings(bucket, lambda _: owner)
    bucket.follower = asyncio.create_task(bindings.run())
    await settle()
    return bindings, bucket


@pytest.mark.parametrize(
    ("owner", "anew", "restored"), [(True, False, True), (False, False, False), (False, True, True)]
)
async def test_a_purged_binding_is_put_back_by_its_owner_and_into_a_new_bucket_by_whoever_knows_it(
    owner: bool, anew: bool, restored: bool
) -> None:
    """Only the owner has surely seen every unbind."""
    bindings, bucket = await following(owner=owner)
    bucket.entries.clear()
    assert await bucket.missing(token_of(BOT), anew) is restored
    assert (token_of(BOT) in bucket.entries) is restored
    assert bindings.get(BOT) == BOUND


async def test_a_purged_key_of_which_nothing_is_known_needs_nobody() -> None:
    _, bucket = await following(bound=None)
    assert await bucket.missing(token_of(BOT), False)
    assert bucket.entries == {}


async def test_a_binding_that_was_made_again_meanwhile_is_not_overwritten() -> None:
    _, bucket = await following()
    bucket.entries.clear()
    other = msgspec.json.encode(msgspec.structs.replace(BOUND, sandbox="s2"))
    bucket.put(token_of(BOT), other)
    assert await bucket.missing(token_of(BOT), False)
    assert bucket.entries[token_of(BOT)].value == other


async def test_a_binding_that_is_unbound_before_a_purge_was_noticed_is_not_put_back() -> None:
    """Its mark is there for the others, who remember it, too."""
    bindings, bucket = await following()
    bucket.entries.clear()
    await bindings.remove(BOT)
    assert await bucket.missing(token_of(BOT), True)
    assert bindings.get(BOT) is None
    assert bucket.entries[token_of(BOT)].value is None


async def test_what_cannot_be_read_changes_nothing_and_is_said() -> None:
    bindings, bucket = await following()
    with capture_logs() as logs:
        for text in (b"no binding", b'{"sandbox":"\xff"}', b'{"sandbox":' + b"[" * 100_000):
            bucket.put(token_of(BOT), text)
        bucket.put("=zz", b"somebody else's key")
    assert bindings.get(BOT) == BOUND
    assert [line["event"] for line in logs] == ["binding.unreadable"] * 4


async def test_a_token_that_was_sealed_anew_is_no_change() -> None:
    bucket = FakeBucket()
    bindings = Bindings(bucket, same_token=lambda bot, one, other: True)
    heard: list[tuple[str, Binding | None, Binding | None]] = []
    bindings.listen(lambda bot, before, after: heard.append((bot, before, after)))
    await bindings.put(BOUND)
    sealed = msgspec.structs.replace(BOUND, token="the same, sealed")
    await bindings.put(sealed)
    assert heard == [(BOT, None, BOUND)]
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
    assert bucket.entries[token_of(BOT)].value is None


LOST = msgspec.structs.replace(BOUND, state="needs_login")


@pytest.mark.parametrize(
    ("before", "after", "anew"),
    [
        (None, BOUND, True),
        (BOUND, None, True),
        (BOUND, msgspec.structs.replace(BOUND, token="new"), True),
        (LOST, msgspec.structs.replace(LOST, token="new"), True),
        (LOST, BOUND, True),
        (BOUND, LOST, False),
        (BOUND, msgspec.structs.replace(BOUND, request="another"), False),
    ],
    ids=["bound", "unbound", "new-token", "new-token-of-a-lost-login", "found-alive", "found-dead", "said-again"],
)
def test_a_token_is_judged_anew_where_ilink_may_think_of_it_differently(
    before: Binding | None, after: Binding | None, anew: bool
) -> None:
    assert is_anew(before, after) is anew
