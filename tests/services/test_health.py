"""How bots fare: what replicas say of them, gathered, and what is kept of their users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from adapter.bridge.poller import State
from adapter.bridge.presence import PollerStatus, Replicas, ReplicaStatus
from adapter.contract.messages import BOT_STATUSES, BindingInfo, Window
from adapter.services.health import FAILING_MS, BotHealth
from tests.fakes import WINDOW, Bench

VIRTUAL_TIME = True

BOT, USER = "b1@im.bot", "u1@im.wechat"


class FakeReplicas(Replicas):
    """Each answers of the bots that it polls."""

    def __init__(self, *polls: dict[str, PollerStatus], capacity: int = 100, living: int | None = None) -> None:
        self.polls = polls
        self.living = len(polls) if living is None else living
        self.capacity = capacity
        self.requests: list[int] = []

    async def query(self, bots: Sequence[str]) -> tuple[list[ReplicaStatus], int]:
        self.requests.append(len(bots))
        answers = [
            ReplicaStatus(
                instance=f"r{number}",
                version="1",
                partitions={number: 1000},
                bots=len(polls),
                capacity=self.capacity,
                polls={bot: poller for bot, poller in polls.items() if bot in bots},
            )
            for number, polls in enumerate(self.polls, 1)
        ]
        return answers, self.living


async def described(bench: Bench, replicas: Replicas) -> list[BindingInfo]:
    return await BotHealth(replicas, bench.persons, WINDOW, bench.clock).describe(list(bench.bindings))


@pytest.mark.parametrize(
    ("fields", "poller", "status", "detail"),
    [
        ({}, PollerStatus(state="polling", ago_ms=5), "polling", ""),
        ({}, PollerStatus(state="waiting", why="A former owner"), "waiting", "A former owner"),
        ({}, PollerStatus(state="paused", why="NATS accepts no writes."), "paused", "NATS accepts no writes."),
        ({}, PollerStatus(state="stale", why="errcode -14", ago_ms=FAILING_MS), "stale", "errcode -14"),
        ({}, PollerStatus(state="storing", since_ms=FAILING_MS - 1), "storing", ""),
        ({}, PollerStatus(state="storing", since_ms=FAILING_MS), "failing", "iLink's answer cannot be stored"),
        ({}, PollerStatus(state="of a newer version"), "unknown", ""),
        ({}, PollerStatus(state="retrying", why="timeout", ago_ms=FAILING_MS - 1), "retrying", "timeout"),
        ({}, PollerStatus(state="retrying", ago_ms=FAILING_MS), "failing", "iLink answers no poll"),
        ({}, PollerStatus(state="retrying"), "failing", "iLink answers no poll"),
        ({}, PollerStatus(state="retrying", why="unreadable: the answer exceeds 8388608 bytes"), "failing",
         "unreadable: the answer exceeds 8388608 bytes"),
        ({}, PollerStatus(state="retrying", why="record_too_new: version 2"), "too_new", "a newer version"),
        ({"state": "needs_login", "reason": "stale_token"}, None, "needs_login", "stale_token"),
        ({}, None, "not_polled", "no replica polls it"),
    ],
)  # fmt: skip
async def test_a_bot_fares_as_the_replica_that_polls_it_says(
    fields: dict[str, Any], poller: PollerStatus | None, status: str, detail: str, bench: Bench
) -> None:
    await bench.bind(**fields)
    (info,) = await described(bench, FakeReplicas({}, {BOT: poller} if poller else {}))
    assert info.health is not None
    assert (info.health.status, info.health.replica) == (status, "r2" if poller else "")
    assert info.health.detail.startswith(detail)


async def test_since_when_a_bot_is_in_its_state_is_given_by_this_clock(bench: Bench) -> None:
    """A replica tells how long, since its clock may be wrong. A login is missed since the verdict, whoever polls."""
    now_ms = bench.clock.now_ms()
    await bench.bind()
    await bench.bind("s2", "b2@im.bot", "u2@im.wechat", state="needs_login", since_ms=now_ms - 9000)
    polls = {bot: PollerStatus(state="paused", since_ms=4000) for bot in (BOT, "b2@im.bot")}
    paused, lost = [info.health for info in await described(bench, FakeReplicas(polls))]
    assert paused is not None
    assert lost is not None
    assert (paused.status, paused.since_ms) == ("paused", now_ms - 4000)
    assert (lost.status, lost.since_ms) == ("needs_login", now_ms - 9000)


def test_every_state_of_a_poller_has_a_word() -> None:
    """Of BOT_STATUSES; a poller that has ended is not reported."""
    assert {state.value for state in State} - {"ended"} <= set(BOT_STATUSES)


async def test_where_a_replica_is_silent_it_is_not_known_whether_a_bot_is_polled(bench: Bench) -> None:
    await bench.bind()
    (info,) = await described(bench, FakeReplicas({}, living=2))
    assert info.health is not None
    assert (info.health.status, info.health.detail) == ("unknown", "1 of 2 replicas gave no answer")


async def test_a_bot_for_which_there_is_no_room_says_so(bench: Bench) -> None:
    for number in (1, 2):
        await bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
    first, second = await described(bench, FakeReplicas({BOT: PollerStatus(state="polling")}, capacity=1))
    assert first.health is not None
    assert second.health is not None
    assert (first.health.status, second.health.status) == ("polling", "not_polled")
    assert "WECHAT_NATS_CAPACITY" in second.health.detail


async def test_what_is_kept_of_the_user_is_in_the_answer(bench: Bench) -> None:
    for number in (1, 2, 3):
        await bench.bind(f"s{number}", f"b{number}@im.bot", f"u{number}@im.wechat")
    heard_ms = bench.clock.now_ms() - 60_000
    bench.hears("s1", "u1@im.wechat", sends_used=2, opened_ms=heard_ms, sent_at_ms=[heard_ms + 5])
    bench.hears("s2", "u2@im.wechat", newer=True)
    one, newer, never = [info.health for info in await described(bench, FakeReplicas({}))]
    assert one is not None
    assert newer is not None
    assert never is not None
    assert (one.inbound_ms, one.sent_ms, one.window and one.window.remaining) == (heard_ms, heard_ms + 5, 8)
    assert (newer.is_unread, newer.window) == (True, None)
    assert (never.is_unread, never.inbound_ms, never.window) == (False, 0, None)


async def test_a_window_is_shown_without_the_token_of_a_former_bot(bench: Bench) -> None:
    await bench.bind(bot="b2@im.bot")
    bench.hears()
    (info,) = await described(bench, FakeReplicas({}))
    assert info.health is not None
    assert info.health.window == Window(remaining=0)
