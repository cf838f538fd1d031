"""The bus in memory against a real server: the same calls have the same results.

One rule differs by choice: of a message whose id the stream knows and whose expectation is wrong, one server looks at
the expectation first, a cluster at the id, as the fake does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import pytest

from adapter.contract.names import H_EXPECTED, H_MSG_ID
from adapter.errors import AdapterError, BusRefused
from adapter.ports import BusMessage
from tests.bus.rig import NAMES, Rig
from tests.e2e.waiting import eventually
from tests.fakes.bus import FakeBucket, FakeBus
from tests.fakes.clock import FakeClock

EVENTS, A, B = NAMES.stream_event, NAMES.event("a", "binding"), NAMES.event("b", "binding")
HOSTILE = [
    b'{"error":{"err_code":10008}}',
    b'{"cluster":{"replicas":[1]}}',
    b'{"seq":7}',
    b"",
    b"\xff",
    b"NATS/1.0 503",
]


class Sides(NamedTuple):
    """One of the two: what publishes, what reads, a bucket, and how a marker of the bucket goes."""

    bus: Any
    history: Any
    bucket: Any
    expired: Callable[[str], Awaitable[None]]
    limit: Callable[[int], Awaitable[None]]
    """Bounds the messages of a subject of WECHAT_OUT."""


class Said:
    """The results of calls, without what the sides cannot have in common: a server's first sequence and its words."""

    def __init__(self, side: Sides) -> None:
        self.side = side
        self.found: list[object] = []
        self._first: dict[str, int] = {}

    async def store(self, subject: str, payload: bytes = b"x", **headers: Any) -> int:
        given = {
            {"expected": H_EXPECTED, "id": H_MSG_ID}.get(name, name): str(value) for name, value in headers.items()
        }
        try:
            ack = await self.side.bus.store(BusMessage("event", subject, payload, given))
        except BusRefused as exc:
            self.found.append((type(exc).__name__, exc.code))
            return 0
        base = self._first.setdefault(ack.stream, ack.seq)
        self.found.append((ack.seq - base, ack.duplicate))
        return int(ack.seq)

    async def data(self, subject: str, **where: Any) -> None:
        found = [stored async for stored in self.side.history.read(EVENTS, subject, **where)]
        self.found.append([(stored.subject, stored.data) for stored in found])

    async def tried(self, call: Awaitable[object]) -> Any:
        try:
            result = await call
        except AdapterError as exc:
            result = type(exc).__name__
        self.found.append(result if isinstance(result, str | bytes | None) else type(result).__name__)
        return result


async def ids(said: Said) -> None:
    for ident in ("1", "2", "1", "2"):
        await said.store(A, id=ident)


async def expectations(said: Said) -> None:
    await said.store(A, expected=5)
    first = await said.store(A, expected=0)
    await said.store(A, expected=0)
    await said.store(B, expected=0)
    await said.store(A, expected=first)
    await said.store(A, expected=first)


async def expectations_after_deletions(said: Said) -> None:
    history = said.side.history
    first, second = await said.store(A), await said.store(A)
    await history.delete(EVENTS, second)
    await said.store(A, expected=second)
    third = await said.store(A, expected=first)
    await history.purge(EVENTS, A, up_to=third)
    await said.store(A, expected=third)
    await said.store(A, expected=0)


async def sizes(said: Said) -> None:
    for size in (60_000, 66_000):
        await said.store(A, b"x", x="x" * size)
    for size in (1024 * 1024 - 200, 1024 * 1024 + 1):
        await said.store(A, b"x" * size, id="1")


async def hostile_payloads(said: Said) -> None:
    history = said.side.history
    for payload in HOSTILE:
        sequence = await said.store(A, payload)
        found = [await history.get(EVENTS, sequence), await history.read_last(EVENTS, A)]
        said.found.append([stored.data for stored in (*found, *await history.read_last_of_each(EVENTS, [A, B]))])
    await said.data(NAMES.event("*", "binding"))


async def reads(said: Said) -> None:
    history, both = said.side.history, NAMES.event("*", "binding")
    first = await said.store(A, b"0")
    for number in range(1, 5):
        await said.store((A, B)[number % 2], b"%d" % number)
    await said.data(A)
    await said.data(A, after=first)
    await said.data(both, limit=2)
    newest = await history.read_newest(EVENTS, both, count=2)
    said.found.append([stored.data for stored in newest])
    said.found.append(
        [stored.data for stored in await history.read_newest(EVENTS, both, count=1, before=newest[1].seq)]
    )
    await said.tried(history.get(EVENTS, first + 1000))
    await said.tried(history.read_last(EVENTS, NAMES.event("nobody", "binding")))
    said.found.append((await history.last_sequence(EVENTS) - first, await history.count(EVENTS)))
    await history.delete(EVENTS, first + 1000)
    await history.purge(EVENTS, both, keep=2)
    await said.data(both)
    said.found.append((await history.last_sequence(EVENTS) - first, await history.count(EVENTS)))


async def a_full_subject(said: Said) -> None:
    await said.side.limit(2)
    for _ in range(3):
        await said.store(NAMES.out("a"))
    await said.store(NAMES.out("b"))


async def a_bucket(said: Said) -> None:
    bucket = said.side.bucket
    await said.tried(bucket.get("k"))
    await said.tried(bucket.update("k", b"1", 3))
    first = await bucket.update("k", b"1", 0)
    await said.tried(bucket.update("k", b"2", 0))
    said.found.append(await bucket.update("k", b"1", 0) == first)  # its own write, whose answer was lost
    second = await bucket.update("k", b"2", first)
    said.found.append((await bucket.get("k"))._replace(revision=0))
    marker = await bucket.delete("k", second, ttl_s=1)
    entry = await bucket.get("k")
    said.found.append((entry.value, entry.revision == marker))
    await said.tried(bucket.update("k", b"3", second))
    await said.side.expired("k")
    await said.tried(bucket.get("k"))
    await said.tried(bucket.update("k", b"3", marker))
    await bucket.update("k", b"3", 0)
    await bucket.update("p.1", b"4", 0)
    said.found.append(sorted((e.key, e.value) for e in await bucket.get_all(["k", "p.1", "none"])))


@pytest.mark.parametrize(
    "case",
    [ids, expectations, expectations_after_deletions, sizes, hostile_payloads, reads, a_full_subject, a_bucket],
    ids=lambda case: case.__name__,
)
async def test_the_fake_bus_does_what_a_server_does(rig: Rig, case: Callable[[Said], Awaitable[None]]) -> None:
    real_bucket, fake, fake_bucket = rig.bucket(), FakeBus(NAMES, FakeClock()), FakeBucket()

    async def gone(key: str) -> None:
        async def is_gone() -> bool:
            return await real_bucket.get(key) is None

        await eventually(is_gone, "the marker has expired")

    async def expire(key: str) -> None:
        fake_bucket.expire(key)

    async def limit(most: int) -> None:
        config = (await rig.connection.api_request(f"STREAM.INFO.{NAMES.stream_out}"))["config"]
        await rig.connection.api_request(f"STREAM.UPDATE.{NAMES.stream_out}", config | {"max_msgs_per_subject": most})

    async def limit_fake(most: int) -> None:
        fake.most_of_subject[NAMES.stream_out] = most

    real, said = (
        Said(Sides(rig.publisher, rig.history, real_bucket, gone, limit)),
        Said(Sides(fake, fake, fake_bucket, expire, limit_fake)),
    )
    await case(real)
    await case(said)
    assert said.found == real.found
